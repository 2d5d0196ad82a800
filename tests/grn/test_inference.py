"""Network inference against closed forms: linear networks without noise, Gaussian chains, effects worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, ScreenEffects, identifiability_report, infer_network
from perturbzoo.grn.inference import ranked_edges
from perturbzoo.grn.inference_methods import METHODS

EVERY = list(METHODS)


def names(count: int) -> list[str]:
    return [f"G{number}" for number in range(count)]


def pairs(count: int) -> np.ndarray:
    return ~np.eye(count, dtype=bool)


def truth(count: int, degree: int = 2, seed: int = 0) -> np.ndarray:
    """Sparse W[target, regulator] with feedback, whose responses exist: the spectral radius is below 1."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((count, count))
    for target in range(count):
        others = rng.choice(np.delete(np.arange(count), target), degree, replace=False)
        weights[target, others] = rng.choice([-1, 1], degree) * rng.uniform(0.3, 0.45, degree)
    assert np.abs(np.linalg.eigvals(weights)).max() < 1
    return weights


def linear_screen(weights: np.ndarray, targets: list[int], **options) -> ScreenEffects:
    """Responses of delta = W delta + u, where u pushes one gene down at a time, each by another amount."""
    push = -np.linspace(0.6, 1.4, len(targets))
    response = np.linalg.inv(np.eye(len(weights)) - weights)
    delta = (response[:, targets] * push).T
    return ScreenEffects(tuple(names(len(weights))), tuple(names(len(weights))[target] for target in targets), delta, **options)


# ---------------------------------------------------------------------------------------------- effects


def test_effects_of_cells_by_hand():
    values = np.array([[1.0, 0], [3, 0], [2, 5], [4, 7], [10, 1], [12, 1], [10, 4], [10, 8]])
    condition, context = np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    effects = ScreenEffects.from_cells(values, ["A", "B"], ["control", "B"], condition, context)
    assert [str(one) for one in effects.conditions] == ["B", "B"]
    np.testing.assert_allclose(effects.delta, [[3 - 2, 6 - 0], [10 - 11, 6 - 1]])
    # squared standard error of a mean of two: half their squared distance, over two
    np.testing.assert_allclose(effects.error**2, [[1 + 1, 1 + 0], [0 + 1, 4 + 0]])


def test_direction_follows_the_kind():
    effects = ScreenEffects(("A", "B", "C"), ("A", "B:activation", "A+C:clamp", "elsewhere"), np.full((4, 3), 0.5))
    np.testing.assert_array_equal(effects.direction, [[-1, 0, 0], [0, 1, 0], [-1, 0, 1], [0, 0, 0]])
    assert effects.unmeasured == ["elsewhere"]


# ---------------------------------------------------------------------------------------------- methods


def test_total_effect_by_hand():
    """B falls by 2 and 4 where A is lost (two contexts), and rises by 1 where C is activated; doubles do not count."""
    delta = np.array([[-1.0, -2, 0], [-1, -4, 0], [0, 1, 3], [9, 9, 9]])
    effects = ScreenEffects(("A", "B", "C"), ("A", "A", "C:activation", "A+B"), delta)
    scores = METHODS["total_effect"](effects, pairs(3), 0)
    np.testing.assert_allclose(scores, [[0, 0, 0], [3, 0, 1], [0, 0, 0]])


@pytest.mark.parametrize("seed", range(3))
def test_mra_is_exact_without_noise(seed):
    weights = truth(10, seed=seed)
    found = METHODS["mra"](linear_screen(weights, list(range(10))), pairs(10), 0)
    np.testing.assert_allclose(found, weights, atol=1e-10)


def test_mra_is_exact_where_the_unperturbed_genes_regulate_nothing():
    weights = truth(10)
    weights[:, [2, 7]] = 0
    perturbed = [gene for gene in range(10) if gene not in (2, 7)]
    found = METHODS["mra"](linear_screen(weights, perturbed), pairs(10), 0)
    np.testing.assert_allclose(found, weights, atol=1e-10)


def test_mra_of_a_singular_screen_is_finite():
    """Two genes that answer every perturbation alike cannot be told apart."""
    delta = np.array([[-1.0, -1, 0.5], [-1, -1, 0.5], [0, 0, -1]])
    assert np.isfinite(METHODS["mra"](ScreenEffects(("A", "B", "C"), ("A", "B", "C"), delta), pairs(3), 0)).all()


