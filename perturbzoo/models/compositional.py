"""The parts of a compositional model: dose responses, vectors of covariates, adversaries and their gradient penalty."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbzoo.data.batch import PerturbationBatch
from perturbzoo.data.spec import DataSpec
from perturbzoo.perturbation import parse_condition

_HIDDEN = 8  # units of a dose response 'mlp'


class DoseResponse(nn.Module):
    r"""How strongly an intervention acts at its dose: one function for each target, 0 at dose 0.

    With :math:`u` the dose divided by `unit`:

    - ``logsigm``: :math:`c\, (\sigma(\beta \log(1 + u) + b) - \sigma(b))`, :math:`c = 1 / (\sigma(\log 2) - 1/2)`;
    - ``sigm``: :math:`c\, (\sigma(\beta u + b) - \sigma(b))`, :math:`c = 1 / (\sigma(1) - 1/2)`;
    - ``linear``: :math:`u`;
    - ``mlp``: :math:`\sum_i w_i (\tanh(\beta_i \log(1 + u) + b_i) - \tanh(b_i))`.

    It starts at 1 for :math:`u = 1` (``mlp``: near it). Parameters are a common one plus the target's own, which an untrained target
    lacks: it responds as targets do.

    Parameters
    ----------
    kind
        Which of these.
    trained
        Shape ``(T,)``, bool: which targets were perturbed in training.
    unit
        The dose that counts as one.
    """

    has_own: Tensor

    def __init__(self, kind: Literal["logsigm", "sigm", "linear", "mlp"], trained: Tensor, unit: float = 1.0) -> None:
        super().__init__()
        self.kind, self.unit = kind, unit
        units = _HIDDEN if kind == "mlp" else 1
        if kind == "linear":
            return
        # slopes, offsets and, for an mlp, weights
        slope, offset = torch.ones(units), torch.zeros(units)
        start = [slope, offset]
        if kind == "mlp":
            slope, offset = torch.linspace(0.25, 2, units), torch.linspace(-1, 1, units)
            rise = torch.tanh(slope * math.log(2) + offset) - torch.tanh(offset)
            start = [slope, offset, 1 / (units * rise)]
        self.common = nn.Parameter(torch.cat(start))
        self.own = nn.Parameter(torch.zeros(len(trained), len(self.common)))
        self.register_buffer("has_own", trained[:, None].float(), persistent=False)

    def forward(self, targets: Tensor, dose: Tensor) -> Tensor:
        """Strength of targets ``(...)`` at doses ``(...)``."""
        u = dose / self.unit
        if self.kind == "linear":
            return u
        parameters = self.common + (self.own * self.has_own)[targets]  # (..., n)
        if self.kind == "mlp":
            slope, offset, weight = parameters.chunk(3, dim=-1)
            rise = torch.tanh(slope * torch.log1p(u)[..., None] + offset) - torch.tanh(offset)
            return (weight * rise).sum(dim=-1)
        slope, offset = parameters.unbind(dim=-1)
        at_one = math.log(2) if self.kind == "logsigm" else 1.0
        u = torch.log1p(u) if self.kind == "logsigm" else u
        gain = 1 / (1 / (1 + math.exp(-at_one)) - 0.5)
        return gain * (torch.sigmoid(slope * u + offset) - torch.sigmoid(offset))


class CovariateVectors(nn.Module):
    """One vector for each level of each covariate, added up; a level never trained, or unknown, has the trained ones' mean.

    Parameters
    ----------
    trained
        For each covariate, which of its levels have training cells, bool. A covariate of one level says nothing: it has none.
    width
        Length L of a vector.
    """

    def __init__(self, trained: list[Tensor], width: int) -> None:
        super().__init__()
        self.width = width
        self.columns = [column for column, levels in enumerate(trained) if len(levels) > 1]
        self.tables = nn.ModuleList(nn.Embedding(len(trained[column]), width) for column in self.columns)
        for number, (table, column) in enumerate(zip(self.tables, self.columns, strict=True)):
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.1)
            self.register_buffer(f"trained_{number}", trained[column], persistent=False)

    def forward(self, covariates: Tensor) -> Tensor:
        """Shape ``(B, L)`` for levels ``(B, V)``."""
        total = torch.zeros(len(covariates), self.width, device=covariates.device)
        for number, column in enumerate(self.columns):
            trained, weight = self.get_buffer(f"trained_{number}"), self.get_parameter(f"tables.{number}.weight")
            mean = trained.float() @ weight / trained.sum().clamp(min=1)
            known = torch.where(trained[:, None], weight, mean)
            # -1, an unknown level, picks the last row
            total = total + torch.cat([known, mean[None]])[covariates[:, column]]
        return total


class Adversary(nn.Module):
    """Classifiers that read a cell's labels from its basal state.

    Parameters
    ----------
    width
        Length L of a basal state.
    classes
        Number of classes of each label; one with a single class is not read.
    norms
        Normalisation, as arguments of scvi-tools' ``FCLayers``.
    """

    def __init__(self, width: int, classes: list[int], norms: dict[str, Any], hidden: int = 64) -> None:
        from scvi.nn import FCLayers  # seconds, which '--help' has no use for

        super().__init__()
        self.columns = [column for column, size in enumerate(classes) if size > 1]
        self.classifiers = nn.ModuleList(
            nn.Sequential(
                FCLayers(width, hidden, n_layers=2, n_hidden=hidden, dropout_rate=0.1, **norms),
                nn.Linear(hidden, classes[column]),
            )
            for column in self.columns
        )

    def forward(self, basal: Tensor) -> dict[int, Tensor]:
        """Logits of each label that is read, by its position."""
        return {column: classifier(basal) for column, classifier in zip(self.columns, self.classifiers, strict=True)}

    def frozen(self, basal: Tensor) -> dict[int, Tensor]:
        """The same numbers, whose gradient reaches `basal` and none of the classifiers' parameters."""
        parameters = {name: value.detach() for name, value in self.named_parameters()}
        return torch.func.functional_call(self, parameters, (basal,))


