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
from perturbzoo.evaluation.summary import ALL, paired_difference, summarise
from perturbzoo.evaluation.table import FILE_METRICS

MODEL, FLOOR, CEILING = "model", "floor", "ceiling"
CEILINGS = ("split-half ceiling", "technical duplicate", "interpolated duplicate")
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

FEWEST = 6
"""Conditions below which there is no verdict: even if all agreed, a sign test of fewer could not reject at 5 % (2 x 0.5^5 is .06)."""

SAME = 1e-4
"""Share of a mean below which a difference is rounding, such as that of a model that predicts no change from NoChange."""

BEATS, TIES, LOSES = "beats", "no difference", "loses"
_PLACE = ["model", "split", "seed"]
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
        return pd.DataFrame(columns=[*_PLACE, *_LABELS]), kinds, notes
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
    others = [name for name in scores.columns if name not in (*_PLACE, *_LABELS)]
    scores["seed"] = scores["seed"].astype("Int64")
    return scores[[*_PLACE, *_LABELS, *others]], kinds, notes


def read_scores(file: Path) -> pd.DataFrame:
    """Read a table of scores by condition; the context is text, empty where there is none."""
    try:
        return pd.read_csv(file, dtype={"condition": str, "context": str, "category": str}, keep_default_na=True).fillna(
            {"context": ""}
        )
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
    - rank: among models and floors, 1 is best;
    - best_floor: the floor with the best mean in the row's category;
    - difference_n, difference, difference_low, difference_high: of models, the conditions that both have, their mean less the best
      floor's over these, and its bootstrap interval. The floor was chosen by these conditions, which is in its favour;
    - verdict: ``beats``, ``no difference`` or ``loses``, as the interval leaves out 0; empty below six conditions, of which no test could say
      so. Numbers that are the same to four digits make no difference.
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
        blocks.append(_compared(_ranked(summary), block, tables, metrics, category, n_bootstrap, seed))
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
    def ranks(group: pd.DataFrame) -> pd.Series:
        metric = str(group["metric"].iloc[0])
        return better(metric, group["mean"]).where(group["kind"] != CEILING).rank(ascending=False, method="min")

    pieces = [ranks(group) for _, group in summary.groupby("metric", sort=False)]
    return summary.assign(rank=pd.concat(pieces).astype("Int64"))


def _compared(
    summary: pd.DataFrame,
    block: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    metrics: list[str],
    category: str,
    n_bootstrap: int,
    seed: int,
) -> pd.DataFrame:
    """Add the best floor of each metric, and each model's difference to it."""
    best: dict[str, str] = {}
    for metric, group in summary[(summary["kind"] == FLOOR) & summary["mean"].notna()].groupby("metric", sort=False):
        best[str(metric)] = str(group.loc[better(str(metric), group["mean"]).idxmax(), "model"])
    found = []
    for name in summary.loc[summary["kind"] == MODEL, "model"].unique():
        # a model that failed on a split is compared on the others
        splits = block.loc[block["model"] == name, "split"].unique()
        here = block[block["split"].isin(splits)]
        for floor in dict.fromkeys(best.values()):
            those = [metric for metric in metrics if best.get(metric) == floor]
            other = _averaged(here[here["model"] == floor], those)
            if not len(other):
                continue
            own = tables[name].drop(columns=[metric for metric in metrics if metric not in those])
            table = paired_difference(own, other, n_bootstrap=n_bootstrap, seed=seed)
            table = table[table["category"] == ALL].drop(columns="category")
            found.append(table.assign(model=name))
    columns = {"low": "difference_low", "high": "difference_high", "n": "difference_n"}
    empty = pd.DataFrame(columns=["metric", "n", "difference", "low", "high", "model"])
    differences = (pd.concat(found) if found else empty).rename(columns=columns)
    compared = summary.assign(best_floor=summary["metric"].map(best)).merge(differences, how="left", on=["model", "metric"])
    return compared.assign(verdict=[_verdict(row) for row in compared.itertuples()], category=category)


def _verdict(row: object) -> str:
    difference, mean = float(getattr(row, "difference")), float(getattr(row, "mean"))  # noqa: B009
    low, high = float(getattr(row, "difference_low")), float(getattr(row, "difference_high"))  # noqa: B009
    direction = FILE_METRICS[str(getattr(row, "metric"))]  # noqa: B009
    if np.isnan(low) or direction is None or getattr(row, "difference_n") < FEWEST:  # noqa: B009
        return ""
    if low <= 0 <= high or abs(difference) <= SAME * abs(mean):
        return TIES
    return BEATS if (low > 0) == direction else LOSES


def _by_rank(board: pd.DataFrame, metric: str, names: Sequence[str]) -> list[str]:
    """Models, floors and ceilings, each best first by a metric over all conditions."""
    rows = board[(board["category"] == ALL) & (board["metric"] == metric)].set_index("model")
    kind = {MODEL: 0, FLOOR: 1, CEILING: 2}

    def place(name: str) -> tuple[int, float, str]:
        row = rows.loc[name]
        value = float(better(metric, pd.Series([row["mean"]])).iloc[0])
        return kind[row["kind"]], -value if np.isfinite(value) else np.inf, name

    return sorted((name for name in names if name in rows.index), key=place)
