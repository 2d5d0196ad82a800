"""`ScreenEffects`: what each condition of a screen did to each gene; the one input of every network inference.

Knows arrays, gene names and conditions; no file, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo.data.reading import group_means
from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.perturbation import Condition, parse_condition

# Which way an act moves the product of its gene; a clamp may go either way, so its own change decides.
DIRECTION = {"knockout": -1, "interference": -1, "activation": 1, "overexpression": 1}


@dataclass(frozen=True, eq=False)
class TimeSeries:
    """Courses of G genes after a disturbance nobody described, or none.

    Attributes
    ----------
    times
        Shape ``(T,)``, increasing.
    delta
        Shape ``(S, T, G)``: S courses, as changes against control, in the space of the effects.
    undisturbed_from
        From when on nothing from outside acts: earlier changes say nothing of who regulates whom.

    Raises
    ------
    PerturbZooError
        Shapes contradict each other, a value is not finite, times do not increase, or no step is undisturbed.
    """

    times: np.ndarray
    delta: np.ndarray
    undisturbed_from: float = -np.inf

    def __post_init__(self) -> None:
        times, delta = np.asarray(self.times, dtype=float), np.asarray(self.delta, dtype=float)
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "delta", delta)
        for holds, complaint in (
            (times.ndim == 1 and (np.diff(times) > 0).all(), "times must be one row of increasing numbers"),
            (
                delta.ndim == 3 and delta.shape[1] == len(times),
                f"delta has the shape {delta.shape}, not courses x {len(times)} times x genes",
            ),
            (np.isfinite(delta).all(), "delta must be finite"),
            ((times >= self.undisturbed_from).sum() >= 2, f"no step lies after undisturbed_from={self.undisturbed_from:g}"),
        ):
            if not holds:
                raise PerturbZooError(f"time series: {complaint}")

    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the changes before and after each undisturbed step, both ``(steps, G)``."""
        kept = self.delta[:, self.times >= self.undisturbed_from]
        genes = kept.shape[-1]
        return kept[:, :-1].reshape(-1, genes), kept[:, 1:].reshape(-1, genes)


