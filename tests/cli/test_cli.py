"""The command line: help, configuration, training, fine-tuning, and scoring from a checkpoint alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from cli_runs import MODEL, SPLIT, write_configs
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from perturbzoo.checkpoint import load, read_checkpoint
from perturbzoo.cli import COMMANDS, main
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.models import MODELS
from perturbzoo.models.gears import GEARS

CONFIGS = Path(__file__).parents[2] / "configs"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What ``--print_config`` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- help and configuration


def test_help_imports_neither_torch_nor_lightning() -> None:
    """In a process of its own, because this one has imported both."""
    script = "import sys\nfrom perturbzoo.cli import main\nmain(['--help'])\nprint(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True).stdout
    for command in COMMANDS:
        assert f"\n  {command} " in out
    modules = set(eval(out.splitlines()[-1]))
    assert "perturbzoo.cli" in modules
    assert not modules & {"torch", "lightning", "numpy", "pandas", "anndata", "yaml"}


@pytest.mark.slow
def test_help_of_fit_imports_nothing_it_has_no_use_for() -> None:
    script = """
import gc, sys
from perturbzoo.cli import main
try:
    main(["fit", "--help"])
except SystemExit as stop:
    assert stop.code == 0 and gc.isenabled()
print(sorted(sys.modules))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "--early_stopping.patience" in out
    assert "--init_from" in out
    modules = set(eval(out.splitlines()[-1]))
    assert "lightning" in modules
    assert not modules & {"anndata", "h5py", "scanpy", "scvi", "torch_geometric", "wandb"}


