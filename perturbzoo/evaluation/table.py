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

_DE_SETS = tuple(
    f"top{k}_de{suffix}"
    for k, suffixes in ((20, ("", "_non_dropout", "_non_zero")), (50, ("",)), (100, ("",)), (200, ("",)))
    for suffix in (*suffixes, "_no_target")
)
_GENE_SETS = ("no_target", *_DE_SETS, "top200_hvg")
_SPREADS = ("", "_non_dropout", "_non_zero")

FILE_METRICS: dict[str, bool | None] = {
    **METRICS,
    "pds_cosine": True,
    "pds_l1": True,
    "pds_l2": True,
    "centroid_accuracy": True,
    "weighted_mse": False,
    "weighted_r2_delta": True,
    "variance_recovery": None,
    "gene_variance_recovery": None,
    "cell_variance_recovery": None,
    "e_distance": False,
    "mmd": False,
    "sinkhorn": False,
    "cosine_logfc": True,
    "l2_top1000": False,
    "cosine_delta": True,
    "cosine_delta_perturbed_reference": True,
    "spearman_delta": True,
    "r2_delta": True,
    "r2_delta_perturbed_reference": True,
    "rank_rmse": False,
    "rank_cosine_logfc": False,
    "pearson": True,
    **{f"mse_{name}": False for name in _GENE_SETS},
    **{f"pearson_delta_{name}": True for name in _GENE_SETS},
    **{f"pearson_{name}": True for name in (*_DE_SETS, "top200_hvg")},
    **{
        f"{metric}{name}": best
        for metric, best in (("direction", True), ("opposite_direction", False), ("zero_direction", False))
        for name in ("", "_non_zero", "_non_dropout", *(f"_{name}" for name in _DE_SETS))
    },
    **{f"in_range{band}{name}": True for band in ("", "_45_55", "_40_60", "_25_75") for name in _SPREADS},
    **{f"{part}_sigma{name}": False for part in ("mean", "std") for name in _SPREADS},
    **{f"sigma_below_{limit}{name}": True for limit in (1, 2) for name in _SPREADS},
    **{f"fold_change_gap{part}": False for part in ("", "_down3", "_down10", "_up3", "_up10")},
    **{f"de_{metric}{k}": True for metric in ("overlap", "precision") for k in ("", "_top50", "_top100", "_top200", "_top500")},
    "de_recall": True,
    "de_jaccard": True,
    "de_lfc_spearman": True,
    "de_direction_match": True,
    "de_model_direction_match": True,
    "de_lfc_nmae": False,
    "off_target_precision": True,
    **{
        f"log_p_{metric}": best
        for metric, best in (("rmse", False), ("mae", False), ("pearson", True), ("spearman", True), ("cosine", True))
    },
    **{f"gi_{name}_error": False for name in ("mag", "corr_fit", "dominance", "eq_contr", "dcor")},
}
"""Those, and what :mod:`perturbzoo.evaluation.native` adds; None: 1 is best."""

COUNTS = ("de_n_significant_observed", "de_n_significant_predicted", "off_target_chance")
"""Columns that say what a score rests on: more of them is neither better nor worse."""

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
    "de_overlap",
    "de_lfc_spearman",
)
"""The metrics that the commands print; all are in the files that they write."""

CORRELATIONS = tuple(name for name in FILE_METRICS if name.startswith("pearson_delta"))
"""Metrics of the ceiling that Spearman and Brown's formula takes to full size: :func:`at_full_size`."""

SQUARED_ERRORS = (*(name for name in FILE_METRICS if name.startswith("mse")), "weighted_mse")
"""Metrics of the ceiling that are halved there."""

ERRORS = ("mae", "rmse", "l2_top1000")
"""Metrics of the ceiling that are divided by the root of 2 there."""


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
        P rows: a model's, or another prediction for the same cells (``with_prediction``).
    conditions, contexts, categories
        Condition, context and split category of each of the P rows.
    reference
        Shape ``(P, G)`` or ``(G,)``: mean of the training perturbations (of the row's context).
    de
        Top DE genes of the P rows.

    Returns
    -------
    One row per row of `pseudobulks`: condition, context, category, n_cells, the columns of :data:`METRICS`, and
    `pearson_undefined`, `pearson_delta_undefined`, `pearson_delta_perturbed_reference_undefined`: a profile, or a change, was constant over genes, so that
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
    undefined["pearson_undefined"] = metrics.is_constant(predicted) | metrics.is_constant(observed)
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
        Scores of one half as the prediction of the other (:mod:`perturbzoo.evaluation.ceilings`).
    """
    scores = halves.copy()
    for name in CORRELATIONS:
        if name in scores:
            scores[name] = scores[name].where(scores[name] < 0, 2 * scores[name] / (1 + scores[name]))
    for name in SQUARED_ERRORS:
        if name in scores:
            scores[name] /= 2
    for name in ERRORS:
        if name in scores:
            scores[name] /= np.sqrt(2)
    for name in ("weighted_r2_delta", "r2_delta", "r2_delta_perturbed_reference"):
        if name in scores:
            scores[name] = 1 - (1 - scores[name]) / 2
    return scores


def _check_finite(name: str, profile: Array, conditions: Sequence[str]) -> None:
    bad = ~np.isfinite(profile)
    if bad.any():
        names = shortened(f"'{conditions[row]}'" for row in np.flatnonzero(bad.any(axis=1)).tolist())
        raise PerturbZooError(
            f"the {name} expression of {names} is NaN or infinite in {int(bad.any(axis=0).sum())} of {profile.shape[1]} "
            "genes; expected finite log1p values in every gene"
        )
