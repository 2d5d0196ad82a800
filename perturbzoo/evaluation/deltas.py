"""Metrics of predicted and observed changes: size, direction and order over genes. P conditions by G genes, log1p-normalised.

Called by the evaluation of two files; arrays in, one number for each condition out.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from perturbzoo.evaluation.metrics import Array, pearson
from perturbzoo.evaluation.samples import squared_distances

_PSEUDOCOUNT = 0.1
_N_EXPRESSED = 1000


def cosine(x: Array, y: Array) -> Array:
    """Cosine of the angle between the rows of `x` and of `y`, ``(P, G)`` each; 0 where either is 0 in every gene."""
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.where(lengths == 0, 0.0, (x * y).sum(axis=1) / np.where(lengths == 0, 1.0, lengths))


def log_fold_change(mean: Array, control: Array) -> Array:
    """PerturBench's log fold change, ``log2(mean + 0.1) - log2(control + 0.1)``, of *log1p* means.

    So it is no fold change of counts: ``analysis/benchmarks/aggregation.py``, ``logFC_adata`` with its default ``exp=False``, in
    https://github.com/altoslabs/perturbench (Wu et al. 2024, https://arxiv.org/abs/2408.10609). What is not finite, because a predicted
    mean is -0.1 or below, is 0, as there. A row with NaN stays NaN.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        change = np.log2(mean + _PSEUDOCOUNT) - np.log2(control + _PSEUDOCOUNT)
    return np.where(np.isfinite(change) | np.isnan(mean), change, 0.0)


def r2_delta(predicted: Array, observed: Array, reference: Array) -> Array:
    """Coefficient of determination over genes of the change from a reference: scikit-learn's ``r2_score(observed, predicted)``.

    ``1 - sum((o - p)²) / sum((o - mean(o))²)`` with the changes o and p. At most 1, 0 or below for a prediction of the reference.

    Parameters
    ----------
    predicted, observed
        Shape ``(P, G)``.
    reference
        Shape ``(P, G)`` or ``(G,)``.

    Returns
    -------
    Shape ``(P,)``; NaN where the observed change is the same in all genes.
    """
    change = observed - reference
    spread = ((change - change.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    error = ((predicted - observed) ** 2).sum(axis=1)
    return np.where(spread > 0, 1 - error / np.where(spread > 0, spread, 1.0), np.nan)


def ranks(x: Array) -> Array:
    """Mid-ranks within each row, ``(P, G)``; a row with a NaN is NaN."""
    missing = np.isnan(x).any(axis=1, keepdims=True)
    return np.where(missing, np.nan, rankdata(np.where(missing, 0.0, x), axis=1))


def spearman(x: Array, y: Array) -> Array:
    """Rank correlation of the rows of `x` and of `y`, ``(P, G)`` each (scipy's ``spearmanr``).

    Returns
    -------
    Shape ``(P,)``; 0 where either is the same in all genes, NaN where either has a NaN.
    """
    return pearson(ranks(x), ranks(y))


def l2_top1000(predicted: Array, observed: Array, control: Array) -> Array:
    """Euclidean distance over the 1,000 genes that are most expressed in the controls.

    The prediction error of Ahlmann-Eltze, Huber and Anders 2025 (https://doi.org/10.1038/s41592-025-02772-6). All genes where there
    are fewer.

    Parameters
    ----------
    predicted, observed, control
        Shape ``(P, G)``: pseudobulks; the genes are those of each row's own controls.
    """
    k = min(_N_EXPRESSED, control.shape[1])
    genes = np.argpartition(-control, k - 1, axis=1)[:, :k]
    error = np.take_along_axis(predicted, genes, axis=1) - np.take_along_axis(observed, genes, axis=1)
    return np.sqrt((error**2).sum(axis=1))


def rank_among_predictions(predicted: Array, observed: Array, *, similarity: str) -> Array:
    """Share of the predictions that are more like an observed condition than the one made for it (PerturBench's rank).

    0: the prediction of p is the one most like the observed p; .5 is chance. The reverse of
    :func:`perturbzoo.evaluation.retrieval.discrimination_score`, and over *predictions* of one observed profile.
    ``rank_helper`` in ``analysis/benchmarks/metrics.py`` of https://github.com/altoslabs/perturbench, which breaks ties at random:
    this gives their mean.

    Parameters
    ----------
    predicted, observed
        Shape ``(P, G)``: profiles with ``similarity="rmse"``, log fold changes with ``"cosine"``.

    Returns
    -------
    Shape ``(P,)``, from 0 to ``1 - 1 / P``; NaN for a row with NaN, which is not counted, and for a row alone.
    """
    rank = np.full(len(predicted), np.nan)
    usable = np.flatnonzero(np.isfinite(predicted).all(axis=1) & np.isfinite(observed).all(axis=1))
    if len(usable) < 2:
        return rank
    p, o = predicted[usable], observed[usable]
    if similarity == "rmse":
        distance = squared_distances(p, o)
    else:
        lengths = np.linalg.norm(p, axis=1)[:, None] * np.linalg.norm(o, axis=1)
        distance = 1 - np.where(lengths > 0, p @ o.T, 0.0) / np.where(lengths > 0, lengths, 1.0)
    own = np.diagonal(distance)
    tolerance = 1e-9 * max(float(distance.max()), 1e-300)  # rounding must not decide a rank
    nearer = (distance < own - tolerance).sum(axis=0)
    tied = (np.abs(distance - own) <= tolerance).sum(axis=0) - 1
    rank[usable] = (nearer + tied / 2) / len(usable)
    return rank
