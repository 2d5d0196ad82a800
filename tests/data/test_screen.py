"""Screens: what is understood of a file's columns, values, genes and cells, in memory or from one file or several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbzoo.data import columns
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.screen import Columns, Screen, understand
from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.perturbation import Condition, Intervention

pytestmark = pytest.mark.filterwarnings("error::perturbzoo.errors.PerturbZooWarning")

Factory = Callable[..., anndata.AnnData]


def module_of(adata: anndata.AnnData, **arguments: object) -> PerturbSeqDataModule:
    """A data module of `adata`, set up; every condition but one trains unless a split is given."""
    arguments.setdefault("split", {"method": "explicit", "test": "G1+G2"})
    module = PerturbSeqDataModule.from_anndata(adata, **arguments)
    module.setup()
    return module


def read(adata: anndata.AnnData, **arguments: object) -> Screen:
    return understand(adata, Columns(**arguments), "the AnnData", own=False)


# ---------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("obs", "key"),
    [
        ({"condition": ["ctrl", "A+ctrl"], "cell_type": ["K562", "K562"]}, "condition"),  # GEARS
        ({"perturbation": ["control", "A_B"], "nperts": [0, 2]}, "perturbation"),  # scPerturb, pertpy
        ({"target_gene": ["non-targeting", "A"], "batch": ["1", "2"]}, "target_gene"),  # Virtual Cell Challenge
        ({"gene": ["non-targeting", "A"], "gem_group": [1, 2]}, "gene"),  # Replogle
        # a column of that name which names no control is something else: here, what the cells were stimulated with
        ({"condition": ["stim", "rest"], "perturbation": ["control", "A"]}, "perturbation"),
    ],
)
def test_condition_columns_of_the_usual_makers(obs: dict[str, list[object]], key: str) -> None:
    assert columns.find_condition_column(pd.DataFrame(obs), (), "file") == key


def test_control_labels_decide_between_columns() -> None:
    obs = pd.DataFrame({"condition": ["x", "y"], "drug": ["DMSO", "JQ1"]})
    assert columns.find_condition_column(obs, ["dmso"], "file") == "drug"


@pytest.mark.parametrize(
    ("value", "kind"),
    [("CRISPR-KO", "knockout"), ("CRISPRi (enhancer / TSS)", "interference"), ("CRISPRa", "activation"), ("drug", "compound")],
)
def test_kind_is_read(value: str, kind: str, make_adata: Factory) -> None:
    adata = make_adata()
    adata.obs["perturbation_type"] = value
    assert read(adata).kind == kind
    assert read(adata, kind="clamp").kind == "clamp"


def test_dose_column_gives_each_target_its_dose(make_adata: Factory) -> None:
    adata = make_adata(conditions=("G0", "G0+G1"))
    doses = {"control": "0", "G0": "0.5", "G0+G1": "1+2"}
    adata.obs["dose"] = adata.obs["perturbation"].astype(str).map(doses)
    # a screen of genes does not take a column of that name without being told
    assert {str(condition) for condition in read(adata).conditions} == {"control", "G0", "G0+G1"}
    wanted = [
        Condition(),
        Condition([Intervention("G0", dose=0.5)]),
        Condition([Intervention("G0"), Intervention("G1", dose=2)]),
    ]
    for arguments in ({"dose_key": "dose"}, {"kind": "compound"}):
        screen = read(adata, **arguments)
        assert set(screen.conditions) == set(wanted)
        controls = (adata.obs["perturbation"] == "control").to_numpy()
        np.testing.assert_array_equal(screen.is_control, controls)


def test_dose_columns_one_for_each_target(make_adata: Factory) -> None:
    adata = make_adata(conditions=("G0+G1",))
    adata.obs["first"], adata.obs["second"] = 3.0, 0.25
    found = read(adata, dose_key=["first", "second"]).conditions
    assert found[1] == Condition([Intervention("G0", dose=3), Intervention("G1", dose=0.25)])


def test_doses_reach_the_batch(make_adata: Factory) -> None:
    adata = make_adata(conditions=("G0", "G1"))
    adata.obs["dose"] = adata.obs["perturbation"].astype(str).map({"control": 1.0, "G0": 10.0, "G1": 20.0})
    module = module_of(adata, dose_key="dose", split={"method": "explicit", "test": "G1@20"})
    batch = next(iter(module.train_dataloader()))
    assert batch.table.dose.tolist() == [[10.0]]


def test_separator_of_combinations(make_adata: Factory) -> None:
    adata = make_adata(conditions=("G0", "G1+G0"))
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).str.replace("+", "_")
    assert [str(condition) for condition in read(adata).conditions] == ["control", "G0", "G1_G0"]
    assert [str(condition) for condition in read(adata, separator="_").conditions] == ["control", "G0", "G0+G1"]


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "storage",
    [
        lambda x: x.toarray(),
        lambda x: x.tocsc(),
        lambda x: x.astype(np.int64),
        lambda x: x.astype(np.float64),
        lambda x: x.toarray().astype(np.uint16),
        # every entry in two halves: a matrix may hold an entry twice, and it means their sum
        lambda x: sparse.csr_matrix((np.repeat(x.data / 2, 2), np.repeat(x.indices, 2), x.indptr * 2), shape=x.shape),
    ],
    ids=["dense", "csc", "int64", "float64", "dense uint16", "entries twice"],
)
def test_storage_makes_no_difference(storage: Callable[[sparse.csr_matrix], object], make_adata: Factory) -> None:
    plain, stored = make_adata(), make_adata()
    stored.X = storage(stored.X)
    first, second = read(plain), read(stored)
    assert (first.values != second.values).nnz == 0
    np.testing.assert_array_equal(first.size_factor, second.size_factor)
    assert second.value_space == "counts"


def test_backed_anndata_is_read(make_adata: Factory, tmp_path: Path) -> None:
    make_adata().write_h5ad(tmp_path / "screen.h5ad")
    backed = anndata.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    assert (read(backed).values != read(make_adata()).values).nnz == 0


def test_layer_is_used(make_adata: Factory) -> None:
    adata = make_adata()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.full(adata.shape, np.nan, dtype=np.float32)
    assert (read(adata, layer="counts").values != adata.layers["counts"]).nnz == 0
    adata.layers["scaled"] = -adata.layers["counts"]
    with pytest.raises(PerturbZooError, match="layer 'scaled' holds negative"):
        read(adata, layer="scaled")


def test_a_module_gives_log1p_at_the_median_depth_of_training_cells(make_adata: Factory) -> None:
    adata = make_adata()
    module = module_of(adata)
    counts = adata.X.toarray()
    training = (adata.obs["perturbation"] != "G1+G2").to_numpy()
    depth = np.median(counts[training].sum(axis=1))
    assert module.spec is not None
    assert module.spec.depth == pytest.approx(depth)
    batch = next(iter(module.test_dataloader()))
    cells = batch.cell.numpy()
    assert not training[cells].any()
    expected = np.log1p(counts[cells] / counts[cells].sum(axis=1, keepdims=True) * depth)
    np.testing.assert_allclose(batch.expression.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch.counts.numpy(), counts[cells])


def test_size_factor_column_replaces_total_counts(make_adata: Factory) -> None:
    adata = make_adata()
    adata.obs["total"] = np.arange(1.0, adata.n_obs + 1)
    module = module_of(adata, size_factor_key="total")
    training = (adata.obs["perturbation"] != "G1+G2").to_numpy()
    depth = np.median(adata.obs["total"][training])
    batch = next(iter(module.test_dataloader()))
    cells = batch.cell.numpy()
    expected = np.log1p(adata.X[cells].toarray() / (cells[:, None] + 1.0) * depth)
    np.testing.assert_allclose(batch.expression.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_log1p_values_stay_as_they_are(make_adata: Factory) -> None:
    adata = make_adata()
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray() / 3))
    module = module_of(adata)
    assert module.spec is not None
    assert (module.spec.value_space, module.spec.depth) == ("log1p", 0.0)
    batch = next(iter(module.test_dataloader()))
    np.testing.assert_array_equal(batch.expression.numpy(), adata.X[batch.cell.numpy()].toarray())


@pytest.mark.parametrize("storage", [lambda x: x, lambda x: x.toarray()], ids=["sparse", "dense"])
def test_the_users_anndata_is_not_changed(storage: Callable[[sparse.csr_matrix], object], make_adata: Factory) -> None:
    adata = make_adata(contexts=("a", "b"))
    if sparse.issparse(storage(adata.X)):
        # unsorted entries must not be sorted in the user's memory either
        adata.X = sparse.csr_matrix(adata.X[:, ::-1])
    else:
        adata.X = storage(adata.X)
    adata.obs["fraction"] = np.linspace(0, 1, adata.n_obs)
    before = adata.copy()
    arrays = (
        [adata.X.data.copy(), adata.X.indices.copy(), adata.X.indptr.copy()] if sparse.issparse(adata.X) else [adata.X.copy()]
    )
    module = module_of(
        adata, covariates=["context"], cell_filter="fraction > .1", split={"method": "random", "seed": 1}, n_top_genes=20
    )
    for batch in module.train_dataloader():
        batch.expression.fill_(-1.0)
    now = [adata.X.data, adata.X.indices, adata.X.indptr] if sparse.issparse(adata.X) else [adata.X]
    for first, second in zip(arrays, now, strict=True):
        np.testing.assert_array_equal(first, second)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert (list(adata.uns), list(adata.layers)) == (list(before.uns), list(before.layers))


# ---------------------------------------------------------------------- genes


def test_gene_key_names_the_genes(make_adata: Factory) -> None:
    adata = make_adata()
    symbols = adata.var_names.tolist()
    adata.var["symbol"] = symbols
    adata.var_names = [f"ENSG{number:011d}" for number in range(adata.n_vars)]
    assert read(adata).genes[0] == "ENSG00000000000"
    assert read(adata, gene_key="symbol").genes == symbols


def test_gene_key_gets_around_duplicates_in_the_index(make_adata: Factory) -> None:
    adata = make_adata()
    adata.var["symbol"] = adata.var_names.tolist()
    adata.var_names = ["same"] * adata.n_vars
    with pytest.raises(PerturbZooError, match="gene_key"):
        read(adata)
    assert read(adata, gene_key="symbol").genes == adata.var["symbol"].tolist()


def test_gene_table_translates(make_adata: Factory, tmp_path: Path) -> None:
    adata = make_adata()
    symbols = adata.var_names.tolist()
    ensembl = [f"ENSG{number:011d}" for number in range(adata.n_vars)]
    pd.DataFrame({"gene_id": ensembl, "gene_name": symbols}).to_csv(tmp_path / "genes.csv", index=False)
    adata.var_names = ensembl
    assert read(adata, gene_table=str(tmp_path / "genes.csv")).genes == symbols


# ---------------------------------------------------------------------- several files


@pytest.fixture
def two_files(make_adata: Factory, tmp_path: Path) -> tuple[list[str], anndata.AnnData, anndata.AnnData]:
    """Files with genes G0..G19 and, in another order, G29..G20 and G0..G9; the same cell names in both."""
    first, second = make_adata()[:, :20].copy(), make_adata(seed=1)[:, [*range(29, 19, -1), *range(10)]].copy()
    paths = [str(tmp_path / name) for name in ("first.h5ad", "second.h5ad")]
    for adata, path in zip((first, second), paths, strict=True):
        adata.write_h5ad(path)
    return paths, first, second


TwoFiles = tuple[list[str], anndata.AnnData, anndata.AnnData]


@pytest.mark.parametrize("join", ["intersection", "union"])
def test_genes_of_two_files(join: str, two_files: TwoFiles, capsys: pytest.CaptureFixture[str]) -> None:
    paths, first, second = two_files
    module = PerturbSeqDataModule(path=paths, join=join, split={"method": "explicit", "test": "G1+G2"})  # type: ignore[arg-type]
    module.setup()
    assert module.spec is not None
    wanted = range(10) if join == "intersection" else range(30)
    assert sorted(module.spec.genes) == sorted(f"G{number}" for number in wanted)
    assert f"2 files with 20, 20 genes: the {join} of {len(wanted)} genes is used" in capsys.readouterr().out
    # each cell keeps its own counts under each gene's name; absent genes count as 0
    batch = next(iter(module.test_dataloader()))
    assert len(batch) == 80
    for row, cell in enumerate(batch.cell.tolist()):
        own = first if cell < first.n_obs else second
        source = own[cell % first.n_obs].to_df().iloc[0]
        expected = source.reindex(module.spec.genes).fillna(0).to_numpy()
        np.testing.assert_array_equal(batch.counts[row].numpy(), expected)


def test_gene_names_are_chosen_before_files_are_joined(two_files: TwoFiles) -> None:
    paths, first, second = two_files
    for path, adata in zip(paths, (first, second), strict=True):
        adata.var["symbol"] = adata.var_names.tolist()
        adata.var_names = [f"{Path(path).stem}-{number}" for number in range(adata.n_vars)]
        adata.write_h5ad(path)
    with pytest.raises(PerturbZooError, match="share no gene"):
        PerturbSeqDataModule(path=paths).setup()
    module = PerturbSeqDataModule(path=paths, gene_key="symbol")
    module.setup()
    assert module.spec is not None
    assert sorted(module.spec.genes) == sorted(f"G{number}" for number in range(10))


def test_layer_of_two_files(two_files: TwoFiles) -> None:
    paths, first, second = two_files
    for path, adata in zip(paths, (first, second), strict=True):
        adata.layers["counts"] = adata.X.copy()
        adata.X = None
        adata.write_h5ad(path)
    module = PerturbSeqDataModule(path=paths, layer="counts")
    module.setup()
    assert module.spec is not None
    assert module.spec.value_space == "counts"


# ---------------------------------------------------------------------- which cells


def test_contexts_and_levels_that_a_filter_empties_are_gone(make_adata: Factory) -> None:
    adata = make_adata(contexts=("a", "b", "c"))
    module = module_of(adata, covariates=["context"], cell_filter="context != b")
    assert module.spec is not None
    assert module.spec.contexts == (("a",), ("c",))
    assert module.spec.covariates == {"context": ("a", "c")}
    # the mean control of each remaining context is that of its own cells
    control = (adata.obs["perturbation"] == "control").to_numpy()
    for position, level in enumerate("ac"):
        counts = adata.X[control & (adata.obs["context"] == level).to_numpy()].toarray()
        expected = np.log1p(counts / counts.sum(axis=1, keepdims=True) * module.spec.depth).mean(axis=0)
        np.testing.assert_allclose(module.spec.control_mean[position], expected, rtol=1e-4)


def test_conditions_of_min_cells_stay(make_adata: Factory) -> None:
    adata = make_adata(conditions=("G0", "G1", "G2"), cells_per_condition=12)
    drop = np.flatnonzero(adata.obs["perturbation"] == "G1")[:1]
    adata = adata[np.setdiff1d(np.arange(adata.n_obs), drop)].copy()

    def conditions(min_cells: int) -> set[str]:
        screen = read(adata, min_cells=min_cells)
        return {str(screen.conditions[code]) for code in np.unique(screen.condition)}

    assert conditions(11) == {"control", "G0", "G1", "G2"}
    assert conditions(12) == {"control", "G0", "G2"}


def test_a_trained_models_levels_keep_their_numbers(make_adata: Factory) -> None:
    trained = module_of(make_adata(contexts=("a", "b", "c")), covariates=["context"])
    assert trained.spec is not None
    adata = make_adata(contexts=("c", "d"), seed=3)
    module = PerturbSeqDataModule.from_anndata(adata, covariates=["context"])
    module.use_spec(trained.spec)
    module.setup()
    batch = next(iter(module.test_dataloader()))
    levels = adata.obs["context"].to_numpy()[batch.cell.numpy()]
    assert {(level, code) for level, (code,) in zip(levels, batch.covariates.tolist(), strict=True)} == {("c", 2), ("d", -1)}
    assert set(zip(levels, batch.table.context[batch.row].tolist(), strict=True)) == {("c", 2), ("d", -1)}


def test_summary_says_what_was_understood(make_adata: Factory, capsys: pytest.CaptureFixture[str]) -> None:
    adata = make_adata(contexts=("a", "b"), conditions=("G0", "G1", "G2", "G0+X"))
    with pytest.warns(PerturbZooWarning, match=r"1 of 4 targets are not among the measured genes \(X\)"):
        module_of(adata, split={"method": "explicit", "test": "G0+X"})
    printed = capsys.readouterr().out
    for words in (
        "480 cells x 30 genes, raw counts",
        "obs['perturbation']: 3 single, 1 combined, 160 control cells",
        "size factors: total counts",
        "not matched on context",
    ):
        assert words in printed
