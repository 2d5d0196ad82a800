r"""Fit kinetics to a time course: multiple shooting, then rollouts; see :mod:`perturbzoo.grn.timecourse` for the equations.

What is trained, from a fit to steady states or from nothing: weights, basal levels, strengths of guides, the time unit (or every
gene's turnover), and delays of the onsets. Loss: squared residuals of the log levels in standard errors, and the penalties of
:mod:`perturbzoo.grn.fitting`, with the information of each edge counted anew over all times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils import parametrize

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn.fitted import ABSENT, NO_DECAY, USUAL_STRENGTH, FittedNetwork
from perturbzoo.grn.timecourse import Course, Onsets, TimeCourse, fit_onset, inverse_softplus
from perturbzoo.grn.transport import sinkhorn_divergence
from perturbzoo.perturbation import Condition

SPANS = tuple(1.2 * 2 ** (power / 2) for power in range(11))  # lifetimes that a course may last, tried as a start
SMOOTH = 1e-3  # as in the fit of steady states
OWN_SPREAD = 0.3  # natural log: how far a gene's turnover lies from the common one, before its course is seen
TURNOVERS = ("unit", "genes", "fixed")
PAIRS, ENSEMBLE = 8, 64  # snapshots compared in a step, and cells of each


@dataclass(frozen=True)
class CourseOptions:
    """How :func:`fit_time_course` fits.

    Attributes
    ----------
    penalty, prior_strength
        Standard errors that an edge must be worth, and how much less the prior's cost, as in the steady fit.
    turnover
        ``"unit"``: one time unit for all genes; ``"genes"``: each gene's γ around it; ``"fixed"``: as it is.
    delays
        Whose onset is shifted by a delay that is learned: of each ``"condition"`` (and context), or of each ``"target"``
        wherever it is perturbed; None: onsets are as named.
    snapshots
        ``"sinkhorn"``: add the distance between cells, which :func:`fit_time_course` is then given; None: means only.
    snapshot_weight
        Of the Sinkhorn divergence, in units of its value before the fit, beside the loss of one rollout.
    shooting_steps, rollout_steps
        Steps of the two stages.
    lr
        Adam's rate, a third of it in rollouts.
    """

    penalty: float = 2.0
    prior_strength: float = 0.9
    turnover: Literal["unit", "genes", "fixed"] = "unit"
    delays: Literal["condition", "target"] | None = None
    snapshots: Literal["sinkhorn"] | None = None
    snapshot_weight: float = 1.0
    shooting_steps: int = 60
    rollout_steps: int = 60
    lr: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for holds, complaint in (
            (self.penalty >= 0 and self.snapshot_weight >= 0, "penalty and snapshot_weight start at 0"),
            (0 <= self.prior_strength <= 1, f"prior_strength={self.prior_strength:g} lies outside [0, 1]"),
            (self.turnover in TURNOVERS, f"turnover='{self.turnover}' is not one of {', '.join(TURNOVERS)}"),
            (self.delays in (None, "condition", "target"), f"delays='{self.delays}' is neither 'condition' nor 'target'"),
            (self.snapshots in (None, "sinkhorn"), f"snapshots='{self.snapshots}' is not 'sinkhorn'"),
            (min(self.shooting_steps, self.rollout_steps) >= 0 and self.lr > 0, "steps start at 0, and lr is positive"),
        ):
            if not holds:
                raise PerturbZooError(f"time course fit: {complaint}")


@dataclass(frozen=True, eq=False)
class Snapshots:
    """Cells of a time course, for the distance of distributions.

    Attributes
    ----------
    cells
        For each time and series of the course its cells, ``(n, G)``, log1p-normalised; None where none were measured.
    controls
        Control cells of each context, ``(n, G)``.
    """

    cells: list[list[np.ndarray | None]]
    controls: list[np.ndarray]

    @classmethod
    def from_cells(
        cls,
        course: TimeCourse,
        expression: sparse.csr_matrix,
        conditions: Sequence[Condition],
        condition: np.ndarray,
        context: np.ndarray,
        time: np.ndarray,
        *,
        most: int = 500,
    ) -> Snapshots:
        """Take up to `most` cells of each series and time; arguments as those of :meth:`TimeCourse.from_cells`."""
        index = {one: number for number, one in enumerate(conditions)}
        control = np.array([one.is_control for one in conditions])[condition]

        def held(chosen: np.ndarray) -> np.ndarray | None:
            rows = np.flatnonzero(chosen)[:most]
            return expression[rows].toarray() if len(rows) else None

        series = list(zip(course.conditions, course.context.tolist(), strict=True))
        cells = [
            [held((condition == index[one]) & (context == place) & (time == moment)) for one, place in series]
            for moment in course.times
        ]
        rest = [expression[np.flatnonzero(control & (context == place))[:most]].toarray() for place in np.unique(context)]
        return cls(cells, rest)


def fit_time_course(
    course: TimeCourse,
    fitted: FittedNetwork,
    options: CourseOptions | None = None,
    *,
    snapshots: Snapshots | None = None,
    report: Callable[[str, int, float], None] | None = None,
) -> Onsets | None:
    """Refine a network on a time course, in place; its γ are then per time unit of the course.

    Parameters
    ----------
    course
        The data.
    fitted
        A network that :func:`perturbzoo.grn.fitting.fit_network` fitted to the last levels, ``course.last()``, or a new one.
    snapshots
        Cells, for ``options.snapshots``.
    report
        Called after every step with the stage, the step and the loss.

    Returns
    -------
    Onsets or None
        With ``options.delays``: the delays that were learned, and their standard errors.

    Raises
    ------
    PerturbZooError
        Genes or contexts are not the network's, there are no snapshots to compare, or values are no longer finite.
    """
    chosen = options or CourseOptions()
    if (chosen.snapshots is None) != (snapshots is None):
        raise PerturbZooError("time course fit: snapshots='sinkhorn' and the snapshots' cells are given both or neither")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        delay = _CourseFit(course, fitted, chosen, snapshots, report).run()
    if chosen.delays is None:
        return None
    return fit_onset(fitted, course, of=chosen.delays, start=delay, unit_known=chosen.turnover == "fixed")


class _Turnover(nn.Module):
    """γ as what it was, times one factor, times each gene's own."""

    def __init__(self, count: int, own: bool) -> None:
        super().__init__()
        self.unit = nn.Parameter(torch.zeros(()))
        self.own = nn.Parameter(torch.zeros(count), requires_grad=own)

    def cost(self) -> Tensor:
        return 0.5 * (self.own / OWN_SPREAD).square().sum()

    def forward(self, raw: Tensor) -> Tensor:
        gamma = softplus(raw) * torch.exp(self.unit + self.own)
        return inverse_softplus(gamma)