def soft_cross_entropy(logits: dict[int, Tensor], labels: list[Tensor]) -> Tensor:
    """Sum over labels of the mean over cells of the cross entropy.

    Parameters
    ----------
    logits
        Shape ``(B, classes)`` for some labels, by position.
    labels
        Shape ``(B, classes)``: a distribution over the classes of each cell, zeros where nothing is known.
    """
    terms = [-(labels[column] * functional.log_softmax(values, dim=1)).sum(dim=1).mean() for column, values in logits.items()]
    return torch.stack(terms).sum()


def gradient_penalty(adversary: nn.Module, basal: Tensor) -> Tensor:
    """Sum over labels of the mean over cells of the squared gradient of the summed logits by the basal state ``(B, L)``.

    It keeps adversaries smooth, so that the encoder has a slope to follow. The encoder gets no gradient of it.
    """
    with torch.enable_grad():
        point = basal.detach().requires_grad_()
        penalties = []
        for logits in adversary(point).values():
            (slope,) = torch.autograd.grad(logits.sum(), point, create_graph=True)
            penalties.append(slope.square().sum(dim=1).mean())
    return torch.stack(penalties).sum()


def linear_information(basal: Tensor, group: Tensor) -> Tensor:
    r"""What the best linear classifier knows of a cell's group, in nats: an adversary solved exactly.

    With the covariance of the basal states of all cells, :math:`S_t`, and that within groups, :math:`S_w`, it is
    :math:`\tfrac12 \log(|S_t| / |S_w|)`, which for groups of one Gaussian shape is the mutual information of state and group as far
    as states are Gaussian (minus the log of Wilks' lambda, halved). It is 0 where all groups have the same mean, and does not
    change with any invertible linear map of the states.

    Parameters
    ----------
    basal
        Shape ``(B, L)``.
    group
        Shape ``(B,)``, int64.
    """
    _, group = torch.unique(group, return_inverse=True)
    basal = basal.float() - basal.float().mean(dim=0)
    n = torch.bincount(group)
    means = basal.new_zeros(len(n), basal.shape[1]).index_add_(0, group, basal) / n[:, None]
    within = basal - means[group]
    total, within = basal.T @ basal / len(basal), within.T @ within / len(basal)
    # states may lie in a subspace: a thousandth of their variance in every direction
    ridge = 1e-3 * total.detach().diagonal().mean().clamp(min=1e-8) * torch.eye(len(total), device=basal.device)
    return 0.5 * (torch.logdet(total + ridge) - torch.logdet(within + ridge))


def choose_controls(batch: PerturbationBatch, share: float) -> Tensor:
    """Positions of some of the batch's controls, evenly spread, because cells may stand condition after condition."""
    n = min(len(batch), max(1, round(share * len(batch))))
    return torch.arange(n, device=batch.row.device) * len(batch) // n


def with_controls(batch: PerturbationBatch, chosen: Tensor, matched: Tensor) -> PerturbationBatch:
    """The batch's perturbed cells and its `chosen` controls as cells, of which the latter point to row C.

    Parameters
    ----------
    batch, chosen
        B cells of C pairs, and positions ``(n,)`` of controls.
    matched
        Shape ``(V,)``, bool: the covariates that a control shares with its cell; others are unknown.
    """
    return replace(
        batch,
        expression=torch.cat([batch.observed, batch.control[chosen]]),
        row=torch.cat([batch.row, batch.row.new_full((len(chosen),), len(batch.table))]),
        size_factor=torch.cat([batch.size_factor, batch.control_size_factor[chosen]]),
        covariates=torch.cat([batch.covariates, torch.where(matched, batch.covariates[chosen], -1)]),
    )


def adversary_labels(cells: PerturbationBatch, n_targets: int, sizes: list[int]) -> list[Tensor]:
    """What adversaries are to read: distributions over targets and control ``(B, T + 1)``, and over levels of covariates.

    A combination is evenly shared among its targets, row C is control. Nothing is to be read where a covariate is unknown.
    """
    table = cells.table
    act = (table.present & (table.dose > 0)).float()
    classes = act.new_zeros(len(table) + 1, n_targets + 1)
    classes[:-1].scatter_add_(1, table.targets.clamp(min=0), act / act.sum(dim=1, keepdim=True).clamp(min=1))
    classes[:, -1] = 1 - classes.sum(dim=1)
    levels = [
        functional.one_hot(level.clamp(min=0), size) * (level >= 0)[:, None]
        for level, size in zip(cells.covariates.unbind(dim=1), sizes, strict=True)
    ]
    return [classes[cells.row], *(level.float() for level in levels)]


def median_dose(spec: DataSpec) -> float:
    """Median of the training interventions' doses above 0; 1 where there are none."""
    doses = [act.dose for text, _ in spec.training_pairs for act in parse_condition(text) if act.dose > 0]
    return sorted(doses)[len(doses) // 2] if doses else 1.0


def trained_levels(spec: DataSpec) -> list[Tensor]:
    """For each covariate which of its levels training cells have, bool; all where controls are not matched on it."""
    contexts = {spec.contexts[context] for _, context in spec.training_pairs}
    trained = []
    for name, levels in spec.covariates.items():
        seen = {context[spec.match_on.index(name)] for context in contexts} if name in spec.match_on else set(levels)
        trained.append(torch.tensor([level in seen for level in levels]))
    return trained
