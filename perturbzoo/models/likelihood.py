r"""Likelihoods of a cell's values given features of it, and the log1p-normalised expression that they lead one to expect.

With features :math:`h` of a cell of size :math:`s` (its depth, in counts) and per gene :math:`g`, counts are

.. math::
    n_g \sim \mathrm{NB}(\mu_g, \theta_g), \qquad \mu_g = s \exp(b_g + \langle w_g, h \rangle),

of variance :math:`\mu + \mu^2 / \theta`, maybe set to 0 with a probability :math:`\pi_g(h)` (ZINB); values that are log1p
already are :math:`\mathcal N(b_g + \langle w_g, h \rangle, \sigma_g^2)`. Rates are not forced to sum to 1: a screen may hold few of
the genes that its sizes were counted on.

The zoo predicts :math:`E[\log(1 + c n)]` with :math:`c = \mathrm{depth} / s`, not :math:`\log(1 + c \mu)`: the second exceeds the
first by more than most perturbations do. From :math:`\log(1 + y) = \int_0^\infty (1 - e^{-yt})\, e^{-t}\, dt / t` and the
generating function of the NB,

.. math::
    E[\log(1 + c n)] = \int_0^\infty \Big(1 - \big(1 + \tfrac{\mu}{\theta} (1 - e^{-ct})\big)^{-\theta}\Big) \frac{e^{-t}}{t}\, dt,

times :math:`1 - \pi` with zero inflation. With :math:`t = e^u` the integrand is analytic around the real line and falls off at both
ends, so that the trapezoidal rule converges exponentially: 15 nodes give it to less than a thousandth
up to normalised means of ten thousand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from torch.distributions import Distribution

Kind = Literal["nb", "zinb", "gaussian"]

_STEP = 1.0
_NODES = [float(node) for node in range(-12, 3)]  # of u = log t
_MIN_SCALE = 0.1  # of a Gaussian: genes that hardly vary would outweigh all others
_MAX_CHANGE = 12.0  # of a log rate, from its start


@dataclass
class CountLikelihood:
    """Negative binomials of the counts of B cells, maybe with more zeros.

    Attributes
    ----------
    mean
        Shape ``(B, G)``: expected counts at each control cell's size, before zeros are added.
    theta
        Shape ``(G,)``: the variance is mean + mean^2 / theta.
    zero
        Shape ``(B, G)``: probability that a count is set to 0, or None.
    """

    mean: Tensor
    theta: Tensor
    zero: Tensor | None = None


class ExpressionHead(nn.Module):
    """From features of cells to the distribution of their values.

    Parameters
    ----------
    kind
        ``nb``, ``zinb`` (counts) or ``gaussian`` (log1p-normalised values).
    width
        Number of features.
    start
        Shape ``(G,)``: for counts each gene's log rate, log of mean counts per unit of size; for values their mean.
    spread
        Shape ``(G,)``, for values their standard deviation; not looked at for counts.
    """

    def __init__(self, kind: Kind, width: int, start: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.kind = kind
        self.centre = nn.Linear(width, len(start))
        self.log_dispersion = nn.Parameter(
            spread.clamp(min=_MIN_SCALE).log() if kind == "gaussian" else torch.zeros(len(start))
        )
        self.dropout = nn.Linear(width, len(start)) if kind == "zinb" else None
        # every cell starts at the mean cell
        nn.init.normal_(self.centre.weight, std=0.02)
        with torch.no_grad():
            self.centre.bias.copy_(start)
        self.register_buffer("start", start.clone(), persistent=False)
        if self.dropout is not None:
            nn.init.zeros_(self.dropout.weight)
            nn.init.constant_(self.dropout.bias, -3.0)

    start: Tensor

    def log_rate(self, features: Tensor) -> Tensor:
        """Shape ``(B, G)``: log of expected counts per unit of size; the mean, for a Gaussian."""
        centre = self.centre(features)
        if self.kind == "gaussian":
            return centre
        # features far from all training cells must not overflow
        return torch.minimum(centre, self.start + _MAX_CHANGE)

    def distribution(self, features: Tensor, size: Tensor) -> Distribution:
        """scvi-tools' distribution of the counts of cells of `size` ``(B,)``, or of log1p-normalised values."""
        from scvi.distributions import NegativeBinomial, Normal, ZeroInflatedNegativeBinomial

        centre = self.log_rate(features)
        if self.kind == "gaussian":
            return Normal(centre, self._scale())
        mean, dispersion = centre.exp() * size[:, None], self.log_dispersion.exp()
        if self.dropout is None:
            return NegativeBinomial(mu=mean, theta=dispersion)
        return ZeroInflatedNegativeBinomial(mu=mean, theta=dispersion, zi_logits=self.dropout(features))

    def _scale(self) -> Tensor:
        return self.log_dispersion.exp().clamp(min=_MIN_SCALE)

    def negative_log_likelihood(self, features: Tensor, values: Tensor, size: Tensor) -> Tensor:
        """Mean over cells of the sum over genes.

        Parameters
        ----------
        features
            Shape ``(B, width)``.
        values
            Shape ``(B, G)``: counts; log1p-normalised values for a Gaussian.
        size
            Shape ``(B,)``, counts.
        """
        if self.kind == "nb":
            log_mean = self.log_rate(features) + size.log()[:, None]
            return nb_negative_log_likelihood(values, log_mean, self.log_dispersion) / len(values)
        return -self.distribution(features, size).log_prob(values).sum() / len(values)

    def expected(self, features: Tensor, size: Tensor, depth: float) -> Tensor:
        """Shape ``(B, G)``: expected log1p-normalised expression of cells of `size` ``(B,)`` scaled to `depth` counts."""
        centre = self.log_rate(features)
        if self.kind == "gaussian":
            return centre
        expected = expected_log1p(centre.exp() * size[:, None], self.log_dispersion.exp(), depth / size)
        return expected if self.dropout is None else expected * torch.sigmoid(-self.dropout(features))

    def count_likelihood(self, features: Tensor, size: Tensor) -> CountLikelihood:
        """The distribution of counts in parameters; of a head that is not Gaussian."""
        zero = None if self.dropout is None else torch.sigmoid(self.dropout(features))
        return CountLikelihood(self.log_rate(features).exp() * size[:, None], self.log_dispersion.exp(), zero)

    def sample(self, features: Tensor, size: Tensor, depth: float) -> Tensor:
        """Shape ``(B, G)``: cells drawn from the likelihood, log1p-normalised."""
        drawn = self.distribution(features, size).sample()
        return drawn if self.kind == "gaussian" else torch.log1p(drawn * (depth / size)[:, None])


