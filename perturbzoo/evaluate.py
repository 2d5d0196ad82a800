"""Scoring a file of predictions, of whatever tool, against a file of measured cells. Called by ``perturbzoo evaluate``.

Values are read in blocks: what is held are sums of each condition and a few of its cells.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo import floors
from perturbzoo.data.cell_blocks import CellFile, group_totals
from perturbzoo.data.datamodule import TrainingPseudobulks
from perturbzoo.data.packed_cells import PackedCells
from perturbzoo.data.screen import Columns
from perturbzoo.data.split_methods import category_of
from perturbzoo.data.two_files import CONTROL, Key, Side, common_rows, control_side, key_name, read_sides
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened
from perturbzoo.evaluation import metrics, native
from perturbzoo.evaluation.comparison import Candidate, Cells, Comparison, moments
from perturbzoo.evaluation.interaction_recovery import find_singles
from perturbzoo.evaluation.native import PERTURBED_MEAN, PREDICTION, TRAINING_MEAN
from perturbzoo.evaluation.pseudobulk import GroupMoments, assign_halves
from perturbzoo.evaluation.summary import summarise
from perturbzoo.evaluation.table import COUNTS, FILE_METRICS
from perturbzoo.perturbation import parse_condition

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbzoo.evaluation.native import PDSRule
    from perturbzoo.evaluation.samples import Estimator

SAMPLE_BYTES = 1 << 30
"""Memory that the sampled cells of one file may take; fewer cells are sampled where it is not enough."""

CONTROLS_PER_CELL = 3
"""How many times as many control cells as cells of a condition are kept for tests."""


@dataclass
class Evaluation:
    """What came out.

    Attributes
    ----------
    scores
        Tables of one row for each condition (and context), by who predicts: the prediction first, then floors and ceilings.
    summary
        Means over conditions with bootstrap intervals: :func:`perturbzoo.evaluation.summary.summarise`.
    said
        Lines on what was understood and which reference is used.
    """

    scores: dict[str, pd.DataFrame]
    summary: pd.DataFrame
    said: list[str] = field(default_factory=list)

    @property
    def table(self) -> pd.DataFrame:
        """The prediction's own table: condition, category, context where there are several, metrics, flags."""
        frame = self.scores[PREDICTION]
        first = ["condition", "category", *(["context"] if frame["context"].any() else []), "n_cells", "n_cells_predicted"]
        scored = [name for name in (*FILE_METRICS, *COUNTS) if name in frame]
        return frame[[*first, *scored, *(name for name in frame if name.endswith("_undefined"))]]


