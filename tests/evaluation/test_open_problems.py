"""Open Problems' scores of signed log p-values, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from perturbzoo.evaluation import open_problems
from perturbzoo.evaluation.differential import Differential, unchanged


def test_signs_and_clipping() -> None:
    p = np.array([[0.01, 0.001, 1e-9, 0.0, 1.0, 0.01, 0.01]])
    lfc = np.array([[2.0, -1.0, 1.0, -1.0, 5.0, 0.0, np.nan]])
    found = open_problems.signed_log_p(Differential(p, p, lfc))
    np.testing.assert_allclose(found, [[2.0, -3.0, 4.0, -4.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(open_problems.signed_log_p(unchanged(2, 3)), 0.0)
    assert np.isnan(open_problems.signed_log_p(Differential(*np.full((3, 1, 2), np.nan)))).all()


def test_scores_by_hand() -> None:
    predicted, observed = np.array([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]), np.array([[2.0, -2.0, 2.0], [3.0, 0.0, 4.0]])
    found = open_problems.scores(predicted, observed)
    # errors 1, 0, 2 and 3, 0, 4
    np.testing.assert_allclose(found["log_p_rmse"], np.sqrt([5 / 3, 25 / 3]))
    np.testing.assert_allclose(found["log_p_mae"], [1.0, 7 / 3])
    np.testing.assert_allclose(found["log_p_cosine"], [6 / np.sqrt(5 * 12), 0.0])
    np.testing.assert_allclose(found["log_p_pearson"], [np.corrcoef(predicted[0], observed[0])[0, 1], 0.0])
    # ranks 3, 1, 2 and 2.5, 1, 2.5
    np.testing.assert_allclose(found["log_p_spearman"], [np.corrcoef([3, 1, 2], [2.5, 1, 2.5])[0, 1], 0.0])


def test_perfect_and_missing() -> None:
    observed = np.random.default_rng(0).uniform(-4, 4, (3, 30))
    predicted = observed.copy()
    predicted[2] = np.nan
    for name, values in open_problems.scores(predicted, observed).items():
        assert values[:2] == pytest.approx(0.0 if name.endswith(("rmse", "mae")) else 1.0), name
        assert np.isnan(values[2]), name
