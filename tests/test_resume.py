"""Resume: a run that was killed ends with the same weights, bit for bit, as one that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from perturbzoo.checkpoint import read_checkpoint
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.models import find_model

EPOCHS = 4

# the same run as in `fit` below, which kills itself after the second batch of the third epoch
KILLED_RUN = """
import os, signal, sys
from lightning.pytorch import Callback
sys.path.insert(0, {tests!r})
from test_resume import fit

class Kill(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)

fit({path!r}, {root!r}, kind={kind!r}, callbacks=[Kill()])
"""

# targets hidden at random draw from torch's generator in every step, as dropout does
ARGUMENTS: dict[str, dict[str, Any]] = {
    "GEARS": {"hidden": 8, "unseen_rate": 0.5, "lr": 0.01, "lr_decay": 0.5},
    # two optimisers, steps by hand, and a running mean of the weights
    "CellOT": {"components": 5, "hidden": [8, 8], "width": 4, "unseen_rate": 0.5},
}


def fit(
    path: str,
    root: str,
    *,
    kind: str = "GEARS",
    epochs: int = EPOCHS,
    callbacks: list[Callback] | None = None,
    ckpt_path: str | None = None,
) -> Trainer:
    """Train a model of the class `kind`."""
    seed_everything(3)
    model = find_model(kind)(**ARGUMENTS[kind])
    data = PerturbSeqDataModule(path, conditions_per_batch=1, cells_per_condition=10, seed=3, split={"method": "simulation"})
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def screen(make_adata: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    make_adata(cells_per_condition=20).write_h5ad(path)
    return str(path)


def assert_equal(first: Any, second: Any, where: str = "state") -> None:
    """The same tensors and numbers, exactly, however deep they lie."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for position, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{where}/{position}")
    else:
        assert first == second, where


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(ARGUMENTS))
def test_a_killed_run_ends_where_an_uninterrupted_one_does(screen: str, tmp_path: Path, kind: str) -> None:
    script = KILLED_RUN.format(tests=str(Path(__file__).parent), path=screen, root=str(tmp_path / "killed"), kind=kind)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    last = tmp_path / "killed/checkpoints/last.ckpt"
    before = read_checkpoint(last)
    assert before["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 2, "two epochs were whole"

    fit(screen, str(tmp_path / "killed"), kind=kind, ckpt_path=str(last))
    fit(screen, str(tmp_path / "whole"), kind=kind)

    resumed, whole = read_checkpoint(last), read_checkpoint(tmp_path / "whole/checkpoints/last.ckpt")
    n_steps = whole["global_step"]
    assert resumed["global_step"] == n_steps > before["global_step"] > 0
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random_state"):
        assert_equal(resumed[part], whole[part], part)
    assert len(whole["optimizer_states"]) == {"GEARS": 1, "CellOT": 2}[kind]
    learned = {
        "GEARS": ["gene_embedding.weight"],
        "CellOT": ["f.skips.0.weight", "g.skips.0.weight", "mean.module.0.skips.0.weight"],
    }
    for name in learned[kind]:
        assert not torch.equal(before["state_dict"][name], whole["state_dict"][name]), name
    if kind == "GEARS":  # StepLR with a factor of one half, once per epoch
        assert whole["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.01 * 0.5**EPOCHS)
    best = [read_checkpoint(tmp_path / name / "checkpoints/best.ckpt") for name in ("killed", "whole")]
    assert_equal(best[0]["state_dict"], best[1]["state_dict"], "best")


class Draw(Callback):
    """Draw from the three generators at the start of each epoch."""

    def __init__(self) -> None:
        self.drawn: list[tuple[float, float, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        import random

        self.drawn.append((random.random(), np.random.rand(), float(torch.rand(1))))  # noqa: NPY002


def test_all_three_generators_are_restored(screen: str, tmp_path: Path) -> None:
    whole, resumed = Draw(), Draw()
    root = tmp_path / "run"

    class Keep(Callback):
        """Keep the checkpoint of the second epoch."""

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                (tmp_path / "second.ckpt").write_bytes((root / "checkpoints/last.ckpt").read_bytes())

    fit(screen, str(root), callbacks=[whole, Keep()])
    fit(screen, str(root), callbacks=[resumed], ckpt_path=str(tmp_path / "second.ckpt"))
    assert len(whole.drawn) == EPOCHS
    assert resumed.drawn == whole.drawn[2:]
    assert len(set(whole.drawn)) == EPOCHS, "the generators moved on"


def test_resuming_leaves_the_best_of_both_halves(screen: str, tmp_path: Path) -> None:
    """The score that the second half has to beat is the first half's."""
    fit(screen, str(tmp_path), epochs=1)
    best, last = tmp_path / "checkpoints/best.ckpt", tmp_path / "checkpoints/last.ckpt"
    checkpoint = read_checkpoint(last)
    checkpoint["callbacks"]["BestAndLast"]["best_score"] = 2.0  # no correlation can beat it
    torch.save(checkpoint, tmp_path / "first.ckpt")
    written = best.read_bytes()
    fit(screen, str(tmp_path), epochs=2, ckpt_path=str(tmp_path / "first.ckpt"))
    assert best.read_bytes() == written
    assert read_checkpoint(last)["epoch"] == 1
    # elsewhere there is no best checkpoint to compare with: the first epoch's is the best so far
    fit(screen, str(tmp_path / "other"), epochs=2, ckpt_path=str(tmp_path / "first.ckpt"))
    assert read_checkpoint(tmp_path / "other/checkpoints/best.ckpt")["epoch"] == 1
