"""The native protocol: predicted and observed moments and sampled cells in, one row of scores per condition out.

Beside the prediction stand two floors and a ceiling, scored the same way: no change, the mean of the perturbations, and one half
of each condition's cells as the prediction of the other. Called by :mod:`perturbzoo.evaluate`; arrays only, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbzoo.evaluation import effects, metrics, retrieval
from perturbzoo.evaluation.metrics import RESOLUTION, Array
from perturbzoo.evaluation.pseudobulk import DESets, GroupMoments, Pseudobulks, de_sets
from perturbzoo.evaluation.samples import Estimator, Sample, compare, median_distance
from perturbzoo.evaluation.table import at_full_size, score_conditions

PREDICTION = "prediction"
NO_CHANGE = "no change"
PERTURBED_MEAN = "perturbed mean"
CEILING = "split-half ceiling"

_BANDWIDTH_CELLS = 1000


class Cells(NamedTuple):
    """Sampled cells of P conditions: ``of(row)`` gives them, ``(n, G)`` float64, and ``n`` how many there are at the most."""

    of: Callable[[int], Array]
    n: NDArray[np.int64]


@dataclass
class Comparison:
    """Two files' conditions, aligned. P rows (a condition in a context), S contexts, G genes, log1p-normalised.

    Attributes
    ----------
    conditions, contexts, categories
        Names, P each.
    context
        Shape ``(P,)``: index into the S contexts.
    targets, is_combination
        Shape ``(P, G)``: genes that a condition perturbs; shape ``(P,)``: whether it has several targets, measured or not.
    observed, predicted
        Moments of the P rows; the observed ones are those of `halves` together.
    halves
        Moments of ``2 * row + half``: the observed cells of a row, split in two at random.
    control, predicted_control
        Moments of the controls of the S contexts; None if each side's own are not asked for.
    reference
        Shape ``(S, G)``: mean of the perturbations of a context, each counted once.
    cells, predicted_cells, control_cells
        Sampled cells of the P rows and of the S contexts; None: pseudobulk metrics only.
    half
        For each row, which half each of its sampled cells is of.
    """

    conditions: list[str]
    contexts: list[str]
    categories: list[str]
    context: NDArray[np.int64]
    targets: NDArray[np.bool_]
    is_combination: NDArray[np.bool_]
    observed: GroupMoments
    predicted: GroupMoments
    halves: GroupMoments
    control: GroupMoments
    predicted_control: GroupMoments | None
    reference: Array
    cells: Cells | None = None
    predicted_cells: Cells | None = None
    control_cells: Cells | None = None
    half: Sequence[NDArray[np.int64]] = ()


def moments(count: NDArray[np.int64], total: Array, square: Array) -> GroupMoments:
    """Means and unbiased variances of groups of cells from their sums, ``(N,)`` and ``(N, G)``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        n = count[:, None].astype(np.float64)
        mean = total / n
        variance = np.maximum(square - n * mean**2, 0.0) / np.where(n > 1, n - 1, np.nan)
    # The cells are float32: what is left of a constant gene is rounding, and would make a huge t statistic.
    variance[variance <= RESOLUTION * mean**2] = 0.0
    return GroupMoments(count=count, mean=mean, variance=variance)


