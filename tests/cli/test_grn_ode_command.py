"""GRNODE on the command line: its configuration, alone and around GEARS, tested and asked from its checkpoint alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from cli_runs import write_configs

from perturbzoo.checkpoint import load, read_checkpoint
from perturbzoo.cli import main

CONFIG = Path(__file__).parents[2] / "configs/model/grn_ode.yaml"
SMALL = ["--model.residual_steps", "20", "--model.fixed_point_steps", "10"]
AROUND = {"class_path": "GEARS", "init_args": {"hidden": 4}}

pytestmark = pytest.mark.slow


@pytest.fixture(
    scope="module",
    params=["alone", "around GEARS"],
)
def fitted(request: pytest.FixtureRequest, screen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``fit`` left."""
    root = tmp_path_factory.mktemp("grn_ode")
    arguments = [*write_configs(root, screen)[:2], "--config", str(CONFIG), *SMALL]
    if request.param != "alone":
        section = {"backbone": AROUND, "backbone_epochs": 1, "tau": 0.3}
        (root / "around.yaml").write_text(yaml.safe_dump({"model": {"class_path": "GRNODE", "init_args": section}}))
        arguments += [f"--config={root / 'around.yaml'}"]  # and with an equals sign
    main(["fit", *arguments, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(root)])
    return root


def test_the_configuration_is_one_epoch_of_one_batch(fitted: Path) -> None:
    held = read_checkpoint(fitted / "checkpoints/best.ckpt")
    assert held["epoch"] == 0
    assert held["perturbzoo"]["arguments"]["kinetics"] == "hill"
    assert held["perturbzoo"]["arguments"]["residual_steps"] == 20
    torch.load(fitted / "checkpoints/last.ckpt", weights_only=True)


def test_test_needs_the_checkpoint_only(fitted: Path, tmp_path: Path) -> None:
    """Also where its arguments name the backbone's class in short."""
    best = str(fitted / "checkpoints/best.ckpt")
    main(["test", "--ckpt_path", best, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "test/conditions.csv").set_index(["model", "condition"])
    own = table.loc["GRNODE", ["pearson_delta", "mse"]]
    assert sorted(own.index) == ["G3+G4", "G4"]
    assert np.isfinite(own.to_numpy()).all()


def test_predict_is_what_the_model_says(fitted: Path, make_adata: Callable[..., Any], tmp_path: Path) -> None:
    adata = make_adata(n_controls=20, cells_per_condition=1, seed=3)
    adata[(adata.obs["perturbation"] == "control").to_numpy()].copy().write_h5ad(tmp_path / "controls.h5ad")
    best, output = fitted / "checkpoints/best.ckpt", tmp_path / "predicted.h5ad"
    query = ["--controls", str(tmp_path / "controls.h5ad"), "--conditions", "G0+G1,G4,G0@0", "--output", str(output)]
    main(["predict", "--ckpt_path", str(best), *query, "--pseudobulk"])
    written = anndata.read_h5ad(output)
    asked = load(best).predict(tmp_path / "controls.h5ad", ["G0+G1", "G4", "G0@0"], pseudobulk=True)
    np.testing.assert_allclose(written.layers["delta"], asked.layers["delta"], atol=1e-6)
    assert written.obs["condition"].tolist() == ["G0+G1", "G4", "G0@0"]
    assert np.isfinite(written.X).all()


def test_mistakes_are_one_line(screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loops.csv").write_text("regulator,target,weight\nnobody,noone,1\n")
    root = ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    start = ["fit", *write_configs(tmp_path, screen)[:2], "--config", str(CONFIG), *SMALL, *root]
    for arguments, message in (
        (["--model.penalty=-1"], "penalty=-1 must not be negative"),
        (["--model.members", "0"], "members=0: give 1 or more"),
        (["--model.prior", str(tmp_path / "gone.csv")], "gone.csv"),
        (["--model.prior", str(tmp_path / "loops.csv")], "none of its 2 genes"),
        (["--model.backbone", str(tmp_path / "gone.ckpt")], "gone.ckpt: no such checkpoint"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*start, *arguments])
        said = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2, arguments
        assert said[-1].startswith("error: "), said
        assert message in said[-1], said
