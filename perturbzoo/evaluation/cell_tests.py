"""The columns of the table that rest on tests between cells: DE recovery, Open Problems' scores, off-target precision.

Called by :mod:`perturbzoo.evaluation.native`. A few conditions are tested at a time, so that the tables of p-values stay small; within
them, each side is tested once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from perturbzoo.evaluation import open_problems, recovery
from perturbzoo.evaluation.differential import Differential, against_control, unchanged
from perturbzoo.evaluation.metrics import Array

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from perturbzoo.evaluation.comparison import Candidate, Comparison, Truth

_VALUES = 1 << 25  # values of the tested cells of one side, zeros included


def columns(comparison: Comparison, rows: Mapping[str, tuple[Candidate, Truth]]) -> dict[str, dict[str, Array]]:
    """Score every candidate that has cells; off-target precision also where it has none.

    Control cells that are moved as a whole, as floors are made, are not tested: each zero becomes another value, so that nearly every gene
    differs, whatever the change. No change at all is the exception: nothing differs.

    Parameters
    ----------
    comparison
        What is compared, with sampled cells.
    rows
        By name, the candidates and the measured cells that each is held against.

    Returns
    -------
    By name and column, ``(P,)``.
    """
    cells, controls = comparison.cells, comparison.control_cells
    assert cells is not None
    assert controls is not None
    found: dict[str, dict[str, Array]] = {name: {} for name in rows}
    for context, block in _blocks(comparison):
        tests = _Tests(comparison, block, controls.sparse_of([context]))
        origin = comparison.control.mean[context]
        for name, (candidate, truth) in rows.items():
            observed, mean = tests.measured(truth.half), candidate.mean[block]
            change = mean - (origin if candidate.control is None else candidate.control[context])
            precision, chance = recovery.off_target_precision(change, observed.significant, comparison.targets[block])
            values = {"off_target_precision": precision, "off_target_chance": chance}
            values = {column: np.where(observed.tested, part, np.nan) for column, part in values.items()}
            predicted = tests.predicted(candidate, (mean == origin).all())
            if predicted is not None:
                values |= recovery.recovery(predicted, observed, comparison.targets[block])
                values |= open_problems.scores(*(open_problems.signed_log_p(side) for side in (predicted, observed)))
            for column, part in values.items():
                found[name].setdefault(column, np.full(len(comparison.context), np.nan))[block] = part
    return found


class _Tests:
    """The tests of a few conditions of one context, each made when it is asked for, and once."""

    def __init__(self, comparison: Comparison, block: NDArray[np.intp], control: csr_matrix) -> None:
        self.comparison, self.block, self.control = comparison, block, control
        self.made: dict[object, Differential] = {}

    def measured(self, half: int | None) -> Differential:
        cells = self.comparison.cells
        assert cells is not None
        if half not in self.made:
            values, group = cells.sparse_of(self.block.tolist()), np.repeat(np.arange(len(self.block)), cells.n[self.block])
            if half is not None:
                mine = np.concatenate([self.comparison.half[row] for row in self.block]) == half
                values, group = values[mine], group[mine]
            self.made[half] = self._test(values, group)
        return self.made[half]

    def predicted(self, candidate: Candidate, no_change: bool) -> Differential | None:
        if candidate.half is not None:
            return self.measured(candidate.half)
        if candidate.moves_controls:
            return unchanged(len(self.block), self.control.shape[1]) if no_change else None
        cells = candidate.cells
        if cells is None:
            return None
        key = ("predicted", id(cells))
        if key not in self.made:
            group = np.repeat(np.arange(len(self.block)), cells.n[self.block])
            self.made[key] = self._test(cells.sparse_of(self.block.tolist()), group)
        return self.made[key]

    def _test(self, values: csr_matrix, group: NDArray[np.int64]) -> Differential:
        several = np.bincount(group, minlength=len(self.block))[group] > 1  # a profile is no sample of cells
        if not several.all():
            values, group = values[several], group[several]
        return against_control(values, group, len(self.block), self.control)


def _blocks(comparison: Comparison) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Contexts and a few of their conditions."""
    assert comparison.cells is not None
    for context in np.unique(comparison.context).tolist():
        rows = np.flatnonzero(comparison.context == context)
        number = np.cumsum(comparison.cells.n[rows] * comparison.observed.mean.shape[1]) // _VALUES
        for block in np.split(rows, np.flatnonzero(np.diff(number)) + 1):
            yield context, block
