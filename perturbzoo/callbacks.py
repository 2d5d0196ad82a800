"""Lightning callbacks: the two checkpoints every fit leaves, and random generators for exact resume."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from typing_extensions import override

from perturbzoo.models.base import SELECTION_METRIC


class BestAndLast(ModelCheckpoint):
    """Leave ``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt`` below the trainer's ``default_root_dir``.

    Best is by the mean control-referenced delta Pearson of the validation conditions, or simply the latest where nothing is
    held out. Both are written at the end of an epoch, so that a resumed run starts with a whole one.

    Parameters
    ----------
    monitor
        Name of the logged metric.
    mode
        ``max`` or ``min``.
    """

    def __init__(self, monitor: str = SELECTION_METRIC, mode: str = "max") -> None:
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_last=True,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        data = getattr(trainer, "datamodule", None)
        if stage == "fit" and data is not None and not data.has_validation():
            self.monitor = None
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        # validation may not have run (check_val_every_n_epoch, limit_val_batches): the latest is then the best known
        last, best = Path(str(self.dirpath)) / "last.ckpt", Path(str(self.dirpath)) / "best.ckpt"
        if trainer.is_global_zero and last.exists() and not best.exists():
            temporary = best.with_suffix(".part")
            shutil.copyfile(last, temporary)
            os.replace(temporary, best)


class RandomState(Callback):
    """Save the Python, NumPy and torch generators in every checkpoint, and put them back when training resumes.

    With them a resumed run draws the dropout masks that the uninterrupted run would have drawn.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one is meant
        state: dict[str, Any] = {
            "python": {"version": version, "words": list(words), "gauss": gauss},
            "numpy": {
                "keys": torch.from_numpy(keys.astype(np.int64)),
                "position": int(position),
                "has_gauss": int(has_gauss),
                "cached": float(cached),
            },
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore after building and the sanity check, which draw numbers of their own."""
        if not self._restored:
            return
        python, numpy = self._restored["python"], self._restored["numpy"]
        random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
        keys = numpy["keys"].cpu().numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))  # noqa: NPY002
        torch.set_rng_state(self._restored["torch"].cpu())
        if torch.cuda.is_available() and "cuda" in self._restored:
            torch.cuda.set_rng_state_all([state.cpu() for state in self._restored["cuda"]])
        self._restored = {}


def default_callbacks(trainer: Trainer) -> list[Callback]:
    """What a model adds to a trainer that has not got it already: checkpoints, unless they are switched off, and `RandomState`."""
    added: list[Callback] = []
    present = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    if RandomState not in present:
        added.append(RandomState())
    untouched = [
        c for c in trainer.checkpoint_callbacks if type(c) is ModelCheckpoint and c.monitor is None and c.dirpath is None
    ]
    if untouched:
        # Lightning's own default, which would write a second copy elsewhere, makes way for ours
        for callback in untouched:
            trainer.callbacks.remove(callback)  # type: ignore[attr-defined]
    if untouched or (trainer.checkpoint_callbacks and BestAndLast not in present):
        added.append(BestAndLast())
    return added
