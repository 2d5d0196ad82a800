"""Pearson correlation of the columns of a large sparse matrix, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perturbzoo.errors import PerturbZooError

_BLOCK_VALUES = 1 << 23  # dense values held at a time: about 32 MB of float32
_STRIP = 1024  # columns whose correlations with all others are computed at a time


def strongest_correlations(
    matrix: sparse.spmatrix | np.ndarray, top_k: int, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find, for every column, the columns most correlated with it.

    Parameters
    ----------
    matrix
        Shape ``(rows, columns)``, sparse or dense.
    top_k
        How many partners each column gets at least, where there are as many. Those that tie at the last place, and a
        few more, are returned too: the caller ranks and cuts.
    threshold
        Only pairs with ``|r|`` above this.

    Returns
    -------
    source, destination, weight
        Shape ``(pairs,)`` each: `source` is among the strongest partners of `destination`, and ``|r|``, float32.

    Raises
    ------
    PerturbZooError
        Fewer than two rows; NaN or infinite values.
    """
    values: Any = sparse.csr_matrix(matrix) if sparse.issparse(matrix) else np.asarray(matrix)
    if values.shape[0] < 2:
        raise PerturbZooError(f"co-expression: a correlation needs two cells at least, there are {values.shape[0]}")
    mean, scale = _standardisation(values)
    found = []
    for start in range(0, values.shape[1], _STRIP):
        stop = min(start + _STRIP, values.shape[1])
        strip = _correlations(values, mean, scale, start, stop).abs_()
        strip.fill_diagonal_(0)
        # r is symmetric: a strip holds the columns from its own start on, and serves both directions
        destination, source = _strongest(strip, top_k, threshold)
        found.append((source + start, destination + start, strip[destination, source]))
        right = strip[:, stop - start :]
        destination, source = _strongest(right.T, top_k, threshold)
        found.append((source + start, destination + stop, right[source, destination]))
    sources, destinations, weights = zip(*found, strict=True)
    return torch.cat(sources).numpy(), torch.cat(destinations).numpy(), torch.cat(weights).numpy()


def _row_blocks(matrix: Any) -> Iterator[Any]:
    rows = max(1, _BLOCK_VALUES // max(1, matrix.shape[1]))
    for first in range(0, matrix.shape[0], rows):
        yield matrix[first : first + rows]


def _standardisation(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return each column's mean and the factor that gives its centred values unit length; 0 for a constant column.

    Squares are taken in float64: rounded to float32 they would make a constant column seem to vary.
    """
    n_rows, n_columns = matrix.shape
    total, square = np.zeros(n_columns), np.zeros(n_columns)
    for part in _row_blocks(matrix):
        if sparse.issparse(part):
            values = part.data.astype(np.float64)
            total += np.bincount(part.indices, weights=values, minlength=n_columns)
            square += np.bincount(part.indices, weights=values**2, minlength=n_columns)
        else:
            total += part.sum(axis=0, dtype=np.float64)
            square += np.einsum("ij,ij->j", part, part, dtype=np.float64)
    if not np.isfinite(square).all():
        raise PerturbZooError("co-expression: the expression holds NaN or infinite values")
    mean = total / n_rows
    spread = square - n_rows * mean**2
    varies = spread > 1e-10 * square  # a constant column leaves only the rounding of the sums
    return mean, np.where(varies, 1 / np.sqrt(np.where(varies, spread, 1)), 0)


def _correlations(matrix: Any, mean: np.ndarray, scale: np.ndarray, start: int, stop: int) -> Tensor:
    """Pearson's r of columns ``start:stop`` with columns ``start:``, ``(stop - start, columns - start)``, float32.

    Rows are taken in blocks and centred before they are multiplied, so that no digits are lost where a column's mean is
    large beside its spread.
    """
    centre, factor = torch.from_numpy(mean[start:]).float(), torch.from_numpy(scale[start:]).float()
    total = torch.zeros(stop - start, matrix.shape[1] - start)
    buffer: np.ndarray | None = None
    for part in _row_blocks(matrix):
        if buffer is None:
            buffer = np.empty(part.shape, dtype=np.float32)
        dense = buffer[: part.shape[0]]
        if sparse.issparse(part):
            part.astype(np.float32, copy=False).toarray(out=dense)
        else:
            dense[:] = part
        block = torch.from_numpy(dense)[:, start:].sub_(centre).mul_(factor)
        total.addmm_(block[:, : stop - start].T, block)
    return total


def _strongest(weight: Tensor, top_k: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Rows and columns of the values above `threshold` and among their row's `top_k`, ties at the last place included."""
    if not weight.numel():
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    last = weight.topk(min(top_k, weight.shape[1]), dim=1).values[:, -1:]
    row, column = ((weight > threshold) & (weight >= last)).nonzero(as_tuple=True)
    return row, column
