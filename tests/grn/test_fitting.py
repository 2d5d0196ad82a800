"""Fits of kinetics against truths that were put in: weights, strengths, what is masked, priors, gates, gradients, likelihoods."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import nbinom

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, Interventions, RegulatoryDynamics, steady_state
from perturbzoo.grn.candidates import candidate_network
from perturbzoo.grn.fitted import FittedNetwork
from perturbzoo.grn.fitting import FitOptions, _deviance, fit_network, settle
from perturbzoo.grn.levels import Levels
from perturbzoo.perturbation import Condition, parse_condition

# A represses B, B activates C, and C activates A
EDGES = pd.DataFrame({"regulator": ["A", "B", "C"], "target": ["B", "C", "A"], "weight": [-2.0, 1.5, 1.0]})
GENES = ("A", "B", "C")
REFERENCE = np.array([1.0, 2.0, 0.5])
QUICK = FitOptions(penalty=0.02, residual_steps=100, fixed_point_steps=60, lr=0.1, stability=0.0)
ALL = ("A", "B", "C", "A@0.5", "B@0.5", "C@0.5", "A+B", "B+C", "A+C")


def screen(
    conditions=ALL,
    *,
    edges: pd.DataFrame = EDGES,
    genes=GENES,
    measured: int | None = None,
    kinetics: str = "hill",
    efficacy: float = 0.8,
    error: float = 0.1,
    kind: str = "interference",
    reference: np.ndarray = REFERENCE,
    decay: float = 0.0,
) -> Levels:
    """Steady levels of a known network, without noise; `decay` is what a knockout takes of its own mRNA."""
    network = GeneRegulatoryNetwork.from_edges(edges, list(genes))
    reference = np.atleast_2d(reference)
    dynamics = RegulatoryDynamics(network, kinetics=kinetics, reference=reference, dtype=torch.float64)
    parsed, acted = [parse_condition(one) for one in conditions], []
    for one in parsed:
        acts = [replace(act, kind=act.kind or kind, efficacy=efficacy) for act in one]
        lost = [replace(act, kind="interference", efficacy=decay) for act in acts if decay and act.kind == "knockout"]
        acted.append(Condition([*acts, *lost]) if not lost else (acts, lost))
    if decay:
        flat = [Condition(acts) for acts, _ in acted]
        extra = Interventions.from_conditions([Condition(lost) for _, lost in acted], genes, dtype=torch.float64)
        first = Interventions.from_conditions(flat, genes, dtype=torch.float64)
        names = ("targets", "kind", "dose", "onset", "offset", "efficacy")
        acts = Interventions(*(torch.cat([getattr(one, name) for one in (first, extra)], dim=1) for name in names))
    else:
        acts = Interventions.from_conditions(acted, genes, dtype=torch.float64)
    contexts = np.arange(len(reference)).repeat(len(conditions))
    rows = torch.arange(len(conditions)).repeat(len(reference))
    with torch.no_grad():
        rates = dynamics.bind(acts.select(rows), torch.from_numpy(contexts))
        level = steady_state(rates, dynamics.control_level[torch.from_numpy(contexts)]).numpy()
    count = len(genes) if measured is None else measured
    return Levels(
        tuple(genes[:count]),
        tuple(parsed) * len(reference),
        contexts,
        level[:, :count],
        reference[:, :count],
        np.full((len(contexts), count), error),
        np.full((len(reference), count), error),
        kind,
    )


def fit(levels: Levels, options: FitOptions = QUICK, prior=None, nodes=None, **more) -> FittedNetwork:
    return fit_network(levels, candidate_network(levels, list(nodes or levels.genes), prior, **more), options)


def weights(fitted: FittedNetwork) -> np.ndarray:
    return fitted.dynamics.weights().numpy()


def truth(edges: pd.DataFrame = EDGES, genes=GENES) -> np.ndarray:
    return GeneRegulatoryNetwork.from_edges(edges, list(genes)).matrix().toarray()


@pytest.fixture(scope="module")
def recovered() -> FittedNetwork:
    return fit(screen())


# ---------------------------------------------------------------------------------------------- what is recovered


def test_weights_signs_and_strengths_of_a_cycle_are_recovered(recovered):
    np.testing.assert_allclose(weights(recovered), truth(), atol=0.15)
    np.testing.assert_allclose(torch.sigmoid(recovered.strength), 0.8, atol=0.03)
    assert {act[1] for act in recovered.acts} == {"interference"}
    present = np.abs(truth()) > 0
    probability = np.zeros((3, 3))
    probability[recovered.candidates.target, recovered.candidates.regulator] = recovered.probability
    absent = ~present & ~np.eye(3, dtype=bool)
    assert probability[present].min() > max(0.5, probability[absent].max())


def test_fitted_network_predicts_what_it_was_not_shown(recovered):
    """Triples and other doses, in which nothing but the network is known."""
    unseen = screen(("A+B+C", "A@0.3+B@0.7"))
    change = recovered.change(unseen.conditions).numpy()
    np.testing.assert_allclose(change, unseen.change, atol=0.03)


@pytest.mark.parametrize("kinetics", ["additive", "multiplicative"])
def test_other_kinetics_recover_signs_and_changes(kinetics):
    levels = screen(kinetics=kinetics)
    fitted = fit(levels, replace(QUICK, kinetics=kinetics))
    strong = np.abs(truth()) > 0
    np.testing.assert_array_equal(np.sign(weights(fitted))[strong], np.sign(truth())[strong])
    np.testing.assert_allclose(fitted.change(levels.conditions).numpy(), levels.change, atol=0.1)


def test_one_edge_of_two_genes_in_one_stage_too():
    edges = EDGES.iloc[:1]
    levels = screen(("A", "B", "A@0.5"), edges=edges, genes=("A", "B"), reference=REFERENCE[:2])
    fitted = fit(levels, replace(QUICK, fixed_point_steps=0))
    np.testing.assert_allclose(weights(fitted), [[0, 0], [-2, 0]], atol=0.15)


def test_a_gene_that_its_own_act_changes_gets_no_edge_from_that():
    """Without any network, and with a drop of its own gene in each condition: own rows are what a regulator would explain best."""
    empty = EDGES.iloc[:0].astype({"weight": float})
    levels = screen(edges=empty)
    assert levels.change.min() < -1
    fitted = fit(levels, replace(QUICK, penalty=1.0))
    assert not weights(fitted).any()
    # and whatever guides do to their own genes in the residual stage
    other = replace(levels, level=levels.level.copy())
    for row, condition in enumerate(levels.conditions):
        for target in condition.targets:
            other.level[row, GENES.index(target)] *= 1.7
    one, two = (weights(fit(part, replace(QUICK, fixed_point_steps=0, penalty=1.0))) for part in (levels, other))
    assert not one.any()
    assert not two.any()


def test_knockouts_act_although_their_mrna_does_not_change():
    """Cas9 takes the protein: the gene's own mRNA is what the network makes of it, its targets follow."""
    levels = screen(kind="knockout", efficacy=0.9)
    assert np.abs(levels.change[0, 0]) < 0.5
    fitted = fit(levels)
    assert (np.sign(weights(fitted)) == np.sign(truth()))[truth() != 0].all()
    np.testing.assert_allclose(fitted.change(levels.conditions).numpy(), levels.change, atol=0.08)
    assert (torch.sigmoid(fitted.own) < 0.1).all()
    # nonsense-mediated decay is the act's, not an edge's
    decayed = fit(screen(kind="knockout", efficacy=0.9, decay=0.6))
    np.testing.assert_allclose(torch.sigmoid(decayed.own), 0.6, atol=0.1)