def nb_negative_log_likelihood(counts: Tensor, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
    r"""Negative log likelihood of a negative binomial, summed: the same number as scvi-tools', faster.

    With :math:`l = \log \mu - \log \theta` it is :math:`(n + \theta) \log(1 + e^l) - n l - \log \binom{n + \theta - 1}{n}`. The last
    term, three gamma functions, is 0 where there is no count: it is computed for the others only, about a tenth of them all.

    Parameters
    ----------
    counts, log_mean
        Shape ``(B, G)``.
    log_dispersion
        Shape ``(G,)``.
    """
    dispersion = log_dispersion.exp()
    logit = log_mean - log_dispersion
    loss = ((counts + dispersion) * functional.softplus(logit) - counts * logit).sum()
    cell, gene = torch.nonzero(counts, as_tuple=True)
    n, theta = counts[cell, gene], dispersion[gene]
    return loss - (torch.lgamma(n + theta) - torch.lgamma(n + 1) - torch.lgamma(dispersion)[gene]).sum()


def expected_log1p(mean: Tensor, dispersion: Tensor, scale: Tensor) -> Tensor:
    """E[log1p(scale n)] of negative binomial counts n, by quadrature; see the module's text. Its gradient is that by the mean.

    Parameters
    ----------
    mean
        Shape ``(B, G)``: of the counts.
    dispersion
        Shape ``(G,)``: theta.
    scale
        Shape ``(B,)``: normalised counts per count.
    """
    return _ExpectedLog1p.apply(mean, dispersion.detach(), scale)


class _ExpectedLog1p(torch.autograd.Function):
    """The quadrature, and its derivative by the mean in the same pass: no node is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, dispersion: Tensor, scale: Tensor) -> Tensor:
        ratio, power = mean / dispersion, -dispersion
        total, slope = torch.zeros_like(mean), torch.zeros_like(mean) if ctx.needs_input_grad[0] else None
        for number, node in enumerate(_NODES):
            t = math.exp(node)
            share = -torch.expm1(-scale * t)[:, None]  # (B, 1)
            weight = _STEP * math.exp(-t)
            if number == 0:
                # what lies below the first node falls by e per unit of u: a geometric series
                weight /= -math.expm1(-_STEP)
            reach = ratio * share
            rest = torch.log1p(reach).mul_(power).expm1_()  # generating function - 1; in place, the passes are what it costs
            total.sub_(rest, alpha=weight)
            if slope is not None:
                slope.addcmul_(rest.add_(1).div_(reach.add_(1)), share, value=weight)
        if slope is not None:
            ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None, None
