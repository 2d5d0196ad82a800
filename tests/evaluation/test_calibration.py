"""Intervals cover what they say, and error estimates rank errors."""

from __future__ import annotations

import numpy as np
import pytest

from perturbzoo.evaluation.calibration import calibration_curve, conformal_scale, coverage, error_rank_correlation
from perturbzoo.evaluation.pseudobulk import Pseudobulks


def _bulks(error: np.ndarray, variance: np.ndarray, sampling: float = 0.0) -> Pseudobulks:
    observed = np.full(error.shape, 5.0)
    n = len(error)
    return Pseudobulks(
        pair=np.arange(n),
        context=np.zeros(n, dtype=np.int64),
        predicted=observed - error,
        observed=observed,
        control=observed,
        observed_variance=np.full(error.shape, 10 * sampling),
        count=np.full(n, 10),
        predicted_variance=variance,
    )


def test_coverage_by_hand() -> None:
    # half-width of a 90 % interval of standard error 1: 1.645
    error = np.array([[1.6, -1.6, 1.7, -3.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(coverage(_bulks(error, np.ones((2, 4)))), [0.5, 1.0])


def test_sampling_noise_widens_the_interval() -> None:
    # variance 1 of the prediction and 3 of the sampling: half-width 3.29
    error = np.array([[3.2, 3.4]])
    np.testing.assert_allclose(coverage(_bulks(error, np.ones((1, 2)), sampling=3.0)), [0.5])


def test_genes_that_nobody_expresses_do_not_count() -> None:
    bulks = _bulks(np.array([[0.0, 9.0]]), np.ones((1, 2)))
    bulks.observed[0, 0] = bulks.control[0, 0] = bulks.predicted[0, 0] = 0.0
    np.testing.assert_allclose(coverage(bulks), [0.0])


def test_the_conformal_scale_makes_overconfident_intervals_cover() -> None:
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.5, 2.0, (40, 200))
    fitted = _bulks(rng.normal(0, 3 * spread), spread**2)
    scale = conformal_scale(fitted, 0.9)
    # errors are Gaussian with three times the stated standard error
    assert scale == pytest.approx(9.0, rel=0.05)
    fresh = _bulks(rng.normal(0, 3 * spread), scale * spread**2)
    assert coverage(fresh).mean() == pytest.approx(0.9, abs=0.01)
    curve = calibration_curve(fresh).set_index("level")["coverage"]
    np.testing.assert_allclose(curve, curve.index, atol=0.02)


def test_no_scale_is_needed_where_sampling_explains_everything() -> None:
    rng = np.random.default_rng(1)
    assert conformal_scale(_bulks(rng.normal(0, 0.5, (20, 50)), np.ones((20, 50)), sampling=1.0)) == 0.0


def test_error_rank_correlation() -> None:
    size = np.arange(1.0, 6.0)[:, None] * np.ones((5, 8))
    assert error_rank_correlation(_bulks(size, size**2)) == pytest.approx(1.0)
    assert error_rank_correlation(_bulks(size, size[::-1] ** 2)) == pytest.approx(-1.0)
    assert np.isnan(error_rank_correlation(_bulks(size[:2], size[:2])))


def test_a_prediction_without_variance_is_refused() -> None:
    bulks = _bulks(np.zeros((2, 3)), np.ones((2, 3))).with_prediction(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="without a variance"):
        coverage(bulks)
