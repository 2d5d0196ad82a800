"""Lightning callbacks: the checkpoints every fit leaves, random generators for exact resume, what goes to Weights & Biases."""

from __future__ import annotations

import math
import os
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from perturbzoo.errors import PerturbZooError
from perturbzoo.models.base import SELECTION_METRIC, PerturbationModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANDOM_STATE = "random_state"
"""Key of a checkpoint's random generators: one entry per process."""


class BestAndLast(Checkpoint):
    """Leave ``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt`` below the trainer's ``default_root_dir``.

    Both are written at the end of an epoch, so that a resumed run starts with a whole one, and under another name first,
    so that a run killed while writing leaves the previous ones. Best is by the monitored metric; until that has been
    logged (nothing is held out, or the first validation is yet to come) it is the latest.

    Lightning's ``ModelCheckpoint`` writes its last checkpoint only when it has written a best one, and none for a model
    that makes no optimiser step.

    Parameters
    ----------
    monitor
        Name of the logged metric.
    mode
        ``max`` or ``min``.
    """

    def __init__(self, monitor: str = SELECTION_METRIC, mode: str = "max") -> None:
        super().__init__()
        self.monitor = monitor
        self.sign = 1.0 if mode == "max" else -1.0
        self.folder = Path()
        self.best_score: float | None = None

    @property
    def last_model_path(self) -> str:
        """Path of the latest checkpoint."""
        return str(self.folder / "last.ckpt")

    @property
    def best_model_path(self) -> str:
        """Path of the best checkpoint; Lightning reads it for ``ckpt_path="best"``."""
        return str(self.folder / "best.ckpt")

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "best_score": self.best_score}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # in a new folder there is no best checkpoint to compare with
        if state_dict["folder"] == str(self.folder):
            self.best_score = state_dict["best_score"]

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        is_best = self._improves(trainer)
        last, best = Path(self.last_model_path), Path(self.best_model_path)
        part = last.with_suffix(".part")
        try:
            trainer.save_checkpoint(part, weights_only=False)
            if not trainer.is_global_zero:
                return
            if is_best:
                copy = best.with_suffix(".part")
                shutil.copyfile(part, copy)
                os.replace(copy, best)
            os.replace(part, last)
        except OSError as error:
            for file in (part, best.with_suffix(".part")):
                file.unlink(missing_ok=True)
            raise PerturbZooError(f"{last}: the checkpoint cannot be written: {error.strerror or error}") from error

    def _improves(self, trainer: Trainer) -> bool:
        """Whether this epoch is the best so far; its score is remembered then."""
        value = trainer.callback_metrics.get(self.monitor)
        score = math.nan if value is None else float(value)
        if math.isnan(score):
            return self.best_score is None
        if self.best_score is not None and self.sign * score <= self.sign * self.best_score:
            return False
        self.best_score = score
        return True


class RandomState(Callback):
    """Save the Python, NumPy and torch generators of every process in the checkpoints, and put them back on resuming.

    With them a resumed run draws the dropout masks that the uninterrupted run would have drawn.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        own = _read_generators(pl_module.device)
        states = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # every process saves, one of them writes
            states = [own] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, own)
        checkpoint[RANDOM_STATE] = states

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(RANDOM_STATE, [])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore after building and the sanity check, which draw numbers of their own."""
        # on another number of processes the run could not be the same anyway
        if len(self._restored) == trainer.world_size:
            _write_generators(self._restored[trainer.global_rank], pl_module.device)
        self._restored = []


