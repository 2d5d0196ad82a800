"""Control cells for prediction: read as the training cells were, whatever file they come in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.query import QueryCells, read_query
from perturbzoo.data.requests import read_conditions
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.perturbation import parse_condition

GENES = ("A", "B", "C", "D")
COUNTS = np.array([[4.0, 0, 1, 5], [0, 2, 2, 0], [1, 1, 1, 1], [8, 0, 0, 2]])
DEPTH = 20.0


def make_spec(**changes: Any) -> DataSpec:
    """Four genes, trained on counts; the model's control cells have 1, 2, 3 and 4 normalised counts of them."""
    spec = DataSpec(
        genes=GENES,
        targets=("A", "X"),
        default_kind="knockout",
        covariates={},
        match_on=(),
        contexts=((),),
        control_mean=np.log1p([[1.0, 2.0, 3.0, 4.0]]).astype(np.float32),
        value_space="counts",
        depth=DEPTH,
        size_factor_key=None,
        split="",
        training_pairs=(("A", 0),),
    )
    return replace(spec, **changes)


def make_controls(counts: np.ndarray = COUNTS, genes: tuple[str, ...] = GENES, **obs: Any) -> AnnData:
    names = [f"cell{number}" for number in range(len(counts))]
    values = sparse.csr_matrix(counts.astype(np.float32))
    return AnnData(values, obs=pd.DataFrame(obs, index=names), var=pd.DataFrame(index=list(genes)))


