"""Prediction from a checkpoint: the same numbers by every way, for the cells and conditions that were asked for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from prediction_setting import CONTEXTS, N_CONTROLS, Doubling, Trained, command, data_module, expression, trainer

import perturbzoo
from perturbzoo import PerturbSeqDataModule, prediction
from perturbzoo.cli import main
from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.models import find_model

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


@pytest.mark.parametrize("name", ["Transformer", "Ensemble"])
def test_a_change_that_all_cells_share_is_computed_once(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """For each distinct condition and context, however many cells and chunks; the numbers are those of ``forward``."""
    small = {"width": 8, "layers": 1, "heads": 2, "max_genes": 16, "lr": 0.01}
    ensemble = {"model": "Transformer", "arguments": small, "members": 2}
    model: Any = find_model(name)(**(small if name == "Transformer" else ensemble))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path).fit(model, data_module(trained.screen))
    assert model.changes_cells_alike
    monkeypatch.setattr(prediction, "_CHUNK_VALUES", 7 * 30)  # 7 rows at a time: chunks end within conditions
    monkeypatch.setattr(prediction, "_REQUESTS", 3)
    computed = []
    of_pairs = model.delta
    monkeypatch.setattr(model, "delta", lambda table, control: computed.append(len(table)) or of_pairs(table, control))
    predicted = model.predict(trained.screen, "G0,G1,G3,G0+G1,G2+G3")
    assert sum(computed) == 5 * len(CONTEXTS)
    assert predicted.n_obs == 5 * len(CONTEXTS) * N_CONTROLS

    monkeypatch.setattr(type(model), "changes_cells_alike", False)
    by_cell = model.predict(trained.screen, "G0,G1,G3,G0+G1,G2+G3")
    np.testing.assert_allclose(by_cell.X, predicted.X, rtol=0, atol=1e-5)
    assert np.abs(predicted.layers["delta"]).max() > 0.1


def test_a_test_on_another_file_does_not_change_how_controls_are_read(trained: Trained) -> None:
    model = perturbzoo.load(trained.gears)
    before = dict(model.data_arguments)
    other = trained.adata.copy()
    other.obs = other.obs.rename(columns={"perturbation": "label"})
    data = PerturbSeqDataModule.from_anndata(other, condition_key="label", covariates=["context"])
    trainer(trained.folder).test(model, data, verbose=False)
    assert model.data_arguments == before


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


def test_unseen_context_is_predicted_from_its_own_controls(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    controls = trained.controls()
    controls.obs["context"] = controls.obs["context"].astype(str).replace("b", "c")
    controls.write_h5ad(tmp_path / "controls.h5ad")
    given = {"ckpt_path": trained.additive, "controls": tmp_path / "controls.h5ad", "conditions": "G0"}
    main(command(trained, tmp_path / "predicted.h5ad", **given))
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 1
    assert warned[0].startswith(f"warning: {tmp_path / 'controls.h5ad'}: c: never seen in training")
    predicted = anndata.read_h5ad(tmp_path / "predicted.h5ad")
    assert predicted.obs["context"].value_counts().to_dict() == {"a": N_CONTROLS, "c": N_CONTROLS}
    model = perturbzoo.load(trained.additive)
    control = expression(trained.adata, model.get_spec().depth).loc[predicted.obs["control_cell"]]
    np.testing.assert_allclose(predicted.X - predicted.layers["delta"], control, rtol=0, atol=1e-5)
    # where a context is new, the single counts as in the mean context
    known = model.predict(trained.screen, "G0", pseudobulk=True).layers["delta"]
    new = predicted[predicted.obs["context"] == "c"].layers["delta"]
    np.testing.assert_allclose(new, np.broadcast_to(known.mean(axis=0), new.shape), rtol=0, atol=1e-5)


def test_order_of_genes_does_not_matter(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    genes = np.random.default_rng(0).permutation(trained.adata.n_vars)
    trained.adata[:, genes].write_h5ad(tmp_path / "shuffled.h5ad")
    main(command(trained, tmp_path / "predicted.h5ad", controls=tmp_path / "shuffled.h5ad"))
    assert len(capsys.readouterr().err.splitlines()) == 1
    predicted = anndata.read_h5ad(tmp_path / "predicted.h5ad")
    expected = perturbzoo.load(trained.gears).predict(trained.screen, "G0+G2,G3")
    assert predicted.var_names.tolist() == expected.var_names.tolist()
    np.testing.assert_allclose(predicted.X, expected.X, rtol=0, atol=1e-6)


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
