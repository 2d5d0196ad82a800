"""Which cells go into which batch: index arrays only, computed before a batch is read.

Every choice is a function of (seed, epoch) and never of the rank, so that any number of processes sees the same batches;
each takes its share of them. Indices are drawn for many batches at once: between two batches the cache is full of
expression values, and each small array operation costs several times what it costs alone.
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

    def __post_init__(self) -> None:
        self._controls = np.concatenate(self.controls_by_context)
        self._n_controls = np.array([len(controls) for controls in self.controls_by_context])
        self._first_control = np.cumsum(self._n_controls) - self._n_controls

    def draw_controls(self, generator: np.random.Generator, pairs: np.ndarray) -> np.ndarray:
        """Draw one control cell of its context for each of the given pairs ``(B,)``, with replacement: rows ``(B,)``."""
        context = self.context_of_pair[pairs]
        return self._controls[self._first_control[context] + generator.integers(self._n_controls[context])]


@dataclass
class BatchIndex:
    """One batch before it is read.

    Attributes
    ----------
    cells, controls
        Shape ``(B,)``: source rows of the cells and of their matched controls.
    pairs
        Shape ``(C,)``: the distinct pairs of the cells.
    row
        Shape ``(B,)``: position in `pairs` of each cell's pair.
    """

    cells: np.ndarray
    controls: np.ndarray
    pairs: np.ndarray
    row: np.ndarray


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
        self._sizes = np.array([len(index.cells_by_pair[pair]) for pair in self.pairs])
        self.n_rounds = max(1, round(int(self._sizes.sum()) / (len(self.pairs) * cells_per_condition)))
        self.batches_per_round = math.ceil(len(self.pairs) / conditions_per_batch)

    @property
    def resampled_pairs(self) -> np.ndarray:
        """The pairs that have fewer cells than a batch asks for, so that cells repeat within a batch."""
        return self.pairs[self._sizes < self.cells_per_condition]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this rank; the same for every rank."""
        return math.ceil(self.n_rounds * self.batches_per_round / self.world_size)

    def __iter__(self) -> Iterator[BatchIndex]:
        generator = np.random.default_rng([self.seed, self.epoch])
        deals = [generator.permutation(len(self.pairs)) for _ in range(self.n_rounds)]
        walks = np.stack([self._walk(generator, self.index.cells_by_pair[pair]) for pair in self.pairs])
        current, batches = -1, list[BatchIndex]()
        for step in range(len(self)):
            number = (step * self.world_size + self.rank) % (self.n_rounds * self.batches_per_round)
            turn, place = divmod(number, self.batches_per_round)
            if turn != current:
                current, batches = turn, self._round(turn, self.pairs[deals[turn]], walks[deals[turn], turn])
            yield batches[place]

    def _walk(self, generator: np.random.Generator, cells: np.ndarray) -> np.ndarray:
        """Permutations of the cells one after another, long enough for the epoch: ``(rounds, cells_per_condition)``."""
        needed = self.n_rounds * self.cells_per_condition
        repeats = [generator.permutation(cells) for _ in range(math.ceil(needed / len(cells)))]
        return np.concatenate(repeats)[:needed].reshape(self.n_rounds, self.cells_per_condition)

    def _round(self, turn: int, pairs: np.ndarray, cells: np.ndarray) -> list[BatchIndex]:
        """Cut a deal of all `pairs` ``(P,)`` and their `cells` ``(P, m)`` into batches, and draw the controls."""
        # [seed, epoch, 0] would be the stream of [seed, epoch]: SeedSequence fills up with zeros
        generator = np.random.default_rng([self.seed, self.epoch, turn + 1])
        m = self.cells_per_condition
        dealt = np.array_split(pairs, self.batches_per_round)
        rows = cells.ravel()
        place = np.concatenate([np.arange(len(batch)) for batch in dealt]).repeat(m)
        if self.mode == "grouped":
            pools = [self.index.controls_by_context[context] for context in self.index.context_of_pair[pairs]]
            controls = np.concatenate([generator.choice(pool, m, replace=len(pool) < m) for pool in pools])
        else:
            controls = self.index.draw_controls(generator, pairs.repeat(m))
            # sorted by batch, shuffled within: one sort for all batches
            batch = np.repeat(np.arange(len(dealt)), [len(batch) * m for batch in dealt])
            order = np.argsort(batch + generator.random(len(rows)))
            rows, controls, place = rows[order], controls[order], place[order]
        ends = np.cumsum([len(batch) * m for batch in dealt])[:-1]
        parts = zip(*(np.split(array, ends) for array in (rows, controls, place)), strict=True)
        return [BatchIndex(cells, controls, pairs, row) for (cells, controls, row), pairs in zip(parts, dealt, strict=True)]


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
        self.controls = index.draw_controls(generator, self.pairs)
        largest_share = math.ceil(len(self.cells) / world_size)
        self.n_batches = math.ceil(largest_share / batch_size)
        self.share = np.array_split(np.arange(len(self.cells)), world_size)[rank]

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch: scores of different epochs are comparable."""

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[BatchIndex]:
        for rows in np.array_split(self.share, self.n_batches):
            pairs, row = np.unique(self.pairs[rows], return_inverse=True)
            yield BatchIndex(self.cells[rows], self.controls[rows], pairs, row)
