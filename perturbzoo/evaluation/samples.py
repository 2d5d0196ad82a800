"""Distances between samples of cells for many conditions: each matrix of distances is computed once and used by all metrics.

The same numbers as :mod:`perturbzoo.evaluation.distribution` (see there for definitions and sources), which takes two samples
at a time. Called by :mod:`perturbzoo.evaluation.cell_distances`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from perturbzoo.evaluation.distribution import Array

Estimator = Literal["u", "v"]

_NEAR = 1e-2  # share of the squared lengths of two cells
_FEW_GENES = 1000
_PENDING = 1 << 20  # costs held before they are solved


class Sample:
    """Cells of one condition in one space.

    Parameters
    ----------
    cells
        Shape ``(n, F)``, log1p-normalised. Of more than 1,000 genes products are float32, in half the time: means of distances are off by
        less than 1e-6 then. Samples in which cells are nearly alike are computed in float64 all the same.
    origin
        Shape ``(F,)``: a point near the cells, such as a mean, which keeps small what is squared; the same for all samples that are
        compared. None: 0.
    """

    def __init__(self, cells: NDArray[np.floating], origin: Array | None = None) -> None:
        if cells.shape[1] <= _FEW_GENES:
            cells = cells.astype(np.float64)
        self.cells = cells if origin is None else cells - origin.astype(cells.dtype)
        self._parent: tuple[Sample, NDArray[np.intp]] | None = None
        self._across: dict[int, tuple[Sample, Array]] = {}
        self._kernels: dict[float, float] = {}
        self.tickets: dict[tuple[int, int], int] = {}  # of its problems in Transports

    def __len__(self) -> int:
        return len(self.cells)

    def part(self, chosen: NDArray[np.bool_]) -> Sample:
        """Some of the cells; distances among them, and to other parts, are looked up."""
        some = Sample(self.cells[chosen])
        some._parent = (self, np.flatnonzero(chosen))
        return some

    @cached_property
    def square(self) -> Array:
        """Shape ``(n,)``: squared length of each cell."""
        return np.einsum("ij,ij->i", self.cells, self.cells, dtype=np.float64)

    @cached_property
    def within(self) -> Array:
        """Shape ``(n, n)``: squared Euclidean distances between the sample's own cells; exactly 0 on the diagonal."""
        if self._parent is not None:
            whole, rows = self._parent
            return whole.within[np.ix_(rows, rows)]
        squared = self._product(self)
        np.fill_diagonal(squared, 0.0)
        return squared

    def across(self, other: Sample, moved: Array | None = None) -> Array:
        """Shape ``(n, m)``: squared Euclidean distances to the cells of another sample; after moving all of these by ``(F,)``."""
        if id(self) not in other._across:
            if self._parent is not None and other._parent is not None and self._parent[0] is other._parent[0]:
                squared = self._parent[0].within[np.ix_(self._parent[1], other._parent[1])]
            else:
                squared = self._product(other)
            other._across[id(self)] = (self, squared)  # this sample is kept, or its id could become another's
        squared = other._across[id(self)][1]
        if moved is None:
            return squared
        # |x + s - y|² = |x - y|² + 2 s(x - y) + |s|²: no product of all cells again
        by = moved.astype(self.cells.dtype)
        result = squared + (2 * (self.cells @ by) + moved @ moved)[:, None] - 2 * (other.cells @ by)
        return np.maximum(result, 0.0, out=result)

    def _product(self, other: Sample) -> Array:
        lengths = self.square[:, None] + other.square
        squared = lengths - 2 * (self.cells @ other.cells.T)
        near = squared < _NEAR * lengths
        if self is other:
            np.fill_diagonal(near, False)
        if self.cells.dtype == np.float32 and near.any():
            # of two products that cancel, float32 leaves rounding
            squared = lengths - 2 * (self.cells.astype(np.float64) @ other.cells.T.astype(np.float64))
        return np.maximum(squared, 0.0, out=squared)

    @cached_property
    def _sum(self) -> float:
        return float(np.sqrt(self.within).sum())

    def mean_distance(self, estimator: Estimator) -> float:
        """Mean Euclidean distance within the sample: ``"u"`` over two different cells, ``"v"`` over all pairs."""
        return self._sum / (len(self) * (len(self) - 1 if estimator == "u" else len(self)))

    def mean_kernel(self, scale: float) -> float:
        """Mean of ``exp(scale * squared distance)`` over two different cells."""
        if scale not in self._kernels:
            total = float(np.exp(self.within * scale).sum()) - len(self)
            self._kernels[scale] = total / (len(self) * (len(self) - 1))
        return self._kernels[scale]


def squared_distances(x: NDArray[np.floating], y: NDArray[np.floating]) -> Array:
    """``(n, m)`` squared Euclidean distances by one matrix product: twenty times faster than pair by pair over thousands of genes."""
    # around a common centre, where the squares that cancel are small
    centre = y.mean(axis=0)
    return Sample(x, centre).across(Sample(y, centre))


