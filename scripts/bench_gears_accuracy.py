"""The accuracy part of bench_gears.py: both sides' predictions scored alike, beside simple baselines."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from bench_gears_data import (
    ACCURACY_GENES,
    HERE,
    OURS,
    PEER,
    SEEDS,
    TUNED,
    Bars,
    data_module,
    gears_name,
    make_screen,
    peer,
    run,
)

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.evaluation.metrics import mse, mse_at, target_mask
from perturbzoo.evaluation.pseudobulk import DESets, Pseudobulks, de_sets
from perturbzoo.evaluation.summary import format_table, paired_difference, summarise
from perturbzoo.evaluation.table import score_conditions
from perturbzoo.models import find_model
from perturbzoo.models.testing import control_moments, data_genes, perturbed_reference

RESULTS = HERE / "results" / "gears"
EPOCHS = 10
CATEGORIES = ("unseen_single", "combo_seen0", "combo_seen1", "combo_seen2")
# metric: whether higher is better
SCORES = {"pearson_delta": True, "mse_top20_de": False}
MUST_WIN = ("unseen_single", "combo_seen0", "combo_seen1")


def peer_results(options: argparse.Namespace, folder: Path, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Its predicted changes of the test conditions, and its validation errors and times by epoch; from the cache or run."""
    fingerprint = json.loads((folder / "screen.json").read_text())["fingerprint"]
    kept, curve_file = RESULTS / f"test_delta_seed{seed}.csv.gz", RESULTS / f"validation_seed{seed}.csv"
    if curve_file.exists() and not options.fresh:
        curve = pd.read_csv(curve_file, dtype={"screen": str})
        if (curve["screen"] == fingerprint).all():
            return pd.read_csv(kept, index_col=0), curve
        print(f"{curve_file.name} is of another simulated screen: {PEER} runs again")
    output = folder / f"peer_{seed}.json"
    result = peer(options, TUNED, "accuracy", folder, seed, output, EPOCHS)
    arrays = np.load(output.with_suffix(".npz"))
    data = data_module(folder, seed)
    bulks, genes = observed(data, "val")
    curve = pd.DataFrame(result["curve"])
    changes = [aligned(arrays[f"val_{epoch}_conditions"], arrays[f"val_{epoch}"], data, "val") for epoch in range(len(curve))]
    curve = curve.join(validation_errors(bulks, genes, changes)).assign(screen=fingerprint)
    delta = pd.DataFrame(aligned(arrays["test_conditions"], arrays["test"], data, "test"), columns=data_genes(data))
    delta.index = pd.Index([str(data.conditions[pair]) for pair in data.pairs_of("test")], name="condition")
    RESULTS.mkdir(parents=True, exist_ok=True)
    # a tenth of a thousandth is far below the noise of 100 cells
    delta.round(4).to_csv(kept, compression={"method": "gzip", "mtime": 0})
    curve.round(6).to_csv(curve_file, index=False)
    return delta.round(4), curve


def aligned(names: Any, changes: Any, data: PerturbSeqDataModule, part: Any) -> Any:
    """The peer's changes in the order of the data module's pairs and genes (cell-gears keeps the genes of the file)."""
    position = {name: row for row, name in enumerate(names.tolist())}
    return changes[[position[gears_name(str(data.conditions[pair]))] for pair in data.pairs_of(part)]]


def observed(data: PerturbSeqDataModule, part: Any) -> tuple[Pseudobulks, DESets]:
    """The observed pseudobulks of a part (with no change as the prediction), and their top-20 DE genes."""
    pairs = data.pairs_of(part)
    cells = [data.index.cells_by_pair[pair] for pair in pairs]
    mean, variance = data.moments(cells)
    context = data.index.context_of_pair[pairs]
    control = data.control_mean[context]
    count = np.array([len(rows) for rows in cells])
    bulks = Pseudobulks(pairs, context, control.copy(), mean, control, variance, count)
    targets = target_mask([data.conditions[pair].targets for pair in pairs], data_genes(data))
    return bulks, de_sets(bulks, control_moments(data), targets)


def validation_errors(bulks: Pseudobulks, genes: DESets, changes: list[Any]) -> pd.DataFrame:
    """Mean squared error over all genes and over the top-20 DE genes, mean over validation conditions, by epoch."""
    rows = []
    for change in changes:
        predicted = bulks.control + change
        rows.append((mse(predicted, bulks.observed).mean(), mse_at(predicted, bulks.observed, genes.genes).mean()))
    return pd.DataFrame(rows, columns=["val_mse", "val_mse_top20_de"])


def go_embedding(folder: Path, data: PerturbSeqDataModule) -> Path:
    """Targets as points: the first 20 principal components of which GO-like terms they have, as a table for the baselines."""
    assert data.spec is not None
    table = pd.read_csv(folder / "go.csv")
    table = table[table["gene"].isin(data.spec.targets)]
    membership = pd.crosstab(table["gene"], table["term"]).clip(upper=1)
    values = membership.to_numpy(dtype=float)
    left, singular, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    path = folder / "go_embedding.csv"
    pd.DataFrame((left * singular)[:, :20], index=membership.index).to_csv(path)
    return path


