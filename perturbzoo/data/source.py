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
        self.matrix = matrix
        self.n_cells, self.n_genes = matrix.shape

    def gather(self, rows: np.ndarray, out: np.ndarray) -> None:
        self.matrix[rows].toarray(out=out)


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


def gather_pairs(source: CellSource, pool: BufferPool, cells: np.ndarray, controls: np.ndarray) -> tuple[Tensor, Tensor]:
    """Gather cells and their matched controls in one pass: two ``(B, G)`` tensors on one shared buffer."""
    buffer = pool.take(len(cells) + len(controls))
    source.gather(np.concatenate([cells, controls]), buffer)
    both = torch.from_numpy(buffer)
    return both[: len(cells)], both[len(cells) :]
