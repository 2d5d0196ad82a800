"""The learned models beside each other and all baselines, on simulated screens with known effects: accuracy, speed, memory.

::

    python scripts/bench_zoo.py [accuracy] [speed] [--models gears cpa ...] [--screens 201 202 203] [--epochs 20] [--threads 1]
    python scripts/bench_zoo.py accuracy speed --genes 100 --epochs 1 --screens 201 --results /tmp/zoo     # a first look

Each model is the one of its file in configs/model, with that file's way of sampling. A screen has counts of 1,000 genes,
100 single and 60 double perturbations of 100 cells each, 1,000 control cells, and GO-like terms that tell something about
unseen targets: the size and kind of bench_gears.py, from seeds that no other script has looked at. ``--genes`` makes
smaller ones, with fewer targets.

``accuracy``: GEARS' split (seen and unseen targets, combinations of 0 to 2 seen ones), one draw for each screen; training
stops as the command line's does, the best epoch is that of the validation conditions. Scored against the held-out cells, and
the change against the simulator's noise-free one. Intervals are over conditions; those of different screens are different
conditions. *Better* and *worse* are differences whose interval leaves out 0. Exit status 1 if a bar is missed: every model is
better than no change, which is the control mean, in every category, and than the training mean for combinations of seen
targets, by the correlation of changes and the squared error. Beside the sum of the singles and the linear model it is said which
is better, and nothing asked for. A category of one condition has no interval, and no bar.

``speed``: 17,000 cells, a process for each model. The training pass of an epoch without validation, median of three, the
first, which makes buffers, among them; cells are perturbed ones, each with its control. Peak memory is that of the process,
with what it imported and read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
import yaml
from bench_gears_accuracy import observed
from bench_gears_data import HERE, Bars, run, write_json
from bench_gears_ours import peak
from lightning.pytorch.callbacks import Callback, EarlyStopping

import perturbzoo
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.evaluation.comparison import Candidate
from perturbzoo.evaluation.pseudobulk import DESets, Pseudobulks
from perturbzoo.evaluation.summary import format_table, paired_difference, summarise
from perturbzoo.evaluation.table import score_conditions
from perturbzoo.models import find_model
from perturbzoo.models.base import SELECTION_METRIC, PerturbationModel
from perturbzoo.models.testing import CEILING, baseline_predictions, perturbed_reference, score_predictions
from perturbzoo.simulate import simulate_linear, truth_frame, write_go_table

CONFIGS = HERE.parent / "configs" / "model"
MODELS = ("gears", "cpa", "transformer", "cellot", "flow_matching")
SCREENS = (201, 202, 203)
CATEGORIES = ("unseen_single", "combo_seen0", "combo_seen1", "combo_seen2")
METRICS = ("pearson_delta", "pearson_delta_perturbed_reference", "mse", "mse_top20_de")
# for each bar the baseline, and the categories in which every model must be better by both of MUST
BARS = (("NoChange", CATEGORIES), ("TrainingMean", ("combo_seen2",)))
MUST = ("pearson_delta", "mse")
BESIDE = ("Additive", "Bilinear")
NO_INTERVAL = "on one condition, no interval"
TIMED_EPOCHS, PATIENCE = 3, 10


# ---------------------------------------------------------------------------------------------- screens and models


def make_screen(folder: Path, genes: int, seed: int) -> Path:
    """Simulate and write ``screen.h5ad``, of counts and with its truth, and ``go.csv``, once; their folder."""
    place = folder / f"genes{genes}_screen{seed}"
    if not (place / "screen.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        # few genes have no room for a hundred targets
        singles, doubles = min(100, genes * 2 // 5), min(60, genes // 4)
        adata = simulate_linear(genes, singles, doubles, 100, 1000, depth=2.0 * genes, seed=seed)
        write_go_table(adata, place / "go.csv")
        adata.write_h5ad(place / "screen.h5ad")
        write_json(place / "screen.json", {"cells": adata.n_obs, "density": adata.X.nnz / np.prod(adata.shape)})
    return place


def data_module(place: Path, seed: int, name: str, split: dict[str, Any] | None = None) -> PerturbSeqDataModule:
    """The screen as this model's configuration samples it; GEARS' split, if no other is given."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    data = PerturbSeqDataModule(
        path=str(place / "screen.h5ad"),
        condition_key="perturbation",
        covariates=[],
        split=split or {"method": "simulation", "seed": seed},
        perturbation_graph=[{"kind": "go", "path": str(place / "go.csv")}],
        seed=seed,
        **config.get("data", {}).get("init_args", {}),
    )
    data.setup()
    return data


