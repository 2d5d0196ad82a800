"""Which cells go into which batch: index arrays only, computed before a batch is read.

Every choice is a function of (seed, epoch, batch number) and never of the rank, so that any number of processes sees the
same batches; each takes its share of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from perturbzoo.errors import PerturbZooError

Sampling = Literal["condition", "grouped"]


@dataclass
class CellIndex:
    """Perturbed cells by pair and control cells by context, as two index lists.

    Attributes
    ----------
    cells_by_pair
        For each (condition, context) pair the source rows of its cells.
    context_of_pair
        Shape ``(pairs,)``: context index of each pair.
    controls_by_context
        For each context the source rows of its control cells.
    """

    cells_by_pair: list[np.ndarray]
    context_of_pair: np.ndarray
    controls_by_context: list[np.ndarray]


@dataclass
class BatchIndex:
    """One batch before it is read: shapes ``(B,)``, source rows of cells and matched controls, and each cell's pair."""

    cells: np.ndarray
    controls: np.ndarray
    pairs: np.ndarray


class Sampler(Protocol):
    """A sequence of batches of indices, drawn anew for every epoch."""

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[BatchIndex]: ...


class ConditionSampler:
    """Shuffled training batches in which every condition weighs the same.

    An epoch is a number of rounds; each round deals all pairs once, in random order, over
    ``ceil(pairs / conditions_per_batch)`` batches of nearly equal size. There are as many rounds as make the cells drawn
    in an epoch about as many as there are. A pair walks through a permutation of its cells from round to round, so small
    pairs are seen again and large ones are sampled.

    Parameters
    ----------
    index
        The cells.
    pairs
        The pairs to sample, as positions in ``index.cells_by_pair``.
    conditions_per_batch
        Distinct pairs in a batch.
    cells_per_condition
        Cells of each pair in a batch.
    mode
        ``"condition"`` draws one control for each cell, with replacement, and shuffles the cells of a batch.
        ``"grouped"`` gives each pair m cells and m controls drawn independently of them, without replacement where there
        are enough, pair after pair, so that ``(B, G)`` reshapes to ``(C, m, G)``: what models of distributions need.
    seed
        Seed of every draw.
    rank, world_size
        This process and how many there are: batch i belongs to rank ``i % world_size``; the last batches are repeated
        from the beginning so that every rank gets the same number.
    """

    def __init__(
        self,
        index: CellIndex,
        pairs: np.ndarray,
        *,
        conditions_per_batch: int = 16,
        cells_per_condition: int = 32,
        mode: Sampling = "condition",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in (("conditions_per_batch", conditions_per_batch), ("cells_per_condition", cells_per_condition)):
            if value < 1:
                raise PerturbZooError(f"{name} is {value}: give 1 or more")
        self.index = index
        self.pairs = np.asarray(pairs)
        self.cells_per_condition = cells_per_condition
        self.mode = mode
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        n_cells = sum(len(index.cells_by_pair[pair]) for pair in self.pairs)
        self.n_rounds = max(1, round(n_cells / (len(self.pairs) * cells_per_condition)))
        self.batches_per_round = math.ceil(len(self.pairs) / conditions_per_batch)

    @property
    def resampled_pairs(self) -> np.ndarray:
        """The pairs that have fewer cells than a batch asks for, so that cells repeat within a batch."""
        sizes = np.array([len(self.index.cells_by_pair[pair]) for pair in self.pairs])
        return self.pairs[sizes < self.cells_per_condition]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this rank; the same for every rank."""
        return math.ceil(self.n_rounds * self.batches_per_round / self.world_size)

    def __iter__(self) -> Iterator[BatchIndex]:
        generator = np.random.default_rng([self.seed, self.epoch])
        deals = [
            batch
            for _ in range(self.n_rounds)
            for batch in np.array_split(generator.permutation(self.pairs), self.batches_per_round)
        ]
        walks = {int(pair): self._walk(generator, self.index.cells_by_pair[pair]) for pair in self.pairs}
        # which stretch of its walk a pair has come to in each batch: its round
        for position in range(len(self)):
            number = (position * self.world_size + self.rank) % len(deals)
            yield self._draw(deals[number], walks, number // self.batches_per_round, number)

    def _walk(self, generator: np.random.Generator, cells: np.ndarray) -> np.ndarray:
        """Permutations of the cells one after another, long enough for the epoch: ``(rounds, cells_per_condition)``."""
        needed = self.n_rounds * self.cells_per_condition
        repeats = [generator.permutation(cells) for _ in range(math.ceil(needed / len(cells)))]
        return np.concatenate(repeats)[:needed].reshape(self.n_rounds, self.cells_per_condition)

    def _draw(self, pairs: np.ndarray, walks: dict[int, np.ndarray], turn: int, number: int) -> BatchIndex:
        generator = np.random.default_rng([self.seed, self.epoch, number])
        m = self.cells_per_condition
        cells = np.concatenate([walks[int(pair)][turn] for pair in pairs])
        pools = [self.index.controls_by_context[self.index.context_of_pair[pair]] for pair in pairs]
        with_replacement = self.mode == "condition"
        controls = np.concatenate([generator.choice(pool, m, replace=with_replacement or len(pool) < m) for pool in pools])
        batch = BatchIndex(cells, controls, np.repeat(pairs, m))
        if self.mode == "grouped":
            return batch
        order = generator.permutation(len(cells))
        return BatchIndex(batch.cells[order], batch.controls[order], batch.pairs[order])


class EveryCellSampler:
    """Each cell of the given pairs exactly once, in order: for validation, test and prediction.

    The matched controls are drawn once for all cells, so that they depend on neither rank nor batch size. Each rank takes
    a contiguous share and cuts it into as many batches as every other rank has.

    Parameters
    ----------
    index, pairs, seed, rank, world_size
        As in :class:`ConditionSampler`.
    batch_size
        Cells in a batch at the most.
    """

    def __init__(
        self,
        index: CellIndex,
        pairs: np.ndarray,
        *,
        batch_size: int = 1024,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise PerturbZooError(f"eval_batch_size is {batch_size}: give 1 or more")
        generator = np.random.default_rng([seed, len(pairs)])
        self.cells = np.concatenate([index.cells_by_pair[pair] for pair in pairs])
        sizes = [len(index.cells_by_pair[pair]) for pair in pairs]
        self.pairs = np.repeat(np.asarray(pairs), sizes)
        self.controls = np.concatenate(
            [
                generator.choice(index.controls_by_context[index.context_of_pair[pair]], size)
                for pair, size in zip(pairs, sizes, strict=True)
            ]
        )
        largest_share = math.ceil(len(self.cells) / world_size)
        self.n_batches = math.ceil(largest_share / batch_size)
        self.share = np.array_split(np.arange(len(self.cells)), world_size)[rank]

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch: scores of different epochs are comparable."""

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[BatchIndex]:
        for rows in np.array_split(self.share, self.n_batches):
            yield BatchIndex(self.cells[rows], self.controls[rows], self.pairs[rows])
