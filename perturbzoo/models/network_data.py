"""Data as the network behind GRNODE sees them: levels, also over time, predicted ones beside them, and what cells share."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbzoo.data.columns import require_column
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened
from perturbzoo.grn.counterfactual import fit_extrinsic_noise
from perturbzoo.grn.levels import Levels
from perturbzoo.grn.timecourse import TimeCourse
from perturbzoo.models.likelihood import expected_log1p
from perturbzoo.perturbation import Condition

MIN_CELLS, MAX_GENES = 50, 5000  # for what cells share: cells to see it in, genes whose covariance fits in memory
LARGEST_CHANGE = 6.0  # natural log: no prediction is read as more


class LevelSpace:
    """Mixed into GRNODE: between log levels and the zoo's log1p-normalised expression.

    Needs `control` ``(K, G)``, `dispersion` ``(G,)`` and `unit`, normalised counts per count.
    """

    control: Tensor
    dispersion: Tensor
    unit: float

    def expected(self, change: Tensor, context: Tensor) -> Tensor:
        """From log levels to the zoo's space: ``(C, G)`` natural log in, expected change of log1p-normalised counts out."""
        control = self.control[context.clamp(min=0)]
        unit = self.dispersion.new_full((len(control),), self.unit)
        theta = 1 / self.dispersion
        with torch.no_grad():
            rest = expected_log1p(control / self.unit, theta, unit)
            return expected_log1p(control * torch.exp(change) / self.unit, theta, unit) - rest

    def log_change(self, delta: Tensor, context: Tensor) -> Tensor:
        """The inverse of :meth:`expected`, by bisection; no change is taken for more than e⁶-fold."""
        low, high = torch.full_like(delta, -LARGEST_CHANGE), torch.full_like(delta, LARGEST_CHANGE)
        for _ in range(24):
            middle = (low + high) / 2
            below = self.expected(middle, context) < delta
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def expression_of(self, level: Tensor, size: Tensor) -> Tensor:
        """Expected log1p-normalised counts at levels ``(B, G)`` in cells whose normalised count is ``1 / size`` counts, ``(B,)``."""
        level, size = level.float(), size.float()
        return expected_log1p(level * size[:, None], 1 / self.dispersion, 1 / size)


def training_levels(data: PerturbSeqDataModule, time_key: str | None = None) -> Levels:
    """Pseudobulks of the training cells on the linear scale; with a column of times, of each pair's cells at its last one."""
    pairs = data.pairs_of("train")
    groups = [(pair, data.index.cells_by_pair[pair]) for pair in pairs]
    if time_key is not None:
        time = cell_times(data, time_key)
        groups = [(pair, cells[time[cells] == time[cells].max()]) for pair, cells in groups]
    return _levels(data, groups)


def training_course(data: PerturbSeqDataModule, time_key: str) -> TimeCourse:
    """Pseudobulks of the training pairs at each of their times; pairs that were measured once are left out.

    Raises
    ------
    PerturbZooError
        There is no such column, a perturbed cell's time is not a number of at least 0, or no pair has two times.
    """
    time = cell_times(data, time_key)
    groups, moments = [], []
    for pair in data.pairs_of("train"):
        cells = data.index.cells_by_pair[pair]
        seen = np.unique(time[cells])
        if len(seen) > 1:
            groups += [(pair, cells[time[cells] == moment]) for moment in seen]
            moments += seen.tolist()
    if not groups:
        raise PerturbZooError(
            f"obs['{time_key}'] (time_key): no training condition has cells of two times; leave out time_course"
        )
    return TimeCourse(_levels(data, groups), np.array(moments))


def cell_times(data: PerturbSeqDataModule, time_key: str) -> np.ndarray:
    """Times of all cells, ``(cells,)``; those of controls may be missing."""
    column = require_column(data.obs, time_key, "time_key", "the data")
    time = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(dtype=float)
    perturbed = np.concatenate(data.index.cells_by_pair)
    wrong = ~(np.isfinite(time[perturbed]) & (time[perturbed] >= 0))
    if wrong.any():
        names = shortened(dict.fromkeys(column.iloc[perturbed[wrong]].astype(str)))
        raise PerturbZooError(
            f"obs['{time_key}'] (time_key): {int(wrong.sum())} perturbed cells have no time of at least 0: {names}"
        )
    return time


def _levels(data: PerturbSeqDataModule, groups: list[tuple[int, np.ndarray]]) -> Levels:
    """Levels of groups of cells of a pair each."""
    spec = data.spec
    assert spec is not None
    pairs = np.array([pair for pair, _ in groups])
    members = [cells for _, cells in groups]
    unit = None
    if spec.depth > 0:
        used = np.concatenate([*members, *data.index.controls_by_context])
        unit = float((spec.depth / data.size_factor[used]).mean())
    else:
        warnings.warn(
            "the data hold no counts: the network's noise is taken from the spread of the cells",
            PerturbZooWarning,
            stacklevel=3,
        )
    return Levels.from_cells(
        data.expression,
        spec.genes,
        [data.conditions[pair] for pair in pairs],
        data.index.context_of_pair[pairs],
        members,
        data.index.controls_by_context,
        unit=unit,
        default_kind=spec.default_kind,
    )


def extrinsic_noise(data: PerturbSeqDataModule, levels: Levels) -> dict[str, Tensor]:
    """What control cells share beyond counting noise; nothing for data without counts, or with too few cells or too many genes."""
    controls, genes = data.index.controls_by_context[0], len(levels.genes)
    if levels.unit is None or len(controls) < MIN_CELLS or genes > MAX_GENES:
        return {"extrinsic_loading": torch.zeros(genes, 0), "extrinsic_dispersion": torch.zeros(genes)}
    assert data.spec is not None
    size = data.size_factor[controls] / data.spec.depth
    counts = data.expression[controls].astype(float)
    counts.data = np.rint(np.expm1(counts.data) * np.repeat(size, np.diff(counts.indptr)))
    noise = fit_extrinsic_noise(counts, size)
    return {"extrinsic_loading": noise.loading.float(), "extrinsic_dispersion": noise.dispersion.float()}


def predicted_levels(levels: Levels, conditions: list[Condition], change: np.ndarray, weight: float = 1.0) -> Levels:
    """Predicted log changes ``(N, G)`` as levels beside those of a screen, in its first context, with its usual errors."""
    error = np.broadcast_to(np.median(levels.error, axis=0), change.shape)
    return replace(
        levels,
        conditions=tuple(conditions),
        context=np.zeros(len(conditions), dtype=np.int64),
        level=levels.control[[0]] * np.exp(change),
        error=error,
        cells=None if levels.cells is None else np.broadcast_to(np.median(levels.cells, axis=0), change.shape),
        weight=np.full(len(conditions), weight),
    )


def joined(levels: Levels, extra: Levels | None) -> Levels:
    if extra is None:
        return levels

    def both(name: str) -> np.ndarray:
        return np.concatenate([getattr(levels, name), getattr(extra, name)])

    return replace(
        levels,
        conditions=(*levels.conditions, *extra.conditions),
        context=both("context"),
        level=both("level"),
        error=both("error"),
        cells=None if levels.cells is None else both("cells"),
        weight=both("weight"),
    )
