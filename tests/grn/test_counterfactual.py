"""Abduction against conditioning of normal variables and against quadrature; what no count says is the population's answer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import nbinom, poisson

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, Interventions, RegulatoryDynamics
from perturbzoo.grn.counterfactual import ExtrinsicNoise, abduct, abduct_gaussian, counterfactual, fit_extrinsic_noise
from perturbzoo.grn.responses import levels_at_rest
from perturbzoo.perturbation import parse_condition

GENES = 30


def random_noise(rank: int = 2, genes: int = GENES, size: float = 0.3, dispersion: float = 0.1) -> ExtrinsicNoise:
    loading = torch.from_numpy(np.random.default_rng(4).normal(0, size, (genes, rank)))
    return ExtrinsicNoise(loading, torch.full((genes,), dispersion))


def random_dynamics() -> RegulatoryDynamics:
    rng = np.random.default_rng(2)
    table = pd.DataFrame(rng.integers(0, GENES, (60, 2)), columns=["regulator", "target"])
    table = table[table.regulator != table.target].drop_duplicates().astype(str)
    network = GeneRegulatoryNetwork.from_edges(
        table.assign(weight=rng.normal(0, 1.2, len(table))), [str(number) for number in range(GENES)]
    )
    return RegulatoryDynamics(network, kinetics="hill", reference=rng.lognormal(0, 0.4, (2, GENES)), dtype=torch.float64)


def acts_of(dynamics: RegulatoryDynamics, *texts: str) -> Interventions:
    conditions = [parse_condition(text) for text in texts]
    return Interventions.from_conditions(conditions, dynamics.genes, default_kind="interference", dtype=torch.float64)


def draw(noise: ExtrinsicNoise, mean: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of one cell for each row of expected counts, and the true factor of each level."""
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(len(mean), noise.loading.shape[1])) @ noise.loading.numpy().T
    factor = np.exp(own - noise.variance.numpy() / 2)
    theta = noise.dispersion.numpy()
    gamma = np.ones_like(factor) if not theta.any() else rng.gamma(1 / theta, theta, factor.shape)
    return rng.poisson(mean * factor * gamma), factor


def test_gaussian_abduction_is_conditioning():
    """ξ | d of jointly normal ξ and d = ξ + e, by the formula in the space of genes."""
    noise, rng = random_noise(3), np.random.default_rng(0)
    deviation, variance = rng.normal(size=(4, GENES)), rng.uniform(0.1, 2, (4, GENES))
    found = abduct_gaussian(noise, torch.from_numpy(deviation), torch.from_numpy(1 / variance))
    loading = noise.loading.numpy()
    prior = loading @ loading.T
    for row in range(4):
        gain = prior @ np.linalg.inv(prior + np.diag(variance[row]))
        posterior = prior - gain @ prior
        np.testing.assert_allclose(loading @ found.mean[row].numpy(), gain @ deviation[row], atol=1e-9)
        np.testing.assert_allclose(loading @ found.covariance[row].numpy() @ loading.T, posterior, atol=1e-9)
        assert float(found.remaining[row]) == pytest.approx(np.trace(posterior) / np.trace(prior))