@dataclass(frozen=True, eq=False)
class ScreenEffects:
    """Pseudobulks of K conditions as changes against control, for G genes. From cells: :meth:`from_cells`.

    Attributes
    ----------
    genes
        Names of the G genes, unique.
    conditions
        The K conditions, none of them control. One condition may have several rows, one for each context.
    delta
        Shape ``(K, G)``: mean expression of the condition minus mean of its controls, log1p-normalised.
    error
        Shape ``(K, G)``: standard errors of `delta`, or one number for all; 0 where they are not known.
    default_kind
        Kind of the interventions that spell none out.
    series
        Courses of the same genes over time, for the methods that can use them (`zscore_direct`).

    Raises
    ------
    PerturbZooError
        Shapes contradict each other, a value is not finite, a gene comes twice, a row is control, or there is no row.
    """

    genes: tuple[str, ...]
    conditions: tuple[Condition, ...]
    delta: np.ndarray
    error: np.ndarray = field(default_factory=lambda: np.zeros(()))
    default_kind: str = "knockout"
    series: TimeSeries | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "genes", tuple(map(str, self.genes)))
        read = tuple(parse_condition(one) if isinstance(one, str) else one for one in self.conditions)
        object.__setattr__(self, "conditions", read)
        delta = np.asarray(self.delta, dtype=float)
        error = np.asarray(self.error, dtype=float)
        error = np.full(delta.shape, error) if error.ndim == 0 else error
        object.__setattr__(self, "delta", delta)
        object.__setattr__(self, "error", error)
        names, shape = pd.Index(self.genes), (len(self.conditions), len(self.genes))
        for holds, complaint in (
            (names.is_unique, f"genes named twice: {shortened(names[names.duplicated()].unique())}"),
            (shape[0] and shape[1], f"{shape[0]} conditions x {shape[1]} genes: there is nothing to infer from"),
            (delta.shape == shape, f"delta has the shape {delta.shape}, not conditions x genes {shape}"),
            (error.shape == shape, f"error has the shape {error.shape}, not conditions x genes {shape}"),
            (np.isfinite(delta).all() and np.isfinite(error).all(), "delta and error must be finite"),
            ((error >= 0).all(), "standard errors must not be negative"),
            (
                self.series is None or self.series.delta.shape[2] == shape[1],
                f"the time series have another number of genes than {shape[1]}",
            ),
            (not any(one.is_control for one in self.conditions), "a row is control; leave control out, it is the reference"),
        ):
            if not holds:
                raise PerturbZooError(f"effects: {complaint}")

    @classmethod
    def from_cells(
        cls,
        values: np.ndarray | sparse.spmatrix,
        genes: Sequence[str],
        conditions: Sequence[Condition | str],
        condition: np.ndarray,
        context: np.ndarray | None = None,
        *,
        default_kind: str = "knockout",
    ) -> ScreenEffects:
        """Average cells and subtract the control mean of their context.

        Parameters
        ----------
        values
            Shape ``(cells, G)``, log1p-normalised.
        conditions, condition
            The distinct conditions, control among them, and shape ``(cells,)``: each cell's index into them.
        context
            Shape ``(cells,)``, int: strata in which controls are matched. None: one.

        Raises
        ------
        PerturbZooError
            A context has no control cells, or nothing was perturbed.
        """
        named = [parse_condition(one) if isinstance(one, str) else one for one in conditions]
        strata = np.zeros(len(condition), dtype=np.int64) if context is None else np.asarray(context, dtype=np.int64)
        groups, code = np.unique(np.asarray(condition) * (strata.max(initial=0) + 1) + strata, return_inverse=True)
        kind, stratum = np.divmod(groups, strata.max(initial=0) + 1)
        size = np.bincount(code)
        members = np.split(np.argsort(code, kind="stable"), np.cumsum(size)[:-1])
        matrix = sparse.csr_matrix(values)
        mean, square = group_means(matrix, members), group_means(matrix, members, squared=True)  # (groups, G)
        # of a single cell's spread nothing is known, and it counts as 0: leave such conditions out
        variance = np.maximum(square - mean**2, 0) / np.maximum(size - 1, 1)[:, None]
        is_control = np.array([named[position].is_control for position in kind])
        control_of = np.full(strata.max(initial=0) + 1, -1)
        control_of[stratum[is_control]] = np.flatnonzero(is_control)
        rows = np.flatnonzero(~is_control)
        reference = control_of[stratum[rows]]
        if not len(rows):
            raise PerturbZooError("effects: only control cells, nothing was perturbed")
        if (reference < 0).any():
            bare = {str(named[kind[row]]) for row in rows[reference < 0]}
            raise PerturbZooError(f"effects: no control cells in the context of {shortened(sorted(bare))}")
        return cls(
            tuple(genes),
            tuple(named[kind[row]] for row in rows),
            mean[rows] - mean[reference],
            np.sqrt(variance[rows] + variance[reference]),
            default_kind,
        )

    @cached_property
    def direction(self) -> np.ndarray:
        """Shape ``(K, G)``, int8: 1 where a condition raises the gene itself, -1 where it lowers it, 0 where it leaves it."""
        acts = np.zeros(self.delta.shape, dtype=np.int8)
        place = {gene: position for position, gene in enumerate(self.genes)}
        for row, condition in enumerate(self.conditions):
            for act in condition:
                column = place.get(act.target)
                if column is not None:
                    own = 1 if self.delta[row, column] > 0 else -1
                    acts[row, column] = DIRECTION.get(act.kind or self.default_kind, own)
        return acts

    @cached_property
    def singles(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Responses to what was done to one gene alone, turned to a gain of that gene.

        Returns
        -------
        perturbed
            Shape ``(P,)``: indices of the measured genes that some condition perturbs alone, increasing.
        response, error
            Shape ``(G, P)``: mean of direction x delta over those conditions, and its standard error.
        """
        alone = np.array([len(condition.targets) == 1 for condition in self.conditions])
        rows, columns = np.nonzero(self.direction * alone[:, None])
        perturbed, which = np.unique(columns, return_inverse=True)
        shape = (len(perturbed), len(rows))
        share = sparse.csr_matrix((1 / np.bincount(which)[which], (which, np.arange(len(rows)))), shape=shape)
        towards = self.direction[rows, columns, None] * self.delta[rows]  # (rows, G)
        error = np.sqrt(share.multiply(share) @ self.error[rows] ** 2)
        return perturbed, (share @ towards).T, error.T

    @property
    def unmeasured(self) -> list[str]:
        """Targets that are not among the genes, sorted."""
        return sorted({target for condition in self.conditions for target in condition.targets}.difference(self.genes))

    def select(self, rows: np.ndarray) -> ScreenEffects:
        """Return some rows, in that order; a row may come several times."""
        chosen = tuple(self.conditions[row] for row in rows)
        return replace(self, conditions=chosen, delta=self.delta[rows], error=self.error[rows])

    def with_noise(self, rng: np.random.Generator) -> ScreenEffects:
        """Return the effects with normal noise of their standard errors: what a repetition of the screen could have shown."""
        noisy = self.delta + self.error * rng.standard_normal(self.delta.shape)
        return replace(self, delta=noisy)
