"""Likelihoods: the negative binomial against scvi-tools', and the integral of log1p against exact sums and drawn cells."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from perturbzoo.models.likelihood import ExpressionHead, expected_log1p, nb_negative_log_likelihood


def exact_sum(mean: float, dispersion: float, scale: float) -> float:
    """Sum of log1p(scale n) times the probability of n, over as many n as carry any."""
    n = torch.arange(0, int(mean * (1 + 30 / min(dispersion, 1.0)) + 2000), dtype=torch.float64)
    m, theta = torch.tensor(mean, dtype=torch.float64), torch.tensor(dispersion, dtype=torch.float64)
    log_probability = (
        torch.lgamma(n + theta)
        - torch.lgamma(theta)
        - torch.lgamma(n + 1)
        + theta * torch.log(theta / (theta + m))
        + n * torch.log(m / (theta + m))
    )
    assert float(log_probability.exp().sum()) == pytest.approx(1, abs=1e-6)
    return float((log_probability.exp() * torch.log1p(scale * n)).sum())


@pytest.mark.parametrize("mean", [1e-3, 0.05, 0.7, 6.0, 80.0, 1000.0])
@pytest.mark.parametrize("dispersion", [0.05, 0.5, 3.0, 100.0])
def test_the_integral_is_the_exact_sum(mean: float, dispersion: float) -> None:
    for scale in (0.2, 1.0, 4.0):
        found = expected_log1p(torch.tensor([[mean]]), torch.tensor([dispersion]), torch.tensor([scale]))
        assert float(found) == pytest.approx(exact_sum(mean, dispersion, scale), rel=2e-3)
    # what would be predicted without integrating is above it
    assert float(found) < math.log1p(4.0 * mean)


def test_the_integral_differentiates_by_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = (3 * torch.rand(4, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    dispersion = torch.rand(5, generator=generator, dtype=torch.float64) + 0.2
    scale = torch.rand(4, generator=generator, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda values: expected_log1p(values, dispersion, scale), (mean,))


def test_no_counts_no_expression() -> None:
    assert float(expected_log1p(torch.zeros(1, 1), torch.ones(1), torch.ones(1))) == 0.0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_negative_binomial_is_scvi_tools(share: float) -> None:
    """Value and gradients, from no count at all to counts everywhere."""
    from scvi.distributions import NegativeBinomial

    generator = torch.Generator().manual_seed(1)
    present = torch.rand(6, 7, generator=generator) < share
    counts = torch.where(present, torch.randint(1, 50, (6, 7), generator=generator), 0).double()
    log_mean = torch.randn(6, 7, generator=generator).double().requires_grad_()
    log_dispersion = torch.randn(7, generator=generator).double().requires_grad_()
    ours = nb_negative_log_likelihood(counts, log_mean, log_dispersion)
    theirs = -NegativeBinomial(mu=log_mean.exp(), theta=log_dispersion.exp()).log_prob(counts).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for own, other in zip(
        torch.autograd.grad(ours, (log_mean, log_dispersion)),
        torch.autograd.grad(theirs, (log_mean, log_dispersion)),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def head_of(kind: str, n_genes: int = 3) -> tuple[ExpressionHead, Tensor]:
    generator = torch.Generator().manual_seed(2)
    start = torch.tensor([-7.0, -6.0, -5.0])[:n_genes] if kind != "gaussian" else torch.tensor([0.5, 1.0, 2.0])[:n_genes]
    head = ExpressionHead(kind, 4, start, torch.tensor([0.3, 0.4, 0.5])[:n_genes])  # type: ignore[arg-type]
    for parameter in head.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return head, torch.randn(2, 4, generator=generator)


@pytest.mark.parametrize("kind", ["nb", "zinb", "gaussian"])
def test_expectation_is_the_mean_of_drawn_cells(kind: str) -> None:
    """4,000 cells of each of two states: within four standard errors."""
    head, features = head_of(kind)
    size, depth = torch.tensor([900.0, 2500.0]), 1500.0
    torch.manual_seed(0)
    with torch.no_grad():
        expected = head.expected(features, size, depth)
        drawn = torch.stack([head.sample(features, size, depth) for _ in range(4000)])
    error = drawn.std(dim=0) / math.sqrt(len(drawn))
    assert ((drawn.mean(dim=0) - expected).abs() < 4 * error + 1e-3 * expected.abs()).all()


@pytest.mark.parametrize("kind", ["nb", "zinb", "gaussian"])
def test_likelihood_is_the_distribution_s(kind: str) -> None:
    head, features = head_of(kind)
    size = torch.tensor([900.0, 2500.0])
    values = torch.tensor([[0.0, 3.0, 10.0], [1.0, 0.0, 40.0]])
    with torch.no_grad():
        expected = -head.distribution(features, size).log_prob(values).sum() / 2
        torch.testing.assert_close(head.negative_log_likelihood(features, values, size), expected, rtol=1e-5, atol=1e-5)


def test_features_far_away_stay_finite() -> None:
    head, _ = head_of("nb")
    with torch.no_grad():
        assert head.expected(torch.full((1, 4), 1e4), torch.tensor([1000.0]), 1000.0).isfinite().all()
