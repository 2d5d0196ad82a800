"""From the scores of every cell to one table: who is better on what, by how much, and whether a baseline would have done.

Reads the tables that ``perturbzoo test`` leaves and gives tables; knows no model, and draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from perturbzoo.benchmark.experiment import Cell
from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.rows import CEILING, CEILINGS, FLOOR, MODEL, rank_rows
from perturbzoo.evaluation.summary import ALL, summarise
from perturbzoo.evaluation.table import FILE_METRICS
from perturbzoo.evaluation.verdicts import UNKNOWN, compare_with_floors
from perturbzoo.models import BASELINES

MAIN_METRICS = (
    "pearson_delta",
    "pearson_delta_perturbed_reference",
    "mse_top20_de",
    "weighted_mse",
    "l2_top1000",
    "pds_cosine",
    "centroid_accuracy",
)
"""What is printed; all the others are in the files."""

_CELL = ["model", "split", "seed"]
_LABELS = ["condition", "context", "category"]


def collect(cells: Sequence[Cell], output: Path) -> tuple[pd.DataFrame, dict[str, str], list[str]]:
    """Read the scores of finished cells.

    Parameters
    ----------
    cells
        Finished ones, whose folder below `output` holds ``test/conditions.csv``.
    output
        Folder of the benchmark.

    Returns
    -------
    scores
        One row per (model, split, seed, condition, context). Floors and ceilings, which depend on neither model nor seed, come once
        for each split, their seed missing.
    kinds
        ``model``, ``floor`` or ``ceiling`` of each name.
    notes
        Lines on floors and ceilings that were not the same in all cells of a split; the first cell's are kept.
    """
    tables, kinds, notes = [], {}, []
    kept: dict[tuple[str, str], tuple[pd.DataFrame, str]] = {}
    for cell in cells:
        table = read_scores(output / cell.folder / "test" / "conditions.csv")
        own = table["model"].iloc[0]  # the tested model comes first
        kinds[cell.model] = MODEL
        tables.append(table[table["model"] == own].assign(model=cell.model, split=cell.split, seed=cell.seed))
        for name, rows in table[table["model"] != own].groupby("model", sort=False):
            label = str(name)
            kinds.setdefault(label, CEILING if label in CEILINGS else FLOOR)
            if (label, cell.split) not in kept:
                kept[label, cell.split] = (rows.assign(split=cell.split, seed=np.nan), cell.name)
            elif differs := _largest_difference(kept[label, cell.split][0], rows):
                first = kept[label, cell.split][1]
                notes.append(f"'{label}' is not the same in '{first}' and '{cell.name}' ({differs}): the first is kept")
    tables += [rows for rows, _ in kept.values()]
    if not tables:
        return pd.DataFrame(columns=[*_CELL, *_LABELS]), kinds, notes
    scores = pd.concat(tables, ignore_index=True)
    order = {name: position for position, name in enumerate(kinds)}
    rank = {MODEL: 0, FLOOR: 1, CEILING: 2}
    # whatever the order in which cells ended
    scores = scores.sort_values(
        ["model", "split", "seed", "condition", "context"],
        key=lambda column: column.map(lambda name: (rank[kinds[name]], order[name])) if column.name == "model" else column,
        kind="stable",
        ignore_index=True,
    )
    others = [name for name in scores.columns if name not in (*_CELL, *_LABELS)]
    scores["seed"] = scores["seed"].astype("Int64")
    return scores[[*_CELL, *_LABELS, *others]], kinds, notes


def read_scores(file: Path) -> pd.DataFrame:
    """Read a table of scores by condition; the context is text, empty where there is none."""
    # conditions called NA, None and the like are names
    text = dict.fromkeys(("model", *_LABELS), str)
    try:
        columns = pd.read_csv(file, nrows=0).columns
        numbers = {str(name): ["", "nan", "NaN"] for name in columns if name not in text}
        return pd.read_csv(file, dtype=text, keep_default_na=False, na_values=numbers)
    except (OSError, ValueError) as error:
        raise PerturbZooError(f"{file}: cannot be read as a table of scores: {' '.join(str(error).split())}") from error


def _largest_difference(first: pd.DataFrame, second: pd.DataFrame) -> str:
    """How two tables of the same name differ, in words; empty if they do not, rounding apart."""
    keys = ["condition", "context"]
    one, other = (table.set_index(keys).sort_index() for table in (first, second))
    if not one.index.equals(other.index):
        return "other conditions"
    metrics = [name for name in FILE_METRICS if name in one and name in other]
    a, b = one[metrics].to_numpy(float), other[metrics].to_numpy(float)
    off = ~np.isclose(a, b, rtol=1e-5, atol=1e-8, equal_nan=True)
    if not off.any():
        return ""
    column = int(off.any(axis=0).argmax())
    return f"{metrics[column]} by {np.nanmax(np.abs(a - b)[:, column]):.2g}"


# ---------------------------------------------------------------------- the table


def leaderboard(scores: pd.DataFrame, kinds: Mapping[str, str], *, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Summarise scores over conditions, rank, and compare each model with the best floor.

    Seeds are averaged first, then the splits that a condition is tested in, so that a condition counts once however often it was
    scored. A condition that one of them has no value for has none. Intervals are over conditions, with all their contexts; over
    contexts where there is one condition only.

    Parameters
    ----------
    scores, kinds
        Of :func:`collect`. The order of the rows is of no consequence.
    n_bootstrap, seed
        Of the intervals; see :func:`perturbzoo.evaluation.summary.summarise`.

    Returns
    -------
    One row per model, category (``all`` first) and metric: model, kind, category, metric, n, mean, low, high, and

    - sd_over_seeds: standard deviation over seeds of the mean over conditions, within a split, pooled over splits; NaN of one seed;
    - rank: among models and floors, 1 is best (:func:`perturbzoo.evaluation.rows.rank_rows`); none of a model that was scored on
      fewer conditions than the floors;
    - verdict, decisive_floor, difference, difference_low, difference_high, p: of models, by
      :func:`perturbzoo.evaluation.verdicts.compare_with_floors`, on the model's own splits and conditions.
    """
    rows = _resampled_by_context(scores)
    metrics = [name for name in FILE_METRICS if name in rows and rows[name].notna().any()]
    names = list(kinds)
    blocks = []
    for category in (ALL, *sorted(rows["category"].unique())):
        block = rows if category == ALL else rows[rows["category"] == category]
        tables = {name: _averaged(block[block["model"] == name], metrics) for name in names}
        tables = {name: table for name, table in tables.items() if len(table)}
        summary = summarise(tables, n_bootstrap=n_bootstrap, seed=seed)
        summary = summary[summary["category"] == ALL].assign(kind=summary["model"].map(kinds))
        spread = pd.concat([_spread(block[block["model"] == name], metrics, name) for name in tables])
        summary = summary.merge(spread, how="left", on=["model", "metric"])
        blocks.append(_compared(_ranked(summary), block, tables, metrics, n_bootstrap, seed).assign(category=category))
    board = pd.concat(blocks, ignore_index=True)
    order = {name: position for position, name in enumerate(_by_rank(board, metrics[0], names))} if metrics else {}
    place = {metric: position for position, metric in enumerate(metrics)}
    categories = {name: position for position, name in enumerate(dict.fromkeys(board["category"]))}
    board = board.sort_values(
        ["model", "category", "metric"],
        key=lambda column: column.map({"model": order, "category": categories, "metric": place}[str(column.name)]),
        kind="stable",
        ignore_index=True,
    )
    first = ["model", "kind", "category", "metric", "n", "mean", "low", "high"]
    return board[[*first, *(name for name in board.columns if name not in first)]]


