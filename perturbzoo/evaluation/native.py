"""The native protocol: predictions and measured cells as moments and samples in, one row of scores per condition out.

Whoever calls names its predictions: a model's, floors such as no change. Ceilings, which one half of each condition's cells makes
of the other, are added here. All are scored the same way. Called by :mod:`perturbzoo.evaluate` (two files) and
:mod:`perturbzoo.models.testing` (a trained model); arrays only, no files and no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
DUPLICATE = "technical duplicate"

_BANDWIDTH_CELLS = 1000


class Cells(NamedTuple):
    """Sampled cells of P conditions: ``of(row)`` gives them, ``(n, G)`` float64, and ``n`` how many there are at the most."""

    of: Callable[[int], Array]
    n: NDArray[np.int64]


@dataclass
class Candidate:
    """A prediction of the P conditions of a :class:`Comparison`.

    Attributes
    ----------
    mean
        Shape ``(P, G)``: predicted pseudobulks, log1p-normalised; a row of NaN was not predicted.
    variance
        Shape ``(P, G)``: unbiased, over the predicted cells; None where there are none.
    cells
        Sampled predicted cells of the P rows, or None.
    control
        Shape ``(S, G)``: the candidate's own control means, which its changes start from; None: the observed ones.
    moves_controls
        Its cells are the control cells of the row's context, moved so that their mean is `mean`. `variance` and `cells` are not
        looked at then.
    """

    mean: Array
    variance: Array | None = None
    cells: Cells | None = None
    control: Array | None = None
    moves_controls: bool = False


@dataclass
class Comparison:
    """What was measured, and what was predicted of it. P rows (a condition in a context), S contexts, G genes, log1p-normalised.

    Attributes
    ----------
    conditions, contexts, categories
        Names, P each.
    context
        Shape ``(P,)``: index into the S contexts.
    targets, is_combination
        Shape ``(P, G)``: genes that a condition perturbs; shape ``(P,)``: whether it has several targets, measured or not.
    observed
        Moments of the P rows.
    control
        Moments of the controls of the S contexts.
    reference
        Shape ``(S, G)``: mean of the perturbations of a context, each counted once.
    candidates
        Predictions by name, in the order of the table.
    halves
        Moments of ``2 * row + half``: the observed cells of a row, split in two at random. None: no ceilings.
    cells, control_cells
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
    control: GroupMoments
    reference: Array
    candidates: dict[str, Candidate] = field(default_factory=dict)
    halves: GroupMoments | None = None
    cells: Cells | None = None
    control_cells: Cells | None = None
    half: Sequence[NDArray[np.int64]] = ()


@dataclass
class Truth:
    """Measured cells that candidates are scored against: all of a condition's, or for ceilings a half of them.

    Genes are chosen and weighted by them, never by a prediction: chosen by both halves, they would be those in which the halves
    happen to agree.

    Attributes
    ----------
    moments
        Of the P rows; a row without a mean (NaN) is not scored.
    genes
        Its top DE genes against the controls.
    weights
        Shape ``(P, G)``: :func:`perturbzoo.evaluation.effects.specificity_weights`.
    cells
        Sampled cells of the P rows, or None.
    """

    moments: GroupMoments
    genes: DESets
    weights: Array
    cells: Cells | None = None


