"""Steady states of systems of production and decay, with gradients by the implicit function theorem.

A system is what :mod:`perturbzoo.grn.solvers` integrates: ``rates(time, state) -> (production, decay)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn.solvers import Rates, named_entry, require_finite

HISTORY = 8  # residuals that Anderson's mixing combines
MIXED_STEPS, FLOW_STEPS = 40, 60  # turns of mixing and of plain damped iteration, until one arrives
DAMPING = (0.5, 0.5, 0.25, 0.5, 0.1)  # of turn after turn: what oscillates in large steps may rest in small ones


def steady_state(
    rates: Rates,
    initial: Tensor,
    *,
    time: float = math.inf,
    tolerance: float | None = None,
    flow_steps: int = 20,
    max_steps: int = 2000,
    unstable: Literal["error", "keep"] = "error",
) -> Tensor:
    r"""Solve :math:`x^* = F(x^*)`, :math:`F = P / D`, with gradients by the implicit function theorem.

    The system first follows its flow for a few exponential steps of one lifetime, so that the basin is that of `initial`;
    then Anderson's mixing (Walker and Ni 2011, SIAM J. Numer. Anal. 49:1715) finishes, each row on its own, and where
    it does not arrive, it takes turns with a damped iteration that stays close to the flow. The backward pass solves
    :math:`(I - J_F^\top) \lambda = v` by GMRES, each row on its own, and keeps nothing of the iterations. Gradients go to
    whatever `rates` depends on, not to `initial`, and once only (no double backward). A state that small disturbances leave
    for ever is no answer to "where does the cell settle": whether they die out is checked by following one for a while.

    Parameters
    ----------
    rates, initial
        The system, and where to start, shape ``(..., S)``, >= 0.
    time
        When; infinity is the far future: acts that end are over, those that last are on.
    tolerance
        Of ``|F(x) - x|`` relative to ``|x|`` plus the row's mean. None: 1e-5 for float32, 1e-10 for float64.
    flow_steps, max_steps
        Steps along the flow, and of the iteration before it is given up.
    unstable
        What becomes of unstable steady states, around which the system oscillates, or from which it switches to another.

    Raises
    ------
    PerturbZooError
        No steady state was reached, or an unstable one: says in which row, of which entry, and what to do.
    """
    moment = torch.as_tensor(time, dtype=initial.dtype, device=initial.device)
    precision = tolerance or (1e-5 if initial.dtype == torch.float32 else 1e-10)
    require_finite(rates, initial[None], moment[None], "the initial state", "give finite levels of at least 0")

    def mapped(state: Tensor) -> Tensor:
        production, decay = rates(moment, state)
        return production / decay

    with torch.no_grad():
        state = initial.clamp(min=0)
        # mixing may land on an unstable state near the flow's way: then follow the flow for long, and try again from there
        for steps, share in ((flow_steps, 1 - math.exp(-1.0)), (400, 0.25)):
            for _ in range(steps):
                state = torch.lerp(state, mapped(state), share)
            solved, error = _fixed_point(mapped, state, precision, max_steps)
            if unstable == "keep" or not bool((error <= 1).all()):
                break
            growth, moving = _growth(rates, moment, solved)
            if not bool((growth > 1).any()):
                break
        else:
            raise PerturbZooError(
                f"unstable dynamics: around the steady state {named_entry(rates, moving * (growth == growth.max()))} moves away, "
                "oscillating or switching; weaken its feedback, integrate in time, or pass unstable='keep'"
            )
    if not bool((error <= 1).all()):
        worst = torch.nan_to_num(error, nan=math.inf)
        raise PerturbZooError(
            f"no steady state after {max_steps} steps, worst in {named_entry(rates, worst)} (residual {float(worst.max()):.2g} "
            "times the tolerance): it may oscillate or switch; integrate in time instead, weaken its feedback, or raise max_steps"
        )
    if not torch.is_grad_enabled():
        return solved
    result = mapped(solved)
    if not result.requires_grad:
        return solved
    anchor = solved.detach().requires_grad_()
    again = mapped(anchor)

    def adjoint(upstream: Tensor | None) -> Tensor | None:
        if upstream is None:
            return None

        def pulled(vector: Tensor) -> Tensor:
            return vector - torch.autograd.grad(again, anchor, vector, retain_graph=True)[0]

        answer, gap = gmres(pulled, upstream, precision)
        if not bool((gap <= 1).all()):
            raise PerturbZooError(
                f"the gradient of the steady state cannot be solved in {named_entry(rates, gap)}: the state is at the edge of "
                "stability, where a small change moves it far; weaken the feedback, or differentiate an integration instead"
            )
        return answer

    if again.requires_grad:
        result.register_hook(adjoint)
    # the value is the solution itself; one more application of F only carries the gradient
    return result + (solved - result).detach()


def _fixed_point(mapped: Callable[[Tensor], Tensor], start: Tensor, precision: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """Iterate until ``|F(x) - x|`` is within the precision; return x, and the residual in units of the precision."""

    def residual(state: Tensor, image: Tensor) -> Tensor:
        size = state.abs()
        return (image - state).abs() / (precision * (size + size.mean(-1, keepdim=True)) + 1e-30)

    state = flow = start
    image = mapped(state)
    best, best_error = state, residual(state, image)
    states: list[Tensor] = []
    steps: list[Tensor] = []
    for number in range(max_steps):
        error = residual(state, image)
        better = error.amax(-1, keepdim=True) <= best_error.amax(-1, keepdim=True)
        best, best_error = torch.where(better, state, best), torch.where(better, error, best_error)
        if bool((best_error <= 1).all()):
            break
        turn = number % (MIXED_STEPS + FLOW_STEPS)
        if turn < MIXED_STEPS:
            if turn == 0:
                flow, states, steps = state, [], []
            states, steps = [*states[-HISTORY:], state], [*steps[-HISTORY:], image - state]
            state = _anderson(states, steps).clamp(min=0)
        else:
            # mixing did not arrive: follow the flow from where it was left, and mix again from there
            if turn == MIXED_STEPS:
                state, image = flow, mapped(flow)
            state = torch.lerp(state, image, DAMPING[number // (MIXED_STEPS + FLOW_STEPS) % len(DAMPING)])
        image = mapped(state)
    return best, best_error


def _growth(rates: Rates, moment: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """By how much a small disturbance grows in a step of the flow, ``(..., 1)``, and where it is largest, ``(..., S)``.

    Steps that are too long for a stiff, stable feedback seem to make it grow: what grows is looked at again in short ones.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(state.shape, generator=generator, dtype=torch.float64).to(state)
    small = 3e-3 if state.dtype == torch.float32 else 1e-6
    production, decay = rates(moment, state)
    growth, direction = torch.zeros_like(state[..., :1]), start
    for length, count in ((0.25, 120), (0.04, 400)):
        gain = -torch.expm1(-decay * length / decay.median())
        rest = torch.lerp(state, production / decay, gain)
        size = (state + state.mean(-1, keepdim=True)).clamp(min=torch.finfo(state.dtype).tiny)
        direction, logarithm = start, torch.zeros_like(growth)
        for number in range(count):
            direction = direction / (direction / size).norm(dim=-1, keepdim=True).clamp(min=1e-30)
            near = (state + small * direction).clamp(min=0)
            made, decay_near = rates(moment, near)
            direction = (torch.lerp(near, made / decay_near, gain) - rest) / small
            if number >= count // 2:
                logarithm = logarithm + (direction / size).norm(dim=-1, keepdim=True).clamp(min=1e-30).log()
        # a thousandth per step is within the error of so short a look
        growth = torch.exp(logarithm / (count - count // 2)) - 1e-3
        if not bool((growth > 1).any()):
            break
    return growth, (direction / size).abs()


def _anderson(states: list[Tensor], steps: list[Tensor]) -> Tensor:
    """Combine the last states so that the combined residual is least, each row on its own; mix half of it in."""
    latest = torch.lerp(states[-1], states[-1] + steps[-1], 0.5)
    if len(states) < 2:
        return latest
    d_step = torch.stack([after - before for before, after in itertools.pairwise(steps)], dim=-1)  # (..., S, m)
    d_state = torch.stack([after - before for before, after in itertools.pairwise(states)], dim=-1)
    # least squares by QR; differences of a converged row are rounding errors, which the pseudo-inverse leaves out
    q, r = torch.linalg.qr(d_step)
    weights = torch.linalg.pinv(r, rtol=1e2 * torch.finfo(r.dtype).eps) @ (q.mT @ steps[-1][..., None])  # (..., m, 1)
    return latest - ((d_state + 0.5 * d_step) @ weights)[..., 0]


def gmres(
    operator: Callable[[Tensor], Tensor], wanted: Tensor, precision: float, size: int = 20, restarts: int = 50
) -> tuple[Tensor, Tensor]:
    """Solve ``operator(x) = wanted`` for many rows at once, each with its own Krylov space (Saad and Schultz 1986).

    Returns x, and the norm of each row's residual relative to that of `wanted`, in units of the precision, ``(..., 1)``.
    """
    scale = wanted.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(wanted.dtype).tiny
    answer, left = torch.zeros_like(wanted), wanted
    gap = torch.ones_like(scale)
    for _ in range(restarts):
        norm = left.norm(dim=-1, keepdim=True)
        gap = norm / (precision * scale + tiny)
        if bool((gap <= 1).all()):
            break
        basis = [left / (norm + tiny)]
        table = wanted.new_zeros(*wanted.shape[:-1], size + 1, size)
        for column in range(size):
            vector = operator(basis[-1])
            for row, known in enumerate(basis):
                share = (vector * known).sum(-1, keepdim=True)
                table[..., row, column] = share[..., 0]
                vector = vector - share * known
            length = vector.norm(dim=-1, keepdim=True)
            table[..., column + 1, column] = length[..., 0]
            basis.append(torch.where(length > 1e-30, vector / (length + tiny), torch.zeros_like(vector)))
        goal = wanted.new_zeros(*wanted.shape[:-1], size + 1, 1, dtype=torch.float64)
        goal[..., 0, 0] = norm[..., 0].double()
        # minimum norm: a row that is solved already has an empty Krylov space and takes a step of 0
        weights = (torch.linalg.pinv(table.double(), rtol=1e-13) @ goal)[..., 0].to(wanted.dtype)  # (..., size)
        answer = answer + (torch.stack(basis[:-1], dim=-1) @ weights[..., None])[..., 0]
        left = wanted - operator(answer)
    return answer, gap
