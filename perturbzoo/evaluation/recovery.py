"""Recovery of differentially expressed genes: predicted against observed tests in, one number for each condition out.

The definitions are those of cell-eval2's ``de_wilcoxon_*`` in its version 2 (https://github.com/ArcInstitute/cell-eval2,
``metrics/de.py`` and ``real_gate.py``); given the same tests, the numbers are the same. There, as here, a condition's own targets
are left out of the Jaccard index and of the error of fold changes, and of nothing else; cell-eval2 knows one target of a label at
most, here all of a combination's are left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from perturbzoo.evaluation.differential import Differential
from perturbzoo.evaluation.metrics import Array, largest

TOP = (50, 100, 200, 500)
MIN_SIGNIFICANT = 10
"""Conditions with fewer significant observed genes have no recall, no direction match, no correlation and no error of fold changes."""


def recovery(predicted: Differential, observed: Differential, targets: NDArray[np.bool_]) -> dict[str, Array]:
    r"""Hold the predicted significant genes against the observed ones.

    With R and S the observed and predicted genes of adjusted p-value below .05, sorted by the magnitude of the log2 fold change:

    - ``de_overlap``: :math:`|R \cap S_{:|R|}| / |R|`; ``de_overlap_topK``: :math:`|R_{:k} \cap S_{:k}| / k` with
      :math:`k = \min(K, |R|)`. 0 where R is empty.
    - ``de_precision``, ``de_precision_topK``: the same with :math:`|S|` in place of :math:`|R|`. 0 where S is empty.
    - ``de_recall``: :math:`|R \cap S| / |R|`; ``de_jaccard``: :math:`|R \cap S| / |R \cup S|`, 1 where both are empty.
    - ``de_direction_match``: share of R whose fold change has the predicted sign; ``de_model_direction_match``: of S, the observed
      sign (0 where S is empty).
    - ``de_lfc_spearman``: rank correlation of the fold changes over R; -1 where the predicted ones are all the same.
    - ``de_lfc_nmae``: mean absolute error of the fold changes over R, divided by their mean magnitude. A prediction whose fold
      changes are 0 scores 1. Fold changes that are no number count as 0.
    - ``de_n_significant_observed``, ``de_n_significant_predicted``: :math:`|R|` and :math:`|S|`.

    Parameters
    ----------
    predicted, observed
        Tests against the same controls (:func:`perturbzoo.evaluation.differential.against_control`).
    targets
        Shape ``(P, G)``: genes that a condition perturbs; left out of ``de_jaccard`` and ``de_lfc_nmae``.

    Returns
    -------
    By column name, ``(P,)``: NaN where either side has no cells, and where :data:`MIN_SIGNIFICANT` says so.
    """
    truth, called = observed.significant, predicted.significant
    n_truth, n_called = truth.sum(axis=1), called.sum(axis=1)
    both = (truth & called).sum(axis=1)
    lfc, guess = observed.log2_fold_change, predicted.log2_fold_change
    enough = n_truth >= MIN_SIGNIFICANT
    same_sign = np.sign(lfc) == np.sign(guess)
    found = {
        "de_recall": np.where(enough, both / np.maximum(n_truth, 1), np.nan),
        "de_direction_match": np.where(enough, (truth & same_sign).sum(axis=1) / np.maximum(n_truth, 1), np.nan),
        "de_model_direction_match": (called & same_sign).sum(axis=1) / np.maximum(n_called, 1),
        "de_lfc_spearman": _lfc_spearman(lfc, guess, truth),
        "de_n_significant_observed": n_truth.astype(np.float64),
        "de_n_significant_predicted": n_called.astype(np.float64),
    }
    place, called_place = _places(np.abs(lfc), truth), _places(np.abs(guess), called)
    for k in (None, *TOP):
        suffix = "" if k is None else f"_top{k}"
        for name, size in (("de_overlap", n_truth), ("de_precision", n_called)):
            depth = (size if k is None else np.minimum(k, size))[:, None]
            shared = ((place < depth) & (called_place < depth)).sum(axis=1)
            found[name + suffix] = shared / np.maximum(depth[:, 0], 1)
    truth, called = truth & ~targets, called & ~targets
    union = (truth | called).sum(axis=1)
    found["de_jaccard"] = np.where(union > 0, (truth & called).sum(axis=1) / np.maximum(union, 1), 1.0)
    size = np.where(truth, np.abs(lfc), 0.0).sum(axis=1)
    error = np.where(truth, np.abs(np.where(np.isfinite(guess), guess, 0.0) - lfc), 0.0).sum(axis=1)
    usable = (truth.sum(axis=1) >= MIN_SIGNIFICANT) & (size > 0)
    found["de_lfc_nmae"] = np.where(usable, error / np.where(usable, size, 1.0), np.nan)
    missing = ~(predicted.tested & observed.tested)
    return {name: np.where(missing, np.nan, values) for name, values in found.items()}


def off_target_precision(
    change: Array, significant: NDArray[np.bool_], targets: NDArray[np.bool_], k: int = 50
) -> tuple[Array, Array]:
    """Of the genes predicted to change most, beyond the targets: the share that do change; and what chance would give.

    No published definition is followed. A gene changes if the observed cells differ from the controls (Wilcoxon, adjusted p-value
    below .05); predicted to change are the `k` genes of largest predicted change, the condition's own targets left out, those
    with no predicted change at all too.

    Parameters
    ----------
    change
        Shape ``(P, G)``: predicted change from control.
    significant
        Shape ``(P, G)``: the observed gene is differentially expressed.
    targets
        Shape ``(P, G)``: genes that a condition perturbs.
    k
        How many genes.

    Returns
    -------
    precision
        Shape ``(P,)``; NaN where no change is predicted.
    chance
        Shape ``(P,)``: share of all genes but the targets that change: the precision of a random choice.
    """
    genes = largest(np.nan_to_num(change), k, exclude=targets | (change == 0) | np.isnan(change))
    here = genes >= 0
    n = here.sum(axis=1)
    hits = (np.take_along_axis(significant, genes, axis=1) & here).sum(axis=1)
    others = ~targets
    chance = (significant & others).sum(axis=1) / np.maximum(others.sum(axis=1), 1)
    return np.where(n > 0, hits / np.maximum(n, 1), np.nan), chance


def _places(magnitude: Array, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Each chosen gene's place in the order of falling magnitude, from 0; the others are past every depth."""
    order = np.argsort(np.where(chosen, -magnitude, np.inf), axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), axis=1)
    return np.where(chosen, place, order.shape[1])


def _lfc_spearman(lfc: Array, guess: Array, truth: NDArray[np.bool_]) -> Array:
    score = np.full(len(lfc), np.nan)
    for row in np.flatnonzero(truth.sum(axis=1) >= MIN_SIGNIFICANT):
        x, y = lfc[row, truth[row]], guess[row, truth[row]]
        if np.ptp(x) == 0:
            continue
        if not np.isfinite(y).all():
            # cell-eval2's engine sorts NaN above every number
            y = np.where(np.isnan(y), np.inf, y)
        x, y = rankdata(x), rankdata(y)
        score[row] = -1.0 if np.ptp(y) == 0 else np.corrcoef(x, y)[0, 1]
    return score
