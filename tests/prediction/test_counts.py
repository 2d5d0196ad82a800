"""Predictions as cells of whole counts: unbiased, as variable as controls, the same after an interruption, and valid elsewhere."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from prediction_setting import CONTEXTS, N_CONTROLS, Trained, command, data_module, trainer
from scipy import stats

import perturbzoo
from perturbzoo import prediction
from perturbzoo.cli import main
from perturbzoo.counts import prediction as counts_prediction
from perturbzoo.counts.dispersion import count_moments, fit_dispersion
from perturbzoo.counts.drawing import draw_counts, round_cells
from perturbzoo.counts.parts import Parts
from perturbzoo.counts.rates import RateTable
from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.models import find_model

# ---------------------------------------------------------------------------------------------- draws, rates, dispersions


@pytest.mark.parametrize(("mu", "theta"), [(0.05, 0.3), (0.7, 0.3), (0.3, 5.0), (0.5, 1e4), (5.0, 0.5), (40.0, 2.0)])
def test_draws_are_negative_binomial(mu: float, theta: float) -> None:
    n = 100_000
    drawn = draw_counts(np.full((n, 1), mu), np.array([theta]), np.random.default_rng(1)).toarray().ravel()
    expected = n * stats.nbinom.pmf(np.arange(60), theta, theta / (theta + mu))
    used = expected > 20
    observed = np.bincount(drawn, minlength=60)[:60]
    assert (
        stats.chisquare(
            np.append(observed[used], n - observed[used].sum()), np.append(expected[used], n - expected[used].sum())
        ).pvalue
        > 1e-4
    )


def test_rates_give_the_mean_of_logarithms() -> None:
    phi, sizes, depth = np.array([0.01, 0.5, 3.0]), np.array([800.0, 2000.0, 5000.0]), 2000.0
    table, mean = RateTable(sizes, depth, phi), np.array([[0.01, 0.4, 2.0], [3.0, 1.0, 0.001]])
    rates, n = table.rates(mean), np.arange(50_000)
    for row, gene in np.ndindex(mean.shape):
        theta = table.theta()[gene]
        direct = [
            (stats.nbinom.pmf(n, theta, theta / (theta + size * rates[row, gene])) * np.log1p(n * depth / size)).sum()
            for size in sizes
        ]
        assert np.mean(direct) == pytest.approx(mean[row, gene], rel=1e-3)
    np.testing.assert_array_equal(table.rates(np.array([0.0, -1.0, 50.0])), [0, 0, 1])


def test_dispersions_are_found_again() -> None:
    generator = np.random.default_rng(0)
    n_genes, n_cells = 600, 3000
    rate, size = generator.lognormal(-8, 1.5, n_genes), generator.lognormal(8, 0.3, n_cells)
    phi = 0.3 + 0.2 / (1 + rate * 1e4)
    counts = draw_counts(size[:, None] * rate, 1 / phi, generator).astype(np.float32)
    counts.data = np.log1p(counts.data * np.repeat(3000 / size, np.diff(counts.indptr))).astype(np.float32)
    found = fit_dispersion(count_moments(counts, size, 3000.0, np.arange(n_cells)))
    informed = rate * size.mean() > 0.3
    assert np.abs(found[informed] / phi[informed] - 1).mean() < 0.15
    assert np.abs(np.median(found[~informed]) / np.median(phi[~informed]) - 1) < 0.3


def test_rounding_is_unbiased_in_log1p_and_returns_measured_cells() -> None:
    generator = np.random.default_rng(0)
    size, depth = generator.integers(100, 300, 40).astype(float), 200.0
    counts = generator.poisson(2.0, (40, 25))
    cells = np.log1p(counts * (depth / size)[:, None]).astype(np.float32)
    np.testing.assert_array_equal(round_cells(cells, size, depth, generator).toarray(), counts)
    moved = cells + generator.normal(0, 0.3, 25).astype(np.float32)  # some below 0
    n = 400
    total = np.zeros(25)
    for _ in range(n):
        drawn = round_cells(moved, size, depth, generator).toarray()
        total += np.log1p(drawn * (depth / size)[:, None]).mean(axis=0)
    # a rounded value lies within log1p(depth / size) of its own: so far at most, the standard error
    error = np.log1p(depth / size.min()) / 2 / np.sqrt(40 * n)
    np.testing.assert_allclose(total / n, np.maximum(moved.mean(axis=0), 0), rtol=0, atol=5 * error)


# ---------------------------------------------------------------------------------------------- models


def fitted(name: str, trained: Trained, folder: Path) -> Any:
    arguments = {"CPA": {"lr": 1e-2}, "FlowMatching": {"components": 5}}.get(name, {})
    model = find_model(name)(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(folder).fit(model, data_module(trained.screen))
    return model.eval()


@pytest.mark.parametrize("name", ["Additive", "CPA", "FlowMatching"])  # a mean, a likelihood, moved cells
def test_pseudobulk_of_sampled_cells_is_unbiased(trained: Trained, tmp_path: Path, name: str) -> None:
    model = perturbzoo.load(trained.additive) if name == "Additive" else fitted(name, trained, tmp_path)
    controls, n = trained.controls(), 60 * N_CONTROLS
    repeated = anndata.concat([controls] * 60)  # the same cells many times, for small standard errors
    repeated.obs_names_make_unique()
    repeated.obs = repeated.obs.drop(columns="perturbation")
    drawn = model.predict(repeated, "G0+G2,G3", as_counts=True)
    expected = model.predict(controls, "G0+G2,G3")
    size = drawn.obs["size_factor"].to_numpy()[:, None]
    values = np.log1p(drawn.X.toarray() / size * model.get_spec().depth)
    for condition in ("G0+G2", "G3"):
        for context in CONTEXTS:
            here = ((drawn.obs["condition"] == condition) & (drawn.obs["context"] == context)).to_numpy()
            there = ((expected.obs["condition"] == condition) & (expected.obs["context"] == context)).to_numpy()
            assert here.sum() == n
            error = values[here].std(axis=0) / np.sqrt(n)
            wanted = np.maximum(expected.X[there].mean(axis=0), 0)
            assert (np.abs(values[here].mean(axis=0) - wanted) < 5 * error + 1e-3).all()


def test_mean_and_variance_are_those_of_controls(trained: Trained, tmp_path: Path) -> None:
    """Of a model that changes nothing, on over-dispersed controls: slope and level of log variance on log mean."""
    generator = np.random.default_rng(0)
    n, genes = 1500, list(trained.adata.var_names)
    rate, size = generator.lognormal(0, 1.0, len(genes)), generator.lognormal(6, 0.3, n)
    counts = draw_counts(size[:, None] * rate / rate.sum(), np.full(len(genes), 2.0), generator).astype(np.float32)
    controls = anndata.AnnData(counts)
    controls.var_names, controls.obs["context"] = genes, "a"
    controls.obs_names = [f"c{cell}" for cell in range(n)]
    model = fitted("NoChange", trained, tmp_path)
    drawn = model.predict(controls, "G0", as_counts=True).X.toarray()
    real = counts.toarray()
    np.testing.assert_allclose(drawn.mean(axis=0), real.mean(axis=0), rtol=0.1)
    lines = [np.polyfit(np.log(x.mean(axis=0)), np.log(x.var(axis=0)), 1) for x in (real, drawn)]
    np.testing.assert_allclose(lines[1], lines[0], rtol=0, atol=0.15)
    poisson = generator.poisson(size[:, None] * rate / rate.sum())  # what a test that cannot fail would let pass
    assert np.abs(np.polyfit(np.log(poisson.mean(axis=0)), np.log(poisson.var(axis=0)), 1) - lines[0]).max() > 0.15
    np.testing.assert_allclose(drawn.sum(axis=1).mean(), real.sum(axis=1).mean(), rtol=0.05)


def test_rates_sum_to_the_whole_at_another_dispersion() -> None:
    """Means of a population that varies more than the controls: told from its means and total, its dispersion is found."""
    generator = np.random.default_rng(0)
    sizes, rate = np.full(4000, 300.0), generator.lognormal(0, 1, 60)
    rate, phi = rate / rate.sum(), np.full(60, 0.3)
    counts = draw_counts(sizes[:, None] * rate, 1 / (2 * phi), generator).toarray()
    mean = np.log1p(counts / sizes[:, None] * 300).mean(axis=0)
    table = RateTable(sizes, 300.0, phi)
    assert table.rates(mean).sum() < 0.97
    shift = table.shift(mean, 1.0)
    assert table.rates(mean, shift).sum() == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(table.theta(shift), 1 / (2 * phi), rtol=0.12)


# ---------------------------------------------------------------------------------------------- files


def test_command_and_python_agree_and_order_does_not_matter(trained: Trained, tmp_path: Path) -> None:
    main(command(trained, tmp_path / "p.h5ad", "--as", "counts", "--cells", "20", conditions="G3,G0+G2"))
    written = anndata.read_h5ad(tmp_path / "p.h5ad")
    model = perturbzoo.load(trained.gears)
    other = model.predict(trained.screen, "G2+G0,G1,G3", n_cells=20, as_counts=True)
    assert written.X.format == "csr"
    assert (written.X.data > 0).all()
    assert (written.X.data == np.rint(written.X.data)).all()
    for condition in ("G3", "G0+G2"):
        one, two = (x[(x.obs["condition"] == condition).to_numpy()] for x in (written, other))
        assert one.n_obs == 20 * len(CONTEXTS)
        np.testing.assert_array_equal(one.X.toarray(), two.X.toarray())
    again = model.predict(trained.screen, "G3,G0+G2", n_cells=20, as_counts=True, seed=1)
    assert (again.X != written.X).nnz > 0
    assert written.uns["perturbzoo"]["value_space"] == "counts"
    assert not list(tmp_path.glob(".*"))


def test_interrupted_run_goes_on_to_the_same_file(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, output = perturbzoo.load(trained.gears), tmp_path / "p.h5ad"
    monkeypatch.setattr(counts_prediction, "_PIECE_VALUES", 7 * 30)  # pieces end within conditions
    whole = model.predict(trained.screen, "G0,G3", as_counts=True)
    put, done = Parts.put, []

    def interrupted(self: Parts, number: int, rows: Any) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(number)
        put(self, number, rows)

    def write(conditions: str = "G0,G3") -> Path:
        return prediction.write_predictions(model, trained.screen, conditions, output, as_counts=True)

    monkeypatch.setattr(Parts, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert not output.exists()
    monkeypatch.setattr(Parts, "put", lambda self, number, rows: done.append(number) or put(self, number, rows))
    with pytest.warns(PerturbZooWarning, match="goes on where an interrupted run ended: 3 of"):
        write()
    assert len(done) == len(set(done))  # nothing was drawn twice
    written = anndata.read_h5ad(output)
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(written.X, name), getattr(whole.X, name))

    done.clear()
    monkeypatch.setattr(Parts, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write()
    monkeypatch.setattr(Parts, "put", put)
    with pytest.warns(PerturbZooWarning, match="of another request"):
        write("G1,G3")
    assert set(anndata.read_h5ad(output).obs["condition"]) == {"G1", "G3"}
    assert [path.name for path in tmp_path.iterdir()] == ["p.h5ad"]


KILLED = """
import os, signal, sys
from perturbzoo.cli import main
from perturbzoo.counts import parts, prediction
prediction._PIECE_VALUES = 7 * 30
put = parts.Parts.put
def dies(self, number, rows):
    put(self, number, rows)
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
parts.Parts.put = dies
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_run_goes_on(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command(trained, tmp_path / "p.h5ad", "--as", "counts")
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / ".p.h5ad.parts").is_dir()
    monkeypatch.setattr(counts_prediction, "_PIECE_VALUES", 7 * 30)
    model = perturbzoo.load(trained.gears)
    with pytest.warns(PerturbZooWarning, match="goes on where an interrupted run ended: 3 of"):
        file = prediction.write_predictions(model, trained.screen, "G0+G2,G3", tmp_path / "p.h5ad", as_counts=True)
    whole = model.predict(trained.screen, "G0+G2,G3", as_counts=True)
    np.testing.assert_array_equal(anndata.read_h5ad(file).X.toarray(), whole.X.toarray())
    assert [path.name for path in tmp_path.iterdir()] == ["p.h5ad"]


