r"""Does a prediction obey a network, and what would it be if it did?

For the level :math:`\hat x` that any model predicts for a condition, with F of :mod:`perturbzoo.grn.responses`
(its acts included) and :math:`u = \log(x + \epsilon)`:

.. math::

    \rho &= \hat u - \log(F(\hat x) + \epsilon)  && \text{residual: 0 where the network would have said the same} \\
    \tilde u &= \arg\min_u \textstyle\sum_i (u_i - \hat u_i)^2 / \sigma_i^2 + \tau \sum_i (u_i - \log(F_i(u) + \epsilon_i))^2
        && \text{projection onto the network}

:math:`\tau = 0` gives the prediction back, :math:`\tau = \infty` the steady state that is reached from it. Both terms are on
the log scale, where errors of levels are most alike. Whoever has deltas converts them first: :func:`levels_from_delta`.

Knows levels, acts and dynamics; which model predicted is not its business. What two networks differ in, and whether
predictions carry any network at all, is in :mod:`perturbzoo.grn.linking`.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn.dynamics import RegulatoryDynamics
from perturbzoo.grn.interventions import Interventions
from perturbzoo.grn.responses import RestMap, context_rows, in_double, levels_at_rest

FLOOR = 1e-3
CHUNK_VALUES = 1 << 17  # edges x conditions that are worked on together: few enough to stay in the cache
LEAST_NOISE, MOST_NOISE = 1e-3, 10.0  # of a log level: as good as exact, and as good as unknown
DELTA_CAP = 50.0  # of log1p values: expm1 of more is no expression


def levels_from_delta(delta: np.ndarray, control: np.ndarray, reference: np.ndarray) -> np.ndarray:
    r"""Turn deltas of log1p-normalised means into levels.

    .. math:: x = m\, \max(0, e^{c + \delta} - 1) / (e^c - 1)

    with c the mean log1p-normalised expression of the controls and m their level (mean of depth-normalised counts). A mean
    of log1p is not log1p of a mean. The ratio is exact in both limits: where cells hardly differ, and where counts are so
    few that log1p is proportional to the share of cells that have one; in between it is an approximation.

    Parameters
    ----------
    delta
        Shape ``(..., G)``: mean of the condition minus c.
    control, reference
        Shape ``(G,)`` or as `delta`: c, and m > 0. Where c is 0 the gene was never seen, and its level stays m.

    Returns
    -------
    numpy.ndarray
        Shape ``(..., G)``: levels, >= 0.
    """
    control = np.asarray(control, dtype=float)
    seen = control > 0
    base = np.expm1(np.where(seen, control, 1.0))
    ratio = np.expm1(np.clip(control + np.asarray(delta, dtype=float), 0, DELTA_CAP)) / base
    return np.asarray(reference, dtype=float) * np.where(seen, ratio, 1.0)


def delta_from_levels(level: np.ndarray, control: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Turn levels into deltas: the inverse of :func:`levels_from_delta`, with the same arguments."""
    control = np.asarray(control, dtype=float)
    ratio = np.asarray(level, dtype=float) / np.asarray(reference, dtype=float)
    return np.log1p(ratio * np.expm1(control)) - control


def level_noise(error: np.ndarray, control: np.ndarray) -> np.ndarray:
    r"""Turn standard errors of deltas into those of log levels, near control.

    .. math:: \sigma = error \cdot d\log x / d\delta = error / (1 - e^{-c})

    Parameters
    ----------
    error
        Shape ``(..., G)``: of log1p-normalised means, >= 0.
    control
        Shape ``(G,)`` or as `error`: c, as in :func:`levels_from_delta`.

    Returns
    -------
    numpy.ndarray
        Shape ``(..., G)``, natural log; 0.001 at least, and 10 at most, as for genes that were never seen.
    """
    seen = -np.expm1(-np.asarray(control, dtype=float))
    sigma = np.divide(error, seen, out=np.full(np.broadcast_shapes(np.shape(error), seen.shape), np.inf), where=seen > 0)
    return np.clip(sigma, LEAST_NOISE, MOST_NOISE)


