"""Figures of a model's own idea of its error: whether its intervals cover what they say, whether its errors rank the true ones.

Both take what ``test`` writes into its folder for a model with a variance: ``calibration.csv`` and ``uncertainty.csv``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.plotting.style import COLOURS, SMALL, axes_of_size, strip_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_calibration(curve: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Wanted against reached coverage of a model's intervals; on the diagonal they hold what they say.

    Parameters
    ----------
    curve
        Of :func:`perturbzoo.evaluation.calibration.calibration_curve`: columns level and coverage, from 0 to 1.
    ax
        Where to draw; a new figure by default.

    Raises
    ------
    PerturbZooError
        A column is missing.
    """
    _require(curve, ("level", "coverage"), "calibration.csv")
    ax = axes_of_size(ax, 3.6, 3.6)
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, zorder=1)
    ax.plot(curve["level"], curve["coverage"], color=COLOURS[0], marker="o", markersize=4, zorder=2)
    start = max(0.0, float(np.floor(10 * min(curve["level"].min(), curve["coverage"].min())) / 10) - 0.05)
    ax.set_xlim(start, 1.0)
    ax.set_ylim(start, 1.0)
    ax.set_aspect("equal")
    ax.set_xlabel("wanted coverage of the intervals")
    ax.set_ylabel("expressed genes within them, mean over conditions")
    ax.set_title("above the line: too wide; below: too narrow", fontsize=SMALL, loc="left", color="0.3")
    strip_frame(ax)
    return ax


def plot_error_ranks(uncertainty: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Predicted against true error of each condition, with their rank correlation.

    Parameters
    ----------
    uncertainty
        What ``test`` writes: columns condition, category, predicted_rmse and rmse (log1p-normalised).
    ax
        Where to draw; a new figure by default.

    Raises
    ------
    PerturbZooError
        A column is missing.
    """
    _require(uncertainty, ("category", "predicted_rmse", "rmse"), "uncertainty.csv")
    ax = axes_of_size(ax, 4.6, 3.6)
    for position, (category, rows) in enumerate(uncertainty.groupby("category", sort=True)):
        colour = COLOURS[position % len(COLOURS)]
        label = f"{str(category).replace('_', ' ')} (n = {len(rows)})"
        ax.scatter(rows["predicted_rmse"], rows["rmse"], s=14, color=colour, label=label, zorder=2)
    rho = uncertainty["predicted_rmse"].corr(uncertainty["rmse"], method="spearman")
    ax.set_title(f"Spearman {rho:.2f}", fontsize=SMALL + 1, loc="left", color="0.3")
    ax.set_xlabel("predicted error of a condition\n(root mean square over genes, log1p-normalised)")
    ax.set_ylabel("true error")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=SMALL, frameon=False)
    strip_frame(ax)
    return ax


def _require(table: pd.DataFrame, columns: tuple[str, ...], file: str) -> None:
    missing = [name for name in columns if name not in table]
    if missing:
        raise PerturbZooError(f"the table lacks the columns {shortened(missing)}: give what test writes as {file}")
