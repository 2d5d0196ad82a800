"""``perturbzoo data``: every fact against the file it was made from, every problem listed, and a data section that works."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import yaml
from scipy import sparse

from perturbzoo import cli
from perturbzoo.data import h5ad
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.describe import describe
from perturbzoo.data.h5ad import open_h5ad, scan_matrix
from perturbzoo.errors import PerturbZooError, PerturbZooWarning

Factory = Callable[..., anndata.AnnData]
Change = Callable[[anndata.AnnData], object]

pytestmark = pytest.mark.filterwarnings(
    # anndata's own words on duplicate names, which the tests make on purpose
    "ignore:.*names are not unique:UserWarning"
)


def write(adata: anndata.AnnData, folder: Path) -> str:
    file = str(folder / "screen.h5ad")
    adata.write_h5ad(file)
    return file


def arguments_of(text: str) -> dict[str, Any]:
    """The data module's arguments in the section at the end of a description."""
    section = yaml.safe_load(text.split("data section to start from\n")[1])["data"]
    assert section["class_path"] == "PerturbSeqDataModule"
    return section["init_args"]


def problems_of(text: str) -> tuple[list[str], list[str]]:
    """The problems with which a fit stops, and the others."""
    lines = text.split("data section")[0].splitlines()
    return [line[4:] for line in lines if line.startswith("  ! ")], [line[4:] for line in lines if line.startswith("  - ")]


def fact(text: str, topic: str) -> str:
    """The line on a topic, with the lines that go on with it."""
    lines = text.split("\n\n")[0].splitlines()
    start = next(row for row, line in enumerate(lines) if line.startswith(topic))
    return " ".join([lines[start], *(line for line in lines[start + 1 : start + 2] if line.startswith(" "))])


def set_up(**arguments: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerturbZooWarning)
        PerturbSeqDataModule(**arguments).setup()


# ---------------------------------------------------------------------- facts


def test_facts_of_a_good_file(make_adata: Factory, tmp_path: Path) -> None:
    adata = make_adata(conditions=("G0", "G1", "G2", "G0+G1", "G1+X"), contexts=("a", "b"))
    fewer = np.flatnonzero((adata.obs["perturbation"] == "G2") & (adata.obs["context"] == "b"))[:7]
    adata = adata[np.setdiff1d(np.arange(adata.n_obs), fewer)].copy()
    adata.obs["perturbation_type"] = "CRISPRi"
    file = write(adata, tmp_path)
    text = describe(file)
    assert text.startswith(f"{file}: 553 cells x 30 genes\n")
    total = np.asarray(adata.X.sum(axis=1))
    for topic, words in (
        ("X", f"CSR float32, {adata.X.nnz / (553 * 30):.1%} filled, 0 to {adata.X.max():g}; raw counts"),
        ("size factors", f"median {np.median(total):,.0f}"),
        ("conditions", "obs['perturbation']: 3 single, 2 combined, 160 control cells"),
        ("kind", "interference, as obs says"),
        ("most cells", "G0 80, G0+G1 80, G1 80"),
        ("fewest cells", "G2 73, G1+X 80"),
        ("targets", "3 of 4 are among the genes; not: X"),
        ("covariate", "obs['context'], 2 levels: a 280 (80 controls), b 273 (80 controls)"),
    ):
        assert words in fact(text, topic)
    assert "problems      none found" in text
    assert problems_of(text) == ([], [])
    assert arguments_of(text) == {"path": file, "condition_key": "perturbation", "kind": "interference"}
    assert "# covariates: [context]  # every level has control cells" in text
    set_up(**arguments_of(text))
    set_up(**arguments_of(text.replace("# covariates", "covariates")))


def test_layers_and_log1p_values(make_adata: Factory, tmp_path: Path) -> None:
    adata = make_adata()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X.toarray() / 7)
    text = describe(write(adata, tmp_path))
    assert "dense float32" in fact(text, "X")
    assert "log1p-normalised" in fact(text, "X")
    assert "'counts': CSR float32" in fact(text, "layer")
    assert "raw counts" in fact(text, "layer")
    assert "size factors" not in text
    assert "# layer: counts" in text
    assert problems_of(text) == ([], [])


def test_columns_that_may_be_wanted(make_adata: Factory, tmp_path: Path) -> None:
    adata = make_adata()
    adata.obs["n_counts"] = adata.X.sum(axis=1) * 10
    adata.obs["dose"] = "1"
    adata.obs["guide"] = adata.obs["perturbation"].astype(str) + "_1"  # follows from the condition: no covariate
    adata.obs["condition"] = adata.obs["perturbation"].astype(str).replace("control", "ctrl")
    text = describe(write(adata, tmp_path))
    assert f"# size_factor_key: n_counts  # median {adata.obs['n_counts'].median():,.0f}" in text
    assert "# dose_key: dose" in text
    assert "covariate" not in text
    assert "control is also named in perturbation" in fact(text, "conditions")


