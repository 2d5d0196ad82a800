"""Two processes give the numbers of one: validation metrics, test tables, batches.

Run as a script (``python test_distributed.py FOLDER``), it is one of two processes that Lightning starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from perturbzoo.checkpoint import read_checkpoint
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.baselines import Ridge
from perturbzoo.models.gears import GEARS

SPLIT = {"method": "explicit", "test": ["G3+G4"], "val": ["G0+G1", "G2"]}


class Batches(Callback):
    """The cells of every training batch."""

    def __init__(self) -> None:
        self.cells: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.cells.append(batch.cell.tolist())


def run(folder: Path, root: Path, devices: int) -> dict[str, Any]:
    """Fit GEARS for an epoch; score the checkpoint that one process made; all on `devices` processes."""

    def trainer(**options: Any) -> Trainer:
        return Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            default_root_dir=root,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            max_epochs=1,
            **options,
        )

    def data() -> PerturbSeqDataModule:
        # batches of 7 leave each process a last one of another size
        sizes = {"eval_batch_size": 7, "conditions_per_batch": 1, "cells_per_condition": 8}
        return PerturbSeqDataModule(str(folder / "screen.h5ad"), split=SPLIT, seed=0, **sizes)

    def numbers(trainer: Trainer) -> dict[str, float]:
        return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}

    batches = Batches()
    seed_everything(0)
    fitted = trainer(callbacks=[batches])
    model = GEARS(hidden=4, unseen_rate=0.5)
    fitted.fit(model, data())
    trained = str(folder / "one/checkpoints/last.ckpt")
    validated, tested = trainer(), trainer()
    validated.validate(GEARS(hidden=4, unseen_rate=0.5), data(), ckpt_path=trained, verbose=False)
    tested.test(GEARS(hidden=4, unseen_rate=0.5), data(), ckpt_path=trained, verbose=False)
    message = ""
    if devices > 1:
        try:
            trainer().fit(Ridge(), data())
        except PerturbZooError as error:
            message = str(error)
    return {
        "batches": batches.cells,
        "lengths": [len(loader) for loader in (fitted.train_dataloader, fitted.val_dataloaders)],
        "while fitting": numbers(fitted),
        "validated": numbers(validated),
        "weights": float(sum(parameter.detach().double().sum() for parameter in model.parameters())),
        "message": message,
    }


@pytest.fixture(scope="module")
def folder(make_adata: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    make_adata(cells_per_condition=23, n_controls=31).write_h5ad(path / "screen.h5ad")
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `run` gave in one process, and in each of two."""
    one = run(folder, folder / "one", 1)
    environment = {name: value for name, value in os.environ.items() if name not in ("PL_GLOBAL_SEED", "LOCAL_RANK")}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**environment, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return one, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_validation_metrics_equal_those_of_one_process(results: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, two = results
    assert set(one["validated"]) >= {"val/pearson_delta", "val/mse"}
    for rank in two:
        assert rank["validated"] == pytest.approx(one["validated"], rel=0, abs=1e-6)
        # while fitting, both processes log the same numbers, which choose the same best checkpoint
        assert rank["while fitting"] == two[0]["while fitting"]


@pytest.mark.slow
def test_test_table_equals_that_of_one_process(results: Any, folder: Path) -> None:
    tables = [pd.read_csv(folder / root / "test/conditions.csv") for root in ("one", "two")]
    assert len(tables[0]) > 0
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_processes_share_the_batches_of_one(results: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    """Batch i goes to process i mod 2; where the number is odd, the first batch is seen twice."""
    one, two = results
    whole = one["batches"]
    assert len(whole) % 2 == 1
    assert len(two[0]["batches"]) == len(two[1]["batches"]) == -(-len(whole) // 2)
    for rank in (0, 1):
        assert two[rank]["batches"] == [whole[i % len(whole)] for i in range(rank, 2 * len(two[0]["batches"]), 2)]
    assert two[0]["lengths"] == two[1]["lengths"]
    assert np.isfinite(two[0]["weights"])
    assert two[0]["weights"] == two[1]["weights"], "gradients were averaged"


@pytest.mark.slow
def test_the_checkpoint_holds_the_generators_of_both(results: Any, folder: Path) -> None:
    last = read_checkpoint(folder / "two/checkpoints/last.ckpt")
    assert len(last["random_state"]) == 2
    assert last["global_step"] == len(results[1][0]["batches"])
    assert sorted(path.name for path in (folder / "two/checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.slow
def test_a_closed_form_is_refused_in_one_line(results: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    for rank in results[1]:
        assert rank["message"].startswith("Ridge is solved in closed form, by one process")


if __name__ == "__main__":
    given = Path(sys.argv[1])
    result = run(given, given / "two", 2)
    (given / f"rank{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(result))
