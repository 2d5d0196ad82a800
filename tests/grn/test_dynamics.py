"""Kinetics against formulas written out anew; bounds, equal ways of computing, gradients, and what cannot be built."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import expm

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, Interventions, RegulatoryDynamics, integrate, steady_state
from perturbzoo.grn.dynamics import _EdgeSum
from perturbzoo.perturbation import parse_condition

EDGES = pd.DataFrame({"regulator": ["A", "C", "B", "A"], "target": ["B", "B", "A", "C"], "weight": [1.5, -2.0, -0.8, 0.7]})
NETWORK = GeneRegulatoryNetwork.from_edges(EDGES, ["A", "B", "C", "D"])
REFERENCE = np.array([[1.0, 2.0, 0.5, 3.0], [2.0, 1.0, 1.5, 0.2]])
MEAN = REFERENCE.mean(0)
KINETICS = ("additive", "hill", "multiplicative")


def make(network: GeneRegulatoryNetwork = NETWORK, **options) -> RegulatoryDynamics:
    return RegulatoryDynamics(network, **({"reference": REFERENCE, "dtype": torch.float64} | options))


def random_network(genes: int, edges: int, seed: int = 0) -> GeneRegulatoryNetwork:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(rng.integers(0, genes, (edges, 2)), columns=["regulator", "target"]).drop_duplicates()
    table = table[table.regulator != table.target].assign(weight=lambda t: rng.normal(0, 0.7, len(t)))
    return GeneRegulatoryNetwork.from_edges(table, [str(number) for number in range(genes)])


def regulation(kinetics: str, level: np.ndarray, bias: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """f of one state, gene by gene and edge by edge, as the module's docstring writes it; H = m, n = 2, floor 0.05."""
    f = np.empty(4)
    for i, gene in enumerate("ABCD"):
        drive, product = bias[i], 1 / (1 + math.exp(-bias[i]))
        for edge in EDGES[EDGES.target == gene].itertuples():
            j = "ABCD".index(edge.regulator)
            hill = level[j] ** 2 / (level[j] ** 2 + MEAN[j] ** 2)
            epsilon = 0.05 * MEAN[j]
            log = (math.log(level[j] + epsilon) - math.log(MEAN[j] + epsilon)) / spread[j]
            drive += edge.weight * (log if kinetics == "additive" else hill)
            product *= hill * math.exp(min(edge.weight, 0)) + (1 - hill) * math.exp(-max(edge.weight, 0))
        f[i] = product if kinetics == "multiplicative" else 1 / (1 + math.exp(-drive))
    return f


@pytest.mark.parametrize("kinetics", KINETICS)
def test_derivative_is_the_formula(kinetics):
    spread = np.array([0.5, 1.0, 2.0, 1.0])
    decay = np.array([1.0, 0.3, 2.0, 0.7])
    dynamics = make(kinetics=kinetics, spread=spread, decay=decay)
    state = np.random.default_rng(1).lognormal(0, 1, (2, 4))
    got = dynamics(torch.tensor(0.0), torch.from_numpy(state), context=torch.tensor([1, 0])).detach().numpy()
    for row, context in ((0, 1), (1, 0)):
        bias, most = dynamics.bias[context].detach().numpy(), dynamics.production[context].detach().numpy()
        expected = most * regulation(kinetics, state[row], bias, spread) - decay * state[row]
        np.testing.assert_allclose(got[row], expected, rtol=1e-9)


@pytest.mark.parametrize("kinetics", KINETICS)
@pytest.mark.parametrize(("splicing", "protein"), [(False, False), (True, False), (False, True), (True, True)])
def test_control_is_a_steady_state_in_every_context(kinetics, splicing, protein):
    dynamics = make(kinetics=kinetics, splicing=splicing, protein=protein, decay=0.4, headroom=3.0)
    state = dynamics.control_state
    assert state.shape == (2, 4 * (1 + splicing + protein))
    change = dynamics(torch.tensor(0.0), state, context=torch.tensor([0, 1]))
    torch.testing.assert_close(change, torch.zeros_like(change), rtol=0, atol=1e-12)
    mature = dynamics.split(state)["spliced" if splicing else "mrna"]
    np.testing.assert_allclose(mature, REFERENCE)