@pytest.mark.parametrize(("kind", "fold"), [("activation", 5.0), ("overexpression", 5.0)])
def test_what_adds_has_its_dose_fitted(kind, fold):
    levels = screen(kind=kind, efficacy=0.5)
    fitted = fit(levels)
    np.testing.assert_allclose(torch.exp(fitted.strength), 0.5, rtol=0.15)
    np.testing.assert_allclose(fitted.change(levels.conditions).numpy(), levels.change, atol=0.06)


def test_targets_that_are_not_measured_and_compounds_act_through_their_edges():
    """X activates A and represses C; nobody sees X."""
    edges = pd.DataFrame({"regulator": ["X", "X"], "target": ["A", "C"], "weight": [2.0, -1.0]})
    conditions = ("X", "X@0.5", "A", "B", "C", "A+X")
    levels = screen(conditions, edges=edges, genes=("A", "B", "C", "X"), measured=3, reference=np.r_[REFERENCE, 1])
    fitted = fit(levels, nodes=[*GENES, "X"])
    found = weights(fitted)
    assert found[0, 3] > 0.5
    assert found[2, 3] < -0.2
    assert not found[3].any()
    np.testing.assert_allclose(fitted.change(levels.conditions).numpy()[:, :3], levels.change, atol=0.06)
    named = tuple(parse_condition(str(one).replace("X", "X:compound")) for one in levels.conditions)
    drug = fit(replace(levels, conditions=named), nodes=[*GENES, "X"])
    # more of a compound does what less of a regulator did
    assert drug.dynamics.weights()[0, 3] < 0
    np.testing.assert_allclose(drug.change(named[:1]).numpy()[:, :3], levels.change[:1], atol=0.1)


