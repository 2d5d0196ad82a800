"""Structural equations under interventions: exact recovery, determinants and gradients against brute force, acyclicity."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.optimize import check_grad

from perturbzoo.grn import ScreenEffects
from perturbzoo.grn.graphical_models import _cyclicity, _Problem, dag, interventional, is_acyclic, without_cycles


def names(count: int) -> tuple[str, ...]:
    return tuple(f"G{number}" for number in range(count))


def pairs(count: int) -> np.ndarray:
    return ~np.eye(count, dtype=bool)


def sparse_weights(count: int, seed: int, *, cyclic: bool, high: float = 0.45) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weights = np.zeros((count, count))
    for target in range(1 - cyclic, count):
        candidates = np.delete(np.arange(count), target) if cyclic else np.arange(target)
        chosen = rng.choice(candidates, min(2, len(candidates)), replace=False)
        weights[target, chosen] = rng.choice([-1, 1], len(chosen)) * rng.uniform(0.3, high, len(chosen))
    return weights


def screen(weights: np.ndarray, noise: float = 0.0, seed: int = 0) -> ScreenEffects:
    """Each gene in turn set down by another amount: its own equation is replaced, all others hold."""
    count, rng = len(weights), np.random.default_rng(seed)
    delta = np.zeros((count, count))
    for gene in range(count):
        held = weights.copy()
        held[gene] = 0
        delta[gene] = np.linalg.solve(np.eye(count) - held, -np.linspace(0.6, 1.4, count)[gene] * np.eye(count)[gene])
    error = np.full(delta.shape, noise)
    return ScreenEffects(names(count), names(count), delta + noise * rng.normal(size=delta.shape), error)


@pytest.mark.parametrize("seed", range(3))
def test_cyclic_system_without_noise_is_recovered(seed):
    weights = sparse_weights(10, seed, cyclic=True)
    assert not is_acyclic(weights)
    np.testing.assert_allclose(interventional(screen(weights), pairs(10)), weights, atol=2e-3)


def test_only_allowed_edges():
    weights, allowed = sparse_weights(8, 0, cyclic=True), pairs(8)
    allowed[:, 2] = False
    for method in (interventional, dag):
        found = method(screen(weights), allowed)
        assert not found[~allowed].any()
        assert found[allowed].any()


@pytest.mark.parametrize("seed", range(2))
def test_dag_recovers_an_acyclic_system(seed):
    weights = sparse_weights(8, seed, cyclic=False)
    found = dag(screen(weights), pairs(8))
    assert is_acyclic(found)
    np.testing.assert_allclose(found, weights, atol=0.02)


@pytest.mark.parametrize("seed", range(2))
def test_dag_of_a_cyclic_system_has_no_cycles(seed):
    weights = sparse_weights(10, seed, cyclic=True)
    found = dag(screen(weights, noise=0.02, seed=seed), pairs(10))
    assert is_acyclic(found)
    # which direction of a loop is lost is open, but what remains is far from random: chance is 20 / 90
    strongest = np.argsort(-np.abs(found), axis=None)[:10]
    assert (weights.ravel()[strongest] != 0).mean() > 0.6


def test_units_of_genes_do_not_matter():
    effects, units = screen(sparse_weights(8, 1, cyclic=True), noise=0.03), np.geomspace(0.1, 10, 8)
    other = ScreenEffects(effects.genes, effects.conditions, effects.delta * units, effects.error * units)
    before, after = (interventional(one, pairs(8)) for one in (effects, other))
    np.testing.assert_allclose(after * units[None, :] / units[:, None], before, atol=1e-3)


def test_determinants_and_their_gradient():
    """Jacobi's equation against the determinant of the matrix without the perturbed genes, for singles, doubles and none."""
    rng = np.random.default_rng(0)
    problem = _Problem.of(screen(sparse_weights(5, 0, cyclic=True)), pairs(5))
    problem.sets = Counter({(): 2, (1,): 3, (0, 4): 1})
    weights = rng.normal(0, 0.2, (5, 5))
    matrix = np.eye(5) - weights
    expected = 2 * np.log(np.linalg.det(matrix))
    for perturbed, times in (([1], 3), ([0, 4], 1)):
        rest = np.delete(np.delete(matrix, perturbed, 0), perturbed, 1)
        expected += times * np.log(np.linalg.det(rest))
    assert problem.determinant(weights)[0] == pytest.approx(-expected)
    for term in (problem.determinant, problem.instability, _cyclicity):
        start = weights if term != problem.instability else weights + np.eye(5)  # unstable
        assert term(start)[0] != 0
        error = check_grad(
            lambda b, f=term: f(b.reshape(5, 5))[0], lambda b, f=term: f(b.reshape(5, 5))[1].ravel(), start.ravel()
        )
        assert error < 1e-5 * max(1, np.abs(term(start)[1]).max())


def test_cyclicity_of_a_loop_of_two():
    """B∘B = [[0, a], [b, 0]] has the eigenvalues ±√(ab): tr exp - 2 = 2 cosh √(ab) - 2."""
    weights = np.array([[0, 0.5], [0.8, 0]])
    assert _cyclicity(weights)[0] == pytest.approx(2 * np.cosh(0.5 * 0.8) - 2)
    assert _cyclicity(np.triu(np.ones((4, 4)), 1))[0] == pytest.approx(0)


def test_weakest_edge_of_a_cycle_goes():
    weights = np.zeros((3, 3))
    weights[1, 0], weights[2, 1], weights[0, 2] = 0.9, -0.8, 0.1
    expected = weights.copy()
    expected[0, 2] = 0
    np.testing.assert_array_equal(without_cycles(weights), expected)
    assert is_acyclic(expected)
    assert not is_acyclic(weights)
    assert not is_acyclic(np.eye(2))
