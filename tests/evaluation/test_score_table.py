"""The table of scores: the right metric in the right column, and what becomes of predictions that are not numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.pseudobulk import DESets, Pseudobulks
from perturbzoo.evaluation.table import METRICS, at_full_size, score_conditions

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


def _mean_scores(predicted: Array, observed: Array) -> pd.Series:
    n_pairs, n_genes = observed.shape
    zero, labels = np.zeros((n_pairs, n_genes)), [str(row) for row in range(n_pairs)]
    count = np.full(n_pairs, 10)
    bulk = Pseudobulks(np.arange(n_pairs), np.zeros(n_pairs, int), predicted, observed, zero, zero, count)
    genes = np.broadcast_to(np.arange(20), (n_pairs, 20))
    scores = score_conditions(
        bulk, conditions=labels, contexts=labels, categories=labels, reference=zero, de=DESets(genes, genes)
    )
    return scores[list(METRICS)].mean()


def test_ceiling_at_full_size_is_what_a_repeat_scores() -> None:
    random = np.random.default_rng(0)
    shape = (60, 3000)
    signal, variance = random.normal(0.0, 0.3, size=shape), 0.04  # of the mean of all cells
    halves = [signal + random.normal(0.0, np.sqrt(2 * variance), size=shape) for _ in range(2)]
    wholes = [signal + random.normal(0.0, np.sqrt(variance), size=shape) for _ in range(2)]
    half, whole = _mean_scores(*halves), _mean_scores(*wholes)
    ceiling = at_full_size(half.to_frame().T).iloc[0]
    assert half["pearson_delta"] == pytest.approx(0.09 / (0.09 + 0.08), abs=0.01)
    for name in METRICS:
        if name != "direction_top20_de":
            assert ceiling[name] == pytest.approx(whole[name], rel=0.06 if "top20" in name else 0.01), name
    assert ceiling["direction_top20_de"] == half["direction_top20_de"]


def test_ceiling_below_zero_stays_there() -> None:
    half = _mean_scores(np.array([[0.0, 1.0, 2.0, 1.0] * 5]), np.array([[2.0, 1.0, 0.0, 0.0] * 5]))
    assert half["pearson_delta"] < 0
    assert at_full_size(half.to_frame().T).iloc[0]["pearson_delta"] == half["pearson_delta"]
