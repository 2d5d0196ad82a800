"""Which cells go into which batch: reproducible, balanced, matched, and shared out evenly over processes."""

from __future__ import annotations

import numpy as np
import pytest

from perturbzoo.data.sampling import BatchIndex, CellIndex, ConditionSampler, EveryCellSampler
from perturbzoo.errors import PerturbZooError

SIZES = (50, 7, 33, 20, 64, 41)  # cells of the pairs; pair i belongs to context i % 2


@pytest.fixture
def index() -> CellIndex:
    ends = np.cumsum(SIZES)
    cells = [np.arange(end - size, end) for end, size in zip(ends, SIZES, strict=True)]
    controls = [np.arange(1000, 1030), np.arange(2000, 2025)]
    return CellIndex(cells, np.arange(len(SIZES)) % 2, controls)


def _sampler(index: CellIndex, **options: object) -> ConditionSampler:
    given = {"conditions_per_batch": 4, "cells_per_condition": 8, **options}
    return ConditionSampler(index, np.arange(len(SIZES)), **given)  # type: ignore[arg-type]


def _pair_of_each(batch: BatchIndex) -> np.ndarray:
    return batch.pairs[batch.row]


def _all(sampler: ConditionSampler | EveryCellSampler, epoch: int = 0) -> list[BatchIndex]:
    sampler.set_epoch(epoch)
    return list(sampler)


def _equal(a: BatchIndex, b: BatchIndex) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("cells", "controls", "pairs", "row"))


@pytest.mark.parametrize("mode", ["condition", "grouped"])
def test_the_order_is_a_function_of_seed_and_epoch(index: CellIndex, mode: str) -> None:
    first, again = _all(_sampler(index, mode=mode)), _all(_sampler(index, mode=mode))
    assert all(_equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (_all(_sampler(index, mode=mode, seed=1)), _all(_sampler(index, mode=mode), epoch=1)):
        assert not any(_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("mode", ["condition", "grouped"])
def test_every_condition_weighs_the_same(index: CellIndex, mode: str) -> None:
    sampler = _sampler(index, mode=mode)
    batches = _all(sampler)
    drawn = np.bincount(np.concatenate([_pair_of_each(batch) for batch in batches]), minlength=len(SIZES))
    # 215 cells in rounds of 6 pairs x 8 cells
    assert sampler.n_rounds == 4
    assert (drawn == 4 * 8).all()
    assert all(len(np.unique(batch.pairs)) == len(batch.pairs) for batch in batches)


@pytest.mark.parametrize("mode", ["condition", "grouped"])
def test_cells_belong_to_their_pair_and_controls_to_its_context(index: CellIndex, mode: str) -> None:
    for batch in _all(_sampler(index, mode=mode)):
        pair = _pair_of_each(batch)
        for cell, control, owner in zip(batch.cells, batch.controls, pair, strict=True):
            assert cell in index.cells_by_pair[owner]
            assert control in index.controls_by_context[owner % 2]


def test_a_pair_sees_all_its_cells_before_any_twice(index: CellIndex) -> None:
    batches = _all(_sampler(index))
    cells, pairs = (np.concatenate(part) for part in zip(*((b.cells, _pair_of_each(b)) for b in batches), strict=True))
    for pair, size in enumerate(SIZES):
        counts = np.unique(cells[pairs == pair], return_counts=True)[1]
        assert len(counts) == min(size, 32)
        assert counts.max() - counts.min() <= 1


def test_controls_are_redrawn_every_epoch(index: CellIndex) -> None:
    def matched(epoch: int) -> dict[int, int]:
        return {c: k for batch in _all(_sampler(index), epoch) for c, k in zip(batch.cells, batch.controls, strict=True)}

    first, second = matched(0), matched(1)
    both = set(first) & set(second)
    assert len(both) > 50
    assert sum(first[cell] != second[cell] for cell in both) > 0.8 * len(both)


def test_grouped_batches_reshape_to_groups_with_independent_controls(index: CellIndex) -> None:
    for batch in _all(_sampler(index, mode="grouped")):
        shape = (len(batch.pairs), 8)
        assert (_pair_of_each(batch).reshape(shape) == batch.pairs[:, None]).all()
        # 30 and 25 controls are enough for 8 without replacement
        assert all(len(set(group)) == 8 for group in batch.controls.reshape(shape))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_batches_of_one_process(index: CellIndex, world_size: int) -> None:
    whole = _all(_sampler(index))
    shares = [_all(_sampler(index, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    dealt = [share[step] for step in range(len(shares[0])) for share in shares]
    assert all(_equal(a, b) for a, b in zip(whole, dealt, strict=False))
    assert len(dealt) - len(whole) < world_size


def test_small_pairs_are_named(index: CellIndex) -> None:
    assert _sampler(index, cells_per_condition=21).resampled_pairs.tolist() == [1, 3]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch_size", [1, 16, 64, 1000])
def test_every_cell_once_and_equally_many_batches(index: CellIndex, world_size: int, batch_size: int) -> None:
    pairs = np.array([0, 2, 3, 5])
    ranks = [
        _all(EveryCellSampler(index, pairs, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    cells = np.concatenate([batch.cells for batches in ranks for batch in batches])
    assert sorted(cells) == sorted(np.concatenate([index.cells_by_pair[pair] for pair in pairs]))
    assert max(len(batch.cells) for batches in ranks for batch in batches) <= batch_size


def test_controls_depend_on_neither_rank_nor_batch_size_nor_epoch(index: CellIndex) -> None:
    def matched(batch_size: int, world_size: int, epoch: int) -> dict[int, int]:
        samplers = [
            EveryCellSampler(index, np.arange(6), batch_size=batch_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        batches = [batch for sampler in samplers for batch in _all(sampler, epoch)]
        return {cell: control for batch in batches for cell, control in zip(batch.cells, batch.controls, strict=True)}

    assert matched(64, 1, 0) == matched(7, 3, 0) == matched(1000, 2, 4)


@pytest.mark.parametrize("option", ["conditions_per_batch", "cells_per_condition"])
def test_sizes_start_at_one(index: CellIndex, option: str) -> None:
    with pytest.raises(PerturbZooError, match=f"{option} is 0: give 1 or more"):
        _sampler(index, **{option: 0})
