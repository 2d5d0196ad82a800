"""Which edges are candidates: all of few genes, what a prior and a screen point at of many, none into what is not measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, ScreenEffects
from perturbzoo.grn.candidates import candidate_network, with_latent
from perturbzoo.grn.levels import Levels


def levels(delta: np.ndarray, conditions: tuple[str, ...], error: float = 0.1) -> Levels:
    genes = tuple(f"G{number}" for number in range(delta.shape[1]))
    return Levels.from_effects(ScreenEffects(genes, conditions, delta, error, "interference"))


def edges(network: GeneRegulatoryNetwork) -> set[tuple[str, str]]:
    return set(map(tuple, network.edges[["regulator", "target"]].to_numpy()))


QUIET = levels(np.zeros((2, 4)), ("G0", "G1"))
NODES = ["G0", "G1", "G2", "G3"]
PRIOR = GeneRegulatoryNetwork.from_edges(
    pd.DataFrame(
        {"regulator": ["G0", "G3", "X"], "target": ["G1", "G2", "G0"], "sign": [-1, 0, 1], "probability": [0.9, 0.4, 0.7]}
    ),
    [*NODES, "X"],
)


def test_few_genes_have_every_pair_but_themselves():
    network = candidate_network(QUIET, NODES, None)
    assert edges(network) == {(a, b) for a in NODES for b in NODES if a != b}
    assert not network.probability.any()
    assert (np.abs(network.weight) < 1e-5).all()


def test_what_is_not_measured_regulates_and_is_not_regulated():
    screen = levels(np.zeros((2, 4)), ("G0", "X"))
    for dense in (500, 1):
        network = candidate_network(screen, [*NODES, "X"], None, dense_genes=dense)
        assert {("X", gene) for gene in NODES} <= edges(network)
        assert "X" not in network.edges["target"].tolist()


@pytest.mark.parametrize("dense", [500, 1])
def test_prior_keeps_its_edges_signs_and_probabilities(dense):
    screen = levels(np.zeros((2, 4)), ("G0", "X"))
    network = candidate_network(screen, [*NODES, "X"], PRIOR, dense_genes=dense, screened=1)
    table = network.edges.set_index(["regulator", "target"])
    for (regulator, target), sign, probability in (
        (("G0", "G1"), -1, 0.9),
        (("G3", "G2"), 0, 0.4),
        (("X", "G0"), 1, 0.7),
    ):
        assert table.loc[(regulator, target), "sign"] == sign
        assert table.loc[(regulator, target), "probability"] == pytest.approx(probability)
    others = table.drop([("G0", "G1"), ("G3", "G2"), ("X", "G0")])
    assert not others["probability"].any()
    assert not others["sign"].any()


def test_restricted_candidates_are_the_prior():
    network = candidate_network(QUIET, [*NODES, "X"], PRIOR, restrict=True)
    assert edges(network) == {("G0", "G1"), ("G3", "G2"), ("X", "G0")}


def test_regulators_are_those_listed_and_what_is_not_measured():
    screen = levels(np.zeros((2, 4)), ("G0", "X"))
    network = candidate_network(screen, [*NODES, "X"], PRIOR, regulators=["G2"])
    assert set(network.edges["regulator"]) == {"G2", "X"}


def test_screen_points_at_planted_regulators():
    """30 genes, 3 candidates each: gene g is moved most by the knockdown of g + 1, and otherwise by noise."""
    rng = np.random.default_rng(0)
    delta = rng.normal(0, 0.1, (30, 30))
    np.fill_diagonal(delta, -1.5)
    regulator = (np.arange(30) + 1) % 30
    delta[regulator, np.arange(30)] = rng.choice([-1, 1], 30) * 0.6
    screen = levels(delta, tuple(f"G{number}" for number in range(30)))
    network = candidate_network(screen, screen.genes, None, dense_genes=10, screened=3)
    assert {(f"G{one}", f"G{gene}") for gene, one in enumerate(regulator)} <= edges(network)
    # so many from the screen's own changes, and as many again that go together with the gene
    assert network.edges.groupby("target").size().max() <= 6


def test_screen_points_at_regulators_that_nobody_perturbed():
    """G1 follows G0 under perturbations of other genes."""
    rng = np.random.default_rng(1)
    delta = rng.normal(0, 0.1, (40, 20))
    delta[:, 0] = rng.normal(0, 1, 40)
    delta[:, 1] = -0.7 * delta[:, 0]
    screen = levels(delta, tuple(f"G{2 + number % 18}" for number in range(40)))
    network = candidate_network(screen, screen.genes, None, dense_genes=5, screened=1)
    assert {("G0", "G1"), ("G1", "G0")} <= edges(network)


def test_latent_regulators_have_edges_to_and_from_all_genes():
    network = with_latent(candidate_network(QUIET, NODES, None), 4, 2)
    assert network.genes[4:] == ("latent1", "latent2")
    new = edges(network) - edges(candidate_network(QUIET, NODES, None))
    assert new == {pair for latent in network.genes[4:] for gene in NODES for pair in ((latent, gene), (gene, latent))}
    weights = network.matrix().toarray()
    assert np.abs(weights[:4, 4] - weights[:4, 5]).max() > 0.01, "they could not be told apart otherwise"
    assert with_latent(network, 4, 0) is network


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": None, "restrict": True}, "restrict asks for the edges of a prior, and there is none"),
        ({"prior": None, "regulators": []}, "none is left"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(PerturbZooError, match=message):
        candidate_network(QUIET, NODES, **options)
