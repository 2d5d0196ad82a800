r"""Time courses: pseudobulks at several times after the interventions, and the kinetics that follow them.

A steady state tells ratios of rates; a course tells rates, and when each act set in. With :math:`z_{ct}` the log of the levels of
condition c at time t over those of the controls, and :math:`\Phi` the flow of :mod:`perturbzoo.grn.dynamics`:

1. *multiple shooting*: each interval starts at the **observed** levels, shrunk towards control by their error, and is followed to
   the next time, :math:`\hat z_{t'} = \Phi_{t \to t'}(\tilde z_t)`. Errors of both ends count: what is wrong at the start has
   decayed by :math:`e^{-\gamma (t' - t)}` at the end.
2. *rollout*: :math:`\hat z_t = \Phi_{0 \to t}(0)` from the controls on, so that noise of levels is no longer taken for a state.

**What is identified.** The levels' scale is the controls' (the kinetics are anchored, so :math:`v = \gamma m / f(m)` follows). The time
unit, one factor of all :math:`\gamma`, shows in how fast changes build up, and each gene's own :math:`\gamma` where it moves; a
weak prior holds the rest to the common one. A delay and a slow turnover both make changes late; they differ in shape, and
three times or more after the onset tell them apart. Without delays measured times count from the onsets in the conditions' names.

Cells of different times are different cells. Where the course of the mean is not all that they show, their distributions can be
compared: control cells, each moved by the flow's ratio, against the cells at t, by :mod:`perturbzoo.grn.transport`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.grn.fitted import EncodedConditions, FittedNetwork
from perturbzoo.grn.interventions import Interventions
from perturbzoo.grn.levels import Levels
from perturbzoo.grn.solvers import integrate
from perturbzoo.perturbation import Condition

STEP, RAMP = 0.2, 0.1  # lifetimes: step of the integration, and within which acts set in
# steps do not stop at the many onsets: a gate is drawn straight between them, which widens it by a variance of STEP² / 6; taken off
# the gate's own, π² RAMP² / 3, onsets are right to a thousandth of a lifetime
GATE = math.sqrt(RAMP**2 - STEP**2 / (2 * math.pi**2))


@dataclass(frozen=True, eq=False)
class TimeCourse:
    """Levels by condition, context and time.

    Attributes
    ----------
    levels
        A row for each condition, context and time; controls are at rest and have no time.
    time
        Shape ``(N,)``: when each row was measured, >= 0, in any unit. Time 0 is the last moment at which all are controls.
    """

    levels: Levels
    time: np.ndarray

    def __post_init__(self) -> None:
        time = np.asarray(self.time, dtype=float)
        object.__setattr__(self, "time", time)
        if time.shape != (len(self.levels.conditions),):
            raise PerturbZooError(f"time course: {len(self.levels.conditions)} rows, but times of shape {time.shape}")
        if not (np.isfinite(time) & (time >= 0)).all():
            raise PerturbZooError(
                f"time course: times must be finite and count from 0, when the cells were controls: {shortened(map(str, time))}"
            )
        for key, rows in self._rows.items():
            moments = time[rows]
            if len(rows) < 2:
                raise PerturbZooError(
                    f"time course: condition '{key[0]}' was measured at one time ({moments[0]:g}); two at least make a course"
                )
            if not (np.diff(moments) > 0).all():
                raise PerturbZooError(
                    f"time course: times of condition '{key[0]}' must increase, each once: {shortened(map('{:g}'.format, moments))}"
                )

    @cached_property
    def _rows(self) -> dict[tuple[Condition, int], list[int]]:
        found: dict[tuple[Condition, int], list[int]] = {}
        for row, key in enumerate(zip(self.levels.conditions, self.levels.context.tolist(), strict=True)):
            found.setdefault(key, []).append(row)
        return found

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Condition of each of the S series."""
        return tuple(condition for condition, _ in self._rows)

    @property
    def context(self) -> np.ndarray:
        """Shape ``(S,)``: context of each series."""
        return np.array([context for _, context in self._rows], dtype=np.int64)

    @property
    def times(self) -> np.ndarray:
        """Shape ``(T,)``: all times at which anything was measured."""
        return np.unique(self.time)

    @property
    def row(self) -> np.ndarray:
        """Shape ``(T, S)``: row of each series at each time, -1 where it was not measured."""
        table = np.full((len(self.times), len(self._rows)), -1)
        for number, rows in enumerate(self._rows.values()):
            table[np.searchsorted(self.times, self.time[rows]), number] = rows
        return table

    def with_noise(self, rng: np.random.Generator) -> TimeCourse:
        """As :meth:`perturbzoo.grn.levels.Levels.with_noise`."""
        return replace(self, levels=self.levels.with_noise(rng))

    def last(self) -> Levels:
        """The last level of each series, as the steady state that a fit starts from."""
        return self.levels.select(np.array([rows[-1] for rows in self._rows.values()]))

    @classmethod
    def from_cells(
        cls,
        expression: sparse.csr_matrix,
        genes: Sequence[str],
        conditions: Sequence[Condition],
        condition: np.ndarray,
        context: np.ndarray,
        time: np.ndarray,
        *,
        unit: float | None,
        default_kind: str,
        replicate_error: float = 0.02,
    ) -> TimeCourse:
        """Average cells; the controls' over all times.

        Parameters
        ----------
        expression
            Shape ``(cells, G)``, CSR, log1p-normalised.
        conditions
            The distinct conditions, control among them.
        condition, context, time
            Shape ``(cells,)``: index into `conditions`, index of the context, and when the cell was measured.
        unit, default_kind, replicate_error
            As in :meth:`perturbzoo.grn.levels.Levels.from_cells`.

        Raises
        ------
        PerturbZooError
            A context has no controls, a perturbed cell no time, or a condition fewer than two times.
        """
        control = np.array([one.is_control for one in conditions])[condition]
        if not np.isfinite(time[~control]).all():
            raise PerturbZooError(f"time course: {int((~np.isfinite(time[~control])).sum())} perturbed cells have no time")
        keys = np.stack([condition, context, time], axis=1)[~control]
        distinct, inverse = np.unique(keys, axis=0, return_inverse=True)
        order = np.argsort(inverse.ravel(), kind="stable")
        members = np.split(np.flatnonzero(~control)[order], np.cumsum(np.bincount(inverse.ravel()))[:-1])
        levels = Levels.from_cells(
            expression,
            genes,
            [conditions[int(number)] for number in distinct[:, 0]],
            distinct[:, 1].astype(np.int64),
            members,
            [np.flatnonzero(control & (context == number)) for number in range(int(context.max()) + 1)],
            unit=unit,
            default_kind=default_kind,
            replicate_error=replicate_error,
        )
        return cls(levels, distinct[:, 2])