class _CourseFit:
    def __init__(
        self,
        course: TimeCourse,
        fitted: FittedNetwork,
        options: CourseOptions,
        snapshots: Snapshots | None,
        report: Callable[[str, int, float], None] | None,
    ) -> None:
        self.fitted, self.options, self.snapshots, self.report = fitted, options, snapshots, report
        self.data = Course(course, fitted, options.delays)
        self.last = float(course.times[-1])
        self.delay = torch.zeros(len(self.data.names), dtype=self.data.observed.dtype)
        self._coarse(course)
        self._information()
        self.scale = self.data.lifetime
        if snapshots is not None:
            controls = np.concatenate(snapshots.controls)
            # squared distance of cells of one population: twice the variance
            self.blur = 0.1 * 2 * float(controls.var(0).sum())
            self.usual: float | None = None

    def _coarse(self, course: TimeCourse) -> None:
        """Time unit and delays of each series that follow the data best, of a few."""
        data, options, raw = self.data, self.options, self.fitted.dynamics.raw_decay
        gamma = softplus(raw.detach()).clone()
        factors = [1.0] if options.turnover == "fixed" else [span / self.last * data.lifetime for span in SPANS]
        shares = torch.linspace(0, 1, 13, dtype=gamma.dtype)[:-1] if options.delays else torch.zeros(1, dtype=gamma.dtype)
        best = math.inf
        for factor in factors:
            raw.data = inverse_softplus(gamma * factor)
            tried = data.tried(shares * self.last)
            least, place = tried.min(0)
            if float(least.sum()) < best:
                best, found = float(least.sum()), (factor, data.gather(shares[place] * self.last))
        raw.data = inverse_softplus(gamma * found[0])
        self.delay = found[1]
        if options.delays is not None:
            sharper = fit_onset(self.fitted, course, of=options.delays, start=self.delay, steps=6)
            self.delay = torch.as_tensor(sharper.delay, dtype=gamma.dtype)

    def _information(self) -> None:
        """Of each edge: how far its regulator moved up to each time, as the turnover remembers it."""
        data, fitted, dynamics = self.data, self.fitted, self.fitted.dynamics
        with torch.no_grad():
            followed = data.rollout(data.spread_out(self.delay))  # (T, S, nodes)
            followed[..., : fitted.measured] = data.shrunk + (~data.measured) * followed[..., : fitted.measured]
            reference = dynamics.control_level[data.context]
            base = dynamics._signal(reference)
            interval = np.diff(data.times, prepend=0.0)
            nodes, gamma = len(fitted.nodes), float(dynamics.decay.median())
            before = remembered = torch.zeros_like(base)  # (S, R)
            table = data.observed.new_zeros(nodes, len(dynamics.regulators))
            for number, length in enumerate(interval):
                level = reference * torch.exp(followed[number])
                function = data.acts(data.spread_out(self.delay)).effects(self.last, dynamics.activation_fold).function
                now = dynamics._signal(level if function is None else level * function) - base
                weight = now.new_zeros(len(now), nodes)
                weight[:, : fitted.measured] = data.weight[number] / (data.variance[number] + data.control_variance)
                remembered = torch.lerp((now + before) / 2, remembered, math.exp(-gamma * length))
                table += weight.T @ remembered**2
                before = now
            slope = 0.25 if dynamics.kinetics != "multiplicative" else 1.0
            information = slope * table[dynamics.target, dynamics.source]
            usual = information[information > 0]
            middle = usual.median() if len(usual) else torch.ones(())
            fitted.information.copy_(torch.where(information > 1e-3 * middle, information, middle))
        self.price = fitted.information.sqrt() * (1 - self.options.prior_strength * fitted.prior)

    def run(self) -> Tensor:
        fitted, options, dynamics, data = self.fitted, self.options, self.fitted.dynamics, self.data
        turnover = _Turnover(len(fitted.nodes), options.turnover == "genes").to(dynamics.weight.dtype)
        self.turnover = turnover
        self.raw_delay = nn.Parameter(self.delay / self.scale, requires_grad=options.delays is not None)
        kinetic: list[Tensor] = [dynamics.bias, dynamics.weight, fitted.strength, fitted.own]
        for parameter in kinetic:
            parameter.requires_grad_(True)
        parametrize.register_parametrization(dynamics, "raw_decay", turnover, unsafe=True)
        timing: list[Tensor] = [self.raw_delay] if options.delays else []
        timing += (
            [] if options.turnover == "fixed" else [turnover.unit, *([turnover.own] if options.turnover == "genes" else [])]
        )
        # noise of an interval's start dies out by its end, which looks like a fast turnover: time is told by rollouts alone
        self._descend("shooting", kinetic, [], options.shooting_steps, options.lr, lambda: data.shooting(self._delays()))
        self._descend("rollout", kinetic, timing, options.rollout_steps, options.lr / 3, self._rollout_loss)
        parametrize.remove_parametrizations(dynamics, "raw_decay", leave_parametrized=True)
        (slope,) = torch.autograd.grad(self._rollout_loss(), dynamics.weight)
        chance = fitted.posterior(slope, options.prior_strength)
        with torch.no_grad():
            fitted.probability.copy_(chance)
            fitted.estimate.copy_(chance * dynamics.weight)
            dynamics.weight[dynamics.weight.abs() * fitted.information.sqrt() <= ABSENT] = 0
        for parameter in fitted.parameters():
            parameter.requires_grad_(False)
            if not bool(torch.isfinite(parameter).all()):
                raise PerturbZooError("time course fit: the parameters are no longer finite; lower lr, or raise penalty")
        return self.raw_delay.detach() * self.scale

    def _delays(self) -> Tensor:
        return self.data.spread_out(self.raw_delay * self.scale)

    def _descend(
        self, stage: str, kinetic: list[Tensor], timing: list[Tensor], steps: int, lr: float, loss: Callable[[], Tensor]
    ) -> None:
        if not steps:
            return
        groups: list[dict[str, Any]] = [{"params": kinetic}, *([{"params": timing, "lr": 3 * lr}] if timing else [])]
        optimizer = torch.optim.Adam(groups, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lr / 30)
        for step in range(steps):
            optimizer.zero_grad()
            with parametrize.cached():
                total = loss() + self._penalties()
            total.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                # before the start all are controls, and what sets in after the last time is never seen
                self.raw_delay.clamp_(-0.4, self.last / self.scale)
            if self.report is not None:
                self.report(stage, step, float(total.detach()))

    def _penalties(self) -> Tensor:
        fitted, dynamics = self.fitted, self.fitted.dynamics
        total = self.options.penalty * (self.price * torch.sqrt(dynamics.weight**2 + SMOOTH**2)).sum()
        usual = torch.tensor([USUAL_STRENGTH.get(kind, 0.0) for _, kind in fitted.acts], dtype=total.dtype)
        tight = torch.tensor([1.0 if kind == "knockout" else 0.05 for _, kind in fitted.acts], dtype=total.dtype)
        total = total + 0.5 * (tight * (fitted.strength - usual) ** 2).sum() + 0.005 * ((fitted.own - NO_DECAY) ** 2).sum()
        return total + 2 * dynamics.bias.square().sum() + self.turnover.cost()

    def _rollout_loss(self) -> Tensor:
        data = self.data
        followed = data.rollout(self._delays())[..., : self.fitted.measured]
        gap = (data.observed - followed).square() * data.weight / (data.variance + data.control_variance)
        total = 0.5 * gap.sum()
        if self.snapshots is None:
            return total
        divergence = self._divergence(followed)
        if self.usual is None:
            self.usual = max(float(divergence.detach()), 1e-12)
        count = float(data.weight.sum()) * self.fitted.measured
        return total + self.options.snapshot_weight * 0.5 * count * divergence / self.usual

    def _divergence(self, followed: Tensor) -> Tensor:
        """Mean over a few series and times: control cells moved by the flow's ratios, against the cells that were seen."""
        assert self.snapshots is not None
        cells, controls = self.snapshots.cells, self.snapshots.controls
        held = [(t, s) for t, line in enumerate(cells) for s, part in enumerate(line) if part is not None and len(part) > 1]
        if not held:
            raise PerturbZooError("time course fit: no snapshot has two cells")
        moved, seen = [], []
        for number in torch.randperm(len(held))[:PAIRS].tolist():
            t, s = held[number]
            there = torch.as_tensor(cells[t][s], dtype=followed.dtype)
            here = torch.as_tensor(controls[int(self.data.context[s])], dtype=followed.dtype)
            drawn = here[torch.randint(len(here), (ENSEMBLE,))]
            moved.append(torch.log1p(torch.expm1(drawn) * torch.exp(followed[t, s])))
            seen.append(there[torch.randint(len(there), (ENSEMBLE,))])
        return sinkhorn_divergence(torch.stack(moved), torch.stack(seen), self.blur, steps=30).mean()