# ---------------------------------------------------------------------- problems and their fixes


def _relabel(old: str, new: object) -> Change:
    def change(adata: anndata.AnnData) -> None:
        adata.obs["perturbation"] = adata.obs["perturbation"].astype(object).replace(old, new)

    return change


def _rename_column(name: str) -> Change:
    def change(adata: anndata.AnnData) -> None:
        adata.obs = adata.obs.rename(columns={"perturbation": name})

    return change


def _values(function: Callable[[np.ndarray], np.ndarray | None], keep: str | None = None) -> Change:
    def change(adata: anndata.AnnData) -> None:
        dense = adata.X.toarray()
        if keep:
            adata.layers[keep] = adata.X.copy()
        adata.X = function(dense)

    return change


def _with(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def put(dense: np.ndarray) -> np.ndarray:
        dense[3, 2] = value
        return dense

    return put


def _duplicate_genes(adata: anndata.AnnData) -> None:
    adata.var["symbol"] = adata.var_names.tolist()
    adata.var_names = ["G1", *adata.var_names[1:]]


def _duplicate_cells(adata: anndata.AnnData) -> None:
    adata.obs_names = ["cell1", *adata.obs_names[1:]]


# (what is done to a good screen, words of the problem, whether the data section already puts it right)
STOPPING = {
    "no controls": (_relabel("control", "NegCtrl0"), ["no control cells", "NegCtrl0", "control_labels"], True),
    "no controls at all": (_relabel("control", "G9"), ["no control cells", "perturbation"], False),
    "unusual column": (_rename_column("what"), ["no obs column", "condition_key: what"], True),
    "no column": (lambda adata: adata.obs.drop(columns="perturbation", inplace=True), ["no obs column", "it has none"], False),
    "missing labels": (_relabel("G0", np.nan), ["40 of 400 cells have no condition label"], False),
    "unreadable label": (_relabel("G0", "G0, G9"), ["'G0, G9'", "40 of 400 cells"], False),
    "NaN": (_values(_with(np.nan)), ["NaN or infinite", "1 of them"], False),
    "NaN beside a layer": (_values(_with(np.nan), "counts"), ["NaN or infinite", "layer: counts can be used"], True),
    "infinite": (_values(_with(np.inf)), ["NaN or infinite", "1 of them"], False),
    "negative": (_values(_with(-2)), ["negative values", "smallest -2"], False),
    "scaled beside a layer": (_values(lambda x: x - x.mean(axis=0), "counts"), ["negative", "layer: counts"], True),
    "ambiguous": (_values(lambda x: x * 10.5), ["neither raw counts nor log1p"], False),
    "no X": (_values(lambda x: None), ["X is missing"], False),
    "no X beside a layer": (_values(lambda x: None, "raw_counts"), ["X is missing", "layer: raw_counts"], True),
    "genes": (_duplicate_genes, ["names of genes occur more than once (G1)", "gene_key: symbol names each gene once"], True),
    "cells": (_duplicate_cells, ["names of cells occur more than once (cell1)"], False),
}


@pytest.mark.parametrize("name", STOPPING)
def test_problems_that_stop_a_fit(name: str, make_adata: Factory, tmp_path: Path) -> None:
    change, words, put_right = STOPPING[name]
    adata = make_adata()
    change(adata)
    file = write(adata, tmp_path)
    text = describe(file)
    stops, _ = problems_of(text)
    assert len(stops) == 1
    for word in words:
        assert word in stops[0]
    # the data module refuses the file with the same words, and takes the section where it is said to be enough
    with pytest.raises(PerturbZooError) as caught:
        set_up(path=file)
    refusal = str(caught.value).removeprefix(file).lstrip(":, ")
    assert refusal.split(";")[0] == stops[0].split(";")[0]
    if put_right:
        set_up(**arguments_of(text))


def test_few_cells(make_adata: Factory, tmp_path: Path) -> None:
    adata = make_adata(cells_per_condition=12)
    gone = np.flatnonzero(adata.obs["perturbation"] == "G3")[1:]
    file = write(adata[np.setdiff1d(np.arange(adata.n_obs), gone)].copy(), tmp_path)
    text = describe(file)
    assert problems_of(text)[0] == []
    assert problems_of(text)[1][0].startswith("1 conditions have fewer than 10 cells (G3 1)")
    set_up(**arguments_of(text))


def test_too_few_cells_everywhere(make_adata: Factory, tmp_path: Path) -> None:
    text = describe(write(make_adata(cells_per_condition=6), tmp_path))
    assert "no condition has 10 cells (the largest has 6)" in problems_of(text)[0][0]
    assert arguments_of(text)["min_cells"] == 6
    set_up(**arguments_of(text))


def test_empty_cells(make_adata: Factory, tmp_path: Path) -> None:
    adata = make_adata()
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(adata.n_obs) >= 6)[:, None])
    stops, notes = problems_of(describe(write(adata, tmp_path)))
    assert (stops, notes) == ([], ["6 cells have no count at all: they are left out, with a warning"])