@dataclass(frozen=True)
class Onsets:
    """When acts set in later than their conditions say: `delay` and its standard `error`, ``(D,)``, of D conditions or targets.

    `misfit` is the mean squared residual in standard errors; where it is above 1 the errors have been widened by its root.
    """

    name: tuple[str, ...]
    delay: np.ndarray
    error: np.ndarray
    misfit: float


class Course:
    """A time course as tensors, beside the network whose flow follows it; what the fits below share."""

    def __init__(self, course: TimeCourse, fitted: FittedNetwork, delays: Literal["condition", "target"] | None) -> None:
        levels, self.fitted, self.times = course.levels, fitted, course.times
        if levels.genes != fitted.nodes[: fitted.measured]:
            raise PerturbZooError("time course: its genes are not those of the network, in their order")
        if len(levels.control) != len(fitted.dynamics.control_level):
            raise PerturbZooError("time course: its contexts are not those of the network")
        dtype = fitted.dynamics.weight.dtype
        row = course.row
        table = torch.as_tensor
        self.context = table(course.context)
        self.encoded = fitted.encode(course.conditions)
        self.measured = table(row >= 0)[..., None]  # (T, S, 1)
        spread = levels.error[row] ** 2
        self.observed = table(levels.change[row], dtype=dtype) * self.measured  # (T, S, G)
        self.variance = table(spread, dtype=dtype)
        self.control_variance = table(levels.control_error[course.context] ** 2, dtype=dtype)  # (S, G)
        self.weight = table(levels.weight[row].copy(), dtype=dtype)[..., None] * self.measured
        # of each series and time, how much of its changes is more than noise
        signal = (self.observed**2 - self.variance).mean(-1, keepdim=True).clamp(min=1e-4)
        self.shrunk = self.observed * signal / (signal + self.variance)
        present = self.encoded.given.targets >= 0
        if delays == "target":
            names = sorted({act.target for condition in course.conditions for act in condition})
            number = {name: place for place, name in enumerate(names)}
            place = {node: number.get(name, 0) for node, name in enumerate(fitted.nodes)}
            self.who = self.encoded.given.targets.clone()
            self.who[present] = torch.tensor([place[node] for node in self.who[present].tolist()], dtype=torch.int64)
        else:
            names = [str(condition) for condition in course.conditions]
            self.who = torch.arange(len(names))[:, None].expand_as(present)
        self.names, self.present = tuple(names), present

    @property
    def lifetime(self) -> float:
        return 1 / float(self.fitted.dynamics.decay.detach().median())

    def acts(self, delay: Tensor) -> Interventions:
        """Acts of each series, `delay` ``(S, K)`` later than their condition says."""
        given = self.encoded.given
        later = replace(given, onset=given.onset + delay, offset=given.offset + delay, ramp=GATE * self.lifetime)
        return self.fitted.interventions(EncodedConditions(later, self.encoded.place))

    def rollout(self, delay: Tensor) -> Tensor:
        """Log levels over the controls', ``(T, S, nodes)``, from rest at time 0 on."""
        acts, reference = self.acts(delay), self.fitted.dynamics.control_level[self.context]
        points = [0.0, *self.times.tolist()] if self.times[0] > 0 else self.times.tolist()
        rates = self.fitted.dynamics.bind(acts, self.context)
        states = integrate(rates, reference, points, step=STEP * self.lifetime, knots=())
        return torch.log(states[len(points) - len(self.times) :] / reference)

    def residual(self, delay: Tensor) -> Tensor:
        """Observed less followed changes, in standard errors, ``(T, S, G)``; 0 where nothing was measured."""
        gap = self.observed - self.rollout(delay)[..., : self.fitted.measured]
        return gap * (self.weight / (self.variance + self.control_variance)).sqrt()

    def shooting(self, delay: Tensor) -> Tensor:
        """Half the sum of squared residuals of all intervals, each from its observed start."""
        dynamics, g = self.fitted.dynamics, self.fitted.measured
        reference = dynamics.control_level[self.context]
        rates = dynamics.bind(self.acts(delay), self.context)
        gamma = dynamics.decay.detach()[:g]
        state, before, began = reference, torch.zeros_like(self.control_variance), 0.0
        total = reference.new_zeros(())
        for number, moment in enumerate(self.times.tolist()):
            if moment > began:
                state = integrate(rates, state, [began, moment], step=STEP * self.lifetime, knots=())[-1]
            z = torch.log(state / reference)[:, :g]
            observed, variance = self.observed[number], self.variance[number] + self.control_variance
            # a start's error, as it is left at the end of the interval; a log level's grows where the level has fallen
            left = before * torch.exp(-2 * gamma * (moment - began))
            total = total + 0.5 * (self.weight[number] * (observed - z) ** 2 / (variance + left)).sum()
            here = self.measured[number]
            known = reference[:, :g] * torch.exp(self.shrunk[number])
            # nodes that nobody measures, and series without cells at this time, go on where they are
            state = torch.cat([torch.where(here, known, state[:, :g]), state[:, g:]], dim=1)
            before, began = torch.where(here, self.variance[number], left), moment
        return total

    def tried(self, candidates: Tensor) -> Tensor:
        """Half the squared residuals of each series with each delay ``(D,)``, ``(D, S)``."""
        with torch.no_grad():
            each = [self.residual(one.expand(self.who.shape)) for one in candidates]
            return torch.stack([0.5 * one.square().sum((0, 2)) for one in each])

    def gather(self, of_series: Tensor) -> Tensor:
        """Values of series ``(S,)`` as values of what has a delay, ``(D,)``; means where several series share it."""
        where = self.who[self.present]
        values = of_series[:, None].expand_as(self.who)[self.present]
        total = of_series.new_zeros(len(self.names)).index_add(0, where, values)
        return total / torch.bincount(where, minlength=len(self.names)).clamp(min=1)

    def spread_out(self, delay: Tensor) -> Tensor:
        """``(D,)`` to ``(S, K)``."""
        return delay[self.who.clamp(min=0)]


