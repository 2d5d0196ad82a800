"""The metrics of GEARS' ``compute_metrics``, ``deeper_analysis``, ``non_dropout_analysis`` and ``non_zero_analysis``, for all conditions at once.

Definitions: https://github.com/snap-stanford/GEARS, gears/inference.py (Roohani et al. 2023, https://doi.org/10.1038/s41587-023-01905-6);
the sets of genes: gears/data_utils.py. P conditions by G genes, log1p-normalised. Called by the evaluation of two files; arrays only.

Names, in the manner of the package: GEARS' ``frac_correct_direction_*`` is ``direction_*``, ``frac_opposite_direction_*`` is
``opposite_direction_*`` (the signs are 1 and -1) and ``frac_0/1_direction_*`` is ``zero_direction_*`` (one of the two changes is
exactly 0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perturbzoo.evaluation import metrics
from perturbzoo.evaluation.metrics import CONSTANT, Array, largest

Genes = NDArray[np.int64]
"""Shape ``(P, k)``: each row's own genes, padded with -1."""

TOP = (20, 50, 100, 200)
FILTERED = ("top20_de", "top20_de_non_dropout", "top20_de_non_zero")
"""The sets whose predicted means are held against the spread of the observed cells."""

_N_VARIABLE = 200
_QUANTILES = (0.0, 0.25, 0.4, 0.45, 0.55, 0.6, 0.75, 1.0)
_BANDS = {"in_range": (0, 7), "in_range_45_55": (3, 4), "in_range_40_60": (2, 5), "in_range_25_75": (1, 6)}


class Present(NamedTuple):
    """Which genes were seen in a condition, ``(P, G)`` each.

    ``non_zero``: the observed mean is not 0. ``non_dropout``: that, or 0 in the controls too, so that it is no loss of counts.
    """

    non_zero: NDArray[np.bool_]
    non_dropout: NDArray[np.bool_]


def present(observed: Array, control: Array) -> Present:
    """Which genes GEARS calls non-zero and non-dropout in each condition. Both ``(P, G)``: means over cells."""
    return Present(observed != 0, (observed != 0) | (control == 0))


def gene_sets(t: Array, seen: Present, targets: NDArray[np.bool_]) -> dict[str, Genes]:
    """The genes that differ most, per condition.

    Parameters
    ----------
    t
        Shape ``(P, G)``: Welch's t of the observed cells against the controls (:func:`perturbzoo.evaluation.metrics.welch_t`).
        GEARS takes it from scanpy over all cells of the data; here it is of the observed cells that are scored.
    seen
        Of :func:`present`.
    targets
        Shape ``(P, G)``: genes that a condition perturbs.

    Returns
    -------
    ``topK_de`` for K of 20, 50, 100, 200, the same with ``_no_target`` (the condition's targets left out, others in their place),
    ``top20_de_non_dropout`` and ``top20_de_non_zero``.
    """
    sets = {f"top{k}_de": largest(t, k) for k in TOP}
    sets |= {f"top{k}_de_no_target": largest(t, k, exclude=targets) for k in TOP}
    sets["top20_de_non_dropout"] = largest(t, 20, exclude=~seen.non_dropout)
    sets["top20_de_non_zero"] = largest(t, 20, exclude=~seen.non_zero)
    return sets


def variable_genes(observed: Array, control: Array) -> NDArray[np.int64]:
    """The 200 genes whose mean varies most between the observed conditions of a context and its controls, the same for its rows.

    GEARS takes the standard deviation over all conditions of the data; here it is over those that are scored, and their controls.

    Parameters
    ----------
    observed
        Shape ``(P, G)``.
    control
        Shape ``(S, G)``.
    """
    spread = np.concatenate([observed, control]).std(axis=0)
    return np.sort(np.argsort(-spread, kind="stable")[:_N_VARIABLE])


