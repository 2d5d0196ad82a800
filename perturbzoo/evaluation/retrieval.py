"""Retrieval: can a predicted condition be told from the other conditions by what it predicts?

Called by the evaluation of two files (:mod:`perturbzoo.evaluation.native`); arrays in, one number for each condition out.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.samples import squared_distances

Distance = Literal["l1", "l2", "cosine"]
_TILE = 32  # rows of a few thousand genes that the cache of a core holds
_TIE = 1e-9  # distances closer than this share of the largest are ties: rounding must not decide a rank


def discrimination_score(
    predicted: Array,
    observed: Array,
    distance: Distance,
    exclude: NDArray[np.bool_] | None = None,
    *,
    scale: Literal["others", "all"] = "others",
) -> Array:
    r"""How many other conditions' observed effects are farther from a predicted effect than its own (PDS).

    With :math:`d_{pq}` the distance of predicted effect p from observed effect q, over the genes that p does not target,

    .. math:: PDS_p = 1 - k_p / (n - 1), \quad
        k_p = |\{q: d_{pq} < d_{pp}\}| + \tfrac{1}{2} (|\{q: d_{pq} = d_{pp}\}| - 1),

    so ties share the mean of their ranks. The perturbation discrimination score of the Virtual Cell Challenge 2026
    (https://github.com/ArcInstitute/cell-eval2, docs/vcc2026_metrics, section 1). 1: closer to its own effect than to any
    other; .5: what one profile for all conditions scores on average, and a prediction of no change (cosine) in each.

    Parameters
    ----------
    predicted, observed
        Shape ``(P, G)``: changes from control, log1p-normalised. With ``"l1"`` and ``"l2"`` profiles do as well.
    distance
        City block, Euclidean, or cosine; the cosine distance from or to an effect of length 0 is 1.
    exclude
        Shape ``(P, G)``: genes left out of all distances of predicted effect p: its own targets, all of a combination.
        Shape ``(G,)``: genes left out of all. None: no gene, as cell-eval 0.x does for combinations, since no gene is called
        ``A+B``.
    scale
        ``"all"`` divides by n instead of n - 1, as cell-eval 0.x does: from 1 / n to 1.

    Returns
    -------
    Shape ``(P,)``; NaN for a row with NaN, which no other row is then compared with, and where nothing is left to compare.
    """
    if exclude is not None and exclude.ndim == 1:
        predicted, observed, exclude = predicted[:, ~exclude], observed[:, ~exclude], None
    score = np.full(len(predicted), np.nan)
    usable = np.flatnonzero(np.isfinite(predicted).all(axis=1) & np.isfinite(observed).all(axis=1))
    n = len(usable)
    if n < 2:
        return score
    between = _distances(predicted[usable], observed[usable], distance, None if exclude is None else exclude[usable])
    own = np.diagonal(between)[:, None]
    tolerance = _TIE * max(float(between.max()), 1e-300)
    closer = (between < own - tolerance).sum(axis=1)
    tied = (np.abs(between - own) <= tolerance).sum(axis=1) - 1
    score[usable] = 1 - (closer + tied / 2) / (n - 1 if scale == "others" else n)
    return score


def centroid_accuracy(predicted: Array, observed: Array) -> Array:
    """Share of the other conditions whose observed centroid is farther from the predicted one than its own (Systema).

    Euclidean, over all genes, ties counted half. Vinas Torne et al. 2025, https://doi.org/10.1038/s41587-025-02777-8. The same as
    :func:`discrimination_score` with ``"l2"`` and no gene left out.

    Parameters
    ----------
    predicted, observed
        Shape ``(P, G)``: pseudobulks.
    """
    return discrimination_score(predicted, observed, "l2")


def _distances(predicted: Array, observed: Array, distance: Distance, exclude: NDArray[np.bool_] | None) -> Array:
    """``(P, P)``: predicted effects by observed ones; squared for ``"l2"``, which has the same order."""
    if distance == "cosine":
        return _cosine(predicted, observed, exclude)
    between = _city_block(predicted, observed) if distance == "l1" else squared_distances(predicted, observed)
    # The few genes of each condition are taken out of its row again: one product for all conditions, not one each.
    for row, genes in _excluded(exclude):
        difference = np.abs(predicted[row, genes] - observed[:, genes])
        between[row] -= (difference if distance == "l1" else difference**2).sum(axis=1)
    return np.maximum(between, 0.0)


def _city_block(predicted: Array, observed: Array) -> Array:
    """``(P, P)`` sums of absolute differences, a few observed rows at a time: all of them would be fetched from memory P times."""
    tiles = [cdist(predicted, observed[start : start + _TILE], "cityblock") for start in range(0, len(observed), _TILE)]
    return np.concatenate(tiles, axis=1)


def _cosine(predicted: Array, observed: Array, exclude: NDArray[np.bool_] | None) -> Array:
    product = predicted @ observed.T
    predicted_square = (predicted**2).sum(axis=1)
    observed_square = np.tile((observed**2).sum(axis=1), (len(predicted), 1))
    smallest = 1e-12 * (observed_square + predicted_square[:, None])  # what rounding leaves of a length of 0
    for row, genes in _excluded(exclude):
        product[row] -= observed[:, genes] @ predicted[row, genes]
        predicted_square[row] -= (predicted[row, genes] ** 2).sum()
        observed_square[row] -= (observed[:, genes] ** 2).sum(axis=1)
    vanishes = (predicted_square[:, None] <= smallest) | (observed_square <= smallest)
    length = np.sqrt(np.where(vanishes, 1.0, predicted_square[:, None] * observed_square))
    return np.where(vanishes, 1.0, 1 - product / length)


def _excluded(exclude: NDArray[np.bool_] | None) -> list[tuple[int, NDArray[np.intp]]]:
    """The rows that leave genes out, and which."""
    if exclude is None:
        return []
    return [(int(row), np.flatnonzero(exclude[row])) for row in np.flatnonzero(exclude.any(axis=1))]
