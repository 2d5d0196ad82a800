"""The table that `test` prints: on a screen the model was not trained on, and with the bar for what the model was given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import perturbzoo
from perturbzoo.cli import main
from perturbzoo.data.graphs import build_graph
from perturbzoo.models import GEARS, KNN, Additive, Bilinear, Ridge
from perturbzoo.models.base import PerturbationModel
from perturbzoo.models.embedding import spectral_embedding

SPLIT = {"method": "explicit", "train": ["G0", "G1", "G2"], "val": ["G3"], "test": ["G4", "G0+G1"]}


def _trainer(folder: Path, **options: object) -> lightning.Trainer:
    return lightning.Trainer(
        default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False, **options
    )


def test_a_file_of_test_conditions_alone(
    make_adata: Callable[..., AnnData], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adata = make_adata()
    data = perturbzoo.PerturbSeqDataModule.from_anndata(adata, split=SPLIT)
    _trainer(tmp_path, max_epochs=1).fit(Additive(), datamodule=data)
    model = perturbzoo.load(tmp_path / "checkpoints" / "best.ckpt")

    whole = _trainer(tmp_path / "whole")
    whole.test(model, datamodule=perturbzoo.PerturbSeqDataModule.from_anndata(adata), verbose=False)
    held_out = adata[adata.obs["perturbation"].isin(["control", "G4", "G0+G1"])].copy()
    alone = _trainer(tmp_path / "alone")
    alone.test(model, datamodule=perturbzoo.PerturbSeqDataModule.from_anndata(held_out), verbose=False)

    tables = [pd.read_csv(tmp_path / name / "test" / "conditions.csv") for name in ("whole", "alone")]
    own = [table[table["model"] == "Additive"].set_index("condition") for table in tables]
    # the model's own split, not the data module's default one, says what is tested
    assert set(own[0].index) >= {"G4", "G0+G1"}
    for condition in ("G4", "G0+G1"):
        assert own[0].loc[condition, "pearson_delta"] == pytest.approx(own[1].loc[condition, "pearson_delta"], abs=1e-6)
    # without training cells there are no baselines, and that is said
    assert "TrainingMean" in set(tables[0]["model"])
    assert set(tables[1]["model"]) == {"Additive", "split-half ceiling", "technical duplicate", "interpolated duplicate"}
    assert "baselines are left out" in capsys.readouterr().out


def _tested(model: PerturbationModel, adata: AnnData, folder: Path) -> pd.DataFrame:
    """Fit for an epoch and test: the summary over all conditions, one row per model and one column per metric."""
    data = perturbzoo.PerturbSeqDataModule.from_anndata(adata, split=SPLIT)
    trainer = _trainer(folder, max_epochs=1, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    summary = model.test_table[model.test_table["category"] == "all"]
    return summary.pivot(index="model", columns="metric", values="mean").dropna(axis=1)


@pytest.fixture
def vectors(tmp_path: Path) -> str:
    """A table for all targets but G2."""
    values = np.random.default_rng(0).normal(size=(4, 3))
    pd.DataFrame(values, index=["G0", "G1", "G3", "G4"]).to_csv(tmp_path / "v.csv")
    return str(tmp_path / "v.csv")


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_baselines_on_the_embedding_of_the_model(
    make_adata: Callable[..., AnnData], vectors: str, tmp_path: Path, fill: str
) -> None:
    """Beside the plain ones; the same numbers as a baseline gets that is given the embedding itself."""
    adata, embedding = make_adata(), {"kind": "table", "path": vectors, "fill": fill}
    table = _tested(GEARS(hidden=4, embedding=embedding), adata, tmp_path)
    shared = {f"{name} (same embedding)" for name in ("Bilinear", "Ridge", "KNN")}
    assert {name for name in table.index if "(" in name} == shared
    assert {"Bilinear", "Ridge", "KNN"} < set(table.index)
    for name, model in (("Bilinear", Bilinear(embedding=embedding)), ("Ridge", Ridge(embedding=embedding))):
        own = _tested(model, adata, tmp_path)
        np.testing.assert_allclose(table.loc[f"{name} (same embedding)"], own.loc[name], atol=1e-6)
        assert not np.allclose(table.loc[name], own.loc[name], atol=1e-3)
        # the model itself is not its own bar
        assert {label for label in own.index if "(" in label} == shared - {f"{name} (same embedding)"}


def test_baselines_on_the_graph_of_the_model(make_adata: Callable[..., AnnData], tmp_path: Path) -> None:
    """Without an embedding, the eigenmaps of its graph; NEW is in the file without being in the data."""
    edges = [("G0", "G3"), ("G3", "G1"), ("G4", "G2"), ("G1", "NEW"), ("NEW", "G4"), ("G0", "G1")]
    pd.DataFrame(edges, columns=["source", "target"]).to_csv(tmp_path / "edges.csv", index=False)
    sources = [{"kind": "edges", "path": str(tmp_path / "edges.csv")}]
    table = _tested(GEARS(hidden=4, perturbation_graph=sources), make_adata(), tmp_path)
    names, coordinates = spectral_embedding(build_graph(sources, ["G0", "G1", "G2", "G3", "G4", "NEW"]), 20)
    pd.DataFrame(coordinates, index=names).to_csv(tmp_path / "v.csv")
    own = _tested(Ridge(embedding=str(tmp_path / "v.csv")), make_adata(), tmp_path)
    np.testing.assert_allclose(table.loc["Ridge (spectral of its graph)"], own.loc["Ridge"], atol=1e-6)
    assert {"Bilinear (spectral of its graph)", "KNN (spectral of its graph)"} < set(table.index)


@pytest.mark.parametrize("model", [GEARS(hidden=4), KNN(), Additive()])
def test_nothing_is_shown_twice(make_adata: Callable[..., AnnData], tmp_path: Path, model: PerturbationModel) -> None:
    """Neither embedding nor graph, or the embedding that all baselines have."""
    assert not [name for name in _tested(model, make_adata(), tmp_path).index if "(" in name]


@pytest.mark.parametrize("name", ["KNN", "GEARS"])
def test_the_embedding_comes_from_the_checkpoint(
    make_adata: Callable[..., AnnData], vectors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """`perturbzoo test` needs the checkpoint and the screen, no table."""
    monkeypatch.chdir(tmp_path)
    make_adata().write_h5ad("screen.h5ad")
    options = ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    screen = ["--data", "PerturbSeqDataModule", "--data.path", "screen.h5ad", "--data.split", str(SPLIT)]
    model = ["--model", name, "--model.embedding", vectors, *(["--model.hidden", "4"] if name == "GEARS" else [])]
    main(["fit", *model, *screen, *options, "--trainer.max_epochs", "1"])
    Path(vectors).unlink()
    main(["test", "--ckpt_path", "checkpoints/last.ckpt", *options])
    assert "Ridge (same embedding)" in set(pd.read_csv("test/summary.csv")["model"])