def new_model(name: str, **arguments: Any) -> PerturbationModel:
    """The untrained model of a configuration; `arguments` go before the file's."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    return find_model(config["class_path"])(**config.get("init_args", {}) | arguments)


def fit(
    data: PerturbSeqDataModule,
    name: str,
    seed: int,
    epochs: int,
    callback: Callback,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> PerturbationModel:
    """Train; the best checkpoint by the validation conditions. `arguments` are the model's, `options` the trainer's."""
    pl.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=root,
            **options,
        )
        trainer.fit(new_model(name, **arguments or {}), datamodule=data)
        return perturbzoo.load(Path(root) / "checkpoints" / "best.ckpt")


# ---------------------------------------------------------------------------------------------- accuracy


def predicted_change(model: PerturbationModel, screen: anndata.AnnData, conditions: list[str]) -> np.ndarray:
    """Shape ``(P, G)``: mean change of all control cells under each condition, as ``perturbzoo predict`` gives it."""
    controls = screen[(screen.obs["perturbation"] == "control").to_numpy()].copy()
    predicted = model.predict(controls, conditions, pseudobulk=True)
    return predicted.to_df("delta").set_axis(predicted.obs["condition"].astype(str)).loc[conditions].to_numpy()


def true_change(screen: anndata.AnnData, conditions: list[str]) -> np.ndarray:
    """Shape ``(P, G)``: the simulator's noise-free change of each condition."""
    truth = truth_frame(screen, "delta")
    return truth.set_axis([str(perturbzoo.parse_condition(name)) for name in truth.index]).loc[conditions].to_numpy()


class Scores:
    """Tables of scores by model, a part for each screen: against the cells, and against the truth."""

    def __init__(self) -> None:
        self.cells: dict[str, list[pd.DataFrame]] = {}
        self.truth: dict[str, list[pd.DataFrame]] = {}

    def add(self, label: str, table: pd.DataFrame, screen: int) -> None:
        self.cells.setdefault(label, []).append(
            table.assign(condition=[f"{name}, screen {screen}" for name in table["condition"]])
        )

    def add_truth(self, label: str, predicted: Pseudobulks, truth: np.ndarray, genes: DESets, labels: dict[str, Any]) -> None:
        exact = replace(predicted, observed=predicted.control + truth)
        self.truth.setdefault(label, []).append(score_conditions(exact, de=genes, **labels))


def score_screen(scores: Scores, options: argparse.Namespace, seed: int) -> None:
    """Train every model on a screen, and score it and all baselines on the test conditions."""
    place = make_screen(options.folder, options.genes, seed)
    screen = anndata.read_h5ad(place / "screen.h5ad")
    for name in options.models:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            data = data_module(place, seed, name)
            stop = EarlyStopping(SELECTION_METRIC, mode="max", patience=PATIENCE, strict=False)
            model = fit(data, name, seed, options.epochs, stop)
            bulks, genes = observed(data, "test")
            described = pd.DataFrame(data.describe_pairs(bulks.pair))
            conditions = described["condition"].tolist()
            labels = {
                "conditions": [f"{condition}, screen {seed}" for condition in conditions],
                "contexts": described["context"].tolist(),
                "categories": described["category"].tolist(),
                "reference": perturbed_reference(data)[bulks.context],
            }
            own = bulks.with_prediction(bulks.control + predicted_change(model, screen, conditions))
            predictions = {type(model).__name__: own}
            if name == options.models[-1]:  # the same for every model, and last in the table
                predictions |= baseline_predictions(data, bulks, model)
            tables = score_predictions(data, bulks, {label: Candidate(of.predicted) for label, of in predictions.items()})
        truth = true_change(screen, conditions)
        for label, predicted in predictions.items():
            scores.add(label, tables[label], seed)
            scores.add_truth(label, predicted, truth, genes, labels)
        if name == options.models[-1]:
            scores.add(CEILING, tables[CEILING], seed)
        print(f"screen {seed}, {name}: {time.perf_counter() - start:.0f} s", flush=True)


def compare_accuracy(options: argparse.Namespace, bars: Bars) -> None:
    """Print and write the tables, and note what is passed."""
    scores = Scores()
    for seed in options.screens:
        score_screen(scores, options, seed)
    options.results.mkdir(parents=True, exist_ok=True)
    against: dict[str, dict[str, pd.DataFrame]] = {}
    for kind, parts, metrics in (("cells", scores.cells, METRICS), ("truth", scores.truth, ("pearson_delta", "mse"))):
        against[kind] = {label: pd.concat(tables, ignore_index=True) for label, tables in parts.items()}
        summary = summarise(against[kind], categories=CATEGORIES)
        summary = summary[summary["metric"].isin(metrics)]
        summary.round(6).to_csv(options.results / f"accuracy_{kind}.csv", index=False)
        what = "held-out cells" if kind == "cells" else "the simulator's noise-free means"
        print(f"\naccuracy against {what}: {options.genes} genes, screens {', '.join(map(str, options.screens))}, ", end="")
        print(f"at most {options.epochs} epochs\n{format_table(summary)}", flush=True)
    tables = against["cells"]
    names = [new_model(name).__class__.__name__ for name in options.models]
    for baseline, categories in BARS:
        for name in names:
            add_bars(bars, name, baseline, paired_difference(tables[name], tables[baseline]), categories)
    print("\ndelta Pearson and MSE of each model less the baseline's, [95 % interval over conditions]")
    beside = [label for label in tables if label.startswith(BESIDE)]
    for name in names:
        for baseline in beside:
            difference = paired_difference(tables[name], tables[baseline])
            for category in CATEGORIES:
                texts = [f"{metric} {text} {verdict}" for metric, text, verdict in verdicts(difference, category)]
                if texts:
                    print(f"  {category}, {name} less {baseline}: " + "; ".join(texts))


