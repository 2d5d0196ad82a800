"""What the tests of the models that move cells share: samples of known distributions, quick fits, closed-form maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Trainer, seed_everything

from perturbzoo.data.batch import PerturbationBatch
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.models.base import PerturbationModel
from perturbzoo.models.latent import TransportModel

ALL = {"method": "no_test"}
SPACE = {"space": "genes", "start": "identity"}  # nothing but the transport itself


def gaussian(mean: Any, covariance: Any, n: int, seed: int) -> np.ndarray:
    """Cells ``(n, G)`` with exactly this mean and covariance: a sample, whitened, then coloured by the square root."""
    raw = np.random.default_rng(seed).normal(size=(n, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T, bias=True))).T
    return np.asarray(mean) + white @ root(covariance)


def root(covariance: Any) -> np.ndarray:
    """Symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, dtype=float))
    return (vectors * np.sqrt(values)) @ vectors.T


def gaussian_map(x: np.ndarray, mean: Any, covariance: Any, other_mean: Any, other_covariance: Any) -> np.ndarray:
    """The optimal map between Gaussians: ``m' + S^-1/2 (S^1/2 S' S^1/2)^1/2 S^-1/2 (x - m)``."""
    half = root(covariance)
    inverse = np.linalg.inv(half)
    matrix = inverse @ root(half @ np.asarray(other_covariance) @ half) @ inverse
    return np.asarray(other_mean) + (x - np.asarray(mean)) @ matrix


def screen(cells: Mapping[str, np.ndarray]) -> Any:
    """An AnnData of log1p values: label of the condition, or ``control``, to cells ``(n, G)``."""
    from anndata import AnnData

    labels = [label for label, values in cells.items() for _ in values]
    obs = pd.DataFrame({"perturbation": labels}, index=[f"cell{number}" for number in range(len(labels))])
    values = np.concatenate(list(cells.values())).astype(np.float32)
    assert (values >= 0).all()
    return AnnData(values, obs=obs, var=pd.DataFrame(index=[f"g{number}" for number in range(values.shape[1])]))


def module(adata: Any, split: dict[str, Any] | None = None, **arguments: Any) -> PerturbSeqDataModule:
    arguments = {"min_cells": 1, "seed": 0, "sampling": "grouped", "cells_per_condition": 256, **arguments}
    return PerturbSeqDataModule.from_anndata(adata, split=split or ALL, **arguments)


def fit(model: Any, data: PerturbSeqDataModule, epochs: int, folder: Path | None = None, seed: int = 0) -> Any:
    """Train; 0 epochs prepare and build the model, no more."""
    seed_everything(seed, verbose=False)
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


def moved(model: PerturbationModel, condition: str, cells: np.ndarray) -> np.ndarray:
    """The model's prediction for these control cells ``(n, G)``."""
    predicted = model.predict(screen({"control": cells}), [condition])
    return np.asarray(predicted.X)


def relative_error(predicted: np.ndarray, expected: np.ndarray, start: np.ndarray) -> float:
    """Root mean squared error of the map over its root mean squared movement."""
    return float(np.sqrt(((predicted - expected) ** 2).mean() / ((expected - start) ** 2).mean()))


def first_batch(data: PerturbSeqDataModule) -> PerturbationBatch:
    return next(iter(data.train_dataloader())).clone()


def scrambled(model: TransportModel, scale: float = 0.5, seed: int = 1) -> TransportModel:
    """Give every parameter a random value, those that start at 0 too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model