def test_lasso_recovers_a_sparse_linear_network():
    weights = truth(20, seed=1)
    found = METHODS["lasso"](linear_screen(weights, list(range(20))), pairs(20), 0)
    np.testing.assert_allclose(found, weights, atol=0.05)
    strongest = np.abs(found) >= np.sort(np.abs(found), axis=None)[-(weights != 0).sum()]
    np.testing.assert_array_equal(strongest, weights != 0)


def test_lasso_penalty_is_the_noise():
    """One regulator x and n conditions: the weight is (x.y / n - alpha) / (x.x / n), alpha = error x rms(x) / sqrt(n)."""
    x = np.linspace(-1, 1, 9)
    y = 0.5 * x + 0.01 * x**2
    effects = ScreenEffects(("A", "B"), ("elsewhere",) * 9, np.stack([x, y], 1), np.array([[0.0, 0.12]] * 9))
    alpha = 0.12 * np.sqrt((x**2).mean() / 9)
    found = METHODS["lasso"](effects, np.array([[False, False], [True, False]]), 0)
    np.testing.assert_allclose(found[1, 0], (x @ y / 9 - alpha) / (x @ x / 9), rtol=1e-6)
    drowned = ScreenEffects(effects.genes, effects.conditions, effects.delta, np.array([[0.0, 12.0]] * 9))
    assert not METHODS["lasso"](drowned, pairs(2), 0)[1].any()


@pytest.mark.parametrize("method", ["lasso", "trees", "mra"])
def test_own_condition_says_nothing_of_a_genes_regulators(method):
    """Whatever is measured where gene 3 itself is perturbed, its regulators stay the same."""
    effects = linear_screen(truth(8), list(range(8)))
    delta = effects.delta.copy()
    delta[3] = np.random.default_rng(5).normal(size=8)
    other = ScreenEffects(effects.genes, effects.conditions, delta)
    before, after = (METHODS[method](screen, pairs(8), 0) for screen in (effects, other))
    np.testing.assert_allclose(after[3], before[3], atol=1e-9)
    assert np.abs(after - before).max() > 0.01  # but those of others do not


def test_correlations():
    rng = np.random.default_rng(0)
    delta = rng.normal(size=(30, 4))
    delta[:, 3] = 2.0  # a constant correlates with nothing
    genes, conditions = tuple(names(4)), tuple(f"elsewhere{row}" for row in range(30))
    effects = ScreenEffects(genes, conditions, delta)
    found = METHODS["pearson"](effects, pairs(4), 0)
    np.testing.assert_allclose(found[:3, :3], np.corrcoef(delta[:, :3].T) - np.eye(3), atol=1e-12)
    assert not found[3].any()
    # ranks do not see a monotone transformation
    warped = ScreenEffects(genes, conditions, np.exp(delta) ** 3)
    np.testing.assert_allclose(METHODS["spearman"](warped, pairs(4), 0), METHODS["spearman"](effects, pairs(4), 0))


def test_partial_correlation_of_a_chain():
    """B = A + noise, C = B + noise, unit variances: the precision is [[2, -1, 0], [-1, 2, -1], [0, -1, 1]]."""
    delta = np.random.default_rng(0).normal(size=(40_000, 3)).cumsum(1)
    effects = ScreenEffects(("A", "B", "C"), ("elsewhere",) * len(delta), delta)
    found = METHODS["partial_correlation"](effects, pairs(3), 0)
    expected = np.array([[0, 0.5, 0], [0.5, 0, 0.5**0.5], [0, 0.5**0.5, 0]])
    np.testing.assert_allclose(found, expected, atol=0.02)  # so many conditions need no shrinkage
    assert METHODS["pearson"](effects, pairs(3), 0)[2, 0] > 0.5


def test_trees_find_a_regulator_that_acts_at_a_threshold():
    rng = np.random.default_rng(0)
    delta = rng.normal(size=(80, 6))
    delta[:, 0] = np.where(delta[:, 4] > 0.5, -1.0, 1.0)
    scores = METHODS["trees"](ScreenEffects(tuple(names(6)), ("elsewhere",) * 80, delta), pairs(6), 0)
    np.testing.assert_allclose(np.abs(scores).sum(1), 1)
    assert np.abs(scores[0]).argmax() == 4
    assert scores[0, 4] < -0.25


