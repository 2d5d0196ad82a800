"""What the tests of GEARS share: small screens, quick fits, models with random parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from perturbzoo.data.batch import ConditionTable, PerturbationBatch, encode_conditions
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.models.gears import GEARS
from perturbzoo.perturbation import parse_condition

SPLIT = {"method": "explicit", "test": ["G0+G1", "G4"]}  # G0 to G3, G1+G2 and G3+G4 train: G4 in a combination
UNSEEN = {"method": "explicit", "test": ["G3", "G4", "G3+G4"]}
ANY_EDGE = {"top_k": 3, "threshold": 0.0}


def module(adata: Any, split: dict[str, Any] | None = None, **arguments: Any) -> PerturbSeqDataModule:
    arguments = {"cells_per_condition": 4, "min_cells": 1, "seed": 0, **arguments}
    return PerturbSeqDataModule.from_anndata(adata, split=split or SPLIT, **arguments)


def fit(model: GEARS, data: PerturbSeqDataModule, epochs: int, folder: Path | None = None) -> GEARS:
    """Train; 0 epochs prepare and build the model, no more."""
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model.train(), data)
    return model.eval()


def scrambled(model: GEARS, scale: float = 0.7, seed: int = 1) -> GEARS:
    """Give every parameter a random value, those that start at 0 too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def first_batch(data: PerturbSeqDataModule) -> PerturbationBatch:
    return next(iter(data.train_dataloader())).clone()


def table_of(model: GEARS, conditions: Sequence[str], contexts: Sequence[int] | None = None) -> ConditionTable:
    context = [0] * len(conditions) if contexts is None else list(contexts)
    parsed = [parse_condition(text) for text in conditions]
    return encode_conditions(parsed, context, model.target_names, model.get_spec().default_kind)


def ask(
    model: GEARS, conditions: Sequence[str], contexts: Sequence[int] | None = None, control: Tensor | None = None
) -> Tensor:
    """The model's deltas for conditions, ``(C, G)``."""
    table = table_of(model, conditions, contexts)
    profile = torch.as_tensor(model.get_spec().control_mean)[table.context] if control is None else control
    with torch.no_grad():
        return model.delta(table, profile)[0]


def noise_free(n_genes: int = 20) -> Any:
    """Eight conditions whose cells are all alike, log1p-normalised: the error of the means can reach 0."""
    from anndata import AnnData

    generator = np.random.default_rng(0)
    conditions = ["A", "B", "C", "D", "E", "A+B", "C+D", "A+E"]
    control = generator.uniform(0.8, 2.0, n_genes)
    # combinations have effects of their own: the sum of the singles does not solve it
    profile = {"control": control, **{name: control + generator.normal(0, 0.3, n_genes) for name in conditions}}
    labels = [label for label in profile for _ in range(4)]
    obs = pd.DataFrame({"perturbation": labels}, index=[f"cell{number}" for number in range(len(labels))])
    values = np.array([profile[label] for label in labels], dtype=np.float32).clip(min=0)
    return AnnData(values, obs=obs, var=pd.DataFrame(index=[f"g{number}" for number in range(n_genes)]))


def edges(folder: Path, *rows: tuple[str, str]) -> list[dict[str, Any]]:
    file = folder / "edges.csv"
    pd.DataFrame(rows, columns=["source", "target"]).to_csv(file, index=False)
    return [{"kind": "edges", "path": str(file)}]
