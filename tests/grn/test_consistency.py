"""Residuals and projections: what the network itself predicts obeys it, and the limits of the projection are known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, Interventions, RegulatoryDynamics
from perturbzoo.grn.consistency import consistency, delta_from_levels, level_noise, levels_from_delta, project, residuals
from perturbzoo.grn.responses import levels_at_rest
from perturbzoo.perturbation import parse_condition

FLOOR = 1e-3


def random_dynamics(genes: int = 12, kinetics: str = "hill", **options) -> RegulatoryDynamics:
    rng = np.random.default_rng(2)
    table = pd.DataFrame(rng.integers(0, genes, (3 * genes, 2)), columns=["regulator", "target"])
    table = table[table.regulator != table.target].drop_duplicates().astype(str)
    table = table.assign(weight=rng.normal(0, 1.2 if kinetics == "hill" else 0.5, len(table)))
    network = GeneRegulatoryNetwork.from_edges(table, list(map(str, range(genes))))
    reference = rng.lognormal(0, 0.5, (2, genes))
    return RegulatoryDynamics(network, kinetics=kinetics, reference=reference, dtype=torch.float64, **options)


def acts_of(dynamics: RegulatoryDynamics, *texts: str) -> Interventions:
    conditions = [parse_condition(text) for text in texts]
    return Interventions.from_conditions(conditions, dynamics.genes, default_kind="interference", dtype=torch.float64)


TEXTS = ("0", "1:knockout~0.9", "2:activation+3", "4:overexpression", "5:clamp@0.3", "control")
CONTEXT = torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize("kinetics", ["additive", "hill", "multiplicative"])
def test_what_the_network_predicts_has_no_residual(kinetics):
    dynamics = random_dynamics(kinetics=kinetics)
    acts = acts_of(dynamics, *TEXTS)
    level = levels_at_rest(dynamics, acts, CONTEXT)
    residual, error = residuals(dynamics, level, acts, CONTEXT)
    np.testing.assert_allclose(residual, 0, atol=1e-6)
    assert (error >= 1).all()
    table = consistency(dynamics, level, acts, CONTEXT)
    assert table.condition.tolist() == list(acts.labels)
    assert table.ratio.max() < 1e-6
    # and stays where it is under any projection
    np.testing.assert_allclose(project(dynamics, level, acts, CONTEXT, tau=3.0), level, rtol=1e-5, atol=1e-6)


def test_residual_and_its_error_by_hand():
    """A -> B, Hill: B should be 2 σ(w (h(A) - 1/2)); the error passes A's noise over the slope of log F_B."""
    edges = pd.DataFrame({"regulator": ["A"], "target": ["B"], "weight": [1.3]})
    dynamics = RegulatoryDynamics(GeneRegulatoryNetwork.from_edges(edges, ["A", "B"]), kinetics="hill", dtype=torch.float64)
    acts = acts_of(dynamics, "A~0.5")
    level, noise = np.array([[0.5, 1.0]]), np.array([0.1, 0.2])

    def made(log_a: float) -> float:
        a = math.exp(log_a) - FLOOR
        return math.log(2 / (1 + math.exp(-1.3 * (a**2 / (a**2 + 1) - 0.5))) + FLOOR)

    at = math.log(0.5 + FLOOR)
    slope = (made(at + 1e-5) - made(at - 1e-5)) / 2e-5
    residual, error = residuals(dynamics, level, acts, noise=noise)
    np.testing.assert_allclose(residual, [[0, math.log(1 + FLOOR) - made(at)]], atol=1e-9)
    np.testing.assert_allclose(error, [[0.1, math.hypot(0.2, slope * 0.1)]], rtol=1e-6)
    row = consistency(dynamics, level, acts, noise=noise).iloc[0]
    assert row.gene == "B"
    assert row.gene_ratio == pytest.approx(residual[0, 1] / error[0, 1])
    assert row.residual == pytest.approx(residual[0, 1] / math.sqrt(2))


def test_nothing_happens_is_inconsistent_in_the_perturbed_gene_only():
    dynamics = random_dynamics()
    acts = acts_of(dynamics, "3~0.8")
    same = dynamics.control_level[:1]
    residual, _ = residuals(dynamics, same, acts)
    expected = np.zeros(12)
    floor = FLOOR * float(dynamics.reference[3])
    expected[3] = math.log((float(same[0, 3]) + floor) / (0.2 * float(same[0, 3]) + floor))
    np.testing.assert_allclose(residual[0], expected, atol=1e-7)
    assert consistency(dynamics, same, acts, noise=0.1).gene[0] == "3"
    assert consistency(dynamics, same, acts, noise=0.1, own=False).ratio[0] < 1e-5


def test_noise_alone_has_a_ratio_of_one():
    dynamics = random_dynamics(genes=60)
    acts = acts_of(dynamics, *(str(gene) for gene in range(60)))
    acts = acts.restrict(torch.full((60,), 0.7, dtype=torch.float64))
    level = levels_at_rest(dynamics, acts, torch.zeros(60, dtype=torch.int64))
    noise = 0.02
    noisy = level * torch.exp(noise * torch.randn(level.shape, generator=torch.Generator().manual_seed(0)).double())
    ratio = consistency(dynamics, noisy, acts, noise=noise).ratio
    assert (ratio**2).mean() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("kinetics", ["hill", "multiplicative"])