def test_untested_guides_are_the_median_of_their_kind(recovered):
    levels = screen(("A", "B", "A@0.5", "A+B"))
    fitted = fit(levels)
    given = fitted.interventions(
        fitted.encode([parse_condition("C"), parse_condition("A"), parse_condition("C:activation@0.4")])
    )
    own = torch.sigmoid(fitted.strength)
    assert float(given.efficacy[0, 0]) == pytest.approx(float(own.min()), abs=1e-6)
    assert float(given.efficacy[1, 0]) == pytest.approx(float(own[0]), abs=1e-6)
    assert float(given.dose[2, 0]) == pytest.approx(0.4)


def test_two_contexts_share_weights_not_levels():
    levels = screen(reference=np.array([[1.0, 2.0, 0.5], [2.0, 1.0, 1.0]]))
    fitted = fit(levels)
    assert fitted.dynamics.weight.ndim == 1
    np.testing.assert_allclose(weights(fitted), truth(), atol=0.15)
    for context in (0, 1):
        rows = levels.context == context
        found = fitted.change(levels.conditions[:9], torch.full((9,), context)).numpy()
        np.testing.assert_allclose(found, levels.change[rows], atol=0.06)
    assert np.abs(levels.change[:9] - levels.change[9:]).max() > 0.1