def test_strata_without_controls(make_adata: Factory, tmp_path: Path) -> None:
    adata = make_adata(contexts=("a", "b", "c"))
    adata = adata[~((adata.obs["context"] == "b") & (adata.obs["perturbation"] == "control"))].copy()
    file = write(adata, tmp_path)
    text = describe(file)
    stops, (note,) = problems_of(text)
    assert stops == []  # as long as nobody matches on it
    assert "obs['context']: 1 of 3 levels have no control cells (b)" in note
    assert "covariates: [context]" not in text
    set_up(**arguments_of(text))
    with pytest.raises(PerturbZooError, match="no control cells in 1 of the strata"):
        set_up(**arguments_of(text), covariates=["context"])
    set_up(**arguments_of(text), covariates=["context"], cell_filter=note.split("cell_filter such as ")[1])


def test_covariate_with_missing_values(make_adata: Factory, tmp_path: Path) -> None:
    adata = make_adata(contexts=("a", "b"))
    adata.obs.iloc[:9, adata.obs.columns.get_loc("context")] = np.nan
    assert "obs['context'] is missing in 9 cells" in problems_of(describe(write(adata, tmp_path)))[1][0]


def test_separator_is_found(make_adata: Factory, tmp_path: Path) -> None:
    adata = make_adata()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).str.replace("+", "_")
    text = describe(write(adata, tmp_path))
    assert "3 labels such as 'G" in problems_of(text)[1][0]
    assert "5 single, 3 combined" in fact(text, "conditions")
    assert arguments_of(text)["separator"] == "_"


def test_gene_names_of_another_kind(make_adata: Factory, tmp_path: Path) -> None:
    adata = make_adata()
    adata.var["symbol"] = adata.var_names.tolist()
    adata.var_names = [f"ENSG{number:011d}" for number in range(adata.n_vars)]
    text = describe(write(adata, tmp_path))
    assert "0 of 5 are among the genes" in fact(text, "targets")
    assert problems_of(text)[1] == ["var['symbol'] names 5 of the 5 targets, more than the gene names do"]
    assert arguments_of(text)["gene_key"] == "symbol"


def test_one_condition_leaves_another_context_to_test(make_adata: Factory, tmp_path: Path) -> None:
    text = describe(write(make_adata(conditions=("stim",), contexts=("a", "b")), tmp_path))
    assert "no condition is left" in problems_of(text)[0][0]
    assert arguments_of(text)["split"]["method"] == "unseen_context"
    set_up(**arguments_of(text))


def test_only_controls(make_adata: Factory, tmp_path: Path) -> None:
    stops, _ = problems_of(describe(write(make_adata(conditions=()), tmp_path)))
    assert stops == ["only control cells in obs['perturbation']: nothing was perturbed"]


def test_all_problems_at_once(make_adata: Factory, tmp_path: Path) -> None:
    adata = make_adata()
    dense = adata.X.toarray()
    dense[0, 0], dense[1, 1], dense[2] = np.nan, -1, 0
    adata.X = dense
    _relabel("control", "DMSO")(adata)
    _relabel("G3", np.nan)(adata)
    adata.obs.iloc[5, 0] = "G0(("
    adata.obs_names = ["cell1", *adata.obs_names[1:]]
    adata.var_names = ["G1", *adata.var_names[1:]]
    text = describe(write(adata, tmp_path))
    together = "\n".join(problems_of(text)[0])
    for words in ("names of cells", "NaN", "negative", "names of genes", "no control cells", "no condition label"):
        assert words in together
    assert "in obs" not in text.splitlines()[0]
    assert "obs['perturbation']" in fact(text, "conditions")  # what can be said is said
    assert "control_labels:\n    - DMSO" in text


