"""Planted differences between networks are listed, unreachable genes too, and predictors without a network are told as such."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork
from perturbzoo.grn.linking import compare_edges, network_signal, off_targets, reachable
from perturbzoo.perturbation import parse_condition


def table(*rows: tuple[str, str, float, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["regulator", "target", "weight", "probability"])


DATA = table(("A", "B", 1.0, 0.9), ("B", "C", -0.5, 0.8), ("C", "D", 0.2, 0.4), ("D", "A", 0.7, 0.7), ("A", "D", 0.6, 0.6))
MODEL = table(("A", "B", 2.0, 0.9), ("B", "C", 0.5, 0.9), ("C", "A", -3.0, 0.99), ("D", "A", 0.1, 0.2), ("B", "D", 0.3, 0.6))


def read(edges: pd.DataFrame, genes: str = "ABCD") -> GeneRegulatoryNetwork:
    return GeneRegulatoryNetwork.from_edges(edges, list(genes))


def listed(found: pd.DataFrame) -> dict[str, list[str]]:
    each = found.regulator + found.target
    return {status: each[found.status == status].tolist() for status in found.status.unique()}


def test_edges_that_differ():
    found = compare_edges(read(DATA), read(MODEL))
    assert listed(found) == {"hallucinated": ["CA", "BD"], "missed": ["DA", "AD"], "opposite": ["BC"], "shared": ["AB"]}
    row = found.set_index(["regulator", "target"]).loc[("D", "A")]
    assert row[["weight_data", "weight_model", "probability_data", "probability_model"]].tolist() == [0.7, 0.1, 0.7, 0.2]
    assert found.loc[0, ["weight_data", "probability_data"]].tolist() == [0, 0]
    # the other rule: as many of each
    found = compare_edges(read(DATA), read(MODEL), edges=2)
    assert listed(found) == {"hallucinated": ["CA"], "missed": ["DA"], "shared": ["AB"]}
    found = compare_edges(read(DATA), read(MODEL), edges=1, by="probability")
    assert listed(found) == {"hallucinated": ["CA"], "missed": ["AB"]}
    # edges of regulators that the data cannot speak of are left out
    assert listed(compare_edges(read(DATA), read(MODEL), regulators=["A", "B"]))["hallucinated"] == ["BD"]


def test_networks_of_other_genes_and_of_no_edges():
    wider = read(MODEL.assign(target=MODEL.target.replace("D", "E")), "ABCDE")
    assert "BE" not in (found := compare_edges(read(DATA), wider)).regulator + found.target
    nothing = read(DATA.iloc[:0].astype({"weight": float, "probability": float}))
    assert listed(compare_edges(read(DATA), nothing)) == {"missed": ["AB", "DA", "AD", "BC"]}
    assert set(compare_edges(nothing, read(MODEL)).status) == {"hallucinated"}
    assert compare_edges(read(DATA), read(DATA), threshold=0.0).status.eq("shared").all()


def test_planted_hallucinations_are_found_among_many():
    rng = np.random.default_rng(0)
    pairs = pd.DataFrame(rng.integers(0, 40, (300, 2)), columns=["regulator", "target"]).astype(str).drop_duplicates()
    pairs = pairs[pairs.regulator != pairs.target].reset_index(drop=True)
    pairs = pairs.assign(weight=rng.normal(0, 1, len(pairs)), probability=0.95)
    genes = [str(number) for number in range(40)]
    data = GeneRegulatoryNetwork.from_edges(pairs.iloc[:200], genes)
    model = GeneRegulatoryNetwork.from_edges(pairs.drop(index=range(10, 25)), genes)
    found = compare_edges(data, model)
    for status, planted in (("hallucinated", pairs.iloc[200:]), ("missed", pairs.iloc[10:25])):
        mine = found[found.status == status]
        assert set(zip(mine.regulator, mine.target, strict=True)) == set(zip(planted.regulator, planted.target, strict=True))
    assert (found.status == "shared").sum() == 185


def test_reach():
    network = read(table(("A", "B", 1.0, 1.0), ("B", "C", 1.0, 1.0), ("C", "B", 1.0, 1.0)))
    found = reachable(network, [parse_condition(text) for text in ("A", "B", "C+D", "D", "Z", "control")])
    assert ["".join(np.array(list("ABCD"))[row]) for row in found] == ["ABC", "BC", "BCD", "D", "", ""]


def test_changes_out_of_reach():
    network = read(table(("A", "B", 1.0, 1.0), ("C", "D", 1.0, 1.0)))
    delta = np.array([[-1.0, -0.8, 0.6, 0.01], [0.05, -0.9, -1.0, -0.7], [0.0, 0.0, 0.0, 0.0]])
    found = off_targets(network, ["A", "C", "B"], delta, 0.1)
    assert list(zip(found.condition, found.gene, strict=True)) == [("C", "B"), ("A", "C")]
    np.testing.assert_allclose(found.z, [-9, 6])
    np.testing.assert_allclose(found.change, [-0.9, 0.6])
    assert (found.q < 0.05).all()
    assert off_targets(network, ["A", "C", "B"], delta, 10.0).empty
    whole = read(table(("A", "B", 1.0, 1.0), ("B", "A", 1.0, 1.0)), "AB")
    assert off_targets(whole, ["A"], np.ones((1, 2)), 0.1).empty  # everything can be reached


def test_false_discoveries_are_held():
    network = read(table(("A", "B", 1.0, 1.0)))
    genes = [f"G{number}" for number in range(200)]
    wide = network.restrict([*"ABCD", *genes])
    noise = np.random.default_rng(0).normal(0, 0.1, (100, 204))
    assert len(off_targets(wide, ["A"] * 100, noise, 0.1)) <= 2  # of 20,200 null changes, 5 % of which exceed 1.96


GENES = [f"G{number}" for number in range(50)]
CONDITIONS = GENES[:30]


def shared_profile(strength: np.ndarray) -> np.ndarray:
    delta = strength[:, None] * np.random.default_rng(0).normal(0, 0.5, 50)
    delta[range(30), range(30)] = -1.5  # everyone knows that a knock-down lowers its target
    return delta


@pytest.mark.parametrize("strength", [np.ones(30), np.linspace(0.1, 2, 30), np.zeros(30)], ids=["mean", "scaled", "nothing"])
def test_a_mean_predictor_has_no_network_signal(strength):
    found = network_signal(CONDITIONS, GENES, shared_profile(strength), 0.01)
    assert not found.present
    assert str(found).startswith("no network signal")
    assert found.components == 0
    if strength[0] == 1:
        assert (found.effective_rank, found.variance_ratio, found.leading) == (0, 0, 0)


def test_means_of_contexts_are_no_network_signal():
    context = np.arange(30) % 2
    delta = np.random.default_rng(1).normal(0, 0.5, (2, 50))[context]
    assert network_signal(CONDITIONS, GENES, delta, 0.05).present
    assert not network_signal(CONDITIONS, GENES, delta, 0.05, context=context).present


def test_specific_changes_are_a_signal_once_noise_does_not_hide_them():
    """One planted component of singular value s: detectable from (K G)^(1/4) errors on."""
    rng = np.random.default_rng(2)
    left, right = rng.normal(size=30), rng.normal(size=50)
    left -= left.mean()
    right[:30] = 0  # genes that are not perturbed, so that nothing is left out
    component = np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
    edge = (30 * 50) ** 0.25
    for size, present in ((0.9, False), (1.1, True)):
        found = network_signal(CONDITIONS, GENES, 5.0 + 0.1 * size * edge * component, 0.1)
        assert found.present is present
        assert found.leading == pytest.approx(size * edge, rel=1e-3)
        assert found.effective_rank == pytest.approx(1, rel=1e-3)
        assert found.edge == pytest.approx(edge)


def test_noise_of_measured_changes_is_no_signal():
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.1, (30, 50))
        assert not network_signal(CONDITIONS, GENES, shared_profile(np.ones(30)) + noise, 0.1, noisy=True).present
    rng = np.random.default_rng(0)
    signal = rng.normal(0, 0.5, (30, 4)) @ rng.normal(0, 0.5, (4, 50)) + rng.normal(0, 0.1, (30, 50))
    found = network_signal(CONDITIONS, GENES, signal, 0.1, noisy=True)
    assert found.components >= 3
    assert str(found).startswith(f"network signal: {found.components} condition-specific components")


def test_genes_without_noise_are_left_out():
    """A gene that no cell ever had has a standard error of 0, and no change either way means anything."""
    error = np.full(50, 0.01)
    error[40:] = 0
    delta = shared_profile(np.ones(30))
    delta[:, 40:] = np.random.default_rng(0).normal(size=(30, 10))
    assert not network_signal(CONDITIONS, GENES, delta, error).present
    network = read(table(("A", "B", 1.0, 1.0)))
    assert off_targets(network, ["A"], np.ones((1, 4)), np.array([0.1, 0.1, 0.0, 0.1])).gene.tolist() == ["D"]


def test_mistakes():
    data = read(DATA)
    for message, call in (
        ("no gene in common", lambda: compare_edges(data, read(table(("X", "Y", 1.0, 1.0)), "XY"))),
        ("not genes of both networks: Q", lambda: compare_edges(data, data, regulators=["Q"])),
        ("edges=0", lambda: compare_edges(data, data, edges=0)),
        ("threshold=1", lambda: compare_edges(data, data, threshold=1.0)),
        (r"not conditions x genes \(1, 4\)", lambda: off_targets(data, ["A"], np.ones((2, 4)), 0.1)),
        ("errors must be finite and at least 0", lambda: off_targets(data, ["A"], np.ones((1, 4)), -1.0)),
        ("all errors are 0", lambda: network_signal("ABC", "ABCD", np.ones((3, 4)), 0.0)),
        ("delta must be finite", lambda: off_targets(data, ["A"], np.full((1, 4), np.nan), 1.0)),
        ("2 conditions; at least 3", lambda: network_signal(["A", "B"], "ABCD", np.ones((2, 4)), 0.1)),
        ("give one for each of 3", lambda: network_signal("ABC", "ABCD", np.ones((3, 4)), 0.1, context=np.zeros(2))),
    ):
        with pytest.raises(PerturbZooError, match=message):
            call()
