"""Everything a page says, as plain values that JSON can hold. Called by `page`; knows nothing of HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from perturbzoo import __version__
from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.ceilings import CEILING as CEILING_LINE
from perturbzoo.evaluation.labels import label_of
from perturbzoo.evaluation.rows import FLOOR, MODEL, rank_rows
from perturbzoo.evaluation.summary import ALL
from perturbzoo.evaluation.table import FILE_METRICS, PRINTED
from perturbzoo.perturbation import parse_condition
from perturbzoo.report import wording
from perturbzoo.report.deltas import (
    N_COLUMNS,
    N_GENES,
    N_ROWS,
    Deltas,
    as_integers,
    choose_genes,
    choose_heat_map,
    read_deltas,
)
from perturbzoo.report.results import Results, find_optional, first_of_each, read_json
from perturbzoo.report.verdict import (
    AHEAD,
    BEHIND,
    LEVEL,
    UNKNOWN,
    compare_with_floors,
    digits_for,
    read_verdicts,
    verdict_sentence,
)

HEADLINE = "pearson_delta_perturbed_reference"
"""The first sentence on a run is about this; on a benchmark about its own metric, and the second sentence about this."""
POINT_METRICS = ("pearson_delta", "pearson_delta_perturbed_reference", "rmse", "mse_top20_de")
"""What is said of one condition beside its plot, after the main metric."""
SIZES = {
    "cells": "cells",
    "controls": "control cells",
    "genes": "genes",
    "conditions": "conditions",
    "value_space": "values",
    "depth": "counts per cell",
}
RUN_ENTRIES = {"source": "file", "model": "model", **SIZES, "contexts": "contexts", "split": "split"}
BENCHMARK_ENTRIES = {"models": "models", "splits": "splits", "seeds": "seeds", "finished": "finished runs"}
"""What is said of the data, by the name in data.json and benchmark.json."""
EMPTY: tuple[Any, ...] = (None, "", [], [""], {})
STAND_IN = "A stand-in, not the public file of this experiment: "


def collect(results: Results) -> dict[str, Any]:
    """Put together what the page of a run or benchmark says."""
    summary = results.summary
    metrics = [name for name in FILE_METRICS if (summary.loc[summary["metric"] == name, "mean"].notna()).any()]
    if not metrics:
        raise PerturbZooError(f"{results.folder}: the summary has a value in no metric that perturbzoo defines")
    main = next((name for name in (results.metric, HEADLINE, *PRINTED) if name in metrics), metrics[0])
    # the same for every model, whatever it is good at: what the commands print
    shown = [main, *(name for name in PRINTED if name in metrics and name != main)]
    names = [name for name in results.kinds if name in set(summary["model"])]
    deltas = read_deltas(results, main)
    return {
        "title": results.title,
        "description": f"The experiment: {results.description}" if results.description else "",
        "benchmark": results.benchmark,
        "version": str(results.about.get("version", __version__)),
        "main": main,
        "metrics": [_metric(name, summary) for name in metrics],
        "rows": [{"name": name, "kind": results.kinds[name]} for name in names],
        "categories": list(dict.fromkeys([ALL, *summary["category"]])),
        "scores": _scores(summary, names, metrics),
        "shown": shown,
        "unit": results.unit,
        "seeds": "sd_over_seeds" in summary and bool(summary["sd_over_seeds"].notna().any()),
        "line": next((name for name in names if name == CEILING_LINE), None),
        "ranks": _ranks(results, [name for name in names if results.kinds[name] in (MODEL, FLOOR)], shown),
        "verdict": _verdict(results, main, shown),
        "deltas": None if deltas is None else _deltas(deltas, results, main),
        "heat": None if deltas is None else _heat_map(deltas),
        "uncertainty": _uncertainty(results),
        "about": _about(results),
        "glossary": wording.GLOSSARY,
    }


def _metric(name: str, summary: pd.DataFrame) -> dict[str, Any]:
    better = {True: "higher", False: "lower", None: "near 1"}[FILE_METRICS[name]]
    numbers = summary.loc[summary["metric"] == name, ["mean", "low", "high"]].to_numpy(dtype=float)
    return {
        "name": name,
        "label": label_of(name),
        "better": better,
        "definition": wording.DEFINITIONS.get(name, ""),
        "digits": digits_for(numbers),
    }


def _scores(summary: pd.DataFrame, names: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """``scores[metric][category][row] = [n, mean, low, high, sd over seeds]``, as in the table."""
    found: dict[str, Any] = {name: {} for name in metrics}
    rows = summary[summary["model"].isin(list(names)) & summary["metric"].isin(list(metrics))]
    if "sd_over_seeds" not in rows:
        rows = rows.assign(sd_over_seeds=np.nan)
    for row in rows.itertuples(index=False):
        numbers = [int(row.n), *(_number(value) for value in (row.mean, row.low, row.high, row.sd_over_seeds))]
        found[str(row.metric)].setdefault(str(row.category), {})[str(row.model)] = numbers
    return found


def _ranks(results: Results, names: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """``ranks[metric][row]``: those of a benchmark's table; of a run's summary its means say."""
    summary = results.summary[results.summary["metric"].isin(list(metrics))]
    if results.benchmark:
        rows = summary[(summary["category"] == ALL) & summary["model"].isin(list(names))]
        ranks = rows.pivot_table(index="model", columns="metric", values="rank", sort=False).reindex(list(names))
    else:
        ranks = rank_rows(summary, names)
    return {str(name): {str(row): _number(value) for row, value in ranks[name].items()} for name in ranks}


def _verdict(results: Results, main: str, shown: Sequence[str]) -> dict[str, Any]:
    """The first sentences, and the comparison of every model with the floors by every metric."""
    tables = _compare(results, shown)
    place = {metric: position for position, metric in enumerate(shown)}
    tables = {
        name: table.sort_values("metric", key=lambda column: column.map(place), ignore_index=True)
        for name, table in tables.items()
    }
    models = list(tables)
    rows = {
        name: [
            {key: _number(value) if isinstance(value, float) else value for key, value in row.items()}
            for row in table.to_dict("records")
        ]
        for name, table in tables.items()
    }
    answer, sentence = _answer(results, tables, main)
    if main != HEADLINE and HEADLINE in shown:
        sentence += " " + _answer(results, tables, HEADLINE)[1]
    if len(models) == 1:
        sentence += " " + _across(tables[models[0]])
    return {"answer": answer, "sentence": sentence.strip(), "models": rows, "n_floors": len(results.of_kind(FLOOR))}


def _compare(results: Results, shown: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Each model against the floors: of a benchmark as its table says, of a run computed from its conditions."""
    floors = results.of_kind(FLOOR)
    if results.benchmark:
        board = results.summary[results.summary["metric"].isin(list(shown))]
        listed = set(board["model"])
        return {name: read_verdicts(board, name, floors) for name in results.of_kind(MODEL) if name in listed}
    scores = {name: _only(table, shown) for name, table in results.scores.items()}
    return {
        name: compare_with_floors(scores[name], {floor: scores[floor] for floor in floors}) for name in results.of_kind(MODEL)
    }


