r"""Several copies of a model from different initial weights, averaged: smaller variance, and an idea of the error.

Lakshminarayanan, Pritzel and Blundell, NeurIPS 2017, https://arxiv.org/abs/1612.01474. With members :math:`f_m`,
:math:`m = 1 \dots M`, each with its own predicted variance :math:`v_m` (0 where a member gives none),

.. math:: \hat\delta = \bar f, \qquad \hat v = \frac{1}{M-1} \sum_m (f_m - \bar f)^2 + \bar v,

and with shrinkage :math:`\hat\delta = b + a (\bar f - b)` towards the training mean :math:`b`, where :math:`a \in [0, 1]`
minimises the squared error of the validation conditions: a guard against members that are right in direction and wrong
in size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from perturbzoo.data.batch import ConditionTable, PerturbationBatch
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.pseudobulk import Pseudobulks
from perturbzoo.models import find_model
from perturbzoo.models.base import PerturbationModel, Prediction
from perturbzoo.models.known import TrainingDeltas


class Ensemble(PerturbationModel):
    """Train M members at once, on the same batches, and predict their mean.

    Parameters
    ----------
    model
        Name of the members' class: any model of the zoo that is trained by steps.
    arguments
        The members' arguments, such as ``{hidden: 64}``.
    members
        Number of members M, 2 or more.
    shrink
        Shrink towards the training mean by the factor that is best on the validation conditions. Not refitted on anything
        else.
    """

    shrinkage: Tensor

    def __init__(
        self, model: str = "GEARS", arguments: dict[str, Any] | None = None, members: int = 5, shrink: bool = True
    ) -> None:
        super().__init__()
        if members < 2:
            raise PerturbZooError(f"an ensemble of {members} members: give 2 or more")
        self.save_hyperparameters()
        # each member has its own optimiser and schedule
        self.automatic_optimization = False
        find_model(model)
        self.members = nn.ModuleList()
        self.register_buffer("shrinkage", torch.ones(()))

    def _new_member(self) -> PerturbationModel:
        # not in the constructor: while the command line constructs a model, every hyper-parameter saved is the outer one's
        member: PerturbationModel = find_model(self.hparams["model"])(**(self.hparams["arguments"] or {}))
        if not member.automatic_optimization:
            raise PerturbZooError(
                f"Ensemble: {self.hparams['model']} does not leave its steps to Lightning; members are models trained by steps"
            )
        member.spec, member.prepared = self.spec, self.prepared
        return member

    def _all(self) -> list[PerturbationModel]:
        return [member for member in self.members if isinstance(member, PerturbationModel)]

    def prepare(self, data: PerturbSeqDataModule) -> dict[str, Any]:
        return self._new_member().prepare(data)

    def build(self) -> None:
        self.members = nn.ModuleList(self._new_member() for _ in range(self.hparams["members"]))
        for member in self._all():
            member.configure_model()
        self.known = TrainingDeltas(self.get_spec())

    @property
    def target_names(self) -> tuple[str, ...]:
        return (self._all() or [self._new_member()])[0].target_names

    @property
    def predicts_variance(self) -> bool:
        return True

    def parameter_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {
            f"members.{position}.{name}": axes
            for position, member in enumerate(self._all())
            for name, axes in member.parameter_axes().items()
        }

    def on_fit_start(self) -> None:
        self.known.fit(self.data.training_pseudobulks())
        for member in self._all():
            member.trainer = self.trainer
            member.on_fit_start()

    def configure_optimizers(self) -> Any:
        made: list[Any] = [member.configure_optimizers() for member in self._all()]
        optimizers = [item["optimizer"] if isinstance(item, dict) else item for item in made]
        schedules = [item["lr_scheduler"] for item in made if isinstance(item, dict) and "lr_scheduler" in item]
        return optimizers, schedules

    def training_step(self, batch: PerturbationBatch, batch_idx: int) -> None:  # type: ignore[override]
        totals: dict[str, Tensor] = {}
        optimizers: Any = self.optimizers()
        for member, optimizer in zip(self._all(), optimizers, strict=True):
            terms = member.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(torch.stack(list(terms.values())).sum())
            optimizer.step()
            for name, value in terms.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach() / len(self.members)
        self.log_dict(
            {f"train/{name}": value for name, value in totals.items()}, batch_size=len(batch), on_epoch=True, on_step=False
        )
        self.log("train/loss", torch.stack(list(totals.values())).sum(), batch_size=len(batch), on_epoch=True, on_step=True)

    def on_train_epoch_end(self) -> None:
        schedules: Any = self.lr_schedulers() or []
        for schedule in schedules if isinstance(schedules, list) else [schedules]:
            schedule.step()

    def loss(self, batch: PerturbationBatch) -> dict[str, Tensor]:
        """Mean of the members' losses."""
        each = [member.loss(batch) for member in self._all()]
        return {name: torch.stack([terms[name] for terms in each]).mean() for name in each[0]}

    @property
    def handles_dose(self) -> bool:
        return (self._all() or [self._new_member()])[0].handles_dose

    @property
    def changes_cells_alike(self) -> bool:
        return all(member.changes_cells_alike for member in self._all())

    @property
    def keeps_cell_noise(self) -> bool:
        return all(member.keeps_cell_noise for member in self._all())

    def delta(self, table: ConditionTable, context_control: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._together([member.delta(table, context_control) for member in self._all()], self._mean_change(table))

    def forward(self, batch: PerturbationBatch) -> Prediction:
        predictions = [member(batch) for member in self._all()]
        centre = batch.control + self._mean_change(batch.table)[batch.row]
        return Prediction(*self._together([(prediction.mean, prediction.variance) for prediction in predictions], centre))

    def _mean_change(self, table: ConditionTable) -> Tensor:
        return self.known.mean_weights(table) @ self.known.value

    def _together(self, predicted: list[tuple[Tensor, Tensor | None]], centre: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over members, ``(N, G)`` each; the mean is shrunk towards `centre` ``(N, G)``."""
        means = torch.stack([mean for mean, _ in predicted])  # (M, N, G)
        own = [variance for _, variance in predicted if variance is not None]
        variance = means.var(dim=0) + (torch.stack(own).mean(dim=0) if own else 0.0)
        mean = means.mean(dim=0)
        if self.hparams["shrink"]:
            mean = centre + self.shrinkage * (mean - centre)
        return mean, variance

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        if self.trainer.state.fn == "fit":
            self.shrinkage.fill_(1.0)

    def calibrate(self, bulks: Pseudobulks) -> Pseudobulks:
        """Fit the shrinkage to the validation pseudobulks, and return them as they are predicted with it."""
        if not self.hparams["shrink"]:
            return super().calibrate(bulks)
        table = self.data.table.select(torch.from_numpy(bulks.pair)).to(self.device)
        weights = self.known.mean_weights(table).double()
        centre = bulks.control + (weights @ self.known.value.double()).cpu().numpy()
        moved = bulks.predicted - centre
        size = float((moved**2).sum())
        factor = float((moved * (bulks.observed - centre)).sum()) / size if size > 0 else 1.0
        self.shrinkage.fill_(min(max(factor, 0.0), 1.0))
        shrunk = centre + float(self.shrinkage) * moved
        return super().calibrate(replace(bulks, predicted=shrunk))
