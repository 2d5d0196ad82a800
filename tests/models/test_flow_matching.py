"""Flow matching: couplings, the integral of a known field, and transport that is optimal where that is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from test_cellot import COVARIANCE, MEAN, OTHER_COVARIANCE, OTHER_MEAN
from transport_models import SPACE, first_batch, fit, gaussian, gaussian_map, module, moved, relative_error, screen

from perturbzoo.errors import PerturbZooError
from perturbzoo.models import FlowMatching
from perturbzoo.models.flow_matching import VelocityField, couple


def test_the_coupling_is_the_best_permutation() -> None:
    """Against all 720 permutations."""
    random = np.random.default_rng(0)
    source, target = random.normal(size=(2, 6, 3))
    chosen = couple(source, target)
    cost = {order: ((source - target[list(order)]) ** 2).sum() for order in itertools.permutations(range(6))}
    assert tuple(chosen) == min(cost, key=cost.__getitem__)


@pytest.mark.parametrize("coupling", ["optimal", "independent"])
def test_partners_come_from_the_same_pair(coupling: str) -> None:
    """Each target is used once, by a cell of its own condition, whatever the order of the batch."""
    cells = {name: gaussian([3 + shift, 3], 0.1 * np.eye(2), 32, shift) for shift, name in enumerate(("control", "A", "B"))}
    data = module(screen(cells), cells_per_condition=16, sampling="condition")
    model = fit(FlowMatching(**SPACE, coupling=coupling, hidden=8), data, 0)
    batch = first_batch(data)
    source = model.latent.encode(batch.control)
    label = torch.stack([batch.row.float(), torch.arange(len(batch)).float()], dim=1)
    drawn = model.partners(batch, source, label)
    assert torch.equal(drawn[:, 0], batch.row.float())
    assert sorted(drawn[:, 1].tolist()) == list(range(len(batch)))


def test_the_integral_of_a_linear_field() -> None:
    """dx/dt = A x + b: x(1) = exp(A) x + the integral of exp(A s) b; the midpoint rule errs with the square of the step."""
    field = VelocityField(2, 3, 8, 1, torch.ones(2)).double()
    matrix = torch.tensor([[-0.5, 0.3], [0.1, 0.4]], dtype=torch.float64)
    shift = torch.tensor([0.7, -0.2], dtype=torch.float64)
    with torch.no_grad():
        field.linear.weight[:, :2] = matrix
        field.linear.bias.copy_(shift)
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    augmented = torch.zeros(3, 3, dtype=torch.float64)
    augmented[:2, :2], augmented[:2, 2] = matrix, shift
    flow = torch.linalg.matrix_exp(augmented)
    expected = x @ flow[:2, :2].T + flow[:2, 2]
    state = field.condition(torch.randn(2, 3, dtype=torch.float64))
    with torch.no_grad():
        errors = [float((field.integrate(x, state, steps) - expected).abs().max()) for steps in (5, 10)]
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


def test_transport_between_gaussians_is_the_affine_map() -> None:
    """On cells it was not trained on, within 5 % of the movement of the closed form."""
    cells = {"control": gaussian(MEAN, COVARIANCE, 2048, 0), "A": gaussian(OTHER_MEAN, OTHER_COVARIANCE, 2048, 1)}
    model = fit(FlowMatching(**SPACE, hidden=32, layers=1, lr=3e-3), module(screen(cells)), 60)
    test = gaussian(MEAN, COVARIANCE, 500, 2)
    expected = gaussian_map(test, MEAN, COVARIANCE, OTHER_MEAN, OTHER_COVARIANCE)
    assert relative_error(moved(model, "A", test), expected, test) < 0.05


def test_a_bad_coupling_is_refused() -> None:
    with pytest.raises(PerturbZooError, match="coupling is 'sinkhorn': give optimal or independent"):
        FlowMatching(coupling="sinkhorn")  # type: ignore[arg-type]
