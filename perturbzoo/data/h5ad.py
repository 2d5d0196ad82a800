"""The parts of an h5ad file, one at a time: tables whole, values in blocks, so that a file larger than memory can be looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo.data.reading import ValueRange, h5ad_errors, h5ad_file, require_h5ad
from perturbzoo.errors import PerturbZooError

if TYPE_CHECKING:
    import h5py
    from anndata import AnnData

_BLOCK = 1 << 22  # values read at a time


@dataclass
class Matrix:
    """What one pass over a matrix found.

    Attributes
    ----------
    storage
        Such as ``CSR float32``.
    shape
        Cells and columns, as the matrix itself has them.
    found
        The range of its values.
    filled
        Share of its values that are not 0.
    totals
        Shape ``(cells,)``, float64: sum of each row.
    """

    storage: str
    shape: tuple[int, int]
    found: ValueRange
    filled: float
    totals: np.ndarray


@contextmanager
def open_h5ad(file: Path) -> Iterator[h5py.File]:
    """Open a file for reading; what cannot be read in it is told in one line.

    Raises
    ------
    PerturbZooError
        The file, or what is read from it inside the ``with``, is damaged or no h5ad file.
    """
    import h5py

    with h5ad_errors(file), h5py.File(file, "r") as opened:
        require_h5ad(opened, file)
        yield opened


def read_tables(opened: h5py.File) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The obs and var tables."""
    import anndata
    from anndata.io import read_elem

    if not _has_modern_tables(opened):
        backed = anndata.read_h5ad(opened.filename, backed="r")
        return backed.obs, backed.var
    return read_elem(opened["obs"]), read_elem(opened["var"])


def _has_modern_tables(opened: h5py.File) -> bool:
    """Whether obs and var are groups: before anndata 0.7 they were HDF5 compounds, which only anndata's own reader knows."""
    return all(hasattr(opened[name], "keys") for name in ("obs", "var"))


def value_elements(opened: h5py.File) -> dict[str | None, Any]:
    """What holds the values of the cells: X, by the key None, and the layers."""
    elements = {None: opened.get("X"), **opened.get("layers", {})}
    # None is written as a dataset without a shape
    return {name: element for name, element in elements.items() if hasattr(element, "keys") or getattr(element, "shape", None)}


def read_cells(path: str | os.PathLike[str], layer: str | None) -> AnnData:
    """Read obs, var and one matrix of an h5ad file into memory: X, or the given layer.

    Sparse values become float32 and their indices 32-bit while they are read, so that the process never holds more than the
    matrix it is going to use.
    """
    import anndata
    from anndata.io import read_elem

    file = h5ad_file(path)
    with open_h5ad(file) as opened:
        element = value_elements(opened).get(layer)
        if element is None or not _has_modern_tables(opened):
            # there is nothing to save, but a message to give
            return anndata.read_h5ad(file)
        values = _read_csr(element) if _is_csr_of_numbers(element) else read_elem(element)
        obs, var = read_tables(opened)
        return anndata.AnnData(values if layer is None else None, obs, var, layers={layer: values} if layer else None)


def _is_csr_of_numbers(element: Any) -> bool:
    return hasattr(element, "keys") and _sparse_form(element) == "CSR" and element["data"].dtype.kind in "iuf"


def _read_csr(group: h5py.Group) -> sparse.csr_matrix:
    n_rows, n_columns = (int(size) for size in group.attrs.get("shape", group.attrs.get("h5sparse_shape")))
    n_values = len(group["data"])
    index = np.int32 if max(n_columns, n_values) <= np.iinfo(np.int32).max else np.int64
    parts = []
    for name, dtype in (("data", np.float32), ("indices", index), ("indptr", index)):
        part = np.empty(group[name].shape, dtype=dtype)
        if part.size:
            # HDF5 converts on the way
            group[name].read_direct(part)
        parts.append(part)
    matrix = sparse.csr_matrix(tuple(parts), shape=(n_rows, n_columns))
    # an index out of range would be written to somebody else's memory when rows are made dense
    matrix.check_format(full_check=True)
    return matrix


def scan_matrix(element: Any, name: str) -> Matrix:
    """Pass over a matrix of the file: a dataset, or a group that holds a sparse one.

    Raises
    ------
    PerturbZooError
        It holds no numbers; `name` says in the message what it is.
    """
    values = element if hasattr(element, "shape") else element["data"]
    form = "dense" if values is element else _sparse_form(element)
    if not np.issubdtype(values.dtype, np.number):
        raise PerturbZooError(f"{name} holds {values.dtype}, not numbers")
    shape = values.shape if values is element else element.attrs.get("shape", element.attrs.get("h5sparse_shape"))
    n_cells, n_columns = (int(size) for size in shape)
    found, nonzero, totals = ValueRange(), 0, np.zeros(n_cells)
    for block, rows in _blocks(element, form, n_columns):
        found = found.and_also(block)
        nonzero += int(np.count_nonzero(block))
        totals += np.bincount(rows, weights=block, minlength=n_cells)
    return Matrix(
        storage=f"{form} {values.dtype}",
        shape=(n_cells, n_columns),
        found=found,
        filled=nonzero / max(1, n_cells * n_columns),
        totals=totals,
    )


def _sparse_form(group: Any) -> str:
    kind = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", ""))
    return str(kind).removesuffix("_matrix").upper()


def _blocks(element: Any, form: str, n_columns: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield values and the row of each; a progress bar appears if it takes long and somebody watches."""
    from tqdm import tqdm

    if form == "dense":
        height = max(1, _BLOCK // max(1, n_columns))
        for start in tqdm(range(0, element.shape[0], height), desc="reading values", delay=3, disable=None, leave=False):
            rows = element[start : start + height]
            yield rows.ravel(), np.repeat(np.arange(start, start + len(rows)), n_columns)
        return
    data = element["data"]
    indptr = element["indptr"][:] if form == "CSR" else None
    for start in tqdm(range(0, len(data), _BLOCK), desc="reading values", delay=3, disable=None, leave=False):
        stop = min(start + _BLOCK, len(data))
        if indptr is None:
            yield data[start:stop], element["indices"][start:stop]
            continue
        first, last = np.searchsorted(indptr, start, side="right") - 1, np.searchsorted(indptr, stop, side="left")
        lengths = np.diff(np.clip(indptr[first : last + 1], start, stop))
        yield data[start:stop], np.repeat(np.arange(first, last), lengths)
