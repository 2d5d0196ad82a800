"""Cells on their way: grids of time, means and variances of linear systems against their closed forms, what is left of threads."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from perturbzoo.grn import GeneRegulatoryNetwork, Interventions, RegulatoryDynamics
from perturbzoo.perturbation import parse_condition
from perturbzoo.simulate import simulate_screen, truth_frame
from perturbzoo.simulate.langevin import follow_cells, in_threads, time_grid, true_levels

ALONE = GeneRegulatoryNetwork(("A",), *(np.zeros(0) for _ in range(5)))  # nothing regulates anything
CELLS = 40_000


def follow(condition: str, times: list[float], step: float, noise: float, cells: int = CELLS, **options) -> np.ndarray:
    """Levels of `cells` cells of one gene at the last of `times`, or for each of them with no noise."""
    dynamics = RegulatoryDynamics(ALONE, kinetics="hill", **options).requires_grad_(False)
    acts = Interventions.from_conditions([parse_condition(condition)] * cells, ["A"])
    harvest = torch.arange(cells) % len(times)
    grid = time_grid(times, step)
    return follow_cells(
        dynamics, acts, torch.zeros(cells, dtype=torch.int64), grid, harvest, noise, torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize(("start", "times", "step"), [(0.0, [1.0, 1.25, 4.0], 0.1), (-3.0, [0.5], 0.3), (0.0, [0.05], 0.1)])
def test_grid_ends_a_step_at_each_harvest(start, times, step):
    grid = time_grid(times, step, start)
    begins, lengths, harvests = map(np.array, zip(*grid, strict=True))
    np.testing.assert_allclose(begins, start + np.r_[0, np.cumsum(lengths)[:-1]], atol=1e-12)
    assert lengths.max() <= step + 1e-12
    np.testing.assert_allclose((begins + lengths)[harvests >= 0], times)
    assert harvests[harvests >= 0].tolist() == list(range(len(times)))


@pytest.mark.parametrize("step", [0.02, 0.5, 1.0])
def test_means_of_a_linear_gene_are_exact_for_any_step(step):
    """Production doubled long ago, level 1 at the start: x(t) = 2 - exp(-γ t)."""
    times = [1.0, 2.0, 5.0]
    found = follow("A:activation[-50,]", times, step, 0.0, cells=3, activation_fold=2.0, decay=0.7)[:, 0]
    np.testing.assert_allclose(found, 2 - np.exp(-0.7 * np.array(times)), rtol=1e-5)


@pytest.mark.parametrize("step", [0.05, 0.5])
def test_variance_approaches_that_of_poisson_in_molecules(step):
    """From a sharp start at rest: noise^2 m (1 - exp(-2 γ t)), exactly for any step."""
    for time in (0.5, 8.0):
        levels = follow("control", [time], step, 0.1, decay=1.3)[:, 0]
        assert levels.mean() == pytest.approx(1.0, abs=0.003)
        assert levels.var() == pytest.approx(0.01 * (1 - math.exp(-2.6 * time)), rel=0.04)


def test_spliced_and_unspliced_scatter_as_molecules_do():
    """First-order conversions keep Poisson laws: variances noise^2 u and noise^2 s, and no covariance at rest."""
    levels = follow("control", [6.0], 0.02, 0.1, cells=20_000, splicing=True, splicing_rate=4.0)
    np.testing.assert_allclose(levels.mean(0), [0.25, 1.0], rtol=0.01)
    np.testing.assert_allclose(levels.var(0), [0.0025, 0.01], rtol=0.06)
    assert abs(np.corrcoef(levels.T)[0, 1]) < 0.06


def test_clamped_genes_scatter_around_their_level():
    """A clamp speeds the turnover up, production and decay alike: the variance stays noise^2 times the level."""
    levels = follow("A:clamp@3[-50,]", [3.0], 0.1, 0.1)[:, 0]
    assert levels.mean() == pytest.approx(3.0, rel=0.01)
    assert levels.var() == pytest.approx(0.03, rel=0.06)


def test_levels_never_fall_below_zero():
    levels = follow("A:interference[-50,]~0.99", [5.0], 0.1, 1.0)
    assert levels.min() >= 0
    assert np.isfinite(levels).all()


def test_steady_state_after_the_last_act():
    """An act that ends leaves its trace in the level at the harvest, none in the steady state; others stay."""
    network = GeneRegulatoryNetwork.from_edges(pd.DataFrame({"regulator": ["A"], "target": ["B"], "weight": [2.0]}))
    dynamics = RegulatoryDynamics(network, kinetics="hill").requires_grad_(False)
    conditions = [parse_condition(text) for text in ("control", "A:interference[0,4]~0.8", "A:interference~0.8")]
    acts = Interventions.from_conditions(conditions, network.genes)
    levels, steady = true_levels(dynamics, acts, 1, [1.0, 3.0], 0.0, 0.05)
    assert levels.shape == (2, 1, 3, 2)
    assert steady.shape == (1, 3, 2)
    np.testing.assert_allclose(levels[:, 0, 1], levels[:, 0, 2], rtol=1e-3)
    assert (levels[1, 0, 1] < levels[0, 0, 1]).all()
    np.testing.assert_allclose(steady[0, :2], 1.0, rtol=1e-4)
    # B: twice f, f = σ(W (h - 1/2)), h = .04 / 1.04 at a level of .2
    np.testing.assert_allclose(steady[0, 2], [0.2, 2 / (1 + math.exp(1 - 2 * 0.04 / 1.04))], rtol=1e-4)


def test_genes_without_any_edge_answer_for_themselves():
    network = GeneRegulatoryNetwork(tuple("ABCDEFGHIJKLMNOPQRST"), *(np.zeros(0) for _ in range(5)))
    adata = simulate_screen(network, cells_per_condition=1)
    expected = np.zeros((21, 20))
    expected[1:][np.eye(20, dtype=bool)] = np.log(0.2)
    np.testing.assert_allclose(truth_frame(adata, "latent"), expected, atol=1e-2)
    assert adata.uns["go"]["term"].str.startswith("unrelated").all()


def test_threads_keep_the_order_and_pass_errors_on():
    before = torch.get_num_threads()
    assert in_threads(lambda number: number**2, 20) == [number**2 for number in range(20)]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda number: 1 // (number - 3), 5)
    assert torch.get_num_threads() == before


def test_torch_says_nothing_of_sparse_tensors_and_other_warnings_are_left_alone():
    code = (
        "import warnings, numpy, torch\n"
        "from perturbzoo.simulate import simulate_screen\n"
        "assert not any(entry[1] and 'CSR' in entry[1].pattern for entry in warnings.filters)\n"
        "simulate_screen(n_genes=5, cells_per_condition=2)\n"
        "warnings.warn('something else')\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "CSR" not in said
    assert "something else" in said