def _answer(results: Results, tables: dict[str, pd.DataFrame], metric: str) -> tuple[str, str]:
    """Whether models beat the floors by one metric."""
    label, models = label_of(metric), list(tables)
    rows = {name: _row_of(table, metric) for name, table in tables.items()}
    if len(models) == 1:
        means = results.summary.loc[results.summary["metric"] == metric, ["mean", "low", "high"]].to_numpy(dtype=float)
        return verdict_sentence(models[0], rows[models[0]], label, digits_for(means), results.unit)
    ranks = _ranks(results, [*models, *results.of_kind(FLOOR)], [metric])
    return _many(rows, label, results.unit, _first(ranks.get(metric, {}), rows))


def _row_of(table: pd.DataFrame, metric: str) -> dict[str, Any]:
    rows = table[table["metric"] == metric].to_dict("records")
    return rows[0] if rows else {"metric": metric, "state": UNKNOWN, "rival": "", "n": 0}


def _only(table: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """A table of scores with these metrics alone."""
    return table[["condition", "context", "category", *(name for name in metrics if name in table)]]


def _across(table: pd.DataFrame) -> str:
    """How a model does against the floors by all metrics that are shown."""
    count = table["state"].value_counts()
    n = len(table) - int(count.get(UNKNOWN, 0))
    if n == 0:
        return ""
    behind = table[table["state"] == BEHIND]
    text = f"Of {n} metrics it is ahead of every floor on {count.get(AHEAD, 0)}, level on {count.get(LEVEL, 0)}, behind on {len(behind) or 'none'}"
    if len(behind):
        listed = [f"{label_of(row.metric)}: {row.rival}" for row in behind.head(3).itertuples()]
        text += f" ({'; '.join(listed)}{'; ...' if len(behind) > 3 else ''})"
    return text + "."


def _many(rows: dict[str, dict[str, Any]], label: str, unit: str, first: str) -> tuple[str, str]:
    """Answer for several models: which beat every floor, which are beaten by one."""
    ahead = [name for name, row in rows.items() if row["state"] == AHEAD]
    behind = [name for name, row in rows.items() if row["state"] == BEHIND]
    if not rows or all(row["state"] == UNKNOWN for row in rows.values()):
        return "Unknown.", f"There are too few {unit}, or no floors, to compare the models with on {label}."
    answer = "Yes." if len(ahead) == len(rows) else "Some do." if ahead else "No." if len(behind) == len(rows) else "Not shown."
    text = f"{len(ahead)} of {len(rows)} models beat every floor on {label}"
    text += f": {_listed(ahead)}." if ahead else "."
    if behind:
        rivals = dict.fromkeys(rows[name]["rival"] for name in behind)
        losses = [f"{_listed([name for name in behind if rows[name]['rival'] == rival])} to {rival}" for rival in rivals]
        text += f" {len(behind)} {'loses' if len(behind) == 1 else 'lose'} to one: {'; '.join(losses)}."
    level = sum(row["state"] == LEVEL for row in rows.values())
    if level:
        text += f" {level} cannot be told from the floors."
    unknown = len(rows) - len(ahead) - len(behind) - level
    if unknown:
        text += f" {unknown} {'has' if unknown == 1 else 'have'} too few {unit} to say."
    # a floor that wins is what a reader must hear first
    return answer, f"{first} {text}" if first.startswith("A floor") else f"{text} {first}".strip()


def _listed(names: Sequence[str], count: int = 6) -> str:
    shown = [*names[:count], f"{len(names) - count} more"] if len(names) > count else list(names)
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]


