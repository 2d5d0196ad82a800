"""``perturbzoo fit | validate | test``: Lightning's command line over the zoo."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from perturbzoo.checkpoint import check_header, read_checkpoint
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.models import MODELS, find_model
from perturbzoo.models.base import SELECTION_METRIC, PerturbationModel


class SaveConfig(SaveConfigCallback):
    """Write the whole configuration beside each logger's own files, so that no run overwrites another's."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = self.parser.dump(self.config, skip_none=False, format="yaml")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(yaml.safe_load(config), allow_val_change=True)
                folder = Path(logger.experiment.dir)
            else:
                folder = Path(logger.log_dir or trainer.default_root_dir)  # type: ignore[attr-defined]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / self.config_filename).write_text(config)


class ZooCLI(LightningCLI):
    """LightningCLI that also starts from a checkpoint alone."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of Lightning but ``predict``, which needs no trainer and has its own command."""
        skipped = {"model", "datamodule"}
        return {
            "fit": {*skipped, "train_dataloaders", "val_dataloaders"},
            "validate": {*skipped, "dataloaders"},
            "test": {*skipped, "dataloaders"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.set_defaults(
            {
                "early_stopping.monitor": SELECTION_METRIC,
                "early_stopping.mode": "max",
                "early_stopping.patience": 10,
                # nothing may be held out for validation
                "early_stopping.strict": False,
            }
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="Checkpoint of the same model class, of this or another screen, whose weights training starts from.",
        )

    def _parse_ckpt_path(self) -> None:
        """Nothing: the checkpoint was read before parsing, and only classes of the zoo are taken from it."""

    def before_fit(self) -> None:
        path = self.config.fit.init_from
        if path is not None:
            self.model.initialise_from(path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer", default={})
        if config.get("logger") in (None, True):
            kwargs.setdefault("logger", CSVLogger(config.get("default_root_dir") or os.getcwd(), name="logs"))
        return super().instantiate_trainer(**kwargs)


@contextmanager
def _checkpoint_config(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Put the model and data sections of ``--ckpt_path`` before the user's own, as a configuration file."""
    path = None
    for position, argument in enumerate(arguments):
        if argument == "--ckpt_path" and position + 1 < len(arguments):
            path = arguments[position + 1]
        elif argument.startswith("--ckpt_path="):
            path = argument.split("=", 1)[1]
    if path is None or path in ("best", "last", "null"):
        yield list(arguments)
        return
    header = check_header(read_checkpoint(path))
    find_model(header["class"])
    config = {
        "model": {"class_path": f"{MODELS[header['class']]}.{header['class']}", "init_args": header["arguments"]},
        "data": {"class_path": "perturbzoo.data.datamodule.PerturbSeqDataModule", "init_args": header["data"]},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.yaml"
        file.write_text(yaml.safe_dump(config))
        yield [arguments[0], "--config", str(file), *arguments[1:]]


def main(arguments: Sequence[str]) -> None:
    """Run ``fit``, ``validate`` or ``test``.

    Parameters
    ----------
    arguments
        The subcommand and its options.
    """
    command = arguments[0]
    if command in ("validate", "test") and not any(
        a.startswith(("--ckpt_path", "--help", "-h", "--print_config")) for a in arguments
    ):
        raise PerturbZooError(f"perturbzoo {command} needs a trained model: --ckpt_path checkpoints/best.ckpt")
    for name in MODELS:
        find_model(name)  # short class names work for imported classes
    # Lightning looks at sys.argv when it starts more processes; they must run the same command
    sys.argv = ["perturbzoo", *arguments]
    torch.set_float32_matmul_precision("high")
    with _checkpoint_config(arguments) as given:
        ZooCLI(
            PerturbationModel,
            PerturbSeqDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults={
                "callbacks": [RichProgressBar(leave=False)],
                "max_epochs": 50,
                # the samplers shard by rank themselves
                "use_distributed_sampler": False,
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
            },
            parser_kwargs={"prog": "perturbzoo"},
            args=given,
        )