def scores(
    predicted: Array,
    observed: Array,
    change: Array,
    observed_change: Array,
    *,
    sets: Mapping[str, Genes],
    seen: Present,
    targets: NDArray[np.bool_],
    variable: NDArray[np.int64],
) -> dict[str, Array]:
    """Errors, correlations and directions over all genes and over each set.

    Parameters
    ----------
    predicted, observed
        Shape ``(P, G)``: pseudobulks.
    change, observed_change
        Shape ``(P, G)``: the same less the control mean.
    sets, seen
        Of :func:`gene_sets` and :func:`present`.
    variable
        Shape ``(P, k)``: :func:`variable_genes` of each row's context.
    targets
        Shape ``(P, G)``: genes that a condition perturbs; left out of what is called ``_no_target``.

    Returns
    -------
    By column name, ``(P,)``: NaN in rows that were not predicted. A correlation with a profile that is the same in all genes
    of the set is 0, as GEARS has it.
    """
    everything = np.ones_like(targets)
    found = {
        "pearson": metrics.pearson(predicted, observed),
        "mse_no_target": _mean_over((predicted - observed) ** 2, ~targets),
        "pearson_delta_no_target": _pearson_over(change, observed_change, ~targets),
        **_directions(change, observed_change, everything, ""),
    }
    for name, mask in seen._asdict().items():
        found |= _directions(change, observed_change, mask, f"_{name}")
    for name, genes in sets.items():
        tables = (predicted, observed, change, observed_change)
        p, o, dp, do = (np.take_along_axis(table, genes, axis=1) for table in tables)
        here = genes >= 0
        found[f"mse_{name}"] = _mean_over((p - o) ** 2, here)
        found[f"pearson_{name}"] = _pearson_over(p, o, here)
        found[f"pearson_delta_{name}"] = _pearson_over(dp, do, here)
        found |= _directions(dp, do, here, f"_{name}")
    p, o, dp, do = (np.take_along_axis(table, variable, axis=1) for table in (predicted, observed, change, observed_change))
    found["mse_top200_hvg"] = metrics.mse(p, o)
    found["pearson_top200_hvg"] = metrics.pearson(p, o)
    found["pearson_delta_top200_hvg"] = metrics.pearson(dp, do)
    return found


def spread_scores(
    predicted: Array, observed: Array, variance: Array, n: NDArray[np.integer], sets: Mapping[str, Genes]
) -> dict[str, Array]:
    """How many standard deviations of the observed cells a predicted mean is from the observed one.

    Over the genes of each of :data:`FILTERED` that vary at all: the mean and the standard deviation over genes of
    ``|predicted - observed| / std``, and the share of genes where it is at most 1, at most 2. ``std`` is that of the cells, not of
    their mean, and divides by n, as numpy's default does.

    Parameters
    ----------
    predicted, observed, variance
        Shape ``(P, G)``; the variance over cells is unbiased, NaN where there is one cell.
    n
        Shape ``(P,)``: cells.
    sets
        Of :func:`gene_sets`.
    """
    found = {}
    for name in FILTERED:
        genes, suffix = sets[name], name.removeprefix("top20_de")
        p, o, v = (np.take_along_axis(table, genes, axis=1) for table in (predicted, observed, variance))
        deviation = np.sqrt(np.nan_to_num(v) * ((n - 1) / n)[:, None])
        here = (genes >= 0) & (deviation > 0)
        sigma = np.abs(p - o) / np.where(here, deviation, 1.0)
        found[f"mean_sigma{suffix}"] = _mean_over(sigma, here)
        centre = np.nan_to_num(found[f"mean_sigma{suffix}"])[:, None]
        found[f"std_sigma{suffix}"] = np.sqrt(_mean_over((sigma - centre) ** 2, here))
        for limit in (1, 2):
            below = np.where(np.isnan(sigma), np.nan, sigma <= limit)
            found[f"sigma_below_{limit}{suffix}"] = _mean_over(below, here)
    return found


