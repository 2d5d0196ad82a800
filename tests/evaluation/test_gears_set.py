"""GEARS' metrics on examples worked by hand, at their fixed points, and under permutations."""

from __future__ import annotations

import numpy as np
import pytest

from perturbzoo.evaluation import gears
from perturbzoo.evaluation.metrics import Array


def _scores(predicted: Array, observed: Array, control: Array, t: Array, targets: Array | None = None) -> dict[str, Array]:
    targets = np.zeros(predicted.shape, dtype=bool) if targets is None else targets
    seen = gears.present(observed, control)
    return gears.scores(
        predicted,
        observed,
        predicted - control,
        observed - control,
        sets=gears.gene_sets(t, seen, targets),
        seen=seen,
        targets=targets,
        variable=np.tile(gears.variable_genes(observed, control[:1]), (len(observed), 1)),
    )


def test_directions_are_equal_opposite_or_one_of_them_zero() -> None:
    # changes +, -, 0, +, 0 against +, +, +, 0, 0: right, opposite, zero, zero, right
    control = np.ones((1, 5))
    predicted = control + np.array([0.5, -0.5, 0.0, 0.1, 0.0])
    observed = control + np.array([0.1, 0.1, 0.1, 0.0, 0.0])
    found = _scores(predicted, observed, control, t=np.array([[5.0, 4.0, 3.0, 2.0, 1.0]]))
    for name in ("", "_non_zero", "_non_dropout", "_top20_de", "_top200_de"):
        assert found[f"direction{name}"] == pytest.approx(0.4), name
        assert found[f"opposite_direction{name}"] == pytest.approx(0.2), name
        assert found[f"zero_direction{name}"] == pytest.approx(0.4), name


def test_zero_and_dropout_genes() -> None:
    # gene 0: seen; 1: lost (0 here, not in controls); 2: 0 in both, so no loss
    observed, control = np.array([[1.0, 0.0, 0.0]]), np.array([[1.0, 2.0, 0.0]])
    seen = gears.present(observed, control)
    np.testing.assert_array_equal(seen.non_zero, [[True, False, False]])
    np.testing.assert_array_equal(seen.non_dropout, [[True, False, True]])
    sets = gears.gene_sets(np.array([[1.0, -3.0, 2.0]]), seen, np.array([[True, False, False]]))
    assert sets["top20_de"][0, :4].tolist() == [1, 2, 0, -1]
    assert sets["top20_de_no_target"][0, :3].tolist() == [1, 2, -1]
    assert sets["top20_de_non_zero"][0, :2].tolist() == [0, -1]
    assert sets["top20_de_non_dropout"][0, :3].tolist() == [2, 0, -1]


def test_sets_are_of_the_genes_that_differ_most() -> None:
    # the errors are the number of the gene, the genes differ the less the higher their number
    n = 300
    observed, control = np.ones((1, n)), np.full((1, n), 0.5)
    predicted = observed + np.arange(n)
    targets = np.zeros((1, n), dtype=bool)
    targets[0, 0] = True
    found = _scores(predicted, observed, control, t=-np.arange(n, 0.0, -1.0)[None], targets=targets)
    for k in (20, 50, 100, 200):
        assert found[f"mse_top{k}_de"] == pytest.approx(np.mean(np.arange(k) ** 2))
        assert found[f"mse_top{k}_de_no_target"] == pytest.approx(np.mean(np.arange(1, k + 1) ** 2))
        # what is observed is the same in all of them: no correlation, 0 by definition
        assert found[f"pearson_delta_top{k}_de"] == 0
    assert found["mse_no_target"] == pytest.approx(np.mean(np.arange(1, n) ** 2))


def test_correlations_over_the_genes_of_a_set() -> None:
    generator = np.random.default_rng(0)
    predicted, observed, control = generator.random((3, 2, 60))
    t = generator.normal(size=(2, 60))
    targets = np.zeros((2, 60), dtype=bool)
    targets[:, 7] = True
    found = _scores(predicted, observed, control, t, targets)
    for row in range(2):
        genes = np.argsort(-np.abs(t[row]))[:20]
        p, o, c = predicted[row, genes], observed[row, genes], control[row, genes]
        assert found["pearson_top20_de"][row] == pytest.approx(np.corrcoef(p, o)[0, 1])
        assert found["pearson_delta_top20_de"][row] == pytest.approx(np.corrcoef(p - c, o - c)[0, 1])
        kept = np.arange(60) != 7
        expected = np.corrcoef((predicted - control)[row, kept], (observed - control)[row, kept])[0, 1]
        assert found["pearson_delta_no_target"][row] == pytest.approx(expected)


