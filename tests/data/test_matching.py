"""A trained model's genes in another file: the same values whether the file is tested on or predicted from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import pytest
from scipy import sparse

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.query import read_query
from perturbzoo.errors import PerturbZooError

pytestmark = pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")

SPLIT = {"method": "explicit", "test": "G0"}


def trained_on(adata: anndata.AnnData, **arguments: Any) -> PerturbSeqDataModule:
    module = PerturbSeqDataModule.from_anndata(adata, split=SPLIT, **arguments)
    module.setup()
    return module


def read_to_test(adata: anndata.AnnData, trained: PerturbSeqDataModule, **arguments: Any) -> PerturbSeqDataModule:
    assert trained.spec is not None
    module = PerturbSeqDataModule.from_anndata(adata, **arguments)
    module.use_spec(trained.spec)
    module.setup()
    return module


def other_file(make_adata: Callable[..., Any]) -> anndata.AnnData:
    """Cells of another seed: three genes are missing, two others are there, and all stand in another order."""
    adata = make_adata(seed=3)
    extra = anndata.AnnData(sparse.csr_matrix(np.full((adata.n_obs, 2), 9, dtype=np.float32)), obs=adata.obs)
    extra.var_names = ["OTHER1", "OTHER2"]
    both = anndata.concat([adata, extra], axis=1, merge="same")
    kept = [gene for gene in both.var_names if gene not in ("G5", "G11", "G20")]
    return both[:, np.random.default_rng(0).permutation(kept)].copy()


@pytest.mark.parametrize("arguments", [{}, {"n_top_genes": 12}, {"size_factor_key": "n_umis"}])
def test_tested_on_is_read_as_predicted_from(make_adata: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Genes missing, added and moved; whatever is said of genes where the model is tested."""
    adata, other = make_adata(), other_file(make_adata)
    for each in (adata, other):
        each.obs["n_umis"] = np.random.default_rng(1).integers(100, 200, each.n_obs)
    trained = trained_on(adata, **arguments)
    assert trained.spec is not None
    query = read_query(other, trained.spec, {})
    module = read_to_test(other, trained)
    (rows,) = module.index.controls_by_context
    np.testing.assert_allclose(module.expression[rows].toarray(), query.values.toarray() + query.fill, rtol=1e-6)
    np.testing.assert_allclose(module.control_mean, query.control_mean, rtol=1e-5)
    batch = next(iter(module.test_dataloader()))
    of_cell = dict(zip(rows.tolist(), query.size_factor, strict=True))
    expected = [of_cell[cell] for cell in batch.control_cell.tolist()]
    np.testing.assert_allclose(batch.control_size_factor, expected, rtol=1e-6)


def test_the_same_file_again(make_adata: Callable[..., Any]) -> None:
    """Nothing is missing: the values are those that the model was trained on, of chosen genes too."""
    adata = make_adata()
    for arguments in ({}, {"n_top_genes": 12}):
        trained = trained_on(adata, **arguments)
        again = read_to_test(adata, trained)
        np.testing.assert_allclose(again.expression.toarray(), trained.expression.toarray(), rtol=1e-6)


def test_sizes_with_genes_missing(make_adata: Callable[..., Any]) -> None:
    """By hand: without the genes that make a third of the counts, a cell of 60 counts would have had 90."""
    adata = make_adata(n_genes=3, conditions=("G0",), cells_per_condition=30)
    adata.X = sparse.csr_matrix(np.full(adata.shape, 30, dtype=np.float32))
    trained = trained_on(make_adata_of(adata), min_cells=1)
    module = read_to_test(adata[:, ["G2", "G0"]].copy(), trained)
    batch = next(iter(module.test_dataloader()))
    np.testing.assert_allclose(batch.size_factor, 90.0, rtol=1e-6)
    np.testing.assert_allclose(batch.control, np.log1p(30.0), rtol=1e-5)
    np.testing.assert_allclose(batch.counts[:, [0, 2]], 30.0, rtol=1e-4)


def make_adata_of(adata: anndata.AnnData) -> anndata.AnnData:
    """The same cells with a second condition that can be trained on."""
    labels = adata.obs["perturbation"].to_numpy(copy=True).astype(object)
    perturbed = np.flatnonzero(labels == "G0")
    labels[perturbed[:15]] = "G1"
    more = adata.copy()
    more.obs["perturbation"] = labels
    return more


def test_no_gene_in_common(make_adata: Callable[..., Any]) -> None:
    other = make_adata()
    other.var_names = [f"ENSG{number}" for number in range(other.n_vars)]
    trained = trained_on(make_adata())
    with pytest.raises(PerturbZooError, match=r"none of its 30 genes \(ENSG0, .*of the same kind"):
        read_to_test(other, trained)


def test_another_value_space(make_adata: Callable[..., Any]) -> None:
    other = make_adata()
    other.X = other.X.log1p()
    trained = trained_on(make_adata())
    with pytest.raises(PerturbZooError, match="holds log1p values, the model was trained on counts"):
        read_to_test(other, trained)
