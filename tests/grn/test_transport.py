"""Sinkhorn divergence: nothing between equal clouds, closed form for shifted ones, and POT's value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.distribution import sinkhorn_divergence as by_pot
from perturbzoo.grn.transport import sinkhorn_divergence

X = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (20, 3)))
Y = torch.from_numpy(np.random.default_rng(1).normal(0.5, 1.3, (15, 3)))
SHIFT = torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64)


def test_equal_clouds_in_any_order_are_at_no_distance():
    assert float(sinkhorn_divergence(X, X, 0.5)) == pytest.approx(0, abs=1e-9)
    assert float(sinkhorn_divergence(X, X.flip(0), 0.5)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("regularisation", [0.3, 1.0, 30.0])
def test_a_shifted_cloud_is_at_the_squared_shift_whatever_the_regularisation(regularisation):
    moved = (X + SHIFT).requires_grad_()
    value = sinkhorn_divergence(X, moved, regularisation, steps=500)
    assert float(value.detach()) == pytest.approx(float(SHIFT.square().sum()), rel=1e-6)
    (gradient,) = torch.autograd.grad(value, moved)
    torch.testing.assert_close(gradient, (2 * SHIFT / len(X)).expand_as(gradient), rtol=0, atol=1e-4)


@pytest.mark.parametrize("regularisation", [0.3, 2.0])
def test_value_is_that_of_pot(regularisation):
    ours = float(sinkhorn_divergence(X, Y, regularisation, steps=300))
    assert ours == pytest.approx(by_pot(X.numpy(), Y.numpy(), regularisation), rel=1e-3)


def test_gradient_is_that_of_finite_differences():
    point = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sinkhorn_divergence(point, Y, 1.0, steps=300), point)
    step = torch.zeros_like(X)
    step[4, 1] = 1e-4
    slope = (sinkhorn_divergence(X + step, Y, 1.0, steps=300) - sinkhorn_divergence(X - step, Y, 1.0, steps=300)) / 2e-4
    assert float(gradient[4, 1]) == pytest.approx(float(slope), rel=1e-3)


def test_batches_are_clouds_on_their_own():
    many = sinkhorn_divergence(torch.stack([X, X + 1]), torch.stack([Y, Y]), 1.0, steps=200)
    alone = [float(sinkhorn_divergence(x, Y, 1.0, steps=200)) for x in (X, X + 1)]
    np.testing.assert_allclose(many.numpy(), alone, rtol=1e-6)


def test_what_is_no_distance_is_refused():
    with pytest.raises(PerturbZooError, match="positive"):
        sinkhorn_divergence(X, Y, 0.0)
    with pytest.raises(PerturbZooError, match="dimensions"):
        sinkhorn_divergence(X, Y[:, :2], 1.0)
