"""A labelled matrix of cells read a block of rows at a time, so that it never needs to fit in memory: sums of its groups, a few cells.

Called by the evaluation of two files. :mod:`perturbzoo.data.screen` reads what is trained on, whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo.data import columns
from perturbzoo.data.h5ad import open_h5ad, read_cells, read_tables, value_elements
from perturbzoo.data.packed_cells import PackedCells
from perturbzoo.data.reading import LOG1P_MAXIMUM, ValueRange, h5ad_file, values_as_csr
from perturbzoo.data.screen import Columns, find_contexts, gene_names, match_levels, read_labels
from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.perturbation import Condition

if TYPE_CHECKING:
    from anndata import AnnData

Block = Any
"""Rows of a matrix: scipy CSR or a dense array, float32."""
_VALUES = 1 << 22  # values held at a time


@dataclass
class CellFile:
    """What a file says of its cells; its values are read when they are asked for.

    Attributes
    ----------
    where
        The file's name, for messages.
    genes
        Gene names, unique.
    conditions, condition
        Distinct conditions, and shape ``(cells,)`` indices into them.
    contexts, context
        Distinct combinations of levels of the columns that controls are matched on, and shape ``(cells,)`` indices.
    condition_key
        The obs column of the conditions.
    depth
        Counts per cell that the values were normalised to before log1p, if the file says so (our own predictions do).
    """

    where: str
    genes: list[str]
    conditions: list[Condition]
    condition: np.ndarray
    contexts: list[tuple[str, ...]]
    context: np.ndarray
    condition_key: str
    depth: float | None
    _file: Path | None = None
    _layer: str | None = None
    _memory: Block | None = None
    _columns: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.condition)

    @property
    def is_control(self) -> np.ndarray:
        """Shape ``(cells,)``, bool."""
        return np.array([condition.is_control for condition in self.conditions], dtype=bool)[self.condition]

    def select(self, genes: list[str]) -> CellFile:
        """The same cells with these genes, in this order."""
        if genes == self.genes:
            return self
        position = {gene: column for column, gene in enumerate(self.genes)}
        return replace(self, genes=genes, _columns=np.array([position[gene] for gene in genes]))

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """Yield the number of a block's first row and the block, float32 CSR or dense, `genes` in order."""
        rows = self._from_memory() if self._file is None else self._from_file(self._file)
        for start, block in rows:
            yield start, block if self._columns is None else block[:, self._columns]

    def _from_memory(self) -> Iterator[tuple[int, Block]]:
        assert self._memory is not None
        n_values = self._memory.nnz if sparse.issparse(self._memory) else self._memory.size
        height = max(1, _VALUES * len(self) // max(1, n_values))
        for start in range(0, len(self), height):
            yield start, self._memory[start : start + height]

    def _from_file(self, file: Path) -> Iterator[tuple[int, Block]]:
        from tqdm import tqdm

        with open_h5ad(file) as opened:
            element = value_elements(opened)[self._layer]
            data = element["data"] if hasattr(element, "keys") else element
            n_values = data.size
            height = max(1, _VALUES * len(self) // max(1, n_values))
            indptr = element["indptr"][:] if hasattr(element, "keys") else None
            name = f"reading {file.name}"
            for start in tqdm(range(0, len(self), height), desc=name, delay=3, disable=None, leave=False):
                stop = min(start + height, len(self))
                if indptr is None:
                    yield start, np.asarray(element[start:stop], dtype=np.float32)
                    continue
                first, last = int(indptr[start]), int(indptr[stop])
                parts = (data[first:last].astype(np.float32), element["indices"][first:last], indptr[start : stop + 1] - first)
                n_columns = int(element.attrs.get("shape", element.attrs.get("h5sparse_shape"))[1])
                block = sparse.csr_matrix(parts, shape=(stop - start, n_columns))
                # an index out of range would be read from somebody else's memory
                block.check_format(full_check=True)
                yield start, block


def open_cells(
    source: AnnData | str | os.PathLike[str],
    wanted: Columns,
    *,
    name: str,
    key_of_other: str | None = None,
) -> CellFile:
    """Read what a file says of its cells: labels, contexts, gene names.

    CSR and dense matrices stay in the file; others (CSC, files of old anndata) are read whole.

    Parameters
    ----------
    source
        An AnnData in memory, or an h5ad file.
    wanted
        Which columns to use; what is None is detected. `min_cells`, `cell_filter` and `value_space` are not looked at.
    name
        What messages call an AnnData without a file.
    key_of_other
        Column of conditions in the file this one is compared with: tried first if `wanted` names none, since a file of
        predictions without control cells has nothing by which to find its column. Its column of doses may be missing here:
        labels can spell doses out.

    Raises
    ------
    PerturbZooError
        Not a readable file, no cells, no column of conditions, missing covariates, no numbers.
    """
    if not isinstance(source, (str, os.PathLike)):
        where, file = name, None
        obs, var, uns = source.obs, source.var, source.uns
        memory = _matrix(source, wanted.layer, where)
    else:
        file = h5ad_file(source)
        where, memory = str(file), None
        with open_h5ad(file) as opened:
            element = value_elements(opened).get(wanted.layer)
            obs, var = read_tables(opened)
            uns = _provenance(opened)
            streams = element is not None and _can_stream(element)
        if not streams:
            memory = _matrix(read_cells(file, wanted.layer), wanted.layer, where)
            file = None
    if len(obs) == 0 or len(var) == 0:
        raise PerturbZooError(f"{where}: {len(obs)} cells x {len(var)} genes: there is nothing to read")
    import anndata

    genes = gene_names(anndata.AnnData(obs=obs[[]], var=var), wanted, where)
    labels = replace(wanted, condition_key=wanted.condition_key or _condition_column(obs, wanted, where, key_of_other))
    if key_of_other is not None and isinstance(wanted.dose_key, str) and wanted.dose_key not in obs.columns:
        labels = replace(labels, dose_key=None)
    kind = wanted.kind or columns.find_kind(obs) or columns.DEFAULT_KIND
    conditions, condition, key = read_labels(obs, labels, where, kind)
    match_on = tuple(wanted.covariates if wanted.match_on is None else wanted.match_on)
    match_levels(obs, match_on, where)  # says which column is missing
    contexts, context = find_contexts(obs, match_on)
    depth = uns.get("perturbzoo", {}).get("depth") if isinstance(uns.get("perturbzoo"), Mapping) else None
    return CellFile(
        where=where,
        genes=genes,
        conditions=conditions,
        condition=condition,
        contexts=contexts,
        context=context,
        condition_key=key,
        depth=None if depth is None else float(depth),
        _file=file,
        _layer=wanted.layer,
        _memory=memory,
    )


@dataclass
class Survey:
    """What a first pass over the values of a file found.

    Attributes
    ----------
    found
        Their range.
    totals
        Shape ``(cells,)``, float64: sum of each cell's values.
    linear_totals
        Shape ``(cells,)``, float64: sum of ``expm1`` of them: the depth, if they are log1p-normalised.
    filled
        Share of the values that are stored.
    not_finite
        Shape ``(cells,)``, bool: the cell has a value that is NaN or infinite.
    """

    found: ValueRange
    totals: np.ndarray
    linear_totals: np.ndarray
    filled: float
    not_finite: np.ndarray


def survey(cells: CellFile) -> Survey:
    """Pass over the values once."""
    found, filled = ValueRange(), 0
    totals, linear, not_finite = np.zeros(len(cells)), np.zeros(len(cells)), np.zeros(len(cells), dtype=bool)
    for start, block in cells.blocks():
        values = block.data if sparse.issparse(block) else block
        found = found.and_also(values)
        filled += values.size
        rows = slice(start, start + block.shape[0])
        bad = ~np.isfinite(values)
        if bad.any():
            not_finite[rows] = row_sums(with_values(block, bad.astype(np.float32))) > 0
        totals[rows] = row_sums(block)
        with np.errstate(invalid="ignore"):
            linear[rows] = row_sums(with_values(block, np.expm1(np.clip(values, -LOG1P_MAXIMUM, LOG1P_MAXIMUM))))
    return Survey(found, totals, linear, filled / max(1, len(cells) * len(cells.genes)), not_finite)


@dataclass
class GroupTotals:
    """Sums over the cells of each of N groups.

    Attributes
    ----------
    count
        Shape ``(N,)``.
    total, square
        Shape ``(N, G)``, float64: sums of the log1p-normalised values and of their squares.
    cells
        The sampled cells, in the order they were asked for.
    """

    count: np.ndarray
    total: np.ndarray
    square: np.ndarray
    cells: PackedCells


def group_totals(
    cells: CellFile, group: np.ndarray, n_groups: int, scale: np.ndarray | None, sampled: np.ndarray
) -> GroupTotals:
    """Pass over the values and add up each group's.

    Parameters
    ----------
    cells
        The file.
    group
        Shape ``(cells,)``: each cell's group, -1 for cells to be passed over.
    n_groups
        N.
    scale
        Shape ``(cells,)``: counts are multiplied by it before log1p. None: the values are log1p-normalised already.
    sampled
        Rows to keep whole, in any order; they must differ.
    """
    n_genes = len(cells.genes)
    result = GroupTotals(
        count=np.bincount(group[group >= 0], minlength=n_groups),
        total=np.zeros((n_groups, n_genes)),
        square=np.zeros((n_groups, n_genes)),
        cells=PackedCells(n_genes),
    )
    order = np.argsort(sampled)
    wanted = sampled[order]
    for start, block in cells.blocks():
        stop = start + block.shape[0]
        factor = None if scale is None else scale[start:stop].astype(np.float32)
        mine = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, stop)] - start
        if len(mine):
            rows = block if len(mine) == block.shape[0] else block[mine]
            result.cells.add(sparse.csr_matrix(rows, dtype=np.float32), None if factor is None else factor[mine])
        if factor is not None:
            values = _data(block)
            lengths = np.diff(block.indptr) if sparse.issparse(block) else None
            values = values * (factor[:, None] if lengths is None else np.repeat(factor, lengths))
            block = with_values(block, np.log1p(values))
        present, code = np.unique(group[start:stop], return_inverse=True)
        used = np.flatnonzero(present[code] >= 0)
        indicator = sparse.csr_matrix((np.ones(len(used)), (code[used], used)), shape=(len(present), stop - start))
        for table, part in ((result.total, block), (result.square, with_values(block, _data(block).astype(np.float64) ** 2))):
            sums = indicator @ part
            sums = sums.toarray() if sparse.issparse(sums) else sums
            table[present[present >= 0]] += sums[present >= 0]
    result.cells.put_in_order(order)
    return result


