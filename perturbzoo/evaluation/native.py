"""The native protocol: a comparison of predictions with measured cells in, one row of scores per condition out.

Whoever calls names its predictions: a model's, floors such as no change. Ceilings, which one half of each condition's cells makes
of the other, are added here. All are scored the same way. Called by :mod:`perturbzoo.evaluate` (two files) and
:mod:`perturbzoo.models.testing` (a trained model); arrays only, no files and no models.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbzoo.evaluation import cell_tests, effects, metrics, pseudobulk_columns, retrieval, threads
from perturbzoo.evaluation.ceilings import CEILING, DUPLICATE, INTERPOLATED, ceilings
from perturbzoo.evaluation.cell_distances import cell_distances
from perturbzoo.evaluation.comparison import Candidate, Comparison, Truth, by_context, make_truth, pseudobulks_of
from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.samples import Estimator
from perturbzoo.evaluation.table import at_full_size, score_conditions

PREDICTION = "prediction"
NO_CHANGE = "no change"
PERTURBED_MEAN = "perturbed mean"
TRAINING_MEAN = "training mean"

PDSRule = Literal["own_targets", "vcc2026", "cell_eval"]
"""Which genes the perturbation discrimination score leaves out, and what its rank is over."""

__all__ = [
    "CEILING",
    "DUPLICATE",
    "INTERPOLATED",
    "NO_CHANGE",
    "PERTURBED_MEAN",
    "PREDICTION",
    "TRAINING_MEAN",
    "Candidate",
    "Comparison",
    "floors",
    "score",
]


def floors(comparison: Comparison, mean: str = PERTURBED_MEAN) -> dict[str, Candidate]:
    """The two predictions that need no fit: no change, and the mean of the perturbations, by the name that is given."""
    return {
        NO_CHANGE: Candidate(comparison.control.mean[comparison.context], moves_controls=True),
        mean: Candidate(comparison.reference[comparison.context], moves_controls=True),
    }


def score(
    comparison: Comparison,
    *,
    pds: PDSRule = "own_targets",
    estimator: Estimator = "u",
) -> dict[str, pd.DataFrame]:
    """Score all candidates, and the ceilings if there are halves.

    Parameters
    ----------
    comparison
        What to compare. For a candidate with `control`, the metrics of changes subtract each side's own controls.
    pds
        ``"own_targets"``: ranks over n - 1, no target of a condition counts in its own row. ``"vcc2026"``: no target of any condition
        counts anywhere, as in cell-eval2's preset (0.20). ``"cell_eval"``: as cell-eval 0.x, ranks over n, and combinations keep their
        targets.
    estimator
        Of the E-distance: ``"u"`` unbiased, ``"v"`` as pertpy.

    Returns
    -------
    By name (those of `comparison.candidates`, then those of :mod:`perturbzoo.evaluation.ceilings`), tables of
    :func:`perturbzoo.evaluation.table.score_conditions` with the columns of
    :data:`perturbzoo.evaluation.table.FILE_METRICS`.
    """
    truth = make_truth(comparison, comparison.observed)
    rows = {name: (candidate, truth) for name, candidate in comparison.candidates.items()}
    if comparison.halves is not None:
        rows |= ceilings(comparison)
    truths = {id(one): one for _, one in rows.values()}
    with threads.pool() as pool:
        choices = {
            key: pool.submit(pseudobulk_columns.choose, comparison, one.moments, one.half) for key, one in truths.items()
        }
        chosen = {key: threads.result(choice) for key, choice in choices.items()}
        # the longest first; nearly all of it is in compiled code, which leaves Python to the others
        distances, tests = None, None
        if comparison.cells is not None:
            distances = pool.submit(cell_distances, comparison, rows, estimator)
            tests = cell_tests.columns(comparison, rows, pool)
        tables = {
            name: pool.submit(_score, comparison, candidate, against, chosen[id(against)], pds)
            for name, (candidate, against) in rows.items()
            if name != DUPLICATE  # the same half twice
        }
        scores = {name: threads.result(tables[CEILING if name == DUPLICATE else name]).copy() for name in rows}
        for columns in (threads.result(distances), tests()) if distances and tests else ():
            for name, of in columns.items():
                scores[name] = _with(scores[name], of)
    if CEILING in scores:
        scores[CEILING] = at_full_size(scores[CEILING])
    return scores


def _with(table: pd.DataFrame, columns: dict[str, Array]) -> pd.DataFrame:
    """The table with further columns; one by one, a hundred of them would copy it as often."""
    further = pd.DataFrame({name: values for name, values in columns.items() if name not in table}, index=table.index)
    return pd.concat([table, further], axis=1)


def _score(
    comparison: Comparison, candidate: Candidate, truth: Truth, chosen: pseudobulk_columns.Chosen, pds: PDSRule
) -> pd.DataFrame:
    """All metrics of pseudobulks, by row: the one place where a column is made."""
    context = comparison.context
    reference = comparison.reference[context]
    bulks = pseudobulks_of(comparison, candidate.mean, truth.moments)
    table = score_conditions(
        bulks,
        conditions=comparison.conditions,
        contexts=comparison.contexts,
        categories=comparison.categories,
        reference=reference,
        de=truth.genes,
    )
    table["n_cells"] = comparison.observed.count  # of the whole condition, also where a half is scored
    predicted = bulks.predicted
    if candidate.control is not None:
        # each side's change from its own controls, on the observed controls: what is subtracted again below
        predicted = predicted - candidate.control[context] + bulks.control
        table["pearson_delta"] = metrics.pearson_delta(predicted, bulks.observed, bulks.control)
        changes = (predicted - bulks.control, bulks.observed - bulks.control)
        table["pearson_delta_undefined"] = metrics.is_constant(changes[0]) | metrics.is_constant(changes[1])
        table["direction_top20_de"] = metrics.direction_at(predicted, bulks.observed, bulks.control, truth.genes.genes)
    change, observed_change = predicted - bulks.control, bulks.observed - bulks.control
    excluded = comparison.targets
    if pds == "cell_eval":
        excluded = excluded & ~comparison.is_combination[:, None]
    distances: tuple[retrieval.Distance, ...] = ("cosine", "l1", "l2")
    for distance in distances:

        def rank(p: Array, o: Array, skip: NDArray[np.bool_], distance: retrieval.Distance = distance) -> Array:
            scale: Literal["others", "all"] = "all" if pds == "cell_eval" else "others"
            left_out = np.logical_or.reduce(skip) if pds == "vcc2026" else skip
            return retrieval.discrimination_score(p, o, distance, left_out, scale=scale)

        table[f"pds_{distance}"] = by_context(context, rank, change, observed_change, excluded)
    table["centroid_accuracy"] = by_context(context, retrieval.centroid_accuracy, bulks.predicted, bulks.observed)
    table["weighted_mse"] = effects.weighted_mse(bulks.predicted, bulks.observed, truth.weights)
    table["weighted_r2_delta"] = effects.weighted_r2_delta(bulks.predicted, bulks.observed, reference, truth.weights)
    table["variance_recovery"] = by_context(context, effects.variance_recovery, bulks.predicted, bulks.observed)
    variance = comparison.control.variance[context] if candidate.moves_controls else candidate.variance
    if variance is None:
        variance = np.full_like(bulks.observed, np.nan)
    table["cell_variance_recovery"] = effects.cell_variance_recovery(variance, bulks.observed_variance)
    return _with(table, pseudobulk_columns.columns(comparison, candidate, truth.moments, chosen))