def verdicts(difference: pd.DataFrame, category: str) -> list[tuple[str, str, str]]:
    """Metric, difference with its interval, and what it says of the model; for those of MUST, nothing for an empty category."""
    found = []
    for metric in MUST:
        rows = difference[(difference["category"] == category) & (difference["metric"] == metric)]
        if not len(rows) or rows["n"].iloc[0] == 0:
            continue
        row = rows.iloc[0]
        if row["n"] == 1:
            found.append((metric, f"{row['difference']:+.5f}", NO_INTERVAL))
            continue
        low, high = (row["low"], row["high"]) if metric == "pearson_delta" else (-row["high"], -row["low"])
        verdict = "better" if low > 0 else "worse" if high < 0 else "no difference beyond the interval"
        digits = 3 if metric == "pearson_delta" else 5
        text = f"{row['difference']:+.{digits}f} [{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"
        found.append((metric, text, verdict))
    return found


def add_bars(bars: Bars, name: str, baseline: str, difference: pd.DataFrame, categories: tuple[str, ...]) -> None:
    """One line for each category of two conditions or more."""
    for category in categories:
        found = verdicts(difference, category)
        if not found or found[0][2] == NO_INTERVAL:
            continue
        text = ", ".join(f"{metric} {numbers} {verdict}" for metric, numbers, verdict in found)
        bars.add(all(verdict == "better" for *_, verdict in found), f"{name} better than {baseline} on {category}: {text}")


# ---------------------------------------------------------------------------------------------- speed


class Watch(Callback):
    """Notes the time of each training pass, and how many cells it had."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.cells: list[int] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self.seconds.append(0.0)
        self.processor.append(0.0)
        self.cells.append(0)
        self.began, self.worked = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, model: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds[-1], self.processor[-1] = time.perf_counter() - self.began, time.process_time() - self.worked
        self.cells[-1] += len(batch)


def time_one(folder: str, seed: str, output: str, name: str, epochs: str, arguments: str = "{}") -> None:
    """Train one model in this process, and write what it took; `arguments` is JSON."""
    data, watch = data_module(Path(folder), int(seed), name), Watch()
    model = fit(data, name, int(seed), int(epochs), watch, json.loads(arguments), limit_val_batches=0)
    result = {
        "seconds": watch.seconds,
        "processor": watch.processor,
        "cells": watch.cells,
        "peak_mib": peak(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
    }
    write_json(Path(output), result)


def compare_speed(options: argparse.Namespace) -> None:
    """Time every model in a process of its own, print and write the table."""
    seed = options.screens[0]
    place = make_screen(options.folder, options.genes, seed)
    cells = json.loads((place / "screen.json").read_text())["cells"]
    rows = []
    for name in options.models:
        epochs = min(options.epochs, TIMED_EPOCHS)
        output = place / f"speed_{name}.json"
        done = run(sys.executable, options.threads, {}, Path(__file__).resolve(), "one", place, seed, output, name, epochs)
        seconds = statistics.median(done["seconds"])
        rows.append(
            {
                "model": name,
                "seconds_per_epoch": seconds,
                "cells_per_second": statistics.median(done["cells"]) / seconds,
                "peak_mib": done["peak_mib"],
                "parameters": done["parameters"],
                "threads": done["threads"],
            }
        )
    table = pd.DataFrame(rows)
    options.results.mkdir(parents=True, exist_ok=True)
    table.round(3).to_csv(options.results / "speed.csv", index=False)
    print(f"\nspeed: a screen of {cells:,} cells x {options.genes} genes; epochs timed: {epochs}")
    print(f"{'':<16}{'s per epoch':>12}{'cells/s':>10}{'peak MiB':>10}{'parameters':>12}{'threads':>9}")
    for row in rows:
        print(
            f"{row['model']:<16}{row['seconds_per_epoch']:>12.2f}{row['cells_per_second']:>10,.0f}{row['peak_mib']:>10.0f}"
            f"{row['parameters']:>12,}{row['threads']:>9}"
        )


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        time_one(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["accuracy", "speed"], metavar="accuracy | speed")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--screens", nargs="+", type=int, default=list(SCREENS), help="seeds (default: 201 202 203)")
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=20, help=f"at most; {TIMED_EPOCHS} at most are timed (default: 20)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_zoo"), help="of the screens (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "zoo", help="of the tables, as CSV")
    options = parser.parse_args()
    if wrong := set(options.parts) - {"accuracy", "speed"}:
        parser.error(f"no part {', '.join(sorted(wrong))}: give accuracy, speed or both")
    options.folder = options.folder.resolve()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    bars = Bars()
    if "speed" in options.parts:
        compare_speed(options)
    if "accuracy" in options.parts:
        compare_accuracy(options, bars)
        print()
        sys.exit(0 if bars.report() else 1)


if __name__ == "__main__":
    main()
