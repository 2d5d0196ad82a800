"""Does a model know how wrong it is? Coverage of its intervals, and whether its error estimates rank its errors.

A prediction's standard error s concerns the expected pseudobulk. What is observed carries the sampling noise of its own cells
besides, with variance w = (variance over cells) / (number of cells), so an interval for it is
``predicted ± z sqrt(scale s² + w)``.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pandas as pd

from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.pseudobulk import Pseudobulks

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def _parts(bulks: Pseudobulks) -> tuple[Array, Array, Array, np.ndarray]:
    """Squared error, predicted variance, sampling variance ``(P, G)`` each, and where a gene is expressed at all.

    A gene that neither the condition nor its control expresses is predicted without error by anybody, and would make any
    interval look good.
    """
    if bulks.predicted_variance is None:
        raise ValueError("these pseudobulks were predicted without a variance")
    sampling = np.nan_to_num(bulks.observed_variance) / bulks.count[:, None]
    return (
        (bulks.observed - bulks.predicted) ** 2,
        bulks.predicted_variance,
        sampling,
        (bulks.observed > 0) | (bulks.control > 0),
    )


def conformal_scale(bulks: Pseudobulks, level: float = 0.9) -> float:
    """The factor on predicted variances with which the intervals cover `level` of these observations (split conformal).

    Parameters
    ----------
    bulks
        Validation pseudobulks with predicted variances: conditions that were not trained on.
    level
        Wanted coverage.

    Returns
    -------
    The `level` quantile, over expressed genes of all conditions, of the smallest factor that covers each observation.
    """
    squared, variance, sampling, expressed = _parts(bulks)
    usable = expressed & (variance > 0)
    if not usable.any():
        return 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    needed = np.maximum(squared / z**2 - sampling, 0.0)[usable] / variance[usable]
    # the finite-sample correction of split conformal prediction
    rank = min(1.0, np.ceil((needed.size + 1) * level) / needed.size)
    return float(np.quantile(needed, rank, method="higher"))


def coverage(bulks: Pseudobulks, level: float = 0.9) -> Array:
    """Share of each condition's expressed genes whose observation lies in its interval, ``(P,)``."""
    squared, variance, sampling, expressed = _parts(bulks)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    inside = squared <= z**2 * (variance + sampling)
    return (inside & expressed).sum(axis=1) / np.maximum(expressed.sum(axis=1), 1)


def calibration_curve(bulks: Pseudobulks) -> pd.DataFrame:
    """Wanted and reached coverage: columns ``level`` and ``coverage``, the latter averaged over conditions."""
    return pd.DataFrame({"level": LEVELS, "coverage": [coverage(bulks, level).mean() for level in LEVELS]})


def error_rank_correlation(bulks: Pseudobulks) -> float:
    """Spearman correlation, over conditions, of the predicted root mean squared error with the one made.

    NaN for fewer than three conditions.
    """
    from scipy.stats import spearmanr

    squared, variance, _, _ = _parts(bulks)
    if len(squared) < 3:
        return float("nan")
    return float(spearmanr(np.sqrt(variance.mean(axis=1)), np.sqrt(squared.mean(axis=1))).statistic)
