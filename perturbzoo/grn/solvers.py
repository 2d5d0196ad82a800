r"""Integration in time of systems of production and decay.

A system is a callable ``rates(time, state) -> (production, decay)`` for :math:`\dot x = P(t, x) - D(t)\,x` with
:math:`P \ge 0`, :math:`D > 0` of the state's shape ``(..., S)``. Knows nothing of genes beyond the names that a system may carry for
messages (attributes `entries`, S names, and `labels`, names of the rows).

The default step is the exponential Runge-Kutta scheme of second order (Cox and Matthews 2002, J. Comput. Phys. 176:430,
ETD2RK). With :math:`z = D h`:

.. math::

    a &= e^{-z} x_n + (1 - e^{-z})\, P(x_n) / D \\
    x_{n+1} &= a + z\,\varphi_2(z)\,(P(a) - P(x_n)) / D, \qquad \varphi_2(z) = (z - 1 + e^{-z}) / z^2

so that :math:`x_{n+1}` is a weighted mean of :math:`x_n`, :math:`P(x_n) / D` and :math:`P(a) / D` with weights
:math:`e^{-z},\ 1 - e^{-z} - z\varphi_2 \ge 0` and :math:`z\varphi_2 > 0`: at any step a state that starts positive stays so,
and one that starts within its bounds too. Decay is exact, and a stiff decay needs no small steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from perturbzoo.errors import PerturbZooError, near_matches

Rates = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Method = Literal["exponential", "exponential_euler", "rk4", "dopri5", "scipy_solver"]
METHODS = ("exponential", "exponential_euler", "rk4", "dopri5", "scipy_solver")


def phi_1(z: Tensor) -> Tensor:
    """``(1 - exp(-z)) / z`` for z >= 0, exact at 0 too."""
    safe = torch.where(z == 0, torch.ones_like(z), z)
    return torch.where(z == 0, torch.ones_like(z), -torch.expm1(-safe) / safe)


def phi_2(z: Tensor) -> Tensor:
    """``(z - 1 + exp(-z)) / z**2`` for z >= 0; by its series below 0.1, where the difference would cancel."""
    small = z < 0.1
    safe = torch.where(small, torch.ones_like(z), z)
    near = torch.where(small, z, torch.zeros_like(z))
    series = torch.zeros_like(z)
    for power in reversed(range(10)):
        series = series * near + (-1.0) ** power / math.factorial(power + 2)
    return torch.where(small, series, (safe + torch.expm1(-safe)) / safe**2)


def exponential_euler_step(rates: Rates, time: Tensor, state: Tensor, step: Tensor | float) -> Tensor:
    """One step of first order, one evaluation: production held still, decay exact."""
    production, decay = rates(time, state)
    z = decay * step
    return torch.exp(-z) * state + step * phi_1(z) * production


def exponential_step(rates: Rates, time: Tensor, state: Tensor, step: Tensor | float) -> Tensor:
    """One step of second order, two evaluations; z is the integral of the decay over the step, by the trapezoid rule."""
    production, decay = rates(time, state)
    _, decay_after = rates(time + step, state) if getattr(rates, "decay_varies", True) else (None, decay)
    z = 0.5 * (decay + decay_after) * step
    level = production / decay  # where the entry is drawn to now
    first = torch.lerp(level, state, torch.exp(-z))
    later, _ = rates(time + step, first)
    return first + z * phi_2(z) * (later / decay_after - level)


def integrate(
    rates: Rates,
    initial: Tensor,
    times: Tensor | Sequence[float],
    *,
    method: Method = "exponential",
    step: float | None = None,
    knots: Sequence[float] | None = None,
    ramp: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-7,
    checkpoint: bool = False,
    scipy_method: str = "LSODA",
) -> Tensor:
    """Follow the system from ``times[0]`` and return its states at `times`.

    Parameters
    ----------
    rates
        The system.
    initial
        Shape ``(..., S)``, the state at ``times[0]``.
    times
        Shape ``(T,)``, increasing.
    method
        ``"exponential"`` (default: positive, for training and stiff systems), ``"exponential_euler"`` (one evaluation a
        step), torchdiffeq's ``"rk4"`` and ``"dopri5"``, or SciPy's solver as a check, without gradients.
    step
        Largest step of the methods with fixed steps. None: a fifth of the shortest lifetime for rk4, a tenth of the
        median lifetime for the exponential ones.
    knots, ramp
        Moments at which interventions set in or cease, and how long that takes. Steps end there, and are no longer than
        the ramp within four ramps around them; with more than 64 knots, everywhere. None: the system's own.
    rtol, atol
        Tolerances of dopri5 and SciPy.
    checkpoint
        Recompute each interval between two `times` in the backward pass rather than keep it. For the exponential methods.
    scipy_method
        Which of SciPy's solvers.

    Returns
    -------
    Tensor
        Shape ``(T, ..., S)``.

    Raises
    ------
    PerturbZooError
        `times` does not increase, the method is unknown, or the solver failed; says in which row and entry, and what helps.
    """
    if method not in METHODS:
        raise PerturbZooError(
            f"method '{method}' is not known{near_matches(method, METHODS)}; choose one of {', '.join(METHODS)}"
        )
    points = torch.as_tensor(times, dtype=initial.dtype, device=initial.device)
    if points.ndim != 1 or len(points) < 1 or not bool(torch.isfinite(points).all()) or not bool((points.diff() > 0).all()):
        raise PerturbZooError(f"times must be finite and increase, at least one of them: {points.tolist()[:5]}")
    require_finite(rates, initial[None], points[:1], "the initial state", "give finite levels of at least 0")
    if len(points) == 1:
        return initial[None]
    if step is None:
        with torch.no_grad():
            decay = rates(points[0], initial)[1]
        step = float(0.2 / decay.max().clamp(min=1e-12) if method == "rk4" else 0.1 / decay.median().clamp(min=1e-12))
    if not step > 0:
        raise PerturbZooError(f"step {step} must be positive")
    knots = getattr(rates, "knots", ()) if knots is None else knots
    ramp = getattr(rates, "ramp", 0.1) if ramp is None else ramp
    grid = _grid(points.detach().double().tolist(), step, knots, ramp)
    if method.startswith("exponential"):
        advance = exponential_step if method == "exponential" else exponential_euler_step
        states = _march(rates, initial, grid, advance, checkpoint)
    else:
        states = _torchdiffeq(rates, initial, points, grid, method, rtol, atol, scipy_method)
    smaller = f"halve the step ({step:g})" if method in ("rk4", "exponential", "exponential_euler") else "tighten rtol and atol"
    require_finite(
        rates, states, points, f"method '{method}'", f"{smaller}, use method='exponential', or look for NaN parameters"
    )
    return states


def _grid(times: list[float], step: float, knots: Sequence[float], ramp: float) -> list[list[float]]:
    """For each interval between two times, the moments to stop at, both ends included."""
    inside = sorted(knot for knot in knots if times[0] - 4 * ramp < knot < times[-1] + 4 * ramp)
    if len(inside) > 64:
        inside, step = [], min(step, ramp)
    grid = []
    for start, stop in itertools.pairwise(times):
        marks = sorted({start, stop, *(m for k in inside for m in (k - 4 * ramp, k, k + 4 * ramp) if start < m < stop)})
        stops = [start]
        for low, high in itertools.pairwise(marks):
            near = any(low < knot + 4 * ramp and high > knot - 4 * ramp for knot in inside)
            count = max(1, math.ceil((high - low) / (min(step, ramp) if near else step) - 1e-9))
            stops += [low + (high - low) * number / count for number in range(1, count)] + [high]
        grid.append(stops)
    return grid


def _march(rates: Rates, initial: Tensor, grid: list[list[float]], advance: Callable[..., Tensor], checkpoint: bool) -> Tensor:
    def cross(state: Tensor, stops: list[float]) -> Tensor:
        for low, high in itertools.pairwise(stops):
            state = advance(rates, state.new_tensor(low), state, high - low)
        return state

    states = [initial]
    for stops in grid:
        last = states[-1]
        states.append(recompute(cross, last, stops, use_reentrant=False) if checkpoint else cross(last, stops))
    return torch.stack(states)


def _torchdiffeq(
    rates: Rates, initial: Tensor, points: Tensor, grid: list[list[float]], method: str, rtol: float, atol: float, scipy: str
) -> Tensor:
    from torchdiffeq import odeint

    def derivative(time: Tensor, state: Tensor) -> Tensor:
        production, decay = rates(time, state)
        return production - decay * state

    options: dict[str, Any] = {}
    moments, wanted = points, torch.arange(len(points), device=points.device)
    if method == "rk4":
        flat = [grid[0][0], *(moment for stops in grid for moment in stops[1:])]
        ends = torch.tensor([0, *(len(stops) - 1 for stops in grid)]).cumsum(0)
        moments, wanted = points.new_tensor(flat), ends.to(points.device)
        options["grid_constructor"] = lambda func, y0, t: moments
    elif method == "dopri5":
        # the first step must see the first act; its own guess comes from the derivative at the start, which may be 0
        options["first_step"] = points.new_tensor(grid[0][1] - grid[0][0])
        jumps = sorted({moment for stops in grid for moment in stops[1:-1]})
        options["step_t"] = points.new_tensor(jumps) if 0 < len(jumps) <= 256 else None
    else:
        options["solver"] = scipy
    try:
        states = odeint(derivative, initial, moments, method=method, rtol=rtol, atol=atol, options=options)
    except (AssertionError, RuntimeError, ValueError) as error:
        with torch.no_grad():
            production, decay = rates(points[0], initial)
        where = named_entry(rates, (production - decay * initial).abs() * decay)
        raise PerturbZooError(
            f"method '{method}' failed ({str(error).strip().splitlines()[0] if str(error) else type(error).__name__}); the "
            f"stiffest at the start is {where}: use method='exponential', or loosen rtol ({rtol:g}) and atol ({atol:g})"
        ) from error
    return states[wanted]


def require_finite(rates: Rates, states: Tensor, times: Tensor, what: str, help_: str) -> None:
    """Raise where a state, ``(T, ..., S)``, is NaN or infinite, naming the first time and where."""
    finite = torch.isfinite(states)
    if bool(finite.all()):
        return
    moment = int((~finite).flatten(1).any(1).nonzero()[0])
    where = named_entry(rates, (~finite[moment]).to(torch.float32))
    raise PerturbZooError(f"{what}: not finite at time {float(times[moment]):g} in {where}; {help_}")


def named_entry(rates: Rates, size: Tensor) -> str:
    """Name the row and entry of the largest value of `size`, shape ``(..., S)``."""
    flat = int(torch.nan_to_num(size, nan=math.inf).flatten().argmax())
    row, entry = divmod(flat, size.shape[-1])
    labels, entries = getattr(rates, "labels", ()), getattr(rates, "entries", ())
    named = entries[entry] if len(entries) > entry else f"entry {entry}"
    if size.ndim == 1:
        return named
    return f"{named} of condition '{labels[row]}'" if len(labels) > row else f"{named} of row {row}"
