"""GEARS on the two small real screens, in folds over conditions and with several seeds, beside every baseline.

::

    PERTURBZOO_DATA=FOLDER python scripts/bench_gears_real.py [papalexi] [norman] [norman_simulation] [--seeds 5] [--epochs 20]

``papalexi``: 25 knockouts in five folds, so that each is predicted by models that never saw it. ``norman``: its doubles in
five folds, all singles train. ``norman_simulation``: the split of GEARS, whose targets and doubles are unseen alike; one draw
for each seed. The folds are the same for all seeds; a condition's score is its mean over the seeds of training, intervals are
bootstrapped over conditions. ``GEARS, no graph`` is the same model without the network's graph, ``mean of 5 GEARS`` the mean prediction of the seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import yaml
from bench_gears_accuracy import observed
from bench_gears_ours import predicted_changes

import perturbzoo
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.evaluation.comparison import Candidate
from perturbzoo.evaluation.summary import format_table, paired_difference, summarise
from perturbzoo.models import GEARS
from perturbzoo.models.testing import CEILING, baseline_predictions, score_predictions

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "data"
RESULTS = Path(__file__).resolve().parent / "results" / "gears"
FOLDS = 5
SCREENS = {
    "papalexi": ("papalexi", {"method": "kfold", "folds": FOLDS, "seed": 1, "val_fraction": 0.2}),
    "norman": ("norman_subset", {"method": "kfold_doubles", "folds": FOLDS, "seed": 1}),
    "norman_simulation": ("norman_subset", {"method": "simulation"}),
}
METRICS = ["pearson_delta", "pearson_delta_perturbed_reference", "mse", "mse_top20_de"]


def data_module(screen: str, split: dict[str, Any], seed: int, **changes: Any) -> PerturbSeqDataModule:
    """The data module of the screen's YAML; `changes` replace its arguments, ``more`` is added to its graphs."""
    config = yaml.safe_load((CONFIGS / f"{SCREENS[screen][0]}.yaml").read_text())["data"]["init_args"]
    config["perturbation_graph"] += changes.pop("more", [])
    data = PerturbSeqDataModule(**{**config, "split": split, "seed": seed, **changes})
    data.setup()
    return data


def trained(data: PerturbSeqDataModule, seed: int, epochs: int, **arguments: Any) -> GEARS:
    """The best checkpoint by the validation conditions."""
    pl.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=root,
        )
        trainer.fit(GEARS(**arguments), datamodule=data)
        return perturbzoo.load(Path(root) / "checkpoints" / "best.ckpt")


def runs(screen: str, seeds: int) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Seed, name of the draw, and split of each fit."""
    split = SCREENS[screen][1]
    for seed in range(1, seeds + 1):
        if split["method"] == "simulation":
            yield seed, f"draw {seed}", {**split, "seed": seed}
        else:
            yield from ((seed, "", {**split, "fold": fold}) for fold in range(FOLDS))


def scores_of(screen: str, seeds: int, epochs: int) -> dict[str, pd.DataFrame]:
    """Scores by model; a row for each tested condition (and draw), the mean over seeds."""
    collected: dict[str, list[pd.DataFrame]] = {}
    changes: dict[str, list[np.ndarray]] = {}
    for seed, draw, split in runs(screen, seeds):
        with contextlib.redirect_stdout(io.StringIO()):
            data = data_module(screen, split, seed)
            bulks, _ = observed(data, "test")
            model = trained(data, seed, epochs)
            plain = data_module(screen, split, seed, perturbation_graph=None)
            without = trained(plain, seed, epochs)
            change = predicted_changes(model, data, "test")
            predictions = {
                "GEARS": bulks.control + change,
                "GEARS, no graph": bulks.control + predicted_changes(without, plain, "test"),
                **{label: found.predicted for label, found in baseline_predictions(data, bulks, model).items()},
            }
        of_fold = changes.setdefault(f"{draw}{split.get('fold')}", [])
        of_fold.append(change)
        if len(of_fold) == seeds:
            mean = np.mean(of_fold, axis=0)
            predictions[f"mean of {seeds} GEARS"] = bulks.control + mean
        tables = score_predictions(data, bulks, {label: Candidate(mean) for label, mean in predictions.items()})
        for label in (*predictions, CEILING):
            table = tables[label].assign(context=draw) if draw else tables[label]
            collected.setdefault(label, []).append(table)
    keys = ["condition", "context", "category"]
    return {
        label: pd.concat(tables).groupby(keys, as_index=False, sort=False).mean(numeric_only=True)
        for label, tables in collected.items()
    }


def spread(tables: dict[str, pd.DataFrame]) -> str:
    """What GEARS is better or worse by than each baseline, over the same conditions."""
    lines = []
    for label, table in tables.items():
        if label in ("GEARS", CEILING):
            continue
        difference = paired_difference(tables["GEARS"], table)
        for category in difference["category"].unique():
            row = difference[(difference["category"] == category) & (difference["metric"] == "pearson_delta")].iloc[0]
            verdict = "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "no difference beyond the interval"
            lines.append(
                f"  {category} ({row['n']}), GEARS less {label}: {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] {verdict}"
            )
    return "\n".join(sorted(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screens", nargs="*", default=list(SCREENS), help="which of them (default: all)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for screen in options.screens:
        tables = scores_of(screen, options.seeds, options.epochs)
        summary = summarise(tables)
        summary = summary[summary["metric"].isin(METRICS)]
        RESULTS.mkdir(parents=True, exist_ok=True)
        summary.round(6).to_csv(RESULTS / f"real_{screen}.csv", index=False)
        print(f"\n{screen}: {options.seeds} seeds, {options.epochs} epochs")
        print(format_table(summary))
        print("difference of delta Pearson, [95 % interval over conditions]")
        print(spread(tables), flush=True)


if __name__ == "__main__":
    main()
