"""From levels to counts: library sizes, excess variance, dropout; and what counts are expected to look like.

Shared by both simulators; knows neither networks nor conditions.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.interpolate import CubicSpline
from scipy.stats import nbinom, poisson


def draw_counts(
    mean: np.ndarray, dispersion: float, rng: np.random.Generator, dropout: float | None = None, slope: float = 1.5
) -> sparse.csr_matrix:
    r"""Draw Gamma-Poisson counts, and lose some.

    Parameters
    ----------
    mean
        Shape ``(cells, G)``, float32: expected counts.
    dispersion
        The variance is ``mean + dispersion * mean ** 2``.
    dropout, slope
        A count is lost with probability :math:`\sigma(-slope \cdot \log(mean / dropout))`; None: never.
    """
    rate = mean
    if dispersion > 0:
        rate = mean * (np.float32(dispersion) * rng.standard_gamma(1 / dispersion, mean.shape, dtype=np.float32))
    counts = rng.poisson(rate).astype(np.float32)
    if dropout is not None:
        # the same probability, written so that a mean of 0 is no problem
        counts *= rng.random(mean.shape, dtype=np.float32) >= 1 / (1 + (mean / dropout) ** slope)
    return sparse.csr_matrix(counts)


def expected_log1p(share: np.ndarray, depth: float, depth_spread: float, dispersion: float) -> np.ndarray:
    """Mean of ``log1p(n / L * depth)`` over cells: counts n of negative binomial, cell sizes L of lognormal law.

    It is a smooth function of the share alone: summed over the counts and a Gauss-Hermite rule for L at 64 shares, and
    interpolated between them (relative error about 1e-5).

    Parameters
    ----------
    share
        Any shape: expected fraction of the cell's counts, positive.
    depth, depth_spread, dispersion
        Median counts of a cell, standard deviation of their natural log, and excess variance of the counts.

    Returns
    -------
    ndarray
        The shape of `share`.
    """
    knots = np.geomspace(share.min() * 0.999, share.max() * 1.001, 64)
    nodes, node_weights = np.polynomial.hermite.hermgauss(13)
    sizes = depth * np.exp(depth_spread * np.sqrt(2) * nodes)[:, None]
    values = np.empty(len(knots))
    for index, knot in enumerate(knots):
        mean = knot * sizes
        law = nbinom(1 / dispersion, 1 / (1 + dispersion * mean)) if dispersion > 0 else poisson(mean)
        # count by count to 1,000, then in bins of 0.2 %, over which a logarithm is straight
        largest = max(1000.0, law.ppf(1 - 1e-9).max())
        edges = np.r_[np.arange(1000), np.rint(np.geomspace(1000, largest, 2 + int(500 * np.log(largest / 1000))))]
        counts = (np.r_[0, edges[:-1] + 1] + edges) / 2
        probability = np.diff(law.cdf(edges), prepend=0.0, axis=1)
        values[index] = node_weights @ (probability * np.log1p(counts / sizes * depth)).sum(1) / np.sqrt(np.pi)
    return CubicSpline(np.log(knots), values)(np.log(share))