@pytest.mark.parametrize("dispersion", [0.0, 0.3])
def test_abduction_from_counts_is_the_mode_and_close_to_quadrature(dispersion):
    noise = random_noise(1, genes=6, dispersion=dispersion)
    expected = np.array([[0.5, 3.0, 40.0, 0.1, 8.0, 200.0], [0.01, 0.02, 0.03, 0.02, 0.05, 0.01]])
    counts = np.array([[2.0, 1.0, 90.0, 0.0, 3.0, 90.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    found = abduct(noise, torch.from_numpy(counts), torch.from_numpy(expected))
    loading, half = noise.loading.numpy()[:, 0], noise.variance.numpy() / 2
    grid = np.linspace(-6, 6, 4001)
    for row in range(2):

        def value(z: float, row: int = row) -> float:
            mean = expected[row] * np.exp(loading * z - half)
            p = 1 / (1 + dispersion * mean)
            each = nbinom.logpmf(counts[row], 1 / dispersion, p) if dispersion else poisson.logpmf(counts[row], mean)
            return float(each.sum() - z**2 / 2)

        best = minimize_scalar(lambda z: -value(z), bounds=(-6, 6), method="bounded", options={"xatol": 1e-9}).x
        assert float(found.mean[row]) == pytest.approx(best, abs=1e-5)
        weight = np.exp([value(z) for z in grid] - np.array(value(best)))
        mean = (weight * grid).sum() / weight.sum()
        variance = (weight * grid**2).sum() / weight.sum() - mean**2
        assert float(found.mean[row]) == pytest.approx(mean, abs=0.35 * variance**0.5)
        assert float(found.covariance[row]) == pytest.approx(variance, rel=0.35)
    assert found.prior_only.tolist() == [False, True]


def test_a_cell_without_information_is_the_population_and_says_so():
    dynamics, noise = random_dynamics(), random_noise()
    observed, wanted = acts_of(dynamics, "0"), acts_of(dynamics, "1:activation+2")
    mean = levels_at_rest(dynamics, wanted, torch.tensor([1]))
    found = counterfactual(dynamics, noise, np.zeros((3, GENES)), np.full(3, 1e-9), observed, wanted, context=1)
    np.testing.assert_allclose(found.level, mean.expand(3, -1), rtol=1e-6)
    np.testing.assert_allclose(found.deviation, noise.variance.sqrt().expand(3, -1), rtol=1e-6)
    np.testing.assert_allclose(found.remaining, 1, rtol=1e-6)
    assert found.prior_only.all()
    # cells that do not differ have nothing of their own to tell
    none = ExtrinsicNoise(torch.zeros(GENES, 0), torch.zeros(GENES))
    found = counterfactual(dynamics, none, np.ones((2, GENES)), np.ones(2), observed, wanted, context=1)
    np.testing.assert_allclose(found.level, mean.expand(2, -1), rtol=1e-9)
    assert found.prior_only.all()


def test_the_same_acts_give_the_same_cell():
    dynamics, noise = random_dynamics(), random_noise()
    acts = acts_of(dynamics, "0", "3:knockout+4")
    counts = np.random.default_rng(0).poisson(5.0, (8, GENES))
    row = np.arange(8) % 2
    found = counterfactual(dynamics, noise, counts, np.full(8, 5.0), acts, acts, row=row, context=torch.tensor([0, 1]))
    assert torch.equal(found.level, found.factual)
    assert not found.prior_only.any()


def test_the_cell_keeps_what_is_its_own():
    """Deeply sequenced cells: level under other acts is the new steady state times the cell's true factor."""
    dynamics, noise = random_dynamics(), random_noise(dispersion=0.0)
    observed, wanted = acts_of(dynamics, "0", "control"), acts_of(dynamics, "control", "5:overexpression")
    row, size = np.arange(200) % 2, np.full(200, 400.0)
    there, instead = (levels_at_rest(dynamics, acts, torch.tensor([0, 0])).numpy()[row] for acts in (observed, wanted))
    counts, factor = draw(noise, size[:, None] * there, seed=1)
    found = counterfactual(dynamics, noise, counts, size, observed, wanted, row=row)
    error = np.log(found.level.numpy() / (instead * factor))
    assert np.sqrt((error**2).mean()) < 0.02
    assert np.log(factor).std() > 0.3
    # errors are as large as they are said to be
    assert (error / found.deviation.numpy()).std() == pytest.approx(1, abs=0.15)
    # and with few counts, on average over cells, it is the steady state
    counts, _ = draw(noise, there[[0]].repeat(3000, 0) * 0.5, seed=2)
    mean = counterfactual(dynamics, noise, counts, np.full(3000, 0.5), observed.select(torch.tensor([0])),
                          wanted.select(torch.tensor([0]))).level.numpy().mean(0)  # fmt: skip
    np.testing.assert_allclose(mean / instead[0], 1, atol=0.06)


def test_counts_of_perturbed_genes_are_left_out():
    dynamics, noise = random_dynamics(), random_noise()
    observed, wanted = acts_of(dynamics, "3~0.8+5~0.5"), acts_of(dynamics, "control")
    counts = np.random.default_rng(0).poisson(5.0, (4, GENES))
    other = counts.copy()
    other[:, [3, 5]] += 50
    first, second = (counterfactual(dynamics, noise, each, np.full(4, 5.0), observed, wanted) for each in (counts, other))
    assert torch.equal(first.level, second.level)
    kept = counterfactual(dynamics, noise, other, np.full(4, 5.0), observed, wanted, mask_targets=False)
    assert not torch.allclose(kept.level, second.level)


def test_what_cells_share_is_found():
    true = random_noise(2, genes=80)
    rng = np.random.default_rng(0)
    size = rng.lognormal(0, 0.4, 4000)
    counts, _ = draw(true, size[:, None] * rng.lognormal(1, 0.7, 80), seed=3)
    found = fit_extrinsic_noise(counts, size)
    assert found.loading.shape == (80, 2)
    wanted = (true.loading @ true.loading.T).numpy()
    got = (found.loading @ found.loading.T).numpy()
    assert np.abs(got - wanted).max() < 0.1
    assert np.sqrt(((got - wanted) ** 2).mean()) < 0.15 * np.sqrt((wanted**2).mean())
    assert float(found.dispersion.median()) == pytest.approx(0.1, abs=0.02)


def test_nothing_shared_is_found_in_independent_genes():
    rng = np.random.default_rng(0)
    size = rng.lognormal(0, 0.4, 2000)
    mean = size[:, None] * np.append(rng.lognormal(0, 0.7, 50), 0.0)  # the last gene is never seen
    found = fit_extrinsic_noise(rng.poisson(mean), size)
    assert found.loading.shape == (51, 0)
    assert float(found.dispersion.mean()) < 0.05
    assert float(found.dispersion[-1]) == 0
    assert fit_extrinsic_noise(rng.poisson(mean), size, rank=0).loading.shape == (51, 0)


def test_mistakes():
    dynamics, noise = random_dynamics(), random_noise()
    acts, counts, size = acts_of(dynamics, "0", "1"), np.ones((3, GENES)), np.ones(3)
    row = np.array([0, 1, 1])
    for message, call in (
        (r"counts of the shape \(3, 29\)", lambda: counterfactual(dynamics, noise, counts[:, 1:], size, acts, acts, row=row)),
        ("give raw counts", lambda: counterfactual(dynamics, noise, -counts, size, acts, acts, row=row)),
        ("sizes must be finite and positive", lambda: counterfactual(dynamics, noise, counts, size * 0, acts, acts, row=row)),
        ("row points outside 2 rows", lambda: counterfactual(dynamics, noise, counts, size, acts, acts, row=row + 1)),
        ("2 rows of acts observed, but 1 wanted",
         lambda: counterfactual(dynamics, noise, counts, size, acts, acts.select(torch.tensor([0])), row=row)),
        ("extrinsic noise of 5 genes", lambda: counterfactual(dynamics, random_noise(genes=5), counts, size, acts, acts, row=row)),
        ("3 control cells are too few", lambda: fit_extrinsic_noise(counts, size)),
        (r"size has the shape \(1,\)", lambda: fit_extrinsic_noise(np.ones((20, 4)), np.ones(1))),
        ("give \\(genes, rank\\)", lambda: ExtrinsicNoise(torch.zeros(3), torch.zeros(3))),
    ):  # fmt: skip
        with pytest.raises(PerturbZooError, match=message):
            call()