def moments(count: NDArray[np.int64], total: Array, square: Array) -> GroupMoments:
    """Means and unbiased variances of groups of cells from their sums, ``(N,)`` and ``(N, G)``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        n = count[:, None].astype(np.float64)
        mean = total / n
        variance = np.maximum(square - n * mean**2, 0.0) / np.where(n > 1, n - 1, np.nan)
    # The cells are float32: what is left of a constant gene is rounding, and would make a huge t statistic.
    variance[variance <= RESOLUTION * mean**2] = 0.0
    return GroupMoments(count=count, mean=mean, variance=variance)


def floors(comparison: Comparison) -> dict[str, Candidate]:
    """The two predictions that need no fit: no change, and the mean of the perturbations."""
    return {
        NO_CHANGE: Candidate(comparison.control.mean[comparison.context], moves_controls=True),
        PERTURBED_MEAN: Candidate(comparison.reference[comparison.context], moves_controls=True),
    }


def score(
    comparison: Comparison,
    *,
    pds: Literal["vcc2026", "cell_eval"] = "vcc2026",
    estimator: Estimator = "u",
) -> dict[str, pd.DataFrame]:
    """Score all candidates, and the ceilings if there are halves.

    Parameters
    ----------
    comparison
        What to compare. For a candidate with `control`, the metrics of changes subtract each side's own controls.
    pds
        ``"vcc2026"``: ranks over n - 1, no target of a condition counts. ``"cell_eval"``: as cell-eval 0.x, ranks over n, and
        combinations keep their targets.
    estimator
        Of the E-distance: ``"u"`` unbiased, ``"v"`` as pertpy.

    Returns
    -------
    By name (those of `comparison.candidates`, then :data:`CEILING` and :data:`DUPLICATE`), tables of
    :func:`perturbzoo.evaluation.table.score_conditions` with the columns of
    :data:`perturbzoo.evaluation.table.FILE_METRICS`.
    """
    truth = _truth(comparison, comparison.observed, comparison.cells)
    rows = {name: (candidate, truth) for name, candidate in comparison.candidates.items()}
    if comparison.halves is not None:
        first, second = _halves(comparison)
        rows[CEILING] = rows[DUPLICATE] = (first, second)
    scores: dict[str, pd.DataFrame] = {}
    for name, (candidate, against) in rows.items():
        scores[name] = _score(comparison, candidate, against, pds) if name != DUPLICATE else scores[CEILING].copy()
    if comparison.cells is not None:
        for name, columns in _distances(comparison, rows, estimator).items():
            scores[name] = scores[name].assign(**columns)
    if CEILING in scores:
        scores[CEILING] = at_full_size(scores[CEILING])
    return scores


def _truth(comparison: Comparison, moments: GroupMoments, cells: Cells | None) -> Truth:
    """What is taken from the measured cells of each row before anything is scored against them."""
    known = np.isfinite(moments.mean).all(axis=1)
    weights = np.full_like(moments.mean, np.nan)
    parts = (moments.mean, moments.variance, moments.count)
    weights[known] = by_context(comparison.context[known], effects.specificity_weights, *(part[known] for part in parts))
    genes = de_sets(_pseudobulks(comparison, moments.mean, moments), comparison.control, comparison.targets)
    return Truth(moments, genes, weights, cells)


def _halves(comparison: Comparison) -> tuple[Candidate, Truth]:
    """The first half of each row's cells, as the prediction of the second. A row with one cell has no halves: NaN."""
    assert comparison.halves is not None
    count, mean, variance = comparison.halves.count, comparison.halves.mean, comparison.halves.variance
    split = ((count[0::2] > 0) & (count[1::2] > 0))[:, None]
    parts = [
        GroupMoments(
            count=np.maximum(count[half::2], 1),
            mean=np.where(split, mean[half::2], np.nan),
            variance=np.where(split, variance[half::2], np.nan),
        )
        for half in (0, 1)
    ]
    cells: list[Cells | None] = [None, None]
    if comparison.cells is not None:
        cells = [_half_of(comparison.cells, comparison.half, half) for half in (0, 1)]
    return Candidate(parts[0].mean, parts[0].variance, cells[0]), _truth(comparison, parts[1], cells[1])


def _half_of(cells: Cells, half: Sequence[NDArray[np.int64]], which: int) -> Cells:
    return Cells(lambda row: cells.of(row)[half[row] == which], np.array([(of == which).sum() for of in half]))


def _pseudobulks(comparison: Comparison, predicted: Array, observed: GroupMoments) -> Pseudobulks:
    return Pseudobulks(
        pair=np.arange(len(comparison.context)),
        context=comparison.context,
        predicted=predicted,
        observed=observed.mean,
        control=comparison.control.mean[comparison.context],
        observed_variance=observed.variance,
        count=observed.count,
    )


