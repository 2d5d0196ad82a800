r"""What a cell would have been under other interventions: abduction, action, prediction.

A cell's level is that of its condition times what is its own,

.. math::

    x_{cg} = x^*_g(\text{acts of } c)\, e^{\xi_{cg}}, \qquad
    \xi_c = L z_c - \tfrac12 \mathrm{diag}(L L^\top), \quad z_c \sim \mathcal N(0, I_r), \qquad
    n_{cg} \sim \mathrm{NB}(\ell_c\, x_{cg},\; \theta_g)

with low-rank L: extrinsic noise that genes share (size, cycle, state). The term with the diagonal makes the mean of cells the
steady state, which is what dynamics are fitted to. :func:`fit_extrinsic_noise` finds L in control cells,
:func:`abduct` what a cell's counts say of its z, and :func:`counterfactual` puts the same z under other acts (Pearl 2009,
Causality, section 7.1). Where counts say nothing, the answer is that of the population, and is flagged so.

Knows counts, acts and dynamics; no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import eigsh
from torch import Tensor

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn.consistency import perturbed_genes
from perturbzoo.grn.dynamics import RegulatoryDynamics
from perturbzoo.grn.interventions import Interventions
from perturbzoo.grn.responses import context_rows, in_double, levels_at_rest

PRIOR_ONLY = 0.9  # share of the prior's variance that is left, above which a cell's answer is the population's
CHUNK_VALUES = 1 << 20  # cells x genes that are worked on together
DAMPING = 4.0  # longest step of z, in standard deviations


@dataclass(frozen=True, eq=False)
class ExtrinsicNoise:
    """What cells of one condition differ in.

    Attributes
    ----------
    loading
        L, shape ``(G, r)``, natural log; r may be 0.
    dispersion
        θ, shape ``(G,)``, >= 0: variance of counts = mean + θ mean², beyond what L explains; 0 is Poisson.
    """

    loading: Tensor
    dispersion: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "loading", torch.as_tensor(self.loading).detach().cpu().double())
        object.__setattr__(self, "dispersion", torch.as_tensor(self.dispersion).detach().cpu().double())
        genes = len(self.loading)
        if self.loading.ndim != 2 or self.dispersion.shape != (genes,) or not bool((self.dispersion >= 0).all()):
            raise PerturbZooError(
                f"extrinsic noise: loading {tuple(self.loading.shape)} and dispersion {tuple(self.dispersion.shape)}; "
                "give (genes, rank), and (genes,) of at least 0"
            )

    @property
    def variance(self) -> Tensor:
        """Shape ``(G,)``: prior variance of ξ."""
        return (self.loading**2).sum(1)


@dataclass(frozen=True, eq=False)
class CellPosterior:
    """What is known of N cells' z after their counts.

    Attributes
    ----------
    mean, covariance
        Shape ``(N, r)`` and ``(N, r, r)``.
    remaining
        Shape ``(N,)``, in [0, 1]: posterior over prior variance of ξ, summed over genes; 1 where r is 0.
    """

    mean: Tensor
    covariance: Tensor
    remaining: Tensor

    @property
    def prior_only(self) -> Tensor:
        """Shape ``(N,)``, bool: the counts tell almost nothing of the cell itself; its answer is the population's."""
        return self.remaining > PRIOR_ONLY


@dataclass(frozen=True, eq=False)
class CellCounterfactual:
    """N cells under other acts; levels in the units of the dynamics' reference.

    Attributes
    ----------
    level
        Shape ``(N, G)``: expected level under the acts asked for, given the cell's counts.
    factual
        Shape ``(N, G)``: expected level under the acts that it had, given the same.
    deviation
        Shape ``(N, G)``: standard deviation of the log of either, given the counts.
    remaining, prior_only
        Shape ``(N,)``: as :class:`CellPosterior`.
    """

    level: Tensor
    factual: Tensor
    deviation: Tensor
    remaining: Tensor
    prior_only: Tensor


