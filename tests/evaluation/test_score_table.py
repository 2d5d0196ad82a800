"""The table of scores: the right metric in the right column, and what becomes of predictions that are not numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.pseudobulk import DESets, Pseudobulks
from perturbzoo.evaluation.table import METRICS, score_conditions

# The example of test_native_metrics.py, where its numbers are worked out.
BULK = Pseudobulks(
    pair=np.array([0, 1]),
    context=np.array([0, 0]),
    predicted=np.array([[2.0, 3.0, 2.0], [1.0, 3.0, 7.0]]),
    observed=np.array([[2.0, 2.0, 1.0], [1.0, 4.0, 4.0]]),
    control=np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]),
    observed_variance=np.ones((2, 3)),
    count=np.array([4, 6]),
)
DE = DESets(genes=np.array([[2, 1], [1, 2]]), genes_no_target=np.array([[2, 1], [2, 0]]))


def _score(predicted: Array | None = None, conditions: tuple[str, ...] = ("A", "B+C")) -> pd.DataFrame:
    return score_conditions(
        BULK if predicted is None else BULK.with_prediction(predicted),
        conditions=conditions,
        contexts=["K562", "K562"],
        categories=["unseen_single", "combo_seen1"],
        reference=np.array([2.0, 3.0, 2.0]),
        de=DE,
    )


def test_rows_and_columns_by_hand() -> None:
    scores = _score()
    assert scores[["condition", "context", "category", "n_cells"]].to_numpy().tolist() == [
        ["A", "K562", "unseen_single", 4],
        ["B+C", "K562", "combo_seen1", 6],
    ]
    expected = {
        "mse": [2 / 3, 10 / 3],
        "mae": [2 / 3, 4 / 3],
        "rmse": [(2 / 3) ** 0.5, (10 / 3) ** 0.5],
        "pearson_delta": [30 / np.sqrt(42 * 24), 3 / np.sqrt(156)],
        "pearson_delta_perturbed_reference": [0.0, 75 / np.sqrt(42 * 186)],
        "mse_top20_de": [1.0, 5.0],  # errors (1, 1) and (-1, 3)
        "mse_top20_de_no_target": [1.0, 4.5],  # errors (1, 1) and (3, 0)
        "direction_top20_de": [0.5, 1.0],  # gene 1 of A did not change, and was predicted to
    }
    assert set(expected) == set(METRICS)
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, err_msg=name)


def test_correlations_that_are_not_defined_are_flagged() -> None:
    scores = _score()
    assert scores["pearson_delta_undefined"].tolist() == [False, False]
    assert scores["pearson_delta_perturbed_reference_undefined"].tolist() == [True, False]
    no_change = _score(BULK.control)
    assert no_change["pearson_delta"].tolist() == [0.0, 0.0]
    assert no_change["pearson_delta_undefined"].tolist() == [True, True]
    # Right about gene 1 of A alone, which did not change.
    assert no_change["direction_top20_de"].tolist() == [0.5, 0.0]


def test_a_perfect_prediction() -> None:
    scores = _score(BULK.observed)
    for name, higher_is_better in METRICS.items():
        np.testing.assert_allclose(scores[name], 1.0 if higher_is_better else 0.0, atol=1e-12, err_msg=name)


def test_a_condition_that_was_not_predicted_scores_nan() -> None:
    predicted = BULK.predicted.copy()
    predicted[0] = np.nan
    scores = _score(predicted)[list(METRICS)]
    assert scores.loc[0].isna().all()
    pd.testing.assert_series_equal(scores.loc[1], _score()[list(METRICS)].loc[1])


def test_predictions_that_are_not_numbers_are_refused_by_name() -> None:
    predicted = BULK.predicted.copy()
    predicted[1, 0] = np.nan
    with pytest.raises(PerturbZooError, match=r"predicted expression of 'B\+C' is NaN or infinite in 1 of 3 genes"):
        _score(predicted)
    predicted[1, 0] = np.inf
    with pytest.raises(PerturbZooError, match=r"predicted expression of 'B\+C'"):
        _score(predicted)
    with pytest.raises(PerturbZooError, match=r"predicted expression of 'A', 'B\+C' is NaN or infinite in 3 of 3"):
        _score(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="1 labels of condition for 2 pseudobulks"):
        _score(conditions=("A",))
