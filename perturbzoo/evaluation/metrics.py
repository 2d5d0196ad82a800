"""Native metrics: predicted, observed and control pseudobulks in (one row per condition), one number per row out.

Everything is vectorised over conditions. P rows (a condition in a context) by G genes, float64, in the package's value
space (log1p of normalised counts) unless said otherwise. No model, no data module, no AnnData here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONSTANT = 1e-6
"""A profile whose root-mean-square deviation over genes is at or below this counts as constant: it is the rounding of
float32 expression, and a correlation with rounding would be a random number."""

RESOLUTION = 1e-5
"""Relative size below which a difference of means, or a variance over the squared mean, is float32 rounding."""


def mse(predicted: Array, observed: Array) -> Array:
    """Mean squared error over genes. Both ``(P, G)``; returns ``(P,)``."""
    return np.mean((predicted - observed) ** 2, axis=1)


def mae(predicted: Array, observed: Array) -> Array:
    """Mean absolute error over genes. Both ``(P, G)``; returns ``(P,)``."""
    return np.mean(np.abs(predicted - observed), axis=1)


def rmse(predicted: Array, observed: Array) -> Array:
    """Root of the mean squared error over genes (PerturBench). Both ``(P, G)``; returns ``(P,)``."""
    return np.sqrt(mse(predicted, observed))


def is_constant(profile: Array) -> NDArray[np.bool_]:
    """Whether a row is the same in every gene, to within :data:`CONSTANT`. ``(P, G)`` in, ``(P,)`` out."""
    return np.std(profile, axis=1) <= CONSTANT


def pearson(x: Array, y: Array) -> Array:
    """Pearson correlation of the rows of `x` with those of `y`.

    Parameters
    ----------
    x, y
        Shape ``(P, G)``.

    Returns
    -------
    Shape ``(P,)``. 0 where either row is constant (see :func:`is_constant`), NaN where either has a NaN.
    """
    x = x - x.mean(axis=1, keepdims=True)
    y = y - y.mean(axis=1, keepdims=True)
    x_scale = np.sqrt(np.mean(x**2, axis=1))
    y_scale = np.sqrt(np.mean(y**2, axis=1))
    undefined = (x_scale <= CONSTANT) | (y_scale <= CONSTANT)
    correlation = np.mean(x * y, axis=1) / np.where(undefined, 1.0, x_scale * y_scale)
    correlation[undefined] = 0.0
    correlation[np.isnan(x_scale) | np.isnan(y_scale)] = np.nan
    return np.clip(correlation, -1.0, 1.0)


def pearson_delta(predicted: Array, observed: Array, reference: Array) -> Array:
    """Pearson correlation over all genes of the predicted with the observed change from a reference.

    With `reference` = the observed control mean this is GEARS' and cell-eval's `pearson_delta`. Whatever all
    perturbations have in common (and the controls' sampling noise, present on both sides) counts as success there. With
    `reference` = the mean of the training perturbations (:func:`perturbed_mean`) it is Systema's `corr_all_allpert`,
    which rewards only what tells one perturbation from another.

    Parameters
    ----------
    predicted, observed
        Shape ``(P, G)``.
    reference
        Shape ``(P, G)`` or ``(G,)``; subtracted from both sides.

    Returns
    -------
    Shape ``(P,)``; 0 where a change is constant over genes (a prediction equal to the reference).
    """
    return pearson(predicted - reference, observed - reference)


def perturbed_mean(centroid: Array, context: NDArray[np.integer], control: Array) -> Array:
    """Mean of the training perturbations' centroids, each counted once however many cells it has (Systema).

    Parameters
    ----------
    centroid
        Shape ``(T, G)``: observed mean of each training pair, controls not among them.
    context
        Shape ``(T,)``: its row in `control`.
    control
        Shape ``(S, G)``: control mean of each context.

    Returns
    -------
    Shape ``(S, G)``. A context without training perturbations gets its own control mean plus the mean training delta.
    """
    if len(centroid) == 0:
        raise ValueError("the perturbed mean needs at least one training centroid")
    reference = control + np.mean(centroid - control[context], axis=0)
    for stratum in np.unique(context):
        reference[stratum] = centroid[context == stratum].mean(axis=0)
    return reference


def welch_t(
    mean: Array,
    variance: Array,
    n: NDArray[np.integer],
    control_mean: Array,
    control_variance: Array,
    n_control: NDArray[np.integer],
) -> Array:
    """Welch's t statistic of condition against control, per gene: scanpy's default test (``method='t-test'``).

    Parameters
    ----------
    mean, variance, control_mean, control_variance
        Shape ``(P, G)``; the variances are unbiased, and NaN where there was one cell (then taken as 0, as scanpy does).
    n, n_control
        Shape ``(P,)``: number of cells.

    Returns
    -------
    Shape ``(P, G)``. 0 where the means are equal, infinite where they differ and both variances are 0.
    """
    difference = mean - control_mean
    difference[np.abs(difference) <= RESOLUTION * np.maximum(np.abs(mean), np.abs(control_mean))] = 0.0
    squared_error = np.nan_to_num(variance) / n[:, None] + np.nan_to_num(control_variance) / n_control[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0.0, 0.0, difference / np.sqrt(squared_error))


def top_de(
    mean: Array,
    variance: Array,
    n: NDArray[np.integer],
    control_mean: Array,
    control_variance: Array,
    n_control: NDArray[np.integer],
    k: int = 20,
    exclude: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """The `k` most differentially expressed genes of each condition, by the magnitude of Welch's t.

    What ``scanpy.tl.rank_genes_groups(method="t-test", rankby_abs=True)`` ranks first; GEARS' top-20 DE sets.

    Parameters
    ----------
    mean, variance, n, control_mean, control_variance, n_control
        See :func:`welch_t`. For a test score they come from the observed *test* cells, at test time only.
    k
        How many genes.
    exclude
        Shape ``(P, G)``: genes that must not be chosen for a row, such as the perturbed genes themselves; the genes
        that follow in the ranking take their places.

    Returns
    -------
    Shape ``(P, k)``: gene indices, best first, padded with -1 where there are fewer than `k` genes to choose from.
    """
    return largest(welch_t(mean, variance, n, control_mean, control_variance, n_control), k, exclude)


def largest(t: Array, k: int, exclude: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """The `k` genes of largest magnitude in each row of `t`, shape ``(P, G)``; the rest as for :func:`top_de`."""
    magnitude = np.abs(t)
    if exclude is not None:
        magnitude[exclude] = -1.0
    n_genes = magnitude.shape[1]
    width = min(k, n_genes)
    chosen = np.sort(np.argpartition(-magnitude, width - 1, axis=1)[:, :width], axis=1)
    order = np.argsort(-np.take_along_axis(magnitude, chosen, axis=1), axis=1, kind="stable")
    genes = np.take_along_axis(chosen, order, axis=1)
    genes[np.take_along_axis(magnitude, genes, axis=1) < 0.0] = -1
    return np.pad(genes, ((0, 0), (0, k - width)), constant_values=-1)


def mse_at(predicted: Array, observed: Array, genes: NDArray[np.int64]) -> Array:
    """Mean squared error over each row's own genes (`mse_top20_de` with the sets of :func:`top_de`).

    Parameters
    ----------
    predicted, observed
        Shape ``(P, G)``.
    genes
        Shape ``(P, k)``: gene indices padded with -1.

    Returns
    -------
    Shape ``(P,)``; NaN for a row without genes.
    """
    error = (np.take_along_axis(predicted, genes, axis=1) - np.take_along_axis(observed, genes, axis=1)) ** 2
    return _mean_where(error, genes >= 0)


def direction_at(predicted: Array, observed: Array, control: Array, genes: NDArray[np.int64]) -> Array:
    """Fraction of each row's own genes whose predicted delta has the sign of the observed one (GEARS).

    A predicted delta of exactly 0 agrees only with an observed delta of exactly 0.

    Parameters
    ----------
    predicted, observed, control
        Shape ``(P, G)``.
    genes
        Shape ``(P, k)``: gene indices padded with -1.

    Returns
    -------
    Shape ``(P,)``; NaN for a row without genes.
    """
    reference = np.take_along_axis(control, genes, axis=1)
    predicted_sign = np.sign(np.take_along_axis(predicted, genes, axis=1) - reference)
    observed_sign = np.sign(np.take_along_axis(observed, genes, axis=1) - reference)
    # Two signs and not a comparison alone, so that a NaN prediction stays NaN instead of counting as wrong.
    agreement = np.where(np.isnan(predicted_sign), np.nan, predicted_sign == observed_sign)
    return _mean_where(agreement, genes >= 0)


def target_mask(targets: Sequence[Iterable[str]], genes: Sequence[str]) -> NDArray[np.bool_]:
    """Which genes are themselves targets of a condition; targets that are not measured are passed over.

    Parameters
    ----------
    targets
        The target names of each of the P conditions.
    genes
        The G measured genes.

    Returns
    -------
    Shape ``(P, G)``.
    """
    column = {gene: position for position, gene in enumerate(genes)}
    mask = np.zeros((len(targets), len(genes)), dtype=bool)
    for row, names in enumerate(targets):
        mask[row, [column[name] for name in names if name in column]] = True
    return mask


def _mean_where(values: Array, present: NDArray[np.bool_]) -> Array:
    """Row means over the entries that are present, NaN where there are none."""
    count = present.sum(axis=1)
    total = np.where(present, values, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