def _score(comparison: Comparison, candidate: Candidate, truth: Truth, pds: str) -> pd.DataFrame:
    """All metrics of pseudobulks, by row: the one place where a column is made."""
    context = comparison.context
    reference = comparison.reference[context]
    bulks = _pseudobulks(comparison, candidate.mean, truth.moments)
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
            return retrieval.discrimination_score(p, o, distance, skip, scale=scale)

        table[f"pds_{distance}"] = by_context(context, rank, change, observed_change, excluded)
    table["centroid_accuracy"] = by_context(context, retrieval.centroid_accuracy, bulks.predicted, bulks.observed)
    table["weighted_mse"] = effects.weighted_mse(bulks.predicted, bulks.observed, truth.weights)
    table["weighted_r2_delta"] = effects.weighted_r2_delta(bulks.predicted, bulks.observed, reference, truth.weights)
    table["variance_recovery"] = by_context(context, effects.variance_recovery, bulks.predicted, bulks.observed)
    variance = comparison.control.variance[context] if candidate.moves_controls else candidate.variance
    if variance is None:
        variance = np.full_like(bulks.observed, np.nan)
    table["cell_variance_recovery"] = effects.cell_variance_recovery(variance, bulks.observed_variance)
    return table


def by_context(context: NDArray[np.int64], function: Callable[..., Array], *tables: NDArray) -> Array:
    """Apply a function of several conditions to those of each context by themselves."""
    if len(context) == 0:
        return tables[0].astype(np.float64)
    first = function(*(table[context == context[0]] for table in tables))
    result = np.full((len(context), *first.shape[1:]), np.nan)
    for one in np.unique(context):
        result[context == one] = function(*(table[context == one] for table in tables))
    return result


def _distances(
    comparison: Comparison, rows: dict[str, tuple[Candidate, Truth]], estimator: Estimator
) -> dict[str, dict[str, Array]]:
    """The metrics of cells, by who predicts and metric, ``(P,)`` each; none for candidates without cells.

    The kernel's width is the median distance between up to 1,000 of the sampled observed cells, controls among them; the
    transport is regularised with a tenth of its square. Both are the same for all that is compared.
    """
    cells, controls = comparison.cells, comparison.control_cells
    assert cells is not None
    assert controls is not None
    n_rows, n_contexts = len(comparison.context), len(comparison.control.count)
    share = max(2, -(-_BANDWIDTH_CELLS // (n_rows + n_contexts)))
    some = [controls.of(row)[:share] for row in range(n_contexts)] + [cells.of(row)[:share] for row in range(n_rows)]
    bandwidth = median_distance(np.concatenate(some)[: 2 * _BANDWIDTH_CELLS])
    with_cells = {name: pair for name, pair in rows.items() if pair[0].moves_controls or pair[0].cells is not None}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in with_cells}
    control = [Sample(controls.of(context)) for context in range(n_contexts)]
    for row, context in enumerate(comparison.context.tolist()):
        samples: dict[str, tuple[Sample, Sample]] = {}
        drawn: dict[int, Sample] = {}
        for name, (candidate, truth) in with_cells.items():
            assert truth.cells is not None
            if candidate.moves_controls:
                guess = control[context].shifted(candidate.mean[row] - comparison.control.mean[context])
            else:
                assert candidate.cells is not None
                guess = drawn.setdefault(id(candidate.cells), Sample(candidate.cells.of(row)))
            samples[name] = (guess, drawn.setdefault(id(truth.cells), Sample(truth.cells.of(row))))
        sizes = [len(sample) for pair in samples.values() for sample in pair if len(sample) > 1]
        for name, (guess, measured) in samples.items():
            found[name].append(
                compare(
                    guess,
                    measured,
                    bandwidth=bandwidth,
                    regularisation=bandwidth**2 / 10,
                    estimator=estimator,
                    n_transport=min(sizes, default=0),
                )
            )
    return {name: {metric: np.array([one[metric] for one in rows]) for metric in rows[0]} for name, rows in found.items()}