def score(
    comparison: Comparison,
    *,
    pds: Literal["vcc2026", "cell_eval"] = "vcc2026",
    estimator: Estimator = "u",
) -> dict[str, pd.DataFrame]:
    """Score the prediction, the floors and the ceiling.

    Parameters
    ----------
    comparison
        What to compare. With `predicted_control`, the metrics of changes subtract each side's own controls.
    pds
        ``"vcc2026"``: ranks over n - 1, no target of a condition counts. ``"cell_eval"``: as cell-eval 0.x, ranks over n, and
        combinations keep their targets.
    estimator
        Of the E-distance: ``"u"`` unbiased, ``"v"`` as pertpy.

    Returns
    -------
    By name (:data:`PREDICTION`, :data:`NO_CHANGE`, :data:`PERTURBED_MEAN`, :data:`CEILING`), tables of
    :func:`perturbzoo.evaluation.table.score_conditions` with the columns of
    :data:`perturbzoo.evaluation.table.FILE_METRICS`.
    """
    context, observed, control = comparison.context, comparison.observed, comparison.control
    bulks = Pseudobulks(
        pair=np.arange(len(context)),
        context=context,
        predicted=comparison.predicted.mean,
        observed=observed.mean,
        control=control.mean[context],
        observed_variance=observed.variance,
        count=observed.count,
    )
    first, second = 2 * bulks.pair, 2 * bulks.pair + 1
    split = (comparison.halves.count[first] > 0) & (comparison.halves.count[second] > 0)
    whole = split[:, None]
    halves = replace(
        bulks.with_prediction(np.where(whole, comparison.halves.mean[first], np.nan)),
        observed=np.where(whole, comparison.halves.mean[second], np.nan),
        observed_variance=np.where(whole, comparison.halves.variance[second], np.nan),
        count=np.maximum(comparison.halves.count[second], 1),
    )
    # who predicts: means, variances over cells, and the controls that its own changes start from
    floor_variance = control.variance[context]
    predictions = {
        PREDICTION: (bulks, comparison.predicted.variance, comparison.predicted_control),
        NO_CHANGE: (bulks.with_prediction(bulks.control), floor_variance, None),
        PERTURBED_MEAN: (bulks.with_prediction(comparison.reference[context]), floor_variance, None),
        CEILING: (halves, np.where(whole, comparison.halves.variance[first], np.nan), None),
    }
    excluded = comparison.targets
    if pds == "cell_eval":
        excluded = excluded & ~comparison.is_combination[:, None]
    scores = {}
    for name, (prediction, variance, own) in predictions.items():
        # Genes are chosen and weighted by what is predicted, never by the prediction: for the ceiling, by the second half alone.
        usable = split if name == CEILING else np.ones(len(split), dtype=bool)
        weights = np.full_like(prediction.observed, np.nan)
        parts = (prediction.observed, prediction.observed_variance, prediction.count)
        weights[usable] = _by_context(context[usable], effects.specificity_weights, *(part[usable] for part in parts))
        genes = de_sets(prediction, control, comparison.targets)
        scores[name] = _score(comparison, prediction, variance, own, genes, weights, excluded, pds)
    for name in scores:
        # of the whole condition, also where a half was scored
        scores[name]["n_cells"] = observed.count
    scores[CEILING] = at_full_size(scores[CEILING])
    scores[CEILING]["weighted_mse"] /= 2
    scores[CEILING]["weighted_r2_delta"] = 1 - (1 - scores[CEILING]["weighted_r2_delta"]) / 2
    if comparison.cells is not None:
        for name, columns in _distances(comparison, estimator).items():
            scores[name] = scores[name].assign(**columns)
    return scores


