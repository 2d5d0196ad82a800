"""The simulator on a network: counts, noise, guides, time and levels against closed forms."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad

from perturbzoo.data.columns import find_kind
from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, Interventions, RegulatoryDynamics, score_network, steady_state
from perturbzoo.perturbation import Condition, parse_condition
from perturbzoo.simulate import random_network, simulate_screen, truth_frame

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
        # the gate opens around 0 as a logistic curve of width 0.1, over which e^t has the mean π 0.1 / sin(π 0.1)
        expected = 1 - 0.8 * (1 - math.exp(-time) * 0.1 * math.pi / math.sin(0.1 * math.pi))
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


def test_fixed_points_are_those_of_the_dynamics():
    """Rebuilt from what the file says, the dynamics come to rest where it says."""
    adata = simulate_screen(n_genes=15, n_doubles=5, efficacy=(0.3, 1.0), cells_per_condition=1, times=(40.0,), seed=4)
    truth = adata.uns["truth"]
    network = GeneRegulatoryNetwork.from_anndata(adata)
    np.testing.assert_array_equal(network.edges["weight"], adata.uns["network"]["weight"])
    dynamics = RegulatoryDynamics(network, kinetics="hill", reference=truth["level"][0, 0]).requires_grad_(False)
    efficacy = dict(zip(truth["target"], truth["efficacy"], strict=True))
    conditions = [
        Condition(replace(act, efficacy=efficacy[act.target]) for act in parse_condition(text)) for text in truth["condition"]
    ]
    acts = Interventions.from_conditions(conditions, network.genes, default_kind="interference")
    context = torch.zeros(len(conditions), dtype=torch.int64)
    rest = steady_state(dynamics.bind(acts, context), dynamics.control_state[context])
    np.testing.assert_allclose(truth["fixed_point"][0], rest, rtol=1e-3)
    np.testing.assert_allclose(truth["level"][0], rest, rtol=2e-3)  # forty lifetimes are long
    np.testing.assert_allclose(truth["effect"], np.log(truth["level"] / truth["level"][:, :1]), atol=1e-5)


def test_truth_of_expression_is_the_mean_of_cells():
    """Normalised to the median depth, logged and averaged, cells without intrinsic noise have the mean that the truth says."""
    options = {"n_genes": 30, "conditions": ["GENE0003"], "cells_per_condition": 4000, "n_control": 4000, "noise": 0.0}
    adata = simulate_screen(**options, depth=20.0, depth_spread=0.2, batches=2, batch_shift=0.3)
    counts = adata.X.toarray().astype(float)
    total = counts.sum(1, keepdims=True)
    values = np.log1p(counts / total * np.median(total))
    expression, delta = truth_frame(adata, "expression"), truth_frame(adata, "delta")
    means = {name: values[(adata.obs["perturbation"] == name).to_numpy()].mean(0) for name in expression.index}
    for name in expression.index:
        np.testing.assert_allclose(means[name], expression.loc[name], atol=0.05)
    np.testing.assert_allclose(means["GENE0003"] - means["control"], delta.loc["GENE0003"], atol=0.06)
    assert truth_frame(adata, "latent").loc["GENE0003", "GENE0003"] == pytest.approx(math.log(0.2), rel=0.2)


def test_contexts_share_the_network():
    """What a knock-down reaches is what the network leads to, whatever the basal levels; how far it moves differs."""
    import networkx

    network = random_network(25, n_regulators=10, in_degree=1.2, seed=2)
    adata = simulate_screen(network, contexts=2, context_shift=0.8, cells_per_condition=1, seed=2)
    graph = GeneRegulatoryNetwork.from_edges(adata.uns["network"], list(adata.var_names)).to_networkx()
    effect = {name: truth_frame(adata, "latent", name) for name in ("type1", "type2")}
    for gene in adata.var_names:
        reached = adata.var_names.isin([gene, *networkx.descendants(graph, gene)])
        for frame in effect.values():
            assert (np.abs(frame.loc[gene, ~reached]) < 1e-4).all()
            direct = list(graph.successors(gene))
            assert (np.abs(frame.loc[gene, direct]) > 1e-3).all()
    assert np.abs(effect["type1"] - effect["type2"]).to_numpy().max() > 0.05
    assert adata.obs["cell_type"].value_counts().nunique() == 1


def test_doses_are_monotone():
    doses = (0.25, 0.5, 0.75, 1.0)
    down = pair(conditions=None, n_singles=1, doses=doses, cells_per_condition=1, times=(40.0,))
    level = truth_frame(down, "level")
    assert list(level.index) == ["control", "A@0.25", "A@0.5", "A@0.75", "A"]
    np.testing.assert_allclose(level["A"], [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-4)
    assert (np.diff(level["B"]) < 0).all()
    assert set(down.obs["dose"]) == {"0", "0.25", "0.5", "0.75", "1"}
    up = pair(conditions=None, n_singles=1, doses=doses, kind="activation", efficacy=(1.0, 1.0), cells_per_condition=1)
    np.testing.assert_allclose(truth_frame(up, "level")["A"], [1, 2, 3, 4, 5], rtol=1e-3)
    assert (np.diff(truth_frame(up, "level")["B"]) > 0).all()


def test_windows_close():
    adata = pair(conditions=None, n_singles=1, window=(1.0, 4.0), times=(0.5, 3.5, 16.0), depth=500.0, efficacy=(1.0, 1.0))
    assert truth_frame(adata).index.tolist() == ["control", "A[1,4]"]
    before, inside, after = (cells_of(adata, "A[1,4]", time=time).mean(0) / 500 for time in (0.5, 3.5, 16.0))
    np.testing.assert_allclose(before, 1, rtol=0.02)
    # the gate opens around 1 as in the time course above, and has not begun to close
    assert inside[0] == pytest.approx(math.exp(-2.5) * 0.1 * math.pi / math.sin(0.1 * math.pi), rel=0.05)
    np.testing.assert_allclose(after, 1, rtol=0.02)
    truth = adata.uns["truth"]
    assert truth["course"].shape == (3, 1, 2, 2)
    np.testing.assert_array_equal(truth["course"][-1], truth["level"])
    np.testing.assert_allclose(truth["fixed_point"][0, 1], 1, rtol=1e-4)


def test_spliced_and_unspliced():
    """At rest u / s = γ / β; production halved halves both; X is the spliced."""
    adata = pair(splicing=True, splicing_rate=4.0, depth=400.0, efficacy=(0.5, 0.5), times=(25.0,))
    assert (adata.layers["spliced"] != adata.X).nnz == 0
    for condition, level in (("control", 1.0), ("A", 0.5)):
        chosen = (adata.obs["perturbation"] == condition).to_numpy()
        spliced, unspliced = (adata.layers[name][chosen, 0].mean() / 400 for name in ("spliced", "unspliced"))
        assert spliced == pytest.approx(level, rel=0.01)
        assert unspliced / spliced == pytest.approx(0.25, rel=0.01)
    assert truth_frame(adata, "level").loc["A", "A"] == pytest.approx(0.5, rel=1e-3)


def test_cells_have_spread_by_the_first_harvest():
    """Without a burn-in, variance at time t would be (1 - exp(-2 t)) of what it comes to: 18 % at 0.1."""
    for burn_in, share in ((None, 1.0), (0.0, 1 - math.exp(-0.2))):
        levels = cells_of(pair(noise=0.2, times=(0.1,), burn_in=burn_in, depth=1e5, step=0.02), "control")[:, 0] / 1e5
        assert levels.var() == pytest.approx(0.04 * share, rel=0.1)


def test_guides_differ_in_efficacy():
    adata = pair(guides=3, efficacy=(0.2, 1.0), depth=300.0, cells_per_condition=3000, conditions=["A", "A+B"])
    truth = adata.uns["truth"]
    assert list(truth["guide"]) == ["A_g1", "A_g2", "A_g3", "B_g1", "B_g2", "B_g3"]
    efficacy = dict(zip(truth["guide"], truth["guide_efficacy"], strict=True))
    for guide in ("A_g1", "A_g2", "A_g3"):
        cells = cells_of(adata, "A", guide=guide)
        assert len(cells) == pytest.approx(1000, abs=150)
        assert cells.mean(0)[0] / 300 == pytest.approx(1 - efficacy[guide], rel=0.03)
        # the same guide does the same in the combination, whatever the other target's
        pairs = adata.obs["guide"].astype(str).str.startswith(f"{guide}+").to_numpy()
        assert adata.X[pairs, 0].mean() / 300 == pytest.approx(1 - efficacy[guide], rel=0.03)
    assert truth["efficacy"][0] == pytest.approx(np.mean([efficacy[f"A_g{number}"] for number in (1, 2, 3)]))
    assert set(adata.obs["guide"][adata.obs["perturbation"] == "control"]) == {"non-targeting"}


def test_batches_scale_each_gene():
    adata = simulate_screen(
        n_genes=60,
        conditions=["GENE0001"],
        cells_per_condition=4,
        n_control=2000,
        batches=2,
        batch_shift=0.4,
        depth=100.0,
        noise=0.0,
    )
    one, two = (np.log(cells_of(adata, "control", batch=name).mean(0)) for name in ("batch1", "batch2"))
    # two independent normal numbers of this deviation
    assert (one - two).std() == pytest.approx(0.4 * math.sqrt(2), rel=0.3)
    single = pair(batch_shift=0.4, depth=100.0)
    np.testing.assert_allclose(cells_of(single, "control").mean(0), 100, rtol=0.01)


def test_kinds_are_spelled_out_where_they_are_mixed():
    """The data module then needs to guess nothing; where all are of the default kind, the column says it."""
    plain, mixed = (
        pair(conditions=["A", "A+B"], cells_per_condition=1),
        pair(conditions=["A", "B:knockout"], cells_per_condition=1),
    )
    assert set(plain.obs["perturbation"]) == {"control", "A", "A+B"}
    assert find_kind(plain.obs) == "interference"
    assert set(mixed.obs["perturbation"]) == {"control", "A:interference", "B:knockout"}
    assert dict(zip(mixed.obs["perturbation"], mixed.obs["kind"], strict=True)) == {
        "control": "control",
        "A:interference": "interference",
        "B:knockout": "knockout",
    }


def test_singles_are_regulators_first():
    adata = simulate_screen(
        random_network(30, n_regulators=8, seed=1), n_singles=8, n_doubles=28, cells_per_condition=1, n_control=2
    )
    truth = adata.uns["truth"]
    assert set(truth["target"]) == set(adata.uns["network"]["regulator"])
    assert len(truth["condition"]) == 1 + 8 + 28


def test_table_of_terms():
    """Regulators that share targets share terms, more than others do."""
    network = random_network(100, n_regulators=20, modules=4, sign_of="regulator", in_degree=4.0)
    adata = simulate_screen(network, n_singles=1, cells_per_condition=1, n_control=1)
    table = adata.uns["go"]
    assert not table.duplicated().any()
    assert set(table["gene"]) == set(adata.var_names)
    terms = table.groupby("gene")["term"].agg(set)
    signs = network.matrix("sign").toarray()
    names = network.regulators
    shared, common = [], []
    for one, two in itertools.combinations(names, 2):
        shared.append(len(terms[one] & terms[two]) / len(terms[one] | terms[two]))
        columns = signs[:, [network.genes.index(one), network.genes.index(two)]]
        common.append(int((columns.prod(1) > 0).sum()))
    assert np.corrcoef(shared, common)[0, 1] > 0.7


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pair(conditions=["C"]), "target 'C' is not a gene of the network"),
        (lambda: pair(conditions=["A@1.4"]), "condition 'A@1.4'.*dose must lie between 0 and 1"),
        (lambda: pair(n_doubles=1), "n_singles and n_doubles draw from all genes"),
        (lambda: simulate_screen(n_genes=5, n_doubles=11), "n_doubles=11, but 5 genes make 10 pairs"),
        (lambda: pair(times=()), r"times=\[\] must be positive and increase"),
        (lambda: pair(times=(2, 1)), "must be positive and increase"),
        (lambda: pair(efficacy=(0.5, 1.2)), "efficacy="),
        (lambda: pair(non_cutting=-0.1), "non_cutting=-0.1 is a share"),
        (lambda: pair(noise=-1.0), "must not be negative"),
        (lambda: pair(depth=0.0), "depth=0.0 and splicing_rate=4.0 must be positive"),
        (lambda: pair(step=2.0), "step=2.0 must lie above 0"),
        (lambda: pair(cells_per_condition=0), "start at 1"),
        (lambda: pair(conditions=["control"]), "name nothing beside control"),
        (lambda: pair(conditions=None, doses=(0.5, -1.0)), r"doses=\[0.5, -1.0\] must be 0 or more"),
        (lambda: pair(conditions=None, doses=()), "one at least"),
        (lambda: pair(conditions=None, window=(5.0, 2.0)), "offset 2.0 must be later than onset 5.0"),
        (lambda: pair(conditions=["A[5,2]"]), "offset 2.0 must be later than onset 5.0"),
        (lambda: pair(conditions=None, n_singles=3), "n_singles=3 must lie between 1 and the 2 genes"),
        (lambda: pair(kind="knokout"), "kind='knokout' cannot be simulated; did you mean 'knockout'"),
        (lambda: pair(guides=0), "start at 1"),
        (lambda: pair(batches=0), "start at 1"),
        (lambda: pair(batch_shift=-0.1), "must not be negative"),
        (lambda: pair(burn_in=-1.0), "must not be negative"),
        (lambda: pair(splicing_rate=0.0), "depth=4.0 and splicing_rate=0.0 must be positive"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