def evaluate(
    predicted: AnnData | str | os.PathLike[str],
    observed: AnnData | str | os.PathLike[str],
    *,
    training: AnnData | str | os.PathLike[str] | None = None,
    reference: Literal["shared", "own"] = "shared",
    columns: Columns | None = None,
    predicted_columns: Columns | None = None,
    depth: float | None = None,
    min_cells: int = 2,
    max_cells: int = 200,
    pds: PDSRule = "own_targets",
    estimator: Estimator = "u",
    seed: int = 0,
) -> Evaluation:
    """Score predicted against measured cells, condition by condition, beside floors and ceilings.

    Parameters
    ----------
    predicted
        Cells of each condition, or one row for each (then what needs cells is left out): counts or log1p-normalised. Control
        cells may be among them.
    observed
        The measured cells and their controls, in the same value space.
    training
        The screen a model was trained on: its perturbations give the floors and the categories. None: floors are made of the
        perturbations in `observed` (:mod:`perturbzoo.floors`); their mean has then seen what it is scored on.
    reference
        ``"shared"``: changes are from the observed controls, on both sides. ``"own"``: each side's from its own.
    columns
        How to read obs and var, here `layer`, `condition_key`, `control_labels`, `separator`, `dose_key`, `kind`, `covariates`
        (within whose levels controls are matched and conditions compared), `gene_key`, `gene_table`, `value_space`.
    predicted_columns
        The same for `predicted` where it differs.
    depth
        Counts per cell after normalisation; needed where one file holds counts and the other log1p values that do not say it.
    min_cells
        Conditions with fewer observed cells are left out.
    max_cells
        Cells of each condition that distances and tests between cells use, drawn at random; of controls, tests use up to three times
        as many. 0 leaves these metrics out.
    pds, estimator
        See :func:`perturbzoo.evaluation.native.score`.
    seed
        Of the draws of cells and halves.

    Raises
    ------
    PerturbZooError
        No common genes or conditions, different scales, no controls, NaN, nothing but zeros predicted.
    """
    columns = columns or Columns()
    sides, said = read_sides(predicted, observed, training, columns, predicted_columns or columns, depth)
    mine, theirs = sides["predicted"], sides["observed"]
    rows = common_rows(mine, theirs, min_cells)
    contexts = sorted({context for _, context in rows})
    control_from = control_side(mine, theirs, contexts, reference)
    said.append(_reference_line(control_from is mine, reference))
    totals = _totals(theirs, rows, contexts, seed, max_cells, min_cells, halves=True)
    guessed = _totals(mine, rows, contexts, seed, max_cells, 1, halves=False)
    control_totals = guessed if control_from is mine else totals
    comparison = _compare(mine.file, rows, contexts, totals, guessed, control_totals)
    conditions = [parse_condition(name) for name, _ in rows]
    everything = _bulks([name for name, _ in rows] + totals.other_names, comparison, totals)
    comparison.singles = find_singles(
        conditions, comparison.context, everything.conditions, everything.contexts, everything.mean
    )
    if sides.keys() == {"predicted", "observed"}:
        fitted = floors.cross_fitted(everything, mine.file.genes, len(rows), seed)
        mean = PERTURBED_MEAN
        said += [
            f"{mean}: mean of all {len(everything.conditions)} perturbations in {theirs.file.where}, those scored among them",
            "additive: sum of the observed singles, the perturbed mean for a single; bilinear, knn: each condition from others, in "
            f"{floors.FOLDS} folds"
            if fitted
            else "additive, bilinear, knn: left out, one condition has no others",
        ]
    else:
        training_bulks = _use_training(comparison, sides["training"], contexts, min_cells)
        singles = find_singles(
            conditions, comparison.context, training_bulks.conditions, training_bulks.contexts, training_bulks.mean
        )
        comparison.singles = singles | comparison.singles
        fitted = floors.fitted(training_bulks, mine.file.genes, conditions, comparison.context)
        mean = TRAINING_MEAN
        said.append(f"{', '.join([mean, *fitted])}: of the perturbations in {sides['training'].file.where}")
    _check_predictions(comparison, guessed.rows, rows, mine.file.where)
    if guessed.controls.count.sum() and control_from is theirs:
        _compare_controls(guessed.controls, totals.controls, reference)
    if reference == "own":
        comparison.candidates[PREDICTION].control = guessed.controls.mean
    if mean == PERTURBED_MEAN:
        # the mean of one condition is that condition
        comparison.reference[np.bincount(everything.contexts, minlength=len(contexts)) < 2] = np.nan
    comparison.candidates |= native.floors(comparison, mean)
    if np.isnan(comparison.reference).all():
        del comparison.candidates[mean]
    comparison.candidates |= {name: Candidate(profiles, moves_controls=True) for name, profiles in fitted.items()}
    scores = native.score(comparison, pds=pds, estimator=estimator)
    for frame in scores.values():
        frame["n_cells_predicted"] = guessed.rows.count
    return Evaluation(scores, summarise(scores), said)


# ---------------------------------------------------------------------- sums