def test_limits_of_the_projection(kinetics):
    dynamics = random_dynamics(kinetics=kinetics)
    acts = acts_of(dynamics, *TEXTS)
    predicted = torch.from_numpy(np.random.default_rng(0).lognormal(0, 0.4, (6, 12)))
    assert torch.equal(project(dynamics, predicted, acts, CONTEXT, tau=0), predicted)
    fixed = levels_at_rest(dynamics, acts, CONTEXT)
    for tau, closeness in ((math.inf, 1e-7), (1e8, 1e-4)):
        np.testing.assert_allclose(project(dynamics, predicted, acts, CONTEXT, tau=tau), fixed, rtol=closeness, atol=closeness)
    # the more the network weighs, the better it is obeyed, and the further the way
    distances, sizes = [], []
    for tau in (0.0, 0.1, 1.0, 10.0, 100.0):
        found = project(dynamics, predicted, acts, CONTEXT, tau=tau)
        sizes.append(float(np.linalg.norm(residuals(dynamics, found, acts, CONTEXT)[0])))
        eps = FLOOR * dynamics.reference
        distances.append(float(torch.log((found + eps) / (predicted + eps)).norm()))
    assert sizes == sorted(sizes, reverse=True)
    assert distances == sorted(distances)


def test_projection_is_the_minimum():
    """Against a general optimiser on the objective, written out with the residuals."""
    dynamics = random_dynamics(genes=6)
    acts, rng = acts_of(dynamics, "0~0.6+1:knockout"), np.random.default_rng(1)
    predicted, noise, tau = rng.lognormal(0, 0.3, (1, 6)), rng.uniform(0.2, 2.0, 6), 0.8
    epsilon = FLOOR * dynamics.reference.numpy()

    def objective(log: np.ndarray) -> float:
        level = np.maximum(np.exp(log) - epsilon, 0)
        rho = residuals(dynamics, level[None], acts)[0]
        return float((((log - np.log(predicted[0] + epsilon)) / noise) ** 2).sum() + tau * (rho**2).sum())

    found = project(dynamics, predicted, acts, tau=tau, noise=noise).numpy()
    best = minimize(objective, np.log(predicted[0] + epsilon), method="BFGS", options={"gtol": 1e-8})
    assert objective(np.log(found[0] + epsilon)) == pytest.approx(best.fun, rel=1e-7)
    np.testing.assert_allclose(np.log(found[0] + epsilon), best.x, atol=1e-4)


def test_layers_and_chunks_change_nothing(monkeypatch):
    dynamics = random_dynamics()
    layered = random_dynamics(splicing=True, protein=True)
    acts = acts_of(dynamics, *TEXTS)
    predicted = torch.from_numpy(np.random.default_rng(0).lognormal(0, 0.4, (6, 12)))
    for tau in (2.0, math.inf):
        whole = project(dynamics, predicted, acts, CONTEXT, tau=tau)
        np.testing.assert_allclose(project(layered, predicted, acts, CONTEXT, tau=tau), whole, rtol=1e-6, atol=1e-8)
    whole = project(dynamics, predicted, acts, CONTEXT, tau=2.0)
    monkeypatch.setattr("perturbzoo.grn.consistency.CHUNK_VALUES", 70)  # two rows at a time
    np.testing.assert_allclose(project(dynamics, predicted, acts, CONTEXT, tau=2.0), whole, rtol=1e-5)


def test_levels_of_deltas():
    control, reference = np.array([0.0, 0.2, 2.0]), np.array([0.3, 1.0, 5.0])
    np.testing.assert_allclose(levels_from_delta(np.zeros((2, 3)), control, reference), np.tile(reference, (2, 1)))
    np.testing.assert_allclose(levels_from_delta([0.0, -0.2, math.log(3)], control, reference), [
        0.3, 0.0, 5 * (3 * math.exp(2) - 1) / (math.exp(2) - 1)
    ])  # fmt: skip
    delta = np.array([0.0, 0.1, -1.3])
    level = levels_from_delta(delta, control, reference)
    np.testing.assert_allclose(delta_from_levels(level, control, reference), delta, atol=1e-12)
    # both limits: cells that are all alike, and counts that are 0 or 1 (log1p of a count is then a constant times its chance)
    alike = levels_from_delta(np.log1p(0.5 * 5) - np.log1p(5), np.log1p(5.0), 5.0)
    assert alike == pytest.approx(2.5)
    rare = levels_from_delta(-0.5 * 1e-4 * math.log(2), 1e-4 * math.log(2), 7.0)
    assert rare == pytest.approx(3.5, rel=1e-4)


def test_noise_of_levels_is_the_slope():
    control, reference = np.array([0.2, 2.0, 0.0]), np.array([1.0, 5.0, 1.0])
    step = 1e-6
    slope = np.log(levels_from_delta(np.full(3, step), control, reference) / reference) / step
    np.testing.assert_allclose(level_noise(np.full((2, 3), 0.03), control)[:, :2], np.tile(0.03 * slope[:2], (2, 1)), rtol=1e-4)
    assert level_noise(np.full(3, 0.03), control)[2] == 10  # never seen
    assert level_noise(np.zeros(3), control)[0] == 1e-3


def test_mistakes():
    dynamics = random_dynamics()
    acts, level = acts_of(dynamics, "0", "1"), np.ones((2, 12))
    for message, call in (
        (r"levels of the shape \(12,\), not conditions x genes \(2, 12\)", lambda: residuals(dynamics, level[0], acts)),
        ("at least 0", lambda: residuals(dynamics, -level, acts)),
        ("noise must be finite and positive", lambda: consistency(dynamics, level, acts, noise=0.0)),
        (r"noise of the shape \(3,\)", lambda: consistency(dynamics, level, acts, noise=np.ones(3))),
        ("tau=-1 must be at least 0", lambda: project(dynamics, level, acts, tau=-1)),
        ("tau=nan", lambda: project(dynamics, level, acts, tau=math.nan)),
        ("contexts 0 to 3", lambda: project(dynamics, level, acts, torch.tensor([0, 3]))),
    ):
        with pytest.raises(PerturbZooError, match=message):
            call()
