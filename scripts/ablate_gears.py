"""What each choice of GEARS is worth: the table in docs/models/gears.md.

::

    python scripts/ablate_gears.py [simulated] [papalexi] [--seeds 3] [--epochs 10] [--only NAME ...]

``simulated``: three screens of the size and kind of bench_gears.py (1,000 genes, 100 singles, 60 doubles) from other seeds, so
that nothing here was looked at where the benchmark is scored; all their held-out conditions are validation. ``papalexi``: the
validation conditions of five folds; test conditions are not looked at (needs PERTURBZOO_DATA).
Each line changes one thing. Both are scored at the best epoch by the validation split's delta Pearson.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import bench_gears_data
import numpy as np
import pandas as pd
from bench_gears_accuracy import observed
from bench_gears_ours import predicted_changes
from bench_gears_real import data_module, trained

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.evaluation.metrics import mse_at, pearson_delta

SCREENS = (101, 102, 103)
CATEGORIES = ("unseen_single", "combo_seen0", "combo_seen1", "combo_seen2")
# what is changed: arguments of the model, of the data module
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "untrained (lr 0)": ({"lr": 0.0}, {}),
    "no neighbours in the start": ({"neighbours": False}, {}),
    "no residual": ({"residual": False}, {}),
    "start is no input": ({"start_input": False}, {}),
    "no graph": ({}, {"perturbation_graph": None}),
    "and co-expression graph, typed": ({}, {"more": [{"kind": "coexpression"}]}),
    "and co-expression graph, one type": ({"relations": False}, {"more": [{"kind": "coexpression"}]}),
    "unseen_rate .2": ({"unseen_rate": 0.2}, {}),
    "unseen_rate 0 (everyone speaks)": ({"unseen_rate": 0.0}, {}),
    "autofocus loss": ({"loss": "autofocus"}, {}),
    "gene weighting .5": ({"gene_weighting": 0.5}, {}),
    "direction loss .1": ({"direction_weight": 0.1}, {}),
    "batch norm": ({"norm": "batch"}, {}),
    "weight decay 5e-4": ({"weight_decay": 5e-4}, {}),
    "lr 3e-3": ({"lr": 3e-3}, {}),
    "lr decay .5": ({"lr_decay": 0.5}, {}),
    "16 conditions x 32 cells": ({}, {"conditions_per_batch": 16, "cells_per_condition": 32}),
    "paper": ({"paper": True}, {}),
}


def simulated(folder: Path, screen: int, changes: dict[str, Any]) -> PerturbSeqDataModule:
    bench_gears_data.make_screen(folder / f"screen{screen}", 1000, seed=screen)
    graph: Any = [{"kind": "go", "path": str(folder / f"screen{screen}" / "go.csv")}, *changes.pop("more", [])]
    arguments = {**bench_gears_data.BATCH, "perturbation_graph": graph, **changes}
    data = PerturbSeqDataModule(
        path=str(folder / f"screen{screen}" / "screen.h5ad"),
        condition_key="condition",
        covariates=[],
        split={"method": "simulation", "seed": screen},
        seed=screen,
        **arguments,
    )
    data.setup()
    return data


def scored(data: PerturbSeqDataModule, model: Any, part: Any) -> pd.DataFrame:
    bulks, genes = observed(data, part)
    predicted = bulks.control + predicted_changes(model, data, part)
    category = pd.DataFrame(data.describe_pairs(bulks.pair))["category"]
    return pd.DataFrame(
        {
            "category": category,
            "pearson_delta": pearson_delta(predicted, bulks.observed, bulks.control),
            "mse_top20_de": mse_at(predicted, bulks.observed, genes.genes),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screens", nargs="*", default=["simulated", "papalexi"])
    parser.add_argument("--seeds", type=int, default=3, help="of training, for each screen or fold (default: 3)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--folder", type=Path, default=Path("runs/ablate_gears"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for screens in options.screens:
        categories = CATEGORIES if screens == "simulated" else ("unseen_single",)
        print(f"\n{screens}: delta Pearson and top-20 DE MSE x 1e3, {options.seeds} seeds, {options.epochs} epochs")
        print(f"{'':<36}" + "".join(f"{name:>18}" for name in categories), flush=True)
        for name in options.only:
            model_changes, data_changes = VARIANTS[name]
            tables, start = [], time.perf_counter()
            for which in SCREENS if screens == "simulated" else range(5):
                for seed in range(1, options.seeds + 1):
                    with contextlib.redirect_stdout(io.StringIO()):
                        if screens == "simulated":
                            data = simulated(options.folder, which, dict(data_changes))
                        else:
                            split = {"method": "kfold", "folds": 5, "fold": which, "seed": 1, "val_fraction": 0.2}
                            data = data_module("papalexi", split, seed, **data_changes)
                        model = trained(data, seed, options.epochs, **model_changes)
                    tables += [scored(data, model, part) for part in (("val", "test") if screens == "simulated" else ("val",))]
            means = pd.concat(tables).groupby("category").mean().reindex(list(categories))
            cells = [
                f"{row.pearson_delta:>10.3f}{row.mse_top20_de * 1e3:>8.1f}" if np.isfinite(row.pearson_delta) else " " * 18
                for row in means.itertuples()
            ]
            print(f"{name:<36}" + "".join(cells) + f"   {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
