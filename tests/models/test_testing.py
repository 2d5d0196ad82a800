"""The table that `test` prints: on a screen the model was not trained on, and with the bar for what the model was given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anndata
import lightning
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

import perturbzoo
from perturbzoo.cli import main
from perturbzoo.data.graphs import build_graph
from perturbzoo.data.screen import Columns
from perturbzoo.evaluate import evaluate
from perturbzoo.evaluation.pseudobulk import Pseudobulks
from perturbzoo.evaluation.table import FILE_METRICS
from perturbzoo.models import GEARS, KNN, Additive, Bilinear, Ridge
from perturbzoo.models.base import PerturbationModel
from perturbzoo.models.embedding import spectral_embedding
from perturbzoo.models.testing import score_predictions

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


def test_one_table_from_test_and_from_evaluate(make_adata: Callable[..., AnnData], tmp_path: Path) -> None:
    """The model's predictions, written and scored as any tool's, get the numbers that `test` gives it."""
    adata = make_adata(contexts=("a", "b"), cells_per_condition=14, n_controls=40)
    data = perturbzoo.PerturbSeqDataModule.from_anndata(adata, covariates=["context"], split=SPLIT)
    model = Ridge()
    trainer = _trainer(tmp_path, max_epochs=1, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    written = pd.read_csv(tmp_path / "test" / "conditions.csv")
    table = written[written["model"] == "Ridge"].set_index(["condition", "context"]).sort_index()
    assert list(dict.fromkeys(written["model"]))[-3:] == ["split-half ceiling", "technical duplicate", "interpolated duplicate"]

    predicted = model.predict(adata[adata.obs["perturbation"] == "control"].copy(), ["G4", "G0+G1", "G2+G3"], pseudobulk=True)
    label = adata.obs["perturbation"]
    held_out = adata[label.isin(["control", *table.index.get_level_values(0)])].copy()
    training = adata[label.isin(["control", *SPLIT["train"]])].copy()
    found = evaluate(predicted, held_out, training=training, columns=Columns(covariates=["context"]), max_cells=0)
    other = found.table.set_index(["condition", "context"]).sort_index()
    assert set(table.index) == set(other.index)
    assert set(other) - set(table) == {"n_cells_predicted"}
    for metric in set(FILE_METRICS) & set(table):
        if metric != "cell_variance_recovery":  # of moved controls here, of one profile for each condition there
            np.testing.assert_allclose(table[metric], other[metric], atol=2e-5, err_msg=metric)
    for here, there in (("NoChange", "no change"), ("TrainingMean", "training mean"), ("Additive", "additive"), ("KNN", "knn")):
        mine = written[written["model"] == here].set_index(["condition", "context"]).sort_index()
        theirs = found.scores[there].set_index(["condition", "context"]).sort_index()
        np.testing.assert_allclose(mine["pearson_delta"], theirs["pearson_delta"], atol=2e-5, err_msg=here)
        np.testing.assert_allclose(mine["mse"], theirs["mse"], atol=1e-6, err_msg=here)


def test_the_folder_holds_changes_and_what_the_data_were(make_adata: Callable[..., AnnData], tmp_path: Path) -> None:
    adata = make_adata(cells_per_condition=14, n_controls=40)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    data = perturbzoo.PerturbSeqDataModule(path=str(tmp_path / "screen.h5ad"), split=SPLIT)
    model = Additive()
    trainer = _trainer(tmp_path, max_epochs=1, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    folder = tmp_path / "test"
    assert {path.name for path in folder.iterdir()} == {"conditions.csv", "summary.csv", "deltas.h5ad", "data.json"}
    deltas, bulks = anndata.read_h5ad(folder / "deltas.h5ad"), model.test_bulks
    np.testing.assert_allclose(deltas.X, bulks.observed - bulks.control, atol=1e-6)
    np.testing.assert_allclose(deltas.layers["predicted"], bulks.predicted - bulks.control, atol=1e-6)
    cells = [data.expression[data.index.cells_by_pair[pair]].toarray() for pair in bulks.pair]
    errors = [of.std(axis=0, ddof=1) / np.sqrt(len(of)) for of in cells]
    np.testing.assert_allclose(deltas.layers["observed_error"], errors, atol=1e-5)
    np.testing.assert_array_equal(deltas.layers["floor:NoChange"], 0.0)
    assert {"floor:TrainingMean", "floor:Ridge", "floor:KNN"} <= set(deltas.layers)
    assert "floor:Additive" not in deltas.layers  # the tested model is no floor of its own
    table = pd.read_csv(folder / "conditions.csv")
    assert table["model"].iloc[0] == "Additive"
    own = table[table["model"] == "Additive"]
    assert deltas.obs["condition"].tolist() == own["condition"].tolist()
    assert deltas.obs["n_cells"].tolist() == own["n_cells"].tolist()
    said = json.loads((folder / "data.json").read_text())
    assert said["source"] == "screen.h5ad"
    assert (said["genes"], said["cells"], said["controls"]) == (adata.n_vars, adata.n_obs, 40)
    assert said["conditions"] == {"train": 3, "val": 1, "test": 2}
    assert said["model"] == "Additive"


def test_the_ceiling_does_not_choose_its_genes_by_both_halves(make_adata: Callable[..., AnnData], tmp_path: Path) -> None:
    """In pure noise a half says nothing of the other's largest differences: half of the directions are right."""
    adata = make_adata(n_genes=300, cells_per_condition=40, n_controls=400)
    generator = np.random.default_rng(0)
    adata.X = sparse.csr_matrix(generator.poisson(3.0, adata.shape).astype(np.float32))
    split = {"method": "explicit", "train": ["G0"], "val": [], "test": ["G1", "G2", "G3", "G4", "G0+G1", "G1+G2", "G3+G4"]}
    data = perturbzoo.PerturbSeqDataModule.from_anndata(adata, split=split)
    model = Additive()
    trainer = _trainer(tmp_path, max_epochs=1, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(model, datamodule=data)
    scores = score_predictions(data, _observed(data), {})["technical duplicate"]
    # both halves are measured from the same controls, whose noise they share: somewhat above .5, by far not what both would choose
    assert 0.35 < scores["direction_top20_de"].mean() < 0.65
    assert len(scores) == 7


def _observed(data: perturbzoo.PerturbSeqDataModule) -> Pseudobulks:
    pairs = data.pairs_of("test")
    groups = [data.index.cells_by_pair[pair] for pair in pairs]
    mean, variance = data.moments(groups)
    context = data.index.context_of_pair[pairs]
    control = data.control_mean[context]
    return Pseudobulks(pairs, context, control, mean, control, variance, np.array([len(group) for group in groups]))


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
