"""The scores of Open Problems' single-cell perturbation prediction (NeurIPS 2023), on signed log p-values.

Definitions: https://github.com/openproblems-bio/task_perturbation_prediction, src/metrics/mean_rowwise_error and
mean_rowwise_correlation. There the p-values are limma's, of pseudobulks of many donors; here they are those of a test between cells
(:mod:`perturbzoo.evaluation.differential`). Each score is one number per condition ("row"); its mean over conditions is the published
one: MRRMSE, MRMAE, mean row-wise Pearson, Spearman and cosine.
"""

from __future__ import annotations

import numpy as np

from perturbzoo.evaluation import metrics
from perturbzoo.evaluation.deltas import cosine, spearman
from perturbzoo.evaluation.differential import Differential
from perturbzoo.evaluation.metrics import Array

CLIP = 4.0
"""Signed log p-values are cut to -4 ... 4 (a p-value of .0001), the layer ``clipped_sign_log10_pval`` that is scored."""


def signed_log_p(tests: Differential) -> Array:
    """``-log10(p)`` with the sign of the fold change, cut to -4 ... 4. Shape ``(P, G)``; 0 where the fold change is no number."""
    with np.errstate(divide="ignore"):
        strength = np.minimum(-np.log10(tests.p_value), CLIP)
    # not np.sign(...) alone: a fold change that is no number must not take the row with it
    sign = np.nan_to_num(np.sign(tests.log2_fold_change))
    return np.where(np.isnan(tests.p_value), np.nan, strength * sign)


def scores(predicted: Array, observed: Array) -> dict[str, Array]:
    """Score predicted against observed signed log p-values, row by row.

    Parameters
    ----------
    predicted, observed
        Shape ``(P, G)``.

    Returns
    -------
    ``log_p_rmse``, ``log_p_mae``, ``log_p_pearson``, ``log_p_spearman``, ``log_p_cosine``, ``(P,)`` each. A correlation or a
    cosine that is not defined is 0, as there. NaN in rows that have no cells.
    """
    return {
        "log_p_rmse": metrics.rmse(predicted, observed),
        "log_p_mae": metrics.mae(predicted, observed),
        "log_p_pearson": metrics.pearson(predicted, observed),
        "log_p_spearman": spearman(predicted, observed),
        "log_p_cosine": cosine(predicted, observed),
    }
