"""The linear simulator against its own equations: algebra of the network, moments of the counts, the GO table, bad input."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from perturbzoo.errors import PerturbZooError
from perturbzoo.perturbation import parse_condition
from perturbzoo.simulate import simulate_linear, truth_frame, write_go_table
from perturbzoo.simulate.linear import combine_effects, expected_log1p

SMALL: dict[str, Any] = {
    "n_genes": 80,
    "n_singles": 12,
    "n_doubles": 10,
    "cells_per_condition": 5,
    "n_control": 20,
    "n_processes": 4,
}


def _matrix(adata: anndata.AnnData) -> pd.DataFrame:
    """W[target, regulator] over all nodes, rebuilt from the edge table."""
    table = adata.uns["network"]
    nodes = sorted({*adata.var_names, *table["regulator"], *table["target"]})
    matrix = pd.DataFrame(0.0, index=nodes, columns=nodes)
    for edge in table.itertuples():
        matrix.loc[edge.target, edge.regulator] = edge.weight
    return matrix


@pytest.mark.parametrize("unmeasured", [0.0, 0.5])
@pytest.mark.parametrize(("kind", "sign"), [("knockout", -1), ("interference", -1), ("activation", 1)])
def test_singles_solve_the_network(unmeasured: float, kind: Any, sign: int) -> None:
    adata = simulate_linear(**SMALL, unmeasured_targets=unmeasured, kind=kind, strength=1.3)
    matrix = _matrix(adata)
    assert np.abs(np.linalg.eigvals(matrix)).max() < 1
    effects = np.linalg.inv(np.eye(len(matrix)) - matrix.to_numpy())
    latent, truth = truth_frame(adata, "latent"), adata.uns["truth"]
    for target, efficacy in zip(truth["target"], truth["efficacy"], strict=True):
        column = pd.Series(effects[:, matrix.columns.get_loc(target)], index=matrix.index)[adata.var_names]
        np.testing.assert_allclose(latent.loc[target], sign * 1.3 * efficacy * column, atol=1e-6)
    assert (latent.loc["control"] == 0).all()


def test_doubles_follow_the_formula() -> None:
    first, second = np.array([1.0, -1.0, 2.0, 0.0, -3.0]), np.array([0.5, 2.0, 0.0, 0.7, -4.0])
    np.testing.assert_allclose(combine_effects(first, second, 0.0), [1.5, 1.0, 2.0, 0.7, -7.0])
    np.testing.assert_allclose(combine_effects(first, second, 0.5), [1.25, 1.0, 2.0, 0.7, -5.5])
    np.testing.assert_allclose(combine_effects(first, second, 1.0), [1.0, 1.0, 2.0, 0.7, -4.0])
    np.testing.assert_allclose(combine_effects(second, first, 0.3), combine_effects(first, second, 0.3))


def test_doubles_without_common_genes_are_additive() -> None:
    adata = simulate_linear(**SMALL | {"n_doubles": 66}, crosstalk=0.0, shared_response=0.0, interaction=1.0)
    latent = truth_frame(adata, "latent")
    disjoint, overlapping = 0, 0
    for name in latent.index[latent.index.str.contains("+", regex=False)]:
        first, second = latent.loc[name.split("+")].to_numpy()
        error = np.abs(latent.loc[name] - first - second).max()
        if not (first * second).any():
            disjoint += 1
            assert error < 1e-6
        elif ((first * second) > 1e-3).any():
            overlapping += 1
            assert error > 1e-3
    assert disjoint >= 66 / 2  # 3 of 4 pairs come from two different processes
    assert overlapping > 0


def test_pseudobulks_converge_to_the_truth() -> None:
    adata = simulate_linear(
        60, 3, 2, 6000, 6000, n_processes=2, unmeasured_targets=1 / 3, contexts=2, batch_shift=0.3, depth=400, seed=3
    )
    expression = np.log1p(adata.X.toarray() / adata.obs["depth"].to_numpy()[:, None] * 400)
    scores = []
    for cell_type in ("line1", "line2"):
        truth = truth_frame(adata, "expression", cell_type)
        for condition in truth.index:
            cells = expression[(adata.obs["perturbation"] == condition) & (adata.obs["cell_type"] == cell_type)]
            assert len(cells) == 6000
            scores.append((cells.mean(0) - truth.loc[condition]) / (cells.std(0) / np.sqrt(len(cells))))
    score = np.concatenate(scores)  # 720 standard normal variables, if the truth is the truth
    assert np.abs(score).max() < 4.8
    assert np.mean(score**2) == pytest.approx(1, abs=0.25)


def test_latent_effects_are_log_ratios_of_shares() -> None:
    adata = simulate_linear(40, 2, 1, 4000, 4000, n_processes=1, context_shift=0, batches=1, depth=4000, dispersion=0.1, seed=1)
    share = adata.X.toarray() / adata.obs["depth"].to_numpy()[:, None]
    names, latent = adata.obs["perturbation"].to_numpy(), truth_frame(adata, "latent")
    for condition in latent.index[1:]:
        ratio = np.log(share[names == condition].mean(0) / share[names == "control"].mean(0))
        # shares add up to 1: all genes are off by the same constant
        residual = ratio - latent.loc[condition].to_numpy()
        assert np.abs(residual - np.median(residual)).max() < 0.1
        assert np.abs(latent.loc[condition]).max() > 1


@pytest.mark.parametrize("dispersion", [0.0, 0.3, 1.5])
def test_variance_of_the_counts(dispersion: float) -> None:
    adata = simulate_linear(50, 1, 0, 1, 20_000, n_processes=1, batches=1, depth=1000, depth_spread=0, dispersion=dispersion)
    counts = adata.X[(adata.obs["perturbation"] == "control").to_numpy()].toarray()
    mean, variance = counts.mean(0), counts.var(0)
    np.testing.assert_allclose(variance, mean + dispersion * mean**2, rtol=0.15)
    assert np.median(variance / (mean + dispersion * mean**2)) == pytest.approx(1, abs=0.03)


def test_expected_log1p_closed_forms() -> None:
    share = np.geomspace(1e-7, 0.05, 300)
    poisson = expected_log1p(share, 2000.0, 0.0, 0.0)
    counts = np.arange(400)
    exact = stats.poisson(share[:, None] * 2000).pmf(counts) @ np.log1p(counts)
    np.testing.assert_allclose(poisson, exact, rtol=1e-4)
    rare = share < 1e-6  # one count or none
    np.testing.assert_allclose(expected_log1p(share, 2000.0, 0.0, 0.7)[rare], share[rare] * 2000 * np.log(2), rtol=5e-3)
    # Jensen: with noise the mean of the logarithm lies below the logarithm of the mean, and the more the more noise
    noisy = expected_log1p(share, 2000.0, 0.0, 0.5)
    assert (noisy < poisson).all()
    assert (poisson < np.log1p(share * 2000)).all()
    # many counts: no noise is left but that of the gamma, whose log has the mean digamma(k) - log(k)
    deep = expected_log1p(np.array([0.01, 0.02]), 1e6, 0.2, 0.25)
    np.testing.assert_allclose(deep, np.log([1e4, 2e4]) + stats.loggamma(4).mean() - np.log(4), atol=2e-3)


def test_same_seed_same_bytes() -> None:
    first, second, other = (simulate_linear(**SMALL, contexts=2, seed=seed) for seed in (7, 7, 8))
    for name in ("data", "indices", "indptr"):
        assert getattr(first.X, name).tobytes() == getattr(second.X, name).tobytes()
    pd.testing.assert_frame_equal(first.obs, second.obs)
    for table in ("network", "go"):
        pd.testing.assert_frame_equal(first.uns[table], second.uns[table])
    assert first.X.data.tobytes() != other.X.data.tobytes()
    assert not first.uns["network"].equals(other.uns["network"])


def test_truth_does_not_depend_on_the_number_of_cells() -> None:
    few, many = (simulate_linear(**SMALL | {"cells_per_condition": size}, seed=2) for size in (2, 30))
    pd.testing.assert_frame_equal(few.uns["network"], many.uns["network"])
    pd.testing.assert_frame_equal(few.uns["go"], many.uns["go"])
    pd.testing.assert_frame_equal(truth_frame(few), truth_frame(many))


def test_layout_of_the_screen() -> None:
    adata = simulate_linear(**SMALL, contexts=3, batches=2, unmeasured_targets=0.25)
    assert adata.shape == (3 * (20 + 22 * 5), 80)
    assert adata.X.dtype == np.float32
    assert (adata.X.data == np.rint(adata.X.data)).all()
    assert adata.X.data.min() >= 1
    assert adata.obs_names.is_unique
    sizes = adata.obs.groupby(["cell_type", "perturbation"], observed=True).size().unstack()
    assert (sizes["control"] == 20).all()
    assert (sizes.drop(columns="control") == 5).all().all()
    conditions = list(adata.obs["perturbation"].cat.categories)
    assert len(set(conditions)) == 1 + 12 + 10
    assert [str(parse_condition(name)) for name in conditions] == conditions
    targets = {act.target for name in conditions for act in parse_condition(name)}
    assert targets == set(adata.uns["truth"]["target"])
    assert len(targets - set(adata.var_names)) == 3
    assert targets <= set(adata.uns["go"]["gene"])
    assert adata.obs.groupby("perturbation", observed=True)["batch"].nunique().eq(2).all()
    lines = [truth_frame(adata, "expression", name).loc["control"] for name in ("line1", "line2", "line3")]
    assert np.corrcoef(lines).min() > 0.5
    assert np.abs(lines[0] - lines[1]).mean() > 0.1


def test_cells_are_not_sorted() -> None:
    adata = simulate_linear(**SMALL)
    codes = adata.obs["perturbation"].cat.codes.to_numpy()
    assert abs(stats.spearmanr(codes, np.arange(len(codes))).statistic) < 0.3


def test_activation_mirrors_interference() -> None:
    down, up = (truth_frame(simulate_linear(**SMALL, kind=kind), "latent") for kind in ("interference", "activation"))
    pd.testing.assert_frame_equal(down, -up)
    own = pd.Series({name: down.loc[name, name] for name in down.columns.intersection(down.index)})
    assert len(own) == 12
    assert (own < 0).mean() > 0.9  # feedback loops may turn a target around, but hardly ever do


@pytest.mark.parametrize("seed", range(4))
def test_go_overlap_tells_of_effects(seed: int) -> None:
    adata = simulate_linear(300, 60, 0, 1, 1, unmeasured_targets=0.5, seed=seed)
    targets = list(adata.uns["truth"]["target"])
    terms = adata.uns["go"].groupby("gene")["term"].agg(set)
    overlap = np.array([[len(terms[a] & terms[b]) / len(terms[a] | terms[b]) for b in targets] for a in targets])
    effect = truth_frame(adata, "latent").loc[targets].to_numpy()
    effect /= np.linalg.norm(effect, axis=1, keepdims=True)
    pairs = np.triu_indices(len(targets), 1)
    likeness, overlap = (effect @ effect.T)[pairs], overlap[pairs]
    assert (overlap > 0.3).sum() > 20
    assert likeness[overlap > 0.3].mean() > likeness[overlap == 0].mean() + 0.15
    assert stats.spearmanr(likeness, overlap).pvalue < 1e-3


def test_fewer_processes_make_effects_more_alike() -> None:
    def likeness(**arguments: Any) -> float:
        adata = simulate_linear(300, 40, 0, 1, 1, **arguments)
        effect = truth_frame(adata, "latent").loc[list(adata.uns["truth"]["target"])].to_numpy()
        return np.abs(np.corrcoef(effect))[np.triu_indices(40, 1)].mean()

    assert likeness(n_processes=2) > likeness(n_processes=10) + 0.1
    assert likeness(shared_response=1.0) > likeness(shared_response=0.0) + 0.1


def test_files_round_trip(tmp_path: Any) -> None:
    adata = simulate_linear(**SMALL)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    again = anndata.read_h5ad(tmp_path / "screen.h5ad")
    np.testing.assert_array_equal(truth_frame(again), truth_frame(adata))
    assert list(truth_frame(again).columns) == list(adata.var_names)
    assert list(truth_frame(again[:, :7]).index) == list(adata.obs["perturbation"].cat.categories)
    table = pd.read_csv(write_go_table(again, tmp_path / "go.csv"))
    pd.testing.assert_frame_equal(table, adata.uns["go"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["go.csv", "screen.h5ad"]


def test_delta_is_expression_less_control() -> None:
    adata = simulate_linear(**SMALL, contexts=2)
    expression, delta = (truth_frame(adata, what, "line2") for what in ("expression", "delta"))
    np.testing.assert_allclose(delta, expression - expression.loc["control"], atol=1e-7)
    assert (delta.loc["control"] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_singles": 0}, "n_singles"),
        ({"contexts": 0}, "contexts"),
        ({"crosstalk": 1.1}, r"crosstalk=1.1 must lie in \[0, 1\]"),
        ({"interaction": -0.1}, "interaction=-0.1"),
        ({"unmeasured_targets": 5}, "unmeasured_targets=5 is a fraction"),
        ({"efficacy": (0.9, 0.5)}, "efficacy"),
        ({"kind": "compound"}, "kind='compound' cannot be simulated here; choose one of knockout"),
        ({"depth": 0.0}, "depth=0.0"),
        ({"dispersion": -1.0}, "dispersion"),
        ({"n_genes": 24}, "n_genes=24 leaves no gene to regulate beside 24 regulators"),
        ({"n_doubles": 67}, "n_doubles=67, but 12 targets make 66 pairs"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PerturbZooError, match=message):
        simulate_linear(**SMALL | arguments)


def test_questions_without_an_answer(tmp_path: Any) -> None:
    adata = simulate_linear(**SMALL, contexts=2)
    with pytest.raises(PerturbZooError, match="cell_type is missing: the screen has line1, line2"):
        truth_frame(adata)
    with pytest.raises(PerturbZooError, match="cell_type 'line3' was not simulated; did you mean 'line"):
        truth_frame(adata, "delta", "line3")
    with pytest.raises(PerturbZooError, match="no 'fixed_point': only screens of simulate_screen have it"):
        truth_frame(adata, "fixed_point", "line1")
    with pytest.raises(PerturbZooError, match="only simulated files"):
        write_go_table(anndata.AnnData(np.ones((2, 2))), tmp_path / "go.csv")
    with pytest.raises(PerturbZooError, match="cannot write the GO table"):
        write_go_table(adata, tmp_path / "nowhere" / "go.csv")
