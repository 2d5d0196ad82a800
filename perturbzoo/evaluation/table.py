"""The table of scores: one row per (condition, context), one column per metric."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.evaluation import metrics
from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.pseudobulk import DESets, Pseudobulks

METRICS: dict[str, bool] = {
    "pearson_delta": True,
    "pearson_delta_perturbed_reference": True,
    "direction_top20_de": True,
    "mse_top20_de": False,
    "mse_top20_de_no_target": False,
    "mse": False,
    "mae": False,
    "rmse": False,
}
"""Every metric of the table, in the order it is printed, and whether higher is better."""

FILE_METRICS: dict[str, bool | None] = {
    **METRICS,
    "pds_cosine": True,
    "pds_l1": True,
    "pds_l2": True,
    "centroid_accuracy": True,
    "weighted_mse": False,
    "weighted_r2_delta": True,
    "variance_recovery": None,
    "cell_variance_recovery": None,
    "e_distance": False,
    "mmd": False,
    "sinkhorn": False,
}
"""Those, and what :mod:`perturbzoo.evaluation.native` adds where two files are compared; None: 1 is best."""

PRINTED = (
    "pearson_delta",
    "pearson_delta_perturbed_reference",
    "direction_top20_de",
    "mse_top20_de",
    "mse",
    "pds_cosine",
    "centroid_accuracy",
    "weighted_r2_delta",
    "variance_recovery",
    "e_distance",
)
"""The metrics that the commands print; all are in the files that they write."""

CORRELATIONS = ("pearson_delta", "pearson_delta_perturbed_reference")
"""Metrics of the ceiling that Spearman and Brown's formula takes to full size: :func:`at_full_size`."""

SQUARED_ERRORS = ("mse", "mse_top20_de", "mse_top20_de_no_target", "weighted_mse")
"""Metrics of the ceiling that are halved there."""


def score_conditions(
    pseudobulks: Pseudobulks,
    *,
    conditions: Sequence[str],
    contexts: Sequence[str],
    categories: Sequence[str],
    reference: Array,
    de: DESets,
) -> pd.DataFrame:
    """Score predicted against observed pseudobulks, row by row.

    Parameters
    ----------
    pseudobulks
        P rows: a model's, or another prediction for the same cells (``with_prediction``, ``split_half``).
    conditions, contexts, categories
        Condition, context and split category of each of the P rows.
    reference
        Shape ``(P, G)`` or ``(G,)``: mean of the training perturbations (of the row's context).
    de
        Top DE genes of the P rows.

    Returns
    -------
    One row per row of `pseudobulks`: condition, context, category, n_cells, the columns of :data:`METRICS`, and
    `pearson_delta_undefined`, `pearson_delta_perturbed_reference_undefined`: a change was constant over genes, so that
    the correlation is 0 by definition. A row whose prediction is NaN in every gene was not predicted: its metrics are
    NaN.

    Raises
    ------
    PerturbZooError
        A prediction is NaN in some genes, or infinite; an observation or a control is not finite.
    """
    predicted, observed, control = pseudobulks.predicted, pseudobulks.observed, pseudobulks.control
    labels = {"condition": list(conditions), "context": list(contexts), "category": list(categories)}
    for name, column in labels.items():
        if len(column) != len(pseudobulks):
            raise ValueError(f"{len(column)} labels of {name} for {len(pseudobulks)} pseudobulks")
    rows = np.flatnonzero(~np.isnan(predicted).all(axis=1))
    if len(rows) == 0 and np.isfinite(observed).all():
        rows = np.arange(len(predicted))  # a model that has diverged, not one that passes over some of the conditions
    for name, profile in (("predicted", predicted), ("observed", observed), ("control", control)):
        _check_finite(name, profile[rows], [labels["condition"][row] for row in rows])
    scores = {
        "pearson_delta": metrics.pearson_delta(predicted, observed, control),
        "pearson_delta_perturbed_reference": metrics.pearson_delta(predicted, observed, reference),
        "direction_top20_de": metrics.direction_at(predicted, observed, control, de.genes),
        "mse_top20_de": metrics.mse_at(predicted, observed, de.genes),
        "mse_top20_de_no_target": metrics.mse_at(predicted, observed, de.genes_no_target),
        "mse": metrics.mse(predicted, observed),
        "mae": metrics.mae(predicted, observed),
        "rmse": metrics.rmse(predicted, observed),
    }
    undefined = {
        f"{name}_undefined": metrics.is_constant(predicted - origin) | metrics.is_constant(observed - origin)
        for name, origin in (("pearson_delta", control), ("pearson_delta_perturbed_reference", reference))
    }
    return pd.DataFrame({**labels, "n_cells": pseudobulks.count, **scores, **undefined})


def at_full_size(halves: pd.DataFrame) -> pd.DataFrame:
    """From how well half of the cells predict the other half, to how well a repeat of the whole experiment would.

    With independent noise of variance v / n in the mean of n cells, a half predicts the other with the squared error
    4 v / n and a repeat with 2 v / n: squared errors are halved, absolute errors and roots divided by the root of 2.
    A correlation r becomes 2 r / (1 + r) (Spearman-Brown); one below 0 is left as it is, as are ranks, directions and all other
    columns, for which there is no such law. Without this, a good model on few cells would score above its ceiling.

    Parameters
    ----------
    halves
        Scores of one half as the prediction of the other (:func:`perturbzoo.evaluation.pseudobulk.split_half`).
    """
    scores = halves.copy()
    for name in CORRELATIONS:
        if name in scores:
            scores[name] = scores[name].where(scores[name] < 0, 2 * scores[name] / (1 + scores[name]))
    for name in SQUARED_ERRORS:
        if name in scores:
            scores[name] /= 2
    for name in ("mae", "rmse"):
        if name in scores:
            scores[name] /= np.sqrt(2)
    if "weighted_r2_delta" in scores:
        scores["weighted_r2_delta"] = 1 - (1 - scores["weighted_r2_delta"]) / 2
    return scores


def _check_finite(name: str, profile: Array, conditions: Sequence[str]) -> None:
    bad = ~np.isfinite(profile)
    if bad.any():
        names = shortened(f"'{conditions[row]}'" for row in np.flatnonzero(bad.any(axis=1)).tolist())
        raise PerturbZooError(
            f"the {name} expression of {names} is NaN or infinite in {int(bad.any(axis=0).sum())} of {profile.shape[1]} "
            "genes; expected finite log1p values in every gene"
        )