def residuals(
    dynamics: RegulatoryDynamics,
    level: Tensor | np.ndarray,
    acts: Interventions,
    context: Tensor | int | None = None,
    *,
    noise: Tensor | np.ndarray | None = None,
    floor: float = FLOOR,
) -> tuple[np.ndarray, np.ndarray]:
    r"""How far each gene of each prediction is from what the network makes of the other genes.

    Parameters
    ----------
    level
        Shape ``(N, G)``: predicted levels, >= 0, in the units of the dynamics' reference.
    acts
        N rows.
    context
        Shape ``(N,)``, or one; None: the first.
    noise
        Shape ``(G,)`` or ``(N, G)``: standard error of the log level of a pseudobulk of control cells, as many as a condition
        has. None: 1.
    floor
        ε as a fraction of the reference level.

    Returns
    -------
    residual
        Shape ``(N, G)``: ρ, natural log.
    error
        Shape ``(N, G)``: its standard error, if the levels had this noise: :math:`\sqrt{\sigma_i^2 + \sum_j J_{ij}^2
        \sigma_j^2}`, as the regulators' noise is in ρ too.

    Raises
    ------
    PerturbZooError
        Shapes do not fit, or a level is negative or not finite.
    """
    problem = _Problem(dynamics, level, acts, context, noise, floor)
    parts = [problem.chunk(rows).residual_and_error() for rows in problem.chunks()]
    residual, error = (torch.cat(values, dim=1).T.numpy() for values in zip(*parts, strict=True))
    return residual, error


def consistency(
    dynamics: RegulatoryDynamics,
    level: Tensor | np.ndarray,
    acts: Interventions,
    context: Tensor | int | None = None,
    *,
    noise: Tensor | np.ndarray | None = None,
    own: bool = True,
    floor: float = FLOOR,
) -> pd.DataFrame:
    """Score each prediction's consistency with the network; arguments as :func:`residuals`.

    Parameters
    ----------
    own
        Whether the equations of the perturbed genes themselves count. They hold only as well as the strengths of the acts
        are known; without them the prediction "nothing happens" is consistent with any interference.

    Returns
    -------
    pandas.DataFrame
        One row for each prediction, by the acts' labels: `condition`, `residual` (root mean square over genes, natural log),
        `ratio` (root mean square of residual / error: about 1 if prediction and network differ by control noise only; more,
        if not), `gene` (where it is largest) and `gene_ratio` (how large, signed: above 0 where more is predicted than
        the network makes).
    """
    residual, error = residuals(dynamics, level, acts, context, noise=noise, floor=floor)
    counted = np.ones(residual.shape, dtype=bool) if own else ~perturbed_genes(acts, len(dynamics.genes))
    ratio = np.where(counted, residual / error, 0.0)
    worst = np.abs(ratio).argmax(1)
    size = np.maximum(counted.sum(1), 1)
    return pd.DataFrame(
        {
            "condition": acts.labels or [str(number) for number in range(len(residual))],
            "residual": np.sqrt((np.where(counted, residual, 0.0) ** 2).sum(1) / size),
            "ratio": np.sqrt((ratio**2).sum(1) / size),
            "gene": np.array(dynamics.genes, dtype=object)[worst],
            "gene_ratio": ratio[np.arange(len(ratio)), worst],
        }
    )


def perturbed_genes(acts: Interventions, genes: int) -> np.ndarray:
    """Shape ``(N, G)``, bool: whether a row acts on a gene."""
    targets = acts.targets.cpu()
    marked = torch.zeros(len(targets), genes + 1, dtype=torch.bool)
    return marked.scatter(1, torch.where(targets >= 0, targets, genes), True)[:, :genes].numpy()


