"""Batches of tensors from batches of indices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from perturbzoo.data.batch import ConditionTable, PerturbationBatch
from perturbzoo.data.sampling import BatchIndex, Sampler
from perturbzoo.data.source import BufferPool, CellSource, gather_pairs

# between two batches the cache is full of expression, and each small array operation costs several times what it costs
# alone: they are done for this many batches at once
_AHEAD = 32


class BatchLoader:
    """Reads the batches that a sampler names; what Lightning is given as a dataloader.

    No worker processes: a batch is one gather from memory, cheaper than sending it between processes.

    Parameters
    ----------
    source
        The cells.
    sampler
        Says which cells form each batch. Lightning calls its ``set_epoch``.
    table
        All pairs of the data, encoded; a batch holds the rows it needs.
    control_mean
        Shape ``(contexts, G)``: mean control profile of each context of these data.
    context_of_pair
        Shape ``(pairs,)``: row of `control_mean` for each pair. (``table.context`` points into the model's list of
        contexts instead, where a new one is -1.)
    size_factor
        Shape ``(cells,)``, counts.
    covariates
        Shape ``(cells, V)``: level of each covariate.
    depth
        Counts per cell after normalisation.
    """

    # Lightning looks at it wherever it finds a sampler
    batch_sampler = None

    def __init__(
        self,
        source: CellSource,
        sampler: Sampler,
        table: ConditionTable,
        control_mean: Tensor,
        context_of_pair: np.ndarray,
        size_factor: np.ndarray,
        covariates: np.ndarray,
        depth: float,
    ) -> None:
        self.source = source
        self.sampler = sampler
        self.table = table
        # NumPy picks rows: torch takes longer for small arrays, and wakes its threads for some
        self.control_mean = control_mean.numpy()
        self.context_of_pair = context_of_pair
        self.size_factor = np.asarray(size_factor, dtype=np.float32)
        self.covariates = np.asarray(covariates, dtype=np.int64)
        self.depth = depth
        self._pool = BufferPool(source.n_genes)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[PerturbationBatch]:
        indices = iter(self.sampler)
        while ahead := list(itertools.islice(indices, _AHEAD)):
            yield from self._read(ahead)

    def _read(self, indices: list[BatchIndex]) -> Iterator[PerturbationBatch]:
        """Look up what is small for all these batches at once, then read the expression of one after another."""
        sizes = [len(index.cells) for index in indices]
        # cells and controls of the first batch, of the second, ...
        rows = np.concatenate([part for index in indices for part in (index.cells, index.controls)])
        halves = [size for size in sizes for _ in range(2)]
        cell = torch.from_numpy(rows).split(halves)
        size_factor = torch.from_numpy(self.size_factor[rows]).split(halves)
        covariates = torch.from_numpy(self.covariates[rows]).split(halves)
        pairs = torch.from_numpy(np.concatenate([index.pairs for index in indices]))
        tables = self.table.select(pairs).split([len(index.pairs) for index in indices])
        end = 0
        for number, (index, size, table) in enumerate(zip(indices, sizes, tables, strict=True)):
            start, end = end, end + 2 * size
            expression, control = gather_pairs(self.source, self._pool, rows[start:end], size)
            yield PerturbationBatch(
                expression=expression,
                control=control,
                row=torch.from_numpy(index.row),
                table=table,
                context_control=torch.from_numpy(self.control_mean[self.context_of_pair[index.pairs]]),
                size_factor=size_factor[2 * number],
                control_size_factor=size_factor[2 * number + 1],
                covariates=covariates[2 * number],
                cell=cell[2 * number],
                control_cell=cell[2 * number + 1],
                depth=self.depth,
            )
            # this frame must not keep the buffers in use while the next batch is gathered
            del expression, control
