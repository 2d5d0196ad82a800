"""From h5ad files to one checked matrix: what is read, what is refused, and in which words."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo.errors import PerturbZooError, shortened

if TYPE_CHECKING:
    import h5py
    from anndata import AnnData

    from perturbzoo.data.spec import ValueSpace

# a log1p-normalised value of 30 would be e^30 counts; raw counts with a fraction are ambient-corrected or scaled
LOG1P_MAXIMUM = 30.0
_BLOCK = 1 << 18  # values worked on at a time, so that nothing needs memory of the matrix's size
_FEW_GROUPS = 8

_COMPARISONS = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_CLAUSE = re.compile(r"^\s*([^<>=!]+?)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*$")


def expand_path(path: str | os.PathLike[str]) -> Path:
    """Expand ``$VAR`` and ``~``, ``public:NAME`` (downloaded on first use) and ``embedded:FILE`` (simulated on first use).

    Raises
    ------
    PerturbZooError
        A variable is not set, or there is no such public or embedded file.
    """
    scheme, _, name = os.fspath(path).partition(":")
    if scheme == "public":
        from perturbzoo.data.public import fetch

        return fetch(name)
    if scheme == "embedded":
        from perturbzoo.data.embedded import embedded_file

        return embedded_file(name)
    text = os.path.expanduser(os.path.expandvars(os.fspath(path)))
    missing = re.findall(r"\$\{?(\w+)\}?", text)
    if missing:
        raise PerturbZooError(f"{path}: the environment variable {missing[0]} is not set; export it or write the path out")
    return Path(text)


def h5ad_file(path: str | os.PathLike[str]) -> Path:
    """Expand a path (see :func:`expand_path`) and refuse what is no file."""
    file = expand_path(path)
    if not file.exists():
        raise PerturbZooError(f"{file}: no such file")
    if file.is_dir():
        raise PerturbZooError(f"{file}: a folder, not an h5ad file")
    return file


@contextmanager
def h5ad_errors(file: Path) -> Iterator[None]:
    """Say in one line that a file cannot be read, whatever anndata and h5py raised: they have many kinds of errors for it."""
    try:
        yield
    except PerturbZooError:
        raise
    except MemoryError as error:
        raise PerturbZooError(f"{file}: does not fit in memory: save a subset of its cells or genes and use that") from error
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PerturbZooError(f"{file}: not a readable h5ad file (truncated or damaged?): {first_line}") from error


def require_h5ad(opened: h5py.File, file: Path) -> None:
    """Refuse HDF5 files of other makers."""
    if "mod" in opened:
        modalities = ", ".join(opened["mod"])
        raise PerturbZooError(
            f"{file}: a MuData file; save one of its modalities ({modalities}) as h5ad: mudata.read(FILE)['rna'].write_h5ad(...)"
        )
    if "obs" not in opened or "var" not in opened:
        raise PerturbZooError(f"{file}: no h5ad file: it holds {shortened(opened) or 'nothing'}, but no 'obs' and 'var'")


def read_anndata(path: str | os.PathLike[str]) -> AnnData:
    """Read one h5ad file into memory, or say in one line why it cannot be read."""
    import anndata
    import h5py

    file = h5ad_file(path)
    with h5ad_errors(file):
        with h5py.File(file, "r") as opened:
            require_h5ad(opened, file)
        return anndata.read_h5ad(file)


def check_unique(names: pd.Index, what: Literal["genes", "cells"], where: str) -> None:
    """Refuse names of genes or cells that occur more than once."""
    twice = names[names.duplicated()].unique()
    if len(twice):
        remedies = {
            "genes": "call adata.var_names_make_unique(), or choose another var column with gene_key",
            "cells": "call adata.obs_names_make_unique()",
        }
        raise PerturbZooError(
            f"{where}: {len(twice)} names of {what} occur more than once ({shortened(twice)}); {remedies[what]}"
        )


def values_as_csr(adata: AnnData, layer: str | None, where: str) -> sparse.csr_matrix:
    """Return the values as CSR float32, sharing memory with `adata` where the type already fits."""
    if layer is not None and layer not in adata.layers:
        raise PerturbZooError(f"{where}: no layer '{layer}'; it has {shortened(adata.layers) or 'none'}")
    values = adata.X if layer is None else adata.layers[layer]
    if values is None:
        layers = shortened(adata.layers)
        raise PerturbZooError(f"{where}: X is missing; " + (f"name a layer: {layers}" if layers else "there are no values"))
    # an AnnData opened with backed="r" holds a handle to the file
    values = values.to_memory() if hasattr(values, "to_memory") else values
    matrix = values if sparse.issparse(values) else np.asarray(values)
    if not np.issubdtype(matrix.dtype, np.number):
        raise PerturbZooError(f"{where}: {name_of_values(layer)} holds {matrix.dtype}, not numbers")
    return sparse.csr_matrix(matrix).astype(np.float32, copy=False)


def name_of_values(layer: str | None) -> str:
    """``X`` or ``layer 'counts'``, for messages."""
    return "X" if layer is None else f"layer '{layer}'"


@dataclass(frozen=True)
class ValueRange:
    """What one pass over values found; the zeros that a sparse matrix leaves out change nothing in it.

    Attributes
    ----------
    whole
        Whether all finite values are whole numbers.
    smallest, largest
        Of the finite values and 0.
    n_not_finite, n_negative
        How many are NaN or infinite, and below 0.
    """

    whole: bool = True
    smallest: float = 0.0
    largest: float = 0.0
    n_not_finite: int = 0
    n_negative: int = 0

    def and_also(self, values: np.ndarray) -> ValueRange:
        """The range of what was seen before and of further values."""
        is_finite = np.isfinite(values)
        finite = values if is_finite.all() else values[is_finite]
        return ValueRange(
            whole=self.whole and bool((finite == np.rint(finite)).all()),
            smallest=min(self.smallest, float(finite.min(initial=0.0))),
            largest=max(self.largest, float(finite.max(initial=0.0))),
            n_not_finite=self.n_not_finite + values.size - finite.size,
            n_negative=self.n_negative + int((finite < 0).sum()),
        )

    @property
    def space(self) -> ValueSpace:
        """What the values are, given that :func:`value_problems` finds nothing: whole numbers are counts."""
        return "counts" if self.whole else "log1p"


def value_problems(found: ValueRange, wanted: ValueSpace | None, what: str = "X") -> list[str]:
    """Everything that keeps values from being used, and what would be right.

    Parameters
    ----------
    found
        The values' range.
    wanted
        What the user says they are; None if nothing was said. Whole numbers are then counts, fractions with a maximum
        below 30 are log1p, and anything else is a problem.
    what
        What the values are called: ``X`` or a layer.
    """
    problems = []
    if found.n_not_finite:
        problems.append(
            f"{what} holds NaN or infinite values ({found.n_not_finite:,} of them): remove those cells or set them to 0"
        )
    if found.n_negative:
        problems.append(
            f"{what} holds negative values ({found.n_negative:,} of them, smallest {found.smallest:g}): scaled or centred data "
            "cannot be used; give raw counts or log1p-normalised values"
        )
    if problems:
        return problems
    if wanted == "counts" and not found.whole:
        problems.append(
            f"value_space is 'counts', but {what} holds fractions (maximum {found.largest:g}); give raw counts, or "
            "value_space: log1p"
        )
    elif wanted == "log1p" and found.largest >= LOG1P_MAXIMUM:
        problems.append(
            f"value_space is 'log1p', but {what} reaches {found.largest:g}: these look like counts; give value_space: counts"
        )
    elif wanted == "log1p" and found.whole and found.largest > 0:
        problems.append(
            f"value_space is 'log1p', but {what} holds whole numbers only (maximum {found.largest:g}): these are counts; give "
            "value_space: counts"
        )
    elif wanted is None and not found.whole and found.largest >= LOG1P_MAXIMUM:
        problems.append(
            f"{what} holds fractions up to {found.largest:g}: neither raw counts nor log1p-normalised; give raw counts, or "
            "apply scanpy.pp.normalize_total and scanpy.pp.log1p"
        )
    return problems


def detect_value_space(csr: sparse.csr_matrix, wanted: ValueSpace | None, where: str, what: str = "X") -> ValueSpace:
    """Tell raw counts from log1p-normalised values, or check what the user said; see :func:`value_problems`.

    Raises
    ------
    PerturbZooError
        NaN, infinite or negative values; values that contradict `wanted`; values that are neither.
    """
    found = ValueRange()
    for start in range(0, csr.nnz, _BLOCK):
        found = found.and_also(csr.data[start : min(start + _BLOCK, csr.nnz)])
    if problems := value_problems(found, wanted, what):
        raise PerturbZooError(f"{where}: {problems[0]}")
    return wanted or found.space


def filter_cells(obs: pd.DataFrame, expression: str, where: str) -> np.ndarray:
    """Evaluate a filter such as ``"grna_frac > .5 and n_counts >= 500"`` on the obs columns.

    Clauses ``column comparison value`` joined by ``and``; nothing else is evaluated, so that a filter read from a
    checkpoint can do no harm. A missing number passes no comparison but ``!=``.

    Returns
    -------
    Shape ``(cells,)``, bool: the cells to keep.
    """
    from perturbzoo.data.columns import require_column

    keep = np.ones(len(obs), dtype=bool)
    for clause in re.split(r"\s+and\s+", expression.strip()):
        found = _CLAUSE.match(clause)
        if not found:
            raise PerturbZooError(f"{where}: cell_filter '{clause}' is not 'column > value'; join several with 'and'")
        name, comparison, value = found.groups()
        column = require_column(obs, name, "cell_filter", where)
        compare = _COMPARISONS[comparison]
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            try:
                threshold = float(value)
            except ValueError:
                raise PerturbZooError(
                    f"{where}: cell_filter '{clause}': column '{name}' is numeric, '{value}' is no number"
                ) from None
            keep &= compare(column.to_numpy(dtype=float, na_value=np.nan), threshold)
        elif comparison in ("==", "!="):
            keep &= np.asarray(compare(column.astype(str).to_numpy(dtype=object), value.strip("'\"")), dtype=bool)
        else:
            raise PerturbZooError(f"{where}: cell_filter '{clause}': column '{name}' is text; use == or !=")
    return keep


def row_sums(csr: sparse.csr_matrix) -> np.ndarray:
    """Sum of each row, float64, without the copy of all values in float64 that ``csr.sum`` makes."""
    sums = np.zeros(csr.shape[0])
    for start, stop in _row_ranges(csr):
        first, last = csr.indptr[start], csr.indptr[stop]
        filled = np.flatnonzero(np.diff(csr.indptr[start : stop + 1]))
        if len(filled):
            block = csr.data[first:last].astype(np.float64)
            sums[start + filled] = np.add.reduceat(block, csr.indptr[start + filled] - first)
    return sums


def _row_ranges(csr: sparse.csr_matrix) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) rows of blocks of a few million values."""
    rows = max(1, _BLOCK * csr.shape[0] // max(1, csr.nnz))
    for start in range(0, csr.shape[0], rows):
        yield start, min(start + rows, csr.shape[0])


def group_means(csr: sparse.csr_matrix, groups: Sequence[np.ndarray], squared: bool = False) -> np.ndarray:
    """Mean row (or mean squared row) of each group of rows, ``(groups, columns)``, float64; one pass for all groups."""
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    members = np.concatenate([*groups, np.zeros(0, dtype=np.int64)])
    weights = np.repeat(1.0 / np.maximum(sizes, 1), sizes)
    group = np.repeat(np.arange(len(groups)), sizes)
    indicator = sparse.csc_matrix((weights, (group, members)), shape=(len(groups), csr.shape[0]))
    means = np.zeros((len(groups), csr.shape[1]))
    # a product with a dense matrix is faster, but takes time for each group
    few = indicator.toarray().T if len(groups) <= _FEW_GROUPS else None
    for start, stop in _row_ranges(csr):
        first, last = csr.indptr[start], csr.indptr[stop]
        # scipy's own slices are copies
        values = np.square(csr.data[first:last]) if squared else csr.data[first:last]
        parts = (values, csr.indices[first:last], csr.indptr[start : stop + 1] - first)
        block = sparse.csr_matrix(parts, shape=(stop - start, csr.shape[1]), copy=False)
        means += (indicator[:, start:stop] @ block).toarray() if few is None else (block.T @ few[start:stop]).T
    return means


def normalise(csr: sparse.csr_matrix, size_factor: np.ndarray, depth: float) -> None:
    """Turn counts into ``log1p(counts / size_factor * depth)``, in place.

    Parameters
    ----------
    csr
        Shape ``(cells, genes)``, raw counts, float32.
    size_factor
        Shape ``(cells,)``, counts.
    depth
        Counts per cell after normalisation.
    """
    scale = (depth / size_factor).astype(np.float32)
    for start, stop in _row_ranges(csr):
        block = csr.data[csr.indptr[start] : csr.indptr[stop]]
        block *= np.repeat(scale[start:stop], np.diff(csr.indptr[start : stop + 1]))
        np.log1p(block, out=block)


def keep_rows(csr: sparse.csr_matrix, rows: np.ndarray) -> sparse.csr_matrix:
    """Return the rows marked in a ``(cells,)`` bool array, moved together within the memory of `csr`, which is used up."""
    lengths = np.diff(csr.indptr)
    indptr = np.concatenate([[0], np.cumsum(lengths[rows])]).astype(csr.indptr.dtype)
    done = 0
    for start, stop in _row_ranges(csr):
        kept = rows[start:stop]
        old = slice(csr.indptr[start], csr.indptr[stop])
        new = slice(indptr[done], indptr[done := done + int(kept.sum())])
        wanted = np.repeat(kept, lengths[start:stop])
        # never beyond what has been read: rows only move up
        csr.data[new] = csr.data[old][wanted]
        csr.indices[new] = csr.indices[old][wanted]
    return sparse.csr_matrix((csr.data[: indptr[-1]], csr.indices[: indptr[-1]], indptr), shape=(done, csr.shape[1]))
