"""What a run folder or a benchmark folder holds, read and checked: the same tables for both.

Called by `content`. Knows the files' layout, and nothing of pages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.evaluation.rows import CEILING, FLOOR, MODEL, kinds_of_rows


@dataclass(frozen=True)
class Run:
    """One tested model's folder, as far as its changes and its errors go.

    Parameters
    ----------
    model
        Its row in the tables.
    folder
        The folder ``test`` in it.
    split, seed
        Of a cell of a benchmark's grid; empty for a run of its own.
    """

    model: str
    folder: Path
    split: str = ""
    seed: str = ""


@dataclass(frozen=True)
class Results:
    """A run or a benchmark.

    Parameters
    ----------
    folder
        Where it was read from.
    title, description
        What it is called, and what its makers say of it.
    benchmark
        Whether it is a benchmark.
    kinds
        Kind of each row of the tables (model, floor, ceiling), in their order.
    scores
        Table of each row: split (empty for a run), condition, context, category, n_cells and metrics; means over seeds.
    summary
        Columns model, category, metric, n, mean, low, high; of a benchmark :data:`COMPARED` too.
    metric
        The metric that its makers chose for the first sentence, if any.
    runs
        One run for each model and split, models first: where changes are shown from.
    about
        What the data are: data.json of a run, benchmark.json of a benchmark.
    undone
        Parts of a benchmark's grid that failed.
    unit
        What n counts: a benchmark of one condition in several contexts is summarised over contexts.
    """

    folder: Path
    title: str
    description: str
    benchmark: bool
    kinds: dict[str, str]
    scores: dict[str, pd.DataFrame]
    summary: pd.DataFrame
    metric: str
    runs: list[Run]
    about: dict[str, Any]
    undone: list[str] = field(default_factory=list)
    unit: str = "conditions"

    def of_kind(self, kind: str) -> list[str]:
        """Names of the rows of one kind."""
        return [name for name, found in self.kinds.items() if found == kind]


def read_results(folder: Path) -> Results:
    """Read a run folder (with ``test/conditions.csv``) or a benchmark folder (with ``benchmark.json``).

    Raises
    ------
    PerturbZooError
        The folder is neither, or a file of it is missing, cannot be read or lacks a column.
    """
    if not folder.is_dir():
        raise PerturbZooError(f"{folder} is no folder; give one that 'perturbzoo test' or 'perturbzoo benchmark' wrote")
    if (folder / "benchmark.json").is_file():
        return _read_benchmark(folder)
    if folder.name == "test" and (folder / "conditions.csv").is_file():
        folder = folder.parent
    if not (folder / "test").is_dir():
        raise PerturbZooError(
            f"{folder} has neither test/conditions.csv, which 'perturbzoo test' writes below trainer.default_root_dir, nor "
            "benchmark.json, which 'perturbzoo benchmark' writes"
        )
    return _read_run(folder)


def _read_run(folder: Path) -> Results:
    table = _read_table(folder / "test" / "conditions.csv", "model", "condition", "context", "category")
    summary = _read_table(folder / "test" / "summary.csv", *SUMMARY)
    names = list(dict.fromkeys(table["model"]))
    about = read_json(folder / "test" / "data.json", required=False)
    source = str(about.get("source", "")) or folder.resolve().name
    return Results(
        folder=folder,
        title=f"{names[0]} on {source}",
        description="",
        benchmark=False,
        kinds=kinds_of_rows(names),
        scores={name: rows.reset_index(drop=True).assign(split="") for name, rows in table.groupby("model", sort=False)},
        summary=summary,
        metric="",
        runs=[Run(names[0], folder / "test")],
        about=about,
    )


SUMMARY = ("model", "category", "metric", "n", "mean", "low", "high")
COMPARED = ("sd_over_seeds", "rank", "verdict", "decisive_floor", "difference", "difference_low", "difference_high")
"""What a benchmark's table says of a row beside its mean."""