def row_sums(block: Block) -> np.ndarray:
    """Sum of each row, float64."""
    return np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()


def with_values(block: Block, values: np.ndarray) -> Block:
    """The block with other values in its filled places."""
    if not sparse.issparse(block):
        return values
    return sparse.csr_matrix((values, block.indices, block.indptr), shape=block.shape)


def _data(block: Block) -> np.ndarray:
    return block.data if sparse.issparse(block) else np.asarray(block)


def _matrix(adata: AnnData, layer: str | None, where: str) -> Block:
    """The values in memory: CSR as they are, dense ones not made sparse, which would take three times the memory."""
    values = adata.X if layer is None else adata.layers.get(layer)
    if isinstance(values, np.ndarray) and np.issubdtype(values.dtype, np.number):
        return values.astype(np.float32, copy=False)
    return values_as_csr(adata, layer, where)


def _can_stream(element: Any) -> bool:
    """Whether rows can be read from the file by themselves."""
    if not hasattr(element, "keys"):
        return element.dtype.kind in "iufb"
    kind = str(element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", "")))
    return kind.removesuffix("_matrix") == "csr" and element["data"].dtype.kind in "iufb"


def _provenance(opened: Any) -> dict[str, Any]:
    """``uns['perturbzoo']`` alone: the rest of uns may be large or unreadable."""
    found = opened.get("uns/perturbzoo/depth")
    return {"perturbzoo": {"depth": found[()]}} if found is not None else {}


def _condition_column(obs: pd.DataFrame, wanted: Columns, where: str, key_of_other: str | None) -> str:
    """The column of conditions, also of a file without control cells."""
    if key_of_other in obs.columns:
        return str(key_of_other)
    present = [name for name in columns.CONDITION_COLUMNS if name in obs.columns]
    with_controls = [
        name
        for name in present
        if any(columns.is_control_label(obs[name].astype(str).unique().tolist(), wanted.control_labels))
    ]
    if not present:
        raise PerturbZooError(
            f"{where}: no obs column that looks like a perturbation; it has {shortened(obs.columns, 12) or 'none'}; name one "
            "with condition_key"
        )
    return (with_controls or present)[0]