def quantiles(cells_of: Callable[[int], NDArray[np.floating]], sets: Mapping[str, Genes]) -> dict[str, Array]:
    """Quantiles of the observed cells at the genes of :data:`FILTERED`.

    Parameters
    ----------
    cells_of
        Gives row p's cells, ``(n, G)``.
    sets
        Of :func:`gene_sets`.

    Returns
    -------
    By set, ``(8, P, 20)``: minimum, quantiles .25, .4, .45, .55, .6, .75 and maximum; NaN where there is no gene or no cell.
    """
    wanted = np.concatenate([sets[name] for name in FILTERED], axis=1)
    found = np.full((len(_QUANTILES), *wanted.shape), np.nan)
    for row, genes in enumerate(wanted):
        cells = cells_of(row)
        if len(cells):
            found[:, row] = np.quantile(cells[:, genes].astype(np.float64), _QUANTILES, axis=0)
    found[:, wanted < 0] = np.nan
    return dict(zip(FILTERED, np.split(found, len(FILTERED), axis=2), strict=True))


def range_scores(predicted: Array, sets: Mapping[str, Genes], bands: Mapping[str, Array]) -> dict[str, Array]:
    """Share of the genes whose predicted mean lies within the range, or a band of quantiles, of the observed cells.

    Genes that no observed cell expresses do not count.

    Parameters
    ----------
    predicted
        Shape ``(P, G)``.
    sets, bands
        Of :func:`gene_sets` and :func:`quantiles`.
    """
    found = {}
    for name in FILTERED:
        p, band, suffix = np.take_along_axis(predicted, sets[name], axis=1), bands[name], name.removeprefix("top20_de")
        here = (sets[name] >= 0) & np.isfinite(band[0]) & ~((band[0] == 0) & (band[-1] == 0))
        for metric, (low, high) in _BANDS.items():
            inside = np.where(np.isnan(p), np.nan, (p >= band[low]) & (p <= band[high]))
            found[f"{metric}{suffix}"] = _mean_over(inside, here)
    return found


def fold_change_gaps(predicted: Array, observed: Array, control: Array) -> dict[str, Array]:
    """Mean absolute difference of predicted and observed expression as multiples of the control's.

    GEARS' ``fold_change_gap_all`` and, over the genes whose observed multiple is below .333 or .1, or above 3 or 10, its
    ``downreg`` and ``upreg`` parts (``_down3``, ``_down10``, ``_up3``, ``_up10``). The multiples are of log1p values, and genes
    with an observed mean below .5 are passed over, both as there.

    Returns
    -------
    By column name, ``(P,)``; NaN where no gene qualifies.
    """
    expressed = (control > 0) & (observed >= 0.5)
    base = np.where(expressed, control, 1.0)
    fold = np.where(expressed, observed / base, 0.0)
    gap = np.abs(predicted - observed) / base
    parts = {"": fold > 0, "_down3": fold < 0.333, "_down10": fold < 0.1, "_up3": fold > 3, "_up10": fold > 10}
    return {f"fold_change_gap{name}": _mean_over(gap, expressed & (fold > 0) & part) for name, part in parts.items()}


def _directions(change: Array, truth: Array, here: NDArray[np.bool_], suffix: str) -> dict[str, Array]:
    difference = np.abs(np.sign(change) - np.sign(truth))
    parts = {"direction": 0, "opposite_direction": 2, "zero_direction": 1}
    return {
        f"{metric}{suffix}": _mean_over(np.where(np.isnan(difference), np.nan, difference == value), here)
        for metric, value in parts.items()
    }


def _mean_over(values: Array, here: NDArray[np.bool_]) -> Array:
    """Row means over the entries that count; NaN where there are none, or one of them is NaN."""
    n = here.sum(axis=1)
    return np.where(n > 0, np.where(here, values, 0.0).sum(axis=1) / np.maximum(n, 1), np.nan)


def _pearson_over(x: Array, y: Array, here: NDArray[np.bool_]) -> Array:
    """Correlation over the entries of each row that count; 0 where either side is constant, NaN where none counts."""
    x, y = (np.where(here, side - _mean_over(side, here)[:, None], 0.0) for side in (x, y))
    n = here.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = [np.sqrt((side**2).sum(axis=1) / n) for side in (x, y)]
        undefined = (spread[0] <= CONSTANT) | (spread[1] <= CONSTANT)
        correlation = (x * y).sum(axis=1) / n / np.where(undefined, 1.0, spread[0] * spread[1])
    correlation[undefined] = 0.0
    return np.clip(correlation, -1.0, 1.0)
