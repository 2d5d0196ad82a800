r"""GEARS: a graph network that predicts the transcriptional outcome of multi-gene perturbations.

Roohani, Huang and Leskovec, Nature Biotechnology 2024, https://doi.org/10.1038/s41587-023-01905-6.

With gene embeddings :math:`e_g`, position embeddings :math:`p_g` on the co-expression graph, target vectors
:math:`v_t` from the perturbation graph (:mod:`perturbzoo.models.targets`; SG: simple graph convolution), for a condition
:math:`c` with targets :math:`t \in c`:

.. math::
    b_g &= \mathrm{MLP}\big(\mathrm{ReLU}(\mathrm{N}(e_g)) + 0.2\, \mathrm{SG}(p)_g\big) \\
    z_c &= \mathrm{MLP}\big(\textstyle\sum_{t \in c} v_t\big) \\
    h_{cg} &= \mathrm{MLP}\big(\mathrm{ReLU}(\mathrm{N}(b_g + z_c + r_{cg}))\big) \\
    o_{cg} &= \langle w_g, h_{cg} \rangle + a_g \\
    \hat\delta_{cg} &= s_{cg} + u_g o_{cg} + \langle u'_g, \mathrm{MLP}(o_c) \rangle + a'_g

and a cell's prediction is its control plus :math:`\hat\delta_c`. The paper has :math:`s = r = 0`. Here the network starts from
:math:`s_{cg}`, the sum over the condition's targets of what each is expected to do alone: its measured change in a combination,
what its neighbours and the training mean say (:mod:`perturbzoo.models.neighbours`) otherwise; :math:`r_{cg}` is a
linear map of that start's size. The control enters nowhere else, so everything above is
computed once for each distinct condition (and context) of a batch, never for each cell; :math:`b_g` and the graph
convolutions once for the whole batch.

What the original got wrong is put right in both modes: the co-expression convolution acts for every cell (the
reference adds neighbours for the first cell of a batch only), and the direction loss has a gradient (the reference's is a
difference of signs). What it chose is kept as named arguments; ``paper=True`` selects all of its choices.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbzoo.data.batch import ConditionTable, PerturbationBatch
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.graphs import Graph, coexpression_graph
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.base import ConditionDeltaModel
from perturbzoo.models.known import TrainingDeltas
from perturbzoo.models.neighbours import Neighbours
from perturbzoo.models.targets import TargetVectors, prepare_targets
from perturbzoo.perturbation import KINDS

# argument: (default, the paper's choice)
CHOICES: dict[str, tuple[Any, Any]] = {
    "loss": ("condition_mse", "autofocus"),
    "gene_weighting": (0.0, 0.0),
    "direction_weight": (0.0, 0.1),
    "residual": (True, False),
    "neighbours": (True, False),
    "start_input": (True, False),
    "relations": (True, False),
    "unseen_rate": (0.5, 0.0),
    "context": (True, False),
    "norm": ("layer", "batch"),
    "max_norm": (None, 1.0),
    "lr": (1e-3, 1e-3),
    "weight_decay": (0.0, 5e-4),
    "lr_decay": (0.95, 0.5),
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
        ``[{kind: go, path: gene2go.csv, top_k: 20, threshold: 0.1}, {kind: coexpression}]``. None takes the data module's
        ``perturbation_graph``; where there is none either, an unseen target gets what is common to all targets.
    embedding, dimension
        Vectors for targets beside the learned ones, from any source of :mod:`perturbzoo.models.embedding`.
    loss
        ``condition_mse``: squared error of each condition's mean change. ``autofocus``, the paper's: fourth power of each
        cell's error against one random control. The latter's optimum is not the conditional mean, because the error
        contains the control's own variance.
    direction_weight
        Weight of the direction loss; the paper's 0.1. Smooth here, so that it has a gradient.
    gene_weighting
        Share of a gene's weight in ``condition_mse`` that goes by the size of its observed change, from 0 to 1.
    residual
        Start from what the single perturbations of the targets are expected to do (their sum, for a combination) instead of from
        0: an untrained model is then already the baseline.
    neighbours
        For a single, and where a combination's target was not measured alone, start from what the target's neighbours in the graph did
        (:class:`perturbzoo.models.neighbours.Neighbours`); otherwise from the training mean.
    start_input
        Let the network see the size of the change it starts from, gene by gene.
    relations
        Give each kind of graph a linear map of its own; otherwise all edges count alike, as in the paper's one graph.
    unseen_rate
        Share of targets that are treated as never perturbed in a training step, whereby the network learns what neighbours and
        table tell about a target. At 0 every target of the graph, trained or not, has a learned vector, as in the paper.
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
    """

    known: TrainingDeltas
    context_centre: Tensor
    variance_started: Tensor

    def __init__(
        self,
        paper: bool = False,
        hidden: int = 64,
        coexpression: dict[str, Any] | None = None,
        perturbation_graph: list[dict[str, Any]] | None = None,
        embedding: dict[str, Any] | str | None = None,
        dimension: int = 20,
        loss: Literal["condition_mse", "autofocus"] | None = None,
        direction_weight: float | None = None,
        gene_weighting: float | None = None,
        residual: bool | None = None,
        neighbours: bool | None = None,
        start_input: bool | None = None,
        relations: bool | None = None,
        unseen_rate: float | None = None,
        context: bool | None = None,
        norm: Literal["layer", "batch"] | None = None,
        max_norm: float | None = None,
        uncertainty: bool = False,
        lr: float | None = None,
        weight_decay: float | None = None,
        lr_decay: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        given = {name: self.hparams[name] for name in CHOICES}
        self.choices = {name: CHOICES[name][paper] if value is None else value for name, value in given.items()}

    # ------------------------------------------------------------------ graphs, from training cells only

    def prepare(self, data: PerturbSeqDataModule) -> dict[str, Any]:
        spec = self.get_spec()
        limits = {"top_k": 20, "threshold": 0.4, **(self.hparams["coexpression"] or {})}
        targets = prepare_targets(
            data,
            spec,
            embedding=self.hparams["embedding"],
            dimension=self.hparams["dimension"],
            perturbation_graph=self.hparams["perturbation_graph"],
        )
        return {**targets, "coexpression": coexpression_graph(data.training_cells(), spec.genes, **limits).to_state()}

    @property
    def target_names(self) -> tuple[str, ...]:
        return (*self.get_spec().targets, *self.prepared.get("extra", ()))

    # ------------------------------------------------------------------ the network

    def build(self) -> None:
        from torch_geometric.nn import GCNConv  # half a second, which '--help' has no use for
        from torch_geometric.nn.conv.gcn_conv import gcn_norm

        spec, h, choices = self.get_spec(), self.hparams["hidden"], self.choices
        n_genes, n_targets, graph = spec.n_genes, len(self.target_names), Graph.from_state(self.prepared["coexpression"])
        # self loops are in the graph
        index, weight = gcn_norm(graph.edge_index, graph.edge_weight, n_genes, add_self_loops=False)
        self.register_buffer("coexpression_index", index, persistent=False)
        self.register_buffer("coexpression_weight", weight, persistent=False)

        self.gene_embedding = nn.Embedding(n_genes, h, max_norm=choices["max_norm"])
        self.position_embedding = nn.Embedding(n_genes, h, max_norm=choices["max_norm"])
        # SGConv of one step, with its weights normalised once
        self.position_convolution = GCNConv(h, h, normalize=False, add_self_loops=False)
        self.targets = TargetVectors(
            self.prepared,
            h,
            relations=choices["relations"],
            everyone_speaks=choices["unseen_rate"] == 0,
            max_norm=choices["max_norm"],
        )
        self.kind_embedding = nn.Embedding(len(KINDS), h)
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
        if choices["residual"] or self.hparams["uncertainty"]:
            self.known = TrainingDeltas(spec, singles_only=True)
        if choices["residual"]:
            if choices["start_input"]:
                self.start_encoder = nn.Linear(3, h)
            if choices["neighbours"]:
                self.neighbours = Neighbours(self.known, self.prepared.get("graph"), n_targets)
        if self.hparams["uncertainty"]:
            self.variance_head = nn.Sequential(nn.Linear(h, 2 * h), nn.ReLU(), nn.Linear(2 * h, 1))
            # of a combination of measured singles, and of each intervention that was not measured alone
            self.log_variance = nn.Parameter(torch.full((2, n_genes), -6.0))
            # a fit that goes on from a checkpoint keeps what it has learned
            self.register_buffer("variance_started", torch.tensor(False))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what differs from PyTorch's defaults."""
        bound = 1 / math.sqrt(self.hparams["hidden"])
        nn.init.uniform_(self.own_weight, -bound, bound)
        # kinds differ in nothing until the data say so
        nn.init.zeros_(self.kind_embedding.weight)
        if self.choices["residual"]:
            # the untrained model predicts the baseline
            nn.init.zeros_(self.head_weight)
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
            "targets.learned.weight": ("target", None),
            "targets.vectors": ("target", None),
            "cross_mlp.0.weight": (None, "gene"),
            "own_weight": ("gene", None),
            "own_bias": ("gene",),
            "head_weight": ("gene", None),
            "head_bias": ("gene",),
            "context_encoder.0.weight": (None, "gene"),
            "log_variance": (None, "gene"),
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
        seen, unseen = self.targets()
        index, rate = table.targets.clamp(min=0), self.choices["unseen_rate"]
        acts = seen[index]  # (C, K, h)
        if self.training and rate > 0:
            hidden = torch.rand(index.shape, device=acts.device) < rate
            acts = torch.where(hidden[..., None], unseen[index], acts)
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
        mixed = condition[:, None] + genes  # (C, G, h)
        if self.choices["residual"]:
            parts = self.start(table)  # (C, K, G)
            start = parts.sum(dim=1)
            if self.choices["start_input"]:
                features = [start, parts.abs().sum(dim=1), parts.square().sum(dim=1).sqrt()]
                mixed = mixed + self.start_encoder(torch.stack(features, dim=-1) / self.known.scale)
        n_pairs, n_genes, h = mixed.shape
        nodes = self.recovery_mlp(functional.relu(self.condition_norm(mixed.reshape(-1, h)))).reshape(n_pairs, n_genes, h)
        own = torch.einsum("cgh,gh->cg", nodes, self.own_weight) + self.own_bias
        cross = self.cross_mlp(own)  # (C, h)
        change = own * self.head_weight[:, 0] + cross @ self.head_weight[:, 1:].T + self.head_bias
        # no intervention, no change, whatever the biases have learned
        change = change * (table.present & (table.dose > 0)).any(dim=1)[:, None]
        if self.choices["residual"]:
            change = start + change
        if not self.hparams["uncertainty"]:
            return change, None
        # the features are held fixed, so that asking for the uncertainty leaves the mean as it is
        n_unknown = self.unknown(table).sum(dim=1)
        log_variance = self.variance_head(nodes.detach())[..., 0] + self.log_variance[n_unknown.clamp(max=1)]
        return change, log_variance.exp() * n_unknown.clamp(min=1)[:, None]

    def unknown(self, table: ConditionTable) -> Tensor:
        """Shape ``(C, K)``, bool: interventions whose own effect the prediction does not start from."""
        unknown = table.present & (table.dose > 0)
        combined = unknown & (unknown.sum(dim=1) > 1)[:, None]
        unknown[combined] = ~self.known.measured(table.single(*torch.nonzero(combined, as_tuple=True)))
        return unknown

    def start(self, table: ConditionTable) -> Tensor:
        """Shape ``(C, K, G)``: what each intervention is expected to change, before the network has its say.

        In a combination, the measured change of the target alone; for a single, or where that was not measured, what its
        neighbours or the mean single say, whatever the dose. A single does not start from its own change (but for its share in
        the mean of all): nothing would be left to learn from it.
        """
        act = table.present & (table.dose > 0)
        row, column = torch.nonzero(act, as_tuple=True)
        alone = table.single(row, column)
        weights = self.known.single_weights(alone, average=False, mean_for_missing=True)
        unknown = self.unknown(table)[row, column]
        asked = alone.select(torch.nonzero(unknown).ravel())
        weights[unknown] = (
            self.neighbours(self.known, asked) if self.choices["neighbours"] else self.known.mean_single_weights(asked)
        )
        parts = weights.new_zeros(*act.shape, weights.shape[1])
        parts[row, column] = weights
        return parts @ self.known.value

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
            if self.choices["neighbours"]:
                self.neighbours.fit(self.known)
        if self.hparams["uncertainty"] and not self.variance_started:
            self._start_variance()
            self.variance_started.fill_(True)

    @torch.no_grad()
    def _start_variance(self) -> None:
        """Start each gene's variance at its mean squared change from where the network starts: far from what steps can reach."""
        bulks, pairs = self.data.training_pseudobulks(), torch.from_numpy(self.data.pairs_of("train"))
        total, count = torch.zeros_like(self.log_variance), self.log_variance.new_zeros(2)
        for rows in torch.arange(len(pairs)).split(256):
            table = self.data.table.select(pairs[rows]).to(self.device)
            change = torch.as_tensor(bulks.delta[rows], dtype=total.dtype, device=self.device)
            if self.choices["residual"]:
                change = change - self.start(table).sum(dim=1)
            n_unknown = self.unknown(table).sum(dim=1)
            kind, parts = n_unknown.clamp(max=1), n_unknown.clamp(min=1)
            total.index_add_(0, kind, change.square() / parts[:, None])
            count.index_add_(0, kind, torch.ones_like(kind, dtype=count.dtype))
        mean = (total.sum(dim=0) / count.sum()).expand(2, -1)
        self.log_variance.copy_(
            torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], mean).clamp(min=1e-8).log()
        )

    def loss(self, batch: PerturbationBatch) -> dict[str, Tensor]:
        delta, variance = self.delta(batch.table, batch.context_control)
        observed = batch.condition_means(batch.observed) - batch.context_control  # (C, G)
        if self.choices["loss"] == "condition_mse":
            size = observed.abs()
            weight = 1 + self.choices["gene_weighting"] * (size / size.mean(dim=1, keepdim=True).clamp(min=1e-8) - 1)
            terms = {"mse": (weight * (delta - observed).square()).mean()}
        else:
            terms = {"autofocus": autofocus_loss(batch.control + delta[batch.row], batch)}
        if self.choices["direction_weight"] > 0:
            terms["direction"] = self.choices["direction_weight"] * direction_loss(delta, observed)
        if variance is not None:
            terms["likelihood"] = functional.gaussian_nll_loss(delta.detach(), observed, variance, eps=1e-8)
        return terms

    def configure_optimizers(self) -> Any:
        variance = {name for name, _ in self.named_parameters() if "variance" in name}
        groups: list[dict[str, Any]] = [{"params": [value for name, value in self.named_parameters() if name not in variance]}]
        if variance:
            # the mean does not depend on them, so that they can go faster
            parameters = [value for name, value in self.named_parameters() if name in variance]
            groups.append({"params": parameters, "lr": 10 * self.choices["lr"]})
        optimizer = torch.optim.Adam(groups, lr=self.choices["lr"], weight_decay=self.choices["weight_decay"])
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