@pytest.mark.parametrize(("cells", "genes"), [(0, 30), (400, 0)])
def test_empty_table(cells: int, genes: int, make_adata: Factory, tmp_path: Path) -> None:
    text = describe(write(make_adata()[:cells, :genes].copy(), tmp_path))
    assert f"{cells} cells x {genes} genes" in text
    assert "there is nothing to read" in problems_of(text)[0][0]


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("block", [1 << 22, 50])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_values_are_read_in_blocks(
    form: str, block: int, make_adata: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(h5ad, "_BLOCK", block)
    adata = make_adata()
    dense = adata.X.toarray()
    dense[[0, 7, 8, -1]] = 0  # empty rows at the ends and between
    dense[5, 5] = -3.5
    adata.X = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[form](dense)
    file = Path(write(adata, tmp_path))
    with open_h5ad(file) as opened:
        matrix = scan_matrix(opened["X"], "X")
    np.testing.assert_allclose(matrix.totals, dense.sum(axis=1, dtype=np.float64))
    assert matrix.filled == pytest.approx(np.count_nonzero(dense) / dense.size)
    assert (matrix.found.smallest, matrix.found.largest) == (-3.5, dense.max())
    assert (matrix.found.whole, matrix.found.n_negative, matrix.found.n_not_finite) == (False, 1, 0)
    assert matrix.storage == f"{form if form == 'dense' else form.upper()} float32"


def test_file_from_before_anndata_0_7(tmp_path: Path) -> None:
    obs = np.zeros(40, dtype=[("index", "S6"), ("perturbation", "S8")])
    obs["index"] = [f"c{number}" for number in range(40)]
    obs["perturbation"] = np.repeat([b"control", b"A", b"B", b"A+B"], 10)
    var = np.array([(b"A",), (b"B",)], dtype=[("index", "S6")])
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["obs"], file["var"], file["X"] = obs, var, np.ones((40, 2), dtype=np.float32)
    assert "2 single, 1 combined, 10 control cells" in fact(describe(str(tmp_path / "old.h5ad")), "conditions")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"mod/rna/X": 1, "obs/a": 1, "var/a": 1}, ["a MuData file", "(rna)"]),
        ({"matrix": 1}, ["no h5ad file", "it holds matrix"]),
    ],
)
def test_other_hdf5_files(content: dict[str, int], words: list[str], tmp_path: Path) -> None:
    with h5py.File(tmp_path / "file.h5ad", "w") as file:
        for name, value in content.items():
            file[name] = value
    for look in (describe, lambda path: set_up(path=path)):
        with pytest.raises(PerturbZooError) as caught:
            look(str(tmp_path / "file.h5ad"))
        assert all(word in str(caught.value) for word in ("file.h5ad", *words))
        assert "\n" not in str(caught.value)


def test_damaged_and_missing_files(make_adata: Factory, tmp_path: Path) -> None:
    file = Path(write(make_adata(), tmp_path))
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(PerturbZooError, match="not a readable h5ad file"):
        describe(str(file))
    with pytest.raises(PerturbZooError, match=r"no such file$"):
        describe(str(tmp_path / "norma.h5ad"))
    with pytest.raises(PerturbZooError, match=r"no such file; did you mean 'norman'\?"):
        describe("norma")


def test_public_data_set_by_name(make_adata: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERTURBZOO_CACHE", str(tmp_path))
    make_adata().write_h5ad(tmp_path / "norman.h5ad")  # as if it had been downloaded
    text = describe("norman")
    assert "400 cells x 30 genes" in text
    assert arguments_of(text)["path"] == "public:norman"
    set_up(**arguments_of(text))


def test_variables_stay_in_the_section(make_adata: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCREENS", str(tmp_path))
    write(make_adata(), tmp_path)
    assert arguments_of(describe("$SCREENS/screen.h5ad"))["path"] == "$SCREENS/screen.h5ad"


def test_command(make_adata: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(make_adata(), tmp_path)
    cli.main(["data", file])
    assert capsys.readouterr().out == describe(file) + "\n"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", str(tmp_path / "none.h5ad")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.h5ad'}: no such file\n"


@pytest.mark.skipif("PERTURBZOO_DATA" not in os.environ, reason="real data: set PERTURBZOO_DATA to their folder")
@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "norman2019_subset",
            {"conditions": "18 single, 15 combined, 100 control cells", "kind": "activation", "targets": "1 of 31 are among"},
        ),
        (
            "papalexi2021_eccite",
            {"conditions": "25 single, 0 combined, 2,386 control cells", "kind": "knockout", "targets": "9 of 25 are among"},
        ),
        ("datlinger2021_jurkat", {"conditions": "20 single, 0 combined, 200 control cells", "covariate": "obs['stimulation']"}),
        ("kang2018_pbmc_ifnb", {"conditions": "936 control cells", "covariate": "obs['cell_type'], 7 levels"}),
        ("dixit2016_bmdc", {"conditions": "8 single, 0 combined, 992 control cells", "targets": "8 of 8 are among"}),
    ],
)
def test_real_files(name: str, facts: dict[str, str]) -> None:
    """Facts from PROVENANCE.md of the data."""
    text = describe(f"$PERTURBZOO_DATA/{name}.h5ad")
    for topic, words in facts.items():
        assert words in fact(text, topic)
    assert "raw counts" in fact(text, "X")
    set_up(**arguments_of(text))
