"""Distances between predicted and measured cells, for every condition and whoever predicts. Called by the native protocol."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from perturbzoo.evaluation.comparison import Candidate, Comparison, Truth
from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.samples import Estimator, Sample, Transports, compare, median_distance

_BANDWIDTH_CELLS = 500


def cell_distances(
    comparison: Comparison, rows: Mapping[str, tuple[Candidate, Truth]], estimator: Estimator
) -> dict[str, dict[str, Array]]:
    """E-distance, squared MMD and Sinkhorn divergence; none for candidates without cells.

    The kernel's width is the median distance between up to 500 of the sampled observed cells, controls among them; the
    transport is regularised with a tenth of its square, and uses as many cells of a condition as the smallest sample has that is
    compared there. All are the same for all that is compared.

    Parameters
    ----------
    comparison
        With sampled cells.
    rows
        Who is scored against what, by name.
    estimator
        Of the E-distance.

    Returns
    -------
    By name and metric, ``(P,)`` each; NaN where there are too few cells.
    """
    cells, controls = comparison.cells, comparison.control_cells
    assert cells is not None
    assert controls is not None
    bandwidth = _bandwidth(comparison)
    transports = Transports(bandwidth**2 / 10)
    compared = {name: pair for name, pair in rows.items() if pair[0].has_cells}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in compared}
    origin = comparison.control.mean
    control = [Sample(controls.of(context), origin[context]) for context in range(len(origin))]
    for row, context in enumerate(comparison.context.tolist()):
        whole = Sample(cells.of(row), origin[context])
        drawn: dict[int | None, Sample] = {None: whole}
        drawn |= {half: whole.part(comparison.half[row] == half) for half in (0, 1) if len(comparison.half)}
        predicted: dict[int, Sample] = {}
        pairs: list[tuple[str, Sample, Sample, Array | None]] = []
        for name, (candidate, truth) in compared.items():
            moved = None
            if candidate.moves_controls:
                sample, moved = control[context], candidate.mean[row] - origin[context]
            elif candidate.half is not None:
                sample = drawn[candidate.half]
            else:
                assert candidate.cells is not None
                if id(candidate) not in predicted:
                    predicted[id(candidate)] = Sample(candidate.cells.of(row), origin[context])
                sample = predicted[id(candidate)]
            pairs.append((name, sample, drawn[truth.half], moved))
        fewest = min((len(sample) for pair in pairs for sample in pair[1:3] if len(sample) > 1), default=0)
        for name, sample, measured, moved in pairs:
            found[name].append(compare(sample, measured, bandwidth=bandwidth, estimator=estimator, moved=moved))
            transports.ask(sample, measured, fewest, moved)
        transports.settle()
    columns = {name: {metric: np.array([one[metric] for one in of]) for metric in of[0]} for name, of in found.items()}
    # row by row, and there candidate by candidate
    sinkhorn = transports.divergences().reshape(len(comparison.context), len(compared))
    return {name: {**columns[name], "sinkhorn": sinkhorn[:, number]} for number, name in enumerate(compared)}


def _bandwidth(comparison: Comparison) -> float:
    cells, controls = comparison.cells, comparison.control_cells
    assert cells is not None
    assert controls is not None
    n_rows, n_contexts = len(comparison.context), len(comparison.control.count)
    share = max(2, -(-_BANDWIDTH_CELLS // (n_rows + n_contexts)))
    some = [controls.of(row)[:share] for row in range(n_contexts)] + [cells.of(row)[:share] for row in range(n_rows)]
    return median_distance(np.concatenate(some)[: 2 * _BANDWIDTH_CELLS])
