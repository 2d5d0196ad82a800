"""What the tests of prediction share: a screen with models trained on it, and how they are asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Trainer

from perturbzoo import PerturbSeqDataModule
from perturbzoo.data.batch import PerturbationBatch
from perturbzoo.models.base import PerturbationModel, Prediction

CONDITIONS = ("G0", "G1", "G2", "G3", "X", "G0+G1", "G1+G2")
SPLIT = {"method": "explicit", "test": "G3,G1+G2"}
CONTEXTS = ("a", "b")
N_CONTROLS = 30


@dataclass
class Trained:
    """A screen in two contexts, as a file and in memory, and models trained on it."""

    folder: Path
    adata: anndata.AnnData
    screen: Path
    gears: Path
    additive: Path

    def controls(self, context: str | None = None) -> anndata.AnnData:
        chosen = self.adata.obs["perturbation"] == "control"
        if context is not None:
            chosen &= self.adata.obs["context"] == context
        return self.adata[chosen.to_numpy()].copy()


def data_module(screen: Path, **arguments: Any) -> PerturbSeqDataModule:
    return PerturbSeqDataModule(str(screen), covariates=["context"], split=SPLIT, cells_per_condition=8, **arguments)


def trainer(folder: Path) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def command(trained: Trained, to: Path | str, *options: str, **given: Any) -> list[str]:
    """A command line; `given` replaces what it says by default."""
    settings = {"ckpt_path": trained.gears, "controls": trained.screen, "conditions": "G0+G2,G3", "output": to} | given
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return ["predict", *arguments, *options]


def expression(adata: anndata.AnnData, depth: float) -> pd.DataFrame:
    """log1p-normalised expression, from the formula."""
    counts = np.asarray(adata.X.todense())
    return pd.DataFrame(np.log1p(counts / counts.sum(axis=1, keepdims=True) * depth), adata.obs_names, adata.var_names)


class Doubling(PerturbationModel):
    """Doubles every cell: what it predicts depends on the cell, and so does its error."""

    def build(self) -> None:
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, batch: PerturbationBatch) -> Prediction:
        assert len(batch.table) <= 4
        return Prediction(self.factor * batch.control, batch.control.square())
