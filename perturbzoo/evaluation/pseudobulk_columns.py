"""The columns of the table beyond the short one that pseudobulks give: put together here, defined in the modules that are called.

Called by :mod:`perturbzoo.evaluation.native` for each candidate; what depends on the measured cells alone is taken from them once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perturbzoo.evaluation import deltas, effects, gears, interaction_recovery, metrics
from perturbzoo.evaluation.comparison import Comparison, by_context, measured_cells
from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.pseudobulk import GroupMoments


@dataclass
class Chosen:
    """Genes and scores of the measured cells that every candidate is held against.

    Attributes
    ----------
    sets, seen, variable, bands
        GEARS' sets of genes, and the quantiles of the observed cells at them: :mod:`perturbzoo.evaluation.gears`. `bands` is empty
        where there are no sampled cells.
    ranks
        Shape ``(P, G)``: of the observed changes, within each row.
    interactions
        Of the combinations whose singles were observed: :func:`perturbzoo.evaluation.interaction_recovery.scores_of`.
    """

    sets: dict[str, gears.Genes]
    seen: gears.Present
    variable: gears.Genes
    bands: dict[str, Array]
    ranks: Array
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
    t = metrics.welch_t(
        measured.mean,
        measured.variance,
        measured.count,
        control.mean[context],
        control.variance[context],
        control.count[context],
    )
    seen = gears.present(measured.mean, control.mean[context])
    sets = gears.gene_sets(t, seen, comparison.targets)
    known = np.isfinite(measured.mean).all(axis=1)
    return Chosen(
        sets=sets,
        seen=seen,
        variable=gears.variable_genes(measured.mean[known], control.mean[np.unique(context)]),
        bands={} if comparison.cells is None else gears.quantiles(lambda row: measured_cells(comparison, row, half), sets),
        ranks=deltas.ranks(measured.mean - control.mean[context]),
        interactions=interaction_recovery.scores_of(measured.mean, control.mean, context, comparison.singles),
    )


def columns(comparison: Comparison, predicted: Array, moved: Array, measured: GroupMoments, chosen: Chosen) -> dict[str, Array]:
    """Score one candidate.

    Parameters
    ----------
    comparison
        What is compared.
    predicted
        Shape ``(P, G)``: the candidate's pseudobulks.
    moved
        Shape ``(P, G)``: the same, set on the observed controls where a candidate's changes start from its own; what is said of
        changes is of these.
    measured, chosen
        Of the measured cells.

    Returns
    -------
    By column name, ``(P,)``.
    """
    context, observed = comparison.context, measured.mean
    control, reference = comparison.control.mean[context], comparison.reference[context]
    change, observed_change = moved - control, observed - control
    lfc, observed_lfc = deltas.log_fold_change(moved, control), deltas.log_fold_change(observed, control)

    def gene_recovery(p: Array, o: Array, error: Array) -> Array:
        return effects.gene_variance_recovery(p, o, error)[1]

    def rank_rmse(p: Array, o: Array) -> Array:
        return deltas.rank_among_predictions(p, o, similarity="rmse")

    def rank_cosine(p: Array, o: Array) -> Array:
        return deltas.rank_among_predictions(p, o, similarity="cosine")

    return {
        "cosine_delta": deltas.cosine(change, observed_change),
        "cosine_delta_perturbed_reference": deltas.cosine(predicted - reference, observed - reference),
        "cosine_logfc": deltas.cosine(lfc, observed_lfc),
        "spearman_delta": metrics.pearson(deltas.ranks(change), chosen.ranks),
        "r2_delta": deltas.r2_delta(moved, observed, control),
        "r2_delta_perturbed_reference": deltas.r2_delta(predicted, observed, reference),
        "l2_top1000": deltas.l2_top1000(predicted, observed, control),
        "rank_rmse": by_context(context, rank_rmse, predicted, observed),
        "rank_cosine_logfc": by_context(context, rank_cosine, lfc, observed_lfc),
        "gene_variance_recovery": by_context(
            context, gene_recovery, predicted, observed, measured.variance / measured.count[:, None]
        ),
        **gears.scores(
            predicted,
            observed,
            change,
            observed_change,
            sets=chosen.sets,
            seen=chosen.seen,
            targets=comparison.targets,
            variable=chosen.variable,
        ),
        **gears.spread_scores(predicted, observed, measured.variance, measured.count, chosen.sets),
        **(gears.range_scores(predicted, chosen.sets, chosen.bands) if chosen.bands else {}),
        **gears.fold_change_gaps(predicted, observed, control),
        **interaction_recovery.errors(
            interaction_recovery.scores_of(predicted, comparison.control.mean, context, comparison.singles), chosen.interactions
        ),
    }
