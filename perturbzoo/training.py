"""``perturbzoo fit | validate | test``: Lightning's command line over the zoo."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from perturbzoo.callbacks import BestAndLast, EpochLines, ShortBar
from perturbzoo.checkpoint import check_header, read_checkpoint
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.reading import expand_path
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooError
from perturbzoo.models import MODELS, find_model
from perturbzoo.models.base import SELECTION_METRIC, PerturbationModel

SUBCOMMANDS = ("fit", "validate", "test")

# what Lightning says and a user of the command line can do nothing with
NOISE = (
    "LightningCLI's args parameter is intended",
    "The number of training batches .* is smaller than the logging interval",
    ".*isinstance\\(treespec, LeafSpec\\)",
    ".*does not have many workers",
)
CHATTER = ("💡 Tip", "TPU available")


class SaveConfig(SaveConfigCallback):
    """Write the whole configuration beside each logger's own files, so that no run overwrites another's."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = self.parser.dump(self.config, skip_none=False, format="yaml")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(yaml.safe_load(config), allow_val_change=True)
                # wandb writes a config.yaml of its own there
                file = Path(logger.experiment.dir) / "perturbzoo.yaml"
            elif logger.log_dir is not None:
                file = Path(logger.log_dir) / self.config_filename
            else:
                root = logger.save_dir or trainer.default_root_dir
                file = Path(root) / str(logger.name) / str(logger.version) / self.config_filename
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(config)


class ZooCLI(LightningCLI):
    """LightningCLI that also starts from a checkpoint alone, and says in one line what is wrong."""

    header: dict[str, Any] | None = None
    """What the checkpoint of ``--ckpt_path`` says of its model and data."""

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

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            _check_yaml(args)
            raise PerturbZooError(_in_one_line(str(error))) from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: the checkpoint was read before parsing, and only classes of the zoo are taken from it."""

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        if config.ckpt_path is not None:
            # a path in a configuration file comes here unread
            config.ckpt_path = str(expand_path(config.ckpt_path))
            self.header = check_header(read_checkpoint(config.ckpt_path))
            config.weights_only = True
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        for logger in loggers:
            if str(getattr(logger, "class_path", "")).endswith(".WandbLogger") and logger.init_args.save_dir == ".":
                logger.init_args.save_dir = config.trainer.default_root_dir or "."

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except PerturbZooError:
            raise
        except ValueError as error:
            # jsonargparse tries the alternatives of a type, and reports what each of them said
            if "Errors:" not in str(error):
                raise
            raise PerturbZooError(_in_one_line(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer", default={})
        if config.get("logger") in (None, True):
            kwargs.setdefault("logger", CSVLogger(config.get("default_root_dir") or os.getcwd(), name="logs"))
        given = config.get("callbacks") or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(ShortBar() if sys.stdout.isatty() else EpochLines())
        if config.get("enable_model_summary") is None and not sys.stdout.isatty():
            kwargs["enable_model_summary"] = False
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except ValueError as error:
            raise PerturbZooError(f"trainer: {' '.join(str(error).split())}") from error

    def before_fit(self) -> None:
        path = self.config.fit.init_from
        if path is not None:
            self.model.initialise_from(path)

    def after_fit(self) -> None:
        for callback in self.trainer.checkpoint_callbacks if self.trainer.is_global_zero else []:
            if isinstance(callback, BestAndLast) and Path(callback.best_model_path).is_file():
                score = "" if callback.best_score is None else f" ({callback.monitor} {callback.best_score:.4g})"
                print(f"checkpoints: {callback.best_model_path}{score}, {callback.last_model_path}")

    def before_validate(self) -> None:
        self._read_as_trained()

    def before_test(self) -> None:
        self._read_as_trained()

    def _read_as_trained(self) -> None:
        """Let the data module read whatever file it got the way the model's own was read."""
        if self.header is not None:
            self.datamodule.use_spec(DataSpec.from_json(self.header["spec"]))
            # Lightning reads the checkpoint after setup, which would make graphs and embeddings anew, from files that may be gone
            if self.header["class"] == type(self.model).__name__:
                self.model.spec, self.model.prepared = DataSpec.from_json(self.header["spec"]), self.header["prepared"]


def _check_yaml(arguments: ArgsType) -> None:
    """Say which of the configuration files is no YAML: the parser says only that one of them is not."""
    given = arguments if isinstance(arguments, list) else []
    for option, file in itertools.pairwise(given):
        if option in ("--config", "-c") and Path(file).is_file():
            try:
                yaml.safe_load(Path(file).read_text())
            except yaml.YAMLError as error:
                raise PerturbZooError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error


def _in_one_line(message: str) -> str:
    """The gist of a message of jsonargparse: the key, and what was wrong, without the types and values around it."""
    key, what = "", message
    if message.startswith('Parser key "'):
        key, _, what = message.removeprefix('Parser key "').partition('":')
    if "Errors:" in what:
        what = what.partition("Errors:")[2].partition("Given value")[0]
        reasons = [" ".join(reason.split()) for reason in re.split(r"\n\s+- ", what)]
        what = "; ".join(reason for reason in reasons if reason and reason != "Expected a <class 'NoneType'>")
    what = " ".join(what.split())
    unknown = what.removeprefix("Expected a dot import path string: ")
    if key == "model" and unknown != what:
        find_model(unknown)
    return f"{key}: {what}" if key else what


