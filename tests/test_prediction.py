"""Prediction from a checkpoint: the same numbers by every way, whole files or none, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

import perturbzoo
from perturbzoo import PerturbSeqDataModule, prediction
from perturbzoo.cli import main
from perturbzoo.data.batch import PerturbationBatch
from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.models.base import PerturbationModel, Prediction
from perturbzoo.models.baselines import Additive
from perturbzoo.models.gears import GEARS

CONDITIONS = ("G0", "G1", "G2", "G3", "X", "G0+G1", "G1+G2")
SPLIT = {"method": "explicit", "test": "G3,G1+G2"}
CONTEXTS = ("a", "b")
N_CONTROLS = 30


@dataclass
class Trained:
    """A screen in two contexts, as a file and in memory, and models trained on it."""

    folder: Path
    adata: anndata.AnnData
    screen: Path
    gears: Path
    additive: Path

    def controls(self, context: str | None = None) -> anndata.AnnData:
        chosen = self.adata.obs["perturbation"] == "control"
        if context is not None:
            chosen &= self.adata.obs["context"] == context
        return self.adata[chosen.to_numpy()].copy()


def data_module(screen: Path, **arguments: Any) -> PerturbSeqDataModule:
    return PerturbSeqDataModule(str(screen), covariates=["context"], split=SPLIT, cells_per_condition=8, **arguments)


def trainer(folder: Path) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


@pytest.fixture(scope="module")
def trained(make_adata: Callable[..., anndata.AnnData], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("prediction")
    adata = make_adata(conditions=CONDITIONS, contexts=CONTEXTS, cells_per_condition=12, n_controls=N_CONTROLS)
    screen, graph = folder / "screen.h5ad", folder / "edges.csv"
    adata.write_h5ad(screen)
    pd.DataFrame({"source": ["G0", "G1"], "target": ["NEW", "G2"], "weight": [1.0, 0.5]}).to_csv(graph, index=False)
    seed_everything(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gears = GEARS(hidden=4, uncertainty=True, lr=0.05, perturbation_graph=[{"kind": "edges", "path": str(graph)}])
        trainer(folder / "gears").fit(gears, data_module(screen))
        trainer(folder / "additive").fit(Additive(), data_module(screen))
    checkpoints = [folder / name / "checkpoints" / "last.ckpt" for name in ("gears", "additive")]
    return Trained(folder, adata, screen, *checkpoints)


def command(trained: Trained, to: Path | str, *options: str, **given: Any) -> list[str]:
    """A command line; `given` replaces what it says by default."""
    settings = {"ckpt_path": trained.gears, "controls": trained.screen, "conditions": "G0+G2,G3", "output": to} | given
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return ["predict", *arguments, *options]


def expression(adata: anndata.AnnData, depth: float) -> pd.DataFrame:
    """log1p-normalised expression, from the formula."""
    counts = np.asarray(adata.X.todense())
    return pd.DataFrame(np.log1p(counts / counts.sum(axis=1, keepdims=True) * depth), adata.obs_names, adata.var_names)


# ---------------------------------------------------------------------------------------------- the same numbers


def test_command_line_python_and_formula_agree(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command(trained, tmp_path / "predicted.h5ad"))
    assert capsys.readouterr().err == ""
    written = anndata.read_h5ad(tmp_path / "predicted.h5ad")
    model = perturbzoo.load(trained.gears)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predicted = model.predict(trained.adata, ["G0+G2", "G3"])

    np.testing.assert_allclose(written.X, predicted.X, rtol=0, atol=1e-6)
    for layer in ("delta", "std"):
        np.testing.assert_allclose(written.layers[layer], predicted.layers[layer], rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(written.obs, predicted.obs)
    assert written.var_names.tolist() == list(trained.adata.var_names)

    # every control cell of both contexts under both conditions, and nothing else
    assert written.n_obs == 2 * 2 * N_CONTROLS
    expected = {(condition, cell) for condition in ("G0+G2", "G3") for cell in trained.controls().obs_names}
    assert set(zip(written.obs["condition"], written.obs["control_cell"], strict=True)) == expected
    source = trained.adata.obs.loc[written.obs["control_cell"]]
    assert written.obs["context"].tolist() == source["context"].tolist()
    # X is the control cell's expression and the change
    control = expression(trained.adata, model.get_spec().depth).loc[written.obs["control_cell"]]
    np.testing.assert_allclose(written.X - written.layers["delta"], control, rtol=0, atol=1e-5)
    # which is one for each condition and context, and so is its error
    for layer in ("delta", "std"):
        spread = written.to_df(layer).groupby([written.obs["condition"], written.obs["context"]], observed=True).std()
        assert spread.to_numpy().max() < 1e-6
    assert (written.layers["std"] > 0).all()
    assert np.abs(written.layers["delta"]).max() > 0.1


def test_additive_prediction_is_the_sum_of_the_singles(trained: Trained) -> None:
    model = perturbzoo.load(trained.additive)
    predicted = model.predict(str(trained.screen), "G0+G2")
    values = expression(trained.adata, model.get_spec().depth)
    obs = trained.adata.obs
    for context in CONTEXTS:
        here = obs["context"] == context

        def mean(label: str, here: pd.Series = here) -> np.ndarray:
            return values[here & (obs["perturbation"] == label)].mean().to_numpy()

        expected = mean("G0") + mean("G2") - 2 * mean("control")
        delta = predicted[predicted.obs["context"] == context].layers["delta"]
        np.testing.assert_allclose(delta, np.broadcast_to(expected, delta.shape), rtol=0, atol=1e-5)


def test_trainer_predicts_the_same_numbers(trained: Trained) -> None:
    model, data = perturbzoo.load(trained.gears), data_module(trained.screen)
    batches = trainer(trained.folder).predict(model, data)
    data.setup()
    predicted = model.predict(trained.screen, ["G3", "G1+G2"])
    rows = {key: row for row, key in enumerate(zip(predicted.obs["condition"], predicted.obs["control_cell"], strict=True))}
    seen = 0
    for batch, prediction_ in zip(data.predict_dataloader(), batches, strict=True):
        names = [str(data.conditions[pair]) for pair in batch.table.pair[batch.row].tolist()]
        cells = data._screen.obs.index[batch.control_cell.numpy()]
        found = [rows[key] for key in zip(names, cells, strict=True)]
        np.testing.assert_allclose(prediction_.mean, predicted.X[found], rtol=0, atol=1e-6)
        np.testing.assert_allclose(prediction_.variance.sqrt(), predicted.layers["std"][found], rtol=0, atol=1e-6)
        seen += len(found)
    assert seen == 2 * 2 * 12  # the cells of both test conditions in both contexts


def test_chunks_do_not_show(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = perturbzoo.load(trained.gears)
    conditions = "G0,G1,G2,G3,X,G0+G1,G0+G2,G0+G3,G1+G3,G2+G3,NEW"
    whole = model.predict(trained.screen, conditions)
    monkeypatch.setattr(prediction, "_CHUNK_VALUES", 7 * 30)  # 7 rows at a time: chunks end within conditions
    monkeypatch.setattr(prediction, "_REQUESTS", 3)
    file = prediction.write_predictions(model, trained.screen, conditions, tmp_path / "chunks.h5ad")
    chunked = anndata.read_h5ad(file)
    assert chunked.n_obs == 11 * 2 * N_CONTROLS
    for name in (None, "delta", "std"):
        pd.testing.assert_frame_equal(chunked.to_df(name), whole.to_df(name), rtol=0, atol=1e-6)


def test_file_reads_back_everywhere(trained: Trained, tmp_path: Path) -> None:
    import scanpy

    model = perturbzoo.load(trained.gears)
    file = prediction.write_predictions(model, trained.screen, "G0,G3", tmp_path / "predicted.h5ad")
    whole = scanpy.read_h5ad(file)
    backed = anndata.read_h5ad(file, backed="r")
    assert backed.isbacked
    chosen = (backed.obs["condition"] == "G3").to_numpy()
    np.testing.assert_array_equal(backed[chosen].X, whole.X[chosen])
    np.testing.assert_array_equal(backed[chosen].to_memory().layers["delta"], whole.layers["delta"][chosen])
    backed.file.close()
    provenance = whole.uns["perturbzoo"]
    assert provenance["model"] == "GEARS"
    assert provenance["version"] == perturbzoo.__version__
    assert len(bytes.fromhex(provenance["data_hash"])) == 32
    # another model of the same data, the same hash; other data, another
    other = perturbzoo.load(trained.additive).predict(trained.screen, "G0")
    assert other.uns["perturbzoo"]["data_hash"] == provenance["data_hash"]
    assert "std" not in other.layers
    whole.write_h5ad(tmp_path / "copy.h5ad")
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "copy.h5ad").X, whole.X)


def test_predicting_leaves_model_and_controls_as_they_were(trained: Trained) -> None:
    model = perturbzoo.load(trained.gears)
    model.train()
    before = trained.adata.copy()
    model.predict(trained.adata, "G0")
    assert model.training
    assert (trained.adata.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(trained.adata.obs, before.obs)


# ---------------------------------------------------------------------------------------------- which cells


def test_file_of_control_cells_alone(trained: Trained, tmp_path: Path) -> None:
    model = perturbzoo.load(trained.gears)
    expected = model.predict(trained.screen, "G0")
    controls = trained.controls()
    labelled = model.predict(controls, "G0")
    controls.obs = controls.obs.drop(columns="perturbation")
    controls.write_h5ad(tmp_path / "controls.h5ad")
    for predicted in (labelled, model.predict(tmp_path / "controls.h5ad", "G0")):
        np.testing.assert_allclose(predicted.X, expected.X, rtol=0, atol=1e-6)
        assert predicted.obs["control_cell"].tolist() == expected.obs["control_cell"].tolist()


def test_controls_on_disk_are_read_as_in_memory(trained: Trained) -> None:
    model = perturbzoo.load(trained.gears)
    backed = anndata.read_h5ad(trained.screen, backed="r")
    expected = model.predict(trained.adata, "G0")
    np.testing.assert_array_equal(model.predict(backed, "G0").X, expected.X)
    backed.file.close()
    dense = trained.adata.copy()
    dense.X = dense.X.toarray()
    np.testing.assert_allclose(model.predict(dense, "G0").X, expected.X, rtol=0, atol=1e-6)


def test_drawn_cells(trained: Trained) -> None:
    model = perturbzoo.load(trained.gears)

    def drawn(conditions: str, **options: Any) -> pd.DataFrame:
        return model.predict(trained.screen, conditions, **options).obs

    first = drawn("G0,G1", n_cells=20, seed=1)
    assert (first.groupby(["condition", "context"], observed=True).size() == 20).all()
    assert not first.duplicated(["condition", "control_cell"]).any()
    pd.testing.assert_frame_equal(first, drawn("G0,G1", n_cells=20, seed=1))
    assert set(first["control_cell"]) != set(drawn("G0,G1", n_cells=20, seed=2)["control_cell"])
    # the same cells under every condition, whatever else is asked for
    by_condition = [first.loc[first["condition"] == name, "control_cell"].tolist() for name in ("G0", "G1")]
    assert by_condition[0] == by_condition[1] == drawn("G3", n_cells=20, seed=1)["control_cell"].tolist()
    with pytest.warns(PerturbZooWarning, match="there are 30 control cells of a, fewer than n_cells 300"):
        many = drawn("G0", n_cells=300)
    assert len(many) == 600
    assert set(many["control_cell"]) == set(trained.controls().obs_names)


def test_pseudobulk_is_the_mean_of_the_cells(trained: Trained, tmp_path: Path) -> None:
    main(command(trained, tmp_path / "bulk.h5ad", "--pseudobulk"))
    bulk = anndata.read_h5ad(tmp_path / "bulk.h5ad")
    cells = perturbzoo.load(trained.gears).predict(trained.screen, "G0+G2,G3")
    assert bulk.obs[["condition", "context"]].to_numpy().tolist() == [
        [condition, context] for condition in ("G0+G2", "G3") for context in CONTEXTS
    ]
    assert bulk.obs["control_cell"].tolist() == [f"mean of {N_CONTROLS} control cells, {context}" for context in CONTEXTS] * 2
    for name in (None, "delta", "std"):
        mean = cells.to_df(name).groupby([cells.obs["condition"], cells.obs["context"]], observed=True, sort=False).mean()
        np.testing.assert_allclose(bulk.to_df(name), mean, rtol=0, atol=1e-5)


class Doubling(PerturbationModel):
    """Doubles every cell: what it predicts depends on the cell, and so does its error."""

    def build(self) -> None:
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, batch: PerturbationBatch) -> Prediction:
        assert len(batch.table) <= 4
        return Prediction(self.factor * batch.control, batch.control.square())


@pytest.fixture
def doubling(trained: Trained) -> Doubling:
    model = Doubling()
    model.spec = perturbzoo.load(trained.gears).get_spec()
    model.configure_model()
    return model


def test_model_of_whole_cells(trained: Trained, doubling: Doubling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "_CHUNK_VALUES", 11 * 30)
    cells = doubling.predict(trained.screen, "G0,G1")
    control = expression(trained.adata, doubling.get_spec().depth).loc[cells.obs["control_cell"]]
    np.testing.assert_allclose(cells.X, 2 * control, rtol=1e-5)
    np.testing.assert_allclose(cells.layers["delta"], control, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cells.layers["std"], control, rtol=1e-5)
    bulk = doubling.predict(trained.screen, "G0,G1", pseudobulk=True)
    assert bulk.shape == (4, 30)
    for name in (None, "delta", "std"):
        mean = cells.to_df(name).groupby([cells.obs["condition"], cells.obs["context"]], observed=True).mean()
        np.testing.assert_allclose(bulk.to_df(name), mean, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------- which conditions


def test_table_of_conditions(trained: Trained, tmp_path: Path) -> None:
    table = tmp_path / "conditions.csv"
    table.write_text("condition,dose,context\nG0,0,a\nG0+G1,,\nG1+G0,1+0.5,b\n")
    main(command(trained, tmp_path / "predicted.h5ad", conditions=table))
    predicted = anndata.read_h5ad(tmp_path / "predicted.h5ad")
    bulk = predicted.to_df("delta").groupby([predicted.obs["condition"], predicted.obs["context"]], observed=True, sort=False)
    deltas = bulk.mean()
    # an empty covariate is every level, an empty dose the usual one; doses follow the order of the label
    assert deltas.index.tolist() == [("G0@0", "a"), ("G0+G1", "a"), ("G0+G1", "b"), ("G0@0.5+G1", "b")]
    assert (deltas.loc[("G0@0", "a")] == 0).all()  # dose 0 is no act
    frame = pd.read_csv(table)
    again = perturbzoo.load(trained.gears).predict(trained.screen, frame)
    np.testing.assert_allclose(again.X, predicted.X, rtol=0, atol=1e-6)


def test_control_is_predicted_unchanged(trained: Trained) -> None:
    for checkpoint in (trained.gears, trained.additive):
        predicted = perturbzoo.load(checkpoint).predict(trained.screen, "control")
        assert (predicted.obs["condition"] == "control").all()
        assert (predicted.layers["delta"] == 0).all()


def test_condition_named_twice_is_predicted_once(trained: Trained) -> None:
    model = perturbzoo.load(trained.gears)
    once = model.predict(trained.screen, "G0+G1,G3")
    with pytest.warns(PerturbZooWarning, match=r"conditions: G0\+G1, G3:knockout named more than once, predicted once"):
        twice = model.predict(trained.screen, ["G0+G1", "G1+G0", "G3", "G3:knockout"])
    pd.testing.assert_frame_equal(twice.obs, once.obs)
    # named for one context and then for all: only what is new is added
    table = pd.DataFrame({"condition": ["G0", "G0"], "context": ["b", None]})
    assert model.predict(trained.screen, table, n_cells=1).obs["context"].tolist() == ["b", "a"]


def test_targets_of_the_test_split_are_known(trained: Trained) -> None:
    predicted = perturbzoo.load(trained.additive).predict(trained.screen, "G3,X+G2")
    assert predicted.obs["condition"].cat.categories.tolist() == ["G2+X", "G3"]


def test_target_never_named(trained: Trained) -> None:
    with pytest.raises(PerturbZooError, match=r"'G11': target 'G11' was never named in the training data; did you mean 'G1'"):
        perturbzoo.load(trained.additive).predict(trained.screen, "G11")
    with pytest.raises(PerturbZooError, match=r"target 'NEW' was never named in the training data\. A target"):
        perturbzoo.load(trained.additive).predict(trained.screen, "NEW")
    # the graph of this model joins it to a trained target
    predicted = perturbzoo.load(trained.gears).predict(trained.screen, "NEW,G1+NEW")
    assert predicted.n_obs == 2 * 2 * N_CONTROLS
    with pytest.raises(PerturbZooError, match="target 'ELSE' was never named"):
        perturbzoo.load(trained.gears).predict(trained.screen, "ELSE")


def test_time_window_is_ignored_aloud(trained: Trained) -> None:
    model = perturbzoo.load(trained.gears)
    with pytest.warns(PerturbZooWarning, match=r"GEARS has no time: the windows of G0\[2,6\] are ignored"):
        timed = model.predict(trained.screen, "G0[2,6]")
    np.testing.assert_array_equal(timed.X, model.predict(trained.screen, "G0").X)


# ---------------------------------------------------------------------------------------------- the file, whole or not at all

DISK_FULL = """
import resource, signal, sys
import perturbzoo.prediction, perturbzoo.models.gears  # importing them needs a temporary folder
from perturbzoo.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 20_000, 60_000):  # at once, in the table of cells, in the matrices
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        main(sys.argv[1:])
    except SystemExit as error:
        print(error.code)
