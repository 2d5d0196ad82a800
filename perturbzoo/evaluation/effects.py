"""Metrics of what sets one condition apart: errors weighted by it, and how much variation a prediction keeps.

Called by the evaluation of two files (:mod:`perturbzoo.evaluation.native`). P conditions of one context by G genes, float64,
log1p-normalised.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from perturbzoo.evaluation.metrics import CONSTANT, Array, welch_t
from perturbzoo.evaluation.pseudobulk import GroupMoments


def specificity_weights(mean: Array, variance: Array, n: NDArray[np.integer]) -> Array:
    r"""Weight of each gene in each condition: how clearly its cells differ from those of the other conditions.

    Welch's t of a condition's cells against the cells of all other conditions; its magnitude, scaled to 0 ... 1 over the
    genes of the condition, is squared. After Mejia et al. 2025 (Diversity by Design, https://arxiv.org/abs/2506.22641).
    Controls are not among the others, so a response that all perturbations share gets no weight.

    Parameters
    ----------
    mean, variance
        Shape ``(P, G)``: observed pseudobulks and unbiased variances over cells (NaN where there was one cell).
    n
        Shape ``(P,)``: cells.

    Returns
    -------
    Shape ``(P, G)``; NaN where there is one condition alone, and all 1 where t is the same in every gene.
    """
    if len(mean) < 2:
        return np.full_like(mean, np.nan)
    others = rest(mean, variance, n)
    t = np.abs(welch_t(mean, variance, n, others.mean, others.variance, others.count))
    # A gene without any variance that differs all the same has an infinite t: as clear as the clearest of the others.
    finite = np.where(np.isfinite(t), t, 0.0).max(axis=1, keepdims=True)
    t = np.where(np.isfinite(t), t, np.where(finite > 0, finite, 1.0))
    low, high = t.min(axis=1, keepdims=True), t.max(axis=1, keepdims=True)
    flat = high == low
    return np.where(flat, 1.0, (t - low) / np.where(flat, 1.0, high - low)) ** 2


def rest(mean: Array, variance: Array, n: NDArray[np.integer]) -> GroupMoments:
    """Moments of the cells of all other conditions, for each of P >= 2 conditions; parameters as above."""
    count = n[:, None].astype(np.float64)
    total = count * mean
    square = np.nan_to_num(variance) * (count - 1) + count * mean**2
    others = count.sum() - count
    other_mean = (total.sum(axis=0) - total) / others
    other_square = square.sum(axis=0) - square
    other_variance = np.maximum(other_square - others * other_mean**2, 0.0) / np.maximum(others - 1, 1)
    return GroupMoments(count=others[:, 0].astype(np.int64), mean=other_mean, variance=other_variance)


def weighted_mse(predicted: Array, observed: Array, weights: Array) -> Array:
    """Mean squared error over genes with weights of each condition, ``sum(w e²) / sum(w)``. All ``(P, G)``; returns ``(P,)``."""
    return (weights * (predicted - observed) ** 2).sum(axis=1) / weights.sum(axis=1)


def weighted_r2_delta(predicted: Array, observed: Array, reference: Array, weights: Array) -> Array:
    """Weighted coefficient of determination of the change from a reference, over genes.

    ``1 - sum(w (o - p)²) / sum(w (o - mean_w(o))²)`` with o, p the observed and predicted change. With the mean of the
    perturbations as the reference, a prediction of that mean scores 0 or below (Mejia et al. 2025).

    Parameters
    ----------
    predicted, observed, weights
        Shape ``(P, G)``.
    reference
        Shape ``(P, G)`` or ``(G,)``.

    Returns
    -------
    Shape ``(P,)``: at most 1; NaN where the observed change is the same in all genes that have weight.
    """
    change = observed - reference
    centre = (weights * change).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
    spread = (weights * (change - centre) ** 2).sum(axis=1)
    error = (weights * (predicted - observed) ** 2).sum(axis=1)
    return np.where(spread > 0, 1 - error / np.where(spread > 0, spread, 1.0), np.nan)


def variance_recovery(predicted: Array, observed: Array) -> Array:
    """How far predictions lie from their common mean, as a share of how far observations do: the mode-collapse meter.

    Row p is ``|predicted_p - mean(predicted)|² / mean_q |observed_q - mean(observed)|²``, so that the mean over conditions is
    the ratio of the two variances across conditions. 1: as varied as observed; 0: one profile for all.

    Parameters
    ----------
    predicted, observed
        Shape ``(P, G)``: pseudobulks. What is observed carries the noise of its cells, so a noise-free truth scores below 1.

    Returns
    -------
    Shape ``(P,)``; NaN for a row with NaN, and where all observations are alike.
    """
    usable = np.isfinite(predicted).all(axis=1) & np.isfinite(observed).all(axis=1)
    score = np.full(len(predicted), np.nan)
    if usable.sum() > 1:
        spread = ((observed[usable] - observed[usable].mean(axis=0)) ** 2).sum(axis=1).mean()
        if spread > 0:
            score[usable] = ((predicted[usable] - predicted[usable].mean(axis=0)) ** 2).sum(axis=1) / spread
    return score


def gene_variance_recovery(predicted: Array, observed: Array, error: Array) -> tuple[Array, Array]:
    """How much of each gene's variance across conditions a prediction keeps, and each condition's part in it.

    Of gene g: ``var_p(predicted_pg) / var_p(observed_pg)``, over the genes that vary at least twice as much as the noise of their
    cells explains. :func:`variance_recovery` is dominated by the few genes that vary most; here every gene counts the same.

    Parameters
    ----------
    predicted, observed
        Shape ``(P, G)``: pseudobulks. What is observed carries noise, so a noise-free truth scores below 1.
    error
        Shape ``(P, G)``: squared standard error of the observed pseudobulks (variance over cells by their number); NaN, where there
        was one cell, counts as 0.

    Returns
    -------
    genes
        Shape ``(G,)``: the ratio, NaN in genes that do not vary.
    conditions
        Shape ``(P,)``: mean over these genes of ``(predicted_pg - mean_q predicted_qg)² / var_q(observed_qg)``; its mean over
        conditions is the mean of the ratios over genes. 1 is right, 0 one profile for all. NaN for a row with NaN, and where no gene
        varies.
    """
    genes, conditions = np.full(predicted.shape[1], np.nan), np.full(len(predicted), np.nan)
    usable = np.isfinite(predicted).all(axis=1) & np.isfinite(observed).all(axis=1)
    if usable.sum() < 2:
        return genes, conditions
    spread = observed[usable].var(axis=0)
    varying = (spread > 2 * np.nan_to_num(error[usable]).mean(axis=0)) & (spread > CONSTANT**2)
    if varying.any():
        kept = predicted[np.ix_(usable, varying)]
        share = (kept - kept.mean(axis=0)) ** 2 / spread[varying]
        genes[varying], conditions[usable] = share.mean(axis=0), share.mean(axis=1)
    return genes, conditions


def cell_variance_recovery(predicted_variance: Array, observed_variance: Array) -> Array:
    """Predicted over observed variance of the cells within a condition, each summed over genes. 1 is right, 0 one cell repeated.

    Parameters
    ----------
    predicted_variance, observed_variance
        Shape ``(P, G)``: unbiased variances over cells, NaN where there was one.

    Returns
    -------
    Shape ``(P,)``; NaN where either side has one cell, or the observed cells do not vary.
    """
    spread = observed_variance.sum(axis=1)
    return np.where(spread > 0, predicted_variance.sum(axis=1) / np.where(spread > 0, spread, 1.0), np.nan)
