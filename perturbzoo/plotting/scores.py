"""Figures of the score table: bars per split category, the leaderboard of one metric, ranks from metric to metric.

Called by the command line and by notebooks with the table of :func:`perturbzoo.evaluation.summary.summarise`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from perturbzoo.errors import PerturbZooError, near_matches, shortened
from perturbzoo.evaluation import ceilings
from perturbzoo.evaluation.labels import label_of
from perturbzoo.evaluation.rows import CEILING, FLOOR, MODEL, kinds_of_rows, rank_rows
from perturbzoo.evaluation.summary import ALL
from perturbzoo.evaluation.table import FILE_METRICS, METRICS
from perturbzoo.plotting.style import COLOURS, SMALL, axes_of_size, strip_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)))
MARKS = ("o", "s", "^", "D", "v", "P", "X")
"""Of models in the ranks figure: told apart without their colours."""
IN_LOGS = {"mse": ", squared", "mae": "", "rmse": ""}
"""Errors in units of log1p-normalised expression, by how their names begin: what comes after the unit."""


def plot_score_bars(
    summary: pd.DataFrame,
    metric: str = "pearson_delta",
    *,
    categories: Sequence[str] | None = None,
    ceiling: str = ceilings.CEILING,
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
    rows = _rows_of(summary, metric)
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
    ax.set_ylabel(textwrap.fill(_label(metric), 44) + better)
    ax.set_title("mean over conditions, bootstrap interval", fontsize=SMALL + 1, loc="left", color="0.3")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=SMALL, frameon=False)
    strip_frame(ax)
    return ax


def plot_leaderboard(
    summary: pd.DataFrame,
    metric: str = "pearson_delta",
    *,
    category: str = ALL,
    kinds: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One metric of all rows, best first below the ceilings, with bootstrap intervals over conditions.

    Models are filled, floors hollow, ceilings a short bar. The dashed line down the figure is the split-half
    ceiling, where there is one.

    Parameters
    ----------
    summary
        Of :func:`perturbzoo.evaluation.summary.summarise`: columns model, category, metric, n, mean, low, high.
    metric, category
        Which of its metrics, over which conditions.
    kinds
        ``model``, ``floor`` or ``ceiling`` of each row by name; by default the first row is the model
        (:func:`perturbzoo.evaluation.rows.kinds_of_rows`).
    ax
        Where to draw; a new figure by default.

    Raises
    ------
    PerturbZooError
        The table lacks a column, the metric or the category.
    """
    rows = _rows_of(summary, metric)
    present = [str(name) for name in rows["category"].unique()]
    if category not in present:
        raise PerturbZooError(f"category '{category}' is not in the summary{near_matches(category, present)}")
    rows = rows[(rows["category"] == category) & rows["mean"].notna()].set_index("model")
    kinds = kinds_of_rows([str(name) for name in summary["model"].unique()]) if kinds is None else kinds
    ranks = rank_rows(summary, list(rows.index), category)[metric]
    order = sorted(rows.index, key=lambda name: (kinds.get(name) != CEILING, ranks[name]))
    ax = axes_of_size(ax, 6.2, 1.1 + 0.26 * len(order))
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    line = rows["mean"].get(ceilings.CEILING)
    if line is not None:
        ax.axvline(line, color="0.3", linewidth=0.8, linestyle="--", zorder=0)
    for place, name in enumerate(order):
        mean, low, high = (float(rows.loc[name, column]) for column in ("mean", "low", "high"))
        kind = kinds.get(name, MODEL)
        colour = COLOURS[0] if kind == MODEL else "0.35" if kind == FLOOR else "black"
        if np.isfinite(low):
            ax.hlines(place, low, high, color=colour, linewidth=1.2, zorder=1)
        face = "white" if kind == FLOOR else colour
        ax.plot(
            [mean],
            [place],
            marker="|" if kind == CEILING else "o",
            markersize=10 if kind == CEILING else 5,
            color=colour,
            markerfacecolor=face,
            markeredgewidth=2 if kind == CEILING else 1.2,
            linestyle="none",
            zorder=2,
            label=name,
        )
    if line is not None:
        left = line > np.mean(ax.get_xlim())
        ax.annotate(
            ceilings.CEILING,
            (line, 0),
            (-4 if left else 4, 3),
            xycoords=ax.get_xaxis_transform(),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=SMALL,
            color="0.3",
        )
    counts = rows["n"].max()
    ax.set_yticks(
        range(len(order)),
        [name + (f" (n = {rows.loc[name, 'n']})" if rows.loc[name, "n"] < counts else "") for name in order],
        fontsize=SMALL,
    )
    for tick, name in zip(ax.get_yticklabels(), order, strict=True):
        tick.set_fontweight("bold" if kinds.get(name, MODEL) == MODEL else "normal")
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.set_xlabel(f"{_label(metric)}, {_better(metric)}")
    ax.set_title(
        f"{category.replace('_', ' ')}, n = {counts}: mean over conditions, bootstrap interval",
        fontsize=SMALL + 1,
        loc="left",
        color="0.3",
    )
    strip_frame(ax)
    return ax