def test_pruned_kinetics_are_the_same(recovered):
    conditions = recovered.encode([parse_condition(one) for one in ALL])
    acts = recovered.interventions(conditions)
    dynamics = recovered.pruned()
    assert len(dynamics.weight) == int((recovered.dynamics.weight != 0).sum())
    reference = dynamics.control_level[torch.zeros(len(ALL), dtype=torch.int64)]
    with torch.no_grad():
        change = torch.log(steady_state(dynamics.bind(acts), reference) / reference)
    torch.testing.assert_close(change, recovered.change(conditions), rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------------- prior, penalties, gates


def prior_of(*edges: tuple[str, str, int, float]) -> GeneRegulatoryNetwork:
    table = pd.DataFrame(edges, columns=["regulator", "target", "sign", "probability"])
    return GeneRegulatoryNetwork.from_edges(table, list(GENES))


def test_an_edge_of_the_prior_costs_less():
    """With a penalty that removes the weakest edge, a prior brings it back, the more the surer it is."""
    levels = screen(error=0.2)
    options = replace(QUICK, penalty=2.0)
    sizes = []
    for probability in (0.0, 0.5, 1.0):
        prior = prior_of(("C", "A", 0, probability)) if probability else None
        sizes.append(weights(fit(levels, options, prior))[0, 2])
    assert sizes[0] < sizes[1] < sizes[2]
    ignored = weights(fit(levels, replace(options, prior_strength=0.0), prior_of(("C", "A", 0, 1.0))))
    assert ignored[0, 2] == pytest.approx(sizes[0], abs=1e-5)


def test_a_sign_against_the_prior_costs_more():
    levels = screen(error=0.2)
    right, wrong = (
        weights(fit(levels, replace(QUICK, sign_penalty=3.0), prior_of(("A", "B", sign, 0.5))))[1, 0] for sign in (-1, 1)
    )
    assert right < wrong <= 0
    free = weights(fit(levels, replace(QUICK, sign_penalty=0.0), prior_of(("A", "B", 1, 0.5))))[1, 0]
    assert free == pytest.approx(right, abs=0.02)


def test_penalty_leaves_fewer_and_smaller_edges():
    levels = screen(error=0.1)
    found = [weights(fit(levels, replace(QUICK, penalty=penalty))) for penalty in (0.1, 2.0, 200.0)]
    sizes = [np.abs(one).sum() for one in found]
    assert sizes[0] > sizes[1] > sizes[2] == 0


def test_gates_close_what_is_absent():
    fitted = fit(screen(), replace(QUICK, sparsity="gates", fixed_point_steps=100, residual_steps=200))
    present = truth() != 0
    found = weights(fitted)
    np.testing.assert_array_equal(np.sign(found[present]), np.sign(truth()[present]))
    assert np.abs(found[~present]).max() < 0.3 * np.abs(found[present]).min()
    assert bool(((fitted.probability >= 0) & (fitted.probability <= 1)).all())
    assert isinstance(fitted.dynamics.weight, torch.nn.Parameter), "a checkpoint holds the weight, not the gates"
    assert not any("parametrizations" in name for name in fitted.state_dict())


def test_the_same_seed_gives_the_same_numbers():
    options = replace(QUICK, sparsity="gates", residual_steps=20, fixed_point_steps=5)
    before = torch.random.get_rng_state()
    one, same, other = (fit(screen(), replace(options, seed=seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(one.dynamics.weight, same.dynamics.weight, rtol=0, atol=0)
    assert not torch.equal(one.dynamics.weight, other.dynamics.weight)
    torch.testing.assert_close(torch.random.get_rng_state(), before, rtol=0, atol=0)


def test_weights_of_rows_are_repetitions():
    """A row of weight 2 is that row twice."""
    levels = screen(error=0.1)
    twice = fit(levels.select(np.r_[0, np.arange(9)]))
    weighed = fit(replace(levels, weight=np.array([2.0] + [1.0] * 8)))
    np.testing.assert_allclose(weights(weighed), weights(twice), atol=0.02)


# ---------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("mean", "alpha"), [(0.3, 0.5), (5.0, 0.05), (40.0, 1.5)])
def test_deviance_is_that_of_the_negative_binomial(mean, alpha):
    """Differences of log likelihood between two means, of counts that average to `mean`."""
    counts = np.random.default_rng(0).poisson(mean, 200)
    average = counts.mean()
    logs = np.log([0.7 * mean, 1.6 * mean])
    expected = [-nbinom.logpmf(counts, 1 / alpha, 1 / (1 + alpha * np.exp(log))).mean() for log in logs]
    found = [float(_deviance(*(torch.tensor(value, dtype=torch.float64) for value in (average, log, alpha)))) for log in logs]
    assert found[1] - found[0] == pytest.approx(expected[1] - expected[0], rel=1e-9)
    least = float(_deviance(*(torch.tensor(value, dtype=torch.float64) for value in (average, np.log(average), alpha))))
    assert least == pytest.approx(0, abs=1e-9)


def test_counts_without_any_are_finite():
    value = _deviance(torch.tensor(0.0), torch.tensor(-3.0), torch.tensor(0.1))
    assert 0 < float(value) < 0.1


def test_counts_and_normal_noise_agree_where_counts_are_many():
    levels = screen(error=0.02)
    # error² = (1 / level + α) / cells
    counted = replace(levels, unit=0.01, dispersion=np.full(3, 0.02))
    one, two = fit(levels), fit(counted)
    np.testing.assert_allclose(weights(two), weights(one), atol=0.15)


# ---------------------------------------------------------------------------------------------- the fixed point


def test_implicit_gradient_is_the_finite_difference():
    network = GeneRegulatoryNetwork.from_edges(EDGES, list(GENES))
    dynamics = RegulatoryDynamics(network, kinetics="hill", reference=REFERENCE, anchored=True, dtype=torch.float64)
    acts = Interventions.from_conditions(
        [parse_condition("A:interference@0.7"), parse_condition("B:activation@0.3+C:knockout@0.5")], GENES, dtype=torch.float64
    )
    context = torch.zeros(2, dtype=torch.int64)
    side = torch.tensor([[1.0, -0.5, 2.0], [0.3, 1.0, -1.0]], dtype=torch.float64)

    def value() -> torch.Tensor:
        z, _ = settle(dynamics, acts, context, None, steps=60, adjoint=200)
        return (side * z).sum()

    for parameter in (dynamics.weight, dynamics.bias):
        gradient = torch.autograd.grad(value(), parameter)[0]
        flat, expected = parameter.data.view(-1), torch.zeros_like(gradient).view(-1)
        for number in range(len(flat)):
            ends = []
            for step in (1e-5, -1e-5):
                flat[number] += step
                ends.append(value().item())
                flat[number] -= step
            expected[number] = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(gradient.view(-1), expected, rtol=1e-5, atol=1e-7)
    # and the value is the steady state
    reference = dynamics.control_level[context]
    solved = torch.log(steady_state(dynamics.bind(acts, context), reference) / reference)
    torch.testing.assert_close(settle(dynamics, acts, context, None, steps=60)[0], solved, rtol=0, atol=1e-9)
    with torch.no_grad():
        assert settle(dynamics, acts, context, None)[0].shape == (2, 3)


def test_stability_penalty_keeps_a_switch_at_rest():
    """Two genes that activate each other so strongly that the control state would not be stable."""
    edges = pd.DataFrame({"regulator": ["A", "B"], "target": ["B", "A"], "weight": [1.5, 1.5]})
    levels = screen(("A", "B", "A@0.5", "B@0.5"), edges=edges, genes=("A", "B"), reference=REFERENCE[:2], error=0.3)
    prior = prior_of(("A", "B", 1, 1.0), ("B", "A", 1, 1.0)).restrict(["A", "B"])
    fitted = fit(levels, replace(QUICK, stability=1.0), prior)
    # by hand: d log x_B / d log x_A = (1 - f) W h' with f = 1/2, and h' = n h (1 - h) = 1/2 at H
    loop = weights(fitted)[0, 1] * weights(fitted)[1, 0] / 16
    assert loop < 1


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": -1}, "penalty=-1 must not be negative"),
        ({"prior_strength": 1.5}, r"prior_strength=1.5 lies outside \[0, 1\]"),
        ({"sparsity": "l2"}, "sparsity='l2' is neither 'l1' nor 'gates'"),
        ({"sign_penalty": -1}, "sign_penalty and stability start at 0"),
        ({"residual_steps": 0}, "steps start at 1"),
        ({"fixed_point_steps": -1}, "steps start at 1"),
        ({"lr": 0}, "lr=0 must be positive"),
        ({"kinetics": "linear"}, "kinetics='linear' is not one of additive, hill, multiplicative"),
    ],
)
def test_options(options, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        FitOptions(**options)
    assert "\n" not in str(caught.value)


def test_candidates_must_be_of_the_genes():
    levels = screen()
    with pytest.raises(PerturbZooError, match="nodes must begin with the genes of the levels"):
        fit_network(levels, candidate_network(levels, GENES, None).restrict(["B", "A", "C"]))


def test_what_is_outside_the_network_is_named(recovered):
    with pytest.raises(PerturbZooError, match="D"):
        recovered.encode([parse_condition("A+D")])
    with pytest.raises(PerturbZooError, match=r"B:interference@3.*between 0 and 1"):
        recovered.encode([parse_condition("B:interference@3")])


def test_steps_are_reported():
    said = []
    levels = screen()
    options = replace(QUICK, residual_steps=30, fixed_point_steps=4)
    fit_network(levels, candidate_network(levels, GENES, None), options, report=lambda *each: said.append(each))
    assert [stage for stage, *_ in said] == ["residual"] * 30 + ["fixed point"] * 4
    assert said[29][2] < said[0][2]
