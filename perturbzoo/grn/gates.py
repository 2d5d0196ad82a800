"""`Gates`: edges that are there or not, differentiably (Louizos, Welling and Kingma, ICLR 2018).

In place of an L1 penalty in :mod:`perturbzoo.grn.fitting`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

GATE_TEMPERATURE, GATE_LOW, GATE_HIGH = 2 / 3, -0.1, 1.1


class Gates(nn.Module):
    """Hard-concrete gates on edges: stretched, clipped samples in training, the most likely value afterwards."""

    def __init__(self, chance: Tensor) -> None:
        super().__init__()
        self.price = -torch.logit(chance)
        # open at first: an edge that is shut from the start learns nothing
        self.openness = nn.Parameter(torch.full_like(chance, 1.0))

    def chance(self) -> Tensor:
        """That an edge is open at all."""
        return torch.sigmoid(self.openness - GATE_TEMPERATURE * math.log(-GATE_LOW / GATE_HIGH))

    def cost(self) -> Tensor:
        return (self.price * self.chance()).sum()

    def forward(self, weight: Tensor) -> Tensor:
        logit: Tensor = self.openness
        if self.training:
            logit = (logit + torch.logit(torch.rand_like(logit), eps=1e-6)) / GATE_TEMPERATURE
        return weight * (torch.sigmoid(logit) * (GATE_HIGH - GATE_LOW) + GATE_LOW).clamp(0, 1)
