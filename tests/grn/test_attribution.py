"""Attribution of steady-state changes: closed forms on two and three genes, and completeness on cyclic networks."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, Interventions, RegulatoryDynamics, steady_state
from perturbzoo.grn.attribution import OTHER, Explanation, explain
from perturbzoo.perturbation import parse_condition

FLOOR = 1e-3


def network(edges: dict[str, float], genes: str) -> GeneRegulatoryNetwork:
    rows = [(pair[0], pair[1], weight) for pair, weight in edges.items()]
    return GeneRegulatoryNetwork.from_edges(pd.DataFrame(rows, columns=["regulator", "target", "weight"]), list(genes))


def acts_of(text: str, dynamics: RegulatoryDynamics) -> Interventions:
    return Interventions.from_conditions(
        [parse_condition(text)], dynamics.genes, default_kind="interference", dtype=torch.float64
    )


def random_dynamics(seed: int, genes: int = 30, kinetics: str = "hill", contexts: int = 1) -> RegulatoryDynamics:
    """Random regulators, cycles among them; the last gene regulates but nothing regulates it."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"regulator": rng.integers(0, genes, 3 * genes), "target": rng.integers(0, genes - 1, 3 * genes)})
    table = table[table.regulator != table.target].drop_duplicates().astype(str)
    table = table.assign(weight=rng.normal(0, 1.5 if kinetics == "hill" else 0.5, len(table)))
    made = GeneRegulatoryNetwork.from_edges(table, list(map(str, range(genes))))
    reference = rng.lognormal(0, 0.5, (contexts, genes))
    return RegulatoryDynamics(made, kinetics=kinetics, reference=reference, dtype=torch.float64)


def log_change(dynamics: RegulatoryDynamics, text: str, context: int = 0) -> np.ndarray:
    """log(x + ε) of the condition minus that of control, from the solver alone."""
    at = torch.tensor([context])
    control = steady_state(dynamics.bind(None, at), dynamics.control_state[at]).detach()
    level = steady_state(dynamics.bind(acts_of(text, dynamics), at), control).detach()
    return torch.log((level + FLOOR * control) / (control + FLOOR * control))[0].numpy()


def path_of(found: Explanation, gene: str) -> dict[str, float]:
    rows = found.paths[found.paths.gene == gene]
    return dict(zip(rows.path, rows.contribution, strict=True))


@pytest.mark.parametrize("act", ["interference", "knockout"])
def test_chain_of_two_genes(act):
    """A -> B, Hill with n = 2 and H = m = 1: B = 2 σ(b + w h(η A)), b = -w / 2."""
    dynamics = RegulatoryDynamics(network({"AB": 1.7}, "AB"), kinetics="hill", dtype=torch.float64)
    found = explain(dynamics, acts_of(f"A:{act}~0.8", dynamics), genes=["A", "B"])
    h = 0.2**2 / (0.2**2 + 1)
    level_b = 2 / (1 + math.exp(0.85 - 1.7 * h))
    change = math.log((level_b + FLOOR) / (1 + FLOOR))
    own = math.log((0.2 + FLOOR) / (1 + FLOOR)) if act == "interference" else 0.0
    genes = found.genes.set_index("gene")
    assert genes.change["B"] == pytest.approx(change, abs=1e-7)
    np.testing.assert_allclose(genes[["direct", "indirect"]].loc["B"], [change, 0], atol=1e-5)
    np.testing.assert_allclose(genes[["change", "direct", "indirect"]].loc["A"], [own, own, 0], atol=1e-5)
    assert genes.level["B"] == pytest.approx(level_b)
    assert path_of(found, "B") == pytest.approx({"A -> B": change, OTHER: 0}, abs=1e-5)
    assert path_of(found, "A") == pytest.approx({"A": own, OTHER: 0} if own else {OTHER: 0}, abs=1e-5)
    assert found.shares.intervention.unique().tolist() == [f"A:{act}"]
    edges = found.edges.set_index(["regulator", "target"])
    assert edges.contribution["A", "B"] == pytest.approx(change, abs=1e-5)
    assert edges.response["A", "B"] > 0


