"""Networks to simulate: degrees, modules, motifs that do what they are named for, pieces of known ones."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.grn import GeneRegulatoryNetwork, RegulatoryDynamics, integrate
from perturbzoo.simulate import network_from_file, random_network, simulate_screen
from perturbzoo.simulate.networks import MOTIF_WEIGHT, MOTIFS


def motif(name: str) -> GeneRegulatoryNetwork:
    """The motif alone, with its own weights."""
    edges = pd.DataFrame(MOTIFS[name], columns=["regulator", "target", "sign"])
    edges[["regulator", "target"]] = edges[["regulator", "target"]].map("ABC".__getitem__)
    return GeneRegulatoryNetwork.from_edges(edges.assign(weight=MOTIF_WEIGHT.get(name, 2.0)))


def rates(network: GeneRegulatoryNetwork):
    return RegulatoryDynamics(network, kinetics="hill", dtype=torch.float64).requires_grad_(False).bind()


def eigenvalues(network: GeneRegulatoryNetwork) -> np.ndarray:
    """Of the Jacobian at the reference level."""
    system = rates(network)
    level = torch.ones(len(network.genes), dtype=torch.float64)

    def flow(state: torch.Tensor) -> torch.Tensor:
        production, decay = system(torch.tensor(0.0), state)
        return production - decay * state

    return np.linalg.eigvals(torch.autograd.functional.jacobian(flow, level).numpy())


def test_degrees():
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


def test_modules_and_signs_of_regulators():
    """Nine edges in ten stay in a module: with four of them, targets of a pair of regulators overlap within or not at all."""
    network = random_network(400, n_regulators=40, modules=4, sign_of="regulator", in_degree=3.0, seed=5)
    signs = network.matrix("sign").toarray()[:, np.unique(network.regulator)]
    assert ((signs >= 0).all(0) | (signs <= 0).all(0)).all()
    overlap = np.abs(signs).T @ np.abs(signs)
    np.fill_diagonal(overlap, 0)
    # dealt in turn, ten regulators have nine others in their module; without modules all would be alike
    inside = np.sort(overlap, axis=1)[:, ::-1]
    assert inside[:, :9].mean() > 4 * inside[:, 9:].mean()


def test_toggle_has_two_stable_states():
    """One state is the mirror of the other, and each solves x = 2 σ(W (1/2 - y^2 / (1 + y^2))) with the other gene's level y."""
    system = rates(motif("toggle"))
    high, low = (
        integrate(system, torch.tensor(start, dtype=torch.float64), [0.0, 80.0])[-1] for start in ([1.1, 0.9], [0.9, 1.1])
    )
    np.testing.assert_allclose(high, low.flip(0), rtol=1e-6)
    x, y = high.tolist()
    assert x > 4 * y
    for one, other in ((x, y), (y, x)):
        drive = MOTIF_WEIGHT["toggle"] * (0.5 - other**2 / (1 + other**2))
        assert one == pytest.approx(2 / (1 + math.exp(-drive)), rel=1e-4)
    # between them the reference is a saddle: -1 ± W / 4
    np.testing.assert_allclose(np.sort(eigenvalues(motif("toggle")).real), [-2.5, 0.5], atol=1e-6)


def test_cells_of_a_toggle_fall_to_either_side():
    adata = simulate_screen(motif("toggle"), conditions=["A"], n_control=2000, level_spread=0.0, depth=50.0, times=(30.0,))
    control = adata.X.toarray()[(adata.obs["perturbation"] == "control").to_numpy()]
    up = (control[:, 0] > control[:, 1]).mean()
    assert up == pytest.approx(0.5, abs=0.1)
    assert np.corrcoef(np.log1p(control.T))[0, 1] < -0.8
    # with A held down the other side is all that is left
    knocked = adata.X.toarray()[(adata.obs["perturbation"] == "A").to_numpy()]
    assert (knocked[:, 1] > knocked[:, 0]).all()
    assert np.isfinite(adata.uns["truth"]["fixed_point"]).all()


def test_repressilator_oscillates():
    """Eigenvalues -1 + g (cube roots of -1), g = W / 4 = 3: a growing oscillation of period 2 π / (g sin 60°)."""
    network = motif("repressilator")
    gain = MOTIF_WEIGHT["repressilator"] / 4
    expected = -1 + gain * np.exp(1j * math.pi * np.array([1, 3, 5]) / 3)
    found = eigenvalues(network)
    np.testing.assert_allclose(np.sort_complex(found), np.sort_complex(expected), atol=1e-6)
    start = torch.tensor([1.05, 1.0, 0.95], dtype=torch.float64)
    course = integrate(rates(network), start, np.linspace(0, 100, 1001).tolist())[500:].numpy()
    assert (np.ptp(course, axis=0) > 0.5).all()
    rising = np.flatnonzero((course[:-1, 0] < 1) & (course[1:, 0] >= 1))
    periods = np.diff(rising) / 10
    assert len(periods) > 5
    # a limit cycle: all turns take the same time, longer than small oscillations around the unstable state
    assert np.ptp(periods) <= 0.2
    assert periods.mean() > 2 * math.pi / (gain * math.sin(math.pi / 3))
    truth = simulate_screen(network, conditions=["A"], efficacy=(1.0, 1.0), cells_per_condition=1).uns["truth"]
    assert np.isnan(truth["fixed_point"][0, 0]).all()
    # without A the ring is broken and everything rests
    assert np.isfinite(truth["fixed_point"][0, 1]).all()


