r"""`Levels`: pseudobulks as the kinetics see them, on the linear scale, with what is known of their noise.

The zoo's own value space is the mean of log1p; kinetics are about molecules, whose mean it is not. Knows arrays, names and
conditions; no file, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import sparse

from perturbzoo.data.reading import group_means
from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.grn.effects import ScreenEffects
from perturbzoo.perturbation import Condition, parse_condition

LEAST_DISPERSION, MOST_DISPERSION = 1e-3, 20.0


@dataclass(frozen=True, eq=False)
class Levels:
    r"""Mean levels of G genes under N (condition, context) pairs, and of the controls of K contexts.

    Attributes
    ----------
    genes
        Names of the genes.
    conditions
        The N conditions, none of them control.
    context
        Shape ``(N,)``, int: context of each row.
    level, control
        Shape ``(N, G)`` and ``(K, G)``: means of depth-normalised counts.
    error, control_error
        The same shapes: standard errors of the **log** of the levels, > 0.
    default_kind
        Kind of the interventions that spell none out.
    unit, dispersion
        Normalised counts per count, and shape ``(G,)``: :math:`\alpha` of the negative binomial whose variance is
        :math:`m + \alpha m^2` in counts. None: only levels and errors are known, and noise is normal on the log scale.
    cells, control_cells
        Shapes ``(N, G)`` and ``(K, G)``: how many cells' worth of counts each mean is, the error between repetitions of an
        experiment taken for fewer of them. None where counts are not known.
    weight
        Shape ``(N,)``: how much each row counts; 1 for measured ones.
    """

    genes: tuple[str, ...]
    conditions: tuple[Condition, ...]
    context: np.ndarray
    level: np.ndarray
    control: np.ndarray
    error: np.ndarray
    control_error: np.ndarray
    default_kind: str = "knockout"
    unit: float | None = None
    dispersion: np.ndarray | None = None
    cells: np.ndarray | None = None
    control_cells: np.ndarray | None = None
    weight: np.ndarray = field(default_factory=lambda: np.ones(()))

    def __post_init__(self) -> None:
        read = tuple(parse_condition(one) if isinstance(one, str) else one for one in self.conditions)
        object.__setattr__(self, "conditions", read)
        object.__setattr__(self, "weight", np.broadcast_to(self.weight, (len(read),)))
        rows, contexts = (len(read), len(self.genes)), (len(self.control), len(self.genes))
        for holds, complaint in (
            (self.level.shape == self.error.shape == rows, f"levels and errors must have the shape {rows}"),
            (self.control.shape == self.control_error.shape == contexts, f"control levels must have the shape {contexts}"),
            (len(self.context) == len(read), "every row needs a context"),
            (
                not len(read) or (self.context.min() >= 0 and self.context.max() < len(self.control)),
                f"contexts {min(self.context, default=0)} to {max(self.context, default=0)}, but there are controls of {len(self.control)}",
            ),
            (not any(one.is_control for one in read), "a row is control; controls have a table of their own"),
            (all(np.isfinite(part).all() for part in (self.level, self.control)), "a level is not finite"),
            ((self.level >= 0).all() and (self.control >= 0).all(), "a level is negative; are these log values?"),
            ((self.error > 0).all() and (self.control_error > 0).all(), "standard errors must be positive"),
        ):
            if not holds:
                raise PerturbZooError(f"levels: {complaint}")

    @classmethod
    def from_cells(
        cls,
        expression: sparse.csr_matrix,
        genes: Sequence[str],
        conditions: Sequence[Condition],
        contexts: np.ndarray,
        members: Sequence[np.ndarray],
        controls: Sequence[np.ndarray],
        *,
        unit: float | None,
        default_kind: str,
        replicate_error: float = 0.02,
    ) -> Levels:
        """Average cells.

        Parameters
        ----------
        expression
            Shape ``(cells, G)``, CSR, log1p-normalised.
        conditions, contexts, members
            Of each of the N rows its condition, the index of its context, and its cells (rows of `expression`).
        controls
            Control cells of each context.
        unit
            Normalised counts per count, about the training depth / a cell's depth; None where counts are not known.
        replicate_error
            Standard deviation of the log level between repetitions of an experiment, which no number of cells averages out.

        Raises
        ------
        PerturbZooError
            A context has no control cells, or a row no cells.
        """
        bare = [str(conditions[row]) for row, cells in enumerate(members) if not len(cells)]
        if bare or not all(len(cells) for cells in controls):
            raise PerturbZooError(f"levels: no cells for {shortened(bare) if bare else 'the controls of a context'}")
        counts = expression.copy()
        np.expm1(counts.data, out=counts.data)
        groups = [*members, *controls]
        mean = group_means(counts, groups)
        size = np.array([len(group) for group in groups], dtype=float)[:, None]
        square = group_means(counts, groups, squared=True)
        variance = np.maximum(square - mean**2, 0) * size / np.maximum(size - 1, 1)  # (groups, G)
        base = 0.0 if unit is None else unit
        # α of each gene from all groups at once: the excess of the variance over the counting noise, as a share of the mean
        many = (size > 1) * np.maximum(size - 1, 0)
        excess = (many * (variance - base * mean)).sum(0)
        scale = (many * mean**2).sum(0)
        alpha = np.clip(np.divide(excess, scale, out=np.zeros_like(scale), where=scale > 0), LEAST_DISPERSION, MOST_DISPERSION)
        # the variance of a mean at the level of the gene, not that of the few cells in which nothing was counted
        typical = (size * mean).sum(0) / size.sum()
        around = (size * mean + 4 * typical) / (size + 4)
        floor = np.maximum(around, 0.5 * (base or 1.0) / size)
        relative = base / floor + alpha  # variance of a cell's level over the level's square
        log_error = np.sqrt(relative / size + replicate_error**2)
        worth = relative / log_error**2
        n = len(members)
        control = mean[n:]
        if unit is None and counts.nnz:
            # without counts a gene that a row's cells lack has half of the least value seen in one of them, not the log of nothing
            least = np.where(typical > 0, 0.5 * counts.data[counts.data > 0].min() / size, 0.0)
            mean = np.maximum(mean, least)
            control = mean[n:]
        if unit is not None:
            # a gene that other cells showed, but no control cell: half a count among them all, so that its change is finite
            control = np.where(typical > 0, np.maximum(control, 0.5 * base / size[n:]), control)
        return cls(
            tuple(genes),
            tuple(conditions),
            np.asarray(contexts),
            mean[:n],
            control,
            log_error[:n],
            log_error[n:],
            default_kind,
            unit,
            *((None, None, None) if unit is None else (alpha, worth[:n], worth[n:])),
        )

    @classmethod
    def from_effects(cls, effects: ScreenEffects) -> Levels:
        """Read changes as logs of levels relative to control; where no standard errors are known, all are alike."""
        noise = effects.error
        typical = np.sqrt(np.median(noise[noise > 0] ** 2)) if (noise > 0).any() else 0.05
        genes = len(effects.genes)
        return cls(
            effects.genes,
            effects.conditions,
            np.zeros(len(effects.conditions), dtype=np.int64),
            np.exp(effects.delta),
            np.ones((1, genes)),
            np.maximum(noise, 0.1 * typical) if (noise > 0).any() else np.full(effects.delta.shape, typical),
            np.full((1, genes), typical / 10),
            effects.default_kind,
        )

    @property
    def change(self) -> np.ndarray:
        """Shape ``(N, G)``: log of the level over that of the context's controls; finite where nothing was counted."""
        control = self.control[self.context]
        # for a gene as high as in control half a count among all cells, about (unit / level + dispersion) / error² of them; for a
        # lost one more, as its error is larger
        pseudo = 0.5 * control * self.error**2 if self.unit is not None else np.zeros_like(control)
        tiny = 1e-6 * max(float(self.control.mean()), 1e-12)
        return np.log(self.level + pseudo + tiny) - np.log(control + pseudo + tiny)

    def select(self, rows: np.ndarray) -> Levels:
        """Return some rows, in that order."""
        return replace(
            self,
            conditions=tuple(self.conditions[row] for row in rows),
            context=self.context[rows],
            level=self.level[rows],
            error=self.error[rows],
            cells=None if self.cells is None else self.cells[rows],
            weight=self.weight[rows],
        )

    def with_noise(self, rng: np.random.Generator) -> Levels:
        """Return the levels with noise of their standard errors: what a repetition of the screen could have shown."""
        level = self.level * np.exp(self.error * rng.standard_normal(self.level.shape) - self.error**2 / 2)
        control = self.control * np.exp(
            self.control_error * rng.standard_normal(self.control.shape) - self.control_error**2 / 2
        )
        return replace(self, level=level, control=control)
