"""What is said about tables of scores: means with bootstrap intervals over conditions, differences, the printed table."""

from __future__ import annotations

import math
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.table import FILE_METRICS, PRINTED

ALL = "all"
"""Name of the block over the conditions of every category."""


def summarise(
    scores: Mapping[str, pd.DataFrame],
    *,
    categories: Sequence[str] | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    metrics: Iterable[str] = FILE_METRICS,
) -> pd.DataFrame:
    """Mean of every metric over conditions, with a bootstrap interval, for each model and split category.

    Conditions are resampled with all their contexts, since the contexts of one condition are not independent; every
    model is scored on the same resampled conditions. The numbers do not depend on the order of the rows.

    Parameters
    ----------
    scores
        Tables of :func:`perturbzoo.evaluation.table.score_conditions` by model name.
    categories
        Categories to report, in this order, also where they are empty; by default those that occur.
    n_bootstrap, seed, level
        Number of resamples, seed of their draw, and the share of them that lies within the interval.
    metrics
        The columns to summarise, where a table has them.

    Returns
    -------
    One row per model, category (``"all"`` first) and metric, with columns model, category, metric, n (conditions that
    have a value), mean, low, high. NaN scores are left out, and `n` tells so. `low` and `high` are NaN below two
    conditions, as `mean` is with none.

    Raises
    ------
    PerturbZooError
        A (condition, context) occurs twice in a table, or the tables disagree on its category, or on what to report.
    """
    table, category = _aligned(scores, metrics)
    present = list(dict.fromkeys(category))
    if categories is None:
        categories = sorted(present)
    elif not set(present) <= set(categories):
        missing = shortened(f"'{name}'" for name in sorted(set(present) - set(categories)))
        raise PerturbZooError(f"the scores have categories that are not to be reported: {missing}; add them to the list")
    parts = []
    for name in (ALL, *categories):
        block = table if name == ALL else table[(category == name).to_numpy()]
        frame = _bootstrapped(block, name, n_bootstrap, seed, level)
        parts.append(frame.assign(category=name))
    summary = pd.concat(parts)
    order = {model: position for position, model in enumerate(scores)}
    summary = summary.sort_values("model", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    return summary[["model", "category", "metric", "n", "mean", "low", "high"]]


def paired_difference(
    model: pd.DataFrame,
    baseline: pd.DataFrame,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Mean of ``model - baseline`` over the conditions that both have, with a bootstrap interval.

    An interval that leaves out 0 is a difference beyond chance of which conditions were tested. Two overlapping
    intervals of :func:`summarise` do not say there is none: conditions that are hard for one model are hard for all.

    Parameters
    ----------
    model, baseline
        Tables of :func:`perturbzoo.evaluation.table.score_conditions`.
    n_bootstrap, seed, level
        As in :func:`summarise`.

    Returns
    -------
    One row per category (``"all"`` first) and metric: category, metric, n, difference, low, high. Above 0 is in favour
    of the model where higher is better (:data:`perturbzoo.evaluation.table.METRICS`), of the baseline elsewhere.
    """
    table, category = _aligned({"model": model, "baseline": baseline})
    difference = table["model"] - table["baseline"]
    keys = [index[:2] for index in difference.index]
    labels = pd.DataFrame(keys, columns=["condition", "context"]).assign(category=category.to_numpy())
    frame = pd.concat([labels, difference.reset_index(drop=True)], axis=1)
    summary = summarise({"difference": frame}, n_bootstrap=n_bootstrap, seed=seed, level=level)
    return summary.drop(columns="model").rename(columns={"mean": "difference"})


def _aligned(scores: Mapping[str, pd.DataFrame], metrics: Iterable[str] = FILE_METRICS) -> tuple[pd.DataFrame, pd.Series]:
    """Put the tables side by side: rows sorted (condition, context), columns (model, metric); and the rows' category."""
    if not scores:
        raise PerturbZooError("there are no scores to summarise; give the table of one model at least")
    sides, wanted = {}, list(metrics)
    for name, frame in scores.items():
        keys = frame[["condition", "context"]].astype(str)
        if keys.duplicated().any():
            condition, context = keys[keys.duplicated()].iloc[0]
            raise PerturbZooError(f"the scores of '{name}' have condition '{condition}' in context '{context}' twice")
        present = [metric for metric in wanted if metric in frame]
        sides[name] = frame[present].set_index(pd.MultiIndex.from_frame(keys)).astype(float)
    table = pd.concat(sides, axis=1).sort_index()
    labels = pd.concat([frame[["condition", "context", "category"]].astype(str) for frame in scores.values()])
    labels = labels.drop_duplicates().set_index(["condition", "context"])["category"]
    if labels.index.has_duplicates:
        condition, context = labels.index[labels.index.duplicated()][0]
        raise PerturbZooError(f"the scores disagree on the category of condition '{condition}' in context '{context}'")
    return table, labels.reindex(table.index)


def _bootstrapped(table: pd.DataFrame, category: str, n_bootstrap: int, seed: int, level: float) -> pd.DataFrame:
    """Mean, interval and number of conditions of each (model, metric) column of `table`."""
    condition, unit = np.unique(table.index.get_level_values(0), return_inverse=True)
    values = table.to_numpy()
    total, count = _sums(np.nan_to_num(values), unit, len(condition)), _sums(np.isfinite(values), unit, len(condition))
    n = (count > 0).sum(axis=0)
    with np.errstate(invalid="ignore"):
        mean = total.sum(axis=0) / count.sum(axis=0)
    low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    several = n > 1
    if several.any():
        # The category has a stream of its own: adding one to the report changes no other interval.
        random = np.random.default_rng([seed, zlib.crc32(category.encode())])
        draws = random.multinomial(len(condition), np.full(len(condition), 1 / len(condition)), n_bootstrap)
        weight = draws.astype(np.float64)
        with np.errstate(invalid="ignore"):  # a resample may miss all the conditions that a model has
            means = (weight @ total[:, several]) / (weight @ count[:, several])
        low[several], high[several] = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    frame = table.columns.to_frame(index=False, name=["model", "metric"])
    return frame.assign(n=n, mean=mean, low=low, high=high)


def _sums(values: NDArray, unit: NDArray[np.intp], n_units: int) -> Array:
    total = np.zeros((n_units, values.shape[1]))
    np.add.at(total, unit, values)
    return total


def printed(summary: pd.DataFrame) -> pd.DataFrame:
    """What the commands print of a summary: the main metrics; and one category alone, which says the same again, not at all."""
    main = summary[summary["metric"].isin(PRINTED)]
    return main if main["category"].nunique() > 2 else main[main["category"] == ALL]


def format_table(summary: pd.DataFrame, width: int = 120, metrics: Mapping[str, bool | None] = FILE_METRICS) -> str:
    """Write a summary as plain text: models below each other, one block per split category.

    Parameters
    ----------
    summary
        Of :func:`summarise`.
    width
        Columns of text at the most; metrics that do not fit side by side follow in a further panel.
    metrics
        Whether higher is better, by metric; None: 1 is best.

    Returns
    -------
    The text. Cells say ``mean [low, high]``, or the mean alone where there is no interval. ``(5 of 8)`` after a model's name says
    that it was scored on 5 conditions, where that is not all of the block's. An empty category is one line that says ``-``.
    """
    columns = [_Column(str(name), rows, metrics[str(name)]) for name, rows in summary.groupby("metric", sort=False)]
    blocks = [_block(str(name), rows) for name, rows in summary.groupby("category", sort=False)]
    margin = max(len(label) for _, labels in blocks for label in labels.values())
    panels: list[list[_Column]] = [[]]
    for column in columns:
        if panels[-1] and margin + sum(other.width for other in [*panels[-1], column]) > width:
            panels.append([])
        panels[-1].append(column)
    lines = ["mean [low, high]: bootstrap interval over conditions; ↑ higher is better, ↓ lower is better"]
    if any(metrics[str(metric)] is None for metric in summary["metric"]):
        lines[0] += ", →1 nearer to 1 is better"
    for panel in panels:
        height = max(len(column.title) for column in panel)
        lines.append("")
        for row in range(-height, 0):
            titles = (column.title[row] if -row <= len(column.title) else "" for column in panel)
            lines.append(_line("", titles, margin, panel))
        for title, labels in blocks:
            lines.append(title)
            for key, label in labels.items():
                lines.append(_line(label, (column.cells.get(key, "-") for column in panel), margin, panel))
    return "\n".join(lines)


_ARROWS = {True: " ↑", False: " ↓", None: " →1"}


class _Column:
    """One metric of the printed table: its title in lines, and its cells by (model, category)."""

    def __init__(self, metric: str, rows: pd.DataFrame, higher: bool | None) -> None:
        numbers = rows[["mean", "low", "high"]].abs().to_numpy()
        largest = float(np.nanmax(numbers, initial=0.0))
        # Errors of log1p expression are small: print them in thousandths or millionths, and say so in the title.
        power = 3 * math.ceil(-math.log10(largest) / 3) if 0 < largest < 0.1 and higher is False else 0
        digits = 3 if largest == 0 else max(0, 3 - max(0, math.floor(math.log10(largest * 10**power))))
        title = textwrap.wrap(metric.replace("_", " "), 20)
        title = [f"{line.replace(' ', '_')}_" for line in title[:-1]] + [title[-1].replace(" ", "_")]
        title[-1] += (f" x1e-{power}" if power else "") + _ARROWS[higher]
        self.title = title
        self.cells = {}
        for row in rows.itertuples():
            mean, low, high = (f"{value * 10**power:.{digits}f}" for value in (row.mean, row.low, row.high))
            interval = f" [{low}, {high}]" if row.n > 1 and math.isfinite(row.low) else ""
            self.cells[row.model, row.category] = mean + interval if row.n else "-"
        self.width = max(map(len, [*title, *self.cells.values()])) + 2


def _block(category: str, rows: pd.DataFrame) -> tuple[str, dict[tuple[str, str], str]]:
    """Title of a category's block, and the label of the row of each (model, category); no rows if it is empty."""
    n = rows.groupby("model", sort=False)["n"].max()
    if n.max() == 0:
        return f"{category}  -", {}
    title = f"{category} ({n.max()} condition{'s' if n.max() > 1 else ''})"
    return title, {(str(m), category): f"  {m}" + (f" ({k} of {n.max()})" if k < n.max() else "") for m, k in n.items()}


def _line(label: str, cells: Iterable[str], margin: int, panel: Sequence[_Column]) -> str:
    pieces = (f"{cell:>{column.width}}" for cell, column in zip(cells, panel, strict=True))
    return (f"{label:<{margin}}" + "".join(pieces)).rstrip()
