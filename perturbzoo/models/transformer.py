r"""A transformer over gene tokens, as scGPT is fine-tuned on perturbations.

Cui et al., Nature Methods 2024, https://doi.org/10.1038/s41592-024-02201-0.

The token of gene :math:`g` in a control cell :math:`x` under a condition :math:`c` is

.. math::
    z_g = \mathrm{N}(e_g) + V(x_g) + f_{[g \in c]} + \sum_{t \in c,\, t = g} (v_t + k_t) \log_2(1 + d_t) + r\, s_{cg}

with a gene embedding :math:`e`, :math:`V` a two-layer network of the value, :math:`f_0, f_1` the perturbation flag,
:math:`v_t` target vectors (:mod:`perturbzoo.models.targets`), :math:`k_t` the kind and :math:`d_t` the dose of the
intervention. A target that is no measured gene has a token of its own, with a learned vector in place of
:math:`\mathrm{N}(e) + V(x)`. There is no position: genes are a set. Each block does, with :math:`\mathrm{SA}` multi-head
softmax attention,

.. math::
    z \leftarrow z + \mathrm{SA}(\mathrm{N}(z)), \qquad z \leftarrow z + W_2 \mathrm{ReLU}(W_1 \mathrm{N}(z))

or, as in scGPT, :math:`z \leftarrow \mathrm{N}(z + \mathrm{SA}(z))`,
:math:`z \leftarrow \mathrm{N}(z + W_2 \mathrm{ReLU}(W_1 z))`. The decoder is affine in the value, with two networks of three
layers :math:`A` and :math:`b`:

.. math::
    \hat\delta_{cg} = s_{cg} + A(z_g)\, x_g + b(z_g) \quad\text{or, in scGPT,}\quad \hat y_{cg} = A(z_g)\, x_g + b(z_g).

:math:`s` is the baseline that the network starts from: the sum of the targets' measured changes for a combination, the
training mean for a single. scGPT has :math:`v = k = s = 0`.

What the original got wrong is put right in every mode: it samples 1,536 genes for a training step, so that the perturbed
gene and its flag are absent from most steps, and predicts from sequences of all genes. Here the perturbed genes are tokens
of every sequence, and prediction goes through disjoint groups of genes as long as in training. The best epoch is that of the
correlation of changes, not of raw expression. Genes outside scGPT's vocabulary have embeddings of their own.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from perturbzoo.data.batch import ConditionTable, PerturbationBatch
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.attention import Block, ValueEncoder, add_lora, bin_values, decoder
from perturbzoo.models.base import PerturbationModel, Prediction
from perturbzoo.models.known import TrainingDeltas
from perturbzoo.models.scgpt_weights import take_scgpt_weights
from perturbzoo.models.targets import TargetVectors, prepare_targets
from perturbzoo.perturbation import KINDS

# argument: (default, scGPT's choice)
CHOICES: dict[str, tuple[Any, Any]] = {
    "per": ("condition", "cell"),
    "loss": ("condition_mse", "cell_mse"),
    "output": ("change", "expression"),
    "residual": (True, False),
    "start_input": (True, False),
    "target_vectors": (True, False),
    "unseen_rate": (0.5, 0.0),
    "norm_first": (True, False),
    "lr": (5e-4, 1e-4),
    "lr_decay": (0.95, 0.9),
}


class Transformer(PerturbationModel):
    """Gene tokens with values and perturbation flags, blocks of attention, an affine decoder.

    Each of the last ten arguments takes the improved default where it is None, or scGPT's choice where ``paper`` is true.

    Parameters
    ----------
    paper
        Take scGPT's choices for all arguments that are not given.
    width, layers, heads, feedforward, dropout
        Width h of tokens, number of blocks and of attention heads, width of a block's middle layer (None: h), dropout in the
        blocks. scGPT has 512, 12, 8, 512 and, in fine-tuning, 0.
    max_genes
        Gene tokens of a sequence at most. A training step samples that many, the perturbed genes of the batch among them;
        prediction cuts the genes into disjoint groups as long. Every sequence holds its own condition's targets.
    cells_per_forward
        Sequences that a prediction runs at a time: bounds its memory.
    values, n_bins
        Input ``continuous``, log1p-normalised, as scGPT is fine-tuned, or ``binned``, as it was pre-trained with 51 bins
        (:func:`~perturbzoo.models.attention.bin_values`). The same in training and prediction; the decoder's are continuous.
    embedding, dimension, perturbation_graph
        Tables and graphs for target vectors, as in :class:`perturbzoo.models.gears.GEARS`.
    pretrained
        Folder of published scGPT weights to start from (:func:`perturbzoo.models.scgpt_weights.read_scgpt`).
    lora_rank
        Keep the blocks' weights as they are and train additions of this rank (:func:`~perturbzoo.models.attention.add_lora`).
    compile, bf16, gradient_checkpointing
        Compile the blocks; run in bfloat16 where that is safe, also in prediction, which has no trainer; compute what is in a
        block again in the backward pass instead of keeping it, which saves memory and costs a third more time.
    per
        ``condition``: one sequence for each distinct condition, of its context's mean control profile: only the expected
        change is learned, and there are some thirty times fewer sequences. ``cell``: one for each control cell, scGPT's.
    loss
        ``condition_mse``: squared error of each condition's mean change. ``cell_mse``, scGPT's: of each cell, predicted from a
        random control; most of that is the noise of cells.
    output
        Whether the network gives the ``change`` from the control, or scGPT's ``expression``, nearly all of which is control.
    residual, start_input
        Start from what the singles say (:meth:`perturbzoo.models.known.TrainingDeltas.residual_weights`), which the untrained
        model predicts, because the decoder of a ``change`` starts at 0; let each gene's token know its part of that.
    target_vectors
        Add the target's vector to the token of a perturbed measured gene: without it, the flag alone says what was done, and
        the gene's embedding what that does. A target that is not measured always has one.
    unseen_rate
        Share of targets treated as never perturbed in a training step, as in GEARS.
    norm_first
        Pre-norm blocks, which train without warm-up, or scGPT's post-norm, which is the default of ``pretrained`` too.
    lr, lr_decay, weight_decay
        Adam's learning rate, the factor by which it shrinks each epoch, and L2 penalty.
    """

    known: TrainingDeltas
    gene_of_target: Tensor
    pretrained_taken: Tensor

    def __init__(
        self,
        paper: bool = False,
        width: int = 64,
        layers: int = 3,
        heads: int = 4,
        feedforward: int | None = None,
        dropout: float = 0.0,
        max_genes: int = 1536,
        cells_per_forward: int = 64,
        values: Literal["continuous", "binned"] = "continuous",
        n_bins: int = 51,
        embedding: str | None = None,
        dimension: int = 20,
        perturbation_graph: list[dict[str, Any]] | None = None,
        pretrained: str | None = None,
        lora_rank: int = 0,
        compile: bool = False,
        bf16: bool = False,
        gradient_checkpointing: bool = False,
        weight_decay: float = 0.0,
        per: Literal["condition", "cell"] | None = None,
        loss: Literal["condition_mse", "cell_mse"] | None = None,
        output: Literal["change", "expression"] | None = None,
        residual: bool | None = None,
        start_input: bool | None = None,
        target_vectors: bool | None = None,
        unseen_rate: float | None = None,
        norm_first: bool | None = None,
        lr: float | None = None,
        lr_decay: float | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise PerturbZooError(f"width is {width}, heads is {heads}: give a width that the number of heads divides")
        if min(layers, max_genes, cells_per_forward, n_bins - 1) < 1:
            raise PerturbZooError("layers, max_genes and cells_per_forward must be 1 or more, and n_bins 2 or more")
        self.save_hyperparameters()
        given = {name: self.hparams[name] for name in CHOICES}
        self.choices = {name: CHOICES[name][paper] if value is None else value for name, value in given.items()}
        if pretrained is not None and norm_first is None:
            self.choices["norm_first"] = False  # the weights' own arrangement

    def prepare(self, data: PerturbSeqDataModule) -> dict[str, Any]:
        options = {name: self.hparams[name] for name in ("embedding", "dimension", "perturbation_graph")}
        return prepare_targets(data, self.get_spec(), **options)

    @property
    def target_names(self) -> tuple[str, ...]:
        return (*self.get_spec().targets, *self.prepared.get("extra", ()))

    # ------------------------------------------------------------------ the network

    def build(self) -> None:
        spec, h, choices = self.get_spec(), self.hparams["width"], self.choices
        row = {gene: position for position, gene in enumerate(spec.genes)}
        gene_of_target = torch.tensor([row.get(name, -1) for name in self.target_names], dtype=torch.int64)
        self.register_buffer("gene_of_target", gene_of_target, persistent=False)
        self.register_buffer("pretrained_taken", torch.tensor(False))
        self.n_groups = math.ceil(spec.n_genes / self.hparams["max_genes"])
        self.length = math.ceil(spec.n_genes / self.n_groups)

        self.gene_embedding, self.gene_norm = nn.Embedding(spec.n_genes, h), nn.LayerNorm(h)
        self.value_encoder = ValueEncoder(h)
        self.flag_embedding = nn.Embedding(2, h)
        self.unmeasured = nn.Parameter(torch.randn(h))
        self.targets = TargetVectors(self.prepared, h, everyone_speaks=choices["unseen_rate"] == 0)
        self.kind_embedding = nn.Embedding(len(KINDS), h)
        nn.init.zeros_(self.kind_embedding.weight)  # kinds differ in nothing until the data say so
        if choices["residual"]:
            self.known = TrainingDeltas(spec)
            if choices["start_input"]:
                self.start_encoder = nn.Linear(1, h, bias=False)
        sizes = (h, self.hparams["heads"], self.hparams["feedforward"] or h, self.hparams["dropout"])
        self.blocks = nn.ModuleList(Block(*sizes, choices["norm_first"]) for _ in range(self.hparams["layers"]))
        # the last pre-norm block leaves its sum as it is
        self.final_norm = nn.LayerNorm(h) if choices["norm_first"] else nn.Identity()
        silent = choices["output"] == "change"  # the untrained model predicts the baseline
        self.slope, self.intercept = decoder(h, silent), decoder(h, silent)

    def configure_model(self) -> None:
        super().configure_model()
        if not self._built:
            return
        # after weights are taken from another model, which go by the names of plain layers
        if self.hparams["lora_rank"] and not any("lora_" in name for name, _ in self.blocks.named_parameters()):
            add_lora(self.blocks, self.hparams["lora_rank"])
        if self.hparams["compile"]:
            for block in self.blocks:
                block.compile()  # in place: the names of the weights stay as they are

    def parameter_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {"gene_embedding.weight": ("gene", None), "targets.learned.weight": ("target", None)}

    def marks(self, table: ConditionTable) -> Tensor:
        """Shape ``(C, K, h)``: what each intervention adds to the token of its target."""
        seen, unseen = self.targets()
        index, rate = table.targets.clamp(min=0), self.choices["unseen_rate"]
        acts = seen[index]
        if self.training and rate > 0:
            hidden = torch.rand(index.shape, device=acts.device) < rate
            acts = torch.where(hidden[..., None], unseen[index], acts)
        acts = acts + self.kind_embedding(table.kind.clamp(min=0))
        # dose 1 counts once, dose 0 not at all
        return acts * (torch.log2(1 + table.dose) * table.present)[..., None]

    def start(self, table: ConditionTable) -> Tensor | None:
        """Shape ``(C, G)``: the baseline's change, or None where the model starts from nothing."""
        return self.known.residual_weights(table) @ self.known.value if self.choices["residual"] else None

    def change(
        self, values: Tensor, genes: Tensor, table: ConditionTable, row: Tensor, marks: Tensor, start: Tensor | None
    ) -> Tensor:
        """The predicted change of some genes.

        Parameters
        ----------
        values
            Shape ``(N, G)``, log1p-normalised: control profiles.
        genes
            Shape ``(M,)``: the genes of the sequence, each once.
        table, row
            C pairs, and the pair of each profile, ``(N,)``.
        marks, start
            What :meth:`marks` and :meth:`start` say of the pairs.

        Returns
        -------
        Shape ``(N, M)``.
        """
        context: Any = contextlib.nullcontext()
        if self.hparams["bf16"]:
            context = torch.autocast(values.device.type, dtype=torch.bfloat16)
        with context:
            tokens, mask = self.tokens(values, genes, table, row, marks, start)
            for block in self.blocks:
                if self.hparams["gradient_checkpointing"] and torch.is_grad_enabled():
                    tokens = checkpoint(block, tokens, mask, use_reentrant=False)
                else:
                    tokens = block(tokens, mask)
            tokens = self.final_norm(tokens[:, : len(genes)])  # (N, M, h)
            slope, intercept = self.slope(tokens)[..., 0], self.intercept(tokens)[..., 0]
        chosen = values[:, genes]
        change = slope.to(chosen) * chosen + intercept.to(chosen)
        if self.choices["output"] == "expression":
            change = change - chosen
        else:
            # no intervention, no change, whatever the biases have learned
            change = change * (table.present & (table.dose > 0)).any(dim=1)[row, None]
        return change if start is None else change + start[:, genes][row]

    def tokens(
        self, values: Tensor, genes: Tensor, table: ConditionTable, row: Tensor, marks: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens ``(N, M + S, h)``, S for targets beyond the genes, and which exist, ``(N, 1, 1, M + S)`` or None for all."""
        inputs = bin_values(values, self.hparams["n_bins"]) if self.hparams["values"] == "binned" else values
        act = table.present & (table.dose > 0)  # (C, K)
        gene = torch.where(act, self.gene_of_target[table.targets.clamp(min=0)], -1)
        place = torch.full((values.shape[1],), -1, device=genes.device)
        place[genes] = torch.arange(len(genes), device=genes.device)
        position = torch.where(gene >= 0, place[gene.clamp(min=0)], -1)  # (C, K): of the target in the sequence
        inside = position >= 0

        # what the condition says of its genes, once for each condition
        flags = torch.zeros(len(table), len(genes), dtype=torch.int64, device=genes.device)
        flags = flags.scatter_add(1, position.clamp(min=0), inside.long()).clamp(max=1)
        said = self.flag_embedding(flags)  # (C, M, h)
        if self.choices["target_vectors"]:
            index = position.clamp(min=0)[..., None].expand_as(marks)
            said = said.scatter_add(1, index, (marks * inside[..., None]).to(said))
        if start is not None and self.choices["start_input"]:
            said = said + self.start_encoder(start[:, genes, None] / self.known.scale)
        tokens = self.gene_norm(self.gene_embedding(genes)) + self.value_encoder(inputs[:, genes]) + said[row]

        # targets that are not in the sequence have tokens at its end, those that a condition has come first
        outside = act & ~inside
        n_more = int(outside.sum(dim=1).max())
        if n_more == 0:
            if torch.is_grad_enabled():
                # every parameter takes part in every step, as several processes need it
                tokens = tokens + 0 * (self.unmeasured + marks.sum())
            return tokens, None
        order = outside.int().argsort(dim=1, descending=True, stable=True)[:, :n_more]  # (C, S)
        there, gene = outside.gather(1, order), gene.gather(1, order)
        measured = (gene >= 0)[..., None]
        mark = marks.gather(1, order[..., None].expand(-1, -1, marks.shape[2]))
        mark = mark if self.choices["target_vectors"] else mark * ~measured
        more = self.flag_embedding.weight[1] + mark + torch.where(measured, 0.0, self.unmeasured)
        gene = gene.clamp(min=0)
        own = self.gene_norm(self.gene_embedding(gene))
        if start is not None and self.choices["start_input"]:
            own = own + self.start_encoder(start.gather(1, gene)[..., None] / self.known.scale)
        value = self.value_encoder(inputs.gather(1, gene[row]))  # (N, S, h)
        tokens = torch.cat([tokens, more[row] + (own[row] + value) * measured[row]], dim=1)
        if there.all():
            return tokens, None  # without a mask the attention has its fastest kernel
        mask = torch.cat([there.new_ones(len(table), len(genes)), there], dim=1)
        return tokens, mask[row][:, None, None]

    # ------------------------------------------------------------------ prediction

    def groups(self) -> list[Tensor]:
        """Disjoint groups of genes, each of the length that training samples (the last ones may have one gene fewer)."""
        genes = torch.arange(self.get_spec().n_genes, device=self.gene_of_target.device)
        # genes that stand beside each other in a file may belong together: a sample would not hold them all
        return [genes[first :: self.n_groups] for first in range(self.n_groups)]

    def changes(self, values: Tensor, table: ConditionTable, row: Tensor) -> Tensor:
        """Shape ``(N, G)``: the change of every gene, group by group, a bounded number of profiles at a time."""
        marks, start = self.marks(table), self.start(table)
        changes = torch.empty_like(values)
        size = self.hparams["cells_per_forward"]
        for genes in self.groups():
            parts = [
                self.change(part, genes, table, rows, marks, start)
                for part, rows in zip(values.split(size), row.split(size), strict=True)
            ]
            changes[:, genes] = torch.cat(parts)
        return changes

    @property
    def handles_dose(self) -> bool:
        return self.choices["target_vectors"] or set(self.target_names).isdisjoint(self.get_spec().genes)

    @property
    def changes_cells_alike(self) -> bool:
        return self.choices["per"] == "condition"

    def delta(self, table: ConditionTable, context_control: Tensor) -> tuple[Tensor, None]:
        return self.changes(context_control, table, torch.arange(len(table), device=context_control.device)), None

    def forward(self, batch: PerturbationBatch) -> Prediction:
        if self.choices["per"] == "cell":
            return Prediction(batch.control + self.changes(batch.control, batch.table, batch.row))
        return Prediction(batch.control + self.delta(batch.table, batch.context_control)[0][batch.row])

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        if self.choices["residual"]:
            self.known.fit(self.data.training_pseudobulks())
        if self.hparams["pretrained"] and not self.pretrained_taken:
            print(take_scgpt_weights(self, self.hparams["pretrained"], self.get_spec().genes, self.hparams["heads"]))
            self.pretrained_taken.fill_(True)  # a checkpoint goes on from its own weights

    def sample_genes(self, table: ConditionTable) -> Tensor:
        """The genes of a training step: measured targets of the batch first, the rest at random."""
        n_genes = self.get_spec().n_genes
        if self.n_groups == 1:
            return torch.arange(n_genes, device=table.targets.device)
        priority = torch.rand(n_genes, device=table.targets.device)
        gene = self.gene_of_target[table.targets.clamp(min=0)]
        perturbed = (gene >= 0) & table.present & (table.dose > 0)
        priority[gene[perturbed]] = 1.0 + torch.rand(int(perturbed.sum()), device=priority.device)
        return priority.topk(self.length).indices

    def loss(self, batch: PerturbationBatch) -> dict[str, Tensor]:
        table, genes = batch.table, self.sample_genes(batch.table)
        of_cell = self.choices["per"] == "cell"
        row = batch.row if of_cell else torch.arange(len(table), device=batch.row.device)
        profile = batch.control if of_cell else batch.context_control
        change = self.change(profile, genes, table, row, self.marks(table), self.start(table))
        observed = batch.observed[:, genes]
        if self.choices["loss"] == "cell_mse":
            predicted = batch.control[:, genes] + (change if of_cell else change[batch.row])
            return {"mse": functional.mse_loss(predicted, observed)}
        expected = batch.condition_means(observed) - batch.context_control[:, genes]  # (C, M)
        return {"mse": functional.mse_loss(batch.condition_means(change) if of_cell else change, expected)}

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.choices["lr"], weight_decay=self.hparams["weight_decay"])
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=self.choices["lr_decay"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}
