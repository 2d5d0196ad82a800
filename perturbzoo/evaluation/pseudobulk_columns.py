"""The columns of the table beyond the short one that pseudobulks give: put together here, defined in the modules that are called.

Called by :mod:`perturbzoo.evaluation.native` for each candidate; what depends on the measured cells alone is taken from them once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbzoo.evaluation import deltas, effects, gears, interaction_recovery, metrics
from perturbzoo.evaluation.comparison import Candidate, Comparison, measured_cells
from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.pseudobulk import GroupMoments

_ROWS = 128


@dataclass
class Chosen:
    """Genes and scores of the measured cells that every candidate is held against.

    Attributes
    ----------
    sets, variable, bands
        GEARS' sets of genes, and the quantiles of the observed cells at them: :mod:`perturbzoo.evaluation.gears`. `bands` is empty
        where there are no sampled cells.
    ranks
        Shape ``(P, G)``, float32: of the observed changes, within each row.
    interactions
        Of the combinations whose singles were observed: :func:`perturbzoo.evaluation.interaction_recovery.scores_of`.
    """

    sets: dict[str, gears.Genes]
    variable: gears.Genes
    bands: dict[str, Array]
    ranks: NDArray[np.float32]
    interactions: dict[str, Array]


def choose(comparison: Comparison, measured: GroupMoments, half: int | None) -> Chosen:
    """Take from the measured cells what does not depend on a prediction.

    Parameters
    ----------
    comparison
        What is compared; of it, the controls, the targets and the singles of combinations.
    measured
        Moments of the P rows.
    half
        Which half of a condition's cells they are of; None: all.
    """
    context, control = comparison.context, comparison.control
    ranks = np.empty(measured.mean.shape, dtype=np.float32)
    parts = []
    for rows in _blocks(len(context)):
        mine, mean = context[rows], measured.mean[rows]
        t = metrics.welch_t(
            mean, measured.variance[rows], measured.count[rows], control.mean[mine], control.variance[mine], control.count[mine]
        )
        parts.append(gears.gene_sets(t, gears.present(mean, control.mean[mine]), comparison.targets[rows]))
        ranks[rows] = deltas.ranks(mean - control.mean[mine])
    sets = _joined(parts)
    known = np.isfinite(measured.mean).all(axis=1)
    genes_of = {
        one: gears.variable_genes(measured.mean[known & (context == one)], control.mean[[one]])
        for one in np.unique(context).tolist()
    }
    variable = np.array([genes_of[one] for one in context.tolist()], dtype=np.int64)
    return Chosen(
        sets=sets,
        variable=variable,
        bands={} if comparison.cells is None else gears.quantiles(lambda row: measured_cells(comparison, row, half), sets),
        ranks=ranks,
        interactions=interaction_recovery.scores_of(measured.mean, control.mean, context, comparison.singles),
    )


def columns(comparison: Comparison, candidate: Candidate, measured: GroupMoments, chosen: Chosen) -> dict[str, Array]:
    """Score one candidate.

    Parameters
    ----------
    comparison
        What is compared.
    candidate
        What is predicted. Where its changes start from its own controls, so do they here.
    measured, chosen
        Of the measured cells.

    Returns
    -------
    By column name, ``(P,)``.
    """
    context, control = comparison.context, comparison.control.mean
    found = _joined([_of_rows(comparison, candidate, measured, chosen, rows) for rows in _blocks(len(context))])

    for name in ("rank_rmse", "rank_cosine_logfc", "gene_variance_recovery"):
        found[name] = np.full(len(context), np.nan)
    for one in np.unique(context):
        mine = context == one
        rows = slice(None) if mine.all() else mine  # a mask would copy the tables
        p, o, c = candidate.mean[rows], measured.mean[rows], control[one]
        found["rank_rmse"][rows] = deltas.rank_among_predictions(p, o, similarity="rmse")
        error = measured.variance[rows] / measured.count[rows, None]
        found["gene_variance_recovery"][rows] = effects.gene_variance_recovery(p, o, error)[1]
        lfc = deltas.log_fold_change(p if candidate.control is None else p - candidate.control[one] + c, c)
        similar = deltas.rank_among_predictions(lfc, deltas.log_fold_change(o, c), similarity="cosine")
        found["rank_cosine_logfc"][rows] = similar
    interactions = interaction_recovery.scores_of(candidate.mean, control, context, comparison.singles)
    return found | interaction_recovery.errors(interactions, chosen.interactions)


def _of_rows(
    comparison: Comparison, candidate: Candidate, measured: GroupMoments, chosen: Chosen, rows: slice
) -> dict[str, Array]:
    """What each condition has without regard to the others, for some of them."""
    context, predicted, observed = comparison.context[rows], candidate.mean[rows], measured.mean[rows]
    control, reference = comparison.control.mean[context], comparison.reference[context]
    moved = predicted if candidate.control is None else predicted - candidate.control[context] + control
    change, observed_change = moved - control, observed - control
    sets = {name: genes[rows] for name, genes in chosen.sets.items()}
    bands = {name: band[:, rows] for name, band in chosen.bands.items()}
    return {
        "cosine_delta": deltas.cosine(change, observed_change),
        "cosine_delta_perturbed_reference": deltas.cosine(predicted - reference, observed - reference),
        "cosine_logfc": deltas.cosine(deltas.log_fold_change(moved, control), deltas.log_fold_change(observed, control)),
        "spearman_delta": metrics.pearson(deltas.ranks(change), chosen.ranks[rows].astype(np.float64)),
        "r2_delta": deltas.r2_delta(moved, observed, control),
        "r2_delta_perturbed_reference": deltas.r2_delta(predicted, observed, reference),
        "l2_top1000": deltas.l2_top1000(predicted, observed, control),
        **gears.scores(
            predicted,
            observed,
            change,
            observed_change,
            sets=sets,
            seen=gears.present(observed, control),
            targets=comparison.targets[rows],
            variable=chosen.variable[rows],
        ),
        **gears.spread_scores(predicted, observed, measured.variance[rows], measured.count[rows], sets),
        **(gears.range_scores(predicted, sets, bands) if bands else {}),
        **gears.fold_change_gaps(predicted, observed, control),
    }


def _blocks(n_rows: int) -> list[slice]:
    """Rows a few at a time: the tables that are made on the way stay small."""
    return [slice(start, min(start + _ROWS, n_rows)) for start in range(0, max(n_rows, 1), _ROWS)]


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
