"""Distances between samples of cells: direct formulas, known answers, and the functions that take two samples at a time."""

from __future__ import annotations

import numpy as np
import pytest

from perturbzoo.evaluation import distribution
from perturbzoo.evaluation.samples import (
    Estimator,
    Sample,
    Transports,
    compare,
    median_distance,
    squared_distances,
    transport_costs,
)

GENERATOR = np.random.default_rng(0)
X, Y = GENERATOR.normal(size=(12, 7)), GENERATOR.normal(size=(9, 7)) + 0.5
SETTINGS = {"bandwidth": 2.0}


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
    assert median_distance(np.concatenate([X, Y])) == pytest.approx(distribution.median_bandwidth(X, Y), rel=1e-10)


def test_moved_cells_and_parts_share_what_is_known() -> None:
    origin, by = np.full(7, 0.1), np.linspace(-0.3, 0.4, 7)
    sample, other = Sample(X, origin), Sample(Y, origin)
    moved = compare(sample, other, estimator="u", moved=by, **SETTINGS)
    assert moved["e_distance"] == pytest.approx(distribution.energy_distance(X + by, Y), rel=1e-10)
    assert moved["mmd"] == pytest.approx(distribution.mmd(X + by, Y, 2.0), rel=1e-10)
    chosen = np.arange(12) % 3 == 0
    found = compare(sample.part(chosen), sample.part(~chosen), estimator="u", **SETTINGS)
    assert found["e_distance"] == pytest.approx(distribution.energy_distance(X[chosen], X[~chosen]), rel=1e-10)
    assert found["mmd"] == pytest.approx(distribution.mmd(X[chosen], X[~chosen], 2.0), rel=1e-10)


def test_transports_are_those_of_two_samples_at_a_time() -> None:
    by = np.linspace(-0.3, 0.4, 7)
    sample, other = Sample(X), Sample(Y)
    transports = Transports(0.8)
    transports.ask(sample, other, 9)
    transports.ask(sample, other, 9, by)
    transports.ask(sample, other, 1)
    transports.ask(sample.part(np.arange(12) < 5), other, 9)
    transports.ask(sample, Sample(Y + 40.0), 9)  # so far away that exponentials of the distances are 0
    expected = [
        distribution.sinkhorn_divergence(X[:9], Y, 0.8),
        distribution.sinkhorn_divergence(X[:9] + by, Y, 0.8),
        np.nan,
        distribution.sinkhorn_divergence(X[:5], Y[:5], 0.8),
        distribution.sinkhorn_divergence(X[:9], Y + 40.0, 0.8),
    ]
    np.testing.assert_allclose(transports.divergences(), expected, rtol=1e-4)


def test_costs_that_underflow_are_solved_in_logarithms() -> None:
    # two cells each, crosswise near: the plan is the exact one, and its cost is known
    squared = np.array([[[1.0, 5000.0], [4000.0, 2.0]]])
    assert transport_costs(squared, 1.0)[0] == pytest.approx(1.5 + np.log(2), rel=1e-6)


def test_order_of_cells_does_not_matter() -> None:
    once = compare(Sample(X), Sample(Y), estimator="u", **SETTINGS)
    other = compare(Sample(X[::-1]), Sample(Y[::-1]), estimator="u", **SETTINGS)
    assert once == pytest.approx(other)


def test_unbiased_estimates_of_one_distribution_are_around_zero() -> None:
    generator = np.random.default_rng(1)
    found = [
        compare(Sample(generator.normal(size=(6, 5))), Sample(generator.normal(size=(8, 5))), estimator="u", **SETTINGS)
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
