"""Predict the stimulated cells of a cell type never seen stimulated: how near are whole distributions, on Kang et al. 2018?

    PERTURBZOO_DATA=FOLDER python scripts/kang_transfer.py [--models CellOT FlowMatching] [--held_out CD4T B ...]

Blood cells with and without interferon beta. For each held-out cell type, models train on the other types' cells; another type
is held out for validation, which chooses the checkpoint. The held-out type's control cells then go through the model, and what
comes out is compared with its stimulated cells, which nothing has seen: unbiased energy distance (E), squared maximum mean
discrepancy (MMD2; the width is the median distance between observed and control cells) and Sinkhorn divergence in the first 50
principal axes of the training cells; R2 of the genes' means and variances. Beside the models: the control cells themselves
(identity), and these plus the mean change of the training types (mean shift).

The ceiling is one half of the stimulated cells compared with the other. Every row is therefore compared with a half, in
samples of a half's size, and the mean over random halvings is shown. Models take the arguments of their file in configs/model.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import logging
import os

# the matrices are small: threads would wait for each other. Scanpy's choice of genes, by numba, sets the first back
for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import yaml

import perturbzoo
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.reading import expand_path
from perturbzoo.evaluation.distribution import (
    energy_distance,
    median_bandwidth,
    mmd,
    r_squared_of_moments,
    sinkhorn_divergence,
)
from perturbzoo.models import find_model
from perturbzoo.models.latent import LatentSpace, fit_latent

CONFIGS = Path(__file__).parent.parent / "configs" / "model"
COLUMNS = ("E", "MMD2", "Sinkhorn", "R2 mean", "R2 variance")


def configured(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the model and of its data in the first file of configs/model that names the class."""
    find_model(name)
    for file in sorted(CONFIGS.glob("*.yaml")):
        config = yaml.safe_load(file.read_text())
        if config["model"]["class_path"].rsplit(".", 1)[-1] == name:
            return config["model"].get("init_args", {}), config.get("data", {}).get("init_args", {})
    return {}, {}


def data_module(adata: Any, held_out: str, validation: str, n_genes: int, **arguments: Any) -> PerturbSeqDataModule:
    return PerturbSeqDataModule.from_anndata(
        adata,
        condition_key="perturbation",
        kind="cytokine",
        covariates=["cell_type"],
        n_top_genes=n_genes,
        split={"method": "unseen_context", "held_out": held_out, "val_held_out": validation},
        seed=0,
        **arguments,
    )


def fitted(name: str, adata: Any, held_out: str, validation: str, options: argparse.Namespace) -> Any:
    """The model at its best validation score."""
    arguments, data_arguments = configured(name)
    lightning.seed_everything(options.seed, verbose=False)
    data = data_module(adata, held_out, validation, options.genes, **data_arguments)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            check_val_every_n_epoch=min(5, options.epochs),
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(find_model(name)(**arguments), datamodule=data)
        return perturbzoo.load(Path(folder) / "checkpoints" / "best.ckpt")


def scores(predicted: np.ndarray, observed: np.ndarray, space: LatentSpace, width: float) -> list[float]:
    """The table's columns for cells x genes."""
    import torch

    x, y = (
        space.encode(torch.as_tensor(cells, dtype=torch.float32)).numpy() * float(space.scale)
        for cells in (predicted, observed)
    )
    distances = [energy_distance(x, y), mmd(x, y, width), sinkhorn_divergence(x, y, 0.1 * width**2)]
    return [*distances, *r_squared_of_moments(predicted, observed)]


def compare(adata: Any, held_out: str, options: argparse.Namespace) -> pd.DataFrame:
    """A row for each contender, a column for each score."""
    import torch

    validation = options.validation if options.validation != held_out else options.second_validation
    data = data_module(adata, held_out, validation, options.genes)
    data.setup()
    assert data.spec is not None
    space = LatentSpace(fit_latent(data.training_cells(), "pca", 50))
    test = int(data.pairs_of("test")[0])
    cells = data._screen.values
    observed = cells[data.index.cells_by_pair[test]].toarray()
    control_rows = data.index.controls_by_context[data.index.context_of_pair[test]]
    control = cells[control_rows].toarray()
    contenders = {"identity": control, "mean shift": control + data.training_pseudobulks().delta.mean(axis=0)}
    is_control = (adata.obs["cell_type"] == held_out) & (adata.obs["perturbation"] == "control")
    seconds = {}
    for name in options.models:
        started = time.monotonic()
        model = fitted(name, adata, held_out, validation, options)
        seconds[name] = time.monotonic() - started
        contenders[name] = np.asarray(model.predict(adata[is_control.to_numpy()], ["IFN-beta"]).X)
    encoded = [space.encode(torch.as_tensor(part)).numpy() * float(space.scale) for part in (observed, control)]
    width = median_bandwidth(*encoded)
    random = np.random.default_rng(0)
    rows: dict[str, list[list[float]]] = {}
    for _ in range(options.halvings):
        order = random.permutation(len(observed))
        half = len(order) // 2
        first, second = observed[order[:half]], observed[order[half : 2 * half]]
        for name, predicted in contenders.items():
            drawn = random.choice(len(predicted), half, replace=len(predicted) < half)
            rows.setdefault(name, []).append(scores(predicted[drawn], second, space, width))
        rows.setdefault("split-half ceiling", []).append(scores(first, second, space, width))
    table = pd.DataFrame({name: np.mean(values, axis=0) for name, values in rows.items()}, index=COLUMNS).T
    table["fit s"] = pd.Series(seconds)
    print(f"\n{held_out}: {len(control)} controls, {len(observed)} stimulated; {validation} validates")
    print(table.round(3).to_string(na_rep=""), flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["CellOT", "FlowMatching"])
    parser.add_argument("--held_out", nargs="+", default=["CD4T", "FCGR3A+Mono"])
    parser.add_argument("--validation", default="CD8T", help="cell type that chooses the checkpoint")
    parser.add_argument("--second_validation", default="NK", help="the one that does where the first is held out")
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--halvings", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "PERTURBZOO_DATA" not in os.environ:
        sys.exit("kang_transfer: the environment variable PERTURBZOO_DATA must name the folder of the data")
    import anndata

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    adata = anndata.read_h5ad(expand_path("$PERTURBZOO_DATA/kang2018_pbmc_ifnb.h5ad"))
    tables = [compare(adata, held_out, options) for held_out in options.held_out]
    if len(tables) > 1:
        print(f"\nmean over {len(tables)} held-out cell types")
        print((sum(tables) / len(tables)).round(3).loc[tables[0].index].to_string(na_rep=""))


if __name__ == "__main__":
    main()
