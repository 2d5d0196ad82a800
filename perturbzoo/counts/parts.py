"""Parts of a long run's result, kept beside its output until all are there, so that a killed run can go on.

Each part is a file that is whole or absent; a note says what was asked for, and a lock is held by the process that writes. A run with
the same request takes what is there, another removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from perturbzoo.errors import PerturbZooError, PerturbZooWarning


class Parts:
    """The folder of parts of one output.

    Parameters
    ----------
    output
        The file they are to become.
    request
        A hash of everything that the result depends on.
    n_parts, n_columns
        How many parts there will be, and the columns of each.

    Raises
    ------
    PerturbZooError
        Another process writes the same output; the folder cannot be written.
    """

    def __init__(self, output: Path, request: str, n_parts: int, n_columns: int) -> None:
        self.output, self.n_columns = output, n_columns
        self.folder = output.with_name(f".{output.name}.parts")
        self._note = self.folder / "request.json"
        with self._disk():
            self.folder.mkdir(exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        try:
            # held as long as this process lives, however it ends
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise PerturbZooError(
                f"{output}: another process is writing it: wait for it, stop it, or give another output"
            ) from error
        before = self._read_note()
        with self._disk():
            stale = [file for file in self.folder.iterdir() if file.name != "lock"]
            if before != request:
                for file in stale:
                    file.unlink()
                if stale:
                    message = (
                        f"{output}: what an interrupted run left was of another request: it is removed and all begins anew"
                    )
                    warnings.warn(message, PerturbZooWarning, stacklevel=4)
            for broken in self.folder.glob("*.writing"):
                broken.unlink()
            note = self.folder / "request.writing"
            note.write_text(json.dumps({"request": request}))
            os.replace(note, self._note)
        self.missing = [number for number in range(n_parts) if not self._is_whole(number)]
        if len(self.missing) < n_parts:
            message = (
                f"{output}: goes on where an interrupted run ended: {n_parts - len(self.missing)} of {n_parts} parts are there"
            )
            warnings.warn(message, PerturbZooWarning, stacklevel=4)

    def put(self, number: int, rows: sparse.csr_matrix) -> None:
        """Keep a part; it is there whole or not at all."""
        most = int(rows.data.max(initial=0))
        columns = np.uint16 if self.n_columns <= 1 << 16 else np.int32
        temporary = self.folder / f"{number}.writing"
        with self._disk():
            with temporary.open("wb") as file:
                np.savez(
                    file,
                    data=rows.data.astype(np.min_scalar_type(most)),
                    indices=rows.indices.astype(columns),
                    indptr=rows.indptr.astype(np.int64),
                )
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._file(number))

    def get(self, number: int) -> sparse.csr_matrix:
        """A part that is there, int32."""
        with self._disk(), np.load(self._file(number)) as part:
            data, indices, indptr = (part[name] for name in ("data", "indices", "indptr"))
        shape = (len(indptr) - 1, self.n_columns)
        return sparse.csr_matrix((data.astype(np.int32), indices.astype(np.int32), indptr), shape=shape)

    def n_values(self, number: int) -> int:
        """How many values a part has, without reading them."""
        with np.load(self._file(number)) as part:
            return int(part["indptr"][-1])

    def remove(self) -> None:
        """Remove all of them: the output is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def release(self) -> None:
        """Leave the folder to whoever goes on, or no folder where there is no part to keep."""
        if not any(self.folder.glob("*.npz")):
            self.remove()
        self._lock.close()

    def _is_whole(self, number: int) -> bool:
        try:
            self.n_values(number)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False  # not there, or damaged: it is made again
        return True

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.npz"

    def _read_note(self) -> str:
        """The request that the parts are of; empty where there is none."""
        try:
            note = json.loads(self._note.read_text())
        except (OSError, ValueError):
            return ""
        return str(note.get("request", "")) if isinstance(note, dict) else ""

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PerturbZooError(f"{self.output}: could not be written: {error.strerror}") from error


def digest(*values: Any) -> str:
    """A hash of tensors, arrays, numbers, texts, and dicts and sequences of them."""
    found = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        if isinstance(value, np.ndarray):
            found.update(f"{value.dtype}{value.shape}".encode())
            found.update(
                np.ascontiguousarray(value).view(np.uint8).reshape(-1).data if value.dtype != object else repr(value).encode()
            )
        elif isinstance(value, dict):
            for name in value:
                add(name)
                add(value[name])
        elif isinstance(value, list | tuple):
            found.update(f"[{len(value)}".encode())
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode() + b"\0")

    add(values)
    return found.hexdigest()
