"""The method grn_ode of `infer_network`: better than lasso where it should be, indifferent to order, honest about probabilities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import (
    GeneRegulatoryNetwork,
    Interventions,
    RegulatoryDynamics,
    ScreenEffects,
    identifiability_report,
    infer_network,
    score_network,
    steady_state,
)
from perturbzoo.grn.candidates import candidate_network
from perturbzoo.grn.fitted import FittedNetwork
from perturbzoo.grn.fitting import FitOptions, fit_network
from perturbzoo.grn.inference_kinetics import infer_kinetics, mean_network
from perturbzoo.grn.levels import Levels
from perturbzoo.perturbation import Condition, Intervention
from perturbzoo.simulate.networks import random_network

SHORT = FitOptions(residual_steps=60, fixed_point_steps=30, lr=0.1)
ERROR = 0.05


def simulated(count: int, seed: int = 0) -> tuple[GeneRegulatoryNetwork, Levels]:
    """Steady levels of a random network with every gene knocked down to a fifth, and noise on their logs."""
    truth = random_network(count, in_degree=2.0, seed=seed)
    rng = np.random.default_rng(seed)
    reference = np.exp(rng.normal(0, 0.5, count))
    dynamics = RegulatoryDynamics(truth, kinetics="hill", reference=reference, dtype=torch.float64)
    conditions = [Condition([Intervention(gene, kind="interference", efficacy=0.8)]) for gene in truth.genes]
    acts = Interventions.from_conditions(conditions, truth.genes, dtype=torch.float64)
    with torch.no_grad():
        level = steady_state(dynamics.bind(acts), dynamics.control_level.expand(count, -1), unstable="keep").numpy()
    shape = (count, count)
    levels = Levels(
        truth.genes,
        tuple(Condition([Intervention(gene)]) for gene in truth.genes),
        np.zeros(count, dtype=int),
        level * np.exp(rng.normal(0, ERROR, shape)),
        reference[None],
        np.full(shape, ERROR),
        np.full((1, count), ERROR / 10),
        "interference",
    )
    return truth, levels


def effects_of(levels: Levels) -> ScreenEffects:
    return ScreenEffects(levels.genes, levels.conditions, levels.change, levels.error, levels.default_kind)


@pytest.fixture(scope="module")
def screen() -> tuple[GeneRegulatoryNetwork, Levels]:
    return simulated(16)


@pytest.fixture(scope="module")
def found(screen) -> GeneRegulatoryNetwork:
    return infer_kinetics(screen[1], repetitions=2, options=SHORT)


def test_edges_of_a_simulated_screen_come_before_those_of_lasso(screen, found):
    truth, levels = screen
    lasso = infer_network(effects_of(levels), "lasso", bootstraps=0)
    own, other = (score_network(one, truth).auprc for one in (found, lasso))
    assert own > other
    assert own > 0.6
    merged = found.edges.merge(truth.edges, on=["regulator", "target"], suffixes=("", "_true"))
    assert (merged["sign"] == merged["sign_true"]).mean() > 0.9


def test_probabilities_are_shares_and_higher_for_true_edges(screen, found):
    truth, _ = screen
    assert ((found.probability > 0) & (found.probability <= 1)).all()
    assert (found.weight != 0).all()
    true = found.matrix("probability").toarray()[truth.matrix().toarray() != 0].mean()
    assert true > 2 * found.matrix("probability").toarray()[truth.matrix().toarray() == 0].mean()


def test_order_of_genes_and_conditions_does_not_matter(screen, found):
    _, levels = screen
    rng = np.random.default_rng(1)
    genes, rows = rng.permutation(16), rng.permutation(16)
    turned = levels.select(rows)
    turned = replace(
        turned,
        genes=tuple(levels.genes[gene] for gene in genes),
        level=turned.level[:, genes],
        control=turned.control[:, genes],
        error=turned.error[:, genes],
        control_error=turned.control_error[:, genes],
    )
    one, other = (infer_kinetics(part, repetitions=0, options=SHORT) for part in (levels, turned))
    back = other.matrix().toarray()[np.ix_(np.argsort(genes), np.argsort(genes))]
    # sums of float32 in another order, and a random direction in the penalty on what is unstable
    np.testing.assert_allclose(back, one.matrix().toarray(), atol=0.15)


def test_targets_that_are_not_measured_become_regulators(screen):
    """The first gene's column is taken away: its knockdown is a condition, its level unknown."""
    truth, levels = screen
    hidden = max(truth.regulators, key=lambda name: int((truth.edges["regulator"] == name).sum()))
    keep = np.array([gene != hidden for gene in levels.genes])
    parts = {name: getattr(levels, name)[:, keep] for name in ("level", "control", "error", "control_error")}
    rest = replace(levels, genes=tuple(gene for gene in levels.genes if gene != hidden), **parts)
    network = infer_kinetics(rest, repetitions=0, options=SHORT)
    assert network.genes == (*rest.genes, hidden)
    edges = network.edges
    assert hidden not in edges["target"].tolist()
    out = edges[edges["regulator"] == hidden].set_index("target")
    true = truth.edges[truth.edges["regulator"] == hidden].set_index("target")
    shared = true.index.intersection(out.index)
    assert len(shared) >= len(true) / 2
    assert (out.loc[shared, "sign"] == true.loc[shared, "sign"]).mean() > 0.7
    report = identifiability_report(effects_of(rest), network)
    assert report.unmeasured == (hidden,)
    # somebody perturbed it alone: its edges do not rest on correlation
    assert report.unperturbed_edges == 0