def _read_generators(device: torch.device) -> dict[str, Any]:
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one is meant
    state: dict[str, Any] = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _write_generators(state: dict[str, Any], device: torch.device) -> None:
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    keys = numpy["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


class WandbRecord(Callback):
    """Put what Lightning's logger leaves out into the Weights & Biases run: the test tables, figures, the best checkpoint.

    Parameters
    ----------
    n_scatters
        Number of test conditions whose predicted and observed changes are drawn.
    """

    def __init__(self, n_scatters: int = 4) -> None:
        self.n_scatters = n_scatters

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        import matplotlib.pyplot as plt
        import wandb

        from perturbzoo.plotting import plot_score_bars

        assert isinstance(pl_module, PerturbationModel)
        table = pl_module.test_table
        if not trainer.is_global_zero or table is None:
            return
        scores, deltas = plot_score_bars(table), self._plot_deltas(pl_module)
        record = {
            "test/table": wandb.Table(dataframe=table),
            "test/scores": wandb.Image(scores.figure),
            "test/deltas": [wandb.Image(axes.figure, caption=label) for label, axes in deltas.items()],
        }
        for logger in _wandb_loggers(trainer):
            logger.experiment.log(record)
        for axes in (scores, *deltas.values()):
            plt.close(cast("Figure", axes.figure))

    def _plot_deltas(self, model: PerturbationModel) -> dict[str, Axes]:
        from perturbzoo.plotting import plot_delta_scatter

        bulks = model.test_bulks
        assert bulks is not None
        # from all over the list, which is sorted by condition
        rows = np.unique(np.linspace(0, len(bulks) - 1, min(self.n_scatters, len(bulks))).astype(int))
        drawn = {}
        for row, described in zip(rows, model.data.describe_pairs(bulks.pair[rows]), strict=True):
            label = " | ".join(filter(None, (described["condition"], described["context"])))
            drawn[label] = plot_delta_scatter(
                bulks.observed[row] - bulks.control[row],
                bulks.predicted[row] - bulks.control[row],
                model.get_spec().genes,
                condition=label,
                targets=model.data.conditions[bulks.pair[row]].targets,
            )
        return drawn

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        import wandb

        written = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestAndLast)]
        for logger in _wandb_loggers(trainer) if trainer.is_global_zero else []:
            run = logger.experiment
            for checkpoint in written:
                if not Path(checkpoint.best_model_path).is_file():
                    continue
                metadata = {"class": type(pl_module).__name__, checkpoint.monitor: checkpoint.best_score}
                artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=metadata)
                artifact.add_file(checkpoint.best_model_path, name="best.ckpt")
                run.log_artifact(artifact, aliases=["best"])


def _wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


class ShortBar(RichProgressBar):
    """Lightning's bar with the loss and the selection metric alone: more would break the line of a narrow terminal."""

    def __init__(self) -> None:
        super().__init__(leave=False)

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        values = super().get_metrics(trainer, pl_module)
        names = {"train/loss_step": "loss", SELECTION_METRIC: SELECTION_METRIC}
        return {short: values[name] for name, short in names.items() if name in values}


class EpochLines(ProgressBar):
    """One short line per epoch, for output that goes to a file: what a progress bar leaves there is debris."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._started = 0.0

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled:
            count = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
            print(f"{type(pl_module).__name__}: {count:,} trainable parameters", flush=True)

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self._started = time.monotonic()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = {"loss": values.get("train/loss"), SELECTION_METRIC: values.get(SELECTION_METRIC)}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
        seconds = time.monotonic() - self._started
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {text}  {seconds:.1f} s", flush=True)


def default_callbacks(trainer: Trainer) -> list[Callback]:
    """What a model adds to a trainer that has not got it already.

    `RandomState` always, `BestAndLast` unless checkpoints are switched off (Lightning's own default, which would write a
    second copy elsewhere, makes way for it), `WandbRecord` where there is a Weights & Biases logger.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    wanted: list[Callback] = [RandomState()]
    if trainer.checkpoint_callbacks:
        wanted.append(BestAndLast())
    if _wandb_loggers(trainer):
        wanted.append(WandbRecord())
    for callback in [callback for callback in callbacks if _is_lightnings_own(callback)]:
        callbacks.remove(callback)
    present = {type(callback) for callback in callbacks}
    return [callback for callback in wanted if type(callback) not in present]


def _is_lightnings_own(callback: Callback) -> bool:
    """Whether this is the checkpoint callback that Lightning adds, and not one that a user has configured."""
    if type(callback) is not ModelCheckpoint:
        return False
    default = ModelCheckpoint()
    names = ("dirpath", "filename", "save_top_k", "save_last", "save_weights_only", "state_key")
    return all(getattr(callback, name) == getattr(default, name) for name in names)
