r"""Fit the kinetics of a network to a screen's pseudobulks: candidate edges in, weights, basal levels and guide strengths out.

Two stages, both over all conditions at once, by Adam. With z the log of the levels over those of the controls and
:math:`F = P / D` the map whose fixed point is the steady state (:mod:`perturbzoo.grn.dynamics`, anchored):

1. *residual*: :math:`\hat z = \log F(e^{z}) ` at the **observed** levels. No solve; the rows of a condition's own targets are
   left out, because what a guide does to its gene says nothing of who regulates it.
2. *fixed point*: :math:`\hat z = \log F(e^{\hat z})`, so that noise of the regulators is no longer taken for signal. How much
   each guide does is fitted beside the weights, by what its own gene shows. Gradients by the implicit function theorem.

Counts are negative binomial: with the same mean :math:`\mu` in all n cells of a row, their likelihood depends on the counts by
their mean alone, :math:`n\,[\,\bar y \log \mu - (\bar y + 1/\alpha) \log(1 + \alpha \mu)\,]`. Without counts z is normal. The
controls are measured with error too: a shift u of each gene is shared by all conditions and by the controls.

An edge costs :math:`\lambda_{ij} |W_{ij}|`, with :math:`\lambda_{ij} = c \sqrt{I_{ij}}\,(1 - s\, p_{ij})`: I is the Fisher
information of the screen about that edge alone, so that c counts standard errors, and p the prior's probability. In its place gates
(Louizos, Welling and Kingma, ICLR 2018, https://arxiv.org/abs/1712.01312) switch edges on and off at the cost of their log odds.

How sure an edge is follows afterwards, for each on its own. With :math:`\tilde w = W - \nabla / I` the weight that the likelihood
alone would have (one Newton step), :math:`a = \sigma_w^2 I` and the prior odds of an edge,

.. math:: \log \frac{p}{1 - p} = \log \frac{\pi}{1 - \pi} + \frac{\tilde w^2 I}{2} \frac{a}{1 + a} - \frac12 \log(1 + a)

with :math:`\pi = p_{ij} / 2` for edges of the prior and two in the number of nodes for others, mixed by s. Where the weights of
a gene's candidates scatter by more than twice their standard errors, these are taken to be wider by as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.nn.utils import parametrize

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn.dynamics import KINETICS, Kinetics
from perturbzoo.grn.fitted import ABSENT, FAR, NO_DECAY, USUAL_STRENGTH, FittedNetwork
from perturbzoo.grn.gates import Gates
from perturbzoo.grn.interventions import Interventions
from perturbzoo.grn.levels import Levels
from perturbzoo.grn.network import GeneRegulatoryNetwork
from perturbzoo.grn.settling import settle

SMOOTH = 1e-3  # |W| is sqrt(W² + SMOOTH²): Adam needs a slope at 0


@dataclass(frozen=True)
class FitOptions:
    """How :func:`fit_network` fits.

    Attributes
    ----------
    kinetics
        Form of the regulation, of :mod:`perturbzoo.grn.dynamics`.
    penalty
        c: how many standard errors an edge must be worth.
    prior_strength
        s, in [0, 1]: at 0 the prior says nothing, at 1 its edges cost nothing.
    sparsity
        ``"l1"``, or ``"gates"``.
    sign_penalty
        Standard errors that a weight against the prior's sign costs more.
    stability
        Weight of the penalty on networks whose control state is not stable.
    residual_steps, fixed_point_steps
        Steps of the two stages.
    lr
        Adam's rate in the first stage; a third of it in the second. Both fall by a cosine.
    seed
        For what is drawn: gates.
    """

    kinetics: Kinetics = "hill"
    penalty: float = 2.0
    prior_strength: float = 0.9
    sparsity: Literal["l1", "gates"] = "l1"
    sign_penalty: float = 1.0
    stability: float = 1.0
    residual_steps: int = 100
    fixed_point_steps: int = 100
    lr: float = 0.06
    seed: int = 0

    def __post_init__(self) -> None:
        for holds, complaint in (
            (self.kinetics in KINETICS, f"kinetics='{self.kinetics}' is not one of {', '.join(KINETICS)}"),
            (self.penalty >= 0, f"penalty={self.penalty:g} must not be negative"),
            (0 <= self.prior_strength <= 1, f"prior_strength={self.prior_strength:g} lies outside [0, 1]"),
            (self.sparsity in ("l1", "gates"), f"sparsity='{self.sparsity}' is neither 'l1' nor 'gates'"),
            (min(self.sign_penalty, self.stability) >= 0, "sign_penalty and stability start at 0"),
            (self.residual_steps >= 1 and self.fixed_point_steps >= 0, "steps start at 1 (residual) and 0 (fixed point)"),
            (self.lr > 0, f"lr={self.lr:g} must be positive"),
        ):
            if not holds:
                raise PerturbZooError(f"network fit: {complaint}")


def fit_network(
    levels: Levels,
    candidates: GeneRegulatoryNetwork,
    options: FitOptions | None = None,
    *,
    report: Callable[[str, int, float], None] | None = None,
) -> FittedNetwork:
    """Fit weights, basal production and strengths of guides to a screen.

    Parameters
    ----------
    levels
        Pseudobulks of the training conditions.
    candidates
        Edges over the measured genes, in the order of `levels`, and the targets that are not measured; see
        :func:`perturbzoo.grn.candidates.candidate_network`. Their probabilities are the prior's, their signs the start's.
    report
        Called after every step with the stage, the step and the loss.

    Raises
    ------
    PerturbZooError
        The candidates' nodes do not begin with the measured genes, or the fit ended in values that are not finite.
    """
    chosen = options or FitOptions()
    if candidates.genes[: len(levels.genes)] != levels.genes:
        raise PerturbZooError("network fit: the candidates' nodes must begin with the genes of the levels, in their order")
    floor = 1e-6 * max(float(levels.control.mean()), 1e-12)
    fitted = FittedNetwork(
        candidates,
        len(levels.genes),
        np.maximum(levels.control, floor),
        sorted({(act.target, act.kind or levels.default_kind) for condition in levels.conditions for act in condition}),
        levels.default_kind,
        chosen.kinetics,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        _Fit(levels, fitted, chosen, report).run()
    return fitted


class _Fit:
    """One fit: the data as tensors, and the two stages."""

    def __init__(
        self,
        levels: Levels,
        fitted: FittedNetwork,
        options: FitOptions,
        report: Callable[[str, int, float], None] | None,
    ) -> None:
        self.fitted, self.options, self.report = fitted, options, report
        self.conditions = levels.conditions
        self.direction: Tensor | None = None  # in which small changes grow most, as of the last step
        self.encoded = fitted.encode(levels.conditions)
        self.context = torch.as_tensor(levels.context)
        self.change = torch.as_tensor(levels.change, dtype=torch.float32)
        self.error = torch.as_tensor(levels.error.copy(), dtype=torch.float32)
        self.control_error = torch.as_tensor(levels.control_error, dtype=torch.float32)
        self.row_weight = torch.as_tensor(levels.weight.copy(), dtype=torch.float32)[:, None]
        g, dynamics = fitted.measured, fitted.dynamics
        own = torch.zeros(len(levels.conditions), g, dtype=torch.bool)
        place = {name: number for number, name in enumerate(fitted.nodes[:g])}
        for row, condition in enumerate(levels.conditions):
            own[row, [place[target] for target in condition.targets if target in place]] = True
        self.free = (~own).float()
        self.counts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None
        if levels.unit is not None and levels.cells is not None and levels.dispersion is not None:
            level, control = (
                torch.as_tensor(part / levels.unit, dtype=torch.float32) for part in (levels.level, levels.control)
            )
            parts = (levels.cells.copy(), levels.control_cells, levels.dispersion)
            cells, control_cells, alpha = (torch.as_tensor(part, dtype=torch.float32) for part in parts)
            self.counts = level, control, cells, control_cells, alpha
        # observed state of all nodes: what is not measured rests at its level under the act
        with torch.no_grad():
            acts = fitted.interventions(self.encoded)
            reference = dynamics.control_level[self.context]
            production, decay = dynamics.bind(acts, self.context)(FAR, reference)
            self.observed = production / decay
            self.observed[:, :g] = reference[:, :g] * self.change.exp()
            self._start_strengths()
        self._prepare_penalty()

    def _start_strengths(self) -> None:
        """What a guide's own gene shows, network left out."""
        fitted = self.fitted
        shown: dict[tuple[str, str], list[float]] = {}
        place = {name: number for number, name in enumerate(fitted.nodes[: fitted.measured])}
        for row, condition in enumerate(self.conditions):
            for act in condition:
                if act.target in place:
                    key = act.target, act.kind or fitted.default_kind
                    shown.setdefault(key, []).append(float(self.change[row, place[act.target]]))
        for number, key in enumerate(fitted.acts):
            if key in shown:
                self._set_strength(number, float(np.mean(shown[key])))
            else:
                fitted.strength[number], fitted.own[number] = USUAL_STRENGTH.get(key[1], 0.0), NO_DECAY

    def _set_strength(self, number: int, change: float) -> None:
        """Let an act alone change its own gene's log level by `change`."""
        fitted, kind = self.fitted, self.fitted.acts[number][1]
        lost = min(max(-math.expm1(change), 0.02), 0.99)
        if kind == "knockout":
            fitted.strength[number], fitted.own[number] = USUAL_STRENGTH["knockout"], math.log(lost / (1 - lost))
        elif kind == "interference":
            fitted.strength[number] = math.log(lost / (1 - lost))
        elif kind in ("activation", "overexpression"):
            dynamics = fitted.dynamics
            scale = float((dynamics.activation_fold[0] - 1) if kind == "activation" else dynamics.gain[0])
            fitted.strength[number] = math.log(math.expm1(max(change, 0.05)) / scale)

    def _prepare_penalty(self) -> None:
        """λ of each edge from the information of the screen about it."""
        fitted, dynamics = self.fitted, self.fitted.dynamics
        with torch.no_grad():
            signal = dynamics._signal(self._active(fitted.interventions(self.encoded), self.observed))
            base = dynamics._signal(dynamics.control_level)[self.context]
            spread = (signal - base) ** 2  # (N, R)
            slope = 0.25 if dynamics.kinetics != "multiplicative" else 1.0
            nodes = len(fitted.nodes)
            weight = self.change.new_zeros(len(self.change), nodes)
            weight[:, : fitted.measured] = self.row_weight * self.free / (self.error**2 + self.control_error[self.context] ** 2)
            table = slope * weight.T @ spread  # (nodes, R)
            information = table[dynamics.target, dynamics.source]
            usual = information[information > 0]
            middle = usual.median() if len(usual) else torch.tensor(1.0)
            # of what never moved nothing is known: it costs what an edge usually costs
            fitted.information.copy_(torch.where(information > 1e-3 * middle, information, middle))
        self.price = fitted.information.sqrt() * (1 - self.options.prior_strength * fitted.prior)
        signs = torch.as_tensor(fitted.candidates.sign, dtype=torch.float32)
        self.expected_sign = torch.where(fitted.prior > 0, signs, torch.zeros_like(signs))

    def _active(self, acts: Interventions, state: Tensor) -> Tensor:
        """Levels as the targets of each gene see them."""
        function = acts.effects(FAR, self.fitted.dynamics.activation_fold).function
        return state if function is None else state * function

    # ------------------------------------------------------------------ the two stages

    def run(self) -> None:
        fitted, options, dynamics = self.fitted, self.options, self.fitted.dynamics
        gate = None
        if options.sparsity == "gates":
            gate = Gates((0.5 * fitted.prior).clamp(2 / len(fitted.nodes), 0.9))
            signs = torch.where(dynamics.weight >= 0, 1.0, -1.0)
            dynamics.weight.data = 0.1 * signs
            parametrize.register_parametrization(dynamics, "weight", gate)
        self.gate = gate
        kinetic = [dynamics.bias, dynamics.weight]
        if gate is not None:
            # the parameter behind the gated weight, and how far its gates are open
            kinetic = [parameter for name, parameter in dynamics.named_parameters() if "weight" in name or name == "bias"]
        for parameter in (*kinetic, fitted.strength, fitted.own):
            parameter.requires_grad_(True)
        self._descend("residual", [*kinetic, fitted.strength], options.residual_steps, options.lr, self._residual_loss)
        if options.fixed_point_steps:
            fitted.shift.requires_grad_(True)
            self.start: Tensor | None = None
            with torch.no_grad():
                self._strengths_given_network()
            everything = [*kinetic, fitted.strength, fitted.own, fitted.shift]
            self._descend("fixed point", everything, options.fixed_point_steps, options.lr / 3, self._fixed_point_loss)
            fitted.shift.requires_grad_(False)
        if gate is not None:
            gate.eval()
            parametrize.remove_parametrizations(dynamics, "weight", leave_parametrized=True)
        self._judge(gate)
        for parameter in fitted.parameters():
            parameter.requires_grad_(False)
            if not bool(torch.isfinite(parameter).all()):
                raise PerturbZooError("network fit: the parameters are no longer finite; lower lr, or raise penalty")

    def _judge(self, gate: Gates | None) -> None:
        """Posterior probabilities and mean weights; then drop from the kinetics what is no edge."""
        fitted, dynamics = self.fitted, self.fitted.dynamics
        information = fitted.information
        weight = dynamics.weight.detach().clone()
        if gate is None:
            loss = self._fixed_point_loss() if self.options.fixed_point_steps else self._residual_loss()
            (slope,) = torch.autograd.grad(loss, dynamics.weight)
            chance = fitted.posterior(slope, self.options.prior_strength)
        else:
            chance = gate.chance().detach()
        with torch.no_grad():
            fitted.probability.copy_(chance)
            fitted.estimate.copy_(chance * weight)
            dynamics.weight[weight.abs() * information.sqrt() <= ABSENT] = 0

    def _descend(self, stage: str, parameters: list[Tensor], steps: int, lr: float, loss: Callable[[], Tensor]) -> None:
        optimizer = torch.optim.Adam(parameters, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lr / 30)
        best, kept = math.inf, [parameter.detach().clone() for parameter in parameters]
        for step in range(steps):
            optimizer.zero_grad()
            with parametrize.cached():  # the same gates everywhere in a step
                total = loss() + self._penalties() + self._prior_of_strength()
            total.backward()
            if float(total.detach()) < best:
                best, kept = float(total.detach()), [parameter.detach().clone() for parameter in parameters]
            optimizer.step()
            schedule.step()
            if self.report is not None:
                self.report(stage, step, float(total.detach()))
        # where feedback is strong the fixed points may run away: back to the best of the way
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)

    def _penalties(self) -> Tensor:
        fitted, options, dynamics = self.fitted, self.options, self.fitted.dynamics
        weight = dynamics.weight
        if self.gate is None:
            total = options.penalty * (self.price * torch.sqrt(weight**2 + SMOOTH**2)).sum()
        else:
            total = self.gate.cost() + 0.05 * weight.square().sum()
        against = torch.relu(-self.expected_sign * weight)
        total = total + options.sign_penalty * (fitted.information.sqrt() * against).sum()
        total = total + 2 * dynamics.bias.square().sum()
        if options.stability > 0:
            total = total + options.stability * len(self.conditions) * torch.relu(self._growth() - 0.98).square().sum() * 1e2
        return total

    def _growth(self, count: int = 3) -> Tensor:
        """By how much small changes of the control state grow in a half-damped step of the map, ``(K,)``."""
        dynamics = self.fitted.dynamics
        rates = dynamics.bind(None, torch.arange(len(dynamics.control_level)))
        reference = dynamics.control_level
        small = 1e-2
        if self.direction is None:
            self.direction = torch.randn(reference.shape)
        direction = self.direction / self.direction.norm(dim=1, keepdim=True)
        size = direction.new_zeros(len(reference), 1)
        for _ in range(count):
            production, decay = rates(FAR, reference * torch.exp(small * direction))
            pushed = 0.5 * direction + 0.5 * torch.log(production / decay / reference) / small
            norm = pushed.norm(dim=1, keepdim=True)
            size, direction = size + torch.log(norm + 1e-12), pushed / (norm + 1e-12)
        self.direction = direction.detach()
        return torch.exp(size / count)[:, 0]

    def _residual_loss(self) -> Tensor:
        fitted, dynamics, g = self.fitted, self.fitted.dynamics, self.fitted.measured
        rates = dynamics.bind(fitted.interventions(self.encoded), self.context)
        production, decay = rates(FAR, self.observed)
        found = torch.log(production / decay)[:, :g] - torch.log(dynamics.control_level[self.context][:, :g])
        spread = self.error**2 + self.control_error[self.context] ** 2
        return 0.5 * (self.row_weight * self.free * (self.change - found) ** 2 / spread).sum()

    def _fixed_point_loss(self) -> Tensor:
        fitted, dynamics, g = self.fitted, self.fitted.dynamics, self.fitted.measured
        acts = fitted.interventions(self.encoded)
        z, self.start = settle(dynamics, acts, self.context, self.start)
        found = z[:, :g]
        shift = fitted.shift[self.context]
        if self.counts is None:
            fit = 0.5 * (self.row_weight * ((self.change - found - shift) / self.error) ** 2).sum()
            return fit + 0.5 * ((fitted.shift / self.control_error) ** 2).sum()
        level, control, cells, control_cells, alpha = self.counts
        base = torch.log(control.clamp(min=1e-6))
        fit = (self.row_weight * cells * _deviance(level, base[self.context] + shift + found, alpha)).sum()
        return fit + (control_cells * _deviance(control, base + fitted.shift, alpha)).sum()

    def _prior_of_strength(self) -> Tensor:
        """Weak: what the data do not show stays near what is usual."""
        fitted = self.fitted
        usual = torch.tensor([USUAL_STRENGTH.get(kind, 0.0) for _, kind in fitted.acts])
        tight = torch.tensor([1.0 if kind == "knockout" else 0.05 for _, kind in fitted.acts])
        return 0.5 * (tight * (fitted.strength - usual) ** 2).sum() + 0.005 * ((fitted.own - NO_DECAY) ** 2).sum()

    def _strengths_given_network(self) -> None:
        """Of each guide whose gene is measured: what is left of its own gene's change after the network's part of it."""
        fitted, g = self.fitted, self.fitted.measured
        production, decay = fitted.dynamics.bind(None, self.context)(FAR, self.observed)
        network = torch.log(production / decay / fitted.dynamics.control_level[self.context])[:, :g]
        place = {name: number for number, name in enumerate(fitted.nodes[:g])}
        left: dict[int, list[float]] = {}
        for row, condition in enumerate(self.conditions):
            for act in condition:
                key = act.target, act.kind or fitted.default_kind
                if act.target in place and key in fitted.place:
                    left.setdefault(fitted.place[key], []).append(float((self.change - network)[row, place[act.target]]))
        for number, values in left.items():
            self._set_strength(number, float(np.mean(values)))


def _deviance(mean: Tensor, log_mean: Tensor, alpha: Tensor) -> Tensor:
    """Negative log likelihood per cell of negative binomial counts of average `mean`, less its least value."""
    least = (mean + 1 / alpha) * torch.log1p(alpha * mean) - torch.xlogy(mean, mean)
    return (mean + 1 / alpha) * softplus(log_mean + torch.log(alpha)) - mean * log_mean - least