def _first(ranks: dict[str, float | None], rows: dict[str, dict[str, Any]]) -> str:
    """Which row has the best mean, floors included; of a model it is said only where the difference is more than chance."""
    known = {name: rank for name, rank in ranks.items() if rank is not None}
    if not known:
        return ""
    best = min(known, key=lambda name: known[name])
    if best not in rows:
        return f"A floor has the best mean: {best}."
    return f"The best mean is that of {best}." if rows[best]["state"] == AHEAD else ""


def _deltas(deltas: Deltas, results: Results, main: str) -> dict[str, Any]:
    """The conditions of the picker: per condition some genes, with observed and predicted change as integers of 1e-4."""
    targets = [_targets(name) for name in deltas.conditions["condition"]]
    genes = choose_genes(deltas, targets)
    used = np.unique(np.concatenate(genes))
    place = np.full(len(deltas.genes), -1)
    place[used] = np.arange(len(used))
    metrics = tuple(dict.fromkeys((main, *POINT_METRICS)))
    lookup = {name: _by_condition(table, metrics) for name, table in results.scores.items() if name in deltas.predicted}
    again = deltas.conditions.duplicated(["condition", "context"], keep=False).to_numpy()
    items = []
    for row, label in enumerate(deltas.conditions.itertuples(index=False)):
        chosen = genes[row]
        items.append(
            {
                "condition": label.condition,
                "context": label.context,
                "split": label.split if again[row] else "",
                "category": label.category,
                "n": int(label.n_cells),
                "targets": targets[row],
                "genes": place[chosen].tolist(),
                "observed": as_integers(deltas.observed[row, chosen]),
                "predicted": [as_integers(values[row, chosen]) for values in deltas.predicted.values()],
                "scores": [
                    lookup.get(name, {}).get((label.split, label.condition, label.context)) for name in deltas.predicted
                ],
            }
        )
    notes = []
    if len(items) < deltas.in_file:
        notes.append(
            f"{len(items):,} of {deltas.in_file:,} conditions are here, evenly spread from the worst to the best predicted; "
            "the tables have all."
        )
    if len(deltas.genes) > N_GENES:
        notes.append(
            f"Of {len(deltas.genes):,} genes each plot shows {N_GENES}: the {N_GENES // 3} with the largest observed change, the "
            f"{N_GENES // 6} with the largest predicted one, the targets, and a random sample of the others. The scores are over all genes."
        )
    if results.benchmark:
        notes.append(
            "Changes are those of each model's first finished seed in the split that tests the condition; scores are means over seeds."
        )
    return {
        "sources": list(deltas.predicted),
        "genes": [deltas.genes[index] for index in used],
        "metrics": [{"name": name, "label": label_of(name)} for name in metrics],
        "items": items,
        "notes": notes,
    }