"""


@pytest.mark.slow
def test_full_disk_leaves_nothing(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "predicted.h5ad"
    output.write_text("what was there before")
    # in a process of its own: HDF5 crashes at the end of the process if a write of its failed
    arguments = [sys.executable, "-c", DISK_FULL, *command(trained, output, conditions="G0,G1,G2,G3,X,G0+G1")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2", "2"]
    assert done.stderr.splitlines() == [f"error: {output}: could not be written: File too large"] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["predicted.h5ad"]
    assert output.read_text() == "what was there before"


@pytest.fixture
def no_permission(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):  # as root everything can be written, but not in the kernel's own file system
        yield Path("/proc/self")
    else:
        yield folder
    folder.chmod(0o755)


def test_folder_that_cannot_be_written(trained: Trained, no_permission: Path) -> None:
    with pytest.raises(PerturbZooError, match="could not be written"):
        prediction.write_predictions(perturbzoo.load(trained.gears), trained.screen, "G0", no_permission / "p.h5ad")


def test_interrupted_prediction_leaves_nothing(trained: Trained, doubling: Doubling, tmp_path: Path) -> None:
    output = tmp_path / "predicted.h5ad"
    output.write_text("what was there before")

    def interrupt(batch: PerturbationBatch) -> Prediction:
        raise KeyboardInterrupt

    doubling.forward = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        prediction.write_predictions(doubling, trained.screen, "G0", output)
    assert [path.name for path in tmp_path.iterdir()] == ["predicted.h5ad"]
    assert output.read_text() == "what was there before"


# ---------------------------------------------------------------------------------------------- bad input


def bad_files(trained: Trained, folder: Path) -> dict[str, Any]:
    """Files with something wrong, by name."""
    whole = trained.gears.read_bytes()
    (folder / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, folder / "other.ckpt")
    newer = torch.load(trained.gears, weights_only=True)
    newer["perturbzoo"] |= {"schema": 99, "version": "9.9"}
    torch.save(newer, folder / "newer.ckpt")
    (folder / "broken.h5ad").write_bytes(trained.screen.read_bytes()[:5000])
    perturbed = trained.adata[(trained.adata.obs["perturbation"] != "control").to_numpy()]
    perturbed.write_h5ad(folder / "perturbed.h5ad")
    (folder / "no_column.csv").write_text("name\nG0\n")
    (folder / "empty.csv").write_text("")
    (folder / "no_rows.csv").write_text("condition\n")
    (folder / "covariate.csv").write_text("condition,tissue\nG0,lung\n")
    (folder / "level.csv").write_text("condition,context\nG0,c\n")
    (folder / "dose.csv").write_text("condition,dose\nG0,much\n")
    (folder / "folder.h5ad").mkdir()
    return {name.name: name for name in folder.iterdir()}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"ckpt_path": "nowhere.ckpt"}, [], "nowhere.ckpt: no such checkpoint"),
        ({"ckpt_path": "truncated.ckpt"}, [], "truncated.ckpt: not a readable checkpoint (truncated or damaged?)"),
        ({"ckpt_path": "text.ckpt"}, [], "text.ckpt: not a readable checkpoint"),
        ({"ckpt_path": "other.ckpt"}, [], "other.ckpt: not a perturbzoo checkpoint"),
        ({"ckpt_path": "newer.ckpt"}, [], "perturbzoo 9.9 (schema 99), this version reads up to schema 1: upgrade"),
        ({}, ["--device", "abacus"], "device 'abacus' cannot be used here; give cpu"),
        ({"controls": "nowhere.h5ad"}, [], "nowhere.h5ad: no such file"),
        ({"controls": "broken.h5ad"}, [], "broken.h5ad: not a readable h5ad file (truncated or damaged?)"),
        ({"controls": "perturbed.h5ad"}, [], "perturbed.h5ad: no control cells: no cell is labelled as control in obs column"),
        ({"conditions": ""}, [], "a target is missing"),
        ({"conditions": "no_rows.csv"}, [], "conditions: none given"),
        ({"conditions": "empty.csv"}, [], "empty.csv is no table with a column 'condition'"),
        ({"conditions": "nowhere.csv"}, [], "nowhere.csv: no such file"),
        ({"conditions": "no_column.csv"}, [], "the table has no column 'condition'; it has name"),
        ({"conditions": "covariate.csv"}, [], "column 'tissue' is neither 'condition' nor 'dose' nor a covariate"),
        ({"conditions": "level.csv"}, [], "no control cells with context 'c'; there are some of a, b"),
        ({"conditions": "dose.csv"}, [], "dose 'much' is not a number"),
        ({"conditions": "G0+"}, [], "a target is missing"),
        ({}, ["--n_cells", "-3"], "n_cells is -3: give 1 or more"),
        ({}, ["--n_cells", "0"], "n_cells is 0: give 1 or more"),
        ({}, ["--n_cells", "3", "--pseudobulk"], "n_cells and pseudobulk exclude each other"),
        ({}, ["--seed", "-1"], "seed is -1: give 0 or more"),
        ({"output": "nowhere/predicted.h5ad"}, [], "nowhere does not exist"),
        ({"output": "predicted.csv"}, [], "give an output name that ends in .h5ad"),
        ({"output": "folder.h5ad"}, [], "a folder has that name"),
    ],
)
def test_mistakes_are_said_in_one_line(
    trained: Trained,
    tmp_path: Path,
    given: dict[str, str],
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = set(bad_files(trained, tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_status:
        main(command(trained, "predicted.h5ad", *options, **given))
    assert exit_status.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == before
