"""Differential expression of sampled cells against control cells: Wilcoxon's test by illico, for all conditions in one run.

Called by the evaluation of two files, once for each side. Cells in, tables over conditions and genes out; what is made of them is
in :mod:`perturbzoo.evaluation.recovery` and :mod:`perturbzoo.evaluation.open_problems`.
"""

from __future__ import annotations

import functools
import sys
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats import false_discovery_control

from perturbzoo.evaluation.metrics import Array

SIGNIFICANT = 0.05
"""Adjusted p-values below this count as differentially expressed."""

_PSEUDOCOUNT = 1e-9
_CELLS = 512  # on the linear scale at a time
# illico takes all processors, and its check of the matrix must not run twice at a time
_ONE_AT_A_TIME = threading.Lock()


@dataclass
class Differential:
    """Tests of P conditions in G genes, ``(P, G)`` each; NaN in the rows of conditions without cells.

    Attributes
    ----------
    p_value
        Of the two-sided asymptotic Wilcoxon rank-sum test, ties corrected, no continuity correction. 1 where all cells are alike.
    p_adjusted
        After Benjamini and Hochberg, over the genes of a condition.
    log2_fold_change
        ``log2((mean + 1e-9) / (control mean + 1e-9))`` of the means of ``expm1``; NaN where predicted values below 0 make it so.
    """

    p_value: Array
    p_adjusted: Array
    log2_fold_change: Array

    @property
    def tested(self) -> NDArray[np.bool_]:
        """Shape ``(P,)``: the condition had cells."""
        return np.isfinite(self.p_value[:, 0])

    @property
    def significant(self) -> NDArray[np.bool_]:
        """Shape ``(P, G)``: adjusted p-value below .05, and a fold change that is a number."""
        return (self.p_adjusted < SIGNIFICANT) & ~np.isnan(self.log2_fold_change)


def unchanged(n_conditions: int, n_genes: int) -> Differential:
    """What the test says of the control cells themselves: no gene differs."""
    ones = np.ones((n_conditions, n_genes))
    return Differential(ones, ones, np.zeros_like(ones))


def against_control(
    cells: sparse.csr_matrix,
    group: NDArray[np.integer],
    n_groups: int,
    control: sparse.csr_matrix,
    *,
    means: tuple[Array, Array] | None = None,
    threads: int | None = None,
) -> Differential:
    """Test each condition's cells against control cells, gene by gene.

    The p-values are those of cell-eval2's backend ``scanpy`` (and of ``scanpy.tl.rank_genes_groups(method="wilcoxon",
    tie_correct=True)``), the fold changes those of its version 2 for log1p-normalised values.

    Parameters
    ----------
    cells
        Shape ``(N, G)``, log1p-normalised.
    group
        Shape ``(N,)``: each cell's condition, 0 to ``n_groups - 1``.
    n_groups
        P.
    control
        Shape ``(M, G)``: control cells, of the conditions' context.
    means
        :func:`linear_mean` of the groups, ``(P, G)``, and of the controls, ``(1, G)``, where they are known already.
    threads
        Of illico; None: as many as numba has, one for each processor of this process. The numbers do not depend on it.
    """
    result = Differential(*(np.full((n_groups, cells.shape[1]), np.nan) for _ in range(3)))
    present, place = np.unique(group, return_inverse=True)
    if len(present) == 0 or control.shape[0] < 2:  # one cell is no sample
        return result
    p = _wilcoxon(cells, place, len(present), control, threads)
    if means is None:
        means = linear_mean(cells, group, n_groups), linear_mean(control, np.zeros(control.shape[0], dtype=np.int64), 1)
    mean, control_mean = means[0][present], means[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        result.log2_fold_change[present] = np.log2((mean + _PSEUDOCOUNT) / (control_mean + _PSEUDOCOUNT))
    result.p_value[present], result.p_adjusted[present] = p, false_discovery_control(p, axis=1)
    return result


def linear_mean(cells: sparse.csr_matrix, group: NDArray[np.integer], n: int) -> Array:
    """Mean of ``expm1`` over the cells of each group, float64, ``(n, G)``; NaN for a group without cells."""
    total = np.zeros((n, cells.shape[1]))
    for start in range(0, cells.shape[0], _CELLS):
        piece, mine = cells[start : start + _CELLS], group[start : start + _CELLS]
        piece.data = np.expm1(piece.data.astype(np.float64))
        present, place = np.unique(mine, return_inverse=True)
        indicator = sparse.csr_matrix((np.ones(len(mine)), (place, np.arange(len(mine)))), shape=(len(present), len(mine)))
        total[present] += (indicator @ piece).toarray()
    with np.errstate(invalid="ignore"):
        return total / np.bincount(group, minlength=n)[:, None]


def _wilcoxon(
    cells: sparse.csr_matrix, place: NDArray[np.integer], n: int, control: sparse.csr_matrix, threads: int | None
) -> Array:
    """P-values, ``(n, G)``, of groups that all have cells."""
    import anndata
    import illico
    import numba
    import pandas as pd
    from loguru import logger
    from tqdm.auto import tqdm

    values = sparse.vstack([control, cells], format="csr")
    values.sort_indices()  # illico insists
    labels = np.concatenate([np.full(control.shape[0], n), place])
    names = np.array([f"{number:09d}" for number in range(n + 1)])  # the controls come last, whatever sorts them
    table = anndata.AnnData(values, obs=pd.DataFrame({"group": names[labels]}, index=np.arange(len(labels)).astype(str)))
    logger.disable("illico")
    # its progress bar has no switch, and standard error is not ours to take away while other threads write there
    setattr(sys.modules["illico.asymptotic_wilcoxon"], "tqdm", functools.partial(tqdm, disable=True))  # noqa: B010
    with _ONE_AT_A_TIME:
        found = illico.asymptotic_wilcoxon(
            table,
            is_log1p=False,  # of importance to its fold changes alone, which are not used
            group_keys="group",
            reference=names[n],
            n_threads=threads or numba.get_num_threads(),
            use_continuity=False,
            tie_correct=True,
        )
    p = found["p_value"].to_numpy().reshape(-1, cells.shape[1])
    order = {name: row for row, name in enumerate(found.index.get_level_values(0)[:: cells.shape[1]])}
    return np.clip(np.nan_to_num(p[[order[name] for name in names[:n]]], nan=1.0), 0.0, 1.0)