def _by_condition(table: pd.DataFrame, metrics: Sequence[str]) -> dict[tuple[str, str, str], list[float | None]]:
    """These scores by split, condition and context."""
    numbers = table.reindex(columns=list(metrics)).to_numpy(dtype=float)
    keys = zip(table["split"], table["condition"], table["context"], strict=True)
    return {key: [_number(value) for value in row] for key, row in zip(keys, numbers, strict=True)}


def _targets(condition: str) -> list[str]:
    """Targets of a condition; none where its name cannot be read."""
    try:
        return list(parse_condition(condition).targets)
    except PerturbZooError:
        return []


def _heat_map(deltas: Deltas) -> dict[str, Any]:
    rows, genes = choose_heat_map(deltas)
    at = np.ix_(rows, genes)
    labels = deltas.conditions.iloc[rows]
    again = deltas.conditions.duplicated(["condition", "context"], keep=False).to_numpy()[rows]
    labels = labels.assign(split=np.where(again, labels["split"], ""))
    return {
        "conditions": [
            " | ".join(filter(None, parts)) for parts in labels[["condition", "context", "split"]].itertuples(index=False)
        ],
        "genes": [deltas.genes[index] for index in genes],
        "observed": as_integers(deltas.observed[at]),
        "sources": list(deltas.predicted),
        "predicted": [as_integers(values[at]) for values in deltas.predicted.values()],
        "note": f"Up to {N_ROWS} conditions, evenly spread over the list, and {N_COLUMNS} genes: of those among the 20 most "
        "differentially expressed of any of these conditions (|change| over its standard error), the ones that change most in all of them. "
        "Alike conditions and alike genes lie beside each other, by the observed change.",
    }


def _uncertainty(results: Results) -> list[dict[str, Any]]:
    """Calibration and error ranks of each model that has errors."""
    found = []
    for run in first_of_each(results.runs):
        curve = find_optional(run, "calibration.csv", "level", "coverage")
        errors = find_optional(run, "uncertainty.csv", "condition", "predicted_rmse", "rmse")
        if curve is None or errors is None:
            continue
        kept = errors[["predicted_rmse", "rmse"]].astype(float)
        rho = kept["predicted_rmse"].corr(kept["rmse"], method="spearman") if len(kept) > 2 else math.nan
        shown = np.unique(np.linspace(0, len(errors) - 1, 500).astype(int))
        found.append(
            {
                "model": run.model + (f", split {run.split}" if run.split else ""),
                "curve": curve[["level", "coverage"]].astype(float).to_numpy().tolist(),
                "spearman": _number(float(rho)),
                "n": len(errors),
                "points": [
                    [str(errors["condition"].iloc[row]), *(_number(value) for value in kept.iloc[row])]
                    for row in shown.tolist()
                ],
            }
        )
    return found


def _about(results: Results) -> dict[str, Any]:
    """What the data are: pairs of a name and a text, and the warning about a stand-in, if it is one."""
    about, stand_in = results.about, ""
    if about.get("stand_in"):
        stand_in = STAND_IN + str(about.get("stand_in_note") or "one of the same layout.")
    if results.benchmark:
        run = next((run for run in results.runs if (run.folder / "data.json").is_file()), None)
        sizes = _entries(read_json(run.folder / "data.json"), SIZES) if run else []
        if run and len({other.split for other in results.runs}) > 1:
            sizes = [(label, f"{text} (split {run.split})" if label == "conditions" else text) for label, text in sizes]
        data = stand_in or str(about.get("data", ""))
        entries = [*([("data", data)] if data else []), *sizes, *_entries(about, BENCHMARK_ENTRIES)]
    else:
        entries = _entries(about, RUN_ENTRIES)
    if results.undone:
        entries.append(("failed", ", ".join(results.undone)))
    entries += [("perturbzoo", str(about["version"]))] if "version" in about else []
    missing = "" if about else "data.json is not in this folder: runs tested with an older perturbzoo have none."
    return {"entries": entries, "stand_in": stand_in, "missing": missing}


def _entries(about: dict[str, Any], named: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (label, _text(about[key]))
        for key, label in named.items()
        if about.get(key) not in EMPTY and (key, about[key]) != ("depth", 0)
    ]


def _text(value: Any) -> str:
    """A value of a JSON file in words."""
    if isinstance(value, dict):
        return ", ".join(f"{_text(entry)} {name}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> float | None:
    """A number that JSON can hold."""
    number = float(value)
    return number if math.isfinite(number) else None
