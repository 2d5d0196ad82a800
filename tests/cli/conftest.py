"""A screen on disk, and the folder that a fit of it left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import write_configs

from perturbzoo.cli import main


@pytest.fixture(scope="session")
def screen(make_adata: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    make_adata(cells_per_condition=15, n_controls=40).write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def trained(screen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``perturbzoo fit`` left."""
    root = tmp_path_factory.mktemp("trained")
    main(["fit", *write_configs(root, screen), "--trainer.default_root_dir", str(root), "--trainer.max_epochs", "3"])
    return root
