"""Weights & Biases: what an offline run records, read back from the run's own file."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perturbzoo.cli import main

CONFIG = Path(__file__).parent.parent / "configs/logger/wandb.yaml"


def read_records(file: Path) -> Iterator[Any]:
    """Records of a ``.wandb`` file: a 7-byte header, then LevelDB's log format with protocol buffers in it.

    Blocks of 32 KiB hold pieces: checksum (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last).
    """
    from wandb.proto import wandb_internal_pb2

    content, position, pieces = file.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768  # too short for a header: padding
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        pieces += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            pieces = b""
            yield record


def values(items: Any) -> dict[str, Any]:
    """What a record sets, as nested dicts; an item names one value by its key or by the keys on the way to it."""
    found: dict[str, Any] = {}
    for item in items:
        *way, last = item.nested_key or [item.key]
        part = found
        for key in way:
            part = part.setdefault(key, {})
        part[last] = json.loads(item.value_json)
    return found


def history(records: list[Any]) -> list[dict[str, Any]]:
    """What was logged, step by step."""
    return [values(record.history.item) for record in records if record.HasField("history")]


@pytest.fixture(scope="module")
def runs(make_adata: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """The folder and records of two runs from the command line: a fit, and the test of its checkpoint."""
    import wandb

    root = tmp_path_factory.mktemp("wandb")
    make_adata(cells_per_condition=15).write_h5ad(root / "screen.h5ad")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(root / "home"))
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_SILENT", "true")
        shared = ["--config", str(CONFIG), "--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"]
        data = ["--data", "PerturbSeqDataModule", "--data.path", str(root / "screen.h5ad")]
        split = ["--data.split", '{"method": "explicit", "test": "G3+G4,G4", "val": "G0+G1"}']
        model = ["--model", "GEARS", "--model.hidden", "4", "--model.direction_weight", "0.5"]
        main(["fit", *shared, *data, *split, *model, "--trainer.max_epochs", "2"])
        wandb.finish()
        time.sleep(1.1)  # a run's folder is named after the second it began in
        main(["test", *shared, "--ckpt_path", str(root / "checkpoints/best.ckpt")])
        wandb.finish()
    files = sorted(root.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    return root, [finished(file) for file in files]


def finished(file: Path) -> list[Any]:
    """The records of a run that has ended: another process writes them, and may be behind on a busy machine."""
    deadline = time.monotonic() + 60
    while True:
        records = list(read_records(file))
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline, f"{file} has no end after a minute"
        time.sleep(0.2)


def merged(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for step in steps for key, value in step.items()}


@pytest.mark.slow
def test_config_of_each_run(runs: tuple[Path, list[list[Any]]]) -> None:
    root, (fitted, tested) = runs
    for records in (fitted, tested):
        updates = merged([values(record.config.update) for record in records if record.HasField("config")])
        assert updates["model"]["init_args"]["hidden"] == 4
        assert updates["data"]["init_args"]["path"] == str(root / "screen.h5ad")
    saved = sorted(root.glob("wandb/offline-run-*/files/perturbzoo.yaml"))
    assert len(saved) == 2, "no run overwrites another's configuration"
    assert "max_epochs: 2" in saved[0].read_text()
    assert "init_from: null" in saved[0].read_text()
    assert not (root / "config.yaml").exists()


@pytest.mark.slow
def test_loss_terms_and_scores(runs: tuple[Path, list[list[Any]]]) -> None:
    _, (fitted, tested) = runs
    logged = merged(history(fitted))
    terms = {"train/mse", "train/direction", "train/loss_epoch", "val/pearson_delta", "val/mse", "epoch"}
    assert terms <= set(logged)
    assert logged["train/mse"] > 0
    assert logged["train/loss_epoch"] == pytest.approx(logged["train/mse"] + logged["train/direction"], rel=1e-5)
    assert -1 <= merged(history(tested))["test/all/pearson_delta"] <= 1


@pytest.mark.slow
def test_table_of_categories(runs: tuple[Path, list[list[Any]]]) -> None:
    root, (fitted, tested) = runs
    assert "test/table" not in merged(history(fitted))
    recorded = merged(history(tested))
    assert recorded["test/table"]["_type"] == "table-file"
    (file,) = root.glob(f"wandb/offline-run-*/files/{recorded['test/table']['path']}")
    table = json.loads(file.read_text())
    assert table["columns"] == ["model", "category", "metric", "n", "mean", "low", "high"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert {"GEARS", "NoChange", "Additive", "split-half ceiling"} <= {row["model"] for row in rows}
    assert {row["category"] for row in rows} == {"all", "combo_seen1", "unseen_single"}
    (own,) = [r for r in rows if (r["model"], r["category"], r["metric"]) == ("GEARS", "all", "pearson_delta")]
    assert own["mean"] == pytest.approx(recorded["test/all/pearson_delta"])
    assert own["n"] == 2


@pytest.mark.slow
def test_figures(runs: tuple[Path, list[list[Any]]]) -> None:
    root, (_, tested) = runs
    recorded = merged(history(tested))
    assert recorded["test/scores"]["_type"] == "image-file"
    assert recorded["test/deltas"]["captions"] == ["G3+G4", "G4"]
    for path in (recorded["test/scores"]["path"], *recorded["test/deltas"]["filenames"]):
        (file,) = root.glob(f"wandb/offline-run-*/files/{path}")
        assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_checkpoint_artifact(runs: tuple[Path, list[list[Any]]]) -> None:
    root, (fitted, tested) = runs
    (artifact,) = [r.artifact for r in fitted if r.HasField("artifact")]
    assert artifact.type == "model"
    assert "best" in artifact.aliases
    (entry,) = artifact.manifest.contents
    assert entry.path == "best.ckpt"
    assert Path(entry.local_path).read_bytes() == (root / "checkpoints/best.ckpt").read_bytes()
    metadata = json.loads(artifact.metadata)
    assert metadata["class"] == "GEARS"
    scores = [step["val/pearson_delta"] for step in history(fitted) if "val/pearson_delta" in step]
    assert len(scores) == 2
    assert metadata["val/pearson_delta"] == pytest.approx(max(scores))
    assert not [r for r in tested if r.HasField("artifact") and r.artifact.type == "model"]
