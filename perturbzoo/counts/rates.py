r"""From a predicted mean of log1p-normalised expression to the rate of counts that has it.

The zoo predicts :math:`m = E[\log(1 + d\, n / L)]`, with n the counts of a gene in a cell of size L and d the depth. Counts drawn at the rate
:math:`(e^m - 1) / d` have a lower mean of logarithms than m (Jensen), by more than most perturbations change. Here n is negative
binomial of mean :math:`L r` and dispersion :math:`\phi`, L is a size of the matched controls, and :math:`r` is the root of

.. math:: \frac1N \sum_c E[\log(1 + d\, n / L_c) \mid L_c r, \phi] = m,

which is unique, for the left side rises with r. It is tabulated for every dispersion on a grid over r and inverted by interpolation, once for
each context; then a lookup for each pair and gene is all.

The rates of all genes must sum to the whole, or cells would have other totals than the controls, and whoever divides by totals would see
another pseudobulk. Means of logarithms say nothing of the sum unless the dispersions are right, and those of a perturbed population need not
be those of controls. So the dispersions of a pair are those of the controls times one factor, the one with which the rates sum to the whole:
at a larger dispersion the same mean of logarithms takes a higher rate.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import CubicSpline

from perturbzoo.counts.dispersion import LEAST, MOST
from perturbzoo.models.likelihood import expected_log1p

_SIZES = 32  # sizes of cells that stand for all: means of equal shares of them
_PER_DECADE = 48  # dispersions on the grid, 5 % from one to the next
_SHIFT = 29  # steps on the grid: a factor on dispersions is at most 4, at least 1 / 4
_LOG_RATE = np.linspace(np.log(1e-11), 0.0, 160)
_MEANS = 4096
_LEAST_MEAN = np.log(1e-7)  # log of a mean below which rates are in proportion to it


class RateTable:
    """Rates of counts by the mean of log1p-normalised expression, for cells of given sizes.

    Parameters
    ----------
    size_factor
        Shape ``(N,)``, counts: sizes that cells are drawn at.
    depth
        Counts per cell after normalisation.
    phi
        Shape ``(G,)``: dispersions, see :func:`perturbzoo.counts.dispersion.fit_dispersion`.

    """

    def __init__(self, size_factor: np.ndarray, depth: float, phi: np.ndarray) -> None:
        step = np.log(10) / _PER_DECADE
        code = np.rint(np.log(np.clip(phi, LEAST, MOST)) / step).astype(np.int64)
        levels = np.arange(code.min() - _SHIFT, code.max() + _SHIFT + 1)
        self._row = code - levels[0]
        self._theta = theta = np.exp(-levels * step)
        ordered = np.sort(np.asarray(size_factor, dtype=np.float64))
        shares = np.array_split(ordered, min(_SIZES, len(ordered)))
        sizes, weights = np.array([share.mean() for share in shares]), np.array([len(share) for share in shares])
        means = np.zeros((len(_LOG_RATE), len(theta)))
        for size, weight in zip(sizes, weights / weights.sum(), strict=True):
            mean = torch.from_numpy(np.exp(_LOG_RATE) * size)[:, None].expand(-1, len(theta)).contiguous()
            scale = torch.full((len(_LOG_RATE),), depth / size, dtype=torch.float64)
            means += weight * expected_log1p(mean, torch.from_numpy(theta), scale).numpy()
        fine = np.linspace(_LOG_RATE[0], _LOG_RATE[-1], 4 * _MEANS)
        log_mean = CubicSpline(_LOG_RATE, np.log(means))(fine)  # (fine, levels)
        self._step = (log_mean[-1].max() - _LEAST_MEAN) / (_MEANS - 1)
        grid = _LEAST_MEAN + self._step * np.arange(_MEANS)
        # beyond the mean of a gene that takes all counts of a cell, there is nothing
        self._inverse = np.stack([np.interp(grid, column, fine) for column in log_mean.T])

    def theta(self, shift: int = 0) -> np.ndarray:
        """Shape ``(G,)``: 1 / phi as it is on the grid, `shift` steps up; counts are to be drawn with it."""
        return self._theta[self._row + shift]

    def shift(self, mean: np.ndarray, total: float) -> int:
        """Steps up on the grid of dispersions at which the rates of means ``(G,)`` come nearest to the sum `total`."""
        low, high = -_SHIFT, _SHIFT
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.rates(mean, middle).sum() < total else (low, middle)
        return min(low, high, key=lambda shift: abs(float(self.rates(mean, shift).sum()) - total))

    def rates(self, mean: np.ndarray, shift: int = 0) -> np.ndarray:
        """Expected counts per unit of size, ``(..., G)``, of means ``(..., G)``; 0 where the mean is not above 0, 1 at most."""
        log_mean = np.log(np.maximum(mean, 1e-300, dtype=np.float64))
        place = np.clip((log_mean - _LEAST_MEAN) / self._step, 0, _MEANS - 1 - 1e-9)
        low = place.astype(np.int64)
        row = np.broadcast_to(self._row + shift, low.shape)
        left, right = self._inverse[row, low], self._inverse[row, low + 1]
        log_rate = left + (place - low) * (right - left) + np.minimum(log_mean - _LEAST_MEAN, 0)
        return np.where(np.asarray(mean) > 0, np.exp(log_rate), 0.0)
