"""Distances between samples of cells: direct formulas, known answers, and the functions that take two samples at a time."""

from __future__ import annotations

import numpy as np
import pytest

from perturbzoo.evaluation import distribution
from perturbzoo.evaluation.samples import Estimator, Sample, compare, median_distance, squared_distances

GENERATOR = np.random.default_rng(0)
X, Y = GENERATOR.normal(size=(12, 7)), GENERATOR.normal(size=(9, 7)) + 0.5
SETTINGS = {"bandwidth": 2.0, "regularisation": 0.8, "n_transport": 9}


def _direct(x: np.ndarray, y: np.ndarray, estimator: str) -> float:
    """The E-distance by its formula, pair by pair."""

    def mean(a: np.ndarray, b: np.ndarray, different: bool) -> float:
        pairs = [np.sqrt(((p - q) ** 2).sum()) for i, p in enumerate(a) for j, q in enumerate(b) if not (different and i == j)]
        return float(np.mean(pairs))

    within = estimator == "u"
    return 2 * mean(x, y, False) - mean(x, x, within) - mean(y, y, within)


@pytest.mark.parametrize("estimator", ["u", "v"])
def test_e_distance_is_the_direct_formula(estimator: Estimator) -> None:
    expected = _direct(X, Y, estimator)
    assert compare(Sample(X), Sample(Y), estimator=estimator, **SETTINGS)["e_distance"] == pytest.approx(expected, rel=1e-10)
    assert distribution.energy_distance(X, Y, estimator) == pytest.approx(expected, rel=1e-12)


def test_e_distance_by_hand() -> None:
    # cells 0, 2 and 3, 5 on a line: between 3, 5, 1, 3, mean 3; within 2 and 2. V: within 1 and 1, half of the pairs being 0
    x, y = np.array([[0.0], [2.0]]), np.array([[3.0], [5.0]])
    assert compare(Sample(x), Sample(y), estimator="u", **SETTINGS)["e_distance"] == pytest.approx(2)
    assert compare(Sample(x), Sample(y), estimator="v", **SETTINGS)["e_distance"] == pytest.approx(4)


def test_same_numbers_as_two_samples_at_a_time() -> None:
    found = compare(Sample(X), Sample(Y), estimator="u", **SETTINGS)
    assert found["mmd"] == pytest.approx(distribution.mmd(X, Y, 2.0), rel=1e-10)
    assert found["sinkhorn"] == pytest.approx(distribution.sinkhorn_divergence(X[:9], Y, 0.8), rel=1e-4)
    moved = Sample(X)
    assert moved.within.shape == (12, 12)
    again = compare(moved.shifted(np.full(7, 0.3)), Sample(Y), estimator="u", **SETTINGS)
    assert again["e_distance"] == pytest.approx(distribution.energy_distance(X + 0.3, Y), rel=1e-10)
    assert median_distance(np.concatenate([X, Y])) == pytest.approx(distribution.median_bandwidth(X, Y), rel=1e-10)


def test_order_of_cells_does_not_matter_but_to_those_of_the_transport() -> None:
    once = compare(Sample(X), Sample(Y), estimator="u", **{**SETTINGS, "n_transport": 0})
    other = compare(Sample(X[::-1]), Sample(Y[::-1]), estimator="u", **{**SETTINGS, "n_transport": 0})
    assert once == pytest.approx(other, nan_ok=True)
    assert np.isnan(once["sinkhorn"])


def test_unbiased_estimates_of_one_distribution_are_around_zero() -> None:
    generator = np.random.default_rng(1)
    settings = {**SETTINGS, "n_transport": 0}
    found = [
        compare(Sample(generator.normal(size=(6, 5))), Sample(generator.normal(size=(8, 5))), estimator="u", **settings)
        for _ in range(400)
    ]
    for metric in ("e_distance", "mmd"):
        values = np.array([one[metric] for one in found])
        assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    biased = [_direct(generator.normal(size=(6, 5)), generator.normal(size=(8, 5)), "v") for _ in range(20)]
    assert min(biased) > 0


def test_too_few_cells_give_no_number() -> None:
    found = compare(Sample(X[:1]), Sample(Y), estimator="u", **SETTINGS)
    assert all(np.isnan(value) for value in found.values())
    assert np.isnan(median_distance(X[:1]))
    assert np.isnan(median_distance(np.ones((4, 3))))


def test_distances_survive_a_large_common_value() -> None:
    direct = ((X[:, None] - Y) ** 2).sum(axis=2)
    np.testing.assert_allclose(squared_distances(X + 1e4, Y + 1e4), direct, rtol=1e-6)
    sample = Sample(np.tile(X[:1], (5, 1)) + 1e4)
    np.testing.assert_array_equal(np.diag(sample.within), 0.0)
