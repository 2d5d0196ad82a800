"""Figure of genetic-interaction scores: predicted against observed, one panel per score and one point per combination.

Called by notebooks and scripts with two tables of :func:`perturbzoo.evaluation.interaction.score_interactions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.layout_engine import ConstrainedLayoutEngine

from perturbzoo.errors import PerturbZooError, near_matches, shortened
from perturbzoo.evaluation.interaction import SCORES
from perturbzoo.plotting.effects import spread_apart
from perturbzoo.plotting.style import COLOURS, SMALL, strip_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "c1": "coefficient of the first",
    "c2": "coefficient of the second",
    "mag": "magnitude",
    "corr_fit": "model fit",
    "dominance": "dominance",
    "eq_contr": "equality of contribution",
    "dcor": "similarity to the singles",
    "dcor_singles": "similarity of the singles",
    "dcor_first": "similarity to the first",
    "dcor_second": "similarity to the second",
}
_WIDTH, _HEIGHT = 3.6, 3.1  # inches, of one panel
_PER_ROW = 3


def plot_interaction_scores(
    predicted: pd.DataFrame,
    observed: pd.DataFrame,
    *,
    scores: Sequence[str] = ("mag", "corr_fit", "dominance", "eq_contr", "dcor", "dcor_singles"),
    n_labels: int = 6,
    labels: tuple[str, str] = ("predicted", "observed"),
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Predicted against observed interaction scores, on one scale in each panel: a right prediction lies on the dashed line.

    Parameters
    ----------
    predicted, observed
        Of :func:`perturbzoo.evaluation.interaction.score_interactions`: column `condition` and the scores. Combinations in
        both are drawn; a score that is NaN or infinite on either side is left out, and the panel says of how many.
    scores
        Which of :data:`perturbzoo.evaluation.interaction.SCORES`, one panel each.
    n_labels
        How many combinations to name in each panel: those furthest from the line.
    labels
        What the two tables hold, for the axes.
    axes
        Where to draw, one per panel; a new figure by default.

    Returns
    -------
    list of Axes
        In the order of `scores`. The title has the Pearson correlation over the combinations drawn, where there are three.

    Raises
    ------
    PerturbZooError
        A table lacks a column, no combination is in both, or the number of `axes` is not that of the scores.
    """
    for name in scores:
        if name not in SCORES:
            raise PerturbZooError(f"no interaction score '{name}'{near_matches(name, SCORES)}; there are {', '.join(SCORES)}")
    for label, table in zip(labels, (predicted, observed), strict=True):
        if missing := [name for name in ("condition", *scores) if name not in table.columns]:
            raise PerturbZooError(
                f"the {label} scores lack the columns {shortened(missing)}: give what score_interactions returns"
            )
    both = observed.merge(predicted, on="condition", suffixes=(" observed", " predicted"))
    if both.empty:
        raise PerturbZooError(
            f"no combination has both {labels[0]} and {labels[1]} scores: {labels[0]} are "
            f"{shortened(predicted['condition'])}; {labels[1]} are {shortened(observed['condition'])}"
        )
    if axes is None:
        columns = min(_PER_ROW, len(scores))
        rows = -(-len(scores) // columns)
        layout = ConstrainedLayoutEngine(w_pad=0.1)  # names reach up to the next panel
        grid = plt.subplots(rows, columns, figsize=(_WIDTH * columns, _HEIGHT * rows), layout=layout, squeeze=False)[1]
        axes = list(grid.flat)
        for spare in axes[len(scores) :]:
            spare.remove()
        axes = axes[: len(scores)]
    if len(axes) != len(scores):
        raise PerturbZooError(f"{len(axes)} axes for {len(scores)} scores: give one for each")
    for ax, name in zip(axes, scores, strict=True):
        x, y = (both[f"{name} {side}"].to_numpy(dtype=float) for side in ("observed", "predicted"))
        _draw(ax, x, y, both["condition"].to_numpy(dtype=str), TITLES[name], n_labels)
        ax.set_xlabel(f"{labels[1]} {name}")
        ax.set_ylabel(f"{labels[0]} {name}")
    return list(axes)


def _draw(ax: Axes, x: np.ndarray, y: np.ndarray, names: np.ndarray, title: str, n_labels: int) -> None:
    defined = np.isfinite(x) & np.isfinite(y)
    undefined = len(x) - int(defined.sum())
    x, y, names = x[defined], y[defined], names[defined]
    low, high = (min(x.min(), y.min()), max(x.max(), y.max())) if len(x) else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.05
    low, high = low - margin, high + margin
    ax.plot([low, high], [low, high], color="0.4", linewidth=0.8, linestyle="--", zorder=1)
    ax.scatter(x, y, s=20, c=COLOURS[0], linewidths=0, zorder=2)
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    r = f"   r = {np.corrcoef(x, y)[0, 1]:.2f}" if len(x) >= 3 and min(np.ptp(x), np.ptp(y)) > 0 else ""
    ax.set_title(f"{title}{r}   n = {len(x)}", fontsize=SMALL + 1)
    if undefined:
        ax.text(0.02, 0.98, f"{undefined} undefined", transform=ax.transAxes, va="top", fontsize=SMALL, color="0.4")
    strip_frame(ax)
    _name(ax, x, y, names, np.sort(np.argsort(-np.abs(x - y), kind="stable")[:n_labels]))


def _name(ax: Axes, x: np.ndarray, y: np.ndarray, names: np.ndarray, chosen: np.ndarray) -> None:
    """Name the chosen points in a column right of the panel, spread apart, each with a thin leader."""
    if not len(chosen):
        return
    chosen = chosen[np.argsort(y[chosen], kind="stable")]
    low, high = ax.get_ylim()
    gap = min(1.3 * SMALL / (72 * 0.7 * _HEIGHT), 1.0 / len(chosen)) * (high - low)
    for index, level in zip(chosen, spread_apart(y[chosen], gap, low, high), strict=True):
        ax.annotate(
            names[index],
            (x[index], y[index]),
            (1.02, level),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=SMALL - 1,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2},
            zorder=1,
        )
