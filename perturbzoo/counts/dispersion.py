r"""How much more than a Poisson's the counts of control cells vary, gene by gene.

Within a context, cell c of size :math:`L_c` (counts) has :math:`n_{cg}` counts of gene g, of mean :math:`\mu_{cg} = L_c r_g` and variance
:math:`\mu + \phi_g \mu^2`. The moment estimate of :math:`\phi_g` is

.. math::
    \hat\phi_g = \frac{\sum_c (n_{cg} - L_c \hat r_g)^2 - n_{cg} + \hat r_g \sum L^2 / \sum L}{\hat r_g^2 \sum_c L_c^2} \cdot \frac{N}{N - 1},
    \qquad \hat r_g = \frac{\sum_c n_{cg}}{\sum_c L_c},

without bias for counts that are Poisson, whatever the sizes (the last term of the numerator is what fitting :math:`r_g` takes away). Genes
of few counts say next to nothing about their own: their estimates are shrunk towards the trend of all genes of their rate, by
the squared errors of both, as in empirical Bayes. Nothing is fitted to logarithms, zeros need no special care.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

LEAST, MOST = 1e-4, 1e2
"""Dispersions :math:`\\phi` are kept between these: a Poisson's, as good as, and a gene that is on in one cell of hundreds."""
_BLOCK = 1 << 22  # stored values turned into counts at a time
_BINS, _IN_BIN = 30, 20  # of the trend: at most so many bins, of at least so many genes
_INFORMED = 1 / 3  # genes whose error is below this share of the trend say how far genes scatter around it


@dataclass
class Moments:
    """Sums over N cells: of sizes L (counts), and for each gene of counts n.

    Attributes
    ----------
    n_cells, size, size_square
        N, sums of L and of L squared.
    count, count_square, size_count
        Shape ``(G,)``, float64: sums of n, of n squared, of L n.
    """

    n_cells: int
    size: float
    size_square: float
    count: np.ndarray
    count_square: np.ndarray
    size_count: np.ndarray


def count_moments(values: sparse.csr_matrix, size_factor: np.ndarray, depth: float, rows: np.ndarray) -> Moments:
    """Add up the counts of some cells.

    Parameters
    ----------
    values
        Shape ``(cells, G)``, log1p-normalised to `depth` counts.
    size_factor
        Shape ``(cells,)``, counts.
    rows
        Which cells.
    """
    n_genes = values.shape[1]
    count, square, sized = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes)
    step = max(1, _BLOCK * values.shape[0] // max(1, values.nnz))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        block = values[some]
        size = np.repeat(size_factor[some], np.diff(block.indptr))
        counts = np.rint(np.expm1(block.data.astype(np.float64)) * size / depth)
        count += np.bincount(block.indices, counts, n_genes)
        square += np.bincount(block.indices, counts * counts, n_genes)
        sized += np.bincount(block.indices, counts * size, n_genes)
    sizes = size_factor[rows].astype(np.float64)
    return Moments(len(rows), float(sizes.sum()), float((sizes**2).sum()), count, square, sized)


def fit_dispersion(moments: Moments, rate: np.ndarray | None = None) -> np.ndarray:
    """Fit each gene's dispersion to the counts of cells of one context.

    Parameters
    ----------
    moments
        Of two cells or more.
    rate
        Shape ``(G,)``: counts per unit of size, for genes without any count in these cells; without it they get the trend of the
        rarest genes.

    Returns
    -------
    Shape ``(G,)``: phi of the variance mu + phi mu^2, between :data:`LEAST` and :data:`MOST`.
    """
    m = moments
    own = m.count / m.size
    seen = own > 0
    r = own[seen]
    if m.n_cells < 2 or not seen.any():
        return np.full(len(own), LEAST)
    ratio = m.size_square / m.size
    excess = m.count_square[seen] - 2 * r * m.size_count[seen] + r**2 * m.size_square - m.count[seen] + r * ratio
    raw = excess / (r**2 * m.size_square) * m.n_cells / (m.n_cells - 1)

    # the error of the estimate depends on the dispersion: first on one for all genes, then on the trend
    everywhere = _mean(raw, _error_square(r, np.ones_like(r), m))
    trend = np.full_like(r, np.clip(everywhere, LEAST, MOST))
    for _ in range(2):
        error = _error_square(r, trend, m)
        trend = _trend(np.log(r), raw, error + trend**2)
    error = _error_square(r, trend, m)
    informed = error < (_INFORMED * trend) ** 2
    scatter = np.median((raw[informed] / trend[informed] - 1) ** 2) / 0.455 if informed.sum() >= _IN_BIN else 0.25
    prior = np.clip(scatter, 0.01, 4.0) * trend**2  # the median of a squared normal deviate is .455
    shrunk = (raw / error + trend / prior) / (1 / error + 1 / prior)

    phi = np.full(len(own), trend[np.argmin(r)])
    phi[seen] = shrunk
    if rate is not None and not seen.all():
        order = np.argsort(r)
        phi[~seen] = np.interp(np.log(np.maximum(rate[~seen], 1e-300)), np.log(r[order]), trend[order])
    return np.clip(phi, LEAST, MOST)


def _error_square(rate: np.ndarray, phi: np.ndarray, m: Moments) -> np.ndarray:
    """Squared standard error of the moment estimate, from the cumulants of a negative binomial at the mean square size."""
    mu = rate * np.sqrt(m.size_square / m.n_cells)
    variance = mu + phi * mu**2
    each = variance * (6 * phi * variance + 2 * variance - 4 * phi * mu)
    return np.maximum(each * m.n_cells / (rate**2 * m.size_square) ** 2, 1e-300)


def _mean(values: np.ndarray, error: np.ndarray) -> float:
    return float(np.average(values, weights=1 / error))


def _trend(log_rate: np.ndarray, raw: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Weighted mean of the estimates of genes of about the same rate, joined by lines over the log rate."""
    order = np.argsort(log_rate)
    bins = np.array_split(order, max(1, min(_BINS, len(order) // _IN_BIN)))
    centre = np.array([log_rate[genes].mean() for genes in bins])
    level = np.array([_mean(raw[genes], error[genes]) for genes in bins])
    return np.interp(log_rate, centre, np.clip(level, LEAST, MOST))