def test_two_paths_that_cancel():
    """A -> C directly and through B, additive kinetics: contributions by quadrature of the scalar formula."""

    def sigmoid(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    def phi(x: float) -> float:
        return math.log((x + 0.05) / 1.05)

    def levels(w: float, s: float) -> tuple[float, float, float]:
        a = 1 - 0.7 * s
        b = 2 * sigmoid(1.2 * phi(a))
        return a, b, 2 * sigmoid(0.9 * phi(a) + w * phi(b))

    w = brentq(lambda weight: levels(weight, 1.0)[2] - 1, -5, -0.1)
    dynamics = RegulatoryDynamics(network({"AB": 1.2, "AC": 0.9, "BC": w}, "ABC"), dtype=torch.float64)
    found = explain(dynamics, acts_of("A~0.7", dynamics), genes=["C"])

    def along(edge: str, s: float) -> float:
        a, b, c = levels(w, s)
        to_log = 2 * sigmoid(0.9 * phi(a) + w * phi(b)) * (1 - c / 2) / (c + FLOOR)
        if edge == "A -> C":
            return to_log * 0.9 / (a + 0.05) * -0.7
        slope_b = b * (1 - b / 2) * 1.2 / (a + 0.05)
        return to_log * w / (b + 0.05) * slope_b * -0.7

    direct, through = (quad(lambda s, edge=edge: along(edge, s), 0, 1)[0] for edge in ("A -> C", "A -> B -> C"))
    assert direct < -0.1
    assert direct + through == pytest.approx(0, abs=1e-8)
    assert path_of(found, "C") == pytest.approx({"A -> C": direct, "A -> B -> C": through, OTHER: 0}, abs=2e-5)
    row = found.genes.set_index("gene").loc["C"]
    np.testing.assert_allclose(row[["change", "direct", "indirect"]].astype(float), [0, direct, through], atol=2e-5)


def test_a_cycle_is_a_geometric_series():
    """A <-> B under a small act: every turn of the loop multiplies by the product of both local responses."""
    forward, back = 1.6, -1.1
    dynamics = RegulatoryDynamics(network({"AB": forward, "BA": back}, "AB"), dtype=torch.float64)
    small = 1e-4
    found = explain(dynamics, acts_of(f"A~{small}", dynamics), genes=["A", "B"], length=5)
    # at control f = 1/2, φ' m = 1 / 1.05; on the scale of log(x + ε) one factor stays: that of log F by log (F + ε)
    to, fro = (weight / 2 / 1.05 for weight in (forward, back))
    push = -small / (1 + FLOOR)
    walks = path_of(found, "B")
    for turns, path in enumerate(["A -> B", "A -> B -> A -> B", "A -> B -> A -> B -> A -> B"]):
        assert walks[path] == pytest.approx(push * to * (to * fro) ** turns, rel=1e-3)
    whole = push * to / (1 - to * fro)
    assert walks[OTHER] == pytest.approx(whole * (to * fro) ** 3, rel=1e-2)
    assert path_of(found, "A")["A -> B -> A"] == pytest.approx(push * to * fro, rel=1e-3)
    assert found.genes.change[1] == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("kinetics", ["hill", "multiplicative", "additive"])
@pytest.mark.parametrize(
    "text", ["0", "1:knockout", "2:activation+3:knockout~0.6", "4:clamp@0.2+5:overexpression+6", "7:clamp@0"]
)
def test_contributions_sum_to_the_change(kinetics, text):
    dynamics = random_dynamics(3, kinetics=kinetics, contexts=2)
    found = explain(dynamics, acts_of(text, dynamics), 1, length=4, genes=dynamics.genes)
    expected = log_change(dynamics, text, context=1)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found.genes.change, expected, atol=1e-6)
    np.testing.assert_allclose(found.genes.jump, 0, atol=1e-4)
    np.testing.assert_allclose(found.shares.groupby("gene", sort=False).share.sum(), expected, atol=1e-4)
    np.testing.assert_allclose(found.paths.groupby("gene", sort=False).contribution.sum(), expected, atol=1e-6)
    # over edges and by acts on genes themselves, which are the only ones that need no edge
    over = found.edges.groupby("target").contribution.sum().reindex(dynamics.genes, fill_value=0.0)
    rest = expected - over.to_numpy()
    touched = {act.target for act in parse_condition(text) if act.kind != "knockout"}
    np.testing.assert_allclose(rest[[gene not in touched for gene in dynamics.genes]], 0, atol=1e-4)
    # the last gene has no regulators: nothing can reach it
    assert found.genes.iloc[-1][["change", "direct", "indirect"]].astype(float).tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert (found.edges.target != dynamics.genes[-1]).all()


