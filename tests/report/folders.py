"""Small folders as ``perturbzoo test`` and ``perturbzoo benchmark`` leave them, made without training anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbzoo.evaluation.summary import summarise

CONDITIONS = ("G0", "G1", "G2", "G3", "G0+G1", "G1+G2", "G2+G3", "G0+G3")
FLOORS = ("NoChange", "TrainingMean", "Additive")
CEILING = "split-half ceiling"
STAND_IN = "real: 1,975 cells x 6,998 genes of Kang et al. 2018, seven cell types"


def write_run(
    folder: Path,
    *,
    shift: float = 0.2,
    model: str = "GEARS",
    conditions: Sequence[str] = CONDITIONS,
    genes: Sequence[str] = tuple(f"G{number}" for number in range(40)),
    contexts: Sequence[str] = ("",),
    floors: Sequence[str] = FLOORS,
    errors: bool = False,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Write a run folder; the model's Pearson is `shift` above that of the best floor in every condition, save for a jitter.

    Returns
    -------
    The table of scores of each row.
    """
    import anndata

    random = np.random.default_rng(seed)
    labels = [
        {
            "condition": name,
            "context": level,
            "category": "combo_seen2" if "+" in name else "unseen_single",
            "n_cells": 20 + row,
        }
        for row, name in enumerate(conditions)
        for level in contexts
    ]
    table = pd.DataFrame(labels)
    # hard conditions are hard for all: what only a paired comparison sees through
    hardness = random.uniform(0.1, 0.6, len(table))
    scores = {}
    for position, name in enumerate([model, *floors, CEILING]):
        gain = {0: shift, len(floors) + 1: 0.35}.get(position, -0.05 * (len(floors) - position))
        jitter = np.where(np.arange(len(table)) % 2, 0.03, -0.03) if position == 0 else random.normal(0, 0.002, len(table))
        value = hardness + gain + jitter
        scores[name] = table.assign(
            pearson_delta=value, pearson_delta_perturbed_reference=value - 0.1, mse=0.02 * (1 - value), rmse=(1 - value) / 7
        )
    (folder / "test").mkdir(parents=True)
    pd.concat([rows.assign(model=name) for name, rows in scores.items()]).to_csv(
        folder / "test" / "conditions.csv", index=False
    )
    summarise(scores).to_csv(folder / "test" / "summary.csv", index=False)
    observed = random.normal(0, 0.5, (len(table), len(genes))).astype(np.float32)
    layers = {
        "predicted": 0.5 * observed,
        "observed_error": np.full_like(observed, 0.1),
        "control": np.ones_like(observed),
        **{f"floor:{name}": 0.1 * position * observed for position, name in enumerate(floors)},
    }
    anndata.AnnData(
        X=observed,
        obs=table.set_index(table.index.astype(str)),
        var=pd.DataFrame(index=pd.Index(list(genes))),
        layers=layers,
    ).write_h5ad(folder / "test" / "deltas.h5ad")
    about = {"source": "screen.h5ad", "genes": len(genes), "cells": 1234, "controls": 200, "contexts": list(contexts)}
    about |= {
        "conditions": {"train": 10, "val": 2, "test": len(conditions)},
        "split": "explicit",
        "model": model,
        "version": "9.9",
    }
    (folder / "test" / "data.json").write_text(json.dumps(about))
    if errors:
        table.assign(
            coverage_90=0.8, predicted_rmse=np.linspace(0.1, 0.2, len(table)), rmse=np.linspace(0.2, 0.5, len(table))
        ).to_csv(folder / "test" / "uncertainty.csv", index=False)
        pd.DataFrame({"level": [0.5, 0.9], "coverage": [0.4, 0.8]}).to_csv(folder / "test" / "calibration.csv", index=False)
    return scores


def write_benchmark(
    folder: Path,
    shifts: Mapping[str, float],
    *,
    splits: Sequence[str] = ("one", "two"),
    seeds: Sequence[int] = (0, 1),
    conditions: Sequence[str] = CONDITIONS,
    contexts: Sequence[str] = ("",),
    about: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Write a benchmark folder of several models; returns the rows of conditions.csv.gz."""
    parts = []
    for split in splits:
        for position, (model, shift) in enumerate(shifts.items()):
            for seed in seeds:
                cell = folder / "runs" / model / split / f"seed-{seed}"
                number = list(splits).index(split)
                # the same screen for all models of a split: floors and observations do not depend on model or seed
                scores = write_run(cell, shift=shift, model=model, seed=number, conditions=conditions, contexts=contexts)
                (cell / "done.json").write_text("{}")
                own = scores[model].copy()
                own["pearson_delta"] += 0.02 * seed
                parts.append(own.assign(model=model, split=split, seed=seed))
                if position == 0 and seed == seeds[0]:
                    parts += [scores[name].assign(model=name, split=split, seed=np.nan) for name in (*FLOORS, CEILING)]
    rows = pd.concat(parts, ignore_index=True)
    rows.to_csv(folder / "conditions.csv.gz", index=False)
    keys = ["condition", "context", "category"]
    tables = {
        str(name): table.groupby(keys, sort=False)[["pearson_delta", "pearson_delta_perturbed_reference", "mse", "rmse"]]
        .mean()
        .reset_index()
        for name, table in rows.groupby("model", sort=False)
    }
    kinds = dict.fromkeys(shifts, "model") | dict.fromkeys(FLOORS, "floor") | {CEILING: "ceiling"}
    board = summarise(tables)
    board.insert(1, "kind", board["model"].map(kinds))
    # what a benchmark says of each model, as it is written: the page has to repeat it, whatever the scores would give
    states = {name: "beats" if shift > 0 else "loses" if shift < 0 else "no difference" for name, shift in shifts.items()}
    models, better = board["kind"] == "model", np.where(board["metric"].str.startswith("pearson"), 1.0, -1.0)
    size = better * board["model"].map({name: shift or 0.001 for name, shift in shifts.items()})
    board["sd_over_seeds"] = np.where(models, 0.014, np.nan)
    turned = board.assign(mean=better * board["mean"]).where(board["kind"] != "ceiling")
    board["rank"] = turned.groupby([board["category"], board["metric"]])["mean"].rank(ascending=False, method="min")
    board["verdict"] = board["model"].map(states).fillna("")
    board["decisive_floor"] = np.where(models, "Additive", "")
    board["difference"] = size.where(models)
    board["difference_low"], board["difference_high"] = board["difference"] - 0.01, board["difference"] + 0.01
    board["p"] = np.where(models, 0.03125, np.nan)
    board.to_csv(folder / "leaderboard.csv", index=False)
    said = {
        "name": "small",
        "title": "A small benchmark",
        "description": "Nothing real.",
        "data": "made up",
        "stand_in": True,
        "stand_in_note": STAND_IN,
        "models": list(shifts),
        "seeds": list(seeds),
        "splits": list(splits),
        "metric": "pearson_delta",
        "version": "9.9",
        "finished": len(shifts) * len(splits) * len(seeds),
        "failed": [],
        **(about or {}),
    }
    (folder / "benchmark.json").write_text(json.dumps(said))
    return rows
