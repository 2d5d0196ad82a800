"""Interaction scores of predicted combinations against observed ones, on the same singles."""

from __future__ import annotations

import numpy as np
import pytest

from perturbzoo.evaluation import interaction_recovery
from perturbzoo.evaluation.interaction import interaction_scores
from perturbzoo.evaluation.interaction_recovery import Singles
from perturbzoo.perturbation import parse_condition

CONTEXT = np.zeros(2, dtype=np.int64)


@pytest.fixture(scope="module")
def control() -> np.ndarray:
    return np.random.default_rng(0).gamma(1, 1, (1, 300))


@pytest.fixture(scope="module")
def singles(control: np.ndarray) -> dict[int, Singles]:
    changes = np.random.default_rng(1).normal(0, 0.5, (2, 300))
    return {1: Singles(*(control[0] + changes))}


def _combination(control: np.ndarray, singles: dict[int, Singles], first: float, second: float) -> np.ndarray:
    pair = singles[1]
    row = control[0] + first * (pair.first - control[0]) + second * (pair.second - control[0])
    return np.array([np.full(300, np.nan), row])


def test_a_combination_is_a_weighted_sum(control: np.ndarray, singles: dict[int, Singles]) -> None:
    found = interaction_recovery.scores_of(_combination(control, singles, 2.0, 0.5), control, CONTEXT, singles)
    assert found["mag"][1] == pytest.approx(np.hypot(2.0, 0.5), abs=0.01)
    assert found["corr_fit"][1] == pytest.approx(1.0)
    assert found["dominance"][1] == pytest.approx(np.log10(4), abs=0.01)
    assert all(np.isnan(values[0]) for values in found.values())  # no combination with known singles


def test_the_scores_are_those_of_all_genes_where_there_are_few(control: np.ndarray, singles: dict[int, Singles]) -> None:
    combination = _combination(control, singles, 0.7, 1.1)
    combination[1] += np.random.default_rng(2).normal(0, 0.2, 300)
    found = interaction_recovery.scores_of(combination, control, CONTEXT, singles)
    expected = interaction_scores(*(row - control[0] for row in (*singles[1], combination[1])))
    for name in ("eq_contr", "dcor"):
        assert found[name][1] == pytest.approx(expected[name])
    for name in ("mag", "corr_fit", "dominance"):  # of a fifth of the pairs of genes
        assert found[name][1] == pytest.approx(expected[name], abs=0.05)


def test_errors(control: np.ndarray, singles: dict[int, Singles]) -> None:
    observed = interaction_recovery.scores_of(_combination(control, singles, 1.0, 1.0), control, CONTEXT, singles)
    perfect = interaction_recovery.errors(observed, observed)
    assert all(values[1] == 0 for values in perfect.values())
    half = interaction_recovery.scores_of(_combination(control, singles, 0.5, 0.5), control, CONTEXT, singles)
    errors = interaction_recovery.errors(half, observed)
    assert errors["gi_mag_error"][1] == pytest.approx(np.sqrt(2) / 2, abs=0.01)
    assert errors["gi_dominance_error"][1] == pytest.approx(0, abs=0.01)
    assert errors["gi_corr_fit_error"][1] == pytest.approx(0, abs=1e-6)
    # no change: no magnitude, and no fit
    nothing = interaction_recovery.scores_of(_combination(control, singles, 0, 0), control, CONTEXT, singles)
    errors = interaction_recovery.errors(nothing, observed)
    assert errors["gi_mag_error"][1] == pytest.approx(np.sqrt(2), abs=0.01)
    assert errors["gi_corr_fit_error"][1] == pytest.approx(1)
    assert np.isnan(errors["gi_dominance_error"][1])


def test_only_the_most_expressed_genes_count() -> None:
    control = np.arange(900.0)[None]
    assert interaction_recovery.expressed_genes(control[0]).tolist() == list(range(400, 900))
    generator = np.random.default_rng(3)
    pair = Singles(*(control[0] + generator.normal(size=(2, 900))))
    combination = control + generator.normal(size=(1, 900))
    once = interaction_recovery.scores_of(combination, control, np.zeros(1, dtype=int), {0: pair})
    combination[0, :400] = 99.0
    other = interaction_recovery.scores_of(combination, control, np.zeros(1, dtype=int), {0: pair})
    assert {name: values[0] for name, values in once.items()} == {name: values[0] for name, values in other.items()}


def test_singles_are_found_in_the_same_context() -> None:
    conditions = [parse_condition(name) for name in ("B+A", "A", "A+B+C", "A+C")]
    measured = [parse_condition(name) for name in ("A", "B", "A", "C")]
    mean = np.arange(4.0)[:, None]
    found = interaction_recovery.find_singles(conditions, np.array([1, 1, 1, 1]), measured, np.array([1, 1, 0, 0]), mean)
    assert set(found) == {0}  # C was measured in another context
    assert sorted(float(values[0]) for values in found[0]) == [0.0, 1.0]
