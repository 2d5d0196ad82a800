r"""Cells of whole counts: draws from negative binomials, and moved cells rounded by chance.

A negative binomial of mean :math:`\mu` and variance :math:`\mu + \mu^2/\theta` is a sum of K terms, K Poisson of mean
:math:`w = \theta \log(1 + \mu/\theta)` and each term logarithmic with :math:`p = \mu / (\mu + \theta)` (Quenouille 1949). Most genes of most cells have no
count: one uniform number says whether K is 0, and only for the others anything more is drawn.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

_BLOCK = 1 << 19  # values drawn at a time: what is worked on stays in the cache
_FEW = 1.0  # w up to which a count is drawn by its terms; above, as a Poisson with a gamma's mean
MOST = 2**31 - 1


def draw_counts(
    mean: np.ndarray, theta: np.ndarray, generator: np.random.Generator, zero: np.ndarray | None = None
) -> sparse.csr_matrix:
    """Draw negative binomial counts.

    Parameters
    ----------
    mean
        Shape ``(B, G)``: expected counts, before zero inflation.
    theta
        Shape ``(G,)``: inverse dispersion.
    generator
        Says which of all draws; the same, the same counts.
    zero
        Shape ``(B, G)``: probability that a count is set to 0, or None.

    Returns
    -------
    Shape ``(B, G)``, CSR int32.
    """
    n_cells, n_genes = mean.shape
    few = theta * np.log1p(mean.max(axis=0, initial=0) / theta) <= _FEW
    many = np.flatnonzero(~few)
    height = max(1, _BLOCK // max(1, n_genes))
    blocks = []
    for start in range(0, n_cells, height):
        block = mean[start : start + height]
        counts = _draw_few(block.astype(np.float32), theta.astype(np.float32), few, generator)
        if len(many):
            gamma = generator.standard_gamma(theta[many], (len(block), len(many)))
            counts[:, many] = np.minimum(generator.poisson(gamma * (block[:, many] / theta[many])), MOST)
        if zero is not None:
            counts[generator.random(counts.shape, dtype=np.float32) < zero[start : start + height]] = 0
        blocks.append(to_csr(counts))
    return sparse.vstack(blocks, format="csr") if blocks else sparse.csr_matrix((0, n_genes), dtype=np.int32)


def _draw_few(mean: np.ndarray, theta: np.ndarray, few: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw the counts of genes of which most cells have none; 0 for the others. float32 in, ``(B, G)`` int32 out."""
    terms = mean / theta
    np.log1p(terms, out=terms)
    terms *= theta * few
    uniform = generator.random(mean.shape, dtype=np.float32)
    filled = np.flatnonzero(uniform < -np.expm1(-terms))
    counts = np.zeros(mean.shape, dtype=np.int32)
    # terms come as events of a Poisson process up to time w; the first one came at this time, which is before w
    first = -np.log1p(-uniform.ravel()[filled].astype(np.float64))
    number = 1 + generator.poisson(np.maximum(terms.ravel()[filled] - first, 0))
    mu, own = mean.ravel()[filled].astype(np.float64), theta[filled % mean.shape[1]]
    size = generator.logseries(np.repeat(mu / (mu + own), number))
    if len(filled):
        counts.ravel()[filled] = np.add.reduceat(size, np.cumsum(number) - number)
    return counts


def round_cells(
    expression: np.ndarray, size_factor: np.ndarray, depth: float, generator: np.random.Generator
) -> sparse.csr_matrix:
    r"""Turn log1p-normalised cells into whole counts whose expected log1p-normalised expression is theirs.

    A value x between :math:`f(k)` and :math:`f(k + 1)`, :math:`f(n) = \log(1 + d n / L)`, becomes k + 1 with probability
    :math:`(x - f(k)) / (f(k + 1) - f(k))`, else k. That is unbiased where the zoo predicts, in log1p; rounding counts as
    unbiasedly would lower the mean of logarithms. Values below 0 cannot be: each gene's positive values are lowered by the share
    that keeps its mean over these cells. A cell as it was measured comes out as it went in.

    Parameters
    ----------
    expression
        Shape ``(B, G)``, log1p-normalised; cells of one condition and context.
    size_factor
        Shape ``(B,)``, counts.
    depth
        Counts per cell after normalisation.
    generator
        Says which of all draws.

    Returns
    -------
    Shape ``(B, G)``, CSR int32.
    """
    positive = np.maximum(expression, 0)
    total, kept = expression.sum(axis=0, dtype=np.float64), positive.sum(axis=0, dtype=np.float64)
    share = np.where(kept > 0, np.maximum(total, 0) / np.maximum(kept, 1e-300), 0.0).astype(np.float32)
    n_cells, n_genes = expression.shape
    height = max(1, _BLOCK // max(1, n_genes))
    most = np.log1p(depth)  # a gene that has all counts of its cell
    blocks = []
    for start in range(0, n_cells, height):
        value = np.minimum(positive[start : start + height] * share, most).astype(np.float64)
        scale = (depth / size_factor[start : start + height].astype(np.float64))[:, None]
        # what is a whole number but for the rounding of float32 stays whole
        floor = np.floor(np.expm1(value) / scale + 1e-4)
        low, high = np.log1p(floor * scale), np.log1p((floor + 1) * scale)
        up = generator.random(value.shape, dtype=np.float32) < (value - low) / (high - low)
        blocks.append(to_csr((floor + up).astype(np.int32)))
    return sparse.vstack(blocks, format="csr") if blocks else sparse.csr_matrix((0, n_genes), dtype=np.int32)


def to_csr(counts: np.ndarray) -> sparse.csr_matrix:
    """Dense counts ``(B, G)`` as CSR int32 with int32 indices."""
    n_cells, n_genes = counts.shape
    place = np.flatnonzero(counts)
    indptr = np.searchsorted(place, np.arange(n_cells + 1) * n_genes)
    indices = (place - np.repeat(np.arange(n_cells) * n_genes, np.diff(indptr))).astype(np.int32)
    return sparse.csr_matrix((counts.ravel()[place], indices, indptr.astype(np.int64)), shape=counts.shape)