def read(controls: AnnData, spec: DataSpec | None = None, **data: Any) -> QueryCells:
    """Read without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_query(controls, spec or make_spec(), data)


def values_of(query: QueryCells) -> np.ndarray:
    return query.values.toarray() + query.fill


def normalised(counts: np.ndarray, depth: float = DEPTH) -> np.ndarray:
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * depth)


# ---------------------------------------------------------------------------------------------- genes


def test_values_follow_the_formula() -> None:
    query = read(make_controls())
    np.testing.assert_allclose(values_of(query), normalised(COUNTS), rtol=1e-6)
    np.testing.assert_array_equal(query.size_factor, COUNTS.sum(axis=1))
    np.testing.assert_allclose(query.control_mean, normalised(COUNTS).mean(axis=0, keepdims=True), rtol=1e-6)
    assert query.obs.index.tolist() == ["cell0", "cell1", "cell2", "cell3"]


def test_reordered_genes() -> None:
    order = [2, 0, 3, 1]
    controls = make_controls(COUNTS[:, order], tuple(GENES[gene] for gene in order))
    with pytest.warns(PerturbZooWarning, match="of the model's 4 genes 4 are there: 4 stand in another order") as warned:
        query = read_query(controls, make_spec(), {})
    assert len(warned) == 1
    np.testing.assert_array_equal(values_of(query), values_of(read(make_controls())))


def test_genes_of_others_are_ignored() -> None:
    counts = np.insert(COUNTS, 1, [100.0, 7, 0, 3], axis=1)
    controls = make_controls(counts, ("A", "OTHER", "B", "C", "D"))
    with pytest.warns(PerturbZooWarning, match="4 genes 4 are there: 1 others are ignored") as warned:
        query = read_query(controls, make_spec(), {})
    assert len(warned) == 1
    # also in the cells' totals: the training file did not have that gene
    np.testing.assert_array_equal(values_of(query), values_of(read(make_controls())))
    # of a file of which the model took some genes, all count
    with pytest.warns(PerturbZooWarning, match="are ignored"):
        chosen = read_query(controls, make_spec(genes_chosen=True), {})
    np.testing.assert_allclose(values_of(chosen), normalised(counts)[:, [0, 2, 3, 4]], rtol=1e-6)


def test_missing_genes_are_filled() -> None:
    controls = make_controls(COUNTS[:, [0, 1, 3]], ("A", "B", "D"))
    with pytest.warns(PerturbZooWarning, match="4 genes 3 are there: 1 are missing and filled with its mean control") as warned:
        query = read_query(controls, make_spec(), {})
    assert len(warned) == 1
    values = values_of(query)
    np.testing.assert_allclose(values[:, 2], np.log1p(3.0), rtol=1e-6)
    # of the model's 1 + 2 + 3 + 4 normalised counts, the three genes have 7
    np.testing.assert_allclose(values[:, [0, 1, 3]], normalised(COUNTS[:, [0, 1, 3]], depth=0.7 * DEPTH), rtol=1e-6)
    np.testing.assert_allclose(query.control_mean[0], values.mean(axis=0), rtol=1e-6)


def test_missing_genes_of_several_contexts_get_the_mean_over_them() -> None:
    means = np.log1p([[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 1.0, 1.0]]).astype(np.float32)
    spec = make_spec(
        covariates={"line": ("a", "b")}, match_on=("line",), contexts=(("a",), ("b",)), control_mean=means, value_space="log1p"
    )
    controls = make_controls(normalised(COUNTS)[:, :3], GENES[:3], line=["a", "b", "a", "b"])
    with pytest.warns(PerturbZooWarning, match="1 are missing"):
        query = read_query(controls, spec, {})
    np.testing.assert_allclose(query.fill, [0, 0, 0, means[:, 3].mean()], rtol=1e-6)
    np.testing.assert_allclose(values_of(query)[:, :3], normalised(COUNTS)[:, :3], rtol=1e-6)


def test_gene_names_in_a_column() -> None:
    controls = make_controls(genes=("ENSG1", "ENSG2", "ENSG3", "ENSG4"))
    controls.var["length"] = [10, 20, 30, 40]
    controls.var["symbol"] = pd.Categorical(GENES)
    np.testing.assert_array_equal(values_of(read(controls)), values_of(read(make_controls())))


def test_gene_names_by_the_table_of_the_training_data(tmp_path: Path) -> None:
    identifiers = tuple(f"ENSG0000000000{number}" for number in range(1, 5))
    table = tmp_path / "genes.csv"
    pd.DataFrame({"ensembl": identifiers, "symbol": GENES}).to_csv(table, index=False)
    query = read(make_controls(genes=identifiers), gene_table=str(table))
    np.testing.assert_array_equal(values_of(query), values_of(read(make_controls())))
    # it may be gone since
    with pytest.raises(PerturbZooError, match=r"none of its 4 genes \(ENSG00000000001, .*are the identifiers of the same kind"):
        read(make_controls(genes=identifiers), gene_table=str(tmp_path / "gone.csv"))
    np.testing.assert_array_equal(values_of(read(make_controls(), gene_table=str(tmp_path / "gone.csv"))), values_of(query))


def test_repeated_entries_of_a_sparse_matrix_count_together() -> None:
    doubled = sparse.csr_matrix(
        (np.array([1.0, 2.0, 7.0], dtype=np.float32), np.array([0, 0, 3]), np.array([0, 3])), shape=(1, 4)
    )
    controls = AnnData(doubled, var=pd.DataFrame(index=list(GENES)))
    np.testing.assert_allclose(values_of(read(controls)), normalised(np.array([[3.0, 0, 0, 7]])), rtol=1e-6)


# ---------------------------------------------------------------------------------------------- values


def test_layer_of_the_training_data() -> None:
    controls = make_controls()
    controls.layers["counts"] = controls.X.copy()
    controls.X = sparse.csr_matrix(normalised(COUNTS))
    query = read(controls, layer="counts")
    np.testing.assert_allclose(values_of(query), normalised(COUNTS), rtol=1e-6)
    # a file without that layer may hold the same in X
    np.testing.assert_array_equal(values_of(read(make_controls(), layer="counts")), values_of(query))


def test_size_factors_of_the_training_data() -> None:
    spec = make_spec(size_factor_key="n_umis")
    query = read(make_controls(n_umis=[10.0, 40, 20, 5]), spec)
    np.testing.assert_allclose(values_of(query), np.log1p(COUNTS / [[10.0], [40], [20], [5]] * DEPTH), rtol=1e-6)
    with pytest.raises(PerturbZooError, match=r"obs has no 'n_umis', the size factors .*; did you mean 'n_umi'"):
        read(make_controls(n_umi=[1, 1, 1, 1]), spec)


def test_another_value_space_is_refused() -> None:
    with pytest.raises(PerturbZooError, match="X holds log1p-normalised values, the model was trained on raw counts"):
        read(make_controls(normalised(COUNTS)))
    log1p = make_spec(value_space="log1p", depth=0.0)
    with pytest.raises(PerturbZooError, match="X holds raw counts, the model was trained on log1p-normalised values"):
        read(make_controls(), log1p)
    query = read(make_controls(normalised(COUNTS)), log1p)
    np.testing.assert_allclose(values_of(query), normalised(COUNTS), rtol=1e-6)
    assert (query.size_factor == 0).all()


def test_cells_without_counts_are_left_out() -> None:
    counts = COUNTS.copy()
    counts[1] = 0
    with pytest.warns(PerturbZooWarning, match="1 control cells without any count are left out"):
        query = read_query(make_controls(counts), make_spec(), {})
    assert query.obs.index.tolist() == ["cell0", "cell2", "cell3"]
    np.testing.assert_allclose(values_of(query), normalised(COUNTS[[0, 2, 3]]), rtol=1e-6)
    with pytest.raises(PerturbZooError, match="none of its 4 control cells has any count"):
        read(make_controls(np.zeros_like(COUNTS)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda adata: adata.X.data.__setitem__(0, np.nan), "X holds NaN or infinite values"),
        (lambda adata: adata.X.data.__setitem__(0, -1), "X holds negative values"),
        (lambda adata: setattr(adata, "var_names", ["A", "B", "B", "D"]), "1 names of genes occur more than once (B)"),
        (lambda adata: setattr(adata, "obs_names", ["x", "x", "y", "z"]), "1 names of cells occur more than once (x)"),
        (lambda adata: setattr(adata, "X", None), "X is missing"),
        (
            lambda adata: setattr(adata, "var_names", list("EFGH")),
            "none of its 4 genes (E, F, G and 1 more) is among the model's 4",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*not unique:UserWarning")
def test_bad_values_are_refused(change: Callable[[AnnData], None], message: str) -> None:
    controls = make_controls()
    change(controls)
    with pytest.raises(PerturbZooError) as refusal:
        read(controls)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------------------------------- cells


def test_only_control_cells_of_a_screen_are_read() -> None:
    # what is wrong with perturbed cells does not matter
    counts = np.where(np.array([[0], [0], [1], [0]]), np.nan, COUNTS)
    query = read(make_controls(counts, condition=["ctrl", "NT", "A", "A+ctrl"]))
    assert query.obs.index.tolist() == ["cell0", "cell1"]
    np.testing.assert_allclose(values_of(query), normalised(COUNTS[:2]), rtol=1e-6)


def test_controls_are_found_as_in_the_training_data() -> None:
    controls = make_controls(guide=["DMSO_DMSO", "x", "DMSO", "A"], condition=["control"] * 4)
    query = read(controls, condition_key="guide", control_labels=["DMSO"], separator="_")
    assert query.obs.index.tolist() == ["cell0", "cell2"]
    # without that column, another may tell
    assert len(read(make_controls(condition=["control", "A", "B", "C"]), condition_key="guide").obs) == 1
    with pytest.raises(
        PerturbZooError, match="no control cells: no cell is labelled as control in obs column guide; label them"
    ):
        read(controls, condition_key="guide")
    with pytest.raises(PerturbZooError, match="it holds no cells"):
        read(make_controls()[:0].copy())


def test_filter_of_the_training_cells() -> None:
    controls = make_controls(purity=[0.9, 0.1, 0.8, 0.2])
    assert read(controls, cell_filter="purity > .5").obs.index.tolist() == ["cell0", "cell2"]
    with pytest.raises(PerturbZooError, match="'purity > 1', the filter of the training cells, leaves no control cell"):
        read(controls, cell_filter="purity > 1")
    with pytest.warns(PerturbZooWarning, match="no column 'purity' .*; the filter of the training cells is not applied"):
        assert len(read_query(make_controls(), make_spec(), {"cell_filter": "purity > .5"}).obs) == 4


# ---------------------------------------------------------------------------------------------- contexts


TWO_LINES = {
    "covariates": {"line": ("a", "b"), "batch": ("1", "2")},
    "match_on": ("line",),
    "contexts": (("a",), ("b",)),
    "control_mean": np.ones((2, 4), dtype=np.float32),
}


def test_contexts_and_levels_are_the_models() -> None:
    query = read(make_controls(line=["b", "a", "b", "b"], batch=[2, 1, 1, 2]), make_spec(**TWO_LINES))
    assert query.contexts == [("a",), ("b",)]
    assert query.context.tolist() == [1, 0, 1, 1]
    assert query.known_context.tolist() == [0, 1]
    assert query.covariate.tolist() == [[1, 1], [0, 0], [1, 0], [1, 1]]
    expected = [normalised(COUNTS)[[1]].mean(axis=0), normalised(COUNTS)[[0, 2, 3]].mean(axis=0)]
    np.testing.assert_allclose(query.control_mean, expected, rtol=1e-6)


def test_new_levels_are_an_unseen_context() -> None:
    controls = make_controls(line=["b", "c", "c", "b"], batch=["1", "2", "3", "1"])
    with pytest.warns(
        PerturbZooWarning, match="c, batch 3: never seen in training; predicted from the control cells"
    ) as warned:
        query = read_query(controls, make_spec(**TWO_LINES), {})
    assert len(warned) == 1
    assert query.contexts == [("b",), ("c",)]
    assert query.known_context.tolist() == [1, -1]
    assert query.covariate.tolist() == [[1, 0], [-1, 1], [-1, -1], [1, 0]]
    np.testing.assert_allclose(query.control_mean[1], normalised(COUNTS)[1:3].mean(axis=0), rtol=1e-6)


def test_covariate_without_column() -> None:
    spec = make_spec(**TWO_LINES)
    with pytest.raises(PerturbZooError, match=r"obs has no column 'batch' .*covariate of the model"):
        read(make_controls(line=["a"] * 4), spec)
    # one of a single level says nothing new
    single = make_spec(**TWO_LINES | {"covariates": {"line": ("a", "b"), "batch": ("1",)}})
    query = read(make_controls(line=["a", "b", "a", "b"]), single)
    assert (query.obs["batch"] == "1").all()
    # contexts may be made of a column that is no input of the model
    matched = make_spec(match_on=("plate",), contexts=(("p",),))
    assert read(make_controls(), matched).contexts == [("p",)]
    with pytest.raises(PerturbZooError, match="obs has no column 'plate'"):
        read(make_controls(), make_spec(match_on=("plate",), contexts=(("p",), ("q",)), control_mean=np.ones((2, 4))))


def test_averaged_cells() -> None:
    controls = make_controls(line=["b", "a", "b", "a"], batch=["1", "2", "1", "1"])
    query = read(controls, make_spec(**TWO_LINES))
    averaged = query.averaged()
    np.testing.assert_array_equal(values_of(averaged), query.control_mean)
    assert averaged.obs.index.tolist() == ["mean of 2 control cells, a", "mean of 2 control cells, b"]
    assert averaged.size_factor.tolist() == [7.0, 7.0]
    # line a comes from two batches, so that its mean has none
    assert averaged.covariate.tolist() == [[0, -1], [1, 0]]
    assert averaged.obs.columns.tolist() == ["line"]


def test_whole_screen_is_read_as_the_data_module_reads_it(make_adata: Callable[..., AnnData]) -> None:
    adata = make_adata(contexts=("a", "b"), cells_per_condition=10, n_controls=20)
    adata.var["ensembl"] = [f"E{number}" for number in range(adata.n_vars)]
    adata.obs["purity"] = np.random.default_rng(0).random(adata.n_obs)
    options = {"covariates": ["context"], "cell_filter": "purity > .3", "min_cells": 2, "n_top_genes": 12}
    module = PerturbSeqDataModule.from_anndata(adata, split={"method": "explicit", "test": "G0"}, **options)
    module.setup()
    assert module.spec is not None
    with pytest.warns(PerturbZooWarning, match="others are ignored"):
        query = read_query(adata, module.spec, options)
    rows = np.concatenate(module.index.controls_by_context)
    assert sorted(query.obs.index) == sorted(module._screen.obs.index[rows])
    np.testing.assert_allclose(query.control_mean, module.spec.control_mean, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------- conditions


def test_conditions_as_text_list_and_table() -> None:
    pair, single = parse_condition("A+B"), parse_condition("C@2")
    expected = [(pair, {}), (single, {})]
    assert read_conditions("B+A,C@2") == expected
    assert read_conditions(["A+B", single]) == expected
    assert read_conditions(pair) == expected[:1]
    assert read_conditions(pd.DataFrame({"condition": ["A;B", "C"], "dose": [None, 2.0]})) == expected
    assert read_conditions("A_B,DMSO", "_", ["DMSO"]) == [(pair, {}), (parse_condition("control"), {})]


def test_table_of_conditions_keeps_text_as_it_is(tmp_path: Path) -> None:
    table = tmp_path / "conditions.tsv"
    table.write_text("condition\tline\tplate\nNA \t a\t01\nNone\t\t2\n")
    expected = [(parse_condition("NA"), {"line": "a", "plate": "01"}), (parse_condition("None"), {"plate": "2"})]
    assert read_conditions(str(table)) == expected
    assert read_conditions(table) == expected
