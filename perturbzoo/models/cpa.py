r"""CPA: a compositional perturbation autoencoder.

Lotfollahi et al., Molecular Systems Biology 2023, https://doi.org/10.15252/msb.202211517.

A cell :math:`x` under interventions on targets :math:`t` at doses :math:`d_t`, with covariates :math:`k` (cell type, batch):

.. math::
    z &= \mathrm{MLP}(x) \qquad \text{(or } z \sim \mathcal N(m(x), \mathrm{diag}\, v(x)) \text{, variational)} \\
    z' &= z + \textstyle\sum_t s_t(d_t)\, v_t + \sum_k u_k \\
    x &\sim \mathrm{p}(\cdot \mid \mathrm{MLP}(z'), z')

with :math:`p` a likelihood of counts or of log1p-normalised values (:mod:`perturbzoo.models.likelihood`), :math:`v_t` target vectors
(:mod:`perturbzoo.models.targets`) and :math:`s_t` a dose response with :math:`s_t(0) = 0` (:class:`DoseResponse`). The basal state
:math:`z` is to know nothing of perturbation and covariates: adversaries :math:`a` read them from it, the encoder works against that,

.. math::
    \min_{\text{autoencoder}} & -\log p(x) - \lambda\, \mathrm{CE}(a(z)) \\
    \min_{a} & \; \mathrm{CE}(a(z)) + \gamma\, \lVert \nabla_z \textstyle\sum_j a_j(z) \rVert^2,

so that a control cell, encoded and decoded with another condition's vectors, becomes that cell under the condition. Conditions are
encoded once for each distinct condition of a batch, never for each cell.

Two terms are added to the paper's. Adversaries that learn by gradient descent lag behind the encoder: at chance themselves, they leave
in :math:`z` what a classifier fitted afterwards reads with ease. `independence` is the best linear adversary, solved
exactly on each batch. And nothing above trains what is predicted, a control cell under a condition, so that target vectors
stay small while the encoder finds the effect in the cell itself: `response` is the squared error of each condition's mean change.

What the reference got wrong is put right in both modes: projections of a table of target vectors are trained, the learning rate
decays, adversary steps do not run the decoder, nothing is kept on the class. What it chose is kept as named arguments;
``paper=True`` selects all of its choices.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbzoo.data.batch import ConditionTable, PerturbationBatch
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.base import PerturbationModel, Prediction
from perturbzoo.models.compositional import (
    Adversary,
    CovariateVectors,
    DoseResponse,
    adversary_labels,
    choose_controls,
    gradient_penalty,
    linear_information,
    median_dose,
    soft_cross_entropy,
    trained_levels,
    with_controls,
)
from perturbzoo.models.likelihood import CountLikelihood, ExpressionHead, Kind
from perturbzoo.models.targets import TargetVectors, prepare_targets
from perturbzoo.perturbation import KINDS

# argument: (default, the paper's choice)
CHOICES: dict[str, tuple[Any, Any]] = {
    "n_latent": (32, 128),
    "n_hidden": (128, 256),
    "n_layers": (2, 3),
    "norm": ("layer", "batch"),
    "linear": (True, False),
    "residual": (True, False),
    "control_share": (0.25, 0.0625),
    "unseen_rate": (0.1, 0.0),
    "dose_unit": (None, 1.0),
    "adversary": ("reversal", "alternating"),
    "adversary_weight": (10.0, 1.0),
    "penalty_weight": (0.1, 1.0),
    "confusion": ("marginal", "reversed"),
    "independence_weight": (3.0, 0.0),
    "response_weight": (1.0, 0.0),
    "warmup": (0, 0),
    "lr": (3e-3, 5e-4),
    "adversary_lr": (1e-3, 3e-4),
    "dose_lr": (1e-3, 3e-4),
    "weight_decay": (1e-6, 1e-6),
    "lr_decay": (0.95, 0.95),
}


class CPA(PerturbationModel):
    """The compositional autoencoder, with count likelihoods integrated to the zoo's value space.

    Every argument that is None takes the improved default, or the paper's choice where ``paper`` is true.

    Parameters
    ----------
    paper
        Take the original's choices for all arguments that are not given.
    likelihood
        ``nb`` or ``zinb`` of counts, ``gaussian`` of log1p-normalised values; None: ``nb`` where there are counts.
    variational
        Draw the basal state, with a Kullback-Leibler term towards N(0, 1); otherwise it is a function of the cell.
    kl_weight
        Weight of that term.
    dose_response
        ``logsigm``, ``sigm``, ``linear`` or ``mlp``, see :class:`perturbzoo.models.compositional.DoseResponse`.
    embedding, dimension, perturbation_graph
        What is known of targets beside their own effects, as in :class:`perturbzoo.models.gears.GEARS`.
    n_latent, n_hidden, n_layers
        Width L of the basal state, width and number of the hidden layers of encoder and of decoder. The paper's are larger
        than what a screen of some ten thousand cells supports.
    norm
        ``layer``, or the paper's ``batch`` normalisation, which makes a cell's training prediction depend on the others and
        mixes conditions whose batch has few of them.
    linear
        Give the likelihood the sum of vectors beside the decoder's hidden layer: what adds up in the latent space then adds up
        in log rates, the layers learn the rest, and unseen pairs of perturbation and cell type extrapolate.
    residual
        Predict the control plus (decoded with the condition minus decoded without): what the autoencoder does not reconstruct
        of a cell stays. Otherwise what was decoded with the condition, as in the paper.
    control_share
        Control cells in a training step per perturbed cell. Predictions start from controls; the paper sees them as
        one condition of many.
    unseen_rate
        Share of targets that are treated as never perturbed in a training step, as in GEARS; without, an unseen target has a
        vector nobody trained.
    dose_unit
        The dose that counts as one; None for the median training dose, so that nanomolar and micromolar give the same model.
        The paper's 1 saturates ``logsigm`` where doses are large numbers.
    adversary
        ``reversal`` trains adversaries and autoencoder on every batch, each with its own loss (what a gradient-reversal
        layer does): one pass, no batch is lost to the autoencoder. ``alternating``, the paper's, gives it every third.
    adversary_steps
        Batches for the adversaries between two for the autoencoder, if alternating.
    adversary_weight, penalty_weight
        The weights lambda and gamma; a weight of 0 leaves the adversaries out.
    confusion
        ``marginal``: the encoder works towards adversaries that guess by frequency, a bounded aim. ``reversed``, the paper's: it
        makes them as wrong as it can, whereby basal states circle around boundaries.
    independence_weight
        Weight of what the best linear adversary knows of a cell's condition and context, in nats
        (:func:`perturbzoo.models.compositional.linear_information`). 0 in the paper.
    response_weight
        Weight of the squared error of mean changes, in units of the variance of expression. 0 in the paper.
    warmup
        Epochs over which the weights lambda, of independence and of the Kullback-Leibler term rise from 0.
    lr, adversary_lr, dose_lr, weight_decay, lr_decay
        Adam's learning rates and L2 penalty, and the factor by which all rates shrink each epoch (the paper's tenth in 45).
    """

    centre: Tensor
    matched: Tensor
    variance: Tensor

    def __init__(
        self,
        paper: bool = False,
        likelihood: Kind | None = None,
        variational: bool = False,
        kl_weight: float = 1.0,
        dose_response: Literal["logsigm", "sigm", "linear", "mlp"] = "logsigm",
        embedding: str | None = None,
        dimension: int = 20,
        perturbation_graph: list[dict[str, Any]] | None = None,
        n_latent: int | None = None,
        n_hidden: int | None = None,
        n_layers: int | None = None,
        norm: Literal["layer", "batch"] | None = None,
        linear: bool | None = None,
        residual: bool | None = None,
        control_share: float | None = None,
        unseen_rate: float | None = None,
        dose_unit: float | None = None,
        adversary: Literal["reversal", "alternating"] | None = None,
        adversary_steps: int = 2,
        adversary_weight: float | None = None,
        penalty_weight: float | None = None,
        confusion: Literal["marginal", "reversed"] | None = None,
        independence_weight: float | None = None,
        response_weight: float | None = None,
        warmup: int | None = None,
        lr: float | None = None,
        adversary_lr: float | None = None,
        dose_lr: float | None = None,
        weight_decay: float | None = None,
        lr_decay: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        given = {name: self.hparams[name] for name in CHOICES}
        self.choices = {name: CHOICES[name][paper] if value is None else value for name, value in given.items()}
        self._batch = 0

    # ------------------------------------------------------------------ what is computed from training cells, and the layers

    def prepare(self, data: PerturbSeqDataModule) -> dict[str, Any]:
        import numpy as np

        options = {name: self.hparams[name] for name in ("embedding", "dimension", "perturbation_graph")}
        cells, spec = data.training_cells(), self.get_spec()
        mean = np.asarray(cells.mean(axis=0)).ravel()
        spread = np.sqrt(np.maximum(np.asarray(cells.multiply(cells).mean(axis=0)).ravel() - mean**2, 0))
        start = {"mean": torch.from_numpy(mean).float(), "spread": torch.from_numpy(spread).float()}
        if spec.depth > 0:
            np.expm1(cells.data, out=cells.data)
            start["rate"] = torch.from_numpy(np.asarray(cells.mean(axis=0)).ravel() / spec.depth).float()
        return {**prepare_targets(data, spec, **options), "start": start}

    @property
    def target_names(self) -> tuple[str, ...]:
        return (*self.get_spec().targets, *self.prepared.get("extra", ()))

    @property
    def kind(self) -> Kind:
        """The likelihood.

        Raises
        ------
        PerturbZooError
            A likelihood of counts is asked for, and there are none.
        """
        spec, wanted = self.get_spec(), self.hparams["likelihood"]
        if spec.depth <= 0 and wanted in ("nb", "zinb"):
            raise PerturbZooError(
                f"likelihood '{wanted}' needs raw counts, the data hold log1p values only: set likelihood to 'gaussian' or leave "
                "it out, or give a file with counts"
            )
        return wanted or ("nb" if spec.depth > 0 else "gaussian")

    def build(self) -> None:
        from scvi.nn import FCLayers  # seconds, which '--help' has no use for

        spec, choices, start = self.get_spec(), self.choices, self.prepared["start"]
        latent, hidden, kind = choices["n_latent"], choices["n_hidden"], self.kind
        norms = {"use_batch_norm": choices["norm"] == "batch", "use_layer_norm": choices["norm"] == "layer"}
        layers = {"n_layers": choices["n_layers"], "n_hidden": hidden, "dropout_rate": 0.0, **norms}
        self.register_buffer("centre", start["mean"], persistent=False)
        self.register_buffer("variance", start["spread"].square().mean().clamp(min=1e-8), persistent=False)
        self.encoder = FCLayers(spec.n_genes, hidden, **layers)
        self.to_basal = nn.Linear(hidden, 2 * latent if self.hparams["variational"] else latent)
        # its scale must not be a way to hide from adversaries; a variational one has the scale of its prior
        fixed = choices["norm"] == "layer" and not self.hparams["variational"]
        self.basal_norm = nn.LayerNorm(latent, elementwise_affine=False) if fixed else nn.Identity()
        self.decoder = FCLayers(latent, hidden, **layers)
        level = start["mean"] if kind == "gaussian" else start["rate"].clamp(min=1e-8).log()
        self.head = ExpressionHead(kind, hidden + latent * choices["linear"], level, start["spread"])
        self.targets = TargetVectors(self.prepared, latent, scale=0.1)
        self.kind_embedding = nn.Embedding(len(KINDS), latent)
        nn.init.zeros_(self.kind_embedding.weight)
        unit = choices["dose_unit"] or median_dose(spec)
        self.dose = DoseResponse(self.hparams["dose_response"], self.prepared["trained"], unit)
        self.covariates = CovariateVectors(trained_levels(spec), latent)
        # a covariate that controls are not matched on is unknown for them
        matched = torch.tensor([name in spec.match_on for name in spec.covariates], dtype=torch.bool)
        self.register_buffer("matched", matched, persistent=False)
        classes = [len(self.target_names) + 1, *map(len, spec.covariates.values())]
        self.adversary = Adversary(latent, classes, norms) if choices["adversary_weight"] > 0 else None

    def parameter_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {
            "encoder.fc_layers.Layer 0.0.weight": (None, "gene"),
            "head.centre.weight": ("gene", None),
            "head.centre.bias": ("gene",),
            "head.dropout.weight": ("gene", None),
            "head.dropout.bias": ("gene",),
            "head.log_dispersion": ("gene",),
            "targets.learned.weight": ("target", None),
            "dose.own": ("target", None),
        }

    # ------------------------------------------------------------------ from cells to cells

    def encode(self, expression: Tensor) -> tuple[Tensor, Tensor | None]:
        """Basal states ``(B, L)`` of log1p-normalised cells ``(B, G)``, and their log variance if variational."""
        basal = self.to_basal(self.encoder(expression - self.centre))
        if not self.hparams["variational"]:
            return self.basal_norm(basal), None
        mean, log_variance = basal.chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 5)

    def condition_vectors(self, table: ConditionTable) -> Tensor:
        """Shape ``(C, L)``: the sum over a condition's targets, so that their order cannot matter; 0 at dose 0."""
        seen, unseen = self.targets()
        index = table.targets.clamp(min=0)
        acts = seen[index]  # (C, K, L)
        if self.training and (rate := self.choices["unseen_rate"]) > 0:
            hidden = torch.rand(index.shape, device=acts.device) < rate
            acts = torch.where(hidden[..., None], unseen[index], acts)
        acts = acts + self.kind_embedding(table.kind.clamp(min=0))
        strength = self.dose(index, table.dose) * table.present  # (C, K)
        return (acts * strength[..., None]).sum(dim=1)

    def decode(self, state: Tensor) -> Tensor:
        """What the likelihood is computed from, ``(B, width)``, for states ``(B, L)`` with all vectors added."""
        hidden = self.decoder(state)
        return torch.cat([hidden, state], dim=1) if self.choices["linear"] else hidden

    def _states(self, batch: PerturbationBatch) -> tuple[Tensor, Tensor]:
        """Control cells with their covariates' vectors, ``(B, L)``, and what their conditions add to them, ``(B, L)``."""
        basal, _ = self.encode(batch.control)
        return basal + self.covariates(batch.covariates), self.condition_vectors(batch.table)[batch.row]

    def forward(self, batch: PerturbationBatch) -> Prediction:
        (state, change), size = self._states(batch), batch.control_size_factor
        mean = self.head.expected(self.decode(state + change), size, batch.depth)
        if self.choices["residual"]:
            mean = batch.control + mean - self.head.expected(self.decode(state), size, batch.depth)
        return Prediction(mean)

    def sample(self, batch: PerturbationBatch) -> Tensor:
        """Draw a cell of its condition for each control cell from the likelihood: ``(B, G)``, log1p-normalised."""
        state, change = self._states(batch)
        return self.head.sample(self.decode(state + change), batch.control_size_factor, batch.depth)

    @property
    def keeps_cell_noise(self) -> bool:
        return bool(self.choices["residual"])

    @property
    def has_count_likelihood(self) -> bool:
        return self.kind != "gaussian"

    def count_likelihood(self, batch: PerturbationBatch) -> CountLikelihood:
        state, change = self._states(batch)
        return self.head.count_likelihood(self.decode(state + change), batch.control_size_factor)

    # ------------------------------------------------------------------ losses

    def loss(self, batch: PerturbationBatch) -> dict[str, Tensor]:
        chosen = choose_controls(batch, self.choices["control_share"])
        cells = with_controls(batch, chosen, self.matched)
        alternating = self.adversary is not None and self.choices["adversary"] == "alternating"
        turn = alternating and self._batch % (self.hparams["adversary_steps"] + 1) != 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and not turn):
            basal, log_variance = self.encode(cells.observed)
            if log_variance is not None:
                kl = 0.5 * (basal.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()
                basal = basal + torch.randn_like(basal) * (0.5 * log_variance).exp()
        terms: dict[str, Tensor] = {}
        sizes = list(map(len, self.get_spec().covariates.values()))
        labels = adversary_labels(cells, len(self.target_names), sizes) if self.adversary is not None else []
        if self.adversary is not None and (turn or not alternating):
            terms["adversary"] = soft_cross_entropy(self.adversary(basal.detach()), labels)
            terms["penalty"] = self.choices["penalty_weight"] * gradient_penalty(self.adversary, basal)
        if turn:
            return terms
        vectors = torch.cat([self.condition_vectors(batch.table), basal.new_zeros(1, basal.shape[1])])  # (C + 1, L)
        covariates = self.covariates(cells.covariates)
        features = self.decode(basal + vectors[cells.row] + covariates)
        values = cells.observed if self.head.kind == "gaussian" else cells.counts
        terms["likelihood"] = self.head.negative_log_likelihood(features, values, cells.size_factor)
        ramp = min(1.0, (self.current_epoch + 1) / (self.choices["warmup"] + 1))
        if log_variance is not None:
            terms["kl"] = ramp * self.hparams["kl_weight"] * kl
        if self.choices["independence_weight"] > 0:
            group = torch.cat([batch.row, len(batch.table) + batch.table.context[batch.row[chosen]]])
            terms["independence"] = ramp * self.choices["independence_weight"] * linear_information(basal, group)
        if self.choices["response_weight"] > 0:
            # every second control: the noise of a cell is in both terms of its change
            state, untreated = (basal + covariates)[len(batch) :: 2], features[len(batch) :: 2]
            response = self._response_loss(batch, chosen[::2], state, untreated, vectors)
            terms["response"] = self.choices["response_weight"] * response
        if self.adversary is not None:
            # the adversaries as they are: this term teaches the encoder only
            guess = self.adversary.frozen(basal)
            if self.choices["confusion"] == "reversed":
                fooled = -soft_cross_entropy(guess, labels)
            else:
                fooled = soft_cross_entropy(guess, [label.mean(dim=0, keepdim=True) for label in labels])
            terms["confusion"] = ramp * self.choices["adversary_weight"] * fooled
        return terms

    def _response_loss(
        self, batch: PerturbationBatch, chosen: Tensor, state: Tensor, features: Tensor, vectors: Tensor
    ) -> Tensor:
        """Squared error of each condition's mean change, as predicted from the n `chosen` controls of the step.

        In units of the variance of expression, half the sum over genes: as much as the likelihood of a cell. `state` ``(n, L)`` is
        what these controls are decoded from, `features` ``(n, width)`` what they were decoded to.
        """
        row, size = batch.row[chosen], batch.control_size_factor[chosen]
        treated = self.head.expected(self.decode(state + vectors[row]), size, batch.depth)
        change = treated - self.head.expected(features, size, batch.depth)  # (n, G)
        n = torch.bincount(row, minlength=len(batch.table))[:, None]
        predicted = change.new_zeros(len(batch.table), change.shape[1]).index_add_(0, row, change) / n.clamp(min=1)
        observed = batch.condition_means(batch.observed) - batch.context_control
        error = (predicted - observed).square() * (n > 0)
        return 0.5 * error.sum() / (n > 0).sum() / self.variance

    def training_step(self, batch: PerturbationBatch, batch_idx: int) -> Tensor:
        self._batch = batch_idx
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        choices = self.choices
        rates = {"adversary": choices["adversary_lr"], "dose": choices["dose_lr"]}
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            room = name.split(".")[0]
            groups.setdefault(room if room in rates else "autoencoder", []).append(parameter)
        optimizer = torch.optim.Adam(
            [{"params": members, "lr": rates.get(room, choices["lr"])} for room, members in groups.items()],
            weight_decay=choices["weight_decay"],
        )
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=choices["lr_decay"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    # ------------------------------------------------------------------ test

    def on_test_epoch_end(self) -> None:
        from perturbzoo.models.disentanglement import report_disentanglement

        super().on_test_epoch_end()
        report_disentanglement(self, self.data, lambda cells: self.encode(cells)[0])