def plot_ranks(
    summary: pd.DataFrame,
    metrics: Sequence[str] | None = None,
    *,
    category: str = ALL,
    kinds: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """How ranks change from metric to metric: one line for each model and floor, 1 is best; ceilings do not compete.

    Parameters
    ----------
    summary
        Of :func:`perturbzoo.evaluation.summary.summarise`.
    metrics
        Which of its metrics, in this order; by default those of :data:`perturbzoo.evaluation.table.METRICS` that it has.
    category, kinds, ax
        As in :func:`plot_leaderboard`.

    Raises
    ------
    PerturbZooError
        The table lacks a column or a metric.
    """
    metrics = [name for name in METRICS if name in set(summary.get("metric", ()))] if metrics is None else list(metrics)
    for metric in metrics or ["pearson_delta"]:
        _rows_of(summary, metric)
    kinds = kinds_of_rows([str(name) for name in summary["model"].unique()]) if kinds is None else kinds
    names = [str(name) for name in summary["model"].unique() if kinds.get(str(name), MODEL) != CEILING]
    ranks = rank_rows(summary, names, category).reindex(columns=metrics)
    ax = axes_of_size(ax, 3.6 + 0.95 * len(metrics), 1.6 + 0.24 * len(names))
    x = np.arange(len(metrics))
    models = [name for name in names if kinds.get(name, MODEL) == MODEL]
    for name in sorted(names, key=lambda name: kinds.get(name, MODEL) == MODEL):
        is_model = name in models
        place = models.index(name) if is_model else 0
        colour = COLOURS[place % len(COLOURS)] if is_model else "0.6"
        ax.plot(
            x,
            ranks.loc[name],
            color=colour,
            linewidth=2 if is_model else 1,
            linestyle=LINES[place % len(LINES)] if is_model else ":",
            marker=MARKS[place % len(MARKS)] if is_model else "o",
            markersize=5.5 if is_model else 4.5,
            markerfacecolor=colour if is_model else "white",
            label=name,
            zorder=3 if is_model else 2,
        )
    for column, at, side in ((metrics[0], -0.12, "right"), (metrics[-1], len(metrics) - 0.88, "left")) if metrics else ():
        # a name stands at its point; rows that share a rank share a line of names
        for place, group in ranks[column].dropna().groupby(ranks[column], sort=True):
            weight = "bold" if any(name in models for name in group.index) else "normal"
            ax.text(at, place, ", ".join(group.index), ha=side, va="center", fontsize=SMALL, fontweight=weight, color="0.2")
    arrows = {True: "↑", False: "↓", None: "→1"}
    ax.set_xticks(x, [f"{textwrap.fill(label_of(name), 13)} {arrows[FILE_METRICS[name]]}" for name in metrics], fontsize=SMALL)
    ax.xaxis.tick_top()
    ax.set_ylim(len(names) + 0.6, 0.4)
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def _rows_of(summary: pd.DataFrame, metric: str) -> pd.DataFrame:
    missing = {"model", "category", "metric", "n", "mean", "low", "high"} - set(summary.columns)
    if missing:
        raise PerturbZooError(f"the summary lacks the columns {shortened(sorted(missing))}: give what summarise returns")
    rows = summary[summary["metric"] == metric]
    if rows.empty:
        known = [str(name) for name in summary["metric"].unique()]
        raise PerturbZooError(
            f"metric '{metric}' is not in the summary{near_matches(metric, known)}; it has {', '.join(known)}"
        )
    return rows


def _label(metric: str) -> str:
    """The metric's name, with its unit where it has one."""
    start = metric.split("_")[0]
    return label_of(metric) + (f" (log1p-normalised{IN_LOGS[start]})" if start in IN_LOGS else "")


def _better(metric: str) -> str:
    return {True: "higher is better", False: "lower is better", None: "nearer to 1 is better"}[FILE_METRICS.get(metric)]
