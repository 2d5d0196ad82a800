r"""What the models that move cells share: the space they move in, what a condition says, and where they start.

Cells in, cells out: a control cell :math:`x` (log1p-normalised, G genes) has the latent position
:math:`z = W (x - \bar x) / s`, with :math:`W` the first principal axes of the training cells (or the identity: gene space)
and :math:`s` one number for all axes, so that distances keep their proportions. A model moves z to
:math:`T_c(z)` under condition c, and the predicted cell is

.. math:: \hat x = x + \delta_c + s W^\top \big(T_c(z) - z\big).

In the space of an scVI model (:mod:`perturbzoo.models.scvi_space`) z is the encoder's mean, and the last term the difference
between what is decoded at :math:`T_c(z)` and at z. What the space cannot hold stays as it is in the control cell. :math:`\delta_c` is the start, a change known from simple
baselines (:mod:`perturbzoo.models.known`). The model learns to transport controls onto :math:`y - \delta_c`: a translation of the
target translates the optimal map, no more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from perturbzoo.data.batch import ConditionTable, PerturbationBatch
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.distribution import energy_distance
from perturbzoo.evaluation.pseudobulk import PseudobulkSums
from perturbzoo.models.base import PerturbationModel, Prediction
from perturbzoo.models.known import TrainingDeltas
from perturbzoo.models.neighbours import Neighbours
from perturbzoo.models.targets import TargetVectors, prepare_targets
from perturbzoo.perturbation import KINDS

Space = Literal["pca", "genes", "scvi"]
Start = Literal["identity", "mean_shift", "additive", "measured"]

_DENSE = 512  # below this many cells or genes, all principal axes at once are cheaper than an iteration for the first few
_MOST_CELLS = 200  # of each pair, in the distance of distributions that validation logs


def fit_latent(cells: sparse.csr_matrix, space: Space, components: int) -> dict[str, Tensor]:
    """Fit the latent space to the training cells.

    Parameters
    ----------
    cells
        Shape ``(cells, G)``, log1p-normalised.
    space
        ``pca`` or ``genes``; for ``scvi`` see :func:`perturbzoo.models.scvi_space.fit_scvi`.
    components
        Number of principal axes d; fewer where there are fewer cells or genes.

    Returns
    -------
    ``centre`` ``(G,)``; ``scale`` ``()``: root mean variance of the axes; ``spread`` ``(d,)``: standard deviation of each in
    units of the scale; ``components`` ``(d, G)`` for ``pca``. float32.
    """
    centre = np.asarray(cells.mean(axis=0)).ravel()
    fitted = {}
    if space == "genes":
        squares = np.asarray(cells.multiply(cells).mean(axis=0)).ravel()
        variance = np.maximum(squares - centre**2, 0.0)
    else:
        from sklearn.decomposition import PCA  # a second, which '--help' has no use for

        limit = min(cells.shape)
        if limit <= max(_DENSE, components):
            pca = PCA(min(components, limit), svd_solver="full").fit(cells.toarray())
        else:
            pca = PCA(components, svd_solver="arpack", random_state=0).fit(cells)  # keeps the matrix sparse
        variance = pca.explained_variance_
        fitted["components"] = pca.components_
    scale = max(float(np.sqrt(variance.mean())), 1e-8)
    # an axis on which nothing varies must not blow up what is divided by its spread
    fitted |= {"centre": centre, "scale": np.array(scale), "spread": np.maximum(np.sqrt(variance) / scale, 0.1)}
    return {name: torch.from_numpy(np.asarray(value, dtype=np.float32).copy()) for name, value in fitted.items()}


class CellSpace(nn.Module):
    """Where cells are moved: from expression to positions and back.

    Attributes
    ----------
    spread
        Shape ``(d,)``: standard deviation of each axis over the training cells, in units of the mean one.
    """

    spread: Tensor

    @property
    def dimension(self) -> int:
        return len(self.spread)

    def encode(self, expression: Tensor) -> Tensor:
        """Expression ``(..., G)`` to position ``(..., d)``."""
        raise NotImplementedError

    def decode(self, position: Tensor, control: Tensor, size: Tensor) -> Tensor:
        """Expression at a position.

        Parameters
        ----------
        position
            Shape ``(B, d)``.
        control, size
            Shapes ``(B, G)`` and ``(B,)``: the control cells that were moved there, and their size factors.

        Returns
        -------
        Shape ``(B, G)``.
        """
        raise NotImplementedError

    def difference(self, expression: Tensor, other: Tensor) -> Tensor:
        """Position of the one minus that of the other: ``(..., G)`` twice, to ``(..., d)``."""
        return self.encode(expression) - self.encode(other)

    def change(self, moved: Tensor, position: Tensor, control: Tensor, size: Tensor) -> Tensor:
        """How expression changes on the way from `position` to `moved`, ``(B, d)`` each; see :meth:`decode`."""
        return self.decode(moved, control, size) - self.decode(position, control, size)


class LatentSpace(CellSpace):
    """Positions on axes, and changes back to genes.

    Parameters
    ----------
    fitted
        What :func:`fit_latent` returned.
    """

    centre: Tensor
    scale: Tensor
    components: Tensor | None

    def __init__(self, fitted: dict[str, Tensor]) -> None:
        super().__init__()
        for name in ("centre", "scale", "spread", "components"):
            self.register_buffer(name, fitted.get(name), persistent=False)

    def project(self, change: Tensor) -> Tensor:
        """A change of expression ``(..., G)`` as a change of position ``(..., d)``."""
        return (change if self.components is None else change @ self.components.T) / self.scale

    def encode(self, expression: Tensor) -> Tensor:
        """Expression ``(..., G)`` to position ``(..., d)``."""
        return self.project(expression - self.centre)

    def lift(self, change: Tensor) -> Tensor:
        """A change of position ``(..., d)`` as a change of expression ``(..., G)``."""
        return (change if self.components is None else change @ self.components) * self.scale

    def decode(self, position: Tensor, control: Tensor, size: Tensor) -> Tensor:
        return self.centre + self.lift(position)

    def difference(self, expression: Tensor, other: Tensor) -> Tensor:
        return self.project(expression - other)

    def change(self, moved: Tensor, position: Tensor, control: Tensor, size: Tensor) -> Tensor:
        return self.lift(moved - position)


class ConditionEncoder(nn.Module):
    """One vector for each distinct pair: the sum of its targets' vectors, then what its context does to it.

    Parameters
    ----------
    prepared
        What :func:`perturbzoo.models.targets.prepare_targets` returned.
    width
        Length e of the vectors.
    latent
        Length d of a context's mean control position.
    context
        Let that position modulate the vector.
    """

    def __init__(self, prepared: dict[str, Any], width: int, latent: int, *, context: bool) -> None:
        super().__init__()
        self.targets = TargetVectors(prepared, width)
        self.kind_embedding = nn.Embedding(len(KINDS), width)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.context = nn.Sequential(nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, 2 * width)) if context else None
        # kinds and contexts differ in nothing until the data say so; conditions start as plain sums
        nn.init.zeros_(self.kind_embedding.weight)
        for last in (self.mix[-1], *(() if self.context is None else (self.context[-1],))):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, table: ConditionTable, position: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Encode C pairs.

        Parameters
        ----------
        table
            The pairs.
        position
            Shape ``(C, d)``: mean control position of each pair's context, relative to the mean of all.
        hidden
            Shape ``(C, K)``, bool: interventions whose target is treated as never perturbed.

        Returns
        -------
        Shape ``(C, e)``.
        """
        seen, unseen = self.targets()
        index = table.targets.clamp(min=0)
        acts = seen[index]  # (C, K, e)
        if hidden is not None:
            acts = torch.where(hidden[..., None], unseen[index], acts)
        acts = acts + self.kind_embedding(table.kind.clamp(min=0))
        # dose 1 counts once, dose 0 not at all
        strength = torch.log2(1 + table.dose) * table.present
        condition = (acts * strength[..., None]).sum(dim=1)
        condition = condition + self.mix(condition)
        if self.context is not None:
            scale, shift = self.context(position).chunk(2, dim=1)
            condition = condition * (1 + scale) + shift
        return condition


