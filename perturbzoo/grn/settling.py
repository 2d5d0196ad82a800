"""`settle`: steady states as a fit needs them, a few steps from the last answer.

For answers, :func:`perturbzoo.grn.steady.steady_state` checks that they are one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perturbzoo.grn.dynamics import RegulatoryDynamics
from perturbzoo.grn.fitted import FAR
from perturbzoo.grn.interventions import Interventions


def settle(
    dynamics: RegulatoryDynamics,
    acts: Interventions,
    context: Tensor,
    start: Tensor | None,
    *,
    steps: int = 15,
    adjoint: int = 20,
) -> tuple[Tensor, Tensor]:
    """Log of steady levels over the reference, near a start, with gradients by the implicit function theorem.

    Cheaper than :func:`perturbzoo.grn.steady.steady_state`, which is for answers: damped steps from the last answer, as many for the
    gradient, and no check that they arrived.

    Returns
    -------
    log level ``(N, nodes)``, and the same without gradient, to start from next time.
    """
    rates = dynamics.bind(acts, context)
    reference = dynamics.control_level[context]

    def mapped(z: Tensor) -> Tensor:
        production, decay = rates(FAR, reference * torch.exp(z))
        return torch.log(production / decay / reference)

    with torch.no_grad():
        z = torch.zeros_like(reference) if start is None else start
        for _ in range(steps if start is not None else 3 * steps):
            z = torch.lerp(z, mapped(z), 0.7)
    anchor = z.detach().requires_grad_()
    again = mapped(anchor)

    def pulled(upstream: Tensor | None) -> Tensor | None:
        if upstream is None:
            return None
        answer = upstream
        for _ in range(adjoint):
            image = upstream + torch.autograd.grad(again, anchor, answer, retain_graph=True)[0]
            answer = torch.lerp(answer, image, 0.7)
        return answer

    result = mapped(z)
    if result.requires_grad:
        result.register_hook(pulled)
    return result, result.detach()
