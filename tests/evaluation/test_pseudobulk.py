"""Streamed sums against one-shot numpy, over batches and ranks; halves and the ceiling."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from perturbzoo.evaluation.pseudobulk import (
    GroupMoments,
    GroupSums,
    Pseudobulks,
    PseudobulkSums,
    assign_halves,
    de_sets,
)

CONTROL = np.array([[0.5, 1.0, 0.0, 2.0], [1.5, 0.0, 1.0, 2.5]])
CONTEXT = np.array([0, 1, 0, 1, 0])
N_CELLS = 83


@pytest.fixture
def cells() -> dict[str, torch.Tensor]:
    """83 cells of pairs 0, 1, 3 and 4; pair 2 has none."""
    random = torch.Generator().manual_seed(0)
    pair = torch.tensor([0, 1, 3, 4])[torch.randint(0, 4, (N_CELLS,), generator=random)]
    blocks = {name: torch.rand(N_CELLS, 4, generator=random) for name in ("predicted", "control", "observed", "variance")}
    return {"pair": pair, **blocks}


def _streamed(cells: dict[str, torch.Tensor], order: torch.Tensor, batch_size: int) -> PseudobulkSums:
    sums = PseudobulkSums(CONTROL, CONTEXT, variance=True)
    for rows in order.split(batch_size):
        sums.update(**{name: block[rows] for name, block in cells.items()})
    return sums


def _assert_same(one: Pseudobulks, other: Pseudobulks) -> None:
    for name, value in vars(one).items():
        np.testing.assert_allclose(value, getattr(other, name), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("batch_size", [1, 7, N_CELLS])
def test_streamed_sums_equal_numpy_in_any_order_and_batching(cells: dict[str, torch.Tensor], batch_size: int) -> None:
    order = torch.randperm(N_CELLS, generator=torch.Generator().manual_seed(batch_size))
    result = _streamed(cells, order, batch_size).compute()
    block = {name: value.double().numpy() for name, value in cells.items()}
    np.testing.assert_array_equal(result.pair, [0, 1, 3, 4])
    np.testing.assert_array_equal(result.context, [0, 1, 1, 0])
    for row, pair in enumerate(result.pair):
        own = block["pair"] == pair
        base = CONTROL[CONTEXT[pair]]
        assert result.count[row] == own.sum()
        np.testing.assert_array_equal(result.control[row], base)
        expected = base + block["predicted"][own].mean(0) - block["control"][own].mean(0)
        np.testing.assert_allclose(result.predicted[row], expected, atol=1e-6)
        np.testing.assert_allclose(result.observed[row], block["observed"][own].mean(0), atol=1e-6)
        np.testing.assert_allclose(result.observed_variance[row], block["observed"][own].var(0, ddof=1), atol=1e-6)
        assert result.predicted_variance is not None
        np.testing.assert_allclose(result.predicted_variance[row], block["variance"][own].mean(0), atol=1e-6)


def test_two_ranks_merged_equal_one(cells: dict[str, torch.Tensor]) -> None:
    order = torch.arange(N_CELLS)
    whole = _streamed(cells, order, 16)
    first, second = _streamed(cells, order[::2], 16), _streamed(cells, order[1::2], 16)
    # Lightning syncs by gathering every state from the ranks and applying its reduction: the same call here.
    states = {id(getattr(first, name)): [getattr(first, name), getattr(second, name)] for name in first._reductions}
    first.sync(dist_sync_fn=lambda state, group: states[id(state)], distributed_available=lambda: True)
    for name in whole._reductions:
        torch.testing.assert_close(getattr(first, name), getattr(whole, name), rtol=1e-6, atol=1e-6)
    first.unsync()
    assert int(first.count.sum()) == len(order[::2])


def test_padding_cells_are_not_counted(cells: dict[str, torch.Tensor]) -> None:
    expected = _streamed(cells, torch.arange(N_CELLS), N_CELLS).compute()
    padded = {name: torch.cat([block, torch.full_like(block[:3], 99.0)]) for name, block in cells.items()}
    padded["pair"][-3:] = -1
    _assert_same(_streamed(padded, torch.arange(N_CELLS + 3), 20).compute(), expected)


def test_reset_forgets(cells: dict[str, torch.Tensor]) -> None:
    sums = _streamed(cells, torch.arange(N_CELLS), 30)
    expected = sums.compute()
    sums.reset()
    sums.update(**cells)
    _assert_same(sums.compute(), expected)


def test_passes_in_and_outside_inference_mode_may_follow_each_other(cells: dict[str, torch.Tensor]) -> None:
    sums = PseudobulkSums(CONTROL, CONTEXT, variance=True)
    with torch.inference_mode():
        sums.update(**{name: block.clone() for name, block in cells.items()})
        expected = sums.compute()
        sums.reset()
    sums.update(**{**cells, "predicted": cells["predicted"].clone().requires_grad_()})
    _assert_same(sums.compute(), expected)


def test_the_draw_of_controls_does_not_change_a_prediction() -> None:
    random = torch.Generator().manual_seed(1)
    delta = torch.tensor([0.3, -0.2, 0.0, 1.0])
    for _ in range(2):
        control = 3 * torch.rand(5, 4, generator=random)
        sums = PseudobulkSums(CONTROL, CONTEXT)
        sums.update(torch.ones(5, dtype=torch.int64), control + delta, control, torch.rand(5, 4, generator=random))
        np.testing.assert_allclose(sums.compute().predicted, [CONTROL[1] + delta.numpy()], atol=1e-6)


def test_a_constant_gene_has_no_variance_and_one_cell_has_none_defined() -> None:
    sums = GroupSums(3, 2)
    for _ in range(40):
        sums.update(torch.zeros(23, dtype=torch.int64), torch.tensor([[1.3, 0.0]]).expand(23, 2))
    sums.update(torch.tensor([1]), torch.tensor([[1.0, 2.0]]))
    moments = sums.compute()
    np.testing.assert_array_equal(moments.count, [920, 1, 0])
    np.testing.assert_array_equal(moments.variance, [[0.0, 0.0], [np.nan, np.nan], [np.nan, np.nan]])
    np.testing.assert_allclose(moments.mean, [[1.3, 0.0], [1.0, 2.0], [np.nan, np.nan]], rtol=1e-6)


def test_low_precision_models_do_not_round_the_sums(cells: dict[str, torch.Tensor]) -> None:
    sums = torch.nn.ModuleList([PseudobulkSums(CONTROL, CONTEXT)]).to(torch.bfloat16)[0]
    assert isinstance(sums, PseudobulkSums)
    observed = torch.full((300, 4), 1.0078125)  # exact in bfloat16, as its square and any sum of 300 are not
    for _ in range(10):
        sums.update(torch.zeros(300, dtype=torch.int64), observed.bfloat16(), observed.bfloat16(), observed.bfloat16())
    assert sums.observed_sum.dtype == torch.float64
    np.testing.assert_allclose(sums.compute().observed, 1.0078125, rtol=1e-7)


def test_sums_stay_in_main_memory_where_the_device_has_no_float64() -> None:
    sums = GroupSums(1, 2)
    sums._apply(lambda tensor: SimpleNamespace(device=torch.device("mps")))  # type: ignore[arg-type,return-value]
    assert sums.observed_sum.device.type == "cpu"


def test_wrong_shapes_are_refused(cells: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="2 rows of control"):
        PseudobulkSums(CONTROL, [0, 2])
    with pytest.raises(ValueError, match="contexts x genes"):
        PseudobulkSums(CONTROL[0], [0])
    sums = PseudobulkSums(CONTROL, CONTEXT)
    with pytest.raises(ValueError, match="variance must be given in every update"):
        sums.update(**cells)
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        _streamed(cells, torch.arange(N_CELLS), 50).compute().with_prediction(np.zeros((1, 4)))


def test_de_sets_use_the_controls_of_the_context() -> None:
    # Pair 0 differs from its control in gene 2, pair 1 (the same cells, another context) in gene 0.
    bulk = Pseudobulks(
        pair=np.array([0, 1]),
        context=np.array([1, 0]),
        predicted=np.zeros((2, 3)),
        observed=np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]),
        control=np.zeros((2, 3)),
        observed_variance=np.ones((2, 3)),
        count=np.array([4, 4]),
    )
    controls = GroupMoments(np.array([4, 4]), np.array([[3.0, 1.5, 1.0], [1.0, 1.5, 3.0]]), np.ones((2, 3)))
    sets = de_sets(bulk, controls, np.array([[False, False, True], [False, False, False]]), k=1)
    np.testing.assert_array_equal(sets.genes, [[2], [0]])
    np.testing.assert_array_equal(sets.genes_no_target, [[1], [0]])


def test_halves_are_balanced_random_and_seeded() -> None:
    pair = np.random.default_rng(0).integers(0, 6, size=501)
    half = assign_halves(pair, seed=3)
    size = np.bincount(pair)
    ones = np.bincount(pair, weights=half)
    np.testing.assert_array_equal(ones, size // 2)
    np.testing.assert_array_equal(half, assign_halves(pair, seed=3))
    assert 0.4 < np.mean(half != assign_halves(pair, seed=4)) < 0.6
