"""The learned models beside each other: each fitted from its configuration, tested, and asked the same, on the command line."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
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
from perturbzoo.data.datamodule import PerturbSeqDataModule

CONFIGS = Path(__file__).parents[2] / "configs"
# name of the configuration: the class, what makes it small, the terms of its loss
ZOO: dict[str, tuple[str, dict[str, str], set[str]]] = {
    "cpa": (
        "CPA",
        {"n_latent": "4", "n_hidden": "8"},
        {"likelihood", "adversary", "penalty", "independence", "response", "confusion"},
    ),
    "transformer": ("Transformer", {"width": "8", "layers": "1", "heads": "2", "max_genes": "16"}, {"mse"}),
    "cellot": ("CellOT", {"components": "5", "hidden": "[8, 8]", "width": "4"}, {"f", "g"}),
    "flow_matching": ("FlowMatching", {"components": "5", "hidden": "8", "width": "4"}, {"velocity"}),
}
N_CONTROLS = 25
# a combination of seen targets, one with an unseen target, that target, and a dose that does nothing
ASKED, SWAPPED = "G0+G1,G3+G4,G4,G0@0", "G1+G0,G4+G3,G4,G0@0"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fitted(screen: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that ``fit`` and then ``test`` of a model left, by the name of its configuration; each is run once."""
    import wandb

    @functools.cache
    def folder(name: str) -> Path:
        root = tmp_path_factory.mktemp(name)
        csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(root), "name": "logs"}}
        loggers = [csv, yaml.safe_load((CONFIGS / "logger/wandb.yaml").read_text())["trainer"]["logger"]]
        (root / "loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
        data = [*write_configs(root, screen)[:2], "--config", str(CONFIGS / f"model/{name}.yaml")]
        small = [text for key, value in ZOO[name][1].items() for text in (f"--model.{key}", value)]
        small += ["--data.cells_per_condition", "15", "--data.conditions_per_batch", "3"]
        trainer = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(root)]
        with pytest.MonkeyPatch.context() as patch:
            for kind in ("DATA", "CACHE", "CONFIG"):
                patch.setenv(f"WANDB_{kind}_DIR", str(root / "home"))
            for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
                patch.delenv(variable, raising=False)
            patch.setenv("WANDB_SILENT", "true")
            main(["fit", *data, "--config", str(root / "loggers.yaml"), *small, *trainer, "--trainer.max_epochs", "2"])
            wandb.finish()
        main(["test", "--ckpt_path", str(root / "checkpoints/best.ckpt"), *trainer])
        return root

    return folder