@dataclass
class _Totals:
    """One file's moments: of the rows that are scored, of their halves, of controls by context, of its other conditions."""

    rows: GroupMoments
    halves: GroupMoments | None
    controls: GroupMoments
    others: GroupMoments
    other_names: list[str]
    other_context: np.ndarray
    cells: Cells | None
    control_cells: Cells | None
    half: list[np.ndarray]


def _totals(
    side: Side,
    rows: Sequence[Key],
    contexts: Sequence[tuple[str, ...]],
    seed: int,
    max_cells: int,
    min_cells: int,
    *,
    halves: bool,
) -> _Totals:
    """Stream a file once: groups are the rows, or their halves, then the controls of the contexts, then other conditions."""
    position = {key: row for row, key in enumerate(rows)}
    context_of = {context: number for number, context in enumerate(contexts)}
    n_rows, n_contexts, parts = len(rows), len(contexts), 2 if halves else 1
    first, last = parts * n_rows, parts * n_rows + n_contexts
    other = [
        key
        for key, size in zip(side.keys, side.size.tolist(), strict=True)
        if key not in position and key[0] != CONTROL and key[1] in context_of and size >= max(1, min_cells)
    ]
    number = {key: last + at for at, key in enumerate(other)}
    number |= {(CONTROL, context): first + at for context, at in context_of.items()}
    number |= {key: parts * row for key, row in position.items()}
    by_code = np.array([number.get(key, -1) for key in side.keys])
    group = np.where(side.code >= 0, by_code[side.code], -1)
    in_rows = (group >= 0) & (group < first)
    if halves:
        group[in_rows] += assign_halves(group[in_rows], seed)
    pool = np.where(in_rows, group // parts, np.where(group >= 0, group - first + n_rows, -1))  # rows, then contexts
    chosen = _sample(side, pool, n_rows, n_contexts, max_cells, seed)
    found = group_totals(side.file, group, last + len(other), side.scaled.scale, chosen)
    cells, control_cells, half = None, None, []
    if max_cells:
        starts = np.searchsorted(pool[chosen], np.arange(n_rows + n_contexts + 1))
        cells = _cells(found.cells, starts[: n_rows + 1], max_cells)
        control_cells = _cells(found.cells, starts[n_rows:], max_cells)
        half = [group[chosen[start:stop]] % parts for start, stop in itertools.pairwise(starts[: n_rows + 1])]
    tables = (found.count, found.total, found.square)
    by_part = [[table[part:first:parts] for table in tables] for part in range(parts)]
    return _Totals(
        rows=moments(*(sum(pieces[1:], pieces[0]) for pieces in zip(*by_part, strict=True))),
        halves=moments(*(table[:first] for table in tables)) if halves else None,
        controls=moments(*(table[first:last] for table in tables)),
        others=moments(*(table[last:] for table in tables)),
        other_names=[name for name, _ in other],
        other_context=np.array([context_of[context] for _, context in other], dtype=np.int64),
        cells=cells,
        control_cells=control_cells,
        half=half,
    )


def _sample(side: Side, pool: np.ndarray, n_rows: int, n_contexts: int, max_cells: int, seed: int) -> np.ndarray:
    """Rows of up to `max_cells` cells of each pool, by pool, in random order within; of controls more, as all tests share them."""
    if not max_cells:
        return np.zeros(0, dtype=np.int64)
    n_pools, n_samples = n_rows + n_contexts, n_rows + CONTROLS_PER_CELL * n_contexts
    per_cell = 8 * max(1.0, side.scaled.filled * len(side.file.genes))
    affordable = max(2, int(SAMPLE_BYTES / (per_cell * max(1, n_samples))))
    if affordable < max_cells and np.bincount(pool[(pool >= 0) & (pool < n_pools)]).max(initial=0) > affordable:
        _warn(f"{side.file.where}: {affordable} instead of {max_cells} cells of each condition are compared, to save memory")
    cells = np.flatnonzero((pool >= 0) & (pool < n_pools))
    order = cells[np.lexsort((np.random.default_rng(seed).random(len(cells)), pool[cells]))]
    _, start, size = np.unique(pool[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(start, size)
    limit = min(max_cells, affordable)
    return order[rank < np.where(np.repeat(pool[order[start]] < n_rows, size), limit, CONTROLS_PER_CELL * limit)]


def _cells(values: PackedCells, starts: np.ndarray, max_cells: int) -> Cells:
    """Distances take up to `max_cells` of them, tests all."""

    def of(row: int) -> np.ndarray:
        return values.rows(starts[row], min(starts[row] + max_cells, starts[row + 1])).toarray()

    def sparse_of(rows: Sequence[int]) -> sparse.csr_matrix:
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            return values.rows(starts[rows[0]], starts[rows[-1] + 1])
        return sparse.vstack([values.rows(starts[row], starts[row + 1]) for row in rows], format="csr")

    return Cells(of, np.diff(starts), sparse_of)


def _compare(
    predicted: CellFile,
    rows: Sequence[Key],
    contexts: Sequence[tuple[str, ...]],
    totals: _Totals,
    guessed: _Totals,
    controls: _Totals,
) -> Comparison:
    """Put both sides together; the perturbed mean is that of all observed perturbations."""
    conditions = {str(condition): condition for condition in predicted.conditions}
    targets = [conditions[name].targets for name, _ in rows]
    context = np.array([contexts.index(levels) for _, levels in rows], dtype=np.int64)
    centroids = np.concatenate([totals.rows.mean, totals.others.mean])
    reference = metrics.perturbed_mean(centroids, np.concatenate([context, totals.other_context]), controls.controls.mean)
    return Comparison(
        conditions=[name for name, _ in rows],
        contexts=["|".join(levels) for _, levels in rows],
        categories=["single" if len(names) == 1 else f"combination of {len(names)}" for names in targets],
        context=context,
        targets=metrics.target_mask(targets, predicted.genes),
        is_combination=np.array([len(names) > 1 for names in targets]),
        observed=totals.rows,
        control=controls.controls,
        reference=reference,
        candidates={PREDICTION: Candidate(guessed.rows.mean, guessed.rows.variance, guessed.cells)},
        halves=totals.halves,
        cells=totals.cells,
        control_cells=controls.control_cells,
        half=totals.half,
    )


def _bulks(names: Sequence[str], comparison: Comparison, totals: _Totals) -> TrainingPseudobulks:
    """Pseudobulks of the rows, then of the other conditions, as baselines are fitted on them."""
    return TrainingPseudobulks(
        conditions=[parse_condition(name) for name in names],
        contexts=np.concatenate([comparison.context, totals.other_context]),
        mean=np.concatenate([totals.rows.mean, totals.others.mean]),
        count=np.concatenate([totals.rows.count, totals.others.count]),
        control_mean=comparison.control.mean,
    )


def _use_training(
    comparison: Comparison, training: Side, contexts: Sequence[tuple[str, ...]], min_cells: int
) -> TrainingPseudobulks:
    """Take the perturbed mean and the categories from the training screen instead, and return its pseudobulks."""
    every = sorted({context for _, context in training.keys})
    trained = [key for key in training.keys if key[0] != CONTROL and training.cells_of(key) >= min_cells]
    if not trained:
        raise PerturbZooError(f"{training.file.where}: no condition with {min_cells} cells: no training screen")
    found = _totals(training, trained, every, 0, 0, min_cells, halves=False)
    names = [*contexts, *(context for context in every if context not in contexts)]
    control = np.full((len(names), len(training.file.genes)), np.nan)
    control[: len(contexts)] = comparison.control.mean
    for context, mean, n_cells in zip(every, found.controls.mean, found.controls.count, strict=True):
        if context not in contexts and n_cells:
            control[names.index(context)] = mean
    usable = np.isfinite(control).all(axis=1)
    place = np.array([names.index(levels) for _, levels in trained])
    kept = usable[place]
    if not kept.any():
        raise PerturbZooError(
            f"{training.file.where}: no control cells in the contexts of its conditions: no change can be taken"
        )
    comparison.reference = metrics.perturbed_mean(found.rows.mean[kept], place[kept], control)[: len(contexts)]
    conditions = {name for name, _ in trained}
    known = {target for name in conditions for target in parse_condition(name).targets}
    comparison.categories = [
        "trained on" if name in conditions else category_of(len(mine & known), len(mine))
        for name in comparison.conditions
        for mine in [set(parse_condition(name).targets)]
    ]
    return TrainingPseudobulks(
        conditions=[parse_condition(trained[row][0]) for row in np.flatnonzero(kept).tolist()],
        contexts=place[kept],
        mean=found.rows.mean[kept],
        count=found.rows.count[kept],
        control_mean=control,
    )


# ---------------------------------------------------------------------- what to warn of


def _check_predictions(comparison: Comparison, predicted: GroupMoments, rows: Sequence[Key], where: str) -> None:
    """Refuse predictions of nothing; warn of those that metrics cannot tell apart."""
    profile = predicted.mean
    empty = ~profile.any(axis=1)
    if empty.all():
        raise PerturbZooError(f"{where}: every predicted value is 0: nothing was predicted")
    if empty.any():
        _warn(f"{where}: {_listed(rows, empty)}: predicted as 0 in every gene, and scored as such")
    constant = metrics.is_constant(profile - comparison.control.mean[comparison.context])
    if constant.any():
        _warn(
            f"{where}: {_listed(rows, constant)}: predicted without any difference between genes in the change from control: the "
            "correlation is 0 by definition, and flagged in the column pearson_delta_undefined"
        )
    flat = metrics.is_constant(profile) & ~empty
    if flat.any():
        _warn(
            f"{where}: {_listed(rows, flat)}: predicted as one value in every gene: the correlation of the profile is 0 by definition, "
            "and flagged in the column pearson_undefined; changes from control are then those of the control alone"
        )
    for context in np.unique(comparison.context):
        mine = profile[comparison.context == context]
        if len(mine) > 1 and np.ptp(mine, axis=0).max() <= metrics.CONSTANT:
            _warn(
                f"{where}: one profile is predicted for all {len(mine)} conditions: retrieval is .5 on average by construction"
            )
    single = predicted.count < 2
    if single.any() and comparison.cells is not None:
        _warn(f"{where}: {_listed(rows, single)}: predicted as one cell, so distances between cells are left empty")


def _compare_controls(predicted: GroupMoments, observed: GroupMoments, reference: str) -> None:
    """Warn where predicted controls are not a sample of the observed ones."""
    both = (predicted.count > 0) & (observed.count > 0)
    difference = (predicted.mean[both] - observed.mean[both]) ** 2
    errors = [np.nan_to_num(side.variance[both]) / side.count[both][:, None] for side in (predicted, observed)]
    # a sample of the same cells differs by the error on average
    if difference.size and difference.sum() > 2 * (errors[0] + errors[1]).sum() + 1e-9 * difference.size:
        used = "the observed ones are used on both sides" if reference == "shared" else "each side's own are used"
        _warn(
            f"predicted control cells differ from the observed ones (root mean square {np.sqrt(difference.mean()):.3g} over genes, "
            f"beyond their sampling error): {used}"
        )


def _reference_line(from_predicted: bool, reference: str) -> str:
    whose = "predicted" if from_predicted else "observed"
    if reference == "own":
        return f"reference 'own': changes are from each side's own control cells; no change is the {whose} controls"
    return f"reference 'shared': changes are from the {whose} control cells on both sides"


def _listed(rows: Sequence[Key], chosen: Any) -> str:
    return shortened(key_name(rows[row]) for row in np.flatnonzero(chosen).tolist())


def _warn(message: str) -> None:
    warnings.warn(message, PerturbZooWarning, stacklevel=3)