def _score(
    comparison: Comparison,
    bulks: Pseudobulks,
    variance: Array,
    own: GroupMoments | None,
    genes: DESets,
    weights: Array,
    excluded: NDArray[np.bool_],
    pds: str,
) -> pd.DataFrame:
    """The metrics of pseudobulks."""
    context = comparison.context
    reference = comparison.reference[context]
    table = score_conditions(
        bulks,
        conditions=comparison.conditions,
        contexts=comparison.contexts,
        categories=comparison.categories,
        reference=reference,
        de=genes,
    )
    predicted = bulks.predicted
    if own is not None:
        # each side's change from its own controls, on the observed controls: what is subtracted again below
        predicted = predicted - own.mean[context] + bulks.control
        table["pearson_delta"] = metrics.pearson_delta(predicted, bulks.observed, bulks.control)
        changes = (predicted - bulks.control, bulks.observed - bulks.control)
        table["pearson_delta_undefined"] = metrics.is_constant(changes[0]) | metrics.is_constant(changes[1])
        table["direction_top20_de"] = metrics.direction_at(predicted, bulks.observed, bulks.control, genes.genes)
    change, truth = predicted - bulks.control, bulks.observed - bulks.control
    distances: tuple[retrieval.Distance, ...] = ("cosine", "l1", "l2")
    for distance in distances:

        def rank(p: Array, o: Array, skip: NDArray[np.bool_], distance: retrieval.Distance = distance) -> Array:
            scale: Literal["others", "all"] = "all" if pds == "cell_eval" else "others"
            return retrieval.discrimination_score(p, o, distance, skip, scale=scale)

        table[f"pds_{distance}"] = _by_context(context, rank, change, truth, excluded)
    table["centroid_accuracy"] = _by_context(context, retrieval.centroid_accuracy, bulks.predicted, bulks.observed)
    table["weighted_mse"] = effects.weighted_mse(bulks.predicted, bulks.observed, weights)
    table["weighted_r2_delta"] = effects.weighted_r2_delta(bulks.predicted, bulks.observed, reference, weights)
    table["variance_recovery"] = _by_context(context, effects.variance_recovery, bulks.predicted, bulks.observed)
    table["cell_variance_recovery"] = effects.cell_variance_recovery(variance, bulks.observed_variance)
    return table


def _by_context(context: NDArray[np.int64], function: Callable[..., Array], *tables: NDArray) -> Array:
    """Apply a function of several conditions to those of each context by themselves."""
    if len(context) == 0:
        return tables[0].astype(np.float64)
    first = function(*(table[context == context[0]] for table in tables))
    result = np.full((len(context), *first.shape[1:]), np.nan)
    for one in np.unique(context):
        result[context == one] = function(*(table[context == one] for table in tables))
    return result


def _distances(comparison: Comparison, estimator: Estimator) -> dict[str, dict[str, Array]]:
    """The metrics of cells, by who predicts and metric, ``(P,)`` each.

    The kernel's width is the median distance between up to 1,000 of the sampled observed cells, controls among them; the
    transport is regularised with a tenth of its square. Both are the same for all that is compared.
    """
    cells, predicted, controls = comparison.cells, comparison.predicted_cells, comparison.control_cells
    assert cells is not None
    assert predicted is not None
    assert controls is not None
    n_rows, n_contexts = len(comparison.context), len(comparison.control.count)
    share = max(2, -(-_BANDWIDTH_CELLS // (n_rows + n_contexts)))
    some = [controls.of(row)[:share] for row in range(n_contexts)] + [cells.of(row)[:share] for row in range(n_rows)]
    bandwidth = median_distance(np.concatenate(some)[: 2 * _BANDWIDTH_CELLS])
    names = (PREDICTION, NO_CHANGE, PERTURBED_MEAN, CEILING)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    control = [Sample(controls.of(context)) for context in range(n_contexts)]
    for row, context in enumerate(comparison.context.tolist()):
        truth, guess = Sample(cells.of(row)), Sample(predicted.of(row))
        # the mean change, given to the control cells
        shifted = control[context].shifted(comparison.reference[context] - comparison.control.mean[context])
        half = comparison.half[row]
        first, second = Sample(truth.cells[half == 0]), Sample(truth.cells[half == 1])
        sizes = [len(first), len(second), len(control[context]), *([len(guess)] if len(guess) > 1 else [])]
        pairs = {PREDICTION: (guess, truth), NO_CHANGE: (control[context], truth), PERTURBED_MEAN: (shifted, truth)}
        for name, (one, other) in (pairs | {CEILING: (first, second)}).items():
            found[name].append(
                compare(
                    one,
                    other,
                    bandwidth=bandwidth,
                    regularisation=bandwidth**2 / 10,
                    estimator=estimator,
                    n_transport=min(sizes),
                )
            )
    return {name: {metric: np.array([one[metric] for one in rows]) for metric in rows[0]} for name, rows in found.items()}
