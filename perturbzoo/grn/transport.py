r"""Entropic transport between clouds of cells, differentiable, in the logarithmic domain.

The debiased Sinkhorn divergence of Feydy et al. (AISTATS 2019, https://proceedings.mlr.press/v89/feydy19a.html), as in
:func:`perturbzoo.evaluation.distribution.sinkhorn_divergence`, which scores and has no gradients:

.. math:: S(x, y) = O(x, y) - \tfrac12 O(x, x) - \tfrac12 O(y, y), \qquad
    O(x, y) = \min_P \langle P, C \rangle + \epsilon\,\mathrm{KL}(P \,|\, a b^\top), \quad C_{ij} = |x_i - y_j|^2

At the optimum the plan's own change costs nothing, so the gradient is that of :math:`\langle P, C \rangle` with the plan held still.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perturbzoo.errors import PerturbZooError


def sinkhorn_divergence(x: Tensor, y: Tensor, regularisation: float, *, steps: int = 100) -> Tensor:
    """Debiased divergence of clouds, each point of a cloud with the same weight.

    Parameters
    ----------
    x, y
        Shapes ``(..., n, F)`` and ``(..., m, F)``.
    regularisation
        ε, in squared units of the space.
    steps
        Of Sinkhorn's iteration. Symmetric problems, and those of moderate ε, need few.

    Returns
    -------
    Tensor
        Shape ``(...)``.

    Raises
    ------
    PerturbZooError
        The regularisation is not positive, or the clouds lie in different spaces.
    """
    if not regularisation > 0:
        raise PerturbZooError(f"regularisation is {regularisation}: give a positive number, in squared units of the space")
    if x.shape[-1] != y.shape[-1]:
        raise PerturbZooError(f"clouds lie in spaces of {x.shape[-1]} and {y.shape[-1]} dimensions")
    return _cost(x, y, regularisation, steps) - _cost(x, x, regularisation, steps) / 2 - _cost(y, y, regularisation, steps) / 2


def _cost(x: Tensor, y: Tensor, epsilon: float, steps: int) -> Tensor:
    distance = (x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT).clamp(min=0)
    n, m = distance.shape[-2:]
    with torch.no_grad():
        scaled = distance / epsilon  # (..., n, m)
        g = torch.zeros_like(scaled[..., 0, :])
        f = torch.zeros_like(scaled[..., :, 0])
        for _ in range(steps):
            # both at once and averaged, which converges without swinging and keeps equal clouds' potentials equal
            next_f = -torch.logsumexp(g[..., None, :] - scaled, dim=-1) + math.log(m)
            next_g = -torch.logsumexp(f[..., :, None] - scaled, dim=-2) + math.log(n)
            f, g = (f + next_f) / 2, (g + next_g) / 2
        f = -torch.logsumexp(g[..., None, :] - scaled, dim=-1) + math.log(m)
        plan = torch.exp(f[..., :, None] + g[..., None, :] - scaled) / (n * m)
        value = epsilon * (f.mean(-1) + g.mean(-1))
    moved = (plan * distance).sum((-2, -1))
    return value + moved - moved.detach()
