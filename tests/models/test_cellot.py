"""CellOT: potentials that are convex whatever was learned, and transport that is optimal where that is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transport_models import SPACE, fit, gaussian, gaussian_map, module, moved, relative_error, screen

from perturbzoo.models import CellOT
from perturbzoo.models.cellot import ConvexPotential

MEAN, COVARIANCE = [5.0, 5.0], [[0.5, 0.2], [0.2, 0.4]]
OTHER_MEAN, OTHER_COVARIANCE = [6.0, 4.5], [[0.3, -0.1], [-0.1, 0.9]]  # longer along one axis, shorter along another


def random_potential(dimension: int = 3, scale: float = 2.0, floor: float = 0.1) -> ConvexPotential:
    """Random parameters, negative weights among them, in float64."""
    potential = ConvexPotential(dimension, 4, [7, 6, 5], floor, torch.linspace(0.5, 2, dimension)).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in potential.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    assert (potential.out < 0).any()
    return potential


def random_cells(n: int, dimension: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, y = 5 * torch.randn(2, n, dimension, generator=generator, dtype=torch.float64)
    return x, y, torch.randn(n, 4, generator=generator, dtype=torch.float64)


def test_convex_on_random_segments() -> None:
    """Under every condition the potential lies below its chords, by the curvature that is left at least."""
    potential = random_potential()
    x, y, condition = random_cells(2000)
    state = potential.condition(condition)
    share = torch.rand(2000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        between = potential(x + share[:, None] * (y - x), state)
        chord = (1 - share) * potential(x, state) + share * potential(y, state)
    gap = chord - between
    least = 0.5 * 0.1 * share * (1 - share) * (x - y).square().sum(dim=1)
    assert (gap >= least - 1e-9 * chord.abs()).all()
    # and it is no parabola: conditions and layers have their say
    assert (gap > 1.1 * least).float().mean() > 0.9


def test_the_transport_is_monotone() -> None:
    potential = random_potential()
    x, y, condition = random_cells(500)
    state = potential.condition(condition).detach()
    product = ((potential.gradient(x, state) - potential.gradient(y, state)) * (x - y)).sum(dim=1)
    assert (product >= 0.1 * (x - y).square().sum(dim=1) * (1 - 1e-9)).all()


def test_the_gradient_is_finite_differences() -> None:
    potential = random_potential(scale=0.5)
    x, _, condition = random_cells(6)
    state = potential.condition(condition).detach()
    assert torch.autograd.gradcheck(lambda cells: potential(cells, state), x.requires_grad_())
    (expected,) = torch.autograd.grad(potential(x, state).sum(), x)
    torch.testing.assert_close(potential.gradient(x, state), expected)


def test_untrained_potentials_are_half_the_square() -> None:
    potential = ConvexPotential(3, 4, [7, 5], 0.1, torch.ones(3))
    x, _, condition = (value.float() for value in random_cells(20))
    state = potential.condition(condition)
    torch.testing.assert_close(potential(x, state), 0.5 * x.square().sum(dim=1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(potential.gradient(x, state.detach()), x)


def test_negative_weights_count_as_none() -> None:
    potential = random_potential()
    x, _, condition = random_cells(20)
    state = potential.condition(condition)
    before = potential(x, state)
    potential.project()
    assert all((weight >= 0).all() for weight in [*potential.weights, potential.out])
    torch.testing.assert_close(potential(x, state), before)


def test_losses_by_hand() -> None:
    """Untrained, f = |.|^2 / 2 and T = id: mean of f(x) - <x, x> = -|x|^2 / 2, and of f(y) - f(x)."""
    cells = {"control": gaussian([3, 3], 0.2 * np.eye(2), 64, 0), "A": gaussian([4, 3], 0.2 * np.eye(2), 64, 1)}
    data = module(screen(cells), cells_per_condition=64)
    model = fit(CellOT(**SPACE), data, 0)
    batch = next(iter(data.train_dataloader()))
    x, y = model.latent.encode(batch.control), model.latent.encode(batch.observed)
    terms = model.loss(batch)
    assert float(terms["g"]) == pytest.approx(-0.5 * float(x.square().sum(dim=1).mean()), rel=1e-4)
    expected = 0.5 * float((y.square() - x.square()).sum(dim=1).mean())
    assert float(terms["f"]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_loss_of_g_where_targets_are_hidden_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """g's cells are a start's difference a away from f's: untrained, mean of f(x + a) - <x, x + a> = (|a|^2 - |x|^2) / 2."""
    cells = {name: gaussian([3 + shift, 3], 0.2 * np.eye(2), 64, 0) for name, shift in (("control", 0), ("A", 1), ("B", 3))}
    model = fit(CellOT(**{**SPACE, "start": "additive"}), module(screen(cells), cells_per_condition=64), 0)
    model.known.fit(model.trainer.datamodule.training_pseudobulks())
    batch = next(iter(model.trainer.datamodule.train_dataloader()))
    hidden = torch.ones(2, 1, dtype=torch.bool)
    monkeypatch.setattr(model, "hide", lambda table: hidden)
    # A starts from B's change and the other way around: by 2 more and by 2 less
    away = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])[batch.table.targets[:, 0]] / model.latent.scale
    torch.testing.assert_close(model.away(batch, hidden), away, rtol=1e-4, atol=1e-4)
    x = model.latent.encode(batch.control)
    expected = 0.5 * float((away[batch.row].square() - x.square()).sum(dim=1).mean())
    assert float(model.g_loss(batch, x)) == pytest.approx(expected, rel=1e-3)


def test_transport_between_gaussians_is_the_affine_map() -> None:
    """On cells it was not trained on, within 5 % of the movement of the closed form."""
    cells = {"control": gaussian(MEAN, COVARIANCE, 2048, 0), "A": gaussian(OTHER_MEAN, OTHER_COVARIANCE, 2048, 1)}
    model = fit(CellOT(**SPACE), module(screen(cells)), 40)
    test = gaussian(MEAN, COVARIANCE, 500, 2)
    expected = gaussian_map(test, MEAN, COVARIANCE, OTHER_MEAN, OTHER_COVARIANCE)
    assert relative_error(moved(model, "A", test), expected, test) < 0.05


def test_the_closed_form_by_hand() -> None:
    """In one dimension: scale by the ratio of standard deviations; and the image has the other's moments."""
    mapped = gaussian_map(np.array([[1.0], [3.0]]), [1.0], [[4.0]], [5.0], [[9.0]])
    np.testing.assert_allclose(mapped, [[5.0], [8.0]])
    image = gaussian_map(gaussian(MEAN, COVARIANCE, 50, 0), MEAN, COVARIANCE, OTHER_MEAN, OTHER_COVARIANCE)
    np.testing.assert_allclose(np.cov(image.T, bias=True), OTHER_COVARIANCE, atol=1e-9)
    np.testing.assert_allclose(image.mean(axis=0), OTHER_MEAN, atol=1e-9)
