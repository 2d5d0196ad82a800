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
    # the means' part is exact: it moves every coupling's cost by as much, whatever ε
    mean_x, mean_y = x.mean(-2, keepdim=True), y.mean(-2, keepdim=True)
    x, y = x - mean_x, y - mean_y
    between = (mean_x - mean_y).square().sum((-2, -1))
    own = _cost(x, x, regularisation, steps) / 2 + _cost(y, y, regularisation, steps) / 2
    return between + _cost(x, y, regularisation, steps) - own


def _cost(x: Tensor, y: Tensor, epsilon: float, steps: int) -> Tensor:
    distance = (x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT).clamp(min=0)
    n, m = distance.shape[-2:]
    with torch.no_grad():
        g = torch.zeros_like(distance[..., 0, :])
        widest = max(float(distance.max()), epsilon)

        def first(g: Tensor, now: float) -> Tensor:
            return now * (math.log(m) - torch.logsumexp((g[..., None, :] - distance) / now, dim=-1))

        for step in range(steps):
            now = max(epsilon, widest * 0.7**step)  # coarse before fine: far points find each other in few steps
            f = first(g, now)
            g = now * (math.log(n) - torch.logsumexp((f[..., :, None] - distance) / now, dim=-2))
        f = first(g, epsilon)
        plan = torch.exp((f[..., :, None] + g[..., None, :] - distance) / epsilon) / (n * m)
        value = f.mean(-1) + g.mean(-1)
    moved = (plan * distance).sum((-2, -1))
    return value + moved - moved.detach()
