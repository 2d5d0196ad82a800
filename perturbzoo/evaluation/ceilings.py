"""How well one half of a condition's cells predicts the other: what no prediction of the mean should be expected to beat.

Called by the native protocol. Definitions of scperteval (https://github.com/Virtual-Cell-Research-Community/scPertEval) and CellSimBench.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from perturbzoo.evaluation.comparison import Candidate, Comparison, Truth, make_truth
from perturbzoo.evaluation.effects import rest
from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.pseudobulk import GroupMoments

CEILING = "split-half ceiling"
DUPLICATE = "technical duplicate"
INTERPOLATED = "interpolated duplicate"


def ceilings(comparison: Comparison) -> dict[str, tuple[Candidate, Truth]]:
    """The ceilings of a comparison with halves, and what they are scored against: the second half of each row's cells.

    Returns
    -------
    The first half, twice, as :data:`CEILING` (whose scores are still to be taken to the whole experiment's size) and as
    :data:`DUPLICATE`; and :func:`interpolated_duplicate` of it, which has no cells, where there are other conditions. A row with one
    cell has no halves: NaN.
    """
    assert comparison.halves is not None
    count, mean, variance = comparison.halves.count, comparison.halves.mean, comparison.halves.variance
    split = ((count[0::2] > 0) & (count[1::2] > 0))[:, None]
    first, second = (
        GroupMoments(
            count=np.maximum(count[half::2], 1),
            mean=np.where(split, mean[half::2], np.nan),
            variance=np.where(split, variance[half::2], np.nan),
        )
        for half in (0, 1)
    )
    half = Candidate(first.mean, first.variance, half=0)
    truth = make_truth(comparison, second, half=1)
    blended = np.full_like(first.mean, np.nan)
    for one in np.unique(comparison.context):
        mine = np.flatnonzero(comparison.context == one)
        blended[mine] = interpolated_duplicate(_rows(first, mine), _rows(comparison.observed, mine))
    found = {CEILING: (half, truth), DUPLICATE: (half, truth)}
    if np.isfinite(blended).all(axis=1).any():
        found[INTERPOLATED] = (Candidate(blended), truth)
    return found


def interpolated_duplicate(duplicate: GroupMoments, observed: GroupMoments) -> Array:
    r"""A half of a condition's cells where it says something of a gene, the mean of the other conditions where it does not.

    Gene by gene :math:`(1 - p) \, d + p \, m`, with d the mean of the half, m the mean of the other conditions' centroids and p the
    Benjamini-Hochberg adjusted p-value of Welch's t test of the half's cells against the cells of all other conditions: the
    ``interpolated`` source of scperteval with its default ``t-test``, after Miller et al. 2025 (CellSimBench). scperteval tests
    against a sample of the other cells, of 8,192 at most; here it is against all of them, since moments are enough. A gene without any
    variance counts as not changed, as there.

    Parameters
    ----------
    duplicate, observed
        Moments of the halves and of the whole conditions, P rows each, of one context.

    Returns
    -------
    Shape ``(P, G)``; NaN where there is one condition alone, or no half.
    """
    if len(observed.mean) < 2:
        return np.full_like(observed.mean, np.nan)
    others = rest(observed.mean, observed.variance, observed.count)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = stats.ttest_ind_from_stats(
            duplicate.mean,
            np.sqrt(np.nan_to_num(duplicate.variance)),
            duplicate.count[:, None],
            others.mean,
            np.sqrt(others.variance),
            others.count[:, None],
            equal_var=False,
        ).pvalue
    constant = np.nan_to_num(duplicate.variance) / duplicate.count[:, None] + others.variance <= 0
    p = np.where(np.isnan(p) | constant, 1.0, p)
    adjusted = stats.false_discovery_control(p, axis=1)
    centroids = (observed.mean.sum(axis=0) - observed.mean) / (len(observed.mean) - 1)
    return (1 - adjusted) * duplicate.mean + adjusted * centroids


def _rows(moments: GroupMoments, rows: NDArray[np.intp]) -> GroupMoments:
    return GroupMoments(moments.count[rows], moments.mean[rows], moments.variance[rows])
