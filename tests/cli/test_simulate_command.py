"""``perturbzoo simulate``: what it writes is what the rest of the zoo reads, and its mistakes end in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import read_h5ad

from perturbzoo import PerturbSeqDataModule
from perturbzoo.cli import main
from perturbzoo.grn import GeneRegulatoryNetwork
from perturbzoo.network_command import read_effects
from perturbzoo.simulate import random_network, truth_frame

SMALL = ("--genes", "12", "--cells_per_condition", "12", "--controls", "40", "--quiet")


def simulate(folder: Path, *arguments: str, name: str = "sim.h5ad") -> Path:
    main(["simulate", "--output", str(folder / name), *SMALL, *arguments])
    return folder / name


def test_file_is_read_by_the_data_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = simulate(tmp_path, "--doubles", "8", "--contexts", "2", "--batches", "2", "--depth_spread", "0.2")
    assert not capsys.readouterr().out
    data = PerturbSeqDataModule(
        path=str(path),
        covariates=["cell_type"],
        split={"method": "simulation", "seed": 1},
        perturbation_graph=[{"kind": "go", "path": str(path.with_suffix(".go.csv"))}],
    )
    data.setup("fit")
    spec = data.spec
    assert spec is not None
    assert spec.default_kind == "interference"
    assert spec.genes == tuple(read_h5ad(path).var_names)
    assert spec.targets == spec.genes
    assert spec.contexts == (("type1",), ("type2",))
    assert sum(str(condition).count("+") for condition in data.conditions) == 16
    # means of many cells are near the truth that the file holds
    truth = truth_frame(read_h5ad(path), "expression", "type1")
    assert np.corrcoef(spec.control_mean[0], truth.loc["control"])[0, 1] > 0.95
    effects, _, _ = read_effects(path)
    assert set(effects.genes) == set(spec.genes)


def test_truth_is_in_the_file(tmp_path: Path) -> None:
    adata = read_h5ad(simulate(tmp_path, "--seed", "5"))
    assert list(adata.uns["network"].columns) == ["regulator", "target", "weight"]
    expected = random_network(12, seed=5).matrix().toarray()
    np.testing.assert_array_equal(GeneRegulatoryNetwork.from_anndata(adata).matrix().toarray(), expected)
    np.testing.assert_array_equal(adata.varp["grn"].toarray(), expected)
    truth = adata.uns["truth"]
    assert truth["effect"].shape == truth["fixed_point"].shape == (1, 13, 12)
    assert set(adata.obs["kind"]) == {"control", "interference"}
    assert set(adata.obs["dose"]) == {"0", "1"}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    one, same, other = (
        simulate(tmp_path, "--seed", seed, name=f"{name}.h5ad") for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()
    assert one.with_suffix(".go.csv").read_bytes() == same.with_suffix(".go.csv").read_bytes()


def test_doses_times_and_windows(tmp_path: Path) -> None:
    adata = read_h5ad(
        simulate(
            tmp_path, "--singles", "2", "--doses", "0.5", "1", "--times", "3", "6", "--window", "1", "5", "--kind", "knockout"
        )
    )
    labels = set(adata.obs["perturbation"])
    assert len(labels) == 5
    assert sum("@0.5[1,5]" in label for label in labels) == 2
    assert sorted(adata.obs["time"].unique()) == [3.0, 6.0]
    assert adata.uns["truth"]["course"].shape == (2, 1, 5, 12)


def test_conditions_kinds_guides_and_layers(tmp_path: Path) -> None:
    wanted = ("GENE0001", "GENE0002:knockout@0.5[2,6]", "GENE0001:overexpression+GENE0003")
    path = simulate(
        tmp_path,
        *("--conditions", *wanted, "--splicing", "true", "--guides", "2", "--efficacy", "0.5", "0.9"),
        *("--non_cutting", "0.5", "--dropout", "1", "--motifs", "toggle", "feed_forward", "--topology", "scale_free"),
    )
    adata = read_h5ad(path)
    assert set(adata.obs["perturbation"]) == {
        "control",
        "GENE0001:interference",
        "GENE0002:knockout@0.5[2,6]",
        "GENE0001:overexpression+GENE0003:interference",
    }
    assert set(adata.layers) == {"spliced", "unspliced"}
    assert adata.uns["truth"]["guide_efficacy"].min() >= 0.5
    assert adata.uns["truth"]["guide_efficacy"].max() <= 0.9
    assert not adata.obs["cut"].all()
    data = PerturbSeqDataModule(path=str(path), split={"method": "all", "val": 0.0}, min_cells=1)
    assert "GENE0001_g" in "".join(adata.obs["guide"].astype(str))
    assert data.hparams["path"] == str(path)


def test_network_of_a_file(tmp_path: Path) -> None:
    table = tmp_path / "edges.csv"
    whole = random_network(30, seed=3)
    whole.write(table)
    adata = read_h5ad(simulate(tmp_path, "--network", str(table)))
    assert adata.n_vars == 12
    assert set(adata.var_names) < set(whole.genes)
    edges = pd.merge(adata.uns["network"], whole.edges, on=["regulator", "target"])
    assert len(edges) == len(adata.uns["network"])
    np.testing.assert_allclose(edges["weight_x"], edges["weight_y"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--conditions", "GENE0099"), "condition 'GENE0099': target 'GENE0099' is not a gene of the network"),
        (("--conditions", "GENE0001[5,2]"), "offset 2.0 must be later than onset 5.0"),
        (("--conditions", "GENE0001@1.5"), "dose must lie between 0 and 1"),
        (("--conditions", "GENE0001@-1"), "must be finite and at least 0"),
        (("--doses", "-1"), "doses=[-1.0] must be 0 or more"),
        (("--doses", "2"), "dose must lie between 0 and 1"),
        (("--window", "5", "2"), "offset 2.0 must be later than onset 5.0"),
        (("--singles", "13"), "n_singles=13 must lie between 1 and the 12 genes"),
        (("--doubles", "67"), "12 genes make 66 pairs"),
        (("--motifs", "togle"), "motif 'togle' is not known; did you mean 'toggle'"),
        (("--efficacy", "0.5", "0.6", "0.7"), "--efficacy takes one number or a range of two, not 3"),
        (("--efficacy", "1.2"), "efficacy=(1.2, 1.2) must be (low, high) within [0, 1]"),
        (("--network", "nowhere.csv"), "nowhere.csv"),
        (("--network", "nowhere.csv", "--motifs", "toggle"), "--motifs shapes a random network"),
        (("--times", "0"), "must be positive and increase"),
        (("--noise", "nan"), "--noise is nan: give a finite number"),
        (("--window", "0", "nan"), "--window is nan"),
        (("--depth", "inf"), "--depth is inf"),
        (("--seed", "-1"), "--seed is -1: give 0 or more"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        simulate(tmp_path, *arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_networks_with_loops_and_contradictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "edges.csv"
    rows = [("A", "B", 1), ("B", "A", -1), ("A", "A", 1), ("B", "C", 1), ("C", "A", 1), ("C", "A", -1)]
    pd.DataFrame(rows, columns=["regulator", "target", "sign"]).to_csv(table, index=False)
    main(["simulate", "--output", str(tmp_path / "sim.h5ad"), "--network", str(table), "--cells_per_condition", "3"])
    said = capsys.readouterr()
    assert "40 cells" not in said.out
    assert "39 cells x 3 genes, 3 conditions, 3 edges" in said.out
    assert "left out 1 self loops, 1 pairs of both signs" in said.err