@pytest.fixture(scope="module")
def controls(make_adata: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Control cells that no model has seen, with their genes the other way round."""
    adata = make_adata(n_controls=N_CONTROLS, cells_per_condition=1, seed=3)
    path = tmp_path_factory.mktemp("controls") / "controls.h5ad"
    adata = adata[(adata.obs["perturbation"] == "control").to_numpy()].copy()
    adata[:, ::-1].copy().write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def predicted(
    fitted: Callable[[str], Path], controls: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., anndata.AnnData]:
    """What ``predict`` writes of the query, for a model and maybe other conditions or further options."""
    root = tmp_path_factory.mktemp("predicted")

    @functools.cache
    def answer(name: str, conditions: str = ASKED, *options: str) -> anndata.AnnData:
        checkpoint, output = fitted(name) / "checkpoints/best.ckpt", root / "predicted.h5ad"
        query = ["--controls", str(controls), "--conditions", conditions, "--output", str(output)]
        main(["predict", "--ckpt_path", str(checkpoint), *query, *options])
        return anndata.read_h5ad(output)

    return answer


# ---------------------------------------------------------------------------------------------- fit and test


@pytest.mark.parametrize("name", list(ZOO))
def test_fit_leaves_the_configuration_and_every_term_of_the_loss(fitted: Callable[[str], Path], name: str) -> None:
    model, small, terms = ZOO[name]
    root = fitted(name)
    text = (root / "logs/version_0/config.yaml").read_text()
    (recorded,) = root.glob("wandb/offline-run-*/files/perturbzoo.yaml")
    assert recorded.read_text() == text
    config, given = yaml.safe_load(text), yaml.safe_load((CONFIGS / f"model/{name}.yaml").read_text())
    assert config["model"]["class_path"].rsplit(".", 1)[-1] == model
    expected = given["model"]["init_args"] | {key: yaml.safe_load(value) for key, value in small.items()}
    assert expected.items() <= config["model"]["init_args"].items()
    sampling = given.get("data", {"init_args": {}})["init_args"].get("sampling", "condition")
    assert config["data"]["init_args"]["sampling"] == sampling

    epochs = pd.read_csv(root / "logs/version_0/metrics.csv").groupby("epoch").first()
    logged = epochs[[f"train/{term}" for term in sorted(terms)]]
    assert np.isfinite(logged.to_numpy()).all()
    assert epochs["val/pearson_delta"].between(-1, 1).all()
    # two players have two losses; the second one's is the one that is watched
    total = logged["train/f"] if name == "cellot" else logged.sum(axis=1)
    np.testing.assert_allclose(epochs["train/loss_epoch"], total, rtol=1e-4)


@pytest.mark.parametrize("name", list(ZOO))
def test_checkpoint_is_of_the_best_epoch_and_moved(fitted: Callable[[str], Path], name: str) -> None:
    root = fitted(name)
    best, last = (read_checkpoint(root / f"checkpoints/{which}.ckpt") for which in ("best", "last"))
    curve = pd.read_csv(root / "logs/version_0/metrics.csv").groupby("epoch")["val/pearson_delta"].first()
    assert last["epoch"] == 1
    assert best["epoch"] == curve.idxmax()
    assert all(torch.isfinite(value).all() for value in last["state_dict"].values())


def test_baselines_are_the_same_beside_every_model(fitted: Callable[[str], Path]) -> None:
    """Same split, same test cells, same controls: only the model's own row can differ."""
    tables = {name: pd.read_csv(fitted(name) / "test/conditions.csv").set_index(["model", "condition"]) for name in ZOO}
    kept = ["category", "n_cells", "pearson_delta", "mse", "mse_top20_de"]
    others = {name: table.drop(ZOO[name][0], level="model")[kept].sort_index() for name, table in tables.items()}
    assert {"NoChange", "TrainingMean", "Additive", "Bilinear", "split-half ceiling"} <= set(others["cpa"].index.levels[0])
    for name in ZOO:
        pd.testing.assert_frame_equal(others[name], others["cpa"], rtol=1e-6)
        own = tables[name].loc[ZOO[name][0], ["pearson_delta", "mse", "mse_top20_de"]]
        assert list(own.index) == ["G3+G4", "G4"]
        assert np.isfinite(own.to_numpy()).all()


# ---------------------------------------------------------------------------------------------- predict


def test_files_of_all_models_have_the_same_rows_and_columns(predicted: Callable[..., anndata.AnnData], controls: Path) -> None:
    first = predicted("cpa")
    cells = anndata.read_h5ad(controls).obs_names
    rows = itertools.product(["G0+G1", "G3+G4", "G4", "G0@0"], cells)
    assert list(zip(first.obs["condition"], first.obs["control_cell"], strict=True)) == list(rows)
    assert first.var_names.tolist() == [f"G{number}" for number in range(30)], "the model's order, not the query's"
    for name, (model, *_) in ZOO.items():
        adata = predicted(name)
        pd.testing.assert_frame_equal(adata.obs, first.obs)
        pd.testing.assert_frame_equal(adata.var, first.var)
        assert set(adata.layers) == {"delta"}
        said = adata.uns["perturbzoo"]
        assert said["model"] == model
        assert {key: value for key, value in said.items() if key != "model"} == {
            key: value for key, value in first.uns["perturbzoo"].items() if key != "model"
        }


@pytest.mark.parametrize("name", list(ZOO))
def test_prediction_is_the_control_cell_and_its_change(
    predicted: Callable[..., anndata.AnnData], controls: Path, name: str
) -> None:
    adata, query = predicted(name), anndata.read_h5ad(controls)
    assert np.isfinite(adata.X).all()
    counts = query.to_df().loc[adata.obs["control_cell"], adata.var_names].to_numpy()
    control = np.log1p(counts / counts.sum(axis=1, keepdims=True) * adata.uns["perturbzoo"]["depth"])
    np.testing.assert_allclose(adata.layers["delta"], adata.X - control, rtol=0, atol=1e-5)
    size = np.abs(adata.to_df("delta")).groupby(adata.obs["condition"].to_numpy()).max().max(axis=1)
    assert size["G0@0"] < 1e-5, "dose 0 changes nothing"
    assert (size[["G0+G1", "G3+G4", "G4"]] > 1e-3).all()


@pytest.mark.parametrize("name", list(ZOO))
def test_order_of_a_combination_is_irrelevant(
    fitted: Callable[[str], Path], predicted: Callable[..., anndata.AnnData], name: str
) -> None:
    asked, swapped = predicted(name), predicted(name, SWAPPED)
    pd.testing.assert_frame_equal(swapped.obs, asked.obs)
    np.testing.assert_array_equal(swapped.X, asked.X)
    # names are sorted before a model sees them: turn the targets round behind its back too
    checkpoint = fitted(name) / "checkpoints/best.ckpt"
    data = PerturbSeqDataModule(**read_checkpoint(checkpoint)["perturbzoo"]["data"])
    data.setup()
    batch, model = next(iter(data.test_dataloader())), load(checkpoint)
    table = batch.table
    assert table.targets.shape[1] == 2
    columns = ("targets", "kind", "dose", "onset", "offset", "efficacy")
    turned = replace(batch, table=replace(table, **{column: getattr(table, column).flip(1) for column in columns}))
    with torch.inference_mode():
        means = [model.evaluate(one).mean for one in (batch, turned)]
    torch.testing.assert_close(*means, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(ZOO))
def test_a_pseudobulk_is_the_mean_of_its_cells(predicted: Callable[..., anndata.AnnData], name: str) -> None:
    """Also where each cell moves in its own way, and the mean of the cells in another."""
    cells, bulks = predicted(name), predicted(name, ASKED, "--pseudobulk")
    assert bulks.obs["condition"].tolist() == ["G0+G1", "G3+G4", "G4", "G0@0"]
    for layer in (None, "delta"):
        means = cells.to_df(layer).to_numpy().reshape(4, N_CONTROLS, -1).mean(axis=1)
        np.testing.assert_allclose(bulks.to_df(layer).to_numpy(), means, rtol=0, atol=1e-5)
