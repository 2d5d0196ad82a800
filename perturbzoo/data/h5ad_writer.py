"""An h5ad file that is written block by block, and is there whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perturbzoo.data.reading import expand_path
from perturbzoo.errors import PerturbZooError

if TYPE_CHECKING:
    import h5py
    from anndata import AnnData
    from scipy import sparse

_BLOCK_VALUES = 1 << 18  # values in one block of the file: at 1 MB HDF5 is fast and holds little


class _Disk(io.FileIO):
    """A file that keeps in memory what it could not write.

    HDF5 writes the last of its buffers when a file is closed, and again when the process ends; where these writes fail,
    because the disk is full, it crashes the interpreter, and it crashes as well if it reads other than it wrote. So HDF5 must
    not hear of it; whoever calls HDF5 looks at `failure` and stops.
    """

    failure: OSError | None = None

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._kept: list[tuple[int, bytes]] = []

    def write(self, data: Any) -> int:
        view, at = memoryview(data).cast("B"), self.tell()
        done = 0
        try:
            while self.failure is None and done < len(view):
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.failure = error
        if self.failure is not None:
            self._kept.append((at + done, bytes(view[done:])))
        return len(view)

    def readinto(self, buffer: Any) -> int:
        view, at = memoryview(buffer).cast("B"), self.tell()
        read = super().readinto(view) or 0
        for start, data in self._kept:
            first, last = max(start, at), min(start + len(data), at + len(view))
            if first < last:
                view[first - at : last - at] = data[first - start : last - start]
        return len(view) if self._kept else read

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size) if self.failure is None else 0
        except OSError as error:
            self.failure = error
            return 0

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def finish(self, name: Path) -> None:
        """Have everything on the disk, which may say only now that it is full, and give the file its name."""
        self.check()
        try:
            os.fsync(self.fileno())
            os.replace(self.name, name)
        except OSError as error:
            self.failure = error
            raise


class H5adWriter:
    """An h5ad file under way, made by :func:`new_h5ad`."""

    def __init__(self, store: h5py.File, disk: _Disk) -> None:
        self._store, self._disk = store, disk
        self._shape = (0, 0)
        self._rows = self._values = 0

    def start(self, adata: AnnData) -> None:
        """Write an AnnData as its ``write_h5ad`` does; matrices it does not hold can then be :meth:`put`."""
        from anndata.io import write_elem

        self._shape = adata.shape
        adata.strings_to_categoricals()
        write_elem(self._store, "/", adata)
        if adata.raw is None and "raw" in self._store:
            del self._store["raw"]  # an entry that says "none", which backed mode takes for values
        self._disk.check()

    def put(self, name: str, rows: slice, values: np.ndarray) -> None:
        """Write rows of ``X`` or of the layer `name`.

        Layers are compressed: where the same change, or its error, repeats from cell to cell, next to nothing is left.

        Parameters
        ----------
        name
            ``"X"`` or a layer.
        rows
            Which rows; the first call for a name decides how many make a block of the file, so all but the last of a name
            should have as many.
        values
            Shape ``(B, G)``, float32.
        """
        key = name if name == "X" else f"layers/{name}"
        if key not in self._store:
            self._create(key, len(values))
        self._store[key][rows] = values
        self._disk.check()

    def start_csr(self, n_values: int) -> None:
        """Make ``X`` a CSR matrix of so many values, float32, compressed; its rows are then :meth:`append_csr`-ed."""
        group = self._store.create_group("X")
        group.attrs["encoding-type"], group.attrs["encoding-version"] = "csr_matrix", "0.1.0"
        group.attrs["shape"] = np.array(self._shape, dtype=np.int64)
        options: dict[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
        if n_values:
            options["chunks"] = (min(n_values, _BLOCK_VALUES),)
        for name, dtype in (("data", np.float32), ("indices", np.int32)):
            group.create_dataset(name, shape=(n_values,), dtype=dtype, **(options if n_values else {}))
        group.create_dataset("indptr", data=np.zeros(self._shape[0] + 1, dtype=np.int64))
        self._rows = self._values = 0
        self._disk.check()

    def append_csr(self, block: sparse.csr_matrix) -> None:
        """Write the next rows of the CSR matrix ``X``."""
        group, (rows, values) = self._store["X"], (self._rows, self._values)
        group["data"][values : values + block.nnz] = block.data
        group["indices"][values : values + block.nnz] = block.indices
        group["indptr"][rows + 1 : rows + 1 + block.shape[0]] = values + block.indptr[1:].astype(np.int64)
        self._rows, self._values = rows + block.shape[0], values + block.nnz
        self._disk.check()

    def _create(self, key: str, n_rows: int) -> None:
        n_genes = self._shape[1]
        options: dict[str, Any] = {"chunks": (min(n_rows, max(1, _BLOCK_VALUES // n_genes)), n_genes)}
        if key != "X":
            # few genes of many cells: what repeats from cell to cell stands together
            options["chunks"] = (n_rows, min(n_genes, max(1, _BLOCK_VALUES // n_rows)))
            options |= {"compression": "gzip", "compression_opts": 1, "shuffle": True}
        dataset = self._store.create_dataset(key, shape=self._shape, dtype=np.float32, **options)
        dataset.attrs["encoding-type"] = "array"
        dataset.attrs["encoding-version"] = "0.2.0"


def _part_of(file: Path, process: int | str) -> str:
    # with host and process: two runs with the same output must not write into one another's file
    return f".{file.name}.{socket.gethostname()}-{process}.part"


def _remove_left_over(file: Path) -> None:
    """Remove what killed runs left of the same output: parts whose process, of this host, is gone."""
    pattern = re.compile(re.escape(_part_of(file, "NUMBER")).replace("NUMBER", r"(\d+)"))
    with contextlib.suppress(OSError):  # a folder that can be written need not be listed
        for part in file.absolute().parent.iterdir():
            if (found := pattern.fullmatch(part.name)) and not is_alive(int(found[1])):
                part.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether a process of this host runs; in doubt, it does."""
    try:
        os.kill(process, 0)  # sends nothing, asks whether it could
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # somebody else's; a part is never removed in doubt
    return True


@contextmanager
def new_h5ad(path: str | os.PathLike[str]) -> Iterator[H5adWriter]:
    """Write an h5ad file in the body of ``with``; it takes its name when the body has ended well.

    On any failure nothing is left behind, and what had that name before stays as it was. What a killed process left of the same
    output is removed.

    Parameters
    ----------
    path
        The file; ``$VAR`` is expanded. Its folder must exist.

    Raises
    ------
    PerturbZooError
        The name does not end in ``.h5ad``, the folder is missing or cannot be written, the disk is full.
    """
    import h5py

    file = expand_path(path)
    if file.suffix != ".h5ad":
        raise PerturbZooError(f"{file}: give an output name that ends in .h5ad")
    if not file.absolute().parent.is_dir():
        raise PerturbZooError(f"{file}: the folder {file.absolute().parent} does not exist")
    if file.is_dir():
        raise PerturbZooError(f"{file}: a folder has that name")
    _remove_left_over(file)
    temporary = file.with_name(_part_of(file, os.getpid()))
    try:
        disk = _Disk(temporary)
    except OSError as error:
        raise PerturbZooError(f"{file}: could not be written: {error.strerror}") from error
    try:
        with h5py.File(disk, "w") as store:
            yield H5adWriter(store, disk)
        disk.finish(file)
    except Exception as error:
        if disk.failure is None:
            raise
        raise PerturbZooError(f"{file}: could not be written: {disk.failure.strerror}") from error
    finally:
        disk.close()
        temporary.unlink(missing_ok=True)