def test_variable_genes_vary_most_between_conditions() -> None:
    observed = np.zeros((3, 500))
    observed[0, 100:300] = 1 + np.arange(200)  # the same in the controls and two conditions, not in the third
    np.testing.assert_array_equal(gears.variable_genes(observed, np.zeros((1, 500))), np.arange(100, 300))


def test_distance_in_standard_deviations() -> None:
    # two genes: cells 0, 2 (mean 1, deviation 1) and 0, 4 (mean 2, deviation 2), and one without variance
    cells = np.array([[0.0, 0.0, 3.0], [2.0, 4.0, 3.0]])
    observed, variance = cells.mean(axis=0)[None], cells.var(axis=0, ddof=1)[None]
    sets = {name: np.array([[0, 1, 2, -1]]) for name in gears.FILTERED}
    predicted = np.array([[1.5, 7.0, 9.0]])  # .5 and 2.5 deviations away
    found = gears.spread_scores(predicted, observed, variance, np.array([2]), sets)
    assert found["mean_sigma"] == pytest.approx(1.5)
    assert found["std_sigma"] == pytest.approx(1.0)
    assert found["sigma_below_1"] == pytest.approx(0.5)
    assert found["sigma_below_2"] == pytest.approx(0.5)
    # one cell has no spread
    alone = gears.spread_scores(predicted, observed, np.full((1, 3), np.nan), np.array([1]), sets)
    assert np.isnan(alone["mean_sigma"]).all()


def test_ranges_and_bands_of_the_observed_cells() -> None:
    # 101 cells, 0 to 100, so that quantiles are percentages; a gene that nobody expresses does not count
    cells = np.column_stack([np.arange(101.0), np.arange(101.0), np.arange(101.0), np.zeros(101)])
    sets = {name: np.array([[0, 1, 2, 3, -1]]) for name in gears.FILTERED}
    bands = gears.quantiles(lambda row: cells, sets)
    found = gears.range_scores(np.array([[47.0, 57.0, 120.0, 0.0]]), sets, bands)
    assert found["in_range"] == pytest.approx(2 / 3)
    assert found["in_range_45_55"] == pytest.approx(1 / 3)
    assert found["in_range_40_60"] == pytest.approx(2 / 3)
    assert found["in_range_25_75_non_zero"] == pytest.approx(2 / 3)
    nobody = {name: np.array([[3, -1]]) for name in gears.FILTERED}
    bands = gears.quantiles(lambda row: cells, nobody)
    assert np.isnan(gears.range_scores(np.zeros((1, 4)), nobody, bands)["in_range"]).all()


def test_fold_change_gaps_by_hand() -> None:
    # multiples of the control: 2, .3, .05, 4, 20; observed below .5 (gene 5) and no control (gene 6) are passed over
    control = np.array([[1.0, 2.0, 20.0, 0.5, 0.1, 1.0, 0.0]])
    observed = np.array([[2.0, 0.6, 1.0, 2.0, 2.0, 0.4, 3.0]])
    predicted = observed + np.array([[1.0, 1.0, 2.0, 1.0, 1.0, 9.0, 9.0]])
    found = gears.fold_change_gaps(predicted, observed, control)
    gaps = np.array([1.0, 0.5, 0.1, 2.0, 10.0])
    assert found["fold_change_gap"] == pytest.approx(gaps.mean())
    assert found["fold_change_gap_down3"] == pytest.approx(gaps[1:3].mean())
    assert found["fold_change_gap_down10"] == pytest.approx(gaps[2])
    assert found["fold_change_gap_up3"] == pytest.approx(gaps[3:].mean())
    assert found["fold_change_gap_up10"] == pytest.approx(gaps[4])
    assert np.isnan(gears.fold_change_gaps(observed, control, control)["fold_change_gap_up3"]).all()


def test_what_is_not_predicted_is_not_scored() -> None:
    generator = np.random.default_rng(1)
    observed, control = generator.random((2, 2, 40))
    predicted = observed.copy()
    predicted[1] = np.nan
    found = _scores(predicted, observed, control, t=generator.normal(size=(2, 40)))
    for name, values in found.items():
        best = 1.0 if name.startswith(("pearson", "direction")) else 0.0
        assert values[0] == pytest.approx(best), name
        assert np.isnan(values[1]), name


def test_order_of_genes_and_conditions_does_not_matter() -> None:
    generator = np.random.default_rng(2)
    predicted, observed, control, t = generator.random((4, 5, 250))
    control[:] = control[0]
    targets = generator.random((5, 250)) < 0.02
    once = _scores(predicted, observed, control, t, targets)
    rows, genes = generator.permutation(5), generator.permutation(250)
    other = _scores(*(table[rows][:, genes] for table in (predicted, observed, control, t, targets)))
    for name, values in once.items():
        np.testing.assert_allclose(other[name], values[rows], rtol=1e-9, atol=1e-12, err_msg=name)