def better(metric: str, values: pd.Series) -> pd.Series:
    """The values turned so that more is better: as they are, negated, or as the distance from 1, negated."""
    direction = FILE_METRICS[metric]
    return values if direction else -values if direction is False else -(values - 1).abs()


def _resampled_by_context(scores: pd.DataFrame) -> pd.DataFrame:
    """Let contexts take the place of conditions where there is one condition only: else nothing could be resampled."""
    if scores["condition"].nunique() == 1 and scores["context"].nunique() > 1:
        return scores.rename(columns={"condition": "context", "context": "condition"})
    return scores


def _averaged(rows: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """One row per (condition, context): the mean over splits of the mean over seeds, NaN where one of them is."""
    keys = ["condition", "context"]
    for by in ([*keys, "split"], keys):
        groups = rows.groupby(by, sort=True)[metrics]
        mean = groups.mean()
        rows = mean.where(groups.count().eq(groups.size(), axis=0)).reset_index()
    return rows.assign(category="one")


def _spread(rows: pd.DataFrame, metrics: list[str], name: str) -> pd.DataFrame:
    means = rows.dropna(subset="seed").groupby(["split", "seed"])[metrics].mean()
    per_split = means.groupby("split")
    freedom = (per_split.count() - 1).clip(lower=0).sum()
    squares = (per_split.var(ddof=1) * (per_split.count() - 1)).sum()
    variance = (squares / freedom.where(freedom > 0)).reindex(metrics)
    return pd.DataFrame({"model": name, "metric": metrics, "sd_over_seeds": np.sqrt(variance.to_numpy(float))})


def _ranked(summary: pd.DataFrame) -> pd.DataFrame:
    """Add ranks; who was not scored on all the conditions that the floors were competes with nobody."""
    most = summary[summary["kind"] == FLOOR].groupby("metric")["n"].max().reindex(summary["metric"]).to_numpy()
    competes = (summary["kind"] != CEILING) & ~((summary["kind"] == MODEL) & (summary["n"].to_numpy() < most))
    means = summary.assign(mean=summary["mean"].where(competes))
    ranks = rank_rows(means, list(dict.fromkeys(summary["model"])))
    places = zip(summary["model"], summary["metric"], strict=True)
    return summary.assign(rank=[ranks.loc[model, metric] for model, metric in places])


def _compared(
    summary: pd.DataFrame,
    block: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    metrics: list[str],
    n_bootstrap: int,
    seed: int,
) -> pd.DataFrame:
    """Add each model's verdict, and what it rests on."""
    floors = sorted(summary.loc[summary["kind"] == FLOOR, "model"].unique(), key=_simplicity)
    found = []
    for name in summary.loc[summary["kind"] == MODEL, "model"].unique():
        # a model that failed on a split is compared on the others
        here = block[block["split"].isin(block.loc[block["model"] == name, "split"].unique())]
        others = {floor: _averaged(here[here["model"] == floor], metrics) for floor in floors}
        found.append(compare_with_floors(tables[name], others, n_bootstrap=n_bootstrap, seed=seed).assign(model=name))
    columns = ["verdict", "decisive_floor", "difference", "difference_low", "difference_high", "p"]
    empty = pd.DataFrame(columns=["model", "metric", *columns])
    verdicts = pd.concat(found) if found else empty
    verdicts = verdicts.rename(columns={"low": "difference_low", "high": "difference_high"})[["model", "metric", *columns]]
    compared = summary.merge(verdicts, how="left", on=["model", "metric"])
    return compared.fillna({"verdict": UNKNOWN, "decisive_floor": ""})


def _by_rank(board: pd.DataFrame, metric: str, names: Sequence[str]) -> list[str]:
    """Models, floors and ceilings, each best first by a metric over all conditions."""
    rows = board[(board["category"] == ALL) & (board["metric"] == metric)].set_index("model")
    kind = {MODEL: 0, FLOOR: 1, CEILING: 2}

    value = better(metric, rows["mean"])
    return sorted(
        (name for name in names if name in rows.index),
        key=lambda name: (kind[rows.loc[name, "kind"]], *_place(name, value[name])),
    )


def _place(name: str, value: float) -> tuple[float, int, str]:
    """Key that sorts by value, best first; of those that are the same but for rounding, the simpler baseline first."""
    return (-float(f"{value:.9g}") if np.isfinite(value) else np.inf), *_simplicity(name)


def _simplicity(name: str) -> tuple[int, str]:
    plain = name.partition(" (")[0]
    return (BASELINES.index(plain) if plain in BASELINES else -1), name
