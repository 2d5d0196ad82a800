"""Weights, weighted errors and variance recoveries on examples worked by hand, and at their fixed points."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_ind

from perturbzoo.evaluation import effects


def test_weights_are_welch_t_against_the_other_conditions() -> None:
    generator = np.random.default_rng(0)
    groups = [generator.normal(size=(n, 6)) + generator.normal(size=6) for n in (5, 8, 11)]
    mean = np.array([group.mean(axis=0) for group in groups])
    variance = np.array([group.var(axis=0, ddof=1) for group in groups])
    expected = []
    for row, group in enumerate(groups):
        others = np.concatenate([other for at, other in enumerate(groups) if at != row])
        t = np.abs(ttest_ind(group, others, equal_var=False).statistic)
        expected.append(((t - t.min()) / (t.max() - t.min())) ** 2)
    np.testing.assert_allclose(effects.specificity_weights(mean, variance, np.array([5, 8, 11])), expected, atol=1e-10)


def test_a_shared_response_has_no_weight() -> None:
    # gene 0: the same in both conditions, whatever it is in controls; gene 1 differs most, gene 2 half as much
    mean = np.array([[9.0, 2.0, 1.0], [9.0, 0.0, 0.0]])
    np.testing.assert_allclose(effects.specificity_weights(mean, np.ones((2, 3)), np.array([4, 4]))[0], [0.0, 1.0, 0.25])
    assert np.isnan(effects.specificity_weights(mean[:1], np.ones((1, 3)), np.array([4]))).all()
    np.testing.assert_array_equal(effects.specificity_weights(np.ones((2, 3)), np.ones((2, 3)), np.array([4, 4])), 1.0)


def test_weighted_mse_by_hand() -> None:
    # errors 1, 2 with weights 3, 1: (3 + 4) / 4
    predicted, observed = np.array([[1.0, 0.0, 7.0]]), np.array([[0.0, 2.0, 0.0]])
    np.testing.assert_allclose(effects.weighted_mse(predicted, observed, np.array([[3.0, 1.0, 0.0]])), [7 / 4])


def test_weighted_r2_by_hand() -> None:
    # changes 0 and 4 with weights 3 and 1: mean 1, spread 3 + 9 = 12. Errors 1 and 0: 3. R2 = 1 - 3 / 12
    observed, reference = np.array([[1.0, 5.0]]), np.array([1.0, 1.0])
    weights = np.array([[3.0, 1.0]])
    np.testing.assert_allclose(effects.weighted_r2_delta(np.array([[2.0, 5.0]]), observed, reference, weights), [0.75])
    np.testing.assert_allclose(effects.weighted_r2_delta(observed, observed, reference, weights), [1.0])
    # the reference itself: 1 - 16 / 12
    np.testing.assert_allclose(effects.weighted_r2_delta(np.array([[1.0, 1.0]]), observed, reference, weights), [-1 / 3])
    assert np.isnan(effects.weighted_r2_delta(observed, np.ones((1, 2)), reference, weights)).all()


def test_variance_recovery_is_a_ratio_of_variances() -> None:
    # observed 0, 2: mean 1, squares 1 and 1. Predicted 0, 1: mean .5, squares .25 and .25
    observed, predicted = np.array([[0.0], [2.0]]), np.array([[0.0], [1.0]])
    np.testing.assert_allclose(effects.variance_recovery(predicted, observed), [0.25, 0.25])
    generator = np.random.default_rng(1)
    predicted, observed = generator.normal(size=(2, 9, 30))
    ratio = predicted.var(axis=0).sum() / observed.var(axis=0).sum()
    assert effects.variance_recovery(predicted, observed).mean() == pytest.approx(ratio)
    np.testing.assert_allclose(effects.variance_recovery(0.5 * observed, observed).mean(), 0.25)
    np.testing.assert_array_equal(effects.variance_recovery(np.ones((9, 30)), observed), 0.0)
    assert np.isnan(effects.variance_recovery(predicted, np.ones((9, 30)))).all()


def test_cell_variance_recovery_by_hand() -> None:
    np.testing.assert_allclose(effects.cell_variance_recovery(np.array([[1.0, 2.0]]), np.array([[4.0, 2.0]])), [0.5])
    assert np.isnan(effects.cell_variance_recovery(np.array([[np.nan, np.nan]]), np.ones((1, 2)))).all()


def test_variance_kept_gene_by_gene() -> None:
    # gene 0 varies by 1, gene 1 by 100 (of which the prediction keeps a quarter), gene 2 by what noise explains, gene 3 not at all
    observed = np.array([[0.0, 0.0, 1.0, 5.0], [2.0, 20.0, 1.2, 5.0]])
    predicted = np.array([[0.0, 5.0, 0.0, 5.0], [2.0, 15.0, 9.0, 7.0]])
    error = np.array([[0.1, 0.1, 0.1, 0.0], [np.nan, 0.1, 0.1, 0.0]])
    genes, conditions = effects.gene_variance_recovery(predicted, observed, error)
    np.testing.assert_allclose(genes, [1.0, 0.25, np.nan, np.nan])
    np.testing.assert_allclose(conditions, [0.625, 0.625])
    # the sum of variances sees hardly more than gene 1
    assert effects.variance_recovery(predicted[:, :2], observed[:, :2]).mean() == pytest.approx(26 / 101)


def test_the_parts_of_conditions_add_up_to_the_genes() -> None:
    generator = np.random.default_rng(2)
    predicted, observed = generator.normal(size=(2, 9, 30))
    genes, conditions = effects.gene_variance_recovery(predicted, observed, np.zeros((9, 30)))
    np.testing.assert_allclose(genes, predicted.var(axis=0) / observed.var(axis=0))
    assert conditions.mean() == pytest.approx(genes.mean())
    order = generator.permutation(9)
    np.testing.assert_allclose(
        effects.gene_variance_recovery(predicted[order], observed[order], np.zeros((9, 30)))[1], conditions[order]
    )
    missing = predicted.copy()
    missing[3] = np.nan
    genes, conditions = effects.gene_variance_recovery(missing, observed, np.zeros((9, 30)))
    others = np.arange(9) != 3
    np.testing.assert_allclose(genes, predicted[others].var(axis=0) / observed[others].var(axis=0))
    assert np.isnan(conditions).tolist() == [row == 3 for row in range(9)]
    for nothing in effects.gene_variance_recovery(predicted, np.ones((9, 30)), np.zeros((9, 30))):
        assert np.isnan(nothing).all()
