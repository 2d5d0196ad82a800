"""Bad input: what a user may bring to the data module by mistake, and the one line it answers with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError, PerturbZooWarning

Factory = Callable[..., anndata.AnnData]
Refusal = Callable[..., str]

pytestmark = pytest.mark.filterwarnings(
    # anndata's own words on duplicate names, which the tests make on purpose
    "ignore:.*names are not unique:UserWarning"
)


def one_line(path: object, **arguments: object) -> str:
    """The message with which a file is refused: one line, and nothing else is raised."""
    with pytest.raises(PerturbZooError) as caught:
        PerturbSeqDataModule(path=path, **arguments).setup()  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def refusal(tmp_path: Path) -> Refusal:
    """Write an AnnData as ``screen.h5ad`` and return the message with which it is refused, which names the file."""

    def refuse(adata: anndata.AnnData, **arguments: object) -> str:
        file = tmp_path / "screen.h5ad"
        adata.write_h5ad(file)
        message = one_line(str(file), **arguments)
        assert "screen.h5ad" in message
        return message

    return refuse


def says(message: str, *words: str) -> None:
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def put(adata: anndata.AnnData, value: float, cell: int = 3, gene: int = 2) -> anndata.AnnData:
    """Set one entry of X."""
    dense = adata.X.toarray()
    dense[cell, gene] = value
    adata.X = sparse.csr_matrix(dense)
    return adata


# ---------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"condition_key": "perturbatoin"},
            ["obs has no column 'perturbatoin'", "condition_key", "did you mean 'perturbation'"],
        ),
        ({"condition_key": "zzz"}, ["obs has no column 'zzz'", "it has perturbation, context"]),
        ({"covariates": ["contxt"]}, ["obs has no column 'contxt'", "covariates", "did you mean 'context'"]),
        ({"match_on": ["batch"]}, ["obs has no column 'batch'", "match_on"]),
        ({"dose_key": "dose"}, ["obs has no column 'dose'", "dose_key"]),
        ({"size_factor_key": "n_counts"}, ["obs has no column 'n_counts'", "size_factor_key"]),
        ({"gene_key": "symbl"}, ["var has no column 'symbl'", "gene_key", "did you mean 'symbol'"]),
        ({"cell_filter": "grna_frac > .5"}, ["obs has no column 'grna_frac'", "cell_filter"]),
        ({"split": {"method": "column", "column": "part"}}, ["obs has no column 'part'", "split"]),
        ({"layer": "counts"}, ["no layer 'counts'", "it has none"]),
    ],
)
def test_missing_column(arguments: dict[str, object], words: list[str], make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata(contexts=("a", "b"))
    adata.var["symbol"] = adata.var_names.tolist()
    says(refusal(adata, **arguments), *words)


def test_no_column_of_perturbations(make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    adata.obs = adata.obs.rename(columns={"perturbation": "what"})
    says(refusal(adata), "no obs column that looks like a perturbation", "it has what", "condition_key")


@pytest.mark.parametrize("arguments", [{}, {"condition_key": "perturbation"}], ids=["detected", "named"])
def test_no_controls(arguments: dict[str, object], make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace("control", "DMSO")
    says(refusal(adata, **arguments), "no control cells", "perturbation", "control_labels")
    # what the message says would be right is right
    PerturbSeqDataModule.from_anndata(adata, control_labels=["DMSO"]).setup()


def test_only_controls(make_adata: Factory, refusal: Refusal) -> None:
    says(refusal(make_adata(conditions=())), "only control cells", "obs['perturbation']")


def test_cells_without_a_label(make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    adata.obs.iloc[:5, 0] = np.nan
    says(refusal(adata), "obs['perturbation']", "5 of 400 cells have no condition label")


def test_label_that_cannot_be_read(make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace("G0+G1", "G0,\nG1")
    says(refusal(adata), "obs['perturbation']", r"'G0,\nG1'", "separator", "40 of 400 cells")


@pytest.mark.parametrize(
    ("dose", "words"),
    [
        ("much", ["dose 'much' is not a number, optionally with nM, uM or mM"]),
        ("nan", ["dose 'nan' is not a number"]),
        ("-1.5", ["dose", "-1.5"]),
        ("inf", ["dose"]),
        ("1+2", ["dose '1+2' holds 2 for 1 targets"]),
    ],
)
def test_doses_that_are_none(dose: str, words: list[str], make_adata: Factory, refusal: Refusal) -> None:
    """A dose column that is not numeric, or negative: the column, the condition and the dose are named."""
    adata = make_adata(conditions=("G0", "G1"))
    doses = np.where(adata.obs["perturbation"] == "G0", dose, "1")
    adata.obs["dose"] = doses
    message = refusal(adata, dose_key="dose")
    says(message, "obs['perturbation'] with doses of obs['dose']", "condition 'G0'", "(40 of 160 cells)", *words)


def test_negative_numbers_for_doses(make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata(conditions=("G0", "G1"))
    adata.obs["dose_value"] = np.where(adata.obs["perturbation"] == "G0", -2.0, 1.0)
    # of a drug screen the usual column is read without being named
    message = refusal(adata, kind="compound")
    says(message, "obs['dose_value']", "target 'G0': dose -2.0 must be finite and at least 0", "(40 of 160 cells)")


@pytest.mark.parametrize("bad", [np.nan, -1.0, np.inf, "many"])
def test_size_factors_that_are_none(bad: object, make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    adata.obs["total"] = pd.Series([bad, *[100.0] * (adata.n_obs - 1)], index=adata.obs_names).astype(type(bad))
    says(refusal(adata, size_factor_key="total"), "obs['total']", "size_factor_key", "no positive numbers")


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, ["X holds NaN or infinite values (1 of them)", "set them to 0"]),
        (np.inf, ["X holds NaN or infinite values (1 of them)", "set them to 0"]),
        (-3.0, ["X holds negative values", "smallest -3", "give raw counts or log1p"]),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_values_out_of_range(value: float, words: list[str], dense: bool, make_adata: Factory, refusal: Refusal) -> None:
    adata = put(make_adata(), value)
    if dense:
        adata.X = adata.X.toarray()
    says(refusal(adata), *words)


def test_counts_that_are_no_whole_numbers(make_adata: Factory, refusal: Refusal) -> None:
    message = refusal(put(make_adata(), 2.5), value_space="counts")
    says(message, "value_space is 'counts'", "X holds fractions", "value_space: log1p")


def test_log1p_values_given_as_counts(make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    adata.X = np.log1p(adata.X)
    says(refusal(adata, value_space="counts"), "value_space is 'counts'", "X holds fractions", "value_space: log1p")


@pytest.mark.parametrize("factor", [1, 100], ids=["all below 30", "beyond 30"])
def test_counts_given_as_log1p_values(factor: int, make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    adata.X = adata.X.minimum(29.0 / factor).ceil() * factor
    assert (adata.X.max() < 30) == (factor == 1)
    says(refusal(adata, value_space="log1p"), "value_space is 'log1p'", "X ", "value_space: counts")


def test_ambiguous_values(make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    adata.X = adata.X * 10.5
    says(refusal(adata), "X holds fractions up to", "neither raw counts nor log1p-normalised", "normalize_total")


def test_text_for_values(make_adata: Factory) -> None:
    adata = make_adata()
    adata.layers["text"] = np.full(adata.shape, "a")
    with pytest.raises(PerturbZooError, match="layer 'text' holds <U1, not numbers"):
        PerturbSeqDataModule.from_anndata(adata, layer="text").setup()


@pytest.mark.parametrize("layers", [True, False])
def test_x_is_missing(layers: bool, make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    if layers:
        adata.layers["counts"] = adata.X
    adata.X = None
    says(refusal(adata), "X is missing", "name a layer: counts" if layers else "no values")


def test_nothing_but_zeros(make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    adata.X = adata.X * 0
    with pytest.warns(PerturbZooWarning, match="400 cells without any count are left out"):
        says(refusal(adata), "none of the 80 control cells remains", "without any count")


@pytest.mark.parametrize(("cells", "genes"), [(0, 30), (400, 0)])
def test_empty_table(cells: int, genes: int, make_adata: Factory, refusal: Refusal) -> None:
    says(refusal(make_adata()[:cells, :genes].copy()), f"{cells} cells x {genes} genes", "nothing to read")


# ---------------------------------------------------------------------- names


def test_duplicate_genes(make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    adata.var_names = ["G1", *adata.var_names[1:]]
    says(refusal(adata), "1 names of genes occur more than once (G1)", "var_names_make_unique", "gene_key")


def test_duplicate_cells(make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    adata.obs_names = ["cell1", *adata.obs_names[1:]]
    says(refusal(adata), "1 names of cells occur more than once (cell1)", "obs_names_make_unique")


# ---------------------------------------------------------------------- which cells


def test_zero_count_cells_are_left_out_with_a_warning(make_adata: Factory) -> None:
    adata = make_adata()
    empty = np.r_[0:5, 100:103]
    adata.X = sparse.csr_matrix(adata.X.toarray() * ~np.isin(np.arange(adata.n_obs), empty)[:, None])
    module = PerturbSeqDataModule.from_anndata(adata, split={"method": "explicit", "test": "G0,G1,G2,G3,G4,G0+G1,G1+G2"})
    with pytest.warns(PerturbZooWarning, match="8 cells without any count are left out"):
        module.setup()
    used = sum(map(len, module.index.cells_by_pair)) + sum(map(len, module.index.controls_by_context))
    assert used == adata.n_obs - 8
    for batch in module.test_dataloader():
        assert batch.expression.isfinite().all()
        assert (batch.counts.sum(dim=1) > 0).all()


def test_condition_with_one_cell(make_adata: Factory, capsys: pytest.CaptureFixture[str]) -> None:
    adata = make_adata()
    single = np.flatnonzero(adata.obs["perturbation"] == "G4")[1:]
    adata = adata[np.setdiff1d(np.arange(adata.n_obs), single)].copy()
    module = PerturbSeqDataModule.from_anndata(adata)
    module.setup()
    assert "G4" not in {str(condition) for condition in module.conditions}
    assert "1 conditions with fewer than 10 cells (G4)" in capsys.readouterr().out
    # when it is wanted nevertheless, its mean is its cell and its variance unknown
    module = PerturbSeqDataModule.from_anndata(adata, min_cells=1, split={"method": "explicit", "test": "G0+G1"})
    module.setup()
    position = [str(condition) for condition in module.conditions].index("G4")
    mean, variance = module.moments([module.index.cells_by_pair[position]])
    counts = adata[adata.obs["perturbation"] == "G4"].X.toarray()
    assert module.spec is not None
    np.testing.assert_allclose(mean, np.log1p(counts / counts.sum() * module.spec.depth), rtol=1e-5)
    assert np.isnan(variance).all()


def test_every_condition_is_too_small(make_adata: Factory, refusal: Refusal) -> None:
    says(refusal(make_adata(), min_cells=41), "no condition has 41 cells", "largest has 40", "lower min_cells")


def test_stratum_without_controls(make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata(contexts=("a", "b"))
    gone = (adata.obs["context"] == "b") & (adata.obs["perturbation"] == "control")
    adata = adata[~gone].copy()
    message = refusal(adata, covariates=["context"])
    says(message, "no control cells in 1 of the strata of context (b)", "match_on", "cell_filter")
    # both remedies work
    PerturbSeqDataModule.from_anndata(adata, covariates=["context"], match_on=[]).setup()
    PerturbSeqDataModule.from_anndata(adata, covariates=["context"], cell_filter="context == a").setup()


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("perturbation", ["'perturbation' is not 'column > value'", "'and'"]),
        ("fraction = .5", ["'fraction = .5' is not 'column > value'"]),
        ("fraction > half", ["column 'fraction' is numeric", "'half' is no number"]),
        ("perturbation > 3", ["column 'perturbation' is text", "use == or !="]),
        ("fraction > 2", ["cell_filter 'fraction > 2' leaves no cell"]),
        ("perturbation != control", ["cell_filter 'perturbation != control'", "none of the 80 control cells remains"]),
        ("perturbation == control", ["cell_filter 'perturbation == control'", "none of the 320 perturbed cells remains"]),
        ("__import__('os').getcwd()", ["is not 'column > value'"]),
    ],
)
def test_bad_cell_filter(expression: str, words: list[str], make_adata: Factory, refusal: Refusal) -> None:
    adata = make_adata()
    adata.obs["fraction"] = np.linspace(0, 1, adata.n_obs)
    says(refusal(adata, cell_filter=expression), *words)


# ---------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"method": "random", "test_fraction": 0.0}, ["no condition is left to test on", "choose another method"]),
        ({"method": "random", "test_fraction": 1.0}, ["no condition is left to train on", "choose another method"]),
        ({"method": "explicit", "test": "G0+G9"}, ["'G0+G9'", "no perturbed condition of the data"]),
        ({"method": "unseen_context", "held_out": "b"}, ["context 'b'", "match_on"]),
        ({"method": "simulatoin"}, ["no split method 'simulatoin'", "did you mean 'simulation'"]),
    ],
)
def test_empty_split(split: dict[str, object], words: list[str], make_adata: Factory, tmp_path: Path) -> None:
    make_adata().write_h5ad(tmp_path / "screen.h5ad")
    says(one_line(str(tmp_path / "screen.h5ad"), split=split), *words)


def test_split_of_another_screen(make_adata: Factory, refusal: Refusal, tmp_path: Path) -> None:
    other = PerturbSeqDataModule.from_anndata(make_adata(conditions=("G7", "G8", "G9")), split={"method": "random"})
    other.setup()
    other.split.save(tmp_path / "split.json")
    says(refusal(make_adata(), split=str(tmp_path / "split.json")), "the split 'random' leaves no training condition")


def test_split_without_test_conditions(make_adata: Factory) -> None:
    module = PerturbSeqDataModule.from_anndata(make_adata(), split={"method": "no_test"})
    module.setup()
    with pytest.raises(PerturbZooError, match="'no_test' leaves no test condition") as caught:
        module.test_dataloader()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- files


def test_no_path() -> None:
    says(one_line(None), "no data", "--data.path")
    says(one_line([]), "no data", "--data.path")


def test_missing_file(tmp_path: Path) -> None:
    says(one_line(str(tmp_path / "none.h5ad")), "none.h5ad", "no such file")
    says(one_line(str(tmp_path)), str(tmp_path), "a folder, not an h5ad file")


def test_unset_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCREENS_OF_MINE", raising=False)
    for path in ("$SCREENS_OF_MINE/screen.h5ad", "${SCREENS_OF_MINE}/screen.h5ad"):
        says(one_line(path), path, "environment variable SCREENS_OF_MINE is not set", "export it")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(kept: float, make_adata: Factory, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.h5ad", tmp_path / "cut.h5ad"
    make_adata().write_h5ad(whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(kept * len(content))])
    says(one_line(str(cut)), "cut.h5ad", "not a readable h5ad file (truncated or damaged?)")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "screen.h5ad"
    file.write_text("cell,gene\n1,2\n")
    says(one_line(str(file)), "screen.h5ad", "not a readable h5ad file")


def test_file_that_does_not_fit_in_memory(make_adata: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(file: object) -> None:
        raise MemoryError

    file = tmp_path / "screen.h5ad"
    make_adata().write_h5ad(file)
    monkeypatch.setattr("anndata.io.read_elem", no_memory)
    says(one_line(str(file)), "screen.h5ad", "does not fit in memory")


# ---------------------------------------------------------------------- several files


def test_files_of_different_kinds(make_adata: Factory, tmp_path: Path) -> None:
    counts, logged = make_adata(), make_adata(seed=1)
    logged.X = np.log1p(logged.X)
    paths = [str(tmp_path / "counts.h5ad"), str(tmp_path / "logged.h5ad")]
    counts.write_h5ad(paths[0])
    logged.write_h5ad(paths[1])
    says(one_line(paths), "logged.h5ad holds log1p values", "counts.h5ad counts", "must agree")


def test_files_without_a_common_gene(make_adata: Factory, tmp_path: Path) -> None:
    first, second = make_adata(), make_adata()
    second.var_names = [f"ENSG{number:011d}" for number in range(second.n_vars)]
    paths = [str(tmp_path / "first.h5ad"), str(tmp_path / "second.h5ad")]
    first.write_h5ad(paths[0])
    second.write_h5ad(paths[1])
    says(one_line(paths), "share no gene", "gene_key")
    says(one_line(paths, join="inner"), "join is 'inner'", "'intersection' or 'union'")


def test_the_file_with_the_mistake_is_named(make_adata: Factory, tmp_path: Path) -> None:
    paths = [str(tmp_path / "good.h5ad"), str(tmp_path / "bad.h5ad")]
    make_adata().write_h5ad(paths[0])
    put(make_adata(), np.nan).write_h5ad(paths[1])
    says(one_line(paths), "bad.h5ad: X holds NaN")


def test_good_input_is_silent(make_adata: Factory, tmp_path: Path) -> None:
    make_adata().write_h5ad(tmp_path / "screen.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PerturbZooWarning)
        PerturbSeqDataModule(path=str(tmp_path / "screen.h5ad")).setup()
