r"""Simple baselines that the literature says are hard to beat, on the same path as every other model.

All predict ``delta = W Y`` with :math:`Y` the ``(P, G)`` deltas of the training pairs and a rule for the ``(C, P)`` weights
:math:`W`; fitting is one pass over the training cells that takes their means.

- :class:`NoChange`: :math:`\hat\delta = 0`.
- :class:`TrainingMean`: :math:`\hat\delta = \bar\delta`, the mean over training pairs (Csendes et al., BMC Genomics 2025).
- :class:`MatchingMean`: the average of the singles of a combination (Viñas Torné et al., *Systema*, 2025).
- :class:`Additive`: their sum (Ahlmann-Eltze, Huber and Anders, Nature Methods 2025).
- :class:`Bilinear`: :math:`\hat\delta = G W p + b` (the same paper's linear model).
- :class:`Ridge`, :class:`KNN`: regression of deltas on target embeddings.

Where controls are matched in several contexts, a pair of the same context is preferred; else all contexts are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from perturbzoo.data.batch import ConditionTable, PerturbationBatch
from perturbzoo.data.datamodule import PerturbSeqDataModule, TrainingPseudobulks
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.base import ConditionDeltaModel
from perturbzoo.models.embedding import embed_targets, pseudobulk_pca
from perturbzoo.models.known import TrainingDeltas


class Baseline(ConditionDeltaModel):
    """A closed-form model; a subclass writes :meth:`weights`. One epoch of ``fit`` is all it needs."""

    known: TrainingDeltas

    def __init__(self) -> None:
        super().__init__()
        # there is nothing to optimise: the closed form is solved when fit starts
        self.automatic_optimization = False

    def build(self) -> None:
        self.known = TrainingDeltas(self.get_spec())

    def fit_closed_form(self, spec: DataSpec, bulks: TrainingPseudobulks, prepared: dict[str, Any] | None = None) -> None:
        """Fit without a trainer; what is in `prepared` takes the place of what :meth:`prepare_from` computes."""
        self.spec = spec
        self.prepared = {**self.prepare_from(spec, bulks), **(prepared or {})}
        self._built = False
        self.configure_model()
        self.known.fit(bulks)

    def prepare(self, data: PerturbSeqDataModule) -> dict[str, Any]:
        return self.prepare_from(self.get_spec(), data.training_pseudobulks(), data)

    def prepare_from(
        self, spec: DataSpec, bulks: TrainingPseudobulks, data: PerturbSeqDataModule | None = None
    ) -> dict[str, Any]:
        """What beside the deltas goes into the checkpoint: embeddings."""
        return {}

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.world_size > 1:
            raise PerturbZooError(
                f"{type(self).__name__} is solved in closed form, by one process: fit it with --trainer.devices 1 "
                "(validate and test take any number)"
            )
        super().setup(stage)

    def on_fit_start(self) -> None:
        self.known.fit(self.data.training_pseudobulks())

    def training_step(self, batch: PerturbationBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Nothing: the fit is done."""

    def loss(self, batch: PerturbationBatch) -> dict[str, Tensor]:
        prediction = self(batch)
        return {"mse": (prediction.mean - batch.observed).square().mean()}

    def configure_optimizers(self) -> None:
        return None

    def weights(self, table: ConditionTable) -> Tensor:
        """Shape ``(C, P)``: the weight of each training pair's delta in each prediction."""
        raise NotImplementedError

    def delta(self, table: ConditionTable, context_control: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.weights(table) @ self.known.value, None


class NoChange(Baseline):
    """Predict the control cells themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()

    def weights(self, table: ConditionTable) -> Tensor:
        return self.known.value.new_zeros(len(table), len(self.known))


class TrainingMean(Baseline):
    """Predict the mean delta of the training pairs, each counted once, whatever the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()

    @property
    def handles_dose(self) -> bool:
        return False

    def weights(self, table: ConditionTable) -> Tensor:
        return self.known.mean_weights(table)


class MatchingMean(Baseline):
    """Average the deltas of a condition's targets; a target never perturbed alone counts as the mean training pair."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()

    def weights(self, table: ConditionTable) -> Tensor:
        return self.known.single_weights(table, average=True, mean_for_missing=True)


class Additive(Baseline):
    """Add the deltas of a condition's targets.

    Parameters
    ----------
    mean_for_missing
        Let a target never perturbed alone contribute the mean delta of the training singles, so that an unseen single gets
        the training mean; the paper, which tests doubles of seen singles only, leaves it open. Otherwise it adds nothing.
    """

    def __init__(self, mean_for_missing: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()

    def weights(self, table: ConditionTable) -> Tensor:
        return self.known.single_weights(table, average=False, mean_for_missing=self.hparams["mean_for_missing"])


class EmbeddingBaseline(Baseline):
    """A baseline on target embeddings: a condition is the sum of its targets' vectors.

    A condition with a target that has no vector gets the training mean. Doses above 0 count as one.
    """

    vectors: Tensor
    has_vector: Tensor

    @property
    def handles_dose(self) -> bool:
        return False

    def prepare_from(
        self, spec: DataSpec, bulks: TrainingPseudobulks, data: PerturbSeqDataModule | None = None
    ) -> dict[str, Any]:
        return embed_targets(self.hparams["embedding"], self.hparams["dimension"], spec, bulks, data)

    def build(self) -> None:
        super().build()
        self.register_buffer("vectors", self.prepared["vectors"], persistent=False)
        self.register_buffer("has_vector", self.prepared["usable"], persistent=False)

    @property
    def target_names(self) -> tuple[str, ...]:
        return (*self.get_spec().targets, *self.prepared["extra"])

    def embed(self, table: ConditionTable) -> tuple[Tensor, Tensor]:
        """Shape ``(C, K)``: sum of the targets' vectors; and ``(C,)`` bool: whether every target has one."""
        acts = table.present & (table.dose > 0)
        # a screen that is only tested may name targets beyond the model's: they have no vector
        named = (table.targets >= 0) & (table.targets < len(self.vectors))
        index = torch.where(named, table.targets, 0)
        vector = (self.vectors[index] * acts[..., None]).sum(dim=1)
        return vector, (named & self.has_vector[index] | ~acts).all(dim=1)

    def groups(self, table: ConditionTable) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """One regression for each context: rows of `table` and their vectors, training pairs and theirs, in float64.

        A context without usable training pairs learns from those of all contexts. Rows that cannot be embedded are in no
        group.
        """
        condition, known = self.embed(table)
        training, usable = self.embed(self.known.table.to(self.vectors.device))
        context = self.known.table.context.to(self.vectors.device)
        if not usable.any():
            return
        for wanted in table.context[known].unique():
            same = usable & (context == wanted)
            rows = torch.nonzero(known & (table.context == wanted)).ravel()
            columns = torch.nonzero(same if same.any() else usable).ravel()
            yield rows, condition[rows].double(), columns, training[columns].double()

    def weights(self, table: ConditionTable) -> Tensor:
        weights = self.known.mean_weights(table)
        for rows, condition, columns, training in self.groups(table):
            weights[rows] = 0.0
            weights[rows[:, None], columns] = self.regress(condition, training).to(weights)
        return weights

    def regress(self, condition: Tensor, training: Tensor) -> Tensor:
        """Weights ``(C, P)`` of the training pairs for conditions ``(C, K)``, given the pairs' vectors ``(P, K)``."""
        raise NotImplementedError


class Bilinear(EmbeddingBaseline):
    r"""The linear model of Ahlmann-Eltze, Huber and Anders: :math:`\hat\delta = G W p + b`.

    With :math:`Y` the ``(G, P)`` training deltas, :math:`b` their mean over pairs, :math:`G` gene embeddings ``(G, K)``
    and :math:`P` the targets' embeddings ``(K, P)``,

    .. math:: W = (G^\top G + \lambda I)^{-1} G^\top (Y - b) P^\top (P P^\top + \lambda I)^{-1}.

    Parameters
    ----------
    embedding
        Target embedding: ``pca`` (rows of the gene embedding, so measured targets only) or any other that
        :mod:`perturbzoo.models.embedding` makes.
    dimension
        Number of components K of the gene embedding, and of the target embedding where that does not say it.
    penalty
        Ridge penalty, the paper's :math:`\lambda`.
    """

    basis: Tensor

    def __init__(self, embedding: dict[str, Any] | str = "pca", dimension: int = 10, penalty: float = 0.1) -> None:
        super().__init__()
        if penalty <= 0:
            raise PerturbZooError(f"penalty is {penalty}: give a positive number")
        self.save_hyperparameters()

    def prepare_from(
        self, spec: DataSpec, bulks: TrainingPseudobulks, data: PerturbSeqDataModule | None = None
    ) -> dict[str, Any]:
        basis = torch.from_numpy(pseudobulk_pca(bulks, self.hparams["dimension"])).float()
        return {**super().prepare_from(spec, bulks, data), "basis": basis}

    def build(self) -> None:
        super().build()
        self.register_buffer("basis", self.prepared["basis"], persistent=False)

    def regress(self, condition: Tensor, training: Tensor) -> Tensor:
        identity = torch.eye(training.shape[1]).to(training)
        # P' (P P' + lambda I)^-1 p, with pairs as rows here
        weights = condition @ torch.linalg.solve(training.T @ training + self.hparams["penalty"] * identity, training.T)
        return weights - weights.mean(dim=1, keepdim=True)  # applied to Y - b

    def delta(self, table: ConditionTable, context_control: Tensor) -> tuple[Tensor, Tensor | None]:
        change = self.known.mean_weights(table) @ self.known.value
        basis = self.basis.double()
        gram = basis.T @ basis + self.hparams["penalty"] * torch.eye(basis.shape[1]).to(basis)
        for rows, condition, columns, training in self.groups(table):
            known = self.known.value[columns].double()
            # the gene side, G (G'G + lambda I)^-1 G', applied to the weighted residuals
            inner = torch.linalg.solve(gram, basis.T @ (self.regress(condition, training) @ known).T)
            change[rows] = ((basis @ inner).T + known.mean(dim=0)).to(change)
        return change, None


class Ridge(EmbeddingBaseline):
    """Ridge regression of deltas on the condition's embedding, with an intercept.

    Parameters
    ----------
    embedding
        Target embedding: ``pca`` of the training pseudobulks (measured targets only) or any other that
        :mod:`perturbzoo.models.embedding` makes.
    dimension
        Number of its components, where it does not say it.
    penalty
        Ridge penalty.
    """

    def __init__(self, embedding: dict[str, Any] | str = "pca", dimension: int = 10, penalty: float = 1.0) -> None:
        super().__init__()
        if penalty <= 0:
            raise PerturbZooError(f"penalty is {penalty}: give a positive number")
        self.save_hyperparameters()

    def regress(self, condition: Tensor, training: Tensor) -> Tensor:
        centre = training.mean(dim=0)
        features = training - centre
        identity = torch.eye(features.shape[1]).to(features)
        weights = (condition - centre) @ torch.linalg.solve(
            features.T @ features + self.hparams["penalty"] * identity, features.T
        )
        return weights - weights.mean(dim=1, keepdim=True) + 1.0 / len(training)


class KNN(EmbeddingBaseline):
    """Mean delta of the k training pairs whose embeddings are nearest (Euclidean).

    Parameters
    ----------
    embedding
        Target embedding: ``pca`` of the training pseudobulks (measured targets only) or any other that
        :mod:`perturbzoo.models.embedding` makes.
    dimension
        Number of its components, where it does not say it.
    k
        Number of neighbours.
    """

    def __init__(self, embedding: dict[str, Any] | str = "pca", dimension: int = 10, k: int = 5) -> None:
        super().__init__()
        if k < 1:
            raise PerturbZooError(f"k is {k}: give 1 or more")
        self.save_hyperparameters()

    def regress(self, condition: Tensor, training: Tensor) -> Tensor:
        k = min(self.hparams["k"], len(training))
        nearest = torch.cdist(condition, training).topk(k, dim=1, largest=False).indices
        return condition.new_zeros(len(condition), len(training)).scatter_(1, nearest, 1.0 / k)
