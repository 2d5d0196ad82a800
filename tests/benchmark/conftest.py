"""A small experiment on disk: two models on a small screen, with the folder layout of configs/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

SPLITS = {"one": {"method": "explicit", "test": ["G3+G4", "G4"], "val": ["G0+G1"]}}


@pytest.fixture(scope="session")
def screen_file(make_adata: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    make_adata(cells_per_condition=15, n_controls=40).write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def write_experiment(screen_file: Path) -> Callable[..., Path]:
    """Write an experiment below a folder; keyword arguments replace keys of it. Returns its file."""

    def write(folder: Path, **changes: Any) -> Path:
        data = {"class_path": "PerturbSeqDataModule", "init_args": {"path": str(screen_file), "cells_per_condition": 15}}
        files: dict[str, Any] = {
            "data/screen.yaml": {"data": data},
            "model/gears.yaml": {"model": {"class_path": "GEARS", "init_args": {"hidden": 4}}},
            "model/cpa.yaml": {"model": {"class_path": "CPA", "init_args": {"n_latent": 4, "n_hidden": 8}}},
            "experiment/small.yaml": {
                "title": "Small",
                "description": "Two models.",
                "data": "data/screen.yaml",
                "models": {"GEARS": "model/gears.yaml", "CPA": "model/cpa.yaml"},
                "seeds": [0],
                "splits": SPLITS,
                "overrides": {"trainer": {"max_epochs": 1, "accelerator": "cpu"}},
                **changes,
            },
        }
        for name, content in files.items():
            file = folder / "configs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(content, sort_keys=False))
        return folder / "configs/experiment/small.yaml"

    return write
