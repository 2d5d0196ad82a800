"""Writing h5ad files: what anndata would have written, whole or not at all, also where the disk is full."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from perturbzoo.data.h5ad_writer import _Disk, new_h5ad
from perturbzoo.errors import PerturbZooError


def entries(file: Path) -> dict[str, str]:
    """Everything a file holds, as text, by name."""
    found: dict[str, str] = {}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        attributes = sorted((key, str(value)) for key, value in item.attrs.items())
        found[name] = f"{attributes} {np.asarray(item).tolist() if isinstance(item, h5py.Dataset) else ''}"

    with h5py.File(file) as store:
        note("/", store)
        store.visititems(note)
    return found


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes; Python ignores the signal that goes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_same_file_as_anndata_writes(make_adata: Callable[..., anndata.AnnData], tmp_path: Path) -> None:
    adata = make_adata(conditions=("G0",), cells_per_condition=5, n_controls=5)
    adata.uns["source"] = {"model": "GEARS", "seed": 0}
    with new_h5ad(tmp_path / "ours.h5ad") as writer:
        writer.start(adata.copy())
    adata.write_h5ad(tmp_path / "theirs.h5ad")
    assert entries(tmp_path / "ours.h5ad") == entries(tmp_path / "theirs.h5ad")


@pytest.mark.parametrize(("n_cells", "n_genes", "block"), [(10, 4, 3), (1, 1, 1), (7, 3, 100)])
def test_matrices_in_blocks(n_cells: int, n_genes: int, block: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, n_cells, n_genes)).astype(np.float32)
    empty = anndata.AnnData(
        obs=pd.DataFrame(index=list(map(str, range(n_cells)))), var=pd.DataFrame(index=list("ABCD")[:n_genes])
    )
    with new_h5ad(tmp_path / "blocks.h5ad") as writer:
        writer.start(empty)
        for start in range(0, n_cells, block):
            rows = slice(start, min(start + block, n_cells))
            writer.put("X", rows, values[0, rows])
            writer.put("delta", rows, values[1, rows])
    written = anndata.read_h5ad(tmp_path / "blocks.h5ad")
    np.testing.assert_array_equal(written.X, values[0])
    np.testing.assert_array_equal(written.layers["delta"], values[1])


def test_layers_that_repeat_take_no_room(tmp_path: Path) -> None:
    empty = anndata.AnnData(
        obs=pd.DataFrame(index=list(map(str, range(2000)))), var=pd.DataFrame(index=list(map(str, range(500))))
    )
    with new_h5ad(tmp_path / "repeated.h5ad") as writer:
        writer.start(empty)
        writer.put("delta", slice(0, 2000), np.tile(np.random.default_rng(0).normal(size=500).astype(np.float32), (2000, 1)))
    with h5py.File(tmp_path / "repeated.h5ad") as store:
        assert store["layers/delta"].id.get_storage_size() < 2000 * 500 * 4 / 20


@pytest.mark.parametrize("size", [0, 300, 2000, 20_000, 200_000])
def test_hdf5_does_not_notice_a_full_disk(size: int, tmp_path: Path) -> None:
    """Whatever could not be written reads back, so that HDF5 never meets other data than it wrote."""
    disk = _Disk(tmp_path / "file")
    values = np.random.default_rng(0).normal(size=(300, 40))
    with small_disk(size), h5py.File(disk, "w") as store:
        for number in range(5):
            store[f"group{number}/values"] = values + number
            store[f"group{number}/names"] = [f"name {number}"] * 300
        store.flush()
        for number in range(5):
            np.testing.assert_array_equal(store[f"group{number}/values"], values + number)
            assert store[f"group{number}/names"].asstr()[:].tolist() == [f"name {number}"] * 300
    assert disk.failure is not None
    assert disk.failure.errno == errno.EFBIG
    disk.close()
    assert (tmp_path / "file").stat().st_size <= size


def write(file: Path, size: int = 10**9, error: BaseException | None = None) -> None:
    """Write a small file on a disk of `size` bytes, with an error on the way."""
    empty = anndata.AnnData(obs=pd.DataFrame(index=list("xyz")), var=pd.DataFrame(index=list(map(str, range(1000)))))
    with small_disk(size), new_h5ad(file) as writer:
        writer.start(empty)
        writer.put("X", slice(0, 3), np.ones((3, 1000), dtype=np.float32))
        if error is not None:
            raise error


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "old.h5ad"
    write(file)
    before, size = file.read_bytes(), file.stat().st_size
    # at once, in the table of genes, in X, and when the last buffers are written
    for smaller in (0, 3000, size - 3000, size - 1):
        with pytest.raises(PerturbZooError, match=r"old\.h5ad: could not be written: File too large"):
            write(file, smaller)
    for error in (KeyError("anything"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write(file, error=error)
    assert [path.name for path in tmp_path.iterdir()] == ["old.h5ad"]
    assert file.read_bytes() == before


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    """Of the same output, by processes that are gone; not what somebody is writing, nor what belongs to another output."""
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    host, alive = socket.gethostname(), os.getppid()
    dead = tmp_path / f".out.h5ad.{host}-{gone.pid}.part"
    kept = [
        tmp_path / f".out.h5ad.{host}-{alive}.part",
        tmp_path / f".out.h5ad.another{host}-{gone.pid}.part",
        tmp_path / f".other.h5ad.{host}-{gone.pid}.part",
        tmp_path / f".outxh5ad.{host}-{gone.pid}.part",
        tmp_path / "out.h5ad.part",
    ]
    for part in (dead, *kept):
        part.write_bytes(b"half")
    with new_h5ad(tmp_path / "out.h5ad") as writer:
        writer.start(anndata.AnnData(np.ones((2, 3), dtype=np.float32)))
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "out.h5ad"])


def test_a_killed_run_leaves_a_part_that_the_next_run_removes(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from perturbzoo.data.h5ad_writer import new_h5ad\n"
        "with new_h5ad(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out.h5ad")], check=False)
    assert killed.returncode == -signal.SIGKILL
    (part,) = tmp_path.iterdir()
    assert part.name.endswith(".part")
    with new_h5ad(tmp_path / "out.h5ad") as writer:
        writer.start(anndata.AnnData(np.ones((2, 3), dtype=np.float32)))
    assert list(tmp_path.iterdir()) == [tmp_path / "out.h5ad"]
