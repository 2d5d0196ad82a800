"""Metrics of changes on examples worked by hand, against scipy, and at their fixed points."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from perturbzoo.evaluation import deltas


def test_cosine_by_hand() -> None:
    x, y = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), np.array([[4.0, 3.0], [0.0, 2.0], [1.0, 1.0]])
    np.testing.assert_allclose(deltas.cosine(x, y), [24 / 25, 0.0, 0.0])
    np.testing.assert_allclose(deltas.cosine(x[:2], -7 * x[:2]), -1.0)


def test_log_fold_change_is_of_log1p_means() -> None:
    control, mean = np.array([[0.0, 0.3, 0.7]]), np.array([[0.3, 0.3, -0.2]])
    # log2(.4 / .1), log2(.4 / .4), and no logarithm of -.1: 0, as in PerturBench
    np.testing.assert_allclose(deltas.log_fold_change(mean, control), [[2.0, 0.0, 0.0]], atol=1e-12)
    assert np.isnan(deltas.log_fold_change(np.array([[np.nan]]), np.array([[1.0]]))).all()


def test_r2_by_hand() -> None:
    # changes 0, 2, 4 of mean 2 and spread 8; errors 1, 1, 0
    reference, observed = np.ones(3), np.array([[1.0, 3.0, 5.0]])
    np.testing.assert_allclose(deltas.r2_delta(observed + np.array([1, -1, 0]), observed, reference), [1 - 2 / 8])
    np.testing.assert_allclose(deltas.r2_delta(observed, observed, reference), [1.0])
    # the reference itself: all of 0 + 4 + 16
    np.testing.assert_allclose(deltas.r2_delta(np.ones((1, 3)), observed, reference), [1 - 20 / 8])
    assert np.isnan(deltas.r2_delta(observed, np.full((1, 3), 2.0), reference)).all()


def test_spearman_is_scipys_with_ties() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 6, (2, 4, 50)).astype(float)
    np.testing.assert_allclose(deltas.spearman(x, y), [spearmanr(a, b)[0] for a, b in zip(x, y, strict=True)], atol=1e-12)
    assert deltas.spearman(np.exp(x), x)[0] == pytest.approx(1.0)
    x[1], y[2, 3] = 7.0, np.nan
    found = deltas.spearman(x, y)
    assert found[1] == 0
    assert np.isnan(found).tolist() == [False, False, True, False]


def test_l2_is_over_the_most_expressed_genes() -> None:
    control = np.arange(1500.0)[None]
    error = np.zeros((1, 1500))
    error[0, [499, 500, 1499]] = [9.0, 3.0, 4.0]  # gene 499 is the first that is left out
    np.testing.assert_allclose(deltas.l2_top1000(control + error, control, control), [5.0])
    np.testing.assert_allclose(deltas.l2_top1000(np.array([[3.0, 4.0]]), np.zeros((1, 2)), np.ones((1, 2))), [5.0])


def test_rank_counts_the_predictions_that_are_nearer() -> None:
    # observed 0, 1, 5; predicted 1, 4, 5: of observed 1 predictions 0 (distance 0) is nearer than its own (3)
    observed, predicted = np.array([[0.0], [1.0], [5.0]]), np.array([[1.0], [4.0], [5.0]])
    np.testing.assert_allclose(deltas.rank_among_predictions(predicted, observed, similarity="rmse"), [0, 1 / 3, 0])
    # one prediction for all: the mean of the ranks that chance would give
    same = deltas.rank_among_predictions(np.ones((3, 1)), observed, similarity="rmse")
    np.testing.assert_allclose(same, 1 / 3)
    assert np.isnan(deltas.rank_among_predictions(predicted[:1], observed[:1], similarity="rmse")).all()


def test_rank_by_cosine_does_not_see_the_size() -> None:
    generator = np.random.default_rng(1)
    observed = generator.normal(size=(6, 40))
    sizes = generator.uniform(0.1, 9, (6, 1))
    np.testing.assert_array_equal(deltas.rank_among_predictions(sizes * observed, observed, similarity="cosine"), 0.0)
    shifted = np.roll(observed, 1, axis=0)
    ranks = deltas.rank_among_predictions(shifted, observed, similarity="cosine")
    similar = np.corrcoef(np.vstack([shifted, observed]))[:6, 6:]  # nearly the cosine, for means near 0
    assert ((ranks > 0) == (similar.argmax(axis=0) != np.arange(6))).all()
    order = generator.permutation(6)
    again = deltas.rank_among_predictions(shifted[order], observed[order], similarity="cosine")
    np.testing.assert_allclose(again, ranks[order])
