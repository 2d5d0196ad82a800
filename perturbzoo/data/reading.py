"""From h5ad files to one checked matrix: what is read, what is refused, and in which words."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo.errors import PerturbZooError, shortened

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbzoo.data.spec import ValueSpace

# a log1p-normalised value of 30 would be e^30 counts; raw counts with a fraction are ambient-corrected or scaled
LOG1P_MAXIMUM = 30.0
_BLOCK = 1 << 22  # values checked at a time, so that no check needs memory of the matrix's size

_COMPARISONS = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_CLAUSE = re.compile(r"^\s*([\w. ]+?)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*$")


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


def read_anndata(path: str | os.PathLike[str]) -> AnnData:
    """Read one h5ad file into memory, or say in one line why it cannot be read."""
    import anndata

    file = expand_path(path)
    if not file.exists():
        raise PerturbZooError(f"{file}: no such file")
    if file.is_dir():
        raise PerturbZooError(f"{file}: a folder, not an h5ad file")
    try:
        return anndata.read_h5ad(file)
    except Exception as error:  # anndata and h5py raise many kinds for a damaged file; all mean the same to the user
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PerturbZooError(f"{file}: not a readable h5ad file (truncated or damaged?): {first_line}") from error


def read_screen(paths: Sequence[str], join: Literal["intersection", "union"]) -> tuple[AnnData, str]:
    """Read one or several h5ad files as one screen.

    Parameters
    ----------
    paths
        h5ad files; ``$VAR`` is expanded.
    join
        Genes to keep where there are several files: those common to all, or all (absent genes count as 0).

    Returns
    -------
    adata
        The cells of all files.
    report
        One line saying how the genes were joined; empty for one file.
    """
    if len(paths) == 1:
        return read_anndata(paths[0]), ""
    import anndata

    screens = [read_anndata(path) for path in paths]
    for path, screen in zip(paths, screens, strict=True):
        check_names(screen, str(path))
        _require_x(screen, None, str(path))
    joined = anndata.concat(
        screens,
        join="inner" if join == "intersection" else "outer",
        fill_value=0,
        index_unique="-",
        keys=[str(number) for number in range(len(screens))],
        merge="first",
    )
    if joined.n_vars == 0:
        raise PerturbZooError("the files share no gene: are the identifiers of the same kind? (gene_key names a var column)")
    sizes = ", ".join(str(screen.n_vars) for screen in screens)
    return joined, f"{len(screens)} files with {sizes} genes: the {join} of {joined.n_vars} genes is used"


def check_names(adata: AnnData, where: str) -> None:
    """Refuse duplicate genes and duplicate cells."""
    for names, axis, remedy in (
        (adata.var_names, "genes", "call adata.var_names_make_unique(), or choose another column with gene_key"),
        (adata.obs_names, "cells", "call adata.obs_names_make_unique()"),
    ):
        twice = names[names.duplicated()].unique()
        if len(twice):
            raise PerturbZooError(f"{where}: {len(twice)} names of {axis} occur more than once ({shortened(twice)}); {remedy}")


def _require_x(adata: AnnData, layer: str | None, where: str) -> object:
    if layer is not None:
        if layer not in adata.layers:
            raise PerturbZooError(f"{where}: no layer '{layer}'; it has {shortened(adata.layers) or 'none'}")
        return adata.layers[layer]
    if adata.X is None:
        layers = shortened(adata.layers)
        raise PerturbZooError(f"{where}: X is missing; " + (f"name a layer: {layers}" if layers else "there are no values"))
    return adata.X


def values_as_csr(adata: AnnData, layer: str | None, where: str) -> sparse.csr_matrix:
    """Return the values as CSR float32, sharing memory with `adata` where the type already fits."""
    values = _require_x(adata, layer, where)
    matrix = values if sparse.issparse(values) else sparse.csr_matrix(np.asarray(values))
    csr = sparse.csr_matrix(matrix.tocsr())
    if not np.issubdtype(csr.dtype, np.number):
        raise PerturbZooError(f"{where}: X holds {csr.dtype}, not numbers")
    return csr.astype(np.float32, copy=False)


def check_values(csr: sparse.csr_matrix, where: str) -> tuple[bool, float]:
    """Refuse NaN, infinite and negative values; return whether all are whole numbers, and the largest."""
    whole, largest = True, 0.0
    for start in range(0, csr.nnz, _BLOCK):
        block = csr.data[start : start + _BLOCK]
        if not np.isfinite(block).all():
            position = start + int(np.flatnonzero(~np.isfinite(block))[0])
            cell = int(np.searchsorted(csr.indptr, position, side="right")) - 1
            raise PerturbZooError(
                f"{where}: X holds NaN or infinite values (first in cell {cell}, gene {csr.indices[position]}); "
                "remove those cells or set them to 0"
            )
        if (block < 0).any():
            raise PerturbZooError(
                f"{where}: X holds negative values (smallest {block.min():g}): scaled or centred data cannot be used; "
                "give raw counts or log1p-normalised values"
            )
        whole = whole and bool((block == np.rint(block)).all())
        largest = max(largest, float(block.max()))
    return whole, largest


def detect_value_space(csr: sparse.csr_matrix, wanted: ValueSpace | None, where: str) -> ValueSpace:
    """Tell raw counts from log1p-normalised values, or check what the user said.

    Whole numbers are counts; fractions with a maximum below 30 are log1p; anything else is refused.

    Raises
    ------
    PerturbZooError
        NaN, infinite or negative values; values that contradict `wanted`; values that are neither.
    """
    whole, largest = check_values(csr, where)
    if wanted == "counts":
        if not whole:
            raise PerturbZooError(
                f"{where}: value_space is 'counts', but X holds fractions (maximum {largest:g}); give raw counts, or "
                "value_space: log1p"
            )
        return "counts"
    if wanted == "log1p":
        if largest >= LOG1P_MAXIMUM:
            raise PerturbZooError(
                f"{where}: value_space is 'log1p', but X reaches {largest:g}: these look like counts; give value_space: counts"
            )
        return "log1p"
    if whole:
        return "counts"
    if largest < LOG1P_MAXIMUM:
        return "log1p"
    raise PerturbZooError(
        f"{where}: X holds fractions up to {largest:g}: neither raw counts nor log1p-normalised; give raw counts, or "
        "apply scanpy.pp.normalize_total and scanpy.pp.log1p"
    )


def filter_cells(obs: pd.DataFrame, expression: str, where: str) -> np.ndarray:
    """Evaluate a filter such as ``"grna_frac > .5 and n_counts >= 500"`` on the obs columns.

    Clauses ``column comparison value`` joined by ``and``; nothing else is evaluated, so that a filter read from a
    checkpoint can do no harm.

    Returns
    -------
    Shape ``(cells,)``, bool: the cells to keep.
    """
    from perturbzoo.data.columns import require_column

    keep = np.ones(len(obs), dtype=bool)
    for clause in re.split(r"\s+and\s+", expression.strip()):
        found = _CLAUSE.match(clause)
        if not found:
            raise PerturbZooError(f"cell_filter '{clause}' is not 'column > value'; join several with 'and'")
        name, comparison, value = found.groups()
        column = require_column(obs, name, "cell_filter", where)
        if pd.api.types.is_numeric_dtype(column):
            try:
                threshold = float(value)
            except ValueError:
                raise PerturbZooError(f"cell_filter '{clause}': column '{name}' is numeric, '{value}' is no number") from None
            keep &= np.asarray(_COMPARISONS[comparison](column.to_numpy(), threshold), dtype=bool)
        elif comparison in ("==", "!="):
            keep &= np.asarray(_COMPARISONS[comparison](column.astype(str).to_numpy(), value.strip("'\"")), dtype=bool)
        else:
            raise PerturbZooError(f"cell_filter '{clause}': column '{name}' is text; use == or !=")
    return keep


def row_sums(csr: sparse.csr_matrix) -> np.ndarray:
    """Sum of each row, float64, without the copy of all values in float64 that ``csr.sum`` makes."""
    sums = np.zeros(csr.shape[0])
    filled = np.flatnonzero(np.diff(csr.indptr))
    if len(filled):
        sums[filled] = np.add.reduceat(csr.data, csr.indptr[filled], dtype=np.float64)
    return sums


def _row_ranges(csr: sparse.csr_matrix) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) rows of blocks of a few million values."""
    rows = max(1, _BLOCK * csr.shape[0] // max(1, csr.nnz))
    for start in range(0, csr.shape[0], rows):
        yield start, min(start + rows, csr.shape[0])


def group_means(csr: sparse.csr_matrix, groups: Sequence[np.ndarray], squared: bool = False) -> np.ndarray:
    """Mean row (or mean squared row) of each group of rows, ``(groups, columns)``, float64; one pass for all groups."""
    sizes = np.array([len(group) for group in groups])
    members = np.concatenate([*groups, np.zeros(0, dtype=np.int64)])
    weights = np.repeat(1.0 / np.maximum(sizes, 1), sizes)
    group = np.repeat(np.arange(len(groups)), sizes)
    indicator = sparse.csc_matrix((weights, (group, members)), shape=(len(groups), csr.shape[0]))
    means = np.zeros((len(groups), csr.shape[1]))
    for start, stop in _row_ranges(csr):
        block = csr[start:stop]
        if squared:
            # not in place: a slice of all rows is the matrix itself
            block = sparse.csr_matrix((np.square(block.data), block.indices, block.indptr), shape=block.shape)
        means += (indicator[:, start:stop] @ block).toarray()
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
