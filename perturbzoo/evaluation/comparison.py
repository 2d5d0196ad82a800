"""What the native protocol compares: what was measured of conditions, and what was predicted of them.

Made by :mod:`perturbzoo.evaluate` (two files) and :mod:`perturbzoo.models.testing` (a trained model), scored by
:mod:`perturbzoo.evaluation.native`. Arrays only, no files and no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbzoo.evaluation import effects
from perturbzoo.evaluation.interaction_recovery import Singles
from perturbzoo.evaluation.metrics import RESOLUTION, Array
from perturbzoo.evaluation.pseudobulk import DESets, GroupMoments, Pseudobulks, de_sets


class Cells(NamedTuple):
    """Sampled cells of P conditions: ``of(row)`` gives them, ``(n, G)`` float64, and ``n`` how many there are at the most.

    ``sparse_of(rows)`` gives those of several conditions, one condition after the other: CSR, float32.
    """

    of: Callable[[int], Array]
    n: NDArray[np.int64]
    sparse_of: Callable[[Sequence[int]], sparse.csr_matrix]


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
    half
        Its cells are this half (0 or 1) of each row's observed ones: a ceiling. `cells` are not looked at then.
    """

    mean: Array
    variance: Array | None = None
    cells: Cells | None = None
    control: Array | None = None
    moves_controls: bool = False
    half: int | None = None

    @property
    def has_cells(self) -> bool:
        """Whether its cells are known where those of the comparison are."""
        return self.moves_controls or self.half is not None or self.cells is not None


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
    singles
        For rows that are combinations of two: what was observed of each of the two alone, in the same context.
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
    singles: dict[int, Singles] = field(default_factory=dict)


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
    half
        Which half of each row's cells it is; None: all of them.
    """

    moments: GroupMoments
    genes: DESets
    weights: Array
    half: int | None = None


def moments(count: NDArray[np.int64], total: Array, square: Array) -> GroupMoments:
    """Means and unbiased variances of groups of cells from their sums, ``(N,)`` and ``(N, G)``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        n = count[:, None].astype(np.float64)
        mean = total / n
        variance = np.maximum(square - n * mean**2, 0.0) / np.where(n > 1, n - 1, np.nan)
    # The cells are float32: what is left of a constant gene is rounding, and would make a huge t statistic.
    variance[variance <= RESOLUTION * mean**2] = 0.0
    return GroupMoments(count=count, mean=mean, variance=variance)


def make_truth(comparison: Comparison, moments: GroupMoments, half: int | None = None) -> Truth:
    """What is taken from the measured cells of each row before anything is scored against them."""
    known = np.isfinite(moments.mean).all(axis=1)
    weights = np.full_like(moments.mean, np.nan)
    parts = (moments.mean, moments.variance, moments.count)
    weights[known] = by_context(comparison.context[known], effects.specificity_weights, *(part[known] for part in parts))
    genes = de_sets(pseudobulks_of(comparison, moments.mean, moments), comparison.control, comparison.targets)
    return Truth(moments, genes, weights, half)


def measured_cells(comparison: Comparison, row: int, half: int | None) -> Array:
    """Sampled cells of a row that a :class:`Truth` is made of, ``(n, G)``."""
    assert comparison.cells is not None
    cells = comparison.cells.of(row)
    return cells if half is None else cells[comparison.half[row] == half]


def predicted_cells(comparison: Comparison, candidate: Candidate, row: int) -> Array:
    """Sampled predicted cells of a row, ``(n, G)``, of a candidate that has some."""
    if candidate.moves_controls:
        assert comparison.control_cells is not None
        context = comparison.context[row]
        return comparison.control_cells.of(context) + (candidate.mean[row] - comparison.control.mean[context])
    if candidate.half is not None:
        return measured_cells(comparison, row, candidate.half)
    assert candidate.cells is not None
    return candidate.cells.of(row)


def pseudobulks_of(comparison: Comparison, predicted: Array, observed: GroupMoments) -> Pseudobulks:
    """A prediction ``(P, G)`` beside what was measured."""
    return Pseudobulks(
        pair=np.arange(len(comparison.context)),
        context=comparison.context,
        predicted=predicted,
        observed=observed.mean,
        control=comparison.control.mean[comparison.context],
        observed_variance=observed.variance,
        count=observed.count,
    )


def by_context(context: NDArray[np.int64], function: Callable[..., Array], *tables: NDArray) -> Array:
    """Apply a function of several conditions to those of each context by themselves."""
    if len(context) == 0:
        return tables[0].astype(np.float64)
    first = function(*(table[context == context[0]] for table in tables))
    result = np.full((len(context), *first.shape[1:]), np.nan)
    for one in np.unique(context):
        result[context == one] = function(*(table[context == one] for table in tables))
    return result
