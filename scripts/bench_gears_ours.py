"""Run our GEARS on a prepared screen: what bench_gears.py starts as a process of its own.

::

    python bench_gears_ours.py TASK FOLDER SEED OUTPUT.json EPOCHS [A+B ...]

``speed`` times the training pass of each epoch and one prediction of each combination; ``accuracy`` notes what is predicted
for the validation conditions after each epoch, and for the test conditions by the best checkpoint, in ``OUTPUT.npz``.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anndata
import lightning.pytorch as pl
import numpy as np
import torch
from bench_gears_data import data_module, write_json

import perturbzoo
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.models.gears import GEARS


def clock() -> np.ndarray:
    """Seconds on the wall, and of processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def resident() -> float:
    """Resident memory now, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak() -> float:
    """Largest resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def predicted_changes(model: GEARS, data: PerturbSeqDataModule, part: Any) -> np.ndarray:
    """Shape ``(P, G)``: predicted change of each pair of a part."""
    table = data.table.select(torch.from_numpy(data.pairs_of(part)))
    control = torch.as_tensor(data.control_mean, dtype=torch.float32)[table.context]
    training = model.training
    with torch.no_grad():
        delta, _ = model.eval().delta(table, control)
    model.train(training)
    return delta.numpy()


class Watch(pl.Callback):
    """Notes how long the training pass of each epoch takes, and after each validation the time and the predictions."""

    def __init__(self) -> None:
        self.passes: list[Any] = []
        self.curve: list[dict[str, float]] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.aside = np.zeros(2)
        self.steps = 0

    def on_fit_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self.start = clock()

    def on_train_epoch_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self.passes.append(None)
        self.began = clock()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1
        self.passes[-1] = (clock() - self.began).tolist()

    def on_validation_end(self, trainer: pl.Trainer, model: GEARS) -> None:
        validated = clock()
        wall, processor = validated - self.start - self.aside
        self.arrays[f"val_{len(self.curve)}"] = predicted_changes(model, model.data, "val")
        self.curve.append({"epoch": len(self.curve) + 1, "wall_s": wall, "cpu_s": processor})
        # what is noted here is no part of training
        self.aside += clock() - validated


def main() -> None:
    after_imports = resident()
    task, folder, seed, output, epochs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
    began = clock()
    pl.seed_everything(seed)
    data, watch = data_module(folder, seed), Watch()
    with tempfile.TemporaryDirectory(dir=folder) as root:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[watch],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=root,
        )
        trainer.fit(GEARS(), datamodule=data)
        model = perturbzoo.load(Path(root) / "checkpoints" / "best.ckpt")
    result: dict[str, Any] = {
        "passes": watch.passes,
        "curve": watch.curve,
        "steps_per_epoch": watch.steps // epochs,
        "conditions": int(data.hparams["conditions_per_batch"]),
        "cells": int(data.hparams["cells_per_condition"]),
        "training_conditions": len(data.pairs_of("train")),
        "whole_fit": (clock() - began).tolist(),
        "training_peak_mib": peak() - after_imports,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
    }
    if task == "speed":
        cells = anndata.read_h5ad(folder / "screen.h5ad")
        controls = cells[cells.obs["condition"] == "ctrl"].copy()
        del cells
        for name, how in (("predictions", {"pseudobulk": True}), ("predictions_300_cells", {"n_cells": 300})):
            result[name] = []
            for combination in sys.argv[6:]:
                start = clock()
                model.predict(controls, [combination], **how)
                result[name].append((clock() - start).tolist())
            start = clock()
            model.predict(controls, sys.argv[6:], **how)
            result[f"{name}_together"] = (clock() - start).tolist()
        result["peak_mib"] = peak() - after_imports
    else:
        watch.arrays["test"] = predicted_changes(model, data, "test")
        np.savez_compressed(output.with_suffix(".npz"), **watch.arrays)
    write_json(output, result)


if __name__ == "__main__":
    main()
