"""Where cells come from: rows gathered by index into dense buffers that are used again and again.

Writing into memory the process already holds matters more than any arithmetic here: page-faulting fresh tensors of a
few MB is most of the cost of a naive loader.
"""

from __future__ import annotations

import sys
from typing import Protocol

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

# values of a dense buffer zeroed, then filled, at a time: 2 MiB of float32 are still in the cache then
_BLOCK = 1 << 19


class CellSource(Protocol):
    """Anything that can write the log1p-normalised expression of given cells into a dense buffer."""

    n_cells: int
    n_genes: int

    def gather(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Write cells `rows` ``(B,)`` into `out` ``(B, G)``, float32, log1p-normalised."""
        ...


class CSRSource:
    """Cells held in memory as one CSR matrix of log1p-normalised values.

    Parameters
    ----------
    matrix
        Shape ``(cells, genes)``, float32. Kept, not copied.
    """

    def __init__(self, matrix: sparse.csr_matrix) -> None:
        # imported here: '--help' has no use for it
        from sklearn.utils.sparsefuncs_fast import assign_rows_csr

        self._assign_rows = assign_rows_csr
        # it would keep only the last of entries that stand twice
        matrix.sum_duplicates()
        self.matrix = matrix
        self.n_cells, self.n_genes = matrix.shape
        # nor does it know the 64-bit indices of matrices with more than 2^31 entries
        self._is_small = matrix.indices.dtype == np.int32 and matrix.indptr.dtype == np.int32
        self._positions = np.arange(max(1, _BLOCK // max(1, self.n_genes)), dtype=np.intp)

    def gather(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Write cells `rows` ``(B,)`` into `out` ``(B, G)``, without the copy of their entries that slicing makes."""
        if not self._is_small:
            self.matrix[rows].toarray(out=out)
            return
        # the kernel trusts its arguments
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.n_cells:
            raise IndexError(f"rows from {rows.min()} to {rows.max()} of a source of {self.n_cells} cells")
        # threads would gain nothing: two of them are no faster than one, memory is what limits
        block = len(self._positions)
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            self._assign_rows(self.matrix, part, self._positions[: len(part)], out[start : start + block])


class BufferPool:
    """Dense float32 buffers that are handed out again once nobody holds a tensor on them.

    A torch tensor made from a NumPy array keeps a reference to it, and so does every view of that tensor, so the
    array's reference count says whether it is free. A caller that keeps batches (``list(loader)``) gets fresh memory
    and stays correct; a training loop cycles through two or three buffers.
    """

    def __init__(self, n_columns: int) -> None:
        self.n_columns = n_columns
        self._buffers: list[np.ndarray] = []
        # pinned memory lets the copy to a GPU overlap with computation
        self._pin = torch.cuda.is_available()

    def take(self, n_rows: int) -> np.ndarray:
        """Return a free buffer of shape ``(n_rows, n_columns)``; its content is undefined."""
        for position in range(len(self._buffers)):
            # one reference from the list, one from the argument of getrefcount
            if sys.getrefcount(self._buffers[position]) == 2:
                if self._buffers[position].shape[0] < n_rows:
                    self._buffers[position] = self._allocate(n_rows)
                return self._buffers[position][:n_rows]
        self._buffers.append(self._allocate(n_rows))
        return self._buffers[-1][:n_rows]

    def _allocate(self, n_rows: int) -> np.ndarray:
        if self._pin:
            return torch.empty(n_rows, self.n_columns, pin_memory=True).numpy()
        return np.empty((n_rows, self.n_columns), dtype=np.float32)


def gather_pairs(source: CellSource, pool: BufferPool, rows: np.ndarray, n_cells: int) -> tuple[Tensor, Tensor]:
    """Gather cells and their matched controls in one pass: two ``(B, G)`` tensors on one shared buffer.

    The first `n_cells` of `rows` are the cells.
    """
    buffer = pool.take(len(rows))
    source.gather(rows, buffer)
    return torch.from_numpy(buffer[:n_cells]), torch.from_numpy(buffer[n_cells:])