@pytest.mark.parametrize("name", ["feed_forward", "incoherent_feed_forward"])
def test_feed_forward_loops(name):
    """A change of A reaches C directly and through B: the same way, or against each other."""
    network = motif(name)
    signs = network.matrix("sign").toarray()
    assert signs[1, 0] == signs[2, 0] == 1
    assert signs[2, 1] == (1 if name == "feed_forward" else -1)
    levels = simulate_screen(network, conditions=["A"], cells_per_condition=1, level_spread=0.0).uns["truth"]["effect"][0, 1]
    alone = network.restrict(["A", "C"])
    direct = simulate_screen(alone, conditions=["A"], cells_per_condition=1, level_spread=0.0).uns["truth"]["effect"][0, 1, 1]
    assert direct < 0
    assert levels[1] < 0
    assert levels[2] < direct if name == "feed_forward" else levels[2] > direct


def test_motifs_are_planted():
    network = random_network(60, motifs={"toggle": 2, "repressilator": 1}, seed=1)
    signs = network.matrix("sign").toarray()
    mutual = [(i, j) for i, j in zip(*np.nonzero((signs == -1) & (signs.T == -1)), strict=True) if i < j]
    assert len(mutual) >= 2
    strong = network.edges[network.edges["weight"].abs() > 2.5]
    assert sorted(strong["weight"]) == [-12.0] * 3 + [-6.0] * 4
    ring = strong[strong["weight"] == -12.0].set_index("regulator")["target"]
    start = ring.index[0]
    assert ring[ring[ring[start]]] == start
    # no edge between members but the motif's own
    members = network.edges["regulator"].isin(ring.index) & network.edges["target"].isin(ring.index)
    assert members.sum() == 3


def test_screens_that_do_not_fit_into_memory():
    with pytest.raises(PerturbZooError, match=r"501,000 cells \(5001 conditions\) x 5,000 genes are more than"):
        simulate_screen(random_network(5000, n_regulators=3, in_degree=1.0))


def write(folder, rows) -> str:
    path = folder / "edges.csv"
    pd.DataFrame(rows, columns=["regulator", "target", "weight"]).to_csv(path, index=False)
    return str(path)


def test_largest_part_of_a_file(tmp_path):
    rows = [("A", "B", 1), ("B", "C", -1), ("C", "A", 1), ("X", "Y", 1), ("B", "B", 1), ("A", "C", 1), ("A", "C", -1)]
    with pytest.warns(PerturbZooWarning, match="left out 1 self loops, 1 pairs of both signs"):
        network = network_from_file(write(tmp_path, rows))
    edges = network.edges
    assert list(zip(edges["regulator"], edges["target"], edges["sign"], strict=True)) == [
        ("C", "A", 1),
        ("A", "B", 1),
        ("B", "C", -1),
    ]
    # signs only: magnitudes are drawn; numbers that differ are kept
    assert edges["weight"].abs().between(1.0, 2.5).all()
    assert edges["weight"].nunique() == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = network_from_file(write(tmp_path, [("A", "B", 0.7), ("B", "C", -1.3)]))
    assert kept.edges["weight"].tolist() == [0.7, -1.3]


def test_piece_of_a_file_is_connected(tmp_path):
    import networkx

    whole = random_network(300, seed=2)
    path = tmp_path / "whole.csv"
    whole.write(path)
    piece, same, other = (network_from_file(path, 40, seed=seed) for seed in (1, 1, 2))
    assert len(piece.genes) == 40
    assert networkx.is_weakly_connected(piece.to_networkx())
    assert piece.genes == same.genes != other.genes
    among = whole.restrict(piece.genes)
    np.testing.assert_allclose(piece.matrix().toarray(), among.matrix().toarray())
    assert simulate_screen(piece, n_singles=3, cells_per_condition=2).shape == (26, 40)


@pytest.mark.parametrize(
    ("rows", "genes", "message"),
    [
        ([("A", "A", 1.0)], None, "no edge to simulate remains without 1 self loops"),
        ([("A", "B", 1.0), ("A", "B", -1.0)], None, "no edge to simulate remains without 1 pairs of both signs"),
        ([("A", "B", 1.0)], 3, "largest connected part has 2 genes; n_genes=3"),
    ],
)
def test_files_without_a_network(tmp_path, rows, genes, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        network_from_file(write(tmp_path, rows), genes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_genes": 1}, "n_genes=1 must be 2 at least"),
        ({"in_degree": 0.5}, "in_degree=0.5"),
        ({"motifs": {"togle": 1}}, "did you mean 'toggle'"),
        ({"motifs": {"repressilator": 4}}, "need 12 regulators, there are 10"),
        ({"n_regulators": 11}, "n_regulators=11 must lie between 2 and n_genes=10"),
        ({"modules": 6}, "modules=6 must lie between 1 and half of 10 regulators"),
        ({"sign_of": "gene"}, "sign_of='gene' must be edge or regulator"),
        ({"strength": (0.0, 1.0)}, "strength="),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(PerturbZooError, match=message):
        random_network(**{"n_genes": 10} | options)
