r"""Cells that follow the chemical Langevin equation of a network, and the levels and steady states they scatter around.

Called by :mod:`perturbzoo.simulate.screen`; knows nothing of counts, guides or files. The work comes in chunks of cells, each with
random numbers of its own, so that the result does not depend on how many threads share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from perturbzoo.grn import Interventions, RegulatoryDynamics, integrate

Result = TypeVar("Result")
Grid = list[tuple[float, float, int]]

CHUNK_VALUES = 1 << 17  # entries of the state that move together: few enough to stay in the processor's cache
PUSH = 1e-3  # relative push off a steady state, from which only stable ones are come back to


def time_grid(times: Sequence[float], step: float, start: float = 0.0) -> Grid:
    """Steps as (time, length, index of the harvest that follows or -1); none is longer than `step`."""
    grid = []
    for number, stop in enumerate(times):
        count = max(1, math.ceil((stop - start) / step - 1e-9))
        length = (stop - start) / count
        grid += [(start + length * index, length, number if index == count - 1 else -1) for index in range(count)]
        start = stop
    return grid


def follow_cells(
    dynamics: RegulatoryDynamics,
    acts: Interventions,
    context: Tensor,
    grid: Grid,
    harvest: Tensor,
    noise: float,
    generator: torch.Generator,
) -> np.ndarray:
    r"""Follow N cells from the reference levels of their contexts.

    One step of length h takes the mean by the exponential Euler scheme, and one normal number for the noise of production and
    decay together, with the variance that a step of an Ornstein-Uhlenbeck process has:
    :math:`noise^2 (P + \gamma x)(1 - e^{-2 \gamma h}) / 2\gamma`. Levels that would be negative are 0.
    Of a gene with steady production and decay, mean and variance are exact for any h; between genes, and from unspliced to spliced, the
    error is of order h (spliced variance at the default step: 5 % too large).

    Parameters
    ----------
    acts
        One row for each cell.
    context, harvest
        Shape ``(N,)``, int64: each cell's context, and at which of the grid's harvests it is taken.
    noise
        0 follows the mean.

    Returns
    -------
    ndarray
        Shape ``(N, S)``: the state of each cell at its harvest.
    """
    state = dynamics.control_state[context].clone()
    kept = torch.empty_like(state)
    normal = torch.empty_like(state)
    # of a single context nothing has to be gathered for each cell
    rates = dynamics.bind(acts, context if len(dynamics.control_level) > 1 else None)
    with torch.no_grad():
        for time, length, harvested in grid:
            production, decay = rates(torch.tensor(time + 0.5 * length), state)
            # the same for all cells unless a gene is clamped: then once is enough
            rate = decay[:1] if decay.stride(0) == 0 else decay
            lost = torch.expm1(rate * -length).neg_()  # 1 - exp(-γ h)
            if noise > 0:
                # 1 - exp(-2 γ h) = lost (2 - lost)
                scale = (0.5 * noise**2) * lost * (2 - lost) / rate
                normal.normal_(generator=generator)
                variance = torch.addcmul(production, rate, state).mul_(scale)
                if dynamics.splicing:
                    _share_splicing(normal, variance, state, rate, noise, length)
                normal.mul_(variance.sqrt_())
                state = torch.lerp(state, production.div_(rate), lost).add_(normal).clamp_(min=0)
            else:
                state = torch.lerp(state, production / rate, lost)
            if harvested >= 0:
                kept = torch.where((harvest == harvested)[:, None], state, kept)
    return kept.numpy()


def _share_splicing(normal: Tensor, variance: Tensor, state: Tensor, rate: Tensor, noise: float, length: float) -> None:
    """Correlate the normal numbers of unspliced and spliced RNA, in place: a molecule that is spliced leaves one for the other.

    Without that, spliced RNA would scatter more than molecules do. Over a step the covariance is
    ``-noise^2 β u (1 - exp(-(β + γ) h)) / (β + γ)``.
    """
    half = state.shape[-1] // 2
    both = rate[:, :half] + rate[:, half:]
    covariance = rate[:, :half] * state[:, :half] * (torch.expm1(both * -length) / both * noise**2)
    size = (variance[:, :half] * variance[:, half:]).sqrt_().clamp_(min=1e-30)
    correlation = (covariance / size).clamp_(min=-1)
    spliced = normal[:, half:].mul_((1 - correlation**2).sqrt_())
    spliced.addcmul_(correlation, normal[:, :half])


def true_levels(
    dynamics: RegulatoryDynamics, acts: Interventions, contexts: int, times: Sequence[float], start: float, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Follow every condition in every context without noise.

    Returns
    -------
    levels
        Shape ``(H, K, C, S)``: states at the H `times`.
    steady
        Shape ``(K, C, S)``: the stable steady state reached from the last of them once acts that end are over and all
        others are on; NaN where none is reached, as where the network oscillates.
    """
    width = dynamics.control_state.shape[-1]
    rows_at_a_time = max(1, CHUNK_VALUES // width)
    parts = [(kind, first) for kind in range(contexts) for first in range(0, len(acts), rows_at_a_time)]

    def chunk(number: int) -> tuple[np.ndarray, np.ndarray]:
        kind, first = parts[number]
        rows = torch.arange(first, min(first + rows_at_a_time, len(acts)))
        context = torch.full((len(rows),), kind)
        with torch.no_grad():
            rates = dynamics.bind(acts.select(rows), context)
            levels = integrate(rates, dynamics.control_state[context], [start, *times], step=step)[1:]
            return levels.numpy(), _settled(rates, levels[-1]).numpy()

    found = in_threads(chunk, len(parts))
    shape = contexts, len(acts), width
    levels = np.concatenate([part for part, _ in found], axis=1).reshape(len(times), *shape)
    return levels, np.concatenate([part for _, part in found]).reshape(shape)


def _settled(rates: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], state: Tensor, steps: int = 800) -> Tensor:
    """Stable steady states ``(rows, S)`` reached by the flow from `state`, pushed a little; NaN for rows that never rest.

    Follows all rows, unlike :func:`perturbzoo.grn.steady_state`, for which one that oscillates is an error.
    """
    late = torch.tensor(math.inf)
    # neither random, nor the same way in all genes: a symmetric push would leave a symmetric switch where it is
    state = state * (1 + PUSH * torch.cos(torch.arange(state.shape[-1], dtype=state.dtype) ** 2))
    for number in range(steps):
        production, decay = rates(late, state)
        drawn = production / decay
        moving = (drawn - state).abs() > 1e-5 * (state.abs() + state.mean(-1, keepdim=True))
        # at rest near an unstable state nothing moves at first: such rows are followed for 10 lifetimes at least
        if number >= 40 and not bool(moving.any()):
            break
        state = torch.lerp(state, drawn, 1 - math.exp(-0.25))
    return torch.where(moving.any(-1, keepdim=True), torch.full_like(state, math.nan), state)


def in_threads(work: Callable[[int], Result], count: int, progress: str | None = None) -> list[Result]:
    """Run ``work(0) ... work(count - 1)`` beside each other, in as many threads as torch has, each of which uses one core.

    Chunks are too small to share the arithmetic of one among cores: the cores would wait for each other at every operation.

    Parameters
    ----------
    progress
        What a progress bar on a terminal's standard error says; None: no bar.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = progress is None or not console.is_terminal
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, count), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            done = track(pool.map(work, range(count)), progress or "", total=count, console=console, disable=quiet)
            return list(done)
    finally:
        torch.set_num_threads(threads)
