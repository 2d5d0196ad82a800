"""Figures of deltas: predicted against observed for one condition, and a heat map of many conditions.

Called by the command line and by notebooks with plain arrays and tables; knows neither models nor data modules.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.cluster.hierarchy import leaves_list, linkage

from perturbzoo.errors import PerturbZooError
from perturbzoo.plotting.style import COLOURS, DELTA_LABEL, SMALL, axes_of_size, strip_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_delta_scatter(
    observed: ArrayLike,
    predicted: ArrayLike,
    genes: Sequence[str],
    *,
    condition: str = "",
    targets: Collection[str] = (),
    n_labels: int = 12,
    ax: Axes | None = None,
) -> Axes:
    """Predicted against observed delta of one condition, one point per gene.

    Both axes have one scale, so that a prediction that is right lies on the dashed diagonal and one that is too timid
    lies flat. The genes with the largest observed |delta| are named.

    Parameters
    ----------
    observed, predicted
        Shape ``(G,)``: delta, log1p-normalised.
    genes
        The G names.
    condition
        For the title.
    targets
        Perturbed genes, drawn as diamonds; targets that are not measured are passed over.
    n_labels
        How many genes to name, measured targets always among them.
    ax
        Where to draw; a new figure by default.

    Raises
    ------
    PerturbZooError
        The lengths differ, or a delta is NaN or infinite.
    """
    x, y, names = np.asarray(observed, dtype=float), np.asarray(predicted, dtype=float), np.asarray(genes, dtype=str)
    if not x.shape == y.shape == names.shape == (len(names),) or not len(names):
        raise PerturbZooError(
            f"observed has shape {x.shape}, predicted {y.shape}, genes {names.shape}: give one value per gene in each"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise PerturbZooError("a delta is NaN or infinite: expected one number for every gene")
    ax = axes_of_size(ax, 5.5, 4.8)
    is_target = np.isin(names, list(targets))
    order = np.lexsort((-np.abs(x), ~is_target))
    named = order[: max(n_labels, int(is_target.sum()))] if n_labels > 0 else order[:0]
    is_named = np.isin(np.arange(len(names)), named)

    limit = 1.1 * max(np.abs(x).max(), np.abs(y).max(), 1e-6)
    ax.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    ax.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    ax.plot(
        [-limit, limit], [-limit, limit], color="0.4", linewidth=0.8, linestyle="--", zorder=1, label="prediction = observation"
    )
    for shown, colour, marker, size, label in (
        (~is_named & ~is_target, "0.6", "o", 8, "genes"),
        (is_named & ~is_target, COLOURS[0], "o", 22, "largest observed delta"),
        (is_target, COLOURS[5], "D", 34, "perturbed gene"),
    ):
        if shown.any():
            ax.scatter(x[shown], y[shown], s=size, c=colour, marker=marker, linewidths=0, zorder=2, label=label)
    ax.set_ylim(-limit, limit)
    # a column on either side belongs to the labels: as wide as the longest, at 0.7 of the type size per letter
    letters = max((len(name) for name in names[named]), default=0)
    column = min(0.35, 0.7 * SMALL * letters / _size_in_points(ax)[0])
    edge = 1.15 * limit
    ax.set_xlim(-edge / (1 - 2 * column), edge / (1 - 2 * column))
    ax.set_xticks([tick for tick in ax.get_xticks() if abs(tick) <= limit])
    for side in (-1, 1):
        _label_at_side(ax, named[(x[named] < 0) == (side < 0)], x, y, names, side * edge)
    ax.set_xlabel(f"observed {DELTA_LABEL}")
    ax.set_ylabel(f"predicted {DELTA_LABEL}")
    constant = np.ptp(x) == 0 or np.ptp(y) == 0
    score = "undefined" if constant else f"{np.corrcoef(x, y)[0, 1]:.2f}"
    ax.set_title(f"{condition}   Pearson r = {score}".strip(), fontsize=10)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=SMALL, frameon=False)
    strip_frame(ax)
    return ax


def _label_at_side(ax: Axes, chosen: np.ndarray, x: np.ndarray, y: np.ndarray, names: np.ndarray, at: float) -> None:
    """Name the chosen points in a column at x = `at`, evenly spread where they would overlap, with a thin leader each."""
    if not len(chosen):
        return
    chosen = chosen[np.argsort(y[chosen], kind="stable")]
    low, high = ax.get_ylim()
    gap = min(1.4 * SMALL / _size_in_points(ax)[1], 0.96 / max(len(chosen) - 1, 1)) * (high - low)
    margin = 0.02 * (high - low)
    place = spread_apart(y[chosen], gap, low + margin, high - margin)
    for index, level in zip(chosen, place, strict=True):
        ax.annotate(
            names[index],
            (x[index], y[index]),
            (at, level),
            ha="left" if at > 0 else "right",
            va="center",
            fontsize=SMALL,
            arrowprops={
                "relpos": (float(at < 0), 0.5),
                "arrowstyle": "-",
                "color": "0.75",
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 2,
            },
            zorder=1,
        )


def _size_in_points(ax: Axes) -> tuple[float, float]:
    box = ax.get_window_extent()
    return box.width / ax.figure.dpi * 72, box.height / ax.figure.dpi * 72


def spread_apart(positions: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Move sorted positions as little as need be (least squares) so that they lie `gap` apart within ``[low, high]``.

    With ``z_i = p_i - i gap`` the condition says that z rises, which is isotonic regression. `gap` must leave room for all.
    """
    from sklearn.isotonic import isotonic_regression

    steps = gap * np.arange(len(positions))
    return isotonic_regression(positions - steps, y_min=low, y_max=high - steps[-1]) + steps


