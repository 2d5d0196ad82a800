"""The simulator on a network: counts, noise and levels against closed forms; networks with what was asked for."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, score_network
from perturbzoo.simulate import random_network, simulate_screen

# A regulates B, nothing regulates A: A's level is its own closed form
PAIR = GeneRegulatoryNetwork.from_edges(pd.DataFrame({"regulator": ["A"], "target": ["B"], "weight": [2.0]}))


def pair(**options) -> AnnData:
    settings = {
        "conditions": ["A"],
        "cells_per_condition": 2000,
        "n_control": 4000,
        "level_spread": 0.0,
        "noise": 0.0,
        "dispersion": 0.0,
    }
    return simulate_screen(PAIR, **(settings | options))


def cells_of(adata: AnnData, condition: str, **where) -> np.ndarray:
    chosen = adata.obs["perturbation"] == condition
    for column, value in where.items():
        chosen &= adata.obs[column] == value
    return adata.X.toarray()[chosen.to_numpy()]


@pytest.mark.parametrize("dispersion", [0.0, 0.3])
def test_counts_are_negative_binomial(dispersion):
    """Without intrinsic noise a control gene at level 1 has mean depth and variance mean + dispersion mean^2."""
    counts = cells_of(pair(depth=20.0, dispersion=dispersion, n_control=20_000), "control")
    variance = 20 + dispersion * 400
    np.testing.assert_allclose(counts.mean(0), 20, atol=5 * math.sqrt(variance / 20_000))
    np.testing.assert_allclose(counts.var(0), variance, rtol=0.06)


def test_intrinsic_noise_is_poissonian_in_molecules():
    """Birth and death at equal rates give a variance of noise^2 x level; A has no regulator, B sees A's noise beside."""
    adata = pair(noise=0.2, depth=1000.0, n_control=8000, step=0.05)
    levels = cells_of(adata, "control") / 1000
    variance = levels.var(0) - levels.mean(0) / 1000  # less the Poisson part of the counts
    np.testing.assert_allclose(levels.mean(0)[0], 1.0, atol=0.01)
    assert variance[0] == pytest.approx(0.04, rel=0.06)
    assert variance[1] > 0.042


def test_interference_lowers_its_target_by_the_efficacy():
    adata = pair(depth=200.0)
    share = cells_of(adata, "A").mean(0)[0] / cells_of(adata, "control").mean(0)[0]
    assert share == pytest.approx(0.2, rel=0.02)
    truth = adata.uns["truth"]
    assert truth["level"].shape == (1, 2, 2)
    assert truth["level"][0, 1, 0] == pytest.approx(0.2 + 0.8 * math.exp(-10), rel=1e-3)
    np.testing.assert_allclose(cells_of(adata, "A").mean(0) / 200, truth["level"][0, 1], rtol=0.02)
    # B: f = σ(b + W h), b = -W / 2, h = .04 / 1.04 at a level of .2; twice f, for control is at one half
    assert truth["level"][0, 1, 1] == pytest.approx(2 / (1 + math.exp(1 - 2 * 0.04 / 1.04)), rel=2e-3)


def test_harvests_follow_the_time_course():
    adata = pair(times=(0.5, 1.0, 4.0), depth=500.0, step=0.02)
    assert sorted(adata.obs["time"].unique()) == [0.5, 1.0, 4.0]
    for time in (0.5, 1.0, 4.0):
        # the gate is half open at 0 and opens with a ramp of 0.1, which delays the course by 0.1 log 2
        expected = 1 - 0.8 * (1 - math.exp(-(time - 0.1 * math.log(2))))
        assert cells_of(adata, "A", time=time).mean(0)[0] / 500 == pytest.approx(expected, rel=0.02)
        assert cells_of(adata, "control", time=time).mean(0)[0] / 500 == pytest.approx(1.0, rel=0.01)


def test_guides_that_do_not_cut_leave_cells_as_they_were():
    adata = pair(non_cutting=0.3, depth=100.0)
    perturbed = adata.obs["perturbation"] == "A"
    assert adata.obs["cut"][~perturbed].all()
    assert (~adata.obs["cut"][perturbed]).mean() == pytest.approx(0.3, abs=0.05)
    assert cells_of(adata, "A", cut=False).mean(0)[0] == pytest.approx(100, rel=0.02)
    assert cells_of(adata, "A", cut=True).mean(0)[0] == pytest.approx(20, rel=0.02)


def test_kinds_doses_and_combinations():
    texts = ["A:interference@0.5", "A:overexpression@2", "A:clamp@3", "A:knockout", "A:activation+B:clamp@0.5"]
    adata = pair(conditions=texts, efficacy=(1.0, 1.0), cells_per_condition=1)
    truth = adata.uns["truth"]
    levels = dict(zip(truth["condition"], truth["level"][0], strict=True))
    assert list(levels) == ["control", *texts]
    expected = [0.5, 1 + 2 * 5, 3.0, 1.0, 5.0]
    np.testing.assert_allclose([levels[text][0] for text in texts], expected, rtol=1e-3)
    assert levels["A:activation+B:clamp@0.5"][1] == pytest.approx(0.5, rel=1e-3)
    # with the function of A lost, h = 0: f = σ(-W / 2)
    assert levels["A:knockout"][1] == pytest.approx(2 / (1 + math.e), rel=2e-3)


def test_depths_of_cells_scale_all_genes():
    adata = pair(depth_spread=0.5, depth=300.0)
    assert np.log(adata.obs["size"]).std() == pytest.approx(0.5, rel=0.05)
    np.testing.assert_allclose(
        (cells_of(adata, "control") / adata.obs["size"][adata.obs.perturbation == "control"].to_numpy()[:, None]).mean(0),
        300,
        rtol=0.02,
    )