def test_layers_and_ways_of_computing_change_nothing():
    """Splicing and proteins change how fast cells settle, not where; dense or of full rank, W is the same."""
    rng = np.random.default_rng(1)
    made = network({"AB": 1.2, "BC": -1.5, "CA": 0.8, "DB": 0.7, "AD": -0.6}, "ABCD")
    reference = rng.lognormal(0, 0.5, 4)
    texts = ("A~0.7+C:knockout", "B:activation")
    for text in texts:
        found = []
        for options in ({}, {"splicing": True, "protein": True, "decay": 0.4}, {"dense": True}, {"rank": 3}):
            dynamics = RegulatoryDynamics(made, kinetics="hill", reference=reference, dtype=torch.float64, **options)
            if "rank" in options:  # the matrix has rank 4: what is cut off is put back
                full = RegulatoryDynamics(made, kinetics="hill", reference=reference, dtype=torch.float64)
                left, scale, right = torch.linalg.svd(full.weights()[:, full.regulators].detach(), full_matrices=False)
                dynamics.left, dynamics.right = (torch.nn.Parameter(value) for value in (left, right))
                dynamics.scale = torch.nn.Parameter(scale)
                dynamics.bias, dynamics.raw_production = full.bias, full.raw_production
            found.append(explain(dynamics, acts_of(text, dynamics), genes=["A", "B", "C", "D"]))
        for other in found[1:]:
            columns = ["level", "change", "direct", "indirect"]
            np.testing.assert_allclose(other.genes[columns], found[0].genes[columns], atol=1e-4)
            np.testing.assert_allclose(other.shares.share, found[0].shares.share, atol=1e-4)
            # zeros of W are rounding errors where it is a product
            strong = [one.paths[one.paths.contribution.abs() > 1e-3].path.tolist() for one in (found[0], other)]
            assert strong[0] == strong[1]


def test_acts_alone_and_together():
    dynamics = random_dynamics(5)
    found = explain(dynamics, acts_of("0+1:activation", dynamics)).shares
    singles = [log_change(dynamics, text) for text in ("0", "1:activation")]
    both = log_change(dynamics, "0+1:activation")
    names = ["0:interference", "1:activation"]
    for name, single in zip(names, singles, strict=True):
        np.testing.assert_allclose(found[found.intervention == name].alone, single, atol=1e-7)
    total = found.groupby("gene", sort=False).interaction.sum()
    np.testing.assert_allclose(total, both - singles[0] - singles[1], atol=1e-4)


def test_paths_are_the_strongest_of_all_walks():
    """Against the enumeration of all walks with responses at control, to which a small act is linear."""
    dynamics = random_dynamics(7, genes=8)
    found = explain(dynamics, acts_of("0~0.0001", dynamics), genes=dynamics.genes, top=3, length=4, floor=1e-9)
    edges = {(e.regulator, e.target): e.response for e in found.edges.itertuples()}
    walks, grown = {("0",): -1e-4}, {("0",): -1e-4}
    for _ in range(4):
        grown = {
            (*walk, end): size * r for walk, size in grown.items() for (start, end), r in edges.items() if start == walk[-1]
        }
        walks |= grown
    for gene in dynamics.genes:
        best = sorted((size for walk, size in walks.items() if walk[-1] == gene), key=abs, reverse=True)[:3]
        mine = [size for path, size in path_of(found, gene).items() if path != OTHER]
        np.testing.assert_allclose(mine, best, rtol=2e-3, atol=1e-12)


def test_a_switch_is_a_jump_and_not_a_path():
    """Two genes that repress each other rest in either state; overexpression of one throws the switch at some strength."""
    toggle = RegulatoryDynamics(
        network({"AB": -5.0, "BA": -5.0}, "AB"), kinetics="hill", reference=[1.0, 1.0], headroom=2, dtype=torch.float64
    )
    low_a = torch.tensor([[0.1, 1.9]], dtype=torch.float64)
    rest = steady_state(toggle.bind(), low_a).detach()
    toggle.control_level.copy_(rest)
    found = explain(toggle, acts_of("A:overexpression@0.4", toggle)).genes.set_index("gene")
    assert found.change["B"] < -1
    assert abs(found.jump["B"]) > 0.5
    np.testing.assert_allclose(found.change, found.direct + found.indirect + found.jump)


def test_nothing_done_changes_nothing():
    dynamics = random_dynamics(3)
    for text in ("control", "0[0,5]"):
        found = explain(dynamics, acts_of(text, dynamics), n_genes=2)
        np.testing.assert_allclose(found.genes[["change", "direct", "indirect"]].astype(float), 0, atol=1e-12)
        assert found.paths.path.tolist() == [OTHER, OTHER]
        assert found.edges.empty


def test_float32_dynamics_are_explained_in_float64():
    dynamics = random_dynamics(3)
    wide = explain(dynamics, acts_of("1:knockout", dynamics)).genes
    narrow = explain(dynamics.float(), acts_of("1:knockout", dynamics)).genes
    np.testing.assert_allclose(narrow.change, wide.change, atol=1e-5)
    assert next(dynamics.parameters()).dtype == torch.float32


def test_mistakes():
    dynamics = random_dynamics(3)
    two = Interventions.from_conditions([parse_condition(text) for text in ("0:knockout", "1:knockout")], dynamics.genes)
    with pytest.raises(PerturbZooError, match="those of one condition"):
        explain(dynamics, two)
    with pytest.raises(PerturbZooError, match="'299' is not a gene of the network; did you mean '29'"):
        explain(dynamics, two.select(torch.tensor([1])), genes=["299"])
    with pytest.raises(PerturbZooError, match="contexts 4 to 4"):
        explain(dynamics, two.select(torch.tensor([1])), 4)
