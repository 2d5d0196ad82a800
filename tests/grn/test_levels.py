"""Levels and their errors: cells worked out by hand, moments of simulated counts, and what is no table of levels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import ScreenEffects
from perturbzoo.grn.levels import LEAST_DISPERSION, Levels
from perturbzoo.perturbation import parse_condition


def of_counts(counts: np.ndarray, members: list, controls: list, **options) -> Levels:
    """Levels of raw counts in cells that are all normalised by the same factor `unit`."""
    options = {"unit": 1.0, "default_kind": "knockout", "replicate_error": 0.0} | options
    values = sparse.csr_matrix(np.log1p(counts * (options["unit"] or 1.0)))
    genes = tuple("ABCDEFGH"[: counts.shape[1]])
    conditions = [parse_condition(gene) for gene in genes[: len(members)]]
    contexts = options.pop("contexts", np.zeros(len(members), dtype=int))
    return Levels.from_cells(values, genes, conditions, contexts, members, controls, **options)


def small(**changes) -> Levels:
    """Two conditions of three genes."""
    parts = {
        "genes": ("A", "B", "C"),
        "conditions": ("A", "B"),
        "context": np.zeros(2, dtype=int),
        "level": np.array([[0.5, 1, 2], [1, 0.2, 1]]),
        "control": np.ones((1, 3)),
        "error": np.full((2, 3), 0.1),
        "control_error": np.full((1, 3), 0.05),
    }
    return Levels(**(parts | changes))


def test_levels_of_cells_by_hand():
    """Means of counts, not of their logs, times the unit; in each context its own controls, of which half a count is the least."""
    counts = np.array([[2.0, 0], [4, 0], [1, 1], [3, 5], [8, 2], [0, 2]])
    members, controls = [np.array([0, 1]), np.array([4])], [np.array([2, 3]), np.array([5])]
    levels = of_counts(counts, members, controls, unit=2.0, contexts=np.array([0, 1]))
    np.testing.assert_allclose(levels.level, [[6, 0], [16, 4]], rtol=1e-6)
    np.testing.assert_allclose(levels.control, [[4, 6], [1, 4]], rtol=1e-6)
    assert [str(one) for one in levels.conditions] == ["A", "B"]


def test_errors_of_poisson_counts_are_one_over_the_root_of_all_counts():
    """With as many counts as the gene usually has, a dispersion near 0 and no error between replicates: 1 / sqrt(n m)."""
    rng = np.random.default_rng(0)
    counts = rng.poisson([4.0, 0.5], (6000, 2)).astype(float)
    levels = of_counts(counts, [np.arange(1000)], [np.arange(1000, 6000)])
    for row, cells, number in ((levels.error[0], 1000, 0), (levels.control_error[0], 5000, 0)):
        expected = 1 / np.sqrt(cells * np.array([4.0, 0.5]))
        np.testing.assert_allclose(row, expected, rtol=0.05, err_msg=str(number))
    both = of_counts(counts, [np.arange(1000)], [np.arange(1000, 6000)], replicate_error=0.1)
    np.testing.assert_allclose(both.error**2, levels.error**2 + 0.01, rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.1, 0.8])
def test_dispersion_is_that_of_the_counts(alpha):
    """Negative binomial, other means in other groups, other units: var = m + alpha m², of the counts."""
    rng = np.random.default_rng(1)
    mean = np.repeat([[8.0, 3.0], [2.0, 6.0]], 8000, axis=0)
    counts = rng.poisson(mean * rng.gamma(1 / alpha, alpha, mean.shape)).astype(float)
    levels = of_counts(counts, [np.arange(8000)], [np.arange(8000, 16_000)], unit=3.0)
    np.testing.assert_allclose(levels.dispersion, alpha, rtol=0.08)
    # the error of a mean of 80 cells, in logs: sqrt((1 / m + alpha) / 80)
    few = of_counts(counts, [np.arange(80)], [np.arange(8000, 16_000)], unit=3.0)
    np.testing.assert_allclose(few.error[0], np.sqrt((1 / mean[0] + alpha) / 80), rtol=0.12)


def test_poisson_counts_have_the_least_dispersion():
    counts = np.random.default_rng(2).poisson(np.full((4000, 3), 0.02)).astype(float)
    levels = of_counts(counts, [np.arange(2000)], [np.arange(2000, 4000)])
    assert (levels.dispersion < 2.0).all()
    assert (levels.dispersion >= LEAST_DISPERSION).all()


def test_genes_never_counted_change_by_nothing_and_lost_ones_by_something_finite():
    """0 of 0 is no change; 0 where the controls have 3 is a large one, not an infinite one."""
    counts = np.zeros((40, 2))
    counts[20:, 1] = 3.0
    levels = of_counts(counts, [np.arange(20)], [np.arange(20, 40)])
    assert levels.change[0, 0] == 0
    assert -math.log(2 * 60) < levels.change[0, 1] < -2, "no lower than half a count among all cells"
    assert np.isfinite(levels.change).all()
    more = of_counts(np.repeat(counts, 10, axis=0), [np.arange(200)], [np.arange(200, 400)])
    assert more.change[0, 1] < levels.change[0, 1], "ten times as many cells without a count say more"


def test_without_counts_the_spread_of_cells_is_the_noise():
    values = np.array([[1.0, 2], [3, 2], [2, 2], [2, 2]])
    levels = of_counts(values, [np.array([0, 1])], [np.array([2, 3])], unit=None)
    assert levels.unit is None
    assert levels.dispersion is None
    assert levels.error[0, 0] > levels.error[0, 1]


def test_effects_come_back():
    rng = np.random.default_rng(0)
    delta = rng.normal(0, 1, (5, 4))
    error = rng.uniform(0.05, 0.2, (5, 4))
    effects = ScreenEffects(tuple("ABCD"), ("A", "B", "C", "D:activation", "A+B"), delta, error, "interference")
    levels = Levels.from_effects(effects)
    np.testing.assert_allclose(levels.change, delta, atol=1e-4)
    np.testing.assert_allclose(levels.error, error)
    assert (levels.genes, levels.conditions, levels.default_kind) == (effects.genes, effects.conditions, "interference")
    bare = Levels.from_effects(ScreenEffects(tuple("ABCD"), effects.conditions, delta))
    assert len(np.unique(bare.error)) == 1, "nothing is known of the errors: all alike"


def test_noise_has_the_errors_as_its_standard_deviation_and_keeps_the_mean():
    levels = small()
    rng = np.random.default_rng(0)
    drawn = [levels.with_noise(rng) for _ in range(4000)]
    level = np.stack([one.level for one in drawn])
    np.testing.assert_allclose(level.mean(0), levels.level, rtol=0.01)
    np.testing.assert_allclose(np.log(level).std(0), levels.error, rtol=0.05)
    np.testing.assert_allclose(np.log(np.stack([one.control for one in drawn])).std(0), levels.control_error, rtol=0.05)
    same = [levels.with_noise(np.random.default_rng(3)).level for _ in range(2)]
    np.testing.assert_array_equal(*same)


def test_change_and_selection():
    levels = small(weight=np.array([1.0, 0.5]))
    np.testing.assert_allclose(levels.change, np.log(levels.level), atol=1e-5)
    turned = levels.select(np.array([1, 0, 1]))
    assert [str(one) for one in turned.conditions] == ["B", "A", "B"]
    np.testing.assert_array_equal(turned.change, levels.change[[1, 0, 1]])
    np.testing.assert_array_equal(turned.weight, [0.5, 1, 0.5])
    two = replace(
        levels, context=np.array([0, 1]), control=np.array([[1.0] * 3, [2.0] * 3]), control_error=np.full((2, 3), 0.1)
    )
    np.testing.assert_allclose(two.change[1], levels.change[1] - math.log(2), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": np.ones((2, 2))}, r"levels and errors must have the shape \(2, 3\)"),
        ({"control": np.ones((1, 2))}, "control levels must have the shape"),
        ({"context": np.zeros(3, dtype=int)}, "every row needs a context"),
        ({"conditions": ("A", "control")}, "a row is control"),
        ({"level": np.array([[1, 1, np.nan], [1, 1, 1.0]])}, "a level is not finite"),
        ({"level": np.array([[1, 1, -1.0], [1, 1, 1.0]])}, "a level is negative; are these log values"),
        ({"error": np.zeros((2, 3))}, "standard errors must be positive"),
        ({"context": np.array([0, 1])}, "contexts 0 to 1, but there are controls of 1"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


def test_groups_without_cells_are_named():
    counts = np.ones((4, 2))
    with pytest.raises(PerturbZooError, match="no cells for B"):
        of_counts(counts, [np.array([0]), np.array([], dtype=int)], [np.array([1])])
    with pytest.raises(PerturbZooError, match="no cells for the controls of a context"):
        of_counts(counts, [np.array([0])], [np.array([], dtype=int)])