def project(
    dynamics: RegulatoryDynamics,
    level: Tensor | np.ndarray,
    acts: Interventions,
    context: Tensor | int | None = None,
    *,
    tau: float = 1.0,
    noise: Tensor | np.ndarray | None = None,
    floor: float = FLOOR,
    steps: int = 30,
    inner: int = 60,
    tolerance: float = 1e-6,
) -> Tensor:
    """Move predictions towards the network, all at once.

    Gauss and Newton with a step length for each row; the linear systems by conjugate gradients on the least-squares problem,
    scaled by its diagonal. Each of their steps costs two passes over the edges. No gradients.

    Parameters
    ----------
    level, acts, context, floor
        As :func:`residuals`.
    tau
        τ >= 0, weight of the network; infinity is allowed.
    noise
        Shape ``(G,)`` or ``(N, G)``: σ, how much the prediction of each log level may err. None: 1.
    steps, inner
        Of Gauss and Newton, at most, and of conjugate gradients in each.
    tolerance
        Change of the log levels at which a row is done.

    Returns
    -------
    Tensor
        Shape ``(N, G)``, float64: projected levels. With τ = 0, the levels given.

    Raises
    ------
    PerturbZooError
        `tau` is negative or NaN; for others see :func:`residuals`, and with an infinite τ :func:`steady_state`.
    """
    if not tau >= 0:
        raise PerturbZooError(f"projection: tau={tau} must be at least 0; 0 leaves the prediction as it is")
    problem = _Problem(dynamics, level, acts, context, noise, floor)
    if tau == 0:
        return problem.level
    if math.isinf(tau):
        start = problem.level
        if len(dynamics.layers) > 1:
            control = problem.dynamics.control_state[problem.context]
            parts = problem.dynamics.split(control)
            # every layer follows the mRNA in proportion
            ratio = start / parts["spliced" if dynamics.splicing else "mrna"]
            start = torch.cat([part * ratio for part in parts.values()], dim=-1)
        return levels_at_rest(problem.dynamics, problem.acts, problem.context, start)
    done = [problem.chunk(rows).projected(tau, steps, inner, tolerance) for rows in problem.chunks()]
    return torch.cat(done, dim=1).T.contiguous()


