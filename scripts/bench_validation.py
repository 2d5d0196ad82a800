"""What native evaluation costs inside training: its share of an epoch of GEARS, on a simulated screen of 17,000 cells.

``python scripts/bench_validation.py --folder FOLDER`` trains for a few epochs and times, in each, the sums over validation cells and
the scores made of them (not the model's own forward passes over these cells), beside the whole epoch, validation included. Exit
status 1 if the share of the median epoch is 5 % or more.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bench_zoo import data_module, make_screen, new_model

from perturbzoo.evaluation.pseudobulk import PseudobulkSums
from perturbzoo.models import testing

MOST = 0.05


class Watch(pl.Callback):
    """Seconds of each epoch, and of what is timed inside it."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.parts: list[dict[str, float]] = []
        self._inside: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self._inside.clear()
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self.epochs.append(time.perf_counter() - self._began)
        self.parts.append(dict(self._inside))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            self._inside[name] = self._inside.get(name, 0.0) + time.perf_counter() - start
            return result

        return wrapped


def main() -> None:
    """Train and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench_validation"), help="of the screen (default: %(default)s)"
    )
    parser.add_argument("--genes", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    watch = Watch()
    for owner, name, label in (
        (PseudobulkSums, "update", "sums over cells"),
        (PseudobulkSums, "compute", "pseudobulks"),
        (testing, "validation_scores", "scores"),
    ):
        setattr(owner, name, watch.timed(label, getattr(owner, name)))
    place = make_screen(options.folder.resolve(), options.genes, seed=201)
    with contextlib.redirect_stdout(io.StringIO()):
        data = data_module(place, 201, "gears")
    pl.seed_everything(201, verbose=False)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        callbacks=[watch],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(new_model("gears"), datamodule=data)
    print(
        f"GEARS, {data.expression.shape[0]:,} cells x {options.genes:,} genes, {len(data.pairs_of('val'))} validation conditions"
    )
    shares = []
    for seconds, parts in zip(watch.epochs, watch.parts, strict=True):
        shares.append(sum(parts.values()) / seconds)
        listed = ", ".join(f"{name} {part:.3f} s" for name, part in parts.items())
        print(f"epoch {seconds:.2f} s; native evaluation {shares[-1]:.1%}: {listed}")
    middle = statistics.median(shares)
    print(f"{'pass' if middle < MOST else 'MISSED'}  native evaluation is {middle:.1%} of an epoch (less than {MOST:.0%})")
    sys.exit(0 if middle < MOST else 1)


if __name__ == "__main__":
    main()
