"""The columns of the table that rest on tests between cells: DE recovery, Open Problems' scores, off-target precision.

Called by :mod:`perturbzoo.evaluation.native`. A few conditions are tested at a time, so that the tables of p-values stay small; within
them, each side is tested once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from perturbzoo.evaluation import open_problems, recovery, threads
from perturbzoo.evaluation.differential import Differential, against_control, linear_mean, unchanged
from perturbzoo.evaluation.metrics import Array

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from perturbzoo.evaluation.comparison import Candidate, Cells, Comparison, Truth

_VALUES = 1 << 23  # values of the tested cells of one side, zeros included


def columns(
    comparison: Comparison, rows: Mapping[str, tuple[Candidate, Truth]], pool: Executor
) -> Callable[[], dict[str, dict[str, Array]]]:
    """Score every candidate that has cells; off-target precision also where it has none.

    Control cells that are moved as a whole, as floors are made, are not tested: each zero becomes another value, so that nearly every gene
    differs, whatever the change. No change at all is the exception: nothing differs.

    Parameters
    ----------
    comparison
        What is compared, with sampled cells.
    rows
        By name, the candidates and the measured cells that each is held against.
    pool
        Where the work is done.

    Returns
    -------
    What waits for the columns: by name and column, ``(P,)``.
    """
    tested = pool.submit(_test_all, comparison, rows, pool)

    def collected() -> dict[str, dict[str, Array]]:
        found: dict[str, dict[str, Array]] = {name: {} for name in rows}
        for block, scored in threads.result(tested):
            for name, of in threads.result(scored).items():
                for column, part in of.items():
                    found[name].setdefault(column, np.full(len(comparison.context), np.nan))[block] = part
        return found

    return collected


def _test_all(
    comparison: Comparison, rows: Mapping[str, tuple[Candidate, Truth]], pool: Executor
) -> list[tuple[NDArray[np.intp], Future[dict[str, dict[str, Array]]]]]:
    """Test the conditions a few at a time, by as many threads as there are; meanwhile others make scores of what is tested."""
    assert comparison.control_cells is not None
    scored = []
    for context, block in _blocks(comparison):
        tests = _Tests(comparison, block, comparison.control_cells.sparse_of([context]))
        for candidate, truth in rows.values():
            tests.measured(truth.half)
            tests.predicted(candidate)
        scored.append((block, pool.submit(_score_all, tests, rows)))
    return scored


def _score_all(tests: _Tests, rows: Mapping[str, tuple[Candidate, Truth]]) -> dict[str, dict[str, Array]]:
    scored: dict[tuple[int, int], dict[str, Array]] = {}
    for candidate, truth in rows.values():
        key = (id(candidate), id(truth))
        if key not in scored:  # one ceiling goes by two names
            scored[key] = _scores(tests, candidate, truth)
    return {name: scored[id(candidate), id(truth)] for name, (candidate, truth) in rows.items()}


def _scores(tests: _Tests, candidate: Candidate, truth: Truth) -> dict[str, Array]:
    """The columns of a few conditions."""
    comparison, block = tests.comparison, tests.block
    observed, predicted, targets = tests.measured(truth.half), tests.predicted(candidate), comparison.targets[block]
    start = comparison.control.mean if candidate.control is None else candidate.control
    change = candidate.mean[block] - start[comparison.context[block]]
    precision, chance = recovery.off_target_precision(change, observed.significant, targets)
    values = {"off_target_precision": precision, "off_target_chance": chance}
    values = {column: np.where(observed.tested, part, np.nan) for column, part in values.items()}
    if predicted is None:
        return values
    logs = (open_problems.signed_log_p(side) for side in (predicted, observed))
    return values | recovery.recovery(predicted, observed, targets) | open_problems.scores(*logs)


class _Tests:
    """The tests of a few conditions of one context, each made when it is asked for, and once."""

    def __init__(self, comparison: Comparison, block: NDArray[np.intp], control: csr_matrix) -> None:
        self.comparison, self.block, self.control = comparison, block, control
        self.control_mean = linear_mean(control, np.zeros(control.shape[0], dtype=np.int64), 1)
        self.halves: list[Differential] = []
        self.sides: dict[int, Differential] = {}

    def measured(self, half: int | None) -> Differential:
        cells = self.comparison.cells
        assert cells is not None
        if half is None:
            return self._of(cells)
        if not self.halves:  # both in one run, as conditions of their own
            parts = np.concatenate([self.comparison.half[row] for row in self.block])
            self.halves = self._test(cells.sparse_of(self.block.tolist()), 2 * self._group(cells) + parts, 2)
        return self.halves[half]

    def _group(self, cells: Cells) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.block)), cells.n[self.block])

    def predicted(self, candidate: Candidate) -> Differential | None:
        if candidate.half is not None:
            return self.measured(candidate.half)
        if candidate.moves_controls:
            origin = self.comparison.control.mean[self.comparison.context[self.block]]
            return unchanged(*origin.shape) if (candidate.mean[self.block] == origin).all() else None
        return None if candidate.cells is None else self._of(candidate.cells)

    def _of(self, cells: Cells) -> Differential:
        if id(cells) not in self.sides:
            (self.sides[id(cells)],) = self._test(cells.sparse_of(self.block.tolist()), self._group(cells), 1)
        return self.sides[id(cells)]

    def _test(self, values: csr_matrix, group: NDArray[np.int64], parts: int) -> list[Differential]:
        """Test groups ``parts * condition + part``, in one run; a profile is no sample of cells."""
        n_groups = parts * len(self.block)
        several = np.bincount(group, minlength=n_groups)[group] > 1
        if not several.all():
            values, group = values[several], group[several]
        means = linear_mean(values, group, n_groups), self.control_mean
        found = against_control(values, group, n_groups, self.control, means=means)
        tables = (found.p_value, found.p_adjusted, found.log2_fold_change)
        return [Differential(*(table[part::parts] for table in tables)) for part in range(parts)]


def _blocks(comparison: Comparison) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Contexts and a few of their conditions."""
    assert comparison.cells is not None
    for context in np.unique(comparison.context).tolist():
        rows = np.flatnonzero(comparison.context == context)
        number = np.cumsum(comparison.cells.n[rows] * comparison.observed.mean.shape[1]) // _VALUES
        for block in np.split(rows, np.flatnonzero(np.diff(number)) + 1):
            yield context, block