class TransportModel(PerturbationModel):
    """A model that moves cells. A subclass writes :meth:`build`, which calls :meth:`build_space`, and :meth:`transport`.

    Its arguments ``space``, ``components``, ``scvi``, ``start``, ``keep_residual``, ``context``, ``embedding``, ``dimension`` and
    ``perturbation_graph`` are read here.
    """

    context_centre: Tensor
    _moved: list[tuple[Tensor, Tensor, Tensor]] | None = None  # pair, predicted and observed positions of validation cells

    def check_arguments(self) -> None:
        """Refuse arguments that make no sense."""
        for name, choices in (("space", get_args(Space)), ("start", get_args(Start))):
            if self.hparams[name] not in choices:
                raise PerturbZooError(f"{name} is '{self.hparams[name]}': give one of {', '.join(choices)}")
        positive = ("components", "width", "g_steps", "integration_steps")
        for name in (name for name in positive if name in self.hparams):
            if self.hparams[name] < 1:
                raise PerturbZooError(f"{name} is {self.hparams[name]}: give 1 or more")
        for name in (name for name in ("floor", "average", "unseen_rate") if name in self.hparams):
            if not 0 <= self.hparams[name] <= 1:
                raise PerturbZooError(f"{name} is {self.hparams[name]}: give a share from 0 to 1")
        if not (hidden := np.atleast_1d(self.hparams["hidden"])).size or hidden.min() < 1:
            raise PerturbZooError(f"hidden is {self.hparams['hidden']}: give widths of 1 or more")
        if self.hparams["scvi"] is not None:
            from perturbzoo.models.scvi_space import understand_options

            if self.hparams["space"] != "scvi":
                raise PerturbZooError(f"scvi: options are given, but space is '{self.hparams['space']}': set it to 'scvi'")
            understand_options(self.hparams["scvi"])

    # ------------------------------------------------------------------ building

    def prepare(self, data: PerturbSeqDataModule) -> dict[str, Any]:
        names = ("embedding", "dimension", "perturbation_graph")
        targets = prepare_targets(data, self.get_spec(), **{name: self.hparams[name] for name in names})
        return {**targets, "latent": self._fit_space(data)}

    def _fit_space(self, data: PerturbSeqDataModule) -> dict[str, Any]:
        space, components, cells = self.hparams["space"], self.hparams["components"], data.training_cells()
        if space != "scvi":
            return fit_latent(cells, space, components)
        from perturbzoo.models.scvi_space import fit_scvi

        print(f"space: training an scVI model of {components} dimensions on {cells.shape[0]:,} cells", flush=True)
        # not the model's own trainer, which a member of an ensemble has none of
        device = "cpu" if data.trainer is None else data.trainer.strategy.root_device
        return fit_scvi(cells, data.training_sizes(), self.get_spec().depth, components, self.hparams["scvi"], device)

    @property
    def target_names(self) -> tuple[str, ...]:
        return (*self.get_spec().targets, *self.prepared.get("extra", ()))

    def build_space(self) -> None:
        """Create the latent space, the start, and the centre that contexts are measured from."""
        spec = self.get_spec()
        self.latent: CellSpace
        if self.hparams["space"] == "scvi":
            from perturbzoo.models.scvi_space import ScVISpace

            self.latent = ScVISpace(self.prepared["latent"])
        else:
            self.latent = LatentSpace(self.prepared["latent"])
        self.register_buffer("context_centre", torch.from_numpy(spec.control_mean.mean(axis=0)), persistent=False)
        if self.hparams["start"] != "identity":
            self.known = TrainingDeltas(spec)
            self.neighbours = Neighbours(self.known, self.prepared.get("graph"), len(self.target_names))

    def new_condition_encoder(self) -> ConditionEncoder:
        # with a single context its profile would be a constant
        context = self.hparams["context"] and len(self.get_spec().contexts) > 1
        return ConditionEncoder(self.prepared, self.hparams["width"], self.latent.dimension, context=context)

    def parameter_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {name: ("target", None) for name, _ in self.named_parameters() if name.endswith("targets.learned.weight")}

    def on_fit_start(self) -> None:
        if self.hparams["start"] != "identity":
            self.known.fit(self.data.training_pseudobulks())
            self.neighbours.fit(self.known)

    # ------------------------------------------------------------------ what a pair says

    def position_of_context(self, context_control: Tensor) -> Tensor:
        """Mean control position of each pair's context relative to that of all contexts, in standard deviations: ``(C, d)``."""
        return self.latent.difference(context_control, self.context_centre) / self.latent.spread

    def hide(self, table: ConditionTable) -> Tensor | None:
        """Draw the targets that a training step treats as never perturbed, ``(C, K)``, bool; None outside training.

        Encoder and start get the same draw: what table and graph tell of a target is learned where the start does not know it.
        """
        rate = self.hparams["unseen_rate"] if self.training else 0.0
        return torch.rand(table.targets.shape, device=table.targets.device) < rate if rate > 0 else None

    def start_change(self, table: ConditionTable, hidden: Tensor | None = None) -> Tensor:
        """Shape ``(C, G)``: the change of each pair before the model has its say, with the targets unknown that :meth:`hide` drew.

        But for ``measured``, it is the same in all contexts: a context's own change would leave nothing to learn for a new one.
        """
        if self.hparams["start"] == "identity":
            return self.context_centre.new_zeros(len(table), self.get_spec().n_genes)
        active = table.present & (table.dose > 0)
        anywhere = replace(table, context=torch.full_like(table.context, -1))
        if self.hparams["start"] == "mean_shift":
            return (self.known.mean_weights(anywhere) * active.any(dim=1, keepdim=True)) @ self.known.value
        weights = self.known.sum_weights(anywhere, self.neighbours, hidden)
        if self.hparams["start"] == "measured":
            own = self.known.own_weights(table)
            # with a hidden target a condition counts as new
            new = ~own.any(dim=1) if hidden is None else ~own.any(dim=1) | (hidden & active).any(dim=1)
            weights = torch.where(new[:, None], weights, own)
        return weights @ self.known.value

    # ------------------------------------------------------------------ moving cells

    def transport(self, batch: PerturbationBatch, position: Tensor) -> Tensor:
        """Move control cells, before the start is added.

        Parameters
        ----------
        batch
            Says which pair each cell belongs to.
        position
            Shape ``(B, d)``.

        Returns
        -------
        Shape ``(B, d)``.
        """
        raise NotImplementedError

    def forward(self, batch: PerturbationBatch) -> Prediction:
        position = self.latent.encode(batch.control)
        # no intervention, no change, whatever the networks have learned
        acts = (batch.table.present & (batch.table.dose > 0)).any(dim=1)[batch.row, None]
        moved = torch.where(acts, self.transport(batch, position), position)
        start, cell = self.start_change(batch.table), (batch.control, batch.control_size_factor)
        if self.hparams["keep_residual"]:
            return Prediction(batch.control + start[batch.row] + self.latent.change(moved, position, *cell))
        shift = self.latent.difference(batch.context_control + start, batch.context_control)  # (C, d)
        return Prediction(self.latent.decode(moved + shift[batch.row], *cell))

    @property
    def keeps_cell_noise(self) -> bool:
        return bool(self.hparams["keep_residual"])

    def source_and_target(self, batch: PerturbationBatch, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Positions ``(B, d)`` of the control cells, and of the perturbed cells minus the start with these targets hidden."""
        start = self.start_change(batch.table, hidden)  # (C, G)
        return self.latent.encode(batch.control), self.latent.encode(batch.observed - start[batch.row])

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._moved = []

    def _add(self, sums: PseudobulkSums | None, batch: PerturbationBatch) -> None:
        assert sums is not None
        prediction, pair = self.evaluate(batch), batch.table.pair[batch.row]
        sums.update(pair, prediction.mean, batch.control, batch.observed)
        if self._moved is not None:
            positions = (self.latent.encode(prediction.mean), self.latent.encode(batch.observed))
            self._moved.append((pair.cpu(), positions[0].cpu(), positions[1].cpu()))

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        assert self._moved is not None
        pair, predicted, observed = (
            torch.cat([part.to(torch.float32) for part in parts]).numpy() for parts in zip(*self._moved, strict=True)
        )
        distances = []
        for rows in (np.flatnonzero(pair == one) for one in np.unique(pair)):
            if len(rows) > 1:
                rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MOST_CELLS)).astype(int))]
                distances.append(energy_distance(predicted[rows], observed[rows]))
        value = torch.tensor(np.mean(distances) if distances else np.nan, dtype=torch.float32, device=self.device)
        # each rank has cells of its own: a mean over ranks, near enough for a curve
        self.log("val/e_distance", value, batch_size=max(len(distances), 1), sync_dist=True)
        self._moved = None