def test_printed_configuration_is_read_back(screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = printed(capsys, *write_configs(tmp_path, screen), "--early_stopping.patience", "3", "--model.lr", "0.5")
    (tmp_path / "printed.yaml").write_text(first)
    assert printed(capsys, "--config", str(tmp_path / "printed.yaml")) == first
    config = yaml.safe_load(first)
    assert config["model"]["class_path"].rsplit(".", 1)[-1] == "GEARS"
    assert config["model"]["init_args"]["hidden"] == MODEL["hidden"]
    assert config["model"]["init_args"]["lr"] == 0.5
    assert config["data"]["init_args"]["split"] == SPLIT
    assert config["early_stopping"]["patience"] == 3


def test_later_files_override_earlier_ones(screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stacked = write_configs(tmp_path, screen)
    (tmp_path / "quick.yaml").write_text("trainer: {max_epochs: 2}\nmodel: {init_args: {hidden: 7}}\n")
    config = yaml.safe_load(printed(capsys, *stacked, "--config", str(tmp_path / "quick.yaml"), "--trainer.max_steps", "5"))
    assert config["trainer"]["max_epochs"] == 2
    assert config["trainer"]["max_steps"] == 5
    assert config["model"]["init_args"]["hidden"] == 7
    assert config["model"]["init_args"]["unseen_rate"] == MODEL["unseen_rate"]


@pytest.mark.parametrize("name", sorted(path.name for path in (CONFIGS / "model").glob("*.yaml")))
def test_every_model_configuration_is_valid(
    screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data = write_configs(tmp_path, screen)[:2]
    config = yaml.safe_load(printed(capsys, *data, "--config", str(CONFIGS / "model" / name)))
    assert config["model"]["class_path"].rsplit(".", 1)[-1] in MODELS


@pytest.mark.parametrize(
    "name",
    sorted(
        f"{path.parent.name}/{path.name}"
        for path in CONFIGS.glob("*/*.yaml")
        if path.parent.name in ("data", "logger", "trainer")
    ),
)
def test_every_other_configuration_is_valid(
    screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    given = yaml.safe_load((CONFIGS / name).read_text())
    config = yaml.safe_load(printed(capsys, *write_configs(tmp_path, screen), "--config", str(CONFIGS / name)))
    for section, values in given.items():
        for key, value in (values.get("init_args") or values).items():
            assert config[section].get("init_args", config[section])[key] is not None or value is None, key


# ---------------------------------------------------------------------------------------------- training


def test_python_only_training_gives_the_same_numbers(screen: Path, trained: Path, tmp_path: Path) -> None:
    seed_everything(0)
    data = PerturbSeqDataModule(str(screen), split=SPLIT, cells_per_condition=15)
    model = GEARS(**MODEL)  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, default_root_dir=tmp_path, logger=CSVLogger(tmp_path), enable_progress_bar=False
    )
    trainer.fit(model, data)
    for name in ("best", "last"):
        own, theirs = (load(root / f"checkpoints/{name}.ckpt") for root in (tmp_path, trained))
        for key, value in own.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), key
    first, later = (load(trained / f"checkpoints/{name}.ckpt").state_dict() for name in ("best", "last"))
    assert read_checkpoint(trained / "checkpoints/last.ckpt")["epoch"] == 2
    assert first.keys() == later.keys()


def test_a_fit_into_a_file_prints_one_line_per_epoch(screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "2"]
    main(["fit", *write_configs(tmp_path, screen), *arguments])
    out, err = capsys.readouterr()
    epochs = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/2", "2/2"]
    assert "val/pearson_delta" in epochs[0]
    assert str(tmp_path / "checkpoints/best.ckpt") in out
    assert "GEARS: " in out
    assert "\r" not in out + err, "no debris of a progress bar"
    for noise in ("Tip", "TPU", "treespec", "logging interval", "args parameter", "weights_only"):
        assert noise not in out + err
    saved = yaml.safe_load((tmp_path / "logs/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["hidden"] == MODEL["hidden"]
    # a second run keeps its configuration beside the first's
    main(["fit", *write_configs(tmp_path, screen), *arguments, "--model.hidden", "3", "--trainer.max_epochs", "1"])
    for version, hidden in ((0, MODEL["hidden"]), (1, 3)):
        config = yaml.safe_load((tmp_path / f"logs/version_{version}/config.yaml").read_text())
        assert config["model"]["init_args"]["hidden"] == hidden


def test_switches_of_the_trainer_are_obeyed(screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    switches = ["enable_progress_bar", "enable_checkpointing", "logger"]
    options = [option for name in switches for option in (f"--trainer.{name}", "false")]
    root = ["--trainer.default_root_dir", str(tmp_path / "root"), "--trainer.max_epochs", "1"]
    main(["fit", *write_configs(tmp_path, screen), *options, *root])
    assert "epoch 1/1" not in capsys.readouterr().out
    assert not (tmp_path / "root").exists()


# ---------------------------------------------------------------------------------------------- from a checkpoint alone


def last_metrics(root: Path) -> pd.Series:
    """The last value of each metric in the newest CSV log."""
    newest = max(root.glob("logs/version_*/metrics.csv"), key=lambda file: int(file.parent.name.split("_")[1]))
    return pd.read_csv(newest).ffill().iloc[-1]


def test_validate_gives_the_score_of_the_last_epoch(trained: Path, tmp_path: Path) -> None:
    main(["validate", "--ckpt_path", str(trained / "checkpoints/last.ckpt"), "--trainer.default_root_dir", str(tmp_path)])
    seen, again = last_metrics(trained), last_metrics(tmp_path)
    for name in ("val/pearson_delta", "val/mse"):
        assert again[name] == pytest.approx(seen[name], rel=1e-5), name


@pytest.fixture(scope="module")
def table(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Per-condition scores of the trained checkpoint on its own file."""
    root = tmp_path_factory.mktemp("tested")
    main(["test", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), "--trainer.default_root_dir", str(root)])
    return pd.read_csv(root / "test/conditions.csv")


def scores(table: pd.DataFrame, model: str = "GEARS") -> pd.DataFrame:
    rows = table[table["model"] == model].set_index("condition").sort_index()
    return rows[["pearson_delta", "mse", "n_cells"]].astype(float)


def test_test_scores_the_model_beside_all_baselines(trained: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    assert {"GEARS", "NoChange", "TrainingMean", "Additive", "Bilinear", "Ridge", "KNN"} <= set(table["model"])
    assert list(scores(table).index) == ["G3+G4", "G4"]
    # the same as Python gives it
    checkpoint = load(trained / "checkpoints/best.ckpt")
    data = PerturbSeqDataModule(**read_checkpoint(trained / "checkpoints/best.ckpt")["perturbzoo"]["data"])
    seed_everything(0)
    Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False).test(checkpoint, data)
    pd.testing.assert_frame_equal(scores(pd.read_csv(tmp_path / "test/conditions.csv")), scores(table))


def test_a_file_whose_genes_are_in_another_order_scores_the_same(
    make_adata: Callable[..., Any], trained: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    adata = make_adata(cells_per_condition=15, n_controls=40)
    adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy().write_h5ad(tmp_path / "shuffled.h5ad")
    best = str(trained / "checkpoints/best.ckpt")
    main(
        [
            "test",
            "--ckpt_path",
            best,
            "--data.path",
            str(tmp_path / "shuffled.h5ad"),
            "--trainer.default_root_dir",
            str(tmp_path),
        ]
    )
    shuffled = pd.read_csv(tmp_path / "test/conditions.csv")
    for model in ("GEARS", "Ridge"):
        pd.testing.assert_frame_equal(scores(shuffled, model), scores(table, model), rtol=1e-5)


def test_a_file_of_test_cells_with_missing_genes(
    make_adata: Callable[..., Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It could not be split, and it lacks genes and training cells; the checkpoint says how to read it."""
    adata = make_adata(cells_per_condition=15, n_controls=40)
    kept = adata[adata.obs["perturbation"].isin(["control", "G3+G4"]), 2:].copy()
    kept.write_h5ad(tmp_path / "some.h5ad")
    best = str(trained / "checkpoints/best.ckpt")
    main(["test", "--ckpt_path", best, "--data.path", str(tmp_path / "some.h5ad"), "--trainer.default_root_dir", str(tmp_path)])
    out, err = capsys.readouterr()
    # the words that a prediction from this file would say
    said = f"warning: {tmp_path / 'some.h5ad'}: of the model's 30 genes 28 are there: 2 are missing and filled with its mean control"
    assert said in err
    assert "baselines are left out" in out
    own = scores(pd.read_csv(tmp_path / "test/conditions.csv"))
    assert list(own.index) == ["G3+G4"]
    assert own.loc["G3+G4", "n_cells"] == 15
    assert np.isfinite(own.to_numpy()).all()


def test_resuming_needs_no_configuration(trained: Path, tmp_path: Path) -> None:
    last = str(trained / "checkpoints/last.ckpt")
    main(["fit", "--ckpt_path", last, "--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "4"])
    checkpoint = read_checkpoint(tmp_path / "checkpoints/last.ckpt")
    assert checkpoint["epoch"] == 3
    assert checkpoint["global_step"] == read_checkpoint(last)["global_step"] * 4 // 3


# ---------------------------------------------------------------------------------------------- fine-tuning


def test_init_from_maps_genes_and_targets_by_name(
    make_adata: Callable[..., Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new screen with some of the genes, in another order, and some of the targets; a learning rate of 0 shows the start."""
    conditions = ("G1", "G2", "G31", "G32", "G1+G2", "G31+G32")
    adata = make_adata(conditions=conditions, n_genes=35, cells_per_condition=15, n_controls=40, seed=1)
    adata[:, ::-1][:, :28].copy().write_h5ad(tmp_path / "new.h5ad")  # G34 down to G7
    best = trained / "checkpoints/best.ckpt"
    arguments = ["--data", "PerturbSeqDataModule", "--data.path", str(tmp_path / "new.h5ad"), "--model", "GEARS"]
    split = ["--data.split", json.dumps({"method": "explicit", "test": ["G31+G32"]})]
    still = ["--model.hidden", "4", "--model.lr", "0", "--model.weight_decay", "0", "--trainer.max_epochs", "1"]
    root = ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    main(["fit", *arguments, *split, *still, *root, "--init_from", str(best)])
    assert f"weights from {best}: 23 of 28 genes, 2 of 4 targets" in capsys.readouterr().out

    old, new = load(best), load(tmp_path / "checkpoints/last.ckpt")
    assert new.get_spec().genes[:2] == ("G34", "G33")
    theirs, own = old.state_dict(), new.state_dict()
    shared = [gene for gene in new.get_spec().genes if gene in old.get_spec().genes]
    assert len(shared) == 23
    rows = [new.get_spec().genes.index(gene) for gene in shared]
    sources = [old.get_spec().genes.index(gene) for gene in shared]
    for name in ("gene_embedding.weight", "own_weight", "head_weight", "head_bias"):
        assert torch.equal(own[name][rows], theirs[name][sources]), name
    assert torch.equal(own["cross_mlp.0.weight"][:, rows], theirs["cross_mlp.0.weight"][:, sources])
    assert torch.equal(own["fuse_mlp.0.weight"], theirs["fuse_mlp.0.weight"])
    for target in new.get_spec().targets:
        row = own["targets.learned.weight"][new.get_spec().targets.index(target)]
        if target in old.get_spec().targets:
            assert torch.equal(row, theirs["targets.learned.weight"][old.get_spec().targets.index(target)])
        else:
            assert not (row == theirs["targets.learned.weight"]).all(dim=1).any()