def test_dropout_halves_counts_at_its_midpoint():
    kept = cells_of(pair(depth=10.0, dropout=10.0), "control").mean() / 10
    assert kept == pytest.approx(0.5, abs=0.02)
    # odds of 4^1.5 to 1 at four times the midpoint
    assert cells_of(pair(depth=40.0, dropout=10.0), "control").mean() / 40 == pytest.approx(8 / 9, abs=0.02)


def test_cell_types_differ_in_their_basal_levels():
    adata = simulate_screen(
        n_genes=30,
        contexts=2,
        context_shift=0.6,
        conditions=["GENE0001"],
        cells_per_condition=5,
        n_control=800,
        noise=0.0,
        depth=50.0,
    )
    levels = adata.uns["truth"]["level"][:, 0]
    assert np.log(levels[1] / levels[0]).std() == pytest.approx(0.6, rel=0.4)
    for number, name in enumerate(("type1", "type2")):
        np.testing.assert_allclose(cells_of(adata, "control", cell_type=name).mean(0) / 50, levels[number], rtol=0.1)


def test_default_screen_and_its_truth(tmp_path):
    adata = simulate_screen(n_genes=20, n_doubles=3, cells_per_condition=10)
    assert adata.obs["perturbation"].value_counts()["control"] == 100
    assert len(adata.uns["truth"]["condition"]) == 1 + 20 + 3
    assert list(adata.uns["network"].columns) == ["regulator", "target", "weight"]
    adata.write_h5ad(tmp_path / "x.h5ad")
    back = read_h5ad(tmp_path / "x.h5ad")
    network = GeneRegulatoryNetwork.from_edges(back.uns["network"], back.var_names)
    np.testing.assert_array_equal(network.matrix().toarray(), random_network(20, seed=0).matrix().toarray())
    truth = back.uns["truth"]
    change = np.log(truth["level"][0, 1:21] / truth["level"][0, 0])
    # what falls when its regulator falls is activated by it
    effects = pd.DataFrame(-change.T, index=truth["gene"], columns=truth["condition"][1:21])
    score = score_network(effects, network)
    assert score.auprc_ratio > 3
    assert score.sign_accuracy > 0.8


def test_seeds():
    options = {"n_genes": 10, "cells_per_condition": 5}
    one, same, other = (simulate_screen(seed=seed, **options) for seed in (1, 1, 2))
    assert (one.X != same.X).nnz == 0
    pd.testing.assert_frame_equal(one.obs, same.obs)
    assert (one.X != other.X).nnz > 0


def test_threads_do_not_change_the_screen():
    """20 genes and 7,000 cells make two chunks."""
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(simulate_screen(n_genes=20, conditions=["GENE0001"], n_control=7000, times=(1.0,)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert (found[0].X != found[1].X).nnz == 0
    np.testing.assert_array_equal(found[0].uns["truth"]["level"], found[1].uns["truth"]["level"])


def test_random_networks():
    network = random_network(400, in_degree=2.5, seed=3)
    incoming = np.bincount(network.target, minlength=400)
    assert incoming.min() >= 1
    assert incoming.mean() == pytest.approx(2.5, abs=0.25)
    assert (network.regulator != network.target).all()
    assert (network.sign < 0).mean() == pytest.approx(0.4, abs=0.06)
    assert np.abs(network.weight).min() >= 1.0
    assert np.abs(network.weight).max() <= 2.5
    hubs = random_network(400, n_regulators=50, scale_free=1.0, seed=3)
    assert len(hubs.regulators) <= 50
    outgoing = np.sort(np.bincount(hubs.regulator))[::-1]
    # the first of 50 ranks has 1 / H(50) = 22 % of the weight
    assert outgoing[0] > 0.15 * len(hubs)


def test_motifs_are_planted():
    network = random_network(60, motifs={"toggle": 2, "repressilator": 1}, seed=1)
    signs = network.matrix("sign").toarray()
    mutual = [(i, j) for i, j in zip(*np.nonzero((signs == -1) & (signs.T == -1)), strict=True) if i < j]
    assert len(mutual) >= 2
    repress = (signs == -1).astype(float)
    assert np.trace(repress @ repress @ repress) >= 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pair(conditions=["C"]), "target 'C' is not a gene of the network"),
        (lambda: pair(conditions=["A@1.4"]), "condition 'A@1.4~0.8'.*dose must lie between 0 and 1"),
        (lambda: pair(n_doubles=1), "n_doubles draws pairs of all genes"),
        (lambda: simulate_screen(n_genes=5, n_doubles=11), "n_doubles=11, but 5 genes make 10 pairs"),
        (lambda: pair(times=()), r"times=\[\] must be positive and increase"),
        (lambda: pair(times=(2, 1)), "must be positive and increase"),
        (lambda: pair(efficacy=(0.5, 1.2)), "efficacy="),
        (lambda: pair(non_cutting=-0.1), "non_cutting=-0.1 is a share"),
        (lambda: pair(noise=-1.0), "must not be negative"),
        (lambda: pair(depth=0.0), "depth=0.0 must be positive"),
        (lambda: pair(step=2.0), "step=2.0 must lie above 0"),
        (lambda: pair(cells_per_condition=0), "start at 1"),
        (lambda: random_network(1), "n_genes=1 must be 2 at least"),
        (lambda: random_network(10, in_degree=0.5), "in_degree=0.5"),
        (lambda: random_network(10, motifs={"togle": 1}), "did you mean 'toggle'"),
        (lambda: random_network(10, motifs={"repressilator": 4}), "need 12 regulators, there are 10"),
        (lambda: random_network(10, n_regulators=11), "n_regulators=11 must lie between 2 and n_genes=10"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
