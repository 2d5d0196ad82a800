r"""The map whose fixed points are steady states, and its derivative along each edge.

With the product's level :math:`y = \eta x` that targets see, the mRNA level at rest is, whatever layers there are,

.. math::

    x = F(x) = c\, f(\eta x) + a, \qquad
    c = (1 - h)\, \kappa v / \gamma, \qquad a = (1 - h)\, s / \gamma + \text{what clamps hold}

c and a do not depend on the state (h is the share of a clamp), so the derivative is that of f, one number for each edge:
everything here costs time and memory in proportion to edges. Called by attribution, consistency and counterfactuals.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn.dynamics import RegulatoryDynamics
from perturbzoo.grn.interventions import Effects, Interventions
from perturbzoo.grn.steady import steady_state


def in_double(dynamics: RegulatoryDynamics, acts: Interventions) -> tuple[RegulatoryDynamics, Interventions]:
    """Return frozen copies in float64 on the CPU: differences of steady states need more digits than training does."""
    numbers = {name: getattr(acts, name).detach() for name in ("dose", "onset", "offset", "efficacy")}
    # to the CPU first: not every accelerator has float64
    frozen = copy.deepcopy(dynamics).cpu().double().requires_grad_(False)
    return frozen, replace(acts.to("cpu"), **{name: values.cpu().double() for name, values in numbers.items()})


def context_rows(dynamics: RegulatoryDynamics, context: Tensor | int | None, rows: int) -> Tensor:
    """Return the context of each row, shape ``(rows,)``, int64; None is the first context, one number is for all rows.

    Raises
    ------
    PerturbZooError
        There is no such context, or not one for each row.
    """
    given = torch.as_tensor(0 if context is None else context).to(dynamics.bias.device)
    if given.ndim > 1 or (given.ndim == 1 and len(given) not in (1, rows)):
        raise PerturbZooError(f"contexts have the shape {tuple(given.shape)}; give one, or one for each of {rows} rows")
    if not bool(((given >= 0) & (given < len(dynamics.bias))).all()):
        raise PerturbZooError(f"contexts {int(given.min())} to {int(given.max())}, but there are {len(dynamics.bias)}")
    return given.expand(rows)


def levels_at_rest(dynamics: RegulatoryDynamics, acts: Interventions, context: Tensor, start: Tensor | None = None) -> Tensor:
    """Solve for the mRNA levels at rest, shape ``(N, G)``, of mature RNA where splicing is modelled.

    Parameters
    ----------
    context
        Shape ``(N,)``, int64.
    start
        State to start from, shape ``(N, S)``; None: the steady state of control cells.
    """
    with torch.no_grad():
        if start is None:
            start = control_at_rest(dynamics)[context]
        solved = steady_state(dynamics.bind(acts, context), start)
        return dynamics.split(solved)["spliced" if dynamics.splicing else "mrna"]


def control_at_rest(dynamics: RegulatoryDynamics) -> Tensor:
    """Solve for the state of control cells in each context, shape ``(K, S)``."""
    with torch.no_grad():
        contexts = torch.arange(len(dynamics.bias), device=dynamics.bias.device)
        return steady_state(dynamics.bind(None, contexts), dynamics.control_state)


class RestMap:
    """F for the rows of `acts`.

    Parameters
    ----------
    dynamics, acts
        The kinetics, and the interventions on N rows.
    context
        Shape ``(N,)``, int64.

    Attributes
    ----------
    regulator, target
        Shape ``(E,)``, int64: the genes at both ends of each edge. With a low-rank W, all pairs with a regulator.
    function
        Shape ``(N, G)``: η, 1 without knockouts.
    """

    def __init__(self, dynamics: RegulatoryDynamics, acts: Interventions, context: Tensor) -> None:
        effects: Effects = acts.effects(math.inf, dynamics.activation_fold)
        self.dynamics = dynamics
        self.bias = dynamics.absolute_bias[context]
        capacity = dynamics.production[context] / dynamics.decay
        self.function = torch.ones_like(capacity) if effects.function is None else effects.function
        if effects.production is not None:
            capacity = capacity * effects.production
        added = torch.zeros_like(capacity)
        if effects.source is not None:
            added = effects.source * dynamics.gain * dynamics.reference
        if effects.hold is not None and effects.level is not None:
            capacity = capacity * (1 - effects.hold)
            added = added * (1 - effects.hold) + dynamics.reference * effects.level
        self.capacity, self.added = capacity, added
        self.weight: Tensor
        if dynamics.rank is None:
            self.target, source, self.weight = dynamics.target, dynamics.source, dynamics.weight
        else:
            among = (dynamics.left * dynamics.scale) @ dynamics.right
            self.target, source = torch.cartesian_prod(*(torch.arange(n, device=among.device) for n in among.shape)).T
            self.weight = among.reshape(-1)
        self.regulator = dynamics.regulators[source]

    def __call__(self, level: Tensor) -> Tensor:
        """F of levels ``(N, G)``."""
        return self.capacity * self.dynamics._regulation(level * self.function, self.bias) + self.added

    def slopes(self, level: Tensor) -> Tensor:
        """Derivative of F of each edge's target by the level *that it sees* of the regulator, shape ``(E, N)``.

        By the level itself it is this times `function` of the regulator.
        """
        active = (level * self.function).detach()
        with torch.enable_grad():
            # φ of a gene depends on this gene alone: one backward pass of the sum gives every φ'
            free = active.clone().requires_grad_()
            signal = self.dynamics._signal(free)
            steep = torch.autograd.grad(signal.sum(), free)[0] if signal.numel() else torch.zeros_like(active)
        steep = steep.T.index_select(0, self.regulator)  # (E, N)
        f = self.dynamics._regulation(active, self.bias).detach()
        weight = self.weight.detach()[:, None]
        if self.dynamics.kinetics == "multiplicative":
            bound = signal.detach().T.index_select(0, self.dynamics.source)
            on, off = torch.exp(weight.clamp(max=0)), torch.exp(-weight.clamp(min=0))
            return (self.capacity * f).T.index_select(0, self.target) * (on - off) / (bound * on + (1 - bound) * off) * steep
        return (self.capacity * f * (1 - f)).T.index_select(0, self.target) * weight * steep

    def push(self, values: Tensor, change: Tensor) -> Tensor:
        """Changes of regulators to those of targets: ``(E, N)`` values of edges and ``(G, N)`` -> ``(G, N)``."""
        return torch.zeros_like(change).index_add(0, self.target, values * change.index_select(0, self.regulator))

    def pull(self, values: Tensor, change: Tensor) -> Tensor:
        """The transpose of :meth:`push`."""
        return torch.zeros_like(change).index_add(0, self.regulator, values * change.index_select(0, self.target))
