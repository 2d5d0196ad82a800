"""What kang_transfer.py and norman_distributions.py share: fits, and how near predicted cells are to observed ones.

Scores are unbiased energy distance (E), squared maximum mean discrepancy (MMD2; the width is the median distance between
observed and control cells) and Sinkhorn divergence in the first 50 principal axes of the training cells; R2 of the genes' means
and variances.

The ceiling is one half of the observed cells compared with the other. Every row is therefore compared with a half, in samples
of a half's size, and the mean over random halvings is shown.

A contender is a model with the arguments of its file in configs/model; for a model that moves cells a space (`pca`, `genes`, or `scvi`
with 20 dimensions) and a start (`identity`, `mean_shift`, `additive`, `measured`) may follow: `CellOT:scvi`, `CellOT:pca:identity`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import lightning
import numpy as np
import pandas as pd
import yaml

import perturbzoo
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.evaluation.distribution import (
    energy_distance,
    median_bandwidth,
    mmd,
    r_squared_of_moments,
    sinkhorn_divergence,
)
from perturbzoo.models import find_model
from perturbzoo.models.baselines import Baseline
from perturbzoo.models.latent import LatentSpace, Start, fit_latent

CONFIGS = Path(__file__).parent.parent / "configs" / "model"
COLUMNS = ("E", "MMD2", "Sinkhorn", "R2 mean", "R2 variance")
CEILING = "split-half ceiling"


def arguments(description: str | None, models: list[str]) -> argparse.ArgumentParser:
    """The arguments that both scripts take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--halvings", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the arguments and keep quiet."""
    options = parser.parse_args()
    if "PERTURBZOO_DATA" not in os.environ:
        sys.exit(f"{parser.prog}: the environment variable PERTURBZOO_DATA must name the folder of the data")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return options


def configured(contender: str) -> tuple[Any, dict[str, Any]]:
    """A new model, and the arguments of its data, by the first file of configs/model that names the class."""
    name, *others = contender.split(":")
    model, given, data = find_model(name), {}, {}
    for file in sorted(CONFIGS.glob("*.yaml")):
        config = yaml.safe_load(file.read_text())
        if config["model"]["class_path"].rsplit(".", 1)[-1] == name:
            given, data = config["model"].get("init_args", {}), config.get("data", {}).get("init_args", {})
            break
    for other in others:
        given = {**given, **({"start": other} if other in get_args(Start) else {"space": other})}
    if "scvi" in others:
        given["components"] = 20
    return model(**given), data


def fitted(contender: str, make_data: Callable[..., PerturbSeqDataModule], options: argparse.Namespace) -> Any:
    """The model at its best validation score; `make_data` takes further arguments of the data module."""
    lightning.seed_everything(options.seed, verbose=False)
    model, data_arguments = configured(contender)
    epochs = 1 if isinstance(model, Baseline) else options.epochs  # a closed form is there at once
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            check_val_every_n_epoch=min(5, epochs),
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(model, datamodule=make_data(**data_arguments))
        return perturbzoo.load(Path(folder) / "checkpoints" / "best.ckpt")


def timed(contender: str, make_data: Callable[..., PerturbSeqDataModule], options: argparse.Namespace) -> tuple[Any, float]:
    """:func:`fitted`, and how long it took in seconds."""
    started = time.monotonic()
    return fitted(contender, make_data, options), time.monotonic() - started


def scores(predicted: np.ndarray, observed: np.ndarray, space: LatentSpace, width: float) -> list[float]:
    """The table's columns for cells x genes."""
    x, y = (positions(cells, space) for cells in (predicted, observed))
    distances = [energy_distance(x, y), mmd(x, y, width), sinkhorn_divergence(x, y, 0.1 * width**2)]
    return [*distances, *r_squared_of_moments(predicted, observed)]


def positions(cells: np.ndarray, space: LatentSpace) -> np.ndarray:
    """Positions of cells x genes on the axes, in units of expression."""
    import torch

    return space.encode(torch.as_tensor(cells, dtype=torch.float32)).numpy() * float(space.scale)


def axes_of(data: PerturbSeqDataModule) -> LatentSpace:
    """The axes that all contenders are compared on: fitted to the training cells."""
    return LatentSpace(fit_latent(data.training_cells(), "pca", 50))


def table_of(
    contenders: dict[str, np.ndarray], observed: np.ndarray, control: np.ndarray, space: LatentSpace, halvings: int
) -> pd.DataFrame:
    """A row for each contender and one for the ceiling, a column for each score.

    Parameters
    ----------
    contenders
        Predicted cells, ``(cells, G)`` each.
    observed, control
        Shapes ``(cells, G)``: the cells that were to be predicted, and the control cells.
    """
    width = median_bandwidth(positions(observed, space), positions(control, space))
    random = np.random.default_rng(0)
    rows: dict[str, list[list[float]]] = {}
    for _ in range(halvings):
        order = random.permutation(len(observed))
        half = len(order) // 2
        first, second = observed[order[:half]], observed[order[half : 2 * half]]
        for name, predicted in contenders.items():
            drawn = random.choice(len(predicted), half, replace=len(predicted) < half)
            rows.setdefault(name, []).append(scores(predicted[drawn], second, space, width))
        rows.setdefault(CEILING, []).append(scores(first, second, space, width))
    return pd.DataFrame({name: np.mean(values, axis=0) for name, values in rows.items()}, index=COLUMNS).T


def show(table: pd.DataFrame, title: str) -> None:
    """Print a table under its title."""
    print(f"\n{title}")
    print(table.round(3).to_string(na_rep=""), flush=True)


def show_mean(tables: list[pd.DataFrame], title: str) -> None:
    """Print the mean of several tables."""
    show((sum(tables) / len(tables)).loc[tables[0].index], title)
