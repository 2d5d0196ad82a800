"""The small run that the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import yaml

SPLIT = {"method": "explicit", "test": ["G3+G4", "G4"], "val": ["G0+G1"]}
MODEL = {"hidden": 4, "unseen_rate": 0.5, "lr": 0.01}


def write_configs(folder: Path, screen: Path) -> list[str]:
    """A data and a model section in files of their own, with short class names; the arguments that stack them."""
    data = {"class_path": "PerturbSeqDataModule", "init_args": {"path": str(screen), "split": SPLIT, "cells_per_condition": 15}}
    (folder / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"class_path": "GEARS", "init_args": MODEL}}))
    return ["--config", str(folder / "data.yaml"), "--config", str(folder / "model.yaml"), "--trainer.accelerator", "cpu"]
