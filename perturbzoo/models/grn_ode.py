r"""GRNODE: a gene regulatory network as an ordinary differential equation, alone or around any model of the zoo.

Kinetics (:mod:`perturbzoo.grn.dynamics`), with x the levels of all genes and the interventions of a condition c acting by their
biology (:mod:`perturbzoo.grn.interventions`):

.. math:: \dot x = v\, f(b + W \varphi(\eta_c x))\, \kappa_c(t) + s_c(t) - \gamma x, \qquad
    z_c = \log x^*_c - \log x^*_0

with :math:`x^*` the steady states. W lives on candidate edges: a prior's, those that the screen points at, all pairs of few genes.
Weights, basal levels and guide strengths are fitted to the training pseudobulks by :mod:`perturbzoo.grn.fitting`; no step
of it looks at single cells, and one epoch of ``fit`` is all it needs. Equations of this kind go back to the modular response analysis
of Kholodenko et al. (PNAS 2002); the steady state with interventions as parameters to PerturbODE (https://arxiv.org/abs/2501.02409)
and Bicycle (Rohbeck et al., CLeaR 2024).

A prediction in the zoo's space integrates negative binomial counts: with m a gene's control level and :math:`\alpha` its
dispersion,

.. math:: \hat\delta_{cg} = \mathbb{E}\log1p(n \mid m e^{z}) - \mathbb{E}\log1p(n \mid m)

**Around a model.** A backbone predicts :math:`\hat\delta^B`. It is trained first, and stays as it is. Its changes, as log levels
:math:`z^B`, are moved towards what the network can do,

.. math:: \tilde z = \arg\min_z |z - z^B|^2 + \tau\, |z - \log F_c(e^z)|^2, \qquad
    \hat\delta = \hat\delta^B + \hat\delta(\tilde z) - \hat\delta(z^B)

F is the map whose fixed point is the steady state, and :math:`\tau` what is best on the validation conditions: 0, which leaves the
backbone alone, among them. Conditions that nobody measured, predicted by the backbone, can join the fit with a weight
(`distil`): what the backbone knows of them reaches the network.

Ask a fitted model what it has learned with :mod:`perturbzoo.models.network_answers`.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from perturbzoo.data.batch import ConditionTable, PerturbationBatch, encode_conditions
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.evaluation.pseudobulk import Pseudobulks
from perturbzoo.grn.candidates import candidate_network, with_latent
from perturbzoo.grn.consistency import project
from perturbzoo.grn.course_fitting import CourseOptions, fit_time_course
from perturbzoo.grn.fitted import FittedNetwork
from perturbzoo.grn.fitting import FitOptions, fit_network
from perturbzoo.grn.inference import read_prior
from perturbzoo.grn.levels import Levels
from perturbzoo.grn.network import GeneRegulatoryNetwork
from perturbzoo.models import find_model
from perturbzoo.models.backbone import mean_delta, read_or_train
from perturbzoo.models.base import ConditionDeltaModel, PerturbationModel
from perturbzoo.models.network_answers import NetworkAnswers
from perturbzoo.models.network_data import (
    LevelSpace,
    extrinsic_noise,
    joined,
    predicted_levels,
    training_course,
    training_levels,
)
from perturbzoo.perturbation import Condition, Intervention

TAUS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)


class GRNODE(NetworkAnswers, LevelSpace, ConditionDeltaModel):
    """A network's kinetics, alone or around another model.

    Parameters
    ----------
    backbone
        A model of the zoo, ``{class_path: GEARS, init_args: {...}}``, or the path of its checkpoint; None: the network alone.
    backbone_epochs
        Epochs a backbone that is given by its class is trained for; the best by the validation conditions is kept.
    joint
        Go on training the backbone in the epochs of the fit, towards the data and towards the network's own prediction. The
        configuration's one epoch of one batch is for the network alone: give ``trainer.max_epochs`` and ``limit_train_batches: 1.0``.
    joint_weight
        Weight of the latter.
    distil, distil_conditions
        Weight beside a measured condition's 1, and number, of unmeasured conditions (singles first, then pairs) for which the
        backbone's prediction joins the network's fit. 0: none.
    tau
        Weight of the projection; None: the best of a few on the validation conditions.
    prior
        Network believed before, in any layout that perturbzoo reads; or several, whose edges are joined.
    prior_use
        ``weight``: its edges cost less. ``restrict``: there are no others.
    kinetics, penalty, prior_strength, sparsity, sign_penalty, stability
        As in :class:`perturbzoo.grn.fitting.FitOptions`.
    screened
        Regulators of each gene beside the prior's, where there are more than 500 nodes; see
        :func:`perturbzoo.grn.candidates.candidate_network`.
    latent
        Regulators that nobody measured.
    members
        Fits to the data and, from the second on, to data with noise of their standard errors: edges' probabilities, and the
        error of predictions, from how they differ.
    residual_steps, fixed_point_steps, lr
        Of each fit.
    time_key
        obs column of the time since the interventions, in any unit: the fit's steady state is each condition's last time. Without
        it cells of all times are averaged.
    time_course
        Then refine on all times (:func:`perturbzoo.grn.course_fitting.fit_time_course`), so that :meth:`trajectory` counts in the
        data's unit. Off by default: predictions are of the last time, and the refinement takes as long again as the fit.
    """

    tau: Tensor

    def __init__(
        self,
        backbone: dict[str, Any] | str | None = None,
        backbone_epochs: int = 20,
        joint: bool = False,
        joint_weight: float = 1.0,
        distil: float = 0.0,
        distil_conditions: int = 100,
        tau: float | None = None,
        prior: str | list[str] | None = None,
        prior_use: Literal["weight", "restrict"] = "weight",
        kinetics: Literal["additive", "hill", "multiplicative"] = "hill",
        penalty: float = 2.0,
        prior_strength: float = 0.9,
        sparsity: Literal["l1", "gates"] = "l1",
        sign_penalty: float = 1.0,
        stability: float = 1.0,
        screened: int = 20,
        latent: int = 0,
        members: int = 1,
        residual_steps: int = 100,
        fixed_point_steps: int = 100,
        lr: float = 0.06,
        time_key: str | None = None,
        time_course: bool = False,
    ) -> None:
        super().__init__()
        for holds, complaint in (
            (members >= 1, f"members={members}: give 1 or more"),
            (tau is None or tau >= 0, f"tau={tau} must not be negative"),
            (distil >= 0 and distil_conditions >= 0, "distil and distil_conditions start at 0"),
            (prior_use in ("weight", "restrict"), f"prior_use='{prior_use}' is neither 'weight' nor 'restrict'"),
            (prior_use == "weight" or prior is not None, "prior_use='restrict' needs a prior"),
            (time_key is not None or not time_course, "time_course needs time_key, the obs column of times"),
            (backbone is not None or not (joint or distil), "joint and distil are about a backbone, and there is none"),
        ):
            if not holds:
                raise PerturbZooError(f"GRNODE: {complaint}")
        self.save_hyperparameters()
        self.automatic_optimization = False  # the network is fitted when fit starts; a joint backbone takes its own steps
        # a steady state knows that what ends is over; a backbone's prediction may not
        self.handles_time = backbone is None  # type: ignore[misc]
        self._options()  # wrong options are refused now
        # a module here would go into the checkpoint beside the backbone
        self._backbone_weights: dict[str, Any] | None = None
        self.backbone: PerturbationModel | None = None
        self.register_buffer("tau", torch.tensor(0.0 if tau is None else float(tau)))

    def _options(self, seed: int = 0) -> FitOptions:
        names = (
            "kinetics", "penalty", "prior_strength", "sparsity", "sign_penalty", "stability", "residual_steps", "fixed_point_steps",
            "lr",
        )  # fmt: skip
        return FitOptions(**{name: self.hparams[name] for name in names}, seed=seed)

    # ------------------------------------------------------------------ from data to layers

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.world_size > 1:
            raise PerturbZooError("GRNODE is fitted to pseudobulks by one process: fit it with --trainer.devices 1")
        super().setup(stage)

    def prepare(self, data: PerturbSeqDataModule) -> dict[str, Any]:
        spec = self.get_spec()
        levels = training_levels(data, self.hparams["time_key"])
        nodes = [*spec.genes, *(target for target in spec.targets if target not in set(spec.genes))]
        prior = None
        if self.hparams["prior"] is not None:
            prior = read_prior(self.hparams["prior"], spec.genes, nodes[spec.n_genes :])
        candidates = candidate_network(
            levels, nodes, prior, screened=self.hparams["screened"], restrict=self.hparams["prior_use"] == "restrict"
        )
        candidates = with_latent(candidates, spec.n_genes, self.hparams["latent"])
        wanted = self.hparams["backbone"]
        trained = None
        if wanted is not None:
            trained = read_or_train(wanted, spec, data, epochs=self.hparams["backbone_epochs"], device=self.device)
            self._backbone_weights = trained.state_dict()
        acts = sorted({(act.target, act.kind or levels.default_kind) for one in levels.conditions for act in one})
        dispersion = np.full(spec.n_genes, 0.1) if levels.dispersion is None else levels.dispersion
        prepared = {
            "candidates": candidates.to_state(),
            "control": torch.as_tensor(levels.control, dtype=torch.float32),
            "dispersion": torch.as_tensor(dispersion, dtype=torch.float32),
            "unit": float(levels.unit or 1.0),
            "acts": [list(act) for act in acts],
            "level_error": torch.as_tensor(np.median(levels.error, axis=0), dtype=torch.float32),
            **extrinsic_noise(data, levels),
        }
        if trained is not None:
            prepared["backbone"] = {
                "class": type(trained).__name__,
                "arguments": dict(trained.hparams),
                "prepared": trained.prepared,
            }
        return prepared

    def build(self) -> None:
        prepared, spec = self.prepared, self.get_spec()
        candidates = GeneRegulatoryNetwork.from_state(prepared["candidates"])
        acts = [(target, kind) for target, kind in prepared["acts"]]
        floor = 1e-6 * max(float(prepared["control"].mean()), 1e-12)
        self.networks = nn.ModuleList(
            FittedNetwork(
                candidates,
                spec.n_genes,
                prepared["control"].clamp(min=floor),
                acts,
                spec.default_kind,
                self.hparams["kinetics"],
            )
            for _ in range(self.hparams["members"])
        ).requires_grad_(False)
        self.register_buffer("control", prepared["control"].clamp(min=floor))
        self.register_buffer("dispersion", prepared["dispersion"])
        for name in ("level_error", "extrinsic_loading", "extrinsic_dispersion"):
            self.register_buffer(name, prepared[name])
        self.unit = prepared["unit"]
        if "backbone" in prepared:
            part = prepared["backbone"]
            self.backbone = find_model(part["class"])(**part["arguments"])
            assert self.backbone is not None
            self.backbone.spec, self.backbone.prepared = spec, part["prepared"]
            self.backbone.configure_model()
            if self._backbone_weights is not None:
                self.backbone.load_state_dict(self._backbone_weights)
                self._backbone_weights = None

    def members(self) -> list[FittedNetwork]:
        """The fitted networks."""
        return [network for network in self.networks if isinstance(network, FittedNetwork)]

    @property
    def target_names(self) -> tuple[str, ...]:
        """The targets of the data, then every other measured gene: a network can be asked about all of them."""
        spec = self.get_spec()
        if self.backbone is not None:
            return self.backbone.target_names
        return (*spec.targets, *(gene for gene in spec.genes if gene not in set(spec.targets)))

    @property
    def predicts_variance(self) -> bool:
        return self.hparams["members"] > 1

    # ------------------------------------------------------------------ fitting

    def on_fit_start(self) -> None:
        if self.backbone is not None and self.hparams["tau"] is None and not self.data.has_validation():
            message = "no validation conditions to choose tau on: it stays 0, which leaves the backbone alone; give tau"
            warnings.warn(message, PerturbZooWarning, stacklevel=2)
        levels = training_levels(self.data, self.hparams["time_key"])
        course = training_course(self.data, self.hparams["time_key"]) if self.hparams["time_course"] else None
        refine = CourseOptions(penalty=self.hparams["penalty"], prior_strength=self.hparams["prior_strength"])
        rng = np.random.default_rng(self.trainer.current_epoch)
        extra = self._distilled(levels)
        for number, network in enumerate(self.members()):
            seen = levels if number == 0 else levels.with_noise(rng)
            fitted = fit_network(joined(seen, extra), network.candidates, self._options(seed=number))
            if course is not None:
                fit_time_course(course if number == 0 else course.with_noise(rng), fitted, refine)
            network.load_state_dict(fitted.state_dict())
            network.acts, network.place = fitted.acts, fitted.place

    def _distilled(self, levels: Levels) -> Levels | None:
        """Unmeasured conditions as the backbone predicts them."""
        count = self.hparams["distil_conditions"]
        if self.backbone is None or not self.hparams["distil"] or not count:
            return None
        measured = set(levels.conditions)
        names = self.target_names
        known = [name for name in names if name in set(self.get_spec().targets)]
        wanted = [Condition([Intervention(name)]) for name in known]
        doubles = (one | other for one, other in itertools.combinations(wanted, 2))
        wanted = list(itertools.islice((one for one in itertools.chain(wanted, doubles) if one not in measured), count))
        if not wanted:
            return None
        change = self.backbone_change(wanted, [0] * len(wanted))
        # the backbone's conditions may have acts that no training condition has: they get strengths, here and in the checkpoint
        acts = sorted({(act.target, act.kind or levels.default_kind) for one in (*levels.conditions, *wanted) for act in one})
        self.prepared["acts"] = [list(act) for act in acts]
        for network in self.members():
            for name in ("strength", "own"):
                setattr(network, name, nn.Parameter(torch.zeros(len(acts), device=self.device), requires_grad=False))
        return predicted_levels(levels, wanted, change.cpu().numpy(), weight=self.hparams["distil"])

    def training_step(self, batch: PerturbationBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Nothing, the fit is done; with `joint` a step of the backbone."""
        if not self.hparams["joint"]:
            return
        assert self.backbone is not None
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        terms = self.loss(batch)
        total = torch.stack(list(terms.values())).sum()
        self.manual_backward(total)
        optimizer.step()
        named = {f"train/{name}": value.detach() for name, value in [*terms.items(), ("loss", total)]}
        self.log_dict(named, batch_size=len(batch), on_epoch=True, on_step=False)

    def loss(self, batch: PerturbationBatch) -> dict[str, Tensor]:
        if self.backbone is None:
            return {"mse": (self(batch).mean - batch.observed).square().mean()}
        terms = self.backbone.loss(batch)
        with torch.no_grad():
            own = self.expected(self.network_change(batch.table)[0], batch.table.context)
        moved = batch.condition_means(self.backbone(batch).mean - batch.control)
        return {**terms, "network": self.hparams["joint_weight"] * (moved - own).square().mean()}

    def configure_optimizers(self) -> Any:
        if not self.hparams["joint"]:
            return None
        assert self.backbone is not None
        made = self.backbone.configure_optimizers()
        if made is None or not self.backbone.automatic_optimization:
            raise PerturbZooError(
                f"GRNODE: joint is for a backbone that is trained by steps, and {type(self.backbone).__name__} is not"
            )
        return made["optimizer"] if isinstance(made, dict) else made

    def calibrate(self, bulks: Pseudobulks) -> Pseudobulks:
        """Choose tau on the validation pseudobulks, if it was not given, and scale the variances there."""
        if self.backbone is None or self.hparams["tau"] is not None:
            return super().calibrate(bulks)
        table = self.data.table.select(torch.from_numpy(bulks.pair)).to(self.device)
        control = torch.as_tensor(bulks.control, dtype=torch.float32, device=self.device)
        best, chosen = (np.inf, bulks), 0.0
        for tau in TAUS:
            self.tau.fill_(tau)
            delta, _ = self.delta(table, control)
            predicted = bulks.control + delta.double().cpu().numpy()
            error = float(((predicted - bulks.observed) ** 2).mean())
            if error < best[0] * (1 - 1e-6):
                best = error, replace(bulks, predicted=predicted)
                chosen = tau
        self.tau.fill_(chosen)
        return super().calibrate(best[1])

    # ------------------------------------------------------------------ predicting

    def network_change(self, table: ConditionTable) -> tuple[Tensor, Tensor | None]:
        """Log change of levels by the network alone, ``(C, G)``, and its variance between members."""
        found = [
            network.change(network.encode_table(table, self.target_names), table.context.clamp(min=0))[:, : network.measured]
            for network in self.members()
        ]
        each = torch.stack(found)
        return each.mean(0), each.var(0) if len(each) > 1 else None

    def backbone_change(self, conditions: list[Condition], contexts: list[int]) -> Tensor:
        """Log change of levels as the backbone predicts it, shape ``(N, G)``."""
        table = encode_conditions(conditions, contexts, self.target_names, self.get_spec().default_kind)
        table = table.to(self.device)
        control = torch.from_numpy(self.get_spec().control_mean).to(self.device)[table.context]
        return self.log_change(self._backbone_delta(table, control), table.context)

    def _backbone_delta(self, table: ConditionTable, context_control: Tensor) -> Tensor:
        assert self.backbone is not None
        # also while a fit has it in training mode, in which it would hide things from itself
        training = self.backbone.training
        self.backbone.eval()
        with torch.no_grad():
            found = mean_delta(self.backbone, table, context_control)
        self.backbone.train(training)
        return found

    def _projected(self, network: FittedNetwork, table: ConditionTable, change: Tensor, context: Tensor) -> Tensor:
        """Log changes ``(C, G)`` moved towards the network."""
        # a projection differentiates the kinetics, which tensors made in inference mode have no part in; their copies have
        with torch.inference_mode(False), torch.no_grad():
            table = ConditionTable(**{item.name: getattr(table, item.name).clone() for item in fields(table)})
            change, context = change.clone(), context.clone()
            acts = network.interventions(network.encode_table(table, self.target_names))
            reference = network.dynamics.control_level[context]
            # a node that is not measured is where the network has it
            level = torch.zeros_like(reference) if change.shape == reference.shape else network.settled(acts, context)
            level[:, : network.measured] = change
            moved = project(network.pruned(), torch.exp(level) * reference, acts, context, tau=float(self.tau)).to(
                change.device
            )
            least = 1e-3 * reference.double()
            return torch.log((moved + least) / (reference + least)).float()[:, : network.measured]

    def delta(self, table: ConditionTable, context_control: Tensor) -> tuple[Tensor, Tensor | None]:
        context = table.context.clamp(min=0)
        if self.backbone is None:
            change, spread = self.network_change(table)
            return self.expected(change, context), self._variance(change, spread, context)
        delta = self._backbone_delta(table, context_control)
        # in the backbone nothing ever ends
        table = replace(table, onset=torch.zeros_like(table.onset), offset=torch.full_like(table.offset, torch.inf))
        if float(self.tau) > 0:
            change = self.log_change(delta, context)
            moved = self._projected(self.members()[0], table, change, context)
            delta = delta + self.expected(moved, context) - self.expected(change, context)
        if self.hparams["members"] == 1:
            return delta, None
        return delta, self._variance(*self.network_change(table), context)

    def _variance(self, change: Tensor, spread: Tensor | None, context: Tensor) -> Tensor | None:
        """From the variance of log levels to that of the predicted change, both ``(C, G)``."""
        if spread is None:
            return None
        slope = (self.expected(change + 0.01, context) - self.expected(change - 0.01, context)) / 0.02
        return spread * slope**2 + 1e-8