def baselines(folder: Path, data: PerturbSeqDataModule, part: Any) -> dict[str, Any]:
    """Changes predicted by the simple baselines, ``(P, G)`` each."""
    path = str(go_embedding(folder, data))
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "TrainingMean": ("TrainingMean", {}),
        "Additive": ("Additive", {}),
        "Bilinear, pca": ("Bilinear", {}),
        "Bilinear, GO": ("Bilinear", {"embedding": path}),
        "KNN, pca": ("KNN", {}),
        "KNN, GO": ("KNN", {"embedding": path}),
    }
    table = data.table.select(torch.from_numpy(data.pairs_of(part)))
    control = torch.as_tensor(data.control_mean, dtype=torch.float32)[table.context]
    changes = {}
    for label, (name, arguments) in wanted.items():
        model = find_model(name)(**arguments)
        model.fit_closed_form(data.spec, data.training_pseudobulks())
        with torch.inference_mode():
            changes[label] = model.delta(table, control)[0].double().numpy()
    return changes


def compare_accuracy(options: argparse.Namespace, bars: Bars) -> None:
    """Train and score both sides for every seed, print the tables, and note what is passed."""
    folder, script = options.folder / f"genes{ACCURACY_GENES}", HERE / "bench_gears_ours.py"
    make_screen(folder, ACCURACY_GENES)
    tables: dict[str, list[pd.DataFrame]] = {}
    times = []
    for seed in SEEDS:
        data = data_module(folder, seed)
        delta, their_curve = peer_results(options, folder, seed)
        output = folder / f"ours_{seed}.json"
        ours = run(sys.executable, options.threads, TUNED, script, "accuracy", folder, seed, output, EPOCHS)
        arrays = np.load(output.with_suffix(".npz"))
        bulks, genes = observed(data, "val")
        curve = pd.DataFrame(ours["curve"])
        curve = curve.join(validation_errors(bulks, genes, [arrays[f"val_{epoch}"] for epoch in range(len(curve))]))
        times += [(seed, *row) for row in time_to_best(curve, their_curve)]
        bulks, genes = observed(data, "test")
        described = pd.DataFrame(data.describe_pairs(bulks.pair))
        predicted = {
            OURS: arrays["test"],
            PEER: delta.loc[described["condition"]].to_numpy(),
            **baselines(folder, data, "test"),
        }
        for label, change in predicted.items():
            scores = score_conditions(
                bulks.with_prediction(bulks.control + change),
                conditions=described["condition"].tolist(),
                contexts=[f"seed {seed}"] * len(described),
                categories=described["category"].tolist(),
                reference=perturbed_reference(data)[bulks.context],
                de=genes,
            )
            tables.setdefault(label, []).append(scores)
    scores_by_model = {label: pd.concat(parts, ignore_index=True) for label, parts in tables.items()}
    summary = summarise(scores_by_model, categories=CATEGORIES)
    summary = summary[summary["metric"].isin(SCORES)]
    difference = paired_difference(scores_by_model[OURS], scores_by_model[PEER])
    RESULTS.mkdir(parents=True, exist_ok=True)
    summary.round(6).to_csv(RESULTS / "accuracy.csv", index=False)
    print(
        f"\naccuracy: {ACCURACY_GENES} genes, {EPOCHS} epochs, splits and training seeds {', '.join(map(str, SEEDS))}; {OURS}: at most "
        f"{ours['conditions']} conditions in a batch with {ours['cells']} cells of each, {ours['steps_per_epoch']} batches an epoch"
    )
    print(format_table(summary))
    print(f"\n{OURS} less {PEER}, [95 % interval over conditions]; winner of each row among all")
    for category in CATEGORIES:
        for metric, higher in SCORES.items():
            found = difference[(difference["category"] == category) & (difference["metric"] == metric)].iloc[0]
            rows = summary[(summary["category"] == category) & (summary["metric"] == metric)].set_index("model")["mean"]
            best = rows.idxmax() if higher else rows.idxmin()
            text = f"{category} {metric}: {found['difference']:+.5f} [{found['low']:+.5f}, {found['high']:+.5f}]"
            print(f"  {text}; best: {best} {rows[best]:.5f}")
            gain = found["difference"] if higher else -found["difference"]
            if category in MUST_WIN:
                bars.add(gain > 0, f"{text}: better")
            else:
                bars.add(gain >= 0, f"{text}: not worse")
    print("\ntime to the lowest validation error that the peer reaches, s of processor time (wall)")
    for seed, measure, error, epoch, (wall, processor), own_epoch, own in times:
        reached = "not reached" if own is None else f"{own[1]:.2f} ({own[0]:.2f}), epoch {own_epoch}"
        print(f"  seed {seed}, {measure} {error:.6f}: {PEER} {processor:.1f} ({wall:.1f}), epoch {epoch}; {OURS} {reached}")
        ratio = 0.0 if own is None else processor / own[1]
        bars.add(ratio >= 20, f"time to best {measure}, seed {seed}: {ratio:.0f} x less (at least 20)")


def time_to_best(curve: pd.DataFrame, theirs: pd.DataFrame) -> list[tuple[Any, ...]]:
    """When the peer has its lowest validation error, and when ours has one as low; start of training to end of validation."""
    rows = []
    for measure in ("val_mse_top20_de", "val_mse"):
        best = theirs.loc[theirs[measure].idxmin()]
        reached = curve[curve[measure] <= best[measure]]
        own = reached.iloc[0] if len(reached) else None
        mine = (None, None) if own is None else (int(own["epoch"]), (own["wall_s"], own["cpu_s"]))
        rows.append((measure, best[measure], int(best["epoch"]), (best["wall_s"], best["cpu_s"]), *mine))
    return rows