def test_cell_eval2_and_evaluate_take_the_file(trained: Trained, tmp_path: Path) -> None:
    from cell_eval2 import norm
    from cell_eval2.config import EvalConfig
    from cell_eval2.io import validate_gene_axis

    file = tmp_path / "p.h5ad"
    prediction.write_predictions(perturbzoo.load(trained.gears), trained.screen, "G0,G3", file, n_cells=25, as_counts=True)
    written, rule = anndata.read_h5ad(file), EvalConfig.from_preset("vcc2026")
    norm.validate_input_type(written, rule.input_type, allow_fractional=rule.allow_fractional_counts)
    norm.check_scale_limit(written, rule.input_type, rule.max_counts_per_cell)
    validate_gene_axis(written.var_names, trained.adata.var_names)
    assert set(written.obs["target_gene"]) == {"G0", "G3"}
    assert set(written.obs["context"]) == set(CONTEXTS)
    for protocol in ("native", "vcc2026"):
        files = ["--predicted", str(file), "--observed", str(trained.screen), "--output", str(tmp_path / "m.csv")]
        main(["evaluate", *files, "--protocol", protocol])
        assert set(pd.read_csv(tmp_path / "m.csv")["condition"]) == {"G0", "G3"}


def test_mistakes(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(command(trained, tmp_path / "p.h5ad", "--as", "counts", "--pseudobulk"))
    assert "counts and pseudobulk exclude each other" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(command(trained, tmp_path / "p.h5ad", "--as", "counts", "--cells", "0"))
    assert "n_cells is 0: give 1 or more" in capsys.readouterr().err
    logged = trained.adata.copy()
    logged.X.data = np.log1p(logged.X.data)
    logged.write_h5ad(tmp_path / "logged.h5ad")
    model = find_model("Additive")()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path / "fit").fit(model, data_module(tmp_path / "logged.h5ad"))
    with pytest.raises(PerturbZooError, match="trained on log1p values, which do not say how many counts"):
        model.predict(tmp_path / "logged.h5ad", "G0", as_counts=True)
    assert not list(tmp_path.glob(".*"))