class _Problem:
    """Predictions beside the network, checked, in float64; `chunk` takes some rows."""

    def __init__(
        self,
        dynamics: RegulatoryDynamics,
        level: Tensor | np.ndarray,
        acts: Interventions,
        context: Tensor | int | None,
        noise: Tensor | np.ndarray | None,
        floor: float,
    ) -> None:
        self.level = torch.as_tensor(level).detach().cpu().double()
        shape = (len(acts), len(dynamics.genes))
        sigma = torch.as_tensor(1.0 if noise is None else noise).detach().cpu().double()
        for holds, complaint in (
            (self.level.shape == shape, f"levels of the shape {tuple(self.level.shape)}, not conditions x genes {shape}"),
            (bool((torch.isfinite(self.level) & (self.level >= 0)).all()), "levels must be finite and at least 0"),
            (sigma.ndim <= 2 and sigma.shape in ((), shape[1:], shape), f"noise of the shape {tuple(sigma.shape)}"),
            (bool((torch.isfinite(sigma) & (sigma > 0)).all()), "noise must be finite and positive"),
            (floor > 0, f"floor={floor} must be positive"),
        ):
            if not holds:
                raise PerturbZooError(f"consistency with the network: {complaint}")
        self.dynamics, self.acts = in_double(dynamics, acts)
        self.context = context_rows(dynamics, context, len(acts)).cpu()
        self.sigma = sigma.expand(shape)
        self.epsilon = floor * self.dynamics.reference

    def chunks(self) -> tuple[Tensor, ...]:
        rank = self.dynamics.rank
        edges = len(self.dynamics.target) if rank is None else len(self.dynamics.genes) * len(self.dynamics.regulators)
        return torch.arange(len(self.level)).split(max(1, CHUNK_VALUES // max(1, edges)))

    def chunk(self, rows: Tensor) -> _Chunk:
        rest = RestMap(self.dynamics, self.acts.select(rows), self.context[rows])
        return _Chunk(rest, self.level[rows].T.contiguous(), self.sigma[rows].T.contiguous(), self.epsilon[:, None])


class _Chunk:
    """n predictions, genes in rows: an edge then reads and adds contiguous memory. All tensors ``(G, n)``."""

    def __init__(self, rest: RestMap, level: Tensor, sigma: Tensor, epsilon: Tensor) -> None:
        self.rest, self.sigma, self.epsilon = rest, sigma, epsilon
        self.log = torch.log(level + epsilon)

    def _level(self, log: Tensor) -> Tensor:
        return (torch.exp(log) - self.epsilon).clamp(min=0)

    def residual(self, log: Tensor) -> Tensor:
        return log - torch.log(self.rest(self._level(log).T).T + self.epsilon)

    def responses(self, log: Tensor) -> Tensor:
        """J of log(F + ε) by log(x + ε), ``(E, n)``."""
        rest, level = self.rest, self._level(log)
        made = rest(level.T).T + self.epsilon
        by_log = rest.function.T * torch.where(level > 0, torch.exp(log), torch.zeros_like(log))
        return rest.slopes(level.T) * by_log[rest.regulator] / made[rest.target]

    def residual_and_error(self) -> tuple[Tensor, Tensor]:
        variance = self.sigma**2
        passed = self.rest.push(self.responses(self.log) ** 2, variance)
        return self.residual(self.log), torch.sqrt(variance + passed)

    def projected(self, tau: float, steps: int, inner: int, tolerance: float) -> Tensor:
        log, precision = self.log.clone(), self.sigma**-2
        distance, residual = torch.zeros_like(log), self.residual(log)
        cost = tau * (residual**2).sum(0)
        for _ in range(steps):
            slope = self.responses(log)
            step = self._least_squares(slope, distance, residual, precision, tau, inner)
            # halve the step of each row until its cost falls
            length = torch.ones_like(cost)
            for _ in range(12):
                trial = log + length * step
                distance_there, residual_there = trial - self.log, self.residual(trial)
                cost_there = (precision * distance_there**2).sum(0) + tau * (residual_there**2).sum(0)
                worse = ~(cost_there <= cost)
                if not bool(worse.any()):
                    break
                length = torch.where(worse, length / 2, length)
            better = cost_there <= cost
            moved = torch.where(better, (length * step).abs().amax(0), torch.zeros_like(cost))
            log = torch.where(better, trial, log)
            distance, residual = log - self.log, torch.where(better, residual_there, residual)
            cost = torch.where(better, cost_there, cost)
            if bool((moved <= tolerance).all()):
                break
        return self._level(log)

    def _least_squares(
        self, slope: Tensor, distance: Tensor, residual: Tensor, precision: Tensor, tau: float, inner: int
    ) -> Tensor:
        """Minimise ``|distance + d|^2 precision + tau |residual + (I - J) d|^2`` over d, each column on its own (CGLS)."""
        root, weight = torch.sqrt(precision), math.sqrt(tau)
        squares = torch.zeros_like(distance).index_add(0, self.rest.regulator, slope**2)
        scale = 1 / torch.sqrt(precision + tau * (1 + squares))
        near, off = -root * distance, -weight * residual  # what is left of both parts
        answer = torch.zeros_like(distance)

        def gradient() -> Tensor:
            return scale * (root * near + weight * (off - self.rest.pull(slope, off)))

        towards = gradient()
        direction, size = towards, (towards**2).sum(0)
        # three digits of a step are enough: the next one mends the rest
        goal = 1e-6 * size
        for _ in range(inner):
            change = scale * direction
            by_near, by_off = root * change, weight * (change - self.rest.push(slope, change))
            share = size / ((by_near**2).sum(0) + (by_off**2).sum(0)).clamp(min=1e-300)
            answer, near, off = answer + share * change, near - share * by_near, off - share * by_off
            towards = gradient()
            next_size = (towards**2).sum(0)
            if bool((next_size <= goal).all()):
                break
            direction = towards + next_size / size.clamp(min=1e-300) * direction
            size = next_size
        return answer