def _read_benchmark(folder: Path) -> Results:
    about = read_json(folder / "benchmark.json")
    again = "run 'perturbzoo benchmark' on this folder again: what is finished stays, only the tables are written anew"
    summary = _read_table(folder / "leaderboard.csv", *SUMMARY, "kind", *COMPARED, otherwise=again)
    kinds = {str(model): str(kind) for model, kind in summary[["model", "kind"]].drop_duplicates("model").to_numpy()}
    strange = set(kinds.values()) - {MODEL, FLOOR, CEILING}
    if strange:
        raise PerturbZooError(
            f"{folder / 'leaderboard.csv'}: kind is {shortened(sorted(strange))}; expected model, floor, ceiling"
        )
    table = _read_table(folder / "conditions.csv.gz", "model", "split", "seed", "condition", "context", "category")
    return Results(
        folder=folder,
        title=str(about.get("title") or about.get("name") or folder.resolve().name),
        description=str(about.get("description", "")),
        benchmark=True,
        kinds=kinds,
        scores={name: rows for name, rows in _mean_over_seeds(table).items() if name in kinds},
        summary=summary.drop(columns="kind"),
        metric=str(about.get("metric", "")),
        runs=_first_runs(folder / "runs", table, [name for name, kind in kinds.items() if kind == MODEL]),
        about=about,
        undone=[_place(entry) for entry in about.get("failed", [])],
        unit="contexts" if table["condition"].nunique() == 1 < table["context"].nunique() else "conditions",
    )


def _mean_over_seeds(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Scores of each model by (split, condition, context): several seeds are one measurement of a condition, not several."""
    labels = ["model", "split", "condition", "context", "category"]
    numbers = table.drop(columns="seed").set_index(labels)
    numbers = numbers.apply(lambda column: pd.to_numeric(column.replace({"True": 1, "False": 0}), errors="coerce"))
    groups = numbers.groupby(level=labels, sort=False)
    # as in the leaderboard: a condition that one seed has no value for has none
    means = groups.mean().where(groups.count().eq(groups.size(), axis=0)).reset_index()
    return {str(name): rows.reset_index(drop=True) for name, rows in means.groupby("model", sort=False)}


def _place(entry: Any) -> str:
    """Which part of the grid failed, and why."""
    if not isinstance(entry, dict):
        return str(entry)
    return f"{entry.get('model')}, split {entry.get('split')}, seed {entry.get('seed')}: {entry.get('reason', 'failed')}"


def _first_runs(folder: Path, table: pd.DataFrame, models: list[str]) -> list[Run]:
    """For each model and split its first finished seed, if there is one."""
    runs = []
    for model in models:
        for split in dict.fromkeys(table["split"]):
            finished = sorted((folder / model / split).glob("seed-*/done.json"), key=lambda file: (len(file.parent.name), file))
            if finished:
                cell = finished[0].parent
                runs.append(Run(model, cell / "test", split, cell.name.removeprefix("seed-")))
    return runs


def first_of_each(runs: list[Run]) -> list[Run]:
    """One run for each model: that of its first split."""
    return list({run.model: run for run in reversed(runs)}.values())[::-1]


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Read an object; an empty one where the file may be missing and is."""
    if not required and not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PerturbZooError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise PerturbZooError(f"{path}: expected an object of names and values")
    return found


LABELS = ("model", "condition", "context", "category", "metric", "kind", "split", "seed", "verdict", "decisive_floor")


def _read_table(path: Path, *columns: str, otherwise: str = "test again with this version of perturbzoo") -> pd.DataFrame:
    """Read a CSV whose labels stay text: a condition may be called 'NA', a context '1'."""
    if not path.is_file():
        raise PerturbZooError(f"{path} is missing: the run has not finished, or this is not its folder; test it again")
    try:
        head = pd.read_csv(path, nrows=0)
        labels = [name for name in LABELS if name in head]
        table = pd.read_csv(
            path, dtype=dict.fromkeys(labels, str), keep_default_na=False, na_values=_missing_values(head, labels)
        )
    except (OSError, ValueError) as error:
        raise PerturbZooError(f"{path}: cannot be read as a table: {str(error).splitlines()[0]}") from error
    missing = [name for name in columns if name not in table]
    if missing:
        raise PerturbZooError(f"{path} lacks the columns {shortened(missing)}; {otherwise}")
    if table.empty:
        raise PerturbZooError(f"{path} has no rows: there was nothing to test")
    return table


def _missing_values(head: pd.DataFrame, labels: list[str]) -> dict[str, list[str]]:
    return {str(name): ["", "nan", "NaN"] for name in head if name not in labels}


def find_optional(run: Run, file: str, *columns: str) -> pd.DataFrame | None:
    """A table of a run that not every model has."""
    path = run.folder / file
    return _read_table(path, *columns) if path.is_file() else None