@pytest.mark.parametrize("method", [method for method in EVERY if method != "trees"])
def test_order_of_genes_and_conditions_does_not_matter(method):
    rng = np.random.default_rng(3)
    clean = linear_screen(truth(12), list(range(12)))
    effects = ScreenEffects(clean.genes, clean.conditions, clean.delta, np.full((12, 12), 0.02)).with_noise(rng)
    genes, rows = rng.permutation(12), rng.permutation(12)
    other = ScreenEffects(
        tuple(effects.genes[gene] for gene in genes),
        tuple(effects.conditions[row] for row in rows),
        effects.delta[np.ix_(rows, genes)],
        effects.error[np.ix_(rows, genes)],
    )
    before, after = (METHODS[method](screen, pairs(12), 0) for screen in (effects, other))
    # descent stops at a tolerance, and its path depends on the order; that of dag on how the machine rounds as well (.006 seen)
    tolerance = {"lasso": 5e-3, "zscore_direct": 5e-3, "interventional": 5e-3, "dag": 1e-2}.get(method, 1e-9)
    np.testing.assert_allclose(after, before[np.ix_(genes, genes)], atol=tolerance)


# ---------------------------------------------------------------------------------------------- prior, probability, seed


@pytest.mark.parametrize("method", EVERY)
def test_prior_weighs_and_restricts_alike(method):
    effects = linear_screen(truth(6), list(range(6)))
    prior = pd.DataFrame(
        {"regulator": ["G0", "G1", "G0", "X"], "target": ["G1", "G0", "G0", "G1"], "probability": [1.0, 0.5, 1, 1]}
    )
    options = {"bootstraps": 0, "seed": 4}
    plain = infer_network(effects, method, **options).matrix().toarray()
    weighed = infer_network(effects, method, prior=prior, prior_strength=0.8, **options).matrix().toarray()
    factor = np.full((6, 6), 0.2)
    factor[1, 0], factor[0, 1] = 1.0, 1 - 0.8 * 0.5
    np.testing.assert_allclose(weighed, plain * factor, atol=1e-12)
    restricted = infer_network(effects, method, prior=prior, prior_use="restrict", **options)
    assert set(map(tuple, restricted.edges[["regulator", "target"]].to_numpy())) <= {("G0", "G1"), ("G1", "G0")}
    network = GeneRegulatoryNetwork.from_edges(prior[:2], [*effects.genes])
    other = infer_network(effects, method, prior=network, prior_strength=0.8, **options)
    np.testing.assert_array_equal(other.matrix().toarray(), weighed)