def _check_classes(value: Any, path: str) -> None:
    """Refuse a checkpoint whose arguments name a class outside the zoo: the parser would import and call it."""
    if isinstance(value, dict):
        named = value.get("class_path")
        if named is not None and named not in {*MODELS, *(f"{module}.{name}" for name, module in MODELS.items())}:
            raise PerturbZooError(f"{path}: refused: its arguments name the class '{named}', which is not in the zoo")
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _check_classes(part, path)


@contextmanager
def _checkpoint_config(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Put the model and data sections of ``--ckpt_path`` before the user's own, as a configuration file."""
    path = None
    for position, argument in enumerate(arguments):
        if argument == "--ckpt_path" and position + 1 < len(arguments):
            path = arguments[position + 1]
        elif argument.startswith("--ckpt_path="):
            path = argument.split("=", 1)[1]
    if path is None or path == "null":
        yield list(arguments)
        return
    header = check_header(read_checkpoint(path))
    find_model(header["class"])
    _check_classes([header["arguments"], header["data"]], path)
    config = {
        "model": {"class_path": f"{MODELS[header['class']]}.{header['class']}", "init_args": header["arguments"]},
        "data": {"class_path": "perturbzoo.data.datamodule.PerturbSeqDataModule", "init_args": header["data"]},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.yaml"
        file.write_text(yaml.safe_dump(config))
        yield [arguments[0], "--config", str(file), *arguments[1:]]


def _dotted(value: Any) -> Any:
    """Write the classes of nested models in full: the parser knows short names at the top only."""
    if isinstance(value, dict):
        value = {name: _dotted(part) for name, part in value.items()}
        if (name := value.get("class_path")) in MODELS:
            value["class_path"] = f"{MODELS[name]}.{name}"
    return [_dotted(part) for part in value] if isinstance(value, list) else value


@contextmanager
def _full_class_names(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Put the full names of classes into configuration files that name a backbone, and into ``--model.init_args.backbone``."""
    given = list(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for position, (option, value) in enumerate(itertools.pairwise(arguments), start=1):
            if option == "--model.init_args.backbone" and value.startswith("{"):
                given[position] = json.dumps(_dotted(yaml.safe_load(value)))
            elif option in ("--config", "-c") and Path(value).is_file() and "backbone" in (text := Path(value).read_text()):
                try:
                    config = _dotted(yaml.safe_load(text))
                except yaml.YAMLError:
                    continue  # said in one line later
                given[position] = str(Path(folder) / f"{position}_{Path(value).name}")
                Path(given[position]).write_text(yaml.safe_dump(config))
        yield given


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what is not addressed to the user."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(CHATTER)

    loggers = [logging.getLogger(f"lightning.{part}.utilities.rank_zero") for part in ("pytorch", "fabric")]
    with warnings.catch_warnings():
        for pattern in NOISE:
            warnings.filterwarnings("ignore", message=pattern)
        for logger in loggers:
            logger.addFilter(is_wanted)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(is_wanted)


def main(arguments: Sequence[str]) -> None:
    """Run ``fit``, ``validate`` or ``test``.

    Parameters
    ----------
    arguments
        The subcommand and its options.

    Raises
    ------
    PerturbZooError
        The options, the configuration, the data or the checkpoint are not as they must be.
    """
    # '--config=FILE' as '--config FILE', which is what the files are looked for by
    arguments = [part for given in arguments for part in (given.split("=", 1) if given.startswith("--config=") else [given])]
    command = arguments[0]
    if command in ("validate", "test") and not any(
        a.startswith(("--ckpt_path", "--help", "-h", "--print_config")) for a in arguments
    ):
        raise PerturbZooError(f"perturbzoo {command} needs a trained model: --ckpt_path checkpoints/best.ckpt")
    for name in MODELS:
        find_model(name)  # short class names work for imported classes
    torch.set_float32_matmul_precision("high")
    with _checkpoint_config(arguments) as read, _full_class_names(read) as given, _quiet():
        try:
            ZooCLI(
                PerturbationModel,
                PerturbSeqDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},
                seed_everything_default=0,
                trainer_defaults={
                    "max_epochs": 50,
                    # the samplers shard by rank themselves
                    "use_distributed_sampler": False,
                    "log_every_n_steps": 10,
                    "num_sanity_val_steps": 0,
                },
                parser_kwargs={"prog": "perturbzoo", "exit_on_error": False},
                args=given,
            )
        except MisconfigurationException as error:
            raise PerturbZooError(" ".join(str(error).split())) from error
        except RuntimeError as error:
            if "Error(s) in loading state_dict" not in str(error):
                raise
            raise PerturbZooError(
                "the weights of the checkpoint do not fit the model: give it the options it was trained with, or none"
            ) from error