def fit_extrinsic_noise(
    counts: np.ndarray | sparse.spmatrix, size: np.ndarray, *, rank: int = 5, steps: int = 30
) -> ExtrinsicNoise:
    r"""Estimate what control cells share, from moments that counting noise does not touch.

    Given ξ, counts of two genes are independent, so with :math:`m_g` the mean level

    .. math:: S_{gh} = \frac{\sum_c (n_{cg} - \ell_c m_g)(n_{ch} - \ell_c m_h)}{\sum_c \ell_c^2\, m_g m_h}
        \;\to\; e^{(L L^\top)_{gh}} - 1 \qquad (g \ne h)

    whatever the counts' distribution. S is weighted to equal noise and fitted off its diagonal by principal factors; those whose
    eigenvalue noise alone could reach, :math:`(1 + \sqrt{G / N})^2 - 1` in units of it, are dropped. The log is taken
    afterwards. The diagonal then gives θ.

    Parameters
    ----------
    counts
        Shape ``(N, G)``: raw counts of control cells of one context.
    size
        Shape ``(N,)``: ℓ, > 0: expected count of a gene at level 1.
    rank
        r at most; fewer if fewer stand out.
    steps
        Of principal factors, which estimate the diagonal.

    Raises
    ------
    PerturbZooError
        Shapes do not fit, or there are fewer than 10 cells.
    """
    matrix = sparse.csr_matrix(counts).astype(float)
    size = np.asarray(size, dtype=float)
    cells, genes = matrix.shape
    for holds, complaint in (
        (cells >= 10, f"{cells} control cells are too few; at least 10"),
        (size.shape == (cells,), f"size has the shape {size.shape}, there are {cells} cells"),
        (np.isfinite(size).all() and (size > 0).all(), "sizes must be finite and positive"),
        (rank >= 0, f"rank={rank} must be at least 0"),
    ):
        if not holds:
            raise PerturbZooError(f"extrinsic noise: {complaint}")
    total = np.asarray(matrix.sum(0)).ravel()
    mean = total / size.sum()
    with_size, squares = matrix.T @ size, (size**2).sum()
    product = (matrix.T @ matrix).toarray()
    product -= np.outer(mean, with_size) + np.outer(with_size, mean) - squares * np.outer(mean, mean)
    seen = total > 0
    scale = np.where(seen, mean, 1.0) * np.sqrt(squares)
    covariance = product / np.outer(scale, scale)  # S; its diagonal has the counting noise too
    expected = np.divide(total, scale**2)  # of counting noise, of that diagonal
    # per cell and in units in which noise has variance 1; what is shared is a small part of the diagonal, which is kept
    unit = np.sqrt(np.where(seen & (np.diag(covariance) > 0), np.diag(covariance), np.inf))
    table = covariance / np.outer(unit, unit)
    np.fill_diagonal(table, 0.0)
    shared, factors = np.zeros(genes), np.zeros((genes, 0))
    # the largest eigenvalue of a sample exceeds the limit a little
    edge = 1.05 * (1 + np.sqrt(genes / cells)) ** 2 - 1
    # squares of what is shared, which the exponential adds, have factors of their own
    wide = min(rank * (rank + 3) // 2, genes - 1)
    for _ in range(steps if wide else 0):
        np.fill_diagonal(table, shared)
        factors = _factors(table, wide, edge)
        before, shared = shared, np.minimum((factors**2).sum(1), 0.99)
        if np.abs(shared - before).max() < 1e-4:
            break
    finite = np.where(np.isfinite(unit), unit, 0.0)[:, None]
    if factors.shape[1]:
        smooth = np.log1p(np.maximum((finite * factors) @ (finite * factors).T, -0.9))
        factors = _factors(smooth / np.outer(unit, unit), min(rank, wide), edge)
    loading = finite * factors
    excess = 1 + np.diag(covariance) - expected
    dispersion = np.where(seen, np.maximum(excess / np.exp((loading**2).sum(1)) - 1, 0.0), 0.0)
    return ExtrinsicNoise(torch.from_numpy(loading), torch.from_numpy(dispersion))


def _factors(table: np.ndarray, rank: int, edge: float) -> np.ndarray:
    """Leading eigenvectors times the root of their eigenvalues, of those above `edge`: ``(G, r)``."""
    values, vectors = eigsh(table, k=rank, which="LA", v0=np.ones(len(table)))
    kept = values > edge
    return vectors[:, kept] * np.sqrt(values[kept])


def abduct_gaussian(noise: ExtrinsicNoise, deviation: Tensor, precision: Tensor) -> CellPosterior:
    r"""Posterior of z where the log level was measured with normal noise: closed form.

    .. math:: \Lambda = I + L^\top P L, \qquad z \mid d \sim \mathcal N(\Lambda^{-1} L^\top P d,\; \Lambda^{-1})

    Parameters
    ----------
    deviation
        d, shape ``(N, G)``: measured :math:`L z`, that is the log level minus its prior mean.
    precision
        P, shape ``(N, G)``: 1 / variance of the measurement; 0 where there is none.
    """
    loading = noise.loading
    rank = loading.shape[1]
    # the pairs of factors side by side: one product for all cells
    pairs = (loading[:, :, None] * loading[:, None, :]).reshape(len(loading), rank * rank)
    known = (precision @ pairs).reshape(len(precision), rank, rank) + torch.eye(rank, dtype=loading.dtype)
    factor = torch.linalg.cholesky(known)
    mean = torch.cholesky_solve(((precision * deviation) @ loading)[..., None], factor)[..., 0]
    covariance = torch.cholesky_inverse(factor) if rank else known
    # trace of L C L' over trace of L L'
    prior = noise.variance.sum()
    left = (covariance * (loading.T @ loading)).sum((-1, -2))
    remaining = left / prior if bool(prior > 0) else torch.ones_like(left)
    return CellPosterior(mean, covariance, remaining)


def abduct(
    noise: ExtrinsicNoise,
    counts: Tensor,
    expected: Tensor,
    mask: Tensor | None = None,
    *,
    steps: int = 100,
    tolerance: float = 1e-8,
) -> CellPosterior:
    r"""Posterior of z given counts, by Laplace's approximation: the mode, and the expected information there.

    Fisher scoring is a sequence of :func:`abduct_gaussian` with P = μ / (1 + θ μ) and the working deviation
    :math:`L z + (n - \mu) / \mu`; steps are damped to stay finite.

    Parameters
    ----------
    counts, expected
        Shape ``(N, G)``: raw counts, and their mean at the condition's level, ℓ x*.
    mask
        Shape ``(N, G)``, bool: counts to leave out. None: none.
    """
    offset, theta = noise.variance / 2, noise.dispersion
    poisson = theta < 1e-8
    z = torch.zeros(len(counts), noise.loading.shape[1], dtype=torch.float64)
    used = torch.ones_like(expected) if mask is None else (~mask).to(expected.dtype)
    used = used * (expected > 0)

    def at(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean counts, information, and the log posterior up to a constant, of each cell."""
        own = z @ noise.loading.T
        mean = expected * torch.exp(own - offset)
        spread = 1 + theta * mean
        # log NB in the mean; its last term becomes the mean itself as θ goes to 0
        lost = torch.where(poisson, mean, (counts + 1 / theta.clamp(min=1e-8)) * torch.log(spread))
        value = (used * (counts * own - lost)).sum(1) - (z**2).sum(1) / 2
        return mean, used * mean / spread, value

    mean, information, value = at(z)
    for _ in range(steps):
        working = z @ noise.loading.T + (counts - mean) / mean.clamp(min=1e-300)
        step = abduct_gaussian(noise, torch.where(information > 0, working, 0.0), information).mean - z
        step = step * (DAMPING / step.norm(dim=1, keepdim=True).clamp(min=DAMPING))
        for _ in range(30):
            trial = at(z + step)
            worse = ~(trial[2] >= value - 1e-12 * value.abs())
            if not bool(worse.any()):
                break
            step = torch.where(worse[:, None], step / 2, step)
        z, (mean, information, value) = z + step, trial
        if bool((step.abs() <= tolerance).all()):
            break
    posterior = abduct_gaussian(noise, torch.zeros_like(mean), information)
    return CellPosterior(z, posterior.covariance, posterior.remaining)


def counterfactual(
    dynamics: RegulatoryDynamics,
    noise: ExtrinsicNoise,
    counts: np.ndarray | sparse.spmatrix | Tensor,
    size: np.ndarray | Tensor,
    observed: Interventions,
    wanted: Interventions,
    *,
    row: np.ndarray | Tensor | None = None,
    context: Tensor | int | None = None,
    mask_targets: bool = True,
) -> CellCounterfactual:
    """Ask what N cells would have been under other acts.

    Parameters
    ----------
    noise
        Of :func:`fit_extrinsic_noise`, for the cells' context.
    counts
        Shape ``(N, G)``: raw counts.
    size
        Shape ``(N,)``: ℓ, > 0: expected count of a gene at level 1.
    observed, wanted
        P rows each: what was done, and what is to be done instead.
    row
        Shape ``(N,)``, int: which row of `observed` and `wanted` is the cell's; None: P is N, or 1 for all cells.
    context
        Shape ``(P,)``, or one; None: the first.
    mask_targets
        Leave the counts of the genes that were perturbed out of the abduction: they tell how well the act worked in this
        cell, which ξ is not about.

    Raises
    ------
    PerturbZooError
        Shapes do not fit, or a steady state is not found.
    """
    dense = counts.toarray() if sparse.issparse(counts) else counts  # type: ignore[union-attr]
    seen = torch.as_tensor(dense).detach().cpu().double()
    scale = torch.as_tensor(size).detach().cpu().double()
    pairs, genes = len(observed), len(dynamics.genes)
    given = torch.zeros(len(seen), dtype=torch.int64) if pairs == 1 else torch.arange(len(seen))
    which = given if row is None else torch.as_tensor(row).cpu().long()
    for holds, complaint in (
        (seen.ndim == 2 and seen.shape[1] == genes, f"counts of the shape {tuple(seen.shape)}, the network has {genes} genes"),
        (bool((torch.isfinite(seen) & (seen >= 0)).all()), "counts must be finite and at least 0; give raw counts"),
        (scale.shape == seen.shape[:1], f"size has the shape {tuple(scale.shape)}, there are {len(seen)} cells"),
        (bool((torch.isfinite(scale) & (scale > 0)).all()), "sizes must be finite and positive"),
        (len(noise.loading) == genes, f"extrinsic noise of {len(noise.loading)} genes, the network has {genes}"),
        (len(wanted) == pairs, f"{pairs} rows of acts observed, but {len(wanted)} wanted"),
        (which.shape == seen.shape[:1], f"row has the shape {tuple(which.shape)}, there are {len(seen)} cells"),
        (not len(which) or (int(which.min()) >= 0 and int(which.max()) < pairs), f"row points outside {pairs} rows of acts"),
    ):
        if not holds:
            raise PerturbZooError(f"counterfactual: {complaint}")
    contexts = context_rows(dynamics, context, pairs).cpu()
    there = levels_at_rest(*in_double(dynamics, observed), contexts)
    instead = levels_at_rest(*in_double(dynamics, wanted), contexts)
    hidden = torch.from_numpy(perturbed_genes(observed, genes)) & mask_targets
    parts = []
    for cells in torch.arange(len(seen)).split(max(1, CHUNK_VALUES // genes)):
        pair = which[cells]
        posterior = abduct(noise, seen[cells], scale[cells, None] * there[pair], hidden[pair])
        own = posterior.mean @ noise.loading.T
        variance = torch.einsum("gr,nrs,gs->ng", noise.loading, posterior.covariance, noise.loading)
        # mean of a log-normal variable: without any information this is 1, and the cell is an average one
        factor = torch.exp(own + (variance - noise.variance) / 2)
        deviation = torch.sqrt(variance.clamp(min=0))
        parts.append((factor * instead[pair], factor * there[pair], deviation, posterior.remaining, posterior.prior_only))
    if not parts:
        empty = torch.zeros(0, genes, dtype=torch.float64)
        return CellCounterfactual(empty, empty, empty, empty[:, 0], empty[:, 0].bool())
    return CellCounterfactual(*(torch.cat(values) for values in zip(*parts, strict=True)))