@pytest.mark.parametrize("method", EVERY)
def test_regulators_and_number_of_edges(method):
    effects = linear_screen(truth(6), list(range(6)))
    network = infer_network(effects, method, regulators=["G1", "G4"], bootstraps=2)
    assert set(network.regulators) <= {"G1", "G4"}
    assert "G1" not in network.edges.query("regulator == 'G1'")["target"].tolist()
    first = infer_network(effects, method, regulators=["G1", "G4"], bootstraps=2, max_edges=2)
    expected = ranked_edges(network).head(2).sort_values(["regulator", "target"]).reset_index(drop=True)
    found = first.edges.sort_values(["regulator", "target"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected)


def test_probability_of_a_sign_is_normal():
    """Where every pair counts as an edge, that of a total effect is how often its sign is seen: Φ(|effect| / error)."""
    ratio = np.array([0.5, 1.0, 2.0])
    effects = ScreenEffects(("A", "B", "C", "D"), ("A",), [[-1, *(0.1 * ratio)]], np.full((1, 4), 0.1))
    network = infer_network(effects, "total_effect", bootstraps=4000, selected=1.0)
    assert network.edges["target"].tolist() == ["B", "C", "D"]
    np.testing.assert_allclose(network.probability, norm.cdf(ratio), atol=0.03)
    np.testing.assert_allclose(network.weight, -0.1 * ratio)


def test_probability_of_what_every_bootstrap_shows():
    """One regulator behind one target, all other genes still: every repetition has that edge first."""
    delta = np.zeros((12, 5))
    delta[:, 0] = np.linspace(-1, 1, 12)
    delta[:, 1] = -0.5 * delta[:, 0]
    effects = ScreenEffects(tuple(names(5)), ("elsewhere",) * 12, delta)
    network = infer_network(effects, "lasso", regulators=["G0"])
    assert network.edges[["regulator", "target", "sign", "probability"]].to_numpy().tolist() == [["G0", "G1", -1, 1.0]]


@pytest.mark.parametrize("method", EVERY)
def test_seed(method):
    clean = linear_screen(truth(8), list(range(8)))
    effects = ScreenEffects(clean.genes, clean.conditions, clean.delta, np.full((8, 8), 0.3))
    repetitions = 2 if method == "trees" else 6
    one, same, other = (infer_network(effects, method, bootstraps=repetitions, seed=seed).edges for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(one, same)
    assert not one["probability"].equals(other["probability"])


# ---------------------------------------------------------------------------------------------- report


def test_identifiability_by_hand():
    """A and B are perturbed, B within its noise; C is not. The prior holds A -> C, B -> C, C -> A, and A -> X outside."""
    error = np.full((2, 3), 0.5)
    effects = ScreenEffects(("A", "B", "C"), ("A", "B"), [[-2.0, 0, 1], [0, -0.5, 1]], error)
    network = GeneRegulatoryNetwork.from_edges(
        pd.DataFrame({"regulator": ["A", "B", "C", "C"], "target": ["C", "C", "A", "B"], "weight": 1.0}), ["A", "B", "C"]
    )
    prior = pd.DataFrame({"regulator": ["A", "B", "C", "A"], "target": ["C", "C", "A", "X"]})
    report = identifiability_report(effects, network, prior)
    assert report.signal_to_noise.to_dict() == {"A": 4.0, "B": 1.0}
    assert report.condition_number == pytest.approx(4.0)  # diag(2, 0.5)
    assert (report.edges, report.unperturbed_edges) == (4, 2)
    assert (report.prior_edges, report.prior_found, report.prior_only) == (3, 3, 2)
    assert "3 measured: 2 perturbed alone, 1 not" in str(report)
    assert "1 below 2; lowest: B 1.0, A 4.0" in str(report)
    assert identifiability_report(effects, network).prior_only is None


# ---------------------------------------------------------------------------------------------- mistakes

SMALL = ScreenEffects(("A", "B"), ("A", "B"), [[-1.0, 0.5], [0.5, -1]])
AWAY = ScreenEffects(("A", "B"), ("X", "Y"), [[-1.0, 0.5], [0.5, -1]])


@pytest.mark.parametrize(
    ("effects", "options", "message"),
    [
        (SMALL, {"method": "lass"}, "no method 'lass'; did you mean 'lasso'"),
        (SMALL, {"prior_use": "both"}, "prior_use is 'both'"),
        (SMALL, {"prior_strength": 2}, "prior_strength is 2"),
        (SMALL, {"selected": 0}, "selected is 0"),
        (SMALL, {"resample": "cells"}, "resample is 'cells'"),
        (SMALL, {"resample": "errors"}, "the effects have none; 'conditions' needs none"),
        (SMALL, {"bootstraps": -1}, "bootstraps is -1"),
        (SMALL, {"max_edges": 0}, "max_edges is 0"),
        (SMALL, {"regulators": ["C"]}, "none of the 1 regulators is a measured gene: C"),
        (SMALL, {"prior": pd.DataFrame({"regulator": ["C"], "target": ["D"]})}, "prior: network: none of its 2 genes"),
        (AWAY, {"method": "mra"}, "mra needs conditions that perturb one measured gene alone; the targets are X, Y"),
        (AWAY, {"method": "total_effect"}, "total_effect needs conditions"),
    ],
)
def test_mistakes(effects, options, message):
    with pytest.raises(PerturbZooError) as caught:
        infer_network(effects, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("A", "A"), ("A",), [[0, 1]]), "genes named twice: A"),
        ((("A", "B"), ("control",), [[0, 1]]), "a row is control"),
        ((("A", "B"), ("A",), [[0, 1, 2]]), "delta has the shape (1, 3), not conditions x genes (1, 2)"),
        ((("A", "B"), ("A",), [[0, np.nan]]), "must be finite"),
        ((("A", "B"), ("A",), [[0, 1]], [[0, -1]]), "must not be negative"),
        ((("A", "B"), (), np.zeros((0, 2))), "nothing to infer from"),
    ],
)
def test_effects_mistakes(arguments, message):
    with pytest.raises(PerturbZooError) as caught:
        ScreenEffects(*arguments)
    assert message in str(caught.value)
