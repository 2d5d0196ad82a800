"""Distances between distributions: hand-worked samples, limits, unbiasedness, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.distribution import (
    energy_distance,
    median_bandwidth,
    mmd,
    r_squared,
    r_squared_of_moments,
    sinkhorn_divergence,
)


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


def test_energy_distance_by_hand() -> None:
    """Between: |0-1|, |0-5|, |2-1|, |2-5|, mean 2.5; within: 2 and 4."""
    assert energy_distance(column(0, 2), column(1, 5)) == pytest.approx(2 * 2.5 - 2 - 4)
    assert energy_distance([[0, 0], [0, 0]], [[3, 4], [3, 4]]) == pytest.approx(2 * 5)


def test_energy_distance_is_unbiased() -> None:
    """Mean over draws of 5 cells of one distribution: around 0, where a V-statistic is far above it."""
    random = np.random.default_rng(0)
    values = [energy_distance(*random.normal(size=(2, 5, 3))) for _ in range(2000)]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    # what counting each cell's distance to itself would add: 2 E|x - x'| / n, and E|x - x'| = 4 / sqrt(pi) in 3 dimensions
    assert 4 * error < 0.2 * 2 * 4 / math.sqrt(math.pi) / 5


def test_mmd_by_hand() -> None:
    """Width 1: kernel exp(-d^2 / 2)."""

    def k(distance: float) -> float:
        return math.exp(-(distance**2) / 2)

    between = (k(1) + k(4) + k(1) + k(2)) / 4  # of 0, 2 with 1, 4
    assert mmd(column(0, 2), column(1, 4), 1.0) == pytest.approx(k(2) + k(3) - 2 * between)


def test_mmd_takes_the_median_distance() -> None:
    x, y = column(0, 1), column(3, 7)
    # distances 1, 3, 7, 2, 6, 4
    assert median_bandwidth(x, y) == pytest.approx(3.5)
    assert mmd(x, y) == pytest.approx(mmd(x, y, 3.5))


def test_mmd_is_unbiased() -> None:
    random = np.random.default_rng(1)
    values = [mmd(*random.normal(size=(2, 6, 2)), 1.0) for _ in range(2000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))


@pytest.mark.parametrize("regularisation", [0.01, 1.0, 100.0])
def test_sinkhorn_of_two_points(regularisation: float) -> None:
    """One coupling only, whatever the regularisation: the squared distance."""
    assert sinkhorn_divergence([[0, 0]], [[3, 4]], regularisation) == pytest.approx(25, rel=1e-6)


def test_sinkhorn_limits() -> None:
    """Squared Wasserstein distance (sorted partners) as the regularisation vanishes, squared distance of means as it grows."""
    x, y = column(0, 1, 5), column(2, 4, 9)
    assert sinkhorn_divergence(x, y, 0.02) == pytest.approx((4 + 9 + 16) / 3, rel=1e-3)
    assert sinkhorn_divergence(x, y, 1e5) == pytest.approx((5 - 2) ** 2, rel=1e-3)


def test_sinkhorn_of_a_sample_with_itself_is_nothing() -> None:
    x = np.random.default_rng(0).normal(size=(30, 4))
    assert sinkhorn_divergence(x, x, 0.5) == pytest.approx(0, abs=1e-9)
    assert sinkhorn_divergence(x, x + 1.0, 0.5) == pytest.approx(4.0, rel=1e-3)  # a translation of length 2


@pytest.mark.parametrize(
    "distance", [energy_distance, lambda x, y: mmd(x, y, 1.3), lambda x, y: sinkhorn_divergence(x, y, 0.5)]
)
def test_symmetry_and_invariance(distance: Callable[..., float]) -> None:
    """The same for either order, any order of cells, and any rotation and translation of both."""
    random = np.random.default_rng(2)
    x, y = random.normal(size=(12, 3)), 2 * random.normal(size=(9, 3)) + 1
    turn = np.linalg.qr(random.normal(size=(3, 3)))[0]
    value = distance(x, y)
    assert value > 0.1
    assert distance(y, x) == pytest.approx(value, rel=1e-5)
    assert distance(random.permutation(x), y) == pytest.approx(value, rel=1e-5)
    assert distance(x @ turn + 7, y @ turn + 7) == pytest.approx(value, rel=1e-5)


def test_r_squared_by_hand() -> None:
    observed = [1.0, 2.0, 3.0]
    assert r_squared(observed, observed) == 1
    assert r_squared([2.0, 2.0, 2.0], observed) == 0
    # perfectly correlated, and wrong in scale
    assert r_squared([2.0, 4.0, 6.0], observed) == pytest.approx(1 - (1 + 4 + 9) / 2)
    assert math.isnan(r_squared([1.0, 2.0], [3.0, 3.0]))


def test_r_squared_of_moments_by_hand() -> None:
    """Means 1, 2 and unbiased variances 2, 8 observed; means 1, 4 and variances 2, 2 predicted."""
    observed, predicted = [[0.0, 0.0], [2.0, 4.0]], [[0.0, 3.0], [2.0, 5.0]]
    means, variances = r_squared_of_moments(predicted, observed)
    assert means == pytest.approx(1 - 4 / 0.5)
    assert variances == pytest.approx(1 - 36 / 18)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0], [2.0, 3.0]], "x has 1 cells: this distance needs 2 or more"),
        ([[1.0], [2.0]], [[1.0, 2.0], [2.0, 3.0]], "x has 1 features and y 2"),
        ([[1.0], [np.nan]], [[1.0], [2.0]], "x has values that are not finite"),
        ([1.0, 2.0], [[1.0], [2.0]], "cells x features"),
    ],
)
def test_bad_samples(x: list, y: list, message: str) -> None:
    with pytest.raises(PerturbZooError, match=message):
        energy_distance(x, y)


def test_bad_widths() -> None:
    x, y = column(0, 1), column(2, 3)
    with pytest.raises(PerturbZooError, match="bandwidth is 0"):
        mmd(x, y, 0)
    with pytest.raises(PerturbZooError, match="median distance between cells is 0"):
        median_bandwidth(column(1, 1), column(1, 1))
    with pytest.raises(PerturbZooError, match="regularisation is -1"):
        sinkhorn_divergence(x, y, -1)
