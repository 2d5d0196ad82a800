"""Figure of the score table: bars of models and baselines per split category, with the ceiling above them.

Called by the command line and by notebooks with the table of :func:`perturbzoo.evaluation.summary.summarise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from perturbzoo.errors import PerturbZooError, near_matches, shortened
from perturbzoo.evaluation.table import METRICS
from perturbzoo.plotting.style import COLOURS, SMALL, axes_of_size, strip_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXIS_LABELS = {
    "pearson_delta": "Pearson r of delta",
    "pearson_delta_perturbed_reference": "Pearson r of delta\nfrom the perturbed mean",
    "direction_top20_de": "fraction of correct direction,\ntop 20 DE genes",
    "mse_top20_de": "mean squared error, top 20 DE genes\n(log1p-normalised, squared)",
    "mse_top20_de_no_target": "mean squared error, top 20 DE genes\nwithout targets (log1p-normalised, squared)",
    "mse": "mean squared error\n(log1p-normalised, squared)",
    "mae": "mean absolute error\n(log1p-normalised)",
    "rmse": "root mean squared error\n(log1p-normalised)",
}


def plot_score_bars(
    summary: pd.DataFrame,
    metric: str = "pearson_delta",
    *,
    categories: Sequence[str] | None = None,
    ceiling: str = "split-half ceiling",
    ax: Axes | None = None,
) -> Axes:
    """One metric of all models, grouped by split category, with bootstrap intervals over conditions.

    Parameters
    ----------
    summary
        Of :func:`perturbzoo.evaluation.summary.summarise`: columns model, category, metric, n, mean, low, high. The
        first model is the one the figure is about.
    metric
        Which of its metrics to show.
    categories
        Which of its categories, in this order; by default all. Those without conditions say so.
    ceiling
        The model that is drawn as a black line across each group, with its interval as a band, where there is one.
    ax
        Where to draw; a new figure by default.

    Raises
    ------
    PerturbZooError
        The table lacks a column, the metric or a category.
    """
    missing = {"model", "category", "metric", "n", "mean", "low", "high"} - set(summary.columns)
    if missing:
        raise PerturbZooError(f"the summary lacks the columns {shortened(sorted(missing))}: give what summarise returns")
    rows = summary[summary["metric"] == metric]
    if rows.empty:
        known = [str(name) for name in summary["metric"].unique()]
        raise PerturbZooError(
            f"metric '{metric}' is not in the summary{near_matches(metric, known)}; it has {', '.join(known)}"
        )
    present = [str(name) for name in rows["category"].unique()]
    categories = present if categories is None else list(categories)
    for category in categories:
        if category not in present:
            raise PerturbZooError(f"category '{category}' is not in the summary{near_matches(category, present)}")

    table = rows.set_index(["model", "category"])
    models = [str(name) for name in rows["model"].unique() if name != ceiling]
    has_ceiling = bool((rows["model"] == ceiling).any())
    width = 0.8 / max(len(models), 1)
    ax = axes_of_size(ax, max(5.0, 2.6 + len(categories) * (0.4 + 0.22 * len(models))), 3.8)
    centres = np.arange(len(categories))
    for position, model in enumerate(models):
        values = table.loc[model].reindex(categories)
        colour = COLOURS[position % len(COLOURS)]
        x = centres + (position - (len(models) - 1) / 2) * width
        ax.bar(
            x,
            values["mean"],
            0.9 * width,
            color=colour,
            hatch="///" if position >= len(COLOURS) else None,
            edgecolor="white",
            linewidth=0,
            label=model,
            zorder=2,
        )
        # a bar of height 0 would look as if it were missing
        ax.hlines(values["mean"], x - 0.4 * width, x + 0.4 * width, color=colour, linewidth=2, zorder=4, clip_on=False)
        middle, half = (values["high"] + values["low"]) / 2, (values["high"] - values["low"]) / 2
        ax.errorbar(x, middle, yerr=half, fmt="none", ecolor="0.2", elinewidth=0.9, capsize=2, zorder=5)
    if has_ceiling:
        top = table.loc[ceiling].reindex(categories)
        ax.hlines(top["mean"], centres - 0.44, centres + 0.44, color="black", linewidth=1.4, label=ceiling, zorder=4)
        for centre, low, high in zip(centres, top["low"], top["high"], strict=True):
            if np.isfinite(low):
                ax.fill_between([centre - 0.44, centre + 0.44], low, high, color="0.85", linewidth=0, zorder=1)
    counts = rows.groupby("category")["n"].max().reindex(categories).fillna(0).astype(int)
    for centre, count in zip(centres, counts, strict=True):
        if count == 0:
            ax.annotate("none", (centre, 0), (0, 3), textcoords="offset points", ha="center", fontsize=SMALL, color="0.4")
    ax.axhline(0, color="0.2", linewidth=0.8, zorder=3)
    ax.set_xlim(-0.6, len(categories) - 0.4)
    labels = [f"{name.replace('_', ' ')}\n(n = {count})" for name, count in zip(categories, counts, strict=True)]
    ax.set_xticks(centres, labels, fontsize=SMALL + 1)
    ax.tick_params(axis="x", length=0)
    better = ("\nhigher is better" if METRICS[metric] else "\nlower is better") if metric in METRICS else ""
    ax.set_ylabel(AXIS_LABELS.get(metric, metric.replace("_", " ")) + better)
    ax.set_title("mean over conditions, bootstrap interval", fontsize=SMALL + 1, loc="left", color="0.3")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=SMALL, frameon=False)
    strip_frame(ax)
    return ax