def fit_onset(
    fitted: FittedNetwork,
    course: TimeCourse,
    *,
    of: Literal["condition", "target"] = "condition",
    start: Tensor | None = None,
    strengths_known: bool = False,
    unit_known: bool = False,
    steps: int = 12,
) -> Onsets:
    """Recover when acts set in, the kinetics given: from a coarse grid, by damped Gauss-Newton steps along the gradient.

    Parameters
    ----------
    fitted
        A fitted network, or a true one. Its time unit is that of the course.
    course
        The data.
    of
        A delay of each condition and context, or of each target wherever it is perturbed.
    start
        Shape ``(D,)``: where to start; None: the best of twenty delays up to the last time.
    strengths_known, unit_known
        Count the guides' strengths, and the time unit, as known: else the standard errors allow for their being estimates from
        the same data.

    Raises
    ------
    PerturbZooError
        The course is of other genes or contexts.
    """
    data = Course(course, fitted, of)
    last, unit = float(course.times[-1]), data.lifetime
    if start is None:
        candidates = torch.linspace(0, last, 21, dtype=data.observed.dtype)[:-1]
        start = data.gather(candidates[data.tried(candidates).argmin(0)])
    delay = start.detach().clone()
    width, damping = 0.02 * unit, 1e-3
    hessian, loss = torch.eye(len(delay), dtype=delay.dtype), math.inf
    tested, accepted = delay, delay
    for _ in range(steps):
        moved = tested.clone().requires_grad_()
        value = 0.5 * data.residual(data.spread_out(moved)).square().sum()
        reached = float(value.detach())
        if reached <= loss:
            (gradient,) = torch.autograd.grad(value, moved)
            gained, loss, accepted, damping = loss - reached, reached, tested, damping / 4
            hessian = _curvature(data, accepted, width)
            if gained < 1e-7 * (1 + loss):
                break
        else:
            damping *= 16
        # a delay that the data do not show stays where it is
        size = hessian + torch.diag(damping * hessian.diagonal() + 1e-6 / unit**2)
        step = torch.linalg.solve(size, gradient).clamp(-0.5 * unit, 0.5 * unit)
        tested = (accepted - step).clamp(-4 * RAMP * unit, last)
    known = hessian.diagonal() > 1e-6 / unit**2
    whole = _curvature(data, accepted, width, strengths=not strengths_known, unit=not unit_known).double()
    covariance = torch.linalg.pinv(whole, hermitian=True).diagonal()[: len(delay)]
    misfit = 2 * loss / max(float(data.weight.sum()) * fitted.measured - len(delay), 1.0)
    error = torch.where(known, covariance.clamp(min=0).sqrt(), math.inf) * math.sqrt(max(misfit, 1.0))
    return Onsets(data.names, accepted.double().numpy(), error.numpy(), misfit)


