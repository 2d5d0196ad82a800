"""Every metric on examples worked by hand, on degenerate input, and against scanpy where scanpy defines it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbzoo.evaluation import metrics
from perturbzoo.evaluation.metrics import Array

# Deltas: A observed (1, 0, -2), predicted (1, 1, -1); B observed (0, 2, 1), predicted (0, 1, 4).
CONTROL = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
OBSERVED = np.array([[2.0, 2.0, 1.0], [1.0, 4.0, 4.0]])
PREDICTED = np.array([[2.0, 3.0, 2.0], [1.0, 3.0, 7.0]])
# Mean of the training centroids (2, 2, 2) and (2, 4, 2).
REFERENCE = np.array([2.0, 3.0, 2.0])


def test_errors_by_hand() -> None:
    # Errors: A (0, 1, 1), B (0, -1, 3).
    np.testing.assert_allclose(metrics.mse(PREDICTED, OBSERVED), [2 / 3, 10 / 3])
    np.testing.assert_allclose(metrics.mae(PREDICTED, OBSERVED), [2 / 3, 4 / 3])
    np.testing.assert_allclose(metrics.rmse(PREDICTED, OBSERVED), [(2 / 3) ** 0.5, (10 / 3) ** 0.5])


def test_pearson_delta_by_hand() -> None:
    # A: centred deltas (4, 1, -5)/3 and (2, 2, -4)/3: products 30/9, squares 42/9 and 24/9.
    # B: centred deltas (-1, 1, 0) and (-5, -2, 7)/3: products 1, squares 2 and 78/9.
    expected = [30 / np.sqrt(42 * 24), 1 / np.sqrt(2 * 78 / 9)]
    np.testing.assert_allclose(metrics.pearson_delta(PREDICTED, OBSERVED, CONTROL), expected)


def test_pearson_delta_with_perturbed_reference_by_hand() -> None:
    # A: the prediction is the reference: constant, so 0 by definition.
    # B: centred changes (-5, 1, 4)/3 and (-7, -4, 11)/3: products 75/9, squares 42/9 and 186/9.
    expected = [0.0, 75 / np.sqrt(42 * 186)]
    np.testing.assert_allclose(metrics.pearson_delta(PREDICTED, OBSERVED, REFERENCE), expected)
    np.testing.assert_array_equal(metrics.is_constant(PREDICTED - REFERENCE), [True, False])


def test_errors_and_direction_on_chosen_genes_by_hand() -> None:
    genes = np.array([[2, 0], [1, 2]])
    # Errors there: A (1, 0), B (-1, 3).
    np.testing.assert_allclose(metrics.mse_at(PREDICTED, OBSERVED, genes), [0.5, 5.0])
    np.testing.assert_allclose(metrics.direction_at(PREDICTED, OBSERVED, CONTROL, genes), [1.0, 1.0])
    # Gene 1 of A did not change and was predicted to; gene 0 of B did not change and was not predicted to.
    all_genes = np.array([[0, 1, 2], [0, 1, 2]])
    np.testing.assert_allclose(metrics.direction_at(PREDICTED, OBSERVED, CONTROL, all_genes), [2 / 3, 1.0])
    # The mirror image about the control is right only where nothing changes.
    mirrored = 2 * CONTROL - PREDICTED
    np.testing.assert_allclose(metrics.direction_at(mirrored, OBSERVED, CONTROL, all_genes), [0.0, 1 / 3])


def test_padding_is_not_a_gene() -> None:
    # -1 must not read the last gene, whose error is 1 in A and 3 in B.
    genes = np.array([[0, -1], [-1, -1]])
    np.testing.assert_array_equal(metrics.mse_at(PREDICTED, OBSERVED, genes), [0.0, np.nan])
    np.testing.assert_array_equal(metrics.direction_at(PREDICTED, OBSERVED, CONTROL, genes), [1.0, np.nan])


def test_welch_t_by_hand() -> None:
    # Gene 0: (3 - 1) / sqrt(4/4 + 9/9) = sqrt 2. Gene 1: constant in both and equal. Gene 2: constant, and not equal.
    t = metrics.welch_t(
        mean=np.array([[3.0, 2.0, 0.0]]),
        variance=np.array([[4.0, 0.0, 0.0]]),
        n=np.array([4]),
        control_mean=np.array([[1.0, 2.0, 1.0]]),
        control_variance=np.array([[9.0, 0.0, 0.0]]),
        n_control=np.array([9]),
    )
    np.testing.assert_allclose(t, [[np.sqrt(2), 0.0, -np.inf]])


def test_welch_t_takes_float32_rounding_for_equality() -> None:
    mean = np.array([[np.float64(np.float32(1.3)), 1.3]])
    t = metrics.welch_t(mean, np.zeros((1, 2)), np.array([5]), np.full((1, 2), 1.3), np.zeros((1, 2)), np.array([5]))
    np.testing.assert_array_equal(t, [[0.0, 0.0]])


def test_welch_t_of_a_single_cell_uses_the_variance_of_the_controls() -> None:
    t = metrics.welch_t(
        np.array([[2.0]]), np.array([[np.nan]]), np.array([1]), np.array([[1.0]]), np.array([[4.0]]), np.array([16])
    )
    np.testing.assert_allclose(t, [[2.0]])  # 1 / sqrt(4 / 16)


def test_top_de_by_hand() -> None:
    # Equal variances and counts: the ranking is by the magnitude of the delta. A (1, 0, -2), B (0, 2, 1).
    ones, n = np.ones((2, 3)), np.array([4, 4])

    def top(**options: object) -> np.ndarray:
        return metrics.top_de(OBSERVED, ones, n, CONTROL, ones, n, **options)  # type: ignore[arg-type]

    np.testing.assert_array_equal(top(k=2), [[2, 0], [1, 2]])
    excluded = np.array([[True, False, False], [False, True, False]])
    np.testing.assert_array_equal(top(k=2, exclude=excluded), [[2, 1], [2, 0]])
    np.testing.assert_array_equal(top(k=3, exclude=excluded), [[2, 1, -1], [2, 0, -1]])
    np.testing.assert_array_equal(top(k=5), [[2, 0, 1, -1, -1], [1, 2, 0, -1, -1]])


def test_top_de_is_what_scanpy_ranks() -> None:
    anndata = pytest.importorskip("anndata")
    scanpy = pytest.importorskip("scanpy")
    random = np.random.default_rng(0)
    groups = np.repeat(["control", "A", "B+C"], [40, 15, 7])
    # No gene that is constant, not 0, in one group alone: scanpy's variance of it can round below 0, its t then is 0.
    x = np.log1p(random.poisson(1.0 + random.gamma(1.0, 2.0, size=30), size=(len(groups), 30)).astype(np.float64))
    x[groups == "A", :5] += random.normal(1.0, 0.2, size=5)
    x[:, 29] = 0.0
    x[:, 28] = 1.25
    data = anndata.AnnData(x, obs=pd.DataFrame({"condition": pd.Categorical(groups)}, index=np.arange(62).astype(str)))
    scanpy.tl.rank_genes_groups(
        data, "condition", reference="control", method="t-test", rankby_abs=True, n_genes=30, use_raw=False
    )
    result = data.uns["rank_genes_groups"]

    moments = {name: (x[groups == name].mean(0), x[groups == name].var(0, ddof=1)) for name in ("control", "A", "B+C")}
    mean, variance = (np.stack([moments[name][part] for name in ("A", "B+C")]) for part in (0, 1))
    control_mean, control_variance = (np.stack([moments["control"][part]] * 2) for part in (0, 1))
    arguments = (mean, variance, np.array([15, 7]), control_mean, control_variance, np.array([40, 40]))
    t, top = metrics.welch_t(*arguments), metrics.top_de(*arguments, k=20)
    for row, name in enumerate(("A", "B+C")):
        names = result["names"][name].astype(int)
        scores = result["scores"][name]
        np.testing.assert_allclose(t[row, names], scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(top[row], names[:20])


def test_perturbed_mean_counts_every_perturbation_once_and_transfers_to_a_new_context() -> None:
    control = np.array([[0.0, 1.0], [10.0, 10.0]])
    centroid = np.array([[1.0, 1.0], [3.0, 2.0]])
    reference = metrics.perturbed_mean(centroid, np.array([0, 0]), control)
    # Context 1 has no perturbations: its control plus the mean delta ((1, 0) + (3, 1)) / 2.
    np.testing.assert_allclose(reference, [[2.0, 1.5], [12.0, 10.5]])
    with pytest.raises(ValueError, match="at least one training centroid"):
        metrics.perturbed_mean(np.empty((0, 2)), np.empty(0, dtype=int), control)


def test_target_mask_passes_over_targets_that_are_not_measured() -> None:
    mask = metrics.target_mask([("B", "A"), ("KLF1",), ()], ["A", "B", "C"])
    np.testing.assert_array_equal(mask, [[True, True, False], [False] * 3, [False] * 3])


def test_pearson_of_constant_rows_is_zero_and_of_nan_is_nan() -> None:
    profile = np.array([0.0, 1.0, 3.0])
    x = np.stack([profile, np.zeros(3), np.full(3, 0.1) + 1e-8 * profile, np.array([np.nan, 1.0, 3.0])])
    y = np.broadcast_to(profile, x.shape)
    np.testing.assert_array_equal(metrics.pearson(x, y)[1:], [0.0, 0.0, np.nan])
    assert metrics.pearson(x, y)[0] == pytest.approx(1.0)
    np.testing.assert_array_equal(metrics.pearson(y, x)[1:], [0.0, 0.0, np.nan])


def test_a_nan_prediction_is_nan_and_not_a_wrong_direction() -> None:
    predicted = PREDICTED.copy()
    predicted[0, 0] = np.nan
    genes = np.array([[0, 1], [0, 1]])
    assert np.isnan(metrics.direction_at(predicted, OBSERVED, CONTROL, genes)).tolist() == [True, False]


def _random_case(seed: int) -> tuple[Array, Array, Array, Array]:
    random = np.random.default_rng(seed)
    predicted, observed, control = random.gamma(1.0, size=(3, 6, 40))
    return predicted, observed, control, random.gamma(1.0, size=(6, 40))


def _scores(predicted: Array, observed: Array, control: Array, variance: Array) -> Array:
    n = np.full(len(predicted), 9)
    genes = metrics.top_de(observed, variance, n, control, variance, n, k=10)
    return np.stack(
        [
            metrics.mse(predicted, observed),
            metrics.mae(predicted, observed),
            metrics.rmse(predicted, observed),
            metrics.pearson_delta(predicted, observed, control),
            metrics.mse_at(predicted, observed, genes),
            metrics.direction_at(predicted, observed, control, genes),
        ],
        axis=1,
    )


def test_metrics_do_not_depend_on_the_order_of_genes_or_conditions() -> None:
    case = _random_case(1)
    expected = _scores(*case)
    random = np.random.default_rng(2)
    genes, rows = random.permutation(40), random.permutation(6)
    np.testing.assert_allclose(_scores(*(part[:, genes] for part in case)), expected, atol=1e-12)
    np.testing.assert_allclose(_scores(*(part[rows] for part in case)), expected[rows], atol=1e-12)


def test_vectorised_pearson_equals_numpy() -> None:
    predicted, observed, control, _ = _random_case(3)
    expected = [np.corrcoef(predicted[row] - control[row], observed[row] - control[row])[0, 1] for row in range(6)]
    np.testing.assert_allclose(metrics.pearson_delta(predicted, observed, control), expected)
