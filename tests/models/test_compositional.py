"""Parts of a compositional model: dose responses in closed form, covariates, adversaries and their penalty."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from perturbzoo.models.compositional import (
    Adversary,
    CovariateVectors,
    DoseResponse,
    gradient_penalty,
    linear_information,
    soft_cross_entropy,
)

KINDS = ("logsigm", "sigm", "linear", "mlp")
NORMS = {"use_batch_norm": False, "use_layer_norm": True}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def random_response(kind: str, unit: float = 1.0) -> DoseResponse:
    torch.manual_seed(3)
    response = DoseResponse(kind, torch.tensor([True, True, False]), unit)  # type: ignore[arg-type]
    for parameter in response.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return response


# ---------------------------------------------------------------------- dose responses


@pytest.mark.parametrize("kind", KINDS)
def test_dose_0_is_no_response(kind: str) -> None:
    assert torch.equal(random_response(kind)(torch.tensor([0, 1, 2]), torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", [1.0, 500.0])
def test_an_untrained_response_is_1_at_the_unit(kind: str, unit: float) -> None:
    response = DoseResponse(kind, torch.ones(2, dtype=torch.bool), unit)  # type: ignore[arg-type]
    found = response(torch.tensor([0, 1]), torch.tensor([unit, unit]))
    torch.testing.assert_close(found, torch.ones(2), rtol=1e-5, atol=1e-5)


def test_closed_forms() -> None:
    dose = torch.tensor([0.3, 2.0, 40.0])
    for kind in ("logsigm", "sigm"):
        response = random_response(kind, unit=4.0)
        slope, offset = (response.common + response.own[1]).tolist()
        for value, found in zip(dose.tolist(), response(torch.ones(3, dtype=torch.int64), dose).tolist(), strict=True):
            u = math.log1p(value / 4) if kind == "logsigm" else value / 4
            at_one = math.log(2) if kind == "logsigm" else 1.0
            expected = (sigmoid(slope * u + offset) - sigmoid(offset)) / (sigmoid(at_one) - 0.5)
            assert found == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(random_response("linear", unit=4.0)(torch.zeros(3, dtype=torch.int64), dose), dose / 4)


@pytest.mark.parametrize("kind", ["logsigm", "sigm", "mlp"])
def test_an_untrained_target_responds_as_targets_do(kind: str) -> None:
    response = random_response(kind)
    before = response(torch.tensor([2, 0]), torch.tensor([3.0, 3.0])).detach()
    response.own.data += 1.0
    after = response(torch.tensor([2, 0]), torch.tensor([3.0, 3.0])).detach()
    assert float(before[0]) == float(after[0])
    assert float(before[1]) != float(after[1])


# ---------------------------------------------------------------------- covariates


def test_covariates_add_up_and_unknown_levels_are_the_mean() -> None:
    both = torch.ones(2, dtype=torch.bool)
    vectors = CovariateVectors([both, torch.ones(1, dtype=torch.bool), torch.tensor([True, True, False])], 4)
    first, second = (table.weight.detach() for table in vectors.tables)
    found = vectors(torch.tensor([[0, 0, 1], [1, 0, 2], [-1, 0, -1]])).detach()
    mean = second[:2].mean(dim=0)
    torch.testing.assert_close(found[0], first[0] + second[1])
    torch.testing.assert_close(found[1], first[1] + mean)
    torch.testing.assert_close(found[2], first.mean(dim=0) + mean)
    assert torch.equal(CovariateVectors([], 4)(torch.zeros(3, 0, dtype=torch.int64)), torch.zeros(3, 4))


# ---------------------------------------------------------------------- adversaries


def test_soft_cross_entropy_by_hand() -> None:
    """A combination is shared among its targets; a cell whose label is unknown adds nothing."""
    logits = {0: torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 0.0]]), 2: torch.tensor([[0.0, 0.0], [3.0, 1.0]])}
    labels = [torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), torch.zeros(2, 1), torch.tensor([[0.0, 0.0], [0.0, 1.0]])]
    log_z = math.log(math.exp(1) + math.exp(2) + 1), math.log(math.exp(0.5) + 2)
    first = ((log_z[0] - 1.5) + log_z[1]) / 2
    second = (0 + math.log(math.exp(3) + math.exp(1)) - 1) / 2
    assert float(soft_cross_entropy(logits, labels)) == pytest.approx(first + second, rel=1e-5)


def test_gradient_penalty_against_finite_differences() -> None:
    torch.manual_seed(0)
    adversary = Adversary(3, [4, 1, 2], NORMS, hidden=5).double().eval()
    basal = torch.randn(6, 3, dtype=torch.float64)
    step, expected = 1e-5, 0.0
    with torch.no_grad():
        for column in adversary(basal):
            slope = [
                (adversary(basal + move)[column] - adversary(basal - move)[column]).sum(dim=1) / (2 * step)
                for move in step * torch.eye(3, dtype=torch.float64)
            ]
            expected += float(torch.stack(slope).square().sum(dim=0).mean())
    assert gradient_penalty(adversary, basal).item() == pytest.approx(expected, rel=1e-5)
    # and by hand, for a linear adversary: the squared length of the sum of its rows
    linear = nn.Linear(3, 4).double()
    by_hand = float(linear.weight.sum(dim=0).square().sum())

    class One(nn.Module):
        def forward(self, values: torch.Tensor) -> dict[int, torch.Tensor]:
            return {0: linear(values)}

    assert gradient_penalty(One(), basal).item() == pytest.approx(by_hand)


def test_a_frozen_adversary_says_the_same_and_learns_nothing() -> None:
    adversary = Adversary(3, [4, 2], NORMS).eval()
    basal = torch.randn(5, 3, requires_grad=True)
    plain, frozen = adversary(basal), adversary.frozen(basal)
    for column in plain:
        torch.testing.assert_close(plain[column], frozen[column])
    torch.stack([values.square().sum() for values in frozen.values()]).sum().backward()
    assert basal.grad is not None
    assert basal.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in adversary.parameters())


def test_linear_information_of_two_gaussians() -> None:
    """One dimension, two groups d standard deviations apart: the total variance is 1 + d^2 / 4 times that within."""
    torch.manual_seed(0)
    group = torch.arange(2).repeat(5000)
    basal = torch.randn(10_000, 1)
    distance = 1.5
    found = linear_information(basal + distance * group[:, None], group)
    assert float(found) == pytest.approx(0.5 * math.log(1 + distance**2 / 4), abs=0.02)
    # the same for every linear view of the states, and for other names of the groups
    twice = torch.cat([basal + distance * group[:, None], torch.randn(10_000, 1)], dim=1)
    turned = twice @ torch.tensor([[2.0, 1.0], [0.5, 1.0]])
    assert float(linear_information(turned, 7 - 3 * group)) == pytest.approx(float(found), abs=0.02)
    centred = basal - torch.stack([basal[group == name].mean() for name in (0, 1)])[group][:, None]
    assert float(linear_information(centred, group)) == pytest.approx(0, abs=1e-6)