def compare(
    predicted: Sample, observed: Sample, *, bandwidth: float, estimator: Estimator, moved: Array | None = None
) -> dict[str, float]:
    """E-distance and squared MMD of two samples.

    Parameters
    ----------
    predicted, observed
        Two cells or more each, or all numbers but the V-statistic are NaN.
    bandwidth
        Of the MMD's kernel; the same for all that is compared.
    estimator
        ``"u"``: unbiased. ``"v"``: each cell's distance 0 to itself is counted too, as pertpy's ``edistance`` and cell-eval do:
        larger for small samples.
    moved
        Shape ``(F,)``: the predicted cells are moved by it first.

    Returns
    -------
    ``e_distance``, ``mmd``.
    """
    scores = {"e_distance": np.nan, "mmd": np.nan}
    fewest = min(len(predicted), len(observed))
    if fewest < (2 if estimator == "u" else 1):
        return scores
    across = predicted.across(observed, moved)
    own = predicted.mean_distance(estimator) + observed.mean_distance(estimator)
    scores["e_distance"] = 2 * float(np.sqrt(across).mean()) - own
    if fewest >= 2:
        scale = -1 / (2 * bandwidth**2)
        kernels = predicted.mean_kernel(scale) + observed.mean_kernel(scale)
        scores["mmd"] = kernels - 2 * float(np.exp(across * scale).mean())
    return scores


class Transports:
    """Sinkhorn divergences of many pairs of samples, solved together by POT: one at a time, its overhead is most of the work.

    A divergence is that of :func:`perturbzoo.evaluation.distribution.sinkhorn_divergence`. Moving all cells of a sample leaves its
    plan as it is, so a moved sample is solved once, whatever it is moved by.

    Parameters
    ----------
    regularisation
        Squared units; the same for all that is compared.
    """

    def __init__(self, regularisation: float) -> None:
        self._regularisation = regularisation
        self._pending: dict[int, list[tuple[int, Array]]] = {}
        self._held = 0
        self._costs: list[float] = []
        self._asked: list[tuple[int, int, int, float] | None] = []

    def ask(self, predicted: Sample, observed: Sample, n: int, moved: Array | None = None) -> None:
        """Note a pair, by the first `n` cells of each: the divergence is biased by the number, so all pairs must use as many.

        All predicted cells are moved by `moved`, ``(F,)``, first.
        """
        used = min(n, len(predicted), len(observed))
        if used < 2 or not self._regularisation > 0:
            self._asked.append(None)
            return
        shift = 0.0
        if moved is not None:
            difference = predicted.cells[:used].mean(axis=0) - observed.cells[:used].mean(axis=0)
            shift = float(2 * (moved @ difference) + moved @ moved)
        between = self._ticket(observed, (id(predicted), used), predicted.across(observed))
        own = [self._ticket(one, (0, used), one.within) for one in (predicted, observed)]
        self._asked.append((between, own[0], own[1], shift))

    def _ticket(self, holder: Sample, key: tuple[int, int], squared: Array) -> int:
        """Where the cost of this problem will be; the same for the same problem."""
        if key not in holder.tickets:
            holder.tickets[key] = len(self._costs)
            self._pending.setdefault(key[1], []).append((len(self._costs), squared[: key[1], : key[1]].copy()))
            self._costs.append(np.nan)
            self._held += key[1] ** 2
        return holder.tickets[key]

    def settle(self, *, now: bool = False) -> None:
        """Solve what is noted, if it is much: to be called between conditions."""
        if self._held < _PENDING and not now:
            return
        for problems in self._pending.values():
            costs = transport_costs(np.stack([squared for _, squared in problems]), self._regularisation)
            for (ticket, _), cost in zip(problems, costs.tolist(), strict=True):
                self._costs[ticket] = cost
        self._pending, self._held = {}, 0

    def divergences(self) -> Array:
        """In the order in which they were asked for; NaN where a sample has fewer than two cells."""
        self.settle(now=True)
        return np.array(
            [
                np.nan if one is None else self._costs[one[0]] + one[3] - (self._costs[one[1]] + self._costs[one[2]]) / 2
                for one in self._asked
            ]
        )


def transport_costs(squared: Array, regularisation: float, tolerance: float = 1e-6) -> Array:
    r"""Entropic optimal transport costs :math:`\langle P, C \rangle + \epsilon\, \mathrm{KL}(P \,|\, a b^\top)` of uniform samples.

    Parameters
    ----------
    squared
        Shape ``(B, n, n)``: costs of B problems.
    regularisation
        Epsilon.
    tolerance
        Largest error of a plan's marginals (Euclidean norm over cells) at which the iteration ends.

    Returns
    -------
    Shape ``(B,)``.
    """
    from ot.batch import solve_batch

    # A plan does not change with what is taken from a row or a column of the costs; near 0 their exponentials do not vanish.
    rows = squared.min(axis=2, keepdims=True)
    columns = (squared - rows).min(axis=1, keepdims=True)
    taken = rows.mean(axis=(1, 2)) + columns.mean(axis=(1, 2))
    options = {"reg": regularisation, "reg_type": "kl", "max_iter": 20_000, "tol": tolerance, "grad": "detach"}
    with np.errstate(all="ignore"):
        costs = solve_batch(squared - rows - columns, method="sinkhorn", **options).value
        lost = ~np.isfinite(costs)
        if lost.any():
            costs[lost] = solve_batch((squared - rows - columns)[lost], method="log_sinkhorn", **options).value
    return costs + taken


def median_distance(cells: NDArray[np.floating]) -> float:
    """Median Euclidean distance between two different of the cells, ``(n, F)``; NaN below two, or where it is 0."""
    if len(cells) < 2:
        return float("nan")
    upper = np.triu_indices(len(cells), 1)
    width = float(np.median(np.sqrt(squared_distances(cells, cells)[upper])))
    return width if width > 0 else float("nan")
