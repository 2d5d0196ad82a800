"""Solvers against closed forms: matrix exponential, exact decay, orders of convergence, implicit gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn.solvers import exponential_step, integrate, phi_1, phi_2
from perturbzoo.grn.stability import leading_eigenvalue, require_stable
from perturbzoo.grn.steady import steady_state

# production W x + b, decay d: x' = (W - diag(d)) x + b; stable, with a feedback loop through all three
W = torch.tensor([[0.0, 0.4, 0.0], [0.0, 0.0, 0.7], [0.5, 0.2, 0.0]], dtype=torch.float64)
B = torch.tensor([1.0, 0.3, 0.2], dtype=torch.float64)
D = torch.tensor([1.0, 1.5, 0.8], dtype=torch.float64)
X0 = torch.tensor([[2.0, 0.0, 1.0], [0.5, 3.0, 0.0]], dtype=torch.float64)
A = W - torch.diag(D)
REST = torch.linalg.solve(-A, B)


def linear(time, state):
    return state @ W.T + B, D.expand_as(state)


def exact(time: float) -> torch.Tensor:
    return REST + (X0 - REST) @ torch.from_numpy(expm(A.numpy() * time)).T


@pytest.mark.parametrize(
    ("method", "step", "tolerance"),
    [
        ("exponential", 0.005, 1e-5),
        ("exponential_euler", 0.001, 1e-3),
        ("rk4", 0.02, 1e-8),
        ("dopri5", None, 1e-6),
        ("scipy_solver", None, 1e-5),
    ],
)
def test_linear_network_is_the_matrix_exponential(method, step, tolerance):
    states = integrate(linear, X0, [0.0, 0.7, 2.5], method=method, step=step, rtol=1e-8, atol=1e-10)
    assert states.shape == (3, 2, 3)
    for state, time in zip(states, (0.0, 0.7, 2.5), strict=True):
        torch.testing.assert_close(state, exact(time), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("method", "order"), [("exponential", 2), ("exponential_euler", 1), ("rk4", 4)])
def test_order_of_convergence(method, order):
    """Halving the step divides the error by two to the order."""
    errors = [
        (integrate(linear, X0, [0.0, 2.0], method=method, step=step)[-1] - exact(2.0)).abs().max().item()
        for step in (0.1, 0.05)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_decay_and_constant_production_are_exact_in_one_step():
    rates = lambda time, state: (B.expand_as(state), D.expand_as(state))  # noqa: E731
    state = exponential_step(rates, torch.tensor(0.0), X0, 3.0)
    torch.testing.assert_close(state, B / D + (X0 - B / D) * torch.exp(-3.0 * D), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["exponential", "exponential_euler"])
def test_stiff_systems_stay_positive_at_any_step(method):
    """Decay rates up to a million, steps of 1: Euler's method would give -1e6 after the first."""
    decay = torch.tensor([1e6, 1.0, 1e-3], dtype=torch.float64)

    def rates(time, state):
        return state.flip(-1) * torch.tensor([1e5, 0.5, 1e-4], dtype=torch.float64), decay.expand_as(state)

    states = integrate(rates, X0, torch.arange(6.0), method=method, step=1.0)
    assert bool((states >= 0).all())
    assert bool(torch.isfinite(states).all())


def test_phi_functions_join_smoothly():
    z = torch.tensor([0.0, 1e-12, 1e-5, 0.0999999, 0.1000001, 3.0, 1e8], dtype=torch.float64)
    # their series, summed with many terms, where they converge quickly
    expected_1 = [sum((-x) ** k / math.factorial(k + 1) for k in range(40)) for x in z[:6].tolist()] + [1e-8]
    expected_2 = [sum((-x) ** k / math.factorial(k + 2) for k in range(40)) for x in z[:6].tolist()] + [1e-8]
    np.testing.assert_allclose(phi_1(z), expected_1, rtol=1e-13)
    np.testing.assert_allclose(phi_2(z), expected_2, rtol=1e-7)
    z.requires_grad_()
    gradient = torch.autograd.grad(phi_1(z).sum() + phi_2(z).sum(), z)[0]
    assert bool(torch.isfinite(gradient).all())


def test_steps_stop_at_knots():
    """A source that sets in within a hundredth of a time unit, seen by steps of one time unit."""

    def rates(time, state):
        on = torch.sigmoid((time - 2.0) / 0.002)
        return on.expand_as(state), torch.ones_like(state)

    start = torch.zeros(1, dtype=torch.float64)
    missed = integrate(rates, start, [0.0, 2.6], step=1.3)[-1]
    seen = integrate(rates, start, [0.0, 2.6], step=1.3, knots=[2.0], ramp=0.002)[-1]
    truth = 1 - math.exp(-0.6)
    assert seen.item() == pytest.approx(truth, abs=1e-4)
    assert abs(missed.item() - truth) > 0.01


def test_recomputing_gives_the_same_gradients():
    def gradient(checkpoint):
        scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

        def rates(time, state):
            return scale * torch.sigmoid(state @ W.T), D.expand_as(state)

        integrate(rates, X0, [0.0, 0.5, 1.0], checkpoint=checkpoint)[-1].sum().backward()
        return scale.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-13, atol=0)


def test_steady_state_of_the_linear_network_and_its_gradients():
    production = B.clone().requires_grad_()

    def rates(time, state):
        return state @ W.T + production, D.expand_as(state)

    state = steady_state(rates, X0)
    torch.testing.assert_close(state, REST.expand(2, 3), rtol=1e-9, atol=1e-10)
    upstream = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    gradient = torch.autograd.grad(state, production, upstream)[0]
    # dx*/db = -A^{-1}, in both rows
    torch.testing.assert_close(gradient, torch.linalg.solve(-A.T, upstream.sum(0)), rtol=1e-8, atol=1e-9)