@pytest.mark.parametrize("kinetics", KINETICS)
def test_a_layered_gene_without_regulators_is_a_linear_chain(kinetics):
    """Unspliced -> spliced -> protein, with constant production: the matrix exponential of a 3 x 3 matrix."""
    network = GeneRegulatoryNetwork.from_edges(EDGES.iloc[:0].astype({"weight": float}), ["A"])
    rates = {"decay": 0.7, "splicing_rate": 2.0, "protein_decay": 0.3}
    dynamics = RegulatoryDynamics(
        network, kinetics=kinetics, reference=[1.5], splicing=True, protein=True, dtype=torch.float64, **rates
    )
    matrix = np.array([[-2.0, 0, 0], [2.0, -0.7, 0], [0, 0.3, -0.3]])
    rest = dynamics.control_state[0].numpy()
    start = np.array([3.0, 0.0, 1.0])
    states = integrate(dynamics.bind(), torch.from_numpy(start), [0.0, 1.0, 4.0], step=0.005)
    for state, time in zip(states[1:].detach().numpy(), (1.0, 4.0), strict=True):
        np.testing.assert_allclose(state, rest + expm(matrix * time) @ (start - rest), rtol=2e-5)


def test_weakly_perturbed_networks_follow_the_matrix_exponential_of_their_jacobian():
    """Near control f = 1/2 + W φ / 4, so J = diag(v) W diag(φ') / 4 - diag(γ) with v = 2 γ m."""
    dynamics = make(reference=MEAN, decay=0.6)
    slope = 1 / (MEAN * 1.05)
    jacobian = (2 * 0.6 * MEAN)[:, None] * NETWORK.matrix().toarray() * slope / 4 - 0.6 * np.eye(4)
    shift = 1e-6 * np.array([1.0, -2.0, 0.5, 1.0])
    states = integrate(dynamics.bind(), torch.from_numpy(MEAN + shift), [0.0, 1.5], step=0.01)
    np.testing.assert_allclose(
        (states[1].detach().numpy() - MEAN) / 1e-6, expm(jacobian * 1.5) @ shift / 1e-6, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("kinetics", KINETICS)
def test_states_stay_within_their_bounds(kinetics):
    """Strong random weights, large steps, any start: never below 0, never above (v κ + s) / γ."""
    network = random_network(60, 400)
    dynamics = RegulatoryDynamics(network, kinetics=kinetics)
    with torch.no_grad():
        dynamics.weight *= 20
    texts = ["control", "3:activation@2", "5:overexpression@3", "7:knockout", "9:clamp@40", "11:interference+13:activation"]
    acts = Interventions.from_conditions([parse_condition(text) for text in texts], network.genes)
    generator = torch.Generator().manual_seed(0)
    start = dynamics.production[0] / dynamics.decay * torch.rand(6, 60, generator=generator)
    states = integrate(dynamics.bind(acts), start.detach(), torch.arange(0.0, 30.0, 3.0), step=3.0)
    bound = (dynamics.production[0] / dynamics.decay).expand(6, 60).clone()
    bound[1, 3] *= 1 + 2 * (5 - 1)
    bound[2, 5] += 3 * 5
    bound[4, 9] = 40
    bound[5, 13] *= 5
    assert bool((states >= 0).all())
    assert bool((states <= bound * (1 + 1e-5)).all())


@pytest.mark.parametrize("kinetics", ["additive", "hill"])
def test_edge_list_sparse_and_dense_agree(kinetics):
    network = random_network(30, 60)
    options = {"kinetics": kinetics, "dtype": torch.float64}
    state = torch.from_numpy(np.random.default_rng(0).lognormal(0, 1, (3, 2, 30)))
    edges = RegulatoryDynamics(network, **options)
    expected = edges(torch.tensor(0.0), state)
    with torch.no_grad():
        torch.testing.assert_close(edges(torch.tensor(0.0), state), expected)
    torch.testing.assert_close(RegulatoryDynamics(network, dense=True, **options)(torch.tensor(0.0), state), expected)
    torch.testing.assert_close(edges.weights().detach().numpy(), network.matrix().toarray(), rtol=0, atol=0)


def test_low_rank_keeps_the_leading_singular_vectors():
    network = random_network(30, 200)
    low = RegulatoryDynamics(network, rank=4, dtype=torch.float64)
    left, values, right = np.linalg.svd(network.matrix().toarray())
    np.testing.assert_allclose(low.weights().detach().numpy(), (left[:, :4] * values[:4]) @ right[:4], atol=1e-10)
    assert sum(parameter.numel() for name, parameter in low.named_parameters() if name in ("left", "scale", "right")) <= 4 * 61


@pytest.mark.parametrize("kinetics", KINETICS)
@pytest.mark.parametrize("layers", [{}, {"splicing": True, "protein": True}])
def test_steady_state_equals_long_integration(kinetics, layers):
    dynamics = make(kinetics=kinetics, **layers)
    texts = [
        "control",
        "A:knockout[-9,]",
        "B:activation@0.5[-9,]+C:interference@0.9[-9,]",
        "D:clamp@2[-9,]+A:overexpression[-9,]",
    ]
    acts = Interventions.from_conditions([parse_condition(text) for text in texts], NETWORK.genes, dtype=torch.float64)
    start = dynamics.control_state[0].expand(4, -1)
    with torch.no_grad():
        long = integrate(dynamics.bind(acts), start, [0.0, 90.0], step=0.25)[-1]
        torch.testing.assert_close(steady_state(dynamics.bind(acts), start), long, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kinetics", KINETICS)
def test_gradients_of_parameters_match_finite_differences(kinetics):
    dynamics = make(kinetics=kinetics, learn_turnover=True)
    acts = Interventions.from_conditions(
        [parse_condition("A:knockout@0.7+C:activation@0.2")] * 2, NETWORK.genes, dtype=torch.float64
    )
    names = [name for name, parameter in dynamics.named_parameters() if parameter.requires_grad]
    start, context = dynamics.control_state * 1.3, torch.tensor([0, 1])

    def after(*values, solve):
        def system(time, state):
            return torch.func.functional_call(
                Wrapped(dynamics), dict(zip(keys, values, strict=True)), (time, state, acts, context)
            )

        return solve(system)

    keys = [f"dynamics.{name}" for name in names]
    values = tuple(
        parameter.detach().clone().requires_grad_() for name, parameter in dynamics.named_parameters() if name in names
    )
    for solve in (
        lambda system: integrate(system, start, [0.0, 1.0], step=0.25)[-1],
        lambda system: steady_state(system, start, tolerance=1e-12),
    ):
        assert torch.autograd.gradcheck(lambda *given, how=solve: after(*given, solve=how), values, atol=1e-5, rtol=1e-4)


class Wrapped(torch.nn.Module):
    """`functional_call` runs `forward`; the solvers want production and decay apart."""

    def __init__(self, dynamics):
        super().__init__()
        self.dynamics = dynamics

    def forward(self, *arguments):
        return self.dynamics.terms(*arguments)


@pytest.mark.parametrize("kinetics", KINETICS)
def test_gradients_at_zero_levels_are_finite(kinetics):
    dynamics = make(kinetics=kinetics)
    state = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    dynamics(torch.tensor(0.0), state).sum().backward()
    assert bool(torch.isfinite(state.grad).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in dynamics.parameters() if p.grad is not None)


def test_parameters_survive_a_checkpoint(tmp_path):
    dynamics = make(splicing=True)
    with torch.no_grad():
        dynamics.weight += 1
    torch.save(dynamics.state_dict(), tmp_path / "x.pt")
    other = make(splicing=True)
    other.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    torch.testing.assert_close(other.weights(), dynamics.weights(), rtol=0, atol=0)


def test_float32_follows_float64():
    texts = [parse_condition("A:knockout[1,4]"), parse_condition("B:clamp@2+C:overexpression")]
    found = []
    for dtype in (torch.float32, torch.float64):
        dynamics = make(dtype=dtype)
        acts = Interventions.from_conditions(texts, NETWORK.genes, dtype=dtype)
        found.append(integrate(dynamics.bind(acts), dynamics.control_state, [0.0, 3.0, 6.0]).double())
        assert steady_state(dynamics.bind(acts), dynamics.control_state).dtype == dtype
    torch.testing.assert_close(found[0], found[1], rtol=2e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- anchored


@pytest.mark.parametrize("kinetics", KINETICS)
@pytest.mark.parametrize("layers", [{}, {"splicing": True, "protein": True}])
def test_anchored_kinetics_rest_at_the_reference_whatever_the_weights(kinetics, layers):
    """In every context, with any weights, thresholds and basal levels."""
    dynamics = make(kinetics=kinetics, anchored=True, decay=0.4, **layers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in dynamics.named_parameters():
            if name in ("weight", "bias", "raw_half", "raw_power"):
                parameter += 2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    change = dynamics(torch.tensor(0.0), dynamics.control_state, context=torch.tensor([0, 1]))
    torch.testing.assert_close(change, torch.zeros_like(change), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kinetics", ["additive", "hill"])
def test_anchored_bias_and_production_in_closed_form(kinetics):
    """b' = b - sum W φ(m) is what the equations have, f(m) = σ(b), and so v = γ m / σ(b)."""
    dynamics = make(kinetics=kinetics, anchored=True, decay=0.7)
    with torch.no_grad():
        dynamics.bias += torch.tensor([[0.5, -1.0, 0.0, 2.0], [0.0, 1.0, -0.3, 0.0]], dtype=torch.float64)
    bias, absolute = dynamics.bias.detach().numpy(), dynamics.absolute_bias.detach().numpy()
    for context, level in enumerate(REFERENCE):
        for gene in range(4):
            drive = 0.0
            for edge in EDGES[EDGES.target == "ABCD"[gene]].itertuples():
                j = "ABCD".index(edge.regulator)
                hill = level[j] ** 2 / (level[j] ** 2 + MEAN[j] ** 2)
                drive += edge.weight * (hill if kinetics == "hill" else math.log((level[j] / MEAN[j] + 0.05) / 1.05))
            assert absolute[context, gene] == pytest.approx(bias[context, gene] - drive, abs=1e-9)
    expected = 0.7 * REFERENCE * (1 + np.exp(-bias))
    np.testing.assert_allclose(dynamics.production.detach().numpy(), expected, rtol=1e-9)
    # and the formulas with these are the derivative
    state = np.random.default_rng(1).lognormal(0, 1, 4)
    got = dynamics(torch.tensor(0.0), torch.from_numpy(state[None]), context=torch.tensor([1])).detach().numpy()[0]
    f = regulation(kinetics, state, absolute[1], np.ones(4))
    np.testing.assert_allclose(got, expected[1] * f - 0.7 * state, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_leaves_the_network_as_it_was(dtype):
    before = NETWORK.weight.copy()
    with torch.no_grad():
        make(dtype=dtype).weight += 1
    np.testing.assert_array_equal(NETWORK.weight, before)


def test_anchored_kinetics_start_as_those_that_are_not():
    state = torch.from_numpy(np.random.default_rng(2).lognormal(0, 1, (2, 4)))
    for kinetics in KINETICS:
        free, anchored = (make(kinetics=kinetics, anchored=fixed) for fixed in (False, True))
        found = [one(torch.tensor(0.0), state, context=torch.tensor([0, 1])) for one in (free, anchored)]
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------- the sum over edges


def edge_sum(dynamics: RegulatoryDynamics, signal: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    forth = (dynamics.target, dynamics.source, dynamics.row_start)
    back = (dynamics.source, dynamics.target, dynamics.source_start)
    return _EdgeSum.apply(signal, weight, forth, back, dynamics.by_source)


def test_sum_over_edges_is_the_dense_product_with_its_gradients():
    dynamics = RegulatoryDynamics(random_network(12, 40), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    signal = torch.randn(5, len(dynamics.regulators), generator=generator, dtype=torch.float64, requires_grad=True)
    side = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    dense = dynamics.weights()[:, dynamics.regulators]
    found, expected = edge_sum(dynamics, signal, dynamics.weight), signal @ dense.T
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad((found * side).sum(), (signal, dynamics.weight)),
        torch.autograd.grad((expected * side).sum(), (signal, dynamics.weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_sum_over_edges_can_be_differentiated_twice(monkeypatch):
    # few values at a time, so that the edges come in several parts
    monkeypatch.setattr("perturbzoo.grn.dynamics.EDGE_VALUES", 8)
    dynamics = RegulatoryDynamics(random_network(5, 9), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    signal = torch.randn(3, len(dynamics.regulators), generator=generator, dtype=torch.float64, requires_grad=True)
    weight = dynamics.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: edge_sum(dynamics, *given), (signal, weight))
    assert torch.autograd.gradgradcheck(lambda *given: edge_sum(dynamics, *given), (signal, weight))


def test_sum_over_no_edges_is_nothing():
    network = GeneRegulatoryNetwork.from_edges(EDGES.iloc[:0].astype({"weight": float}), list("ABCD"))
    dynamics = make(network, anchored=True)
    assert not dynamics._drive(torch.ones(3, 4, dtype=torch.float64)).any()
    torch.testing.assert_close(dynamics.absolute_bias, dynamics.bias)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make(GeneRegulatoryNetwork.from_edges(EDGES.assign(weight=1.0, sign=0), list("ABCD"))),
            "4 edges have no known sign .*resolve_signs",
        ),
        (lambda: make(kinetics="linear"), "kinetics='linear' is not one of"),
        (lambda: make(reference=[1.0, 2.0, 0.0, 1.0]), "reference must be positive; it is not for C"),
        (lambda: make(reference=[1.0, 2.0]), r"reference has shape \(2,\); give one for each of 4 genes"),
        (lambda: make(decay=[1.0, np.nan, 1.0, 1.0]), "decay must be positive; it is not for B"),
        (lambda: make(decay=-1.0), "decay must be positive"),
        (lambda: make(rank=3), "rank=3 must lie between 1 and 2"),
        (lambda: make(rank=2, kinetics="multiplicative"), "have no rank"),
        (lambda: make(dense=True, kinetics="multiplicative"), "dense=True is for additive and hill"),
        (lambda: make(random_network(501, 900), reference=None, dense=True), "up to 500 genes, the network has 501"),
        (lambda: make(headroom=1.0), "headroom=1.0 must be above 1"),
        (lambda: make(floor=0.0), "floor=0.0 must be positive"),
        (lambda: make().bind(context=torch.tensor([0, 2])), "contexts 0 to 2, but there are 2"),
        (
            lambda: make().bind(Interventions.from_conditions([parse_condition("E:knockout")], list("ABCDE"))),
            "gene number 4, but there are 4",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_oscillating_network_names_a_gene():
    """A repressilator with delays by protein has no stable steady state; integration shows it, bounded."""
    table = pd.DataFrame({"regulator": ["lacI", "tetR", "cI"], "target": ["tetR", "cI", "lacI"], "weight": -12.0})
    network = GeneRegulatoryNetwork.from_edges(table)
    dynamics = RegulatoryDynamics(network, protein=True, protein_decay=1.0, dtype=torch.float64)
    start = dynamics.control_state * torch.tensor([1.5, 1.0, 0.7, 1.0, 1.0, 1.0])
    with (
        torch.no_grad(),
        pytest.raises(PerturbZooError, match=r"(unstable dynamics|no steady state).* (lacI|tetR|cI) \((mrna|protein)\)"),
    ):
        steady_state(dynamics.bind(), start, max_steps=900)
