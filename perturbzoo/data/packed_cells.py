"""Sampled cells held in little memory: whole counts and the numbers of their columns take two bytes each, where they fit.

Made by :func:`perturbzoo.data.cell_blocks.group_totals` while it reads a file, asked by the evaluation of two files, piece by piece.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

_SMALL = np.iinfo(np.uint16).max


class PackedCells:
    """Rows gathered from blocks of a file and put in order.

    Parameters
    ----------
    n_genes
        G.
    """

    def __init__(self, n_genes: int) -> None:
        self.n_genes = n_genes
        self._column_type = np.uint16 if n_genes <= _SMALL + 1 else np.int32
        # values, columns, lengths and scales of the rows of each block, until they are put in order
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]] = []
        self._start = np.zeros(1, dtype=np.int64)
        self._values = np.zeros(0, dtype=np.float32)
        self._column = np.zeros(0, dtype=self._column_type)
        self._scale: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._start) - 1

    def add(self, rows: sparse.csr_matrix, scale: np.ndarray | None) -> None:
        """Keep rows, ``(n, G)`` float32, after those that are kept.

        Parameters
        ----------
        rows
            log1p-normalised, or counts.
        scale
            Shape ``(n,)``, float32: what counts are multiplied by before log1p; None: it is done.
        """
        values = rows.data
        if scale is not None and (values <= _SMALL).all() and (values == np.rint(values)).all():
            values = values.astype(np.uint16)
        self._parts.append((values, rows.indices.astype(self._column_type), np.diff(rows.indptr), scale))

    def put_in_order(self, place: np.ndarray) -> None:
        """Move each row to its place, ``(N,)``; blocks are let go on the way, so that nothing is held twice."""
        if not self._parts:
            return
        size = np.zeros(len(place) + 1, dtype=np.int64)
        size[1:][place] = np.concatenate([length for _, _, length, _ in self._parts])
        self._start = np.cumsum(size)
        self._values = np.empty(self._start[-1], dtype=np.result_type(*(values.dtype for values, *_ in self._parts)))
        self._column = np.empty(self._start[-1], dtype=self._column_type)
        scales = [scale for *_, scale in self._parts if scale is not None]
        if scales:
            self._scale = np.empty(len(place), dtype=np.float32)
            self._scale[place] = np.concatenate(scales)
        first = 0
        while self._parts:
            values, column, length, _ = self._parts.pop(0)
            # the first value of each row goes to the row's start, the others follow
            to = np.repeat(self._start[place[first : first + len(length)]] - (np.cumsum(length) - length), length)
            to += np.arange(len(to))
            self._values[to], self._column[to] = values, column
            first += len(length)

    def rows(self, first: int, last: int) -> sparse.csr_matrix:
        """Rows `first` up to, not including, `last`, log1p-normalised: CSR float32."""
        start, stop = self._start[first], self._start[last]
        pointer = self._start[first : last + 1] - start
        values = self._values[start:stop].astype(np.float32)
        if self._scale is not None:
            values *= np.repeat(self._scale[first:last], np.diff(pointer))
            np.log1p(values, out=values)
        parts = (values, self._column[start:stop].astype(np.int32), pointer)
        return sparse.csr_matrix(parts, shape=(last - first, self.n_genes))
