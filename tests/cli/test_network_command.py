"""``perturbzoo network``: from a small simulated screen to a table and back, and its mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbzoo.cli import main
from perturbzoo.grn import GeneRegulatoryNetwork, infer_network, score_network
from perturbzoo.grn.inference import NAMES, RANKED_BY
from perturbzoo.network_command import METHOD_NAMES, read_effects
from perturbzoo.simulate import simulate_screen


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "sim.h5ad"
    simulate_screen(n_genes=12, cells_per_condition=60, noise=0.05, depth=20.0, seed=3).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def truth(file: Path) -> GeneRegulatoryNetwork:
    from anndata import read_h5ad

    adata = read_h5ad(file)
    return GeneRegulatoryNetwork.from_edges(adata.uns["network"], list(adata.var_names))


def test_choices_are_the_registry() -> None:
    assert NAMES == METHOD_NAMES


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_round_trip(method: str, file: Path, truth: GeneRegulatoryNetwork, tmp_path: Path) -> None:
    output = tmp_path / "edges.csv"
    main(["network", "--data", str(file), "--method", method, "--output", str(output), "--bootstraps", "2"])
    table = pd.read_csv(output)
    assert list(table) == ["regulator", "target", "weight", "sign", "probability"]
    assert (np.diff(table[RANKED_BY.get(method, "weight")].abs()) <= 0).all()
    assert [path.name for path in tmp_path.iterdir()] == ["edges.csv"]
    effects, levels, _ = read_effects(file)
    network = infer_network(effects, method, levels=levels, bootstraps=2)
    read = GeneRegulatoryNetwork.read(output, effects.genes)
    np.testing.assert_allclose(read.matrix().toarray(), network.matrix().toarray(), rtol=1e-12)
    np.testing.assert_allclose(read.probability, network.probability)
    if method in ("grn_ode", "lasso", "mra", "total_effect", "trees"):
        # what was simulated comes out well ahead of a random order; correlations know no direction
        assert score_network(read, truth).auprc_ratio > 2


def test_effects_are_changes_of_normalised_means(file: Path) -> None:
    from anndata import read_h5ad

    adata = read_h5ad(file)
    counts = adata.X.toarray().astype(float)
    total = counts.sum(1, keepdims=True)
    logged = np.log1p(counts / total * np.median(total))
    label = adata.obs["perturbation"].to_numpy()
    effects, _, _ = read_effects(file)
    expected = [logged[label == str(one)].mean(0) - logged[label == "control"].mean(0) for one in effects.conditions]
    np.testing.assert_allclose(effects.delta, expected, atol=1e-5)


def test_prior_regulators_and_report(
    file: Path, truth: GeneRegulatoryNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth.write(tmp_path / "prior.csv")
    (tmp_path / "regulators.txt").write_text("\n".join(truth.regulators) + "\n")
    arguments = ["--data", str(file), "--output", str(tmp_path / "edges.csv"), "--bootstraps", "0"]
    prior = ["--prior", str(tmp_path / "prior.csv"), "--prior_use", "restrict"]
    main(["network", *arguments, *prior, "--regulators", str(tmp_path / "regulators.txt"), "--kind", "interference"])
    found = set(map(tuple, pd.read_csv(tmp_path / "edges.csv")[["regulator", "target"]].to_numpy()))
    assert found
    assert found <= set(map(tuple, truth.edges[["regulator", "target"]].to_numpy()))
    out = capsys.readouterr().out
    assert "genes        12 measured: 12 perturbed alone, 0 not" in out
    assert f"prior        {len(truth)} edges between genes of the network, {len(found)} of them found" in out
    assert "rest on the prior alone" in out
    assert "kind 'interference'" in out


def test_kinetics_take_a_prior_and_say_what_rests_on_it(
    file: Path, truth: GeneRegulatoryNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth.write(tmp_path / "prior.csv")
    arguments = ["--data", str(file), "--method", "grn_ode", "--bootstraps", "0", "--kind", "interference"]
    scores = []
    for number, prior in enumerate(([], ["--prior", str(tmp_path / "prior.csv")])):
        output = tmp_path / f"edges{number}.csv"
        main(["network", *arguments, *prior, "--output", str(output)])
        scores.append(score_network(GeneRegulatoryNetwork.read(output, list(truth.genes)), truth).auprc)
    assert scores[1] > scores[0], "the truth as a prior cannot but help"
    assert f"prior        {len(truth)} edges between genes of the network" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"--data": "gone.h5ad"}, "gone.h5ad: no such file"),
        ({"--output": "nowhere/edges.csv"}, "there is no folder"),
        ({"--output": "edges.xlsx"}, "the name must end in .csv, .csv.gz or .parquet"),
        ({"--output": "."}, "is a folder; name a file in it"),
        ({"--prior": "gone.csv"}, "gone.csv"),
        ({"--prior": "bare.csv"}, "regulators"),
        ({"--regulators": "names.txt"}, "none of the 1 regulators is a measured gene: nobody"),
        ({"--prior_strength": "3"}, "prior_strength is 3"),
        ({"--condition_key": "perturbatio"}, "perturbation"),
    ],
)
def test_mistakes_are_one_line(
    wrong: dict[str, str], message: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare.csv").write_text("one,two\nA,B\n")
    Path("names.txt").write_text("nobody\n")
    settings = {"--data": str(file), "--output": "edges.csv", "--bootstraps": "0"} | wrong
    with pytest.raises(SystemExit) as stop:
        main(["network", *(word for item in settings.items() for word in item)])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert not Path("edges.csv").exists()