def test_prior_regulators_and_restriction(screen):
    truth, levels = screen
    effects = effects_of(levels)
    options = {"bootstraps": 0, "levels": levels, "seed": 3}
    chosen = list(truth.regulators)[:3]
    network = infer_network(effects, "grn_ode", regulators=chosen, max_edges=5, **options)
    assert set(network.edges["regulator"]) <= set(chosen)
    assert len(network) <= 5
    restricted = infer_network(effects, "grn_ode", prior=truth, prior_use="restrict", **options)
    assert set(map(tuple, restricted.edges[["regulator", "target"]].to_numpy())) <= set(
        map(tuple, truth.edges[["regulator", "target"]].to_numpy())
    )
    with pytest.raises(PerturbZooError, match="none of the 1 regulators is a measured gene: nobody"):
        infer_network(effects, "grn_ode", regulators=["nobody"], **options)


def test_seed_and_repetitions(screen):
    _, levels = screen
    options = replace(SHORT, residual_steps=10, fixed_point_steps=2)
    one, same, other = (infer_kinetics(levels, repetitions=1, options=options, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(one.edges, same.edges)
    assert not one.edges.equals(other.edges)
    rows = infer_kinetics(levels, repetitions=1, resample="conditions", options=options, seed=1)
    assert not rows.edges.equals(one.edges)
    with pytest.raises(PerturbZooError, match="bootstraps is -1; 0 is the least"):
        infer_kinetics(levels, repetitions=-1)


def test_mean_of_fits_by_hand():
    """Posterior mean weights are averaged; a probability is the mean over fits of that of the mean's sign."""
    levels = Levels(
        ("A", "B"), ("A",), np.zeros(1, int), np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2)), "interference"
    )
    candidates = candidate_network(levels, ["A", "B"], None)
    fits = [FittedNetwork(candidates, 2, levels.control, [], "interference") for _ in range(2)]
    into = {target: number for number, target in enumerate(candidates.target.tolist())}
    for fitted, weights, chances in zip(fits, ((1.0, 0.0), (-0.5, 0.0)), ((0.9, 0.0), (0.4, 0.0)), strict=True):
        fitted.estimate[[into[1], into[0]]] = torch.tensor(weights)
        fitted.probability[[into[1], into[0]]] = torch.tensor(chances)
    network = mean_network(fits)
    assert network.edges[["regulator", "target"]].to_numpy().tolist() == [["A", "B"]]
    assert network.weight[0] == pytest.approx(0.25)
    assert network.probability[0] == pytest.approx(0.9 / 2)


def test_weights_are_the_posterior_means(screen):
    """An edge that takes part in the kinetics has its weight times its probability."""
    _, levels = screen
    fitted = fit_network(levels, candidate_network(levels, levels.genes, None), SHORT)
    chance, weight = fitted.probability.numpy(), fitted.dynamics.weight.numpy()
    assert ((chance >= 0) & (chance <= 1)).all()
    kept = weight != 0
    np.testing.assert_allclose(fitted.estimate.numpy()[kept], (chance * weight)[kept], rtol=1e-5)
    assert chance[kept].mean() > 2 * chance[~kept].mean()