def test_steady_state_where_plain_iteration_diverges():
    """x = 3 / (1 + x^4): the slope of the map at its fixed point is below -2, so iterating it oscillates for ever."""
    gain = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def rates(time, state):
        return gain / (1 + state**4), torch.ones_like(state)

    state = steady_state(rates, torch.full((1, 1), 0.1, dtype=torch.float64))
    root = max(r.real for r in np.roots([1, 0, 0, 0, 1, -3]) if abs(r.imag) < 1e-9)
    assert state.item() == pytest.approx(root, rel=1e-9)
    slope = -3 * 4 * root**3 / (1 + root**4) ** 2
    assert slope < -2
    assert torch.autograd.grad(state, gain)[0].item() == pytest.approx(1 / (1 + root**4) / (1 - slope), rel=1e-7)


def ring(time, state):
    """Repressilator: each of three represses the next, steeply; its only steady state is unstable."""
    return 5 / (1 + state.roll(1, -1) ** 6), torch.ones_like(state)


ring.entries = ("lacI", "tetR", "cI")  # type: ignore[attr-defined]
ring.labels = ("control", "tetR:knockout")  # type: ignore[attr-defined]


def test_eigenvalues_of_the_ring():
    """J = -1 + a P with the cyclic permutation P: eigenvalues -1 + a exp(2 pi i k / 3)."""
    root = max(r.real for r in np.roots([1, 0, 0, 0, 0, 0, 1, -5]) if abs(r.imag) < 1e-9)
    slope = -5 * 6 * root**5 / (1 + root**6) ** 2
    point = torch.full((3,), root, dtype=torch.float64)
    value, _ = leading_eigenvalue(ring, point)
    assert value.real == pytest.approx(-1 - slope / 2, rel=1e-9)
    assert abs(value.imag) == pytest.approx(-slope * math.sqrt(3) / 2, rel=1e-9)
    with pytest.raises(PerturbZooError, match=r"(lacI|tetR|cI) oscillates with period"):
        require_stable(ring, point)
    assert require_stable(linear, REST).real == pytest.approx(np.linalg.eigvals(A.numpy()).real.max(), rel=1e-9)


def test_unstable_states_are_kept_on_request():
    root = max(r.real for r in np.roots([1, 0, 0, 0, 0, 0, 1, -5]) if abs(r.imag) < 1e-9)
    state = steady_state(ring, torch.tensor([[1.0, 1.2, 0.8]], dtype=torch.float64), unstable="keep")
    np.testing.assert_allclose(state, root, rtol=1e-8)


def test_barely_stable_states_are_stable_and_barely_unstable_ones_are_not():
    """x = tanh-like switch with slope a at 0.5: growth rate a - 1; two states beside the unstable one where a > 1."""

    def switch(slope):
        return lambda time, state: (torch.sigmoid(4 * slope * (state - 0.5)), torch.ones_like(state))

    middle = torch.full((1, 3), 0.5, dtype=torch.float64)
    torch.testing.assert_close(steady_state(switch(0.9), middle + 0.1), middle, rtol=0, atol=1e-8)
    with pytest.raises(PerturbZooError, match=r"unstable dynamics: around the steady state entry [012] of row 0"):
        steady_state(switch(1.1), middle)
    assert bool((steady_state(switch(1.1), middle + 0.01) > 0.6).all())


def test_large_systems_use_matrix_free_eigenvalues():
    size = 450
    generator = np.random.default_rng(0)
    matrix = torch.from_numpy(generator.normal(0, 1 / np.sqrt(size), (size, size)) * 0.5)
    rates = lambda time, state: (state @ matrix.T, torch.ones_like(state))  # noqa: E731
    value, _ = leading_eigenvalue(rates, torch.ones(size, dtype=torch.float64))
    assert value.real == pytest.approx(np.linalg.eigvals(matrix.numpy()).real.max() - 1, rel=1e-6)


def broken(time, state):
    return torch.where(time > 1, state * torch.tensor([1.0, math.nan, 1.0], dtype=state.dtype), state), torch.ones_like(state)


broken.entries, broken.labels = ("A", "B", "C"), ("control", "B:clamp")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: steady_state(ring, torch.tensor([[1.0, 1.2, 0.8]] * 2), max_steps=300),
            r"(unstable dynamics|no steady state).* (lacI|tetR|cI) of condition '(control|tetR:knockout)'.*integrate in time",
        ),
        (
            lambda: integrate(broken, X0, [0.0, 0.5, 1.5, 2.0]),
            r"not finite at time 1.5 in B of condition 'control'; halve the step",
        ),
        (lambda: integrate(broken, X0, [0.0, 2.0], method="dopri5"), "method 'dopri5'.*method='exponential'"),
        (lambda: integrate(linear, X0 * math.inf, [0.0, 1.0]), "initial state: not finite.*entry 0 of row 0"),
        (lambda: integrate(linear, X0, [0.0, 1.0, 1.0]), "times must be finite and increase"),
        (lambda: integrate(linear, X0, [0.0, math.nan]), "times must be finite and increase"),
        (lambda: integrate(linear, X0, [0.0, 1.0], method="exponental"), "did you mean 'exponential'"),
        (lambda: integrate(linear, X0, [0.0, 1.0], step=0.0), "step 0.0 must be positive"),
    ],
)
def test_failures_say_where_and_what_to_do(call, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
