r"""GEARS: a graph network that predicts the transcriptional outcome of multi-gene perturbations.

Roohani, Huang and Leskovec, Nature Biotechnology 2024, https://doi.org/10.1038/s41587-023-01905-6.

With gene embeddings :math:`e_g`, position embeddings :math:`p_g` on the co-expression graph, target embeddings
:math:`q_t` on the perturbation graph (SG: simple graph convolution), for a condition :math:`c` with targets
:math:`t \in c`:

.. math::
    b_g &= \mathrm{MLP}\big(\mathrm{ReLU}(\mathrm{N}(e_g)) + 0.2\, \mathrm{SG}(p)_g\big) \\
    z_c &= \mathrm{MLP}\big(\textstyle\sum_{t \in c} \mathrm{SG}(q)_t\big) \\
    h_{cg} &= \mathrm{MLP}\big(\mathrm{ReLU}(\mathrm{N}(b_g + z_c))\big) \\
    o_{cg} &= \langle w_g, h_{cg} \rangle + a_g \\
    \hat\delta_{cg} &= u_g o_{cg} + \langle v_g, \mathrm{MLP}(o_c) \rangle + a'_g

and a cell's prediction is its control plus :math:`\hat\delta_c`. The control enters nowhere else, so everything above is
computed once for each distinct condition (and context) of a batch, never for each cell; :math:`b_g` and the graph
convolutions once for the whole batch.

What the original got wrong is put right in both modes: the co-expression convolution acts for every cell (the
reference adds neighbours for the first cell of a batch only), and the direction loss has a gradient (the reference's is a
difference of signs). What it chose is kept as named arguments; ``paper=True`` selects all of its choices.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbzoo.data.batch import ConditionTable, PerturbationBatch
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.graphs import Graph, build_graph, coexpression_graph, universe
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened
from perturbzoo.models.base import ConditionDeltaModel
from perturbzoo.models.known import TrainingDeltas
from perturbzoo.perturbation import KINDS

# argument: (default, the paper's choice)
CHOICES: dict[str, tuple[Any, Any]] = {
    "loss": ("condition_mse", "autofocus"),
    "direction_weight": (0.0, 0.1),
    "residual": (True, False),
    "context": (True, False),
    "norm": ("layer", "batch"),
    "max_norm": (None, 1.0),
    "lr": (1e-3, 1e-3),
    "weight_decay": (5e-4, 5e-4),
    "lr_decay": (0.95, 0.5),
    "fallback_rate": (0.05, 0.0),
}


class GEARS(ConditionDeltaModel):
    """The paper's network, computed once per distinct condition.

    Every argument that is None takes the improved default, or the paper's choice where ``paper`` is true.

    Parameters
    ----------
    paper
        Take the original's choices for all arguments that are not given.
    hidden
        Width h of embeddings and layers; the paper's 64.
    coexpression
        ``top_k`` and ``threshold`` of the co-expression graph of the training cells; the paper's 20 and 0.4.
    perturbation_graph
        Sources of the graph between targets, for :func:`perturbzoo.data.graphs.build_graph`:
        ``[{kind: go, path: gene2go.csv, top_k: 20, threshold: 0.1}]``; several are united. None takes the data module's
        ``perturbation_graph``; where there is none either, every target is left to itself and an unseen one gets the
        learned fallback.
    loss
        ``condition_mse``: squared error of each condition's mean change. ``autofocus``, the paper's: fourth power of each
        cell's error against one random control. The latter's optimum is not the conditional mean, because the error
        contains the control's own variance.
    direction_weight
        Weight of the direction loss; the paper's 0.1. Smooth here, so that it has a gradient.
    residual
        Predict the difference from the training mean (from the sum of the singles for a combination) instead of the whole
        change: an untrained model is then already the baseline.
    context
        Let the context's mean control profile modulate the change, where there are several contexts.
    norm
        ``layer`` or the paper's ``batch`` normalisation; the latter makes a condition's training prediction depend on
        the other conditions of the batch.
    max_norm
        Bound on the length of embedding vectors; the paper's 1.
    uncertainty
        Also predict each gene's log variance, by a Gaussian likelihood of the condition means with the mean held fixed (the
        paper's has no normalising term, so that its optimum is an infinite variance).
    lr, weight_decay, lr_decay
        Adam's learning rate and L2 penalty, and the factor by which the rate shrinks each epoch.
    fallback_rate
        Share of targets replaced in training by the fallback vector, from which it learns to be an unknown target.
    """

    known: TrainingDeltas
    informed: Tensor
    context_centre: Tensor

    def __init__(
        self,
        paper: bool = False,
        hidden: int = 64,
        coexpression: dict[str, Any] | None = None,
        perturbation_graph: list[dict[str, Any]] | None = None,
        loss: Literal["condition_mse", "autofocus"] | None = None,
        direction_weight: float | None = None,
        residual: bool | None = None,
        context: bool | None = None,
        norm: Literal["layer", "batch"] | None = None,
        max_norm: float | None = None,
        uncertainty: bool = False,
        lr: float | None = None,
        weight_decay: float | None = None,
        lr_decay: float | None = None,
        fallback_rate: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        given = {name: self.hparams[name] for name in CHOICES}
        self.choices = {name: CHOICES[name][paper] if value is None else value for name, value in given.items()}

    # ------------------------------------------------------------------ graphs, from training cells only

    def prepare(self, data: PerturbSeqDataModule) -> dict[str, Any]:
        spec = self.get_spec()
        limits = {"top_k": 20, "threshold": 0.4, **(self.hparams["coexpression"] or {})}
        coexpression = coexpression_graph(data.training_cells(), spec.genes, **limits)
        prepared: dict[str, Any] = {"coexpression": coexpression.to_state()}
        if sources := self.hparams["perturbation_graph"] or data.hparams["perturbation_graph"]:
            prepared |= self._target_graph(sources)
        prepared["informed"] = self._informed(prepared)
        if not prepared["informed"].all():
            names = [name for name, known in zip(spec.targets, prepared["informed"].tolist(), strict=False) if not known]
            warnings.warn(
                f"{len(names)} targets are neither trained nor next to a trained one in the perturbation graph "
                f"({shortened(names)}): they get the learned fallback",
                PerturbZooWarning,
                stacklevel=2,
            )
        return prepared

    def _target_graph(self, sources: list[dict[str, Any]]) -> dict[str, Any]:
        """The perturbation graph, and the names beyond the data's targets that a trained target can inform."""
        targets = self.get_spec().targets
        others = sorted(set(universe(sources)) - set(targets))
        graph = build_graph(sources, [*targets, *others])
        informed = self._informed({"targets": graph.to_state(), "extra": others})
        extra = [name for name, known in zip(others, informed[len(targets) :].tolist(), strict=True) if known]
        return {"targets": graph.restrict([*targets, *extra]).to_state(), "extra": extra}

    @property
    def target_names(self) -> tuple[str, ...]:
        return (*self.get_spec().targets, *self.prepared.get("extra", ()))

    def _informed(self, prepared: dict[str, Any]) -> Tensor:
        """Shape ``(T,)``, bool: targets that were trained, or have a trained neighbour to learn from."""
        known = TrainingDeltas(self.get_spec()).table
        informed = torch.zeros(len(self.get_spec().targets) + len(prepared.get("extra", ())), dtype=torch.bool)
        informed[known.targets[known.present]] = True
        if "targets" in prepared:
            source, destination = Graph.from_state(prepared["targets"]).edge_index
            informed[destination[informed[source]]] = True
        return informed

    # ------------------------------------------------------------------ the network

    def build(self) -> None:
        # imported here: it takes half a second, which '--help' has no use for
        from torch_geometric.nn import SGConv

        spec, h, choices = self.get_spec(), self.hparams["hidden"], self.choices
        n_genes, n_targets = spec.n_genes, len(self.target_names)
        self._register_graph("coexpression", n_genes)
        self._register_graph("targets", n_targets)
        self.register_buffer("informed", self.prepared["informed"], persistent=False)

        self.gene_embedding = nn.Embedding(n_genes, h, max_norm=choices["max_norm"])
        self.position_embedding = nn.Embedding(n_genes, h, max_norm=choices["max_norm"])
        self.target_embedding = nn.Embedding(n_targets, h, max_norm=choices["max_norm"])
        self.kind_embedding = nn.Embedding(len(KINDS), h)
        self.fallback = nn.Parameter(torch.zeros(h))
        self.position_convolution = SGConv(h, h, K=1)
        self.target_convolution = SGConv(h, h, K=1)
        self.gene_norm, self.condition_norm = self._norm(h), self._norm(h)
        self.gene_mlp, self.fuse_mlp = self._mlp(h, h, h), self._mlp(h, h, h)
        self.recovery_mlp = self._mlp(h, 2 * h, h)
        self.cross_mlp = self._mlp(n_genes, h, h)
        self.own_weight = nn.Parameter(torch.empty(n_genes, h))
        self.own_bias = nn.Parameter(torch.zeros(n_genes))
        self.head_weight = nn.Parameter(torch.empty(n_genes, h + 1))
        self.head_bias = nn.Parameter(torch.zeros(n_genes))
        if self.uses_context:
            self.register_buffer("context_centre", torch.from_numpy(spec.control_mean.mean(axis=0)), persistent=False)
            self.context_encoder = nn.Sequential(nn.Linear(n_genes, h), nn.ReLU(), nn.Linear(h, 2 * h))
        if choices["residual"]:
            self.known = TrainingDeltas(spec, singles_only=True)
        if self.hparams["uncertainty"]:
            self.variance_head = nn.Sequential(nn.Linear(h, 2 * h), nn.ReLU(), nn.Linear(2 * h, 1))
            self.log_variance = nn.Parameter(torch.full((n_genes,), -6.0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what differs from PyTorch's defaults."""
        bound = 1 / math.sqrt(self.hparams["hidden"])
        nn.init.uniform_(self.own_weight, -bound, bound)
        # kinds differ in nothing until the data say so
        nn.init.zeros_(self.kind_embedding.weight)
        if self.choices["residual"]:
            # the head starts at 0, so the untrained model predicts the baseline; a target nobody perturbed adds nothing of
            # its own to what its neighbours say
            nn.init.zeros_(self.head_weight)
            nn.init.zeros_(self.target_embedding.weight)
        else:
            nn.init.uniform_(self.head_weight, -bound, bound)
        if self.uses_context:
            for parameter in self.context_encoder[-1].parameters():
                nn.init.zeros_(parameter)

    @property
    def predicts_variance(self) -> bool:
        return bool(self.hparams["uncertainty"])

    @property
    def uses_context(self) -> bool:
        """Whether the control profile is an input; with a single context it would be a constant."""
        return self.choices["context"] and len(self.get_spec().contexts) > 1

    def _register_graph(self, name: str, n_nodes: int) -> None:
        if name in self.prepared:
            graph = Graph.from_state(self.prepared[name])
            index, weight = graph.edge_index, graph.edge_weight
        else:
            index, weight = torch.arange(n_nodes).repeat(2, 1), torch.ones(n_nodes)
        self.register_buffer(f"{name}_index", index, persistent=False)
        self.register_buffer(f"{name}_weight", weight, persistent=False)

    def _norm(self, width: int) -> nn.Module:
        return nn.LayerNorm(width) if self.choices["norm"] == "layer" else nn.BatchNorm1d(width)

    def _mlp(self, *widths: int) -> nn.Sequential:
        """Linear, norm, ReLU, Linear; the paper normalises the output too."""
        first, middle, last = widths
        layers = [nn.Linear(first, middle), self._norm(middle), nn.ReLU(), nn.Linear(middle, last)]
        return nn.Sequential(*layers, *([self._norm(last)] if self.choices["norm"] == "batch" else []))

    def parameter_axes(self) -> dict[str, tuple[str | None, ...]]:
        axes: dict[str, tuple[str | None, ...]] = {
            "gene_embedding.weight": ("gene", None),
            "position_embedding.weight": ("gene", None),
            "target_embedding.weight": ("target", None),
            "cross_mlp.0.weight": (None, "gene"),
            "own_weight": ("gene", None),
            "own_bias": ("gene",),
            "head_weight": ("gene", None),
            "head_bias": ("gene",),
            "context_encoder.0.weight": (None, "gene"),
            "log_variance": ("gene",),
        }
        return axes

    def encode_genes(self) -> Tensor:
        """Shape ``(G, h)``: what a gene is, whatever the condition."""
        index = torch.arange(self.gene_embedding.num_embeddings, device=self.device)
        own = functional.relu(self.gene_norm(self.gene_embedding(index)))
        position = self.position_convolution(self.position_embedding(index), self.coexpression_index, self.coexpression_weight)
        return self.gene_mlp(own + 0.2 * position)

    def encode_conditions(self, table: ConditionTable, context_control: Tensor) -> Tensor:
        """Shape ``(C, h)``: the sum of a condition's targets, so that their order cannot matter."""
        index = torch.arange(self.target_embedding.num_embeddings, device=self.device)
        vectors = self.target_convolution(self.target_embedding(index), self.targets_index, self.targets_weight)
        # a target nobody perturbed, without a perturbed neighbour, has a vector that means nothing
        vectors = torch.where(self.informed[:, None], vectors, self.fallback)
        acts = vectors[table.targets.clamp(min=0)]  # (C, K, h)
        if self.training and self.choices["fallback_rate"] > 0:
            dropped = torch.rand(acts.shape[:2], device=acts.device) < self.choices["fallback_rate"]
            acts = torch.where(dropped[..., None], self.fallback, acts)
        acts = acts + self.kind_embedding(table.kind.clamp(min=0))
        # dose 1 counts once, dose 0 not at all
        strength = torch.log2(1 + table.dose) * table.present
        condition = self.fuse_mlp((acts * strength[..., None]).sum(dim=1))
        if self.uses_context:
            scale, shift = self.context_encoder(context_control - self.context_centre).chunk(2, dim=1)
            condition = condition * (1 + scale) + shift
        return condition

    def delta(self, table: ConditionTable, context_control: Tensor) -> tuple[Tensor, Tensor | None]:
        condition, genes = self.encode_conditions(table, context_control), self.encode_genes()
        n_pairs, n_genes, h = len(table), *genes.shape
        mixed = (condition[:, None] + genes).reshape(-1, h)  # (C G, h)
        nodes = self.recovery_mlp(functional.relu(self.condition_norm(mixed))).reshape(n_pairs, n_genes, h)
        own = torch.einsum("cgh,gh->cg", nodes, self.own_weight) + self.own_bias
        cross = self.cross_mlp(own)  # (C, h)
        change = own * self.head_weight[:, 0] + cross @ self.head_weight[:, 1:].T + self.head_bias
        # no intervention, no change, whatever the biases have learned
        change = change * (table.present & (table.dose > 0)).any(dim=1)[:, None]
        if self.choices["residual"]:
            change = change + self.known.residual_weights(table) @ self.known.value
        if not self.hparams["uncertainty"]:
            return change, None
        # the features are held fixed, so that asking for the uncertainty leaves the mean as it is
        log_variance = self.variance_head(nodes.detach())[..., 0] + self.log_variance
        return change, log_variance.exp()

    # ------------------------------------------------------------------ losses

    def on_fit_start(self) -> None:
        pairs, per_batch = len(self.data.pairs_of("train")), self.data.hparams["conditions_per_batch"]
        if self.choices["norm"] == "batch" and pairs // math.ceil(pairs / per_batch) < 2:
            raise PerturbZooError(
                f"norm 'batch' (the choice of paper=True) needs two conditions in every batch: {pairs} training conditions with "
                f"conditions_per_batch {per_batch} leave one alone; raise conditions_per_batch or set norm to 'layer'"
            )
        if self.choices["residual"]:
            self.known.fit(self.data.training_pseudobulks())

    def loss(self, batch: PerturbationBatch) -> dict[str, Tensor]:
        delta, variance = self.delta(batch.table, batch.context_control)
        observed = batch.condition_means(batch.observed) - batch.context_control  # (C, G)
        if self.choices["loss"] == "condition_mse":
            terms = {"mse": functional.mse_loss(delta, observed)}
        else:
            terms = {"autofocus": autofocus_loss(batch.control + delta[batch.row], batch)}
        if self.choices["direction_weight"] > 0:
            terms["direction"] = self.choices["direction_weight"] * direction_loss(delta, observed)
        if variance is not None:
            terms["likelihood"] = functional.gaussian_nll_loss(delta.detach(), observed, variance, eps=1e-8)
        return terms

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.choices["lr"], weight_decay=self.choices["weight_decay"])
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=self.choices["lr_decay"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}


def autofocus_loss(predicted: Tensor, batch: PerturbationBatch, focus: float = 2.0) -> Tensor:
    """Mean of ``|error| ** (2 + focus)`` per condition over its expressed genes, then over conditions.

    Parameters
    ----------
    predicted
        Shape ``(B, G)``: a random control plus the predicted change, as in the paper.
    batch
        The observed cells. A gene counts for a condition where any of its cells in the batch expresses it.
    focus
        The paper's gamma.
    """
    expressed = batch.condition_means(batch.observed) > 0  # (C, G)
    error = batch.condition_means((predicted - batch.observed).abs() ** (2 + focus))
    return ((error * expressed).sum(dim=1) / expressed.sum(dim=1).clamp(min=1)).mean()


def direction_loss(predicted: Tensor, observed: Tensor, sharpness: float = 10.0) -> Tensor:
    """Squared difference of the directions of change, ``tanh(sharpness * delta)`` standing in for its sign.

    Parameters
    ----------
    predicted, observed
        Shape ``(C, G)``: changes, log1p-normalised.
    sharpness
        At 10, a change of 0.1 counts as three quarters of a direction and noise around 0 as none.
    """
    return (torch.tanh(sharpness * predicted) - torch.tanh(sharpness * observed)).square().mean()
