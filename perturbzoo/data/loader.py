"""Batches of tensors from batches of indices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from perturbzoo.data.batch import ConditionTable, PerturbationBatch
from perturbzoo.data.sampling import Sampler
from perturbzoo.data.source import BufferPool, CellSource, gather_pairs


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
        for index in self.sampler:
            expression, control = gather_pairs(self.source, self._pool, index.cells, index.controls)
            yield PerturbationBatch(
                expression=expression,
                control=control,
                row=torch.from_numpy(index.row),
                table=self.table.select(torch.from_numpy(index.pairs)),
                context_control=torch.from_numpy(self.control_mean[self.context_of_pair[index.pairs]]),
                size_factor=torch.from_numpy(self.size_factor[index.cells]),
                control_size_factor=torch.from_numpy(self.size_factor[index.controls]),
                covariates=torch.from_numpy(self.covariates[index.cells]),
                cell=torch.from_numpy(index.cells),
                control_cell=torch.from_numpy(index.controls),
                depth=self.depth,
            )
            # this frame must not keep the buffers in use while the next batch is gathered
            del expression, control
