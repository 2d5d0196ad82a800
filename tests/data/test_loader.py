"""What reaches a model: batches read from a file, and the memory they are read into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.h5ad import read_cells
from perturbzoo.data.reading import keep_rows
from perturbzoo.errors import PerturbZooError

Factory = Callable[..., AnnData]


@pytest.fixture(scope="module")
def screen(make_adata: Factory) -> AnnData:
    return make_adata(contexts=("a", "b"), seed=3)


@pytest.fixture(scope="module", params=["condition", "grouped"])
def module(screen: AnnData, request: pytest.FixtureRequest) -> PerturbSeqDataModule:
    module = PerturbSeqDataModule.from_anndata(
        screen, covariates=["context"], cells_per_condition=6, conditions_per_batch=4, sampling=request.param, seed=0
    )
    module.setup()
    return module


def test_a_batch_holds_the_cells_it_names(screen: AnnData, module: PerturbSeqDataModule) -> None:
    counts = screen.X.toarray()
    depth = module.spec.depth
    expression = np.log1p(counts / counts.sum(axis=1, keepdims=True) * depth)
    labels, contexts = screen.obs["perturbation"].to_numpy(), screen.obs["context"].to_numpy()
    # kept in a list: a buffer that were used again while a batch is held would show
    batches = list(module.train_dataloader())
    for batch in batches:
        np.testing.assert_allclose(batch.expression, expression[batch.cell], rtol=1e-5)
        np.testing.assert_allclose(batch.control, expression[batch.control_cell], rtol=1e-5)
        np.testing.assert_array_equal(batch.counts, counts[batch.cell])
        np.testing.assert_array_equal(batch.control_counts, counts[batch.control_cell])
        np.testing.assert_allclose(batch.size_factor, counts.sum(axis=1)[batch.cell])
        pair = batch.table.pair.numpy()[batch.row]
        assert labels[batch.cell].tolist() == [str(module.conditions[p]) for p in pair]
        assert (labels[batch.control_cell] == "control").all()
        assert (contexts[batch.control_cell] == contexts[batch.cell]).all()
        assert [module.spec.contexts[c] for c in batch.table.context[batch.row]] == [(level,) for level in contexts[batch.cell]]
        for row, context in enumerate(batch.table.context):
            same = (labels == "control") & (contexts == module.spec.contexts[context][0])
            np.testing.assert_allclose(batch.context_control[row], expression[same].mean(axis=0), rtol=1e-5)


def test_a_training_loop_cycles_through_two_buffers(module: PerturbSeqDataModule) -> None:
    addresses = set()
    for batch in module.train_dataloader():
        addresses.add(batch.expression.data_ptr())
    # the loop holds one batch while the next is read
    assert len(addresses) == 2


def test_epochs_do_not_depend_on_those_before(module: PerturbSeqDataModule) -> None:
    def cells(*epochs: int) -> list[int]:
        loader = module.train_dataloader()
        for epoch in epochs:
            loader.sampler.set_epoch(epoch)
            found = [cell for batch in loader for cell in batch.cell.tolist()]
        return found

    assert cells(0, 1, 2) == cells(2)
    assert cells(2) != cells(1)


def test_every_control_is_drawn_equally_often(screen: AnnData) -> None:
    module = PerturbSeqDataModule.from_anndata(screen, cells_per_condition=20, seed=0)
    module.setup()
    sampler = module.train_dataloader().sampler
    drawn = []
    for epoch in range(40):
        sampler.set_epoch(epoch)
        drawn += [batch.controls for batch in sampler]
    count = np.bincount(np.concatenate(drawn), minlength=screen.n_obs)[(screen.obs["perturbation"] == "control").to_numpy()]
    # binomial: five standard deviations around the mean
    expected = count.mean()
    assert expected > 20
    assert np.abs(count - expected).max() < 5 * np.sqrt(expected)


# ---------------------------------------------------------------------- reading no more than is needed


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, np.float64])
@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("layer", [None, "counts"])
def test_one_matrix_of_any_type_is_read(
    make_adata: Factory, tmp_path: Path, dtype: type, index: type, layer: str | None
) -> None:
    adata = make_adata()
    counts = adata.X.astype(dtype)
    counts.indices, counts.indptr = counts.indices.astype(index), counts.indptr.astype(index)
    other = sparse.csr_matrix(np.full(adata.shape, 7.0, dtype=np.float32))
    adata.X, adata.layers["counts"] = (counts, other) if layer is None else (other, counts)
    adata.obsm["X_pca"] = np.zeros((adata.n_obs, 2))
    adata.write_h5ad(tmp_path / "screen.h5ad")
    read = read_cells(tmp_path / "screen.h5ad", layer)
    values = read.X if layer is None else read.layers[layer]
    assert values.dtype == np.float32
    assert values.indices.dtype == values.indptr.dtype == np.int32
    np.testing.assert_array_equal(values.toarray(), counts.toarray())
    assert read.obs.equals(anndata.read_h5ad(tmp_path / "screen.h5ad").obs)
    assert read.var_names.equals(adata.var_names)
    assert not read.obsm
    assert layer is None or read.X is None


@pytest.mark.parametrize("form", ["dense", "csc"])
def test_other_forms_are_read_by_anndata(make_adata: Factory, tmp_path: Path, form: str) -> None:
    adata = make_adata()
    counts = adata.X.toarray()
    adata.X = counts if form == "dense" else sparse.csc_matrix(counts)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    values = read_cells(tmp_path / "screen.h5ad", None).X
    np.testing.assert_array_equal(values if form == "dense" else values.toarray(), counts)


@pytest.mark.parametrize(("position", "value"), [(0, 30), (3, -1)])
def test_genes_that_do_not_exist_are_refused(make_adata: Factory, tmp_path: Path, position: int, value: int) -> None:
    adata = make_adata(n_genes=30)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    import h5py

    with h5py.File(tmp_path / "screen.h5ad", "r+") as opened:
        opened["X/indices"][position] = value
    with pytest.raises(PerturbZooError, match=r"screen.h5ad: not a readable h5ad file"):
        read_cells(tmp_path / "screen.h5ad", None)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_rows_are_kept_in_place(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # blocks of a few rows
    monkeypatch.setattr("perturbzoo.data.reading._BLOCK", 40)
    matrix = sparse.random(200, 30, density=0.2, format="csr", dtype=np.float32, random_state=0)
    rows = np.random.default_rng(0).random(200) < share
    expected, memory = matrix.toarray()[rows], matrix.data
    kept = keep_rows(matrix, rows)
    np.testing.assert_array_equal(kept.toarray(), expected)
    # scipy copies what is less than half of its memory, and lets go of the rest
    assert share < 0.5 or np.shares_memory(kept.data, memory)