def plot_delta_heatmap(delta: pd.DataFrame, *, n_genes: int = 40, cluster: bool = True, ax: Axes | None = None) -> Axes:
    """Deltas of many conditions in the genes that change most, as a heat map.

    Parameters
    ----------
    delta
        Conditions x genes: delta, log1p-normalised. Only finite values.
    n_genes
        How many genes to show: those with the largest |delta| in any condition.
    cluster
        Put alike conditions, and alike genes, beside each other; else keep the table's order.
    ax
        Where to draw; by default a new figure in which all names are legible.

    Raises
    ------
    PerturbZooError
        The table is empty or holds NaN or infinite values.
    """
    if delta.empty:
        raise PerturbZooError("the table of deltas is empty: expected conditions x genes")
    if not np.isfinite(delta.to_numpy(dtype=float)).all():
        raise PerturbZooError("the table of deltas holds NaN or infinite values: drop conditions that were not predicted")
    largest = np.argsort(-np.abs(delta.to_numpy(dtype=float)).max(0), kind="stable")[:n_genes]
    shown = delta.iloc[:, np.sort(largest)]
    if cluster:
        shown = shown.iloc[alike_together(shown.to_numpy(dtype=float)), alike_together(shown.to_numpy(dtype=float).T)]
    n_rows, n_columns = shown.shape
    ax = axes_of_size(ax, 2.8 + 0.16 * n_columns, max(3.4, 1.8 + 0.16 * n_rows))
    limit = max(float(np.abs(shown.to_numpy()).max()), 1e-6)
    image = ax.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    ax.set_xticks(range(n_columns), shown.columns.astype(str), rotation=90, fontsize=SMALL)
    ax.set_yticks(range(n_rows), shown.index.astype(str), fontsize=SMALL)
    ax.tick_params(length=0)
    ax.set_xlabel("genes with the largest |delta|")
    ax.set_ylabel("condition")
    ax.figure.colorbar(image, ax=ax, label=DELTA_LABEL, shrink=min(1.0, 3 / (0.16 * n_rows)), aspect=15)
    return ax


def plot_top_genes(
    observed: pd.DataFrame,
    predicted: pd.DataFrame,
    *,
    n_genes: int = 40,
    cluster: bool = True,
    axes: Sequence[Axes] | None = None,
) -> tuple[Axes, Axes]:
    """Heat maps of observed beside predicted delta, the same conditions and genes in the same order and on one scale.

    Parameters
    ----------
    observed, predicted
        Conditions x genes: delta, log1p-normalised. The same labels, in any order. Only finite values.
    n_genes
        How many genes to show: those with the largest observed |delta| in any condition.
    cluster
        Put alike conditions, and alike genes, beside each other, by the observed delta; else keep the table's order.
    axes
        Where to draw the two; by default a new figure in which all names are legible.

    Returns
    -------
    The axes of the observed and of the predicted delta. The scale ends at the largest observed |delta|: predictions beyond it are cut.

    Raises
    ------
    PerturbZooError
        A table is empty, holds NaN or infinite values, or their labels differ.
    """
    if observed.empty:
        raise PerturbZooError("the table of observed deltas is empty: expected conditions x genes")
    if set(observed.index) != set(predicted.index) or set(observed.columns) != set(predicted.columns):
        raise PerturbZooError(
            "observed and predicted deltas have different conditions or genes: give tables with the same labels"
        )
    predicted = predicted.loc[observed.index, observed.columns]
    for name, table in (("observed", observed), ("predicted", predicted)):
        if not np.isfinite(table.to_numpy(dtype=float)).all():
            raise PerturbZooError(f"the {name} deltas hold NaN or infinite values: drop conditions that were not predicted")
    largest = np.argsort(-np.abs(observed.to_numpy(dtype=float)).max(0), kind="stable")[:n_genes]
    shown = observed.iloc[:, np.sort(largest)]
    if cluster:
        shown = shown.iloc[alike_together(shown.to_numpy(dtype=float)), alike_together(shown.to_numpy(dtype=float).T)]
    beside = predicted.loc[shown.index, shown.columns]
    n_rows, n_columns = shown.shape
    if axes is None:
        import matplotlib.pyplot as plt

        size = (3.6 + 0.32 * n_columns, max(3.0, 1.8 + 0.16 * n_rows))
        axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")[1]
    left, right = axes
    limit = max(float(np.abs(shown.to_numpy()).max()), 1e-6)
    for ax, table, title in ((left, shown, "observed"), (right, beside, "predicted")):
        image = ax.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        ax.set_xticks(range(n_columns), table.columns.astype(str), rotation=90, fontsize=SMALL)
        ax.set_title(title, fontsize=SMALL + 2, loc="left")
        ax.tick_params(length=0)
    left.set_yticks(range(n_rows), shown.index.astype(str), fontsize=SMALL)
    right.figure.colorbar(image, ax=right, label=DELTA_LABEL, shrink=min(1.0, 3 / (0.16 * n_rows)), aspect=15)
    return left, right


def alike_together(rows: np.ndarray) -> np.ndarray:
    """Order of the rows, shape ``(N, G)``, along a dendrogram (average linkage, Euclidean)."""
    if len(rows) < 3:
        return np.arange(len(rows))
    return leaves_list(linkage(rows, method="average", optimal_ordering=len(rows) <= 300))
