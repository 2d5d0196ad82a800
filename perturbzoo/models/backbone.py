"""The model that another one is wrapped around: read from a checkpoint or trained on the same data, and asked for its changes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perturbzoo.checkpoint import load
from perturbzoo.data.batch import PerturbationBatch
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooError
from perturbzoo.models import find_model
from perturbzoo.models.base import ConditionDeltaModel, PerturbationModel


def read_or_train(
    wanted: dict[str, Any] | str, spec: DataSpec, data: PerturbSeqDataModule, *, epochs: int, device: torch.device
) -> PerturbationModel:
    """Read a checkpoint, or train a model on the data, in a trainer of its own; the best epoch by the validation conditions.

    Parameters
    ----------
    wanted
        ``{class_path: GEARS, init_args: {...}}``, or the path of a checkpoint.
    spec
        Of the data; a checkpoint's must be the same.
    epochs, device
        Of the training.

    Raises
    ------
    PerturbZooError
        There is no such model or checkpoint, or it was trained on other data.
    """
    if isinstance(wanted, str):
        trained = load(wanted)
        if trained.get_spec().to_json() != spec.to_json():
            raise PerturbZooError(f"the backbone {wanted} was trained on other data, or another split of them")
        return trained
    from lightning.pytorch import Trainer

    model = new_model(wanted)
    outer = data.trainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu" if device.type == "cpu" else "auto",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(model, datamodule=data)
        trained = load(Path(folder) / "checkpoints" / "best.ckpt")
    data.trainer = outer
    print(f"backbone: {type(model).__name__} trained for {epochs} epochs")
    return trained


def new_model(wanted: dict[str, Any]) -> PerturbationModel:
    """A model of the zoo from ``{class_path: GEARS, init_args: {...}}``, its class by its name with or without the module."""
    if not isinstance(wanted.get("class_path"), str):
        raise PerturbZooError("a backbone is {class_path: GEARS, init_args: {...}} or the path of a checkpoint")
    model: PerturbationModel = find_model(wanted["class_path"].rpartition(".")[2])(**(wanted.get("init_args") or {}))
    return model


def mean_delta(model: PerturbationModel, table: Any, context_control: Tensor) -> Tensor:
    """Predicted change of each pair's mean control cell, ``(C, G)``; for a model of whole cells, of that one cell."""
    if isinstance(model, ConditionDeltaModel):
        return model.delta(table, context_control)[0]
    spec, rows = model.get_spec(), torch.arange(len(table), device=context_control.device)
    size = context_control.new_full((len(table),), spec.depth)
    covariates = torch.zeros(len(table), len(spec.covariates), dtype=torch.int64)
    batch = PerturbationBatch(
        None, context_control, rows, table, context_control, size, size, covariates, rows, rows, spec.depth
    )
    return model.evaluate(batch).mean - context_control
