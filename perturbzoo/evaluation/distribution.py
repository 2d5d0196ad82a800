"""How far apart two samples of cells are as distributions: what a mean cannot show.

Samples are ``(n, F)`` and ``(m, F)`` arrays in one space: genes (log1p-normalised) or principal components. All numbers
depend on that space, so compare models in one. Knows no model and no data module.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist, pdist

from perturbzoo.errors import PerturbZooError

Array = NDArray[np.float64]


def _samples(x: ArrayLike, y: ArrayLike, fewest: int) -> tuple[Array, Array]:
    """Both as float64 matrices of finite values with the same columns."""
    both = [np.asarray(sample, dtype=np.float64) for sample in (x, y)]
    for name, sample in zip(("x", "y"), both, strict=True):
        if sample.ndim != 2:
            raise PerturbZooError(f"{name} has shape {sample.shape}: give cells x features")
        if len(sample) < fewest:
            raise PerturbZooError(f"{name} has {len(sample)} cells: this distance needs {fewest} or more")
        if not np.isfinite(sample).all():
            raise PerturbZooError(f"{name} has values that are not finite")
    if both[0].shape[1] != both[1].shape[1]:
        raise PerturbZooError(f"x has {both[0].shape[1]} features and y {both[1].shape[1]}: give both in one space")
    return both[0], both[1]


def _off_diagonal_mean(square: Array) -> float:
    """Mean over the pairs of two different cells."""
    n = len(square)
    return float((square.sum() - np.trace(square)) / (n * (n - 1)))


def energy_distance(x: ArrayLike, y: ArrayLike, estimator: Literal["u", "v"] = "u") -> float:
    r"""Unbiased estimate of the energy distance :math:`2 E|X - Y| - E|X - X'| - E|Y - Y'|`, with Euclidean distances.

    Szekely and Rizzo 2013, https://doi.org/10.1016/j.jspi.2013.03.018. The means within a sample leave out each cell's
    distance 0 to itself. With it (the V-statistic) small samples look farther apart than large ones, and a prediction of few
    cells worse than the same of many. The unbiased estimate is around 0 for two samples of one distribution, and can be
    below.

    Parameters
    ----------
    x, y
        Shapes ``(n, F)`` and ``(m, F)``; two cells or more each.
    estimator
        ``"u"``, unbiased, or ``"v"``, the V-statistic, which pertpy's ``edistance`` and cell-eval compute.

    Returns
    -------
    In units of the space.

    Raises
    ------
    PerturbZooError
        Fewer than two cells, other features, values that are not finite.
    """
    x, y = _samples(x, y, 2)
    # the V-statistic's mean also runs over the n distances of 0 among n * n
    n, m = (1.0, 1.0) if estimator == "u" else (1 - 1 / len(x), 1 - 1 / len(y))
    return float(2 * cdist(x, y).mean() - n * pdist(x).mean() - m * pdist(y).mean())


def median_bandwidth(x: ArrayLike, y: ArrayLike) -> float:
    """Median Euclidean distance between two different cells of both samples together: the kernel width of :func:`mmd`.

    Take it once for all models that are compared, from observed cells: a width that follows the prediction would change the
    measure with what is measured.

    Raises
    ------
    PerturbZooError
        All cells are alike; see also :func:`energy_distance`.
    """
    x, y = _samples(x, y, 1)
    distances = pdist(np.concatenate([x, y]))
    width = float(np.median(distances)) if len(distances) else 0.0
    if width == 0:
        raise PerturbZooError("the median distance between cells is 0: no kernel width can be taken from them")
    return width


def mmd(x: ArrayLike, y: ArrayLike, bandwidth: float | None = None) -> float:
    r"""Unbiased estimate of the squared maximum mean discrepancy with the kernel :math:`\exp(-|x - y|^2 / 2 h^2)`.

    Gretton et al. 2012, equation 3, https://jmlr.org/papers/v13/gretton12a.html. It can be below 0, as every unbiased
    estimate of 0 must.

    Parameters
    ----------
    x, y
        Shapes ``(n, F)`` and ``(m, F)``; two cells or more each.
    bandwidth
        h, in units of the space; None for :func:`median_bandwidth` of these samples.

    Raises
    ------
    PerturbZooError
        The width is not positive; see also :func:`energy_distance`.
    """
    x, y = _samples(x, y, 2)
    width = median_bandwidth(x, y) if bandwidth is None else bandwidth
    if not width > 0:
        raise PerturbZooError(f"bandwidth is {width}: give a positive number, or None for the median distance")

    def kernel(a: Array, b: Array) -> Array:
        return np.exp(-cdist(a, b, "sqeuclidean") / (2 * width**2))

    return _off_diagonal_mean(kernel(x, x)) + _off_diagonal_mean(kernel(y, y)) - 2 * float(kernel(x, y).mean())


def sinkhorn_divergence(x: ArrayLike, y: ArrayLike, regularisation: float) -> float:
    r"""Debiased entropic transport cost :math:`S(x, y) - (S(x, x) + S(y, y)) / 2` of squared Euclidean distances.

    Feydy et al. 2019, https://proceedings.mlr.press/v89/feydy19a.html, with
    :math:`S = \min_P \langle P, C \rangle + \epsilon\, \mathrm{KL}(P \,|\, a b^\top)`, by POT. It goes from the squared
    Wasserstein distance at :math:`\epsilon \to 0` to the squared distance of the means at :math:`\epsilon \to \infty`. It is
    no unbiased estimate: smaller samples give larger values, so compare samples of one size.

    Parameters
    ----------
    x, y
        Shapes ``(n, F)`` and ``(m, F)``.
    regularisation
        Epsilon, in squared units of the space. Take it once for all models that are compared, such as a tenth of
        ``median_bandwidth(observed, control) ** 2``.

    Raises
    ------
    PerturbZooError
        The regularisation is not positive; see also :func:`energy_distance`.
    """
    import ot  # a second, which '--help' has no use for

    x, y = _samples(x, y, 1)
    if not regularisation > 0:
        raise PerturbZooError(f"regularisation is {regularisation}: give a positive number, in squared units of the space")

    def cost(a: Array, b: Array) -> float:
        distances = cdist(a, b, "sqeuclidean")
        # a weak regularisation takes thousands of steps, the usual one stops by the tolerance long before
        return float(ot.solve(distances, reg=regularisation, reg_type="KL", max_iter=20_000, tol=1e-5).value)

    return cost(x, y) - (cost(x, x) + cost(y, y)) / 2


def r_squared(predicted: ArrayLike, observed: ArrayLike) -> float:
    """Coefficient of determination over features: 1 - squared error / spread of the observed values around their mean.

    1 is perfect, 0 what one number for all features would get, below 0 worse. Not the squared correlation that scGen and
    CellOT call R2, which forgives any scale and shift.

    Parameters
    ----------
    predicted, observed
        Shape ``(F,)``: a statistic of each feature, such as its mean.

    Returns
    -------
    NaN where the observed values are all the same.
    """
    predicted, observed = np.asarray(predicted, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    spread = float(((observed - observed.mean()) ** 2).sum())
    return 1 - float(((predicted - observed) ** 2).sum()) / spread if spread > 0 else float("nan")


def r_squared_of_moments(predicted: ArrayLike, observed: ArrayLike) -> tuple[float, float]:
    """:func:`r_squared` of the features' means, and of their unbiased variances.

    Parameters
    ----------
    predicted, observed
        Shapes ``(n, F)`` and ``(m, F)``; two cells or more each.
    """
    predicted, observed = _samples(predicted, observed, 2)
    variances = r_squared(predicted.var(axis=0, ddof=1), observed.var(axis=0, ddof=1))
    return r_squared(predicted.mean(axis=0), observed.mean(axis=0)), variances