def _curvature(data: Course, delay: Tensor, width: float, *, strengths: bool = False, unit: bool = False) -> Tensor:
    """Gauss-Newton curvature, by central differences of the residuals with each act's onset.

    Of the D delays; then, where asked for, of the strengths of each series' acts, all moved together, and of log γ of all genes.
    """
    dynamics, count, series = data.fitted.dynamics, len(delay), len(data.who)
    base = data.spread_out(delay)

    def slope_of(parameter: Tensor, there: Tensor, back: Tensor, size: float) -> Tensor:
        """Slope of the residuals as a parameter goes from `back` to `there`, which are `size` apart."""
        kept, ends = parameter.data, []
        for value in (there, back):
            parameter.data = value
            ends.append(data.residual(base))
        parameter.data = kept
        return (ends[0] - ends[1]) / size

    slopes: list[tuple[Tensor, Tensor]] = []  # of the residuals (T, S, G), and of which parameter in each series (S,)
    with torch.no_grad():
        for column in range(base.shape[1]):
            shift = torch.zeros_like(base)
            shift[:, column] = width
            slope = (data.residual(base + shift) - data.residual(base - shift)) / (2 * width)
            slopes.append((slope * data.present[:, column, None], data.who[:, column].clamp(min=0)))
        if strengths:
            value = data.fitted.strength.data
            slope = slope_of(data.fitted.strength, value + 0.05, value - 0.05, 0.1)
            slopes.append((slope, count + torch.arange(series)))
        if unit:
            gamma = dynamics.decay
            slope = slope_of(
                dynamics.raw_decay, inverse_softplus(gamma * 1.02), inverse_softplus(gamma / 1.02), 2 * math.log(1.02)
            )
            slopes.append((slope, torch.full((series,), count + series * strengths)))
        size = count + series * strengths + unit
        found = base.new_zeros(size, size)
        for first, one in slopes:
            for second, other in slopes:
                found.index_put_((one, other), (first * second).sum((0, 2)), accumulate=True)
    return found


def inverse_softplus(values: Tensor) -> Tensor:
    """``softplus(inverse_softplus(values)) == values`` for values > 0."""
    return values + torch.log(-torch.expm1(-values))
