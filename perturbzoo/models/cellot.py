r"""CellOT, conditional: optimal transport from control to perturbed cells by input-convex networks, one model for all conditions.

Bunne et al., Nature Methods 2023, https://doi.org/10.1038/s41592-023-01969-x; the dual of Makkuva et al., ICML 2020,
https://proceedings.mlr.press/v119/makkuva20a.html; conditions as in Bunne, Krause and Cuturi, NeurIPS 2022 (CondOT),
https://arxiv.org/abs/2206.14262.

Controls :math:`x \sim \mu` and perturbed cells :math:`y \sim \nu_c` in the latent space (:mod:`perturbzoo.models.latent`) are never
paired. With potentials :math:`f, g` that are convex in the cell for every condition vector :math:`e_c`,

.. math::
    \max_f \min_g\; & \mathbb{E}_x\big[f(\nabla g(x; e_c); e_c) - \langle x, \nabla g(x; e_c) \rangle\big]
    - \mathbb{E}_y\big[f(y; e_c)\big], \\
    & T_c(x) = \nabla_x g(x; e_c),

so that g learns from the first term, f from :math:`\mathbb{E} f(y) - \mathbb{E} f(T_c(x))`. At the optimum
:math:`T_c` is the map that carries :math:`\mu` onto :math:`\nu_c` with least squared movement.

Both potentials, with :math:`\tilde x` the cell in units of each axis' spread, are

.. math::
    h_1 &= \sigma(A_1 \tilde x + b_1(e)), \qquad
    h_{l+1} = \sigma\big(W_l (\gamma_l(e) \odot h_l) + A_{l+1} \tilde x + b_{l+1}(e)\big) \\
    g &= \tfrac{1}{2} \kappa |x|^2 + \tfrac{1}{2} (1 - \kappa) \textstyle\sum_k q_k(e) (B x)_k^2 + \langle a(e), x \rangle
    + \langle w, \gamma_L(e) \odot h_L \rangle

with :math:`W_l, w \ge 0` by clamping, :math:`\gamma, q > 0` by softplus and :math:`\sigma` the softplus, which is convex and
increasing: convex in x by construction, whatever was learned. At the start :math:`B = I, q = \gamma = 1, a = w = 0`: both are
:math:`|x|^2 / 2`, and the untrained map is the identity, to which the start of the latent module is added. The paper has one model per
perturbation, only f clamped, and g merely penalised, so that its g need not be convex.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from perturbzoo.data.batch import PerturbationBatch
from perturbzoo.models.latent import Space, Start, TransportModel

_UNIT = math.log(math.e - 1)  # softplus of it is 1
_LARGEST_BASIS = 512  # axes for which the quadratic part has a basis of its own; more have diagonal curvature


class ConvexPotential(nn.Module):
    """A function of cells that is convex for every condition.

    Parameters
    ----------
    dimension
        Length d of a cell's position.
    condition
        Length e of a condition vector.
    hidden
        Widths of the convex layers.
    floor
        The curvature kappa that no training removes, between 0 and 1: no map stretches by more than its inverse.
    spread
        Shape ``(d,)``: standard deviation of each axis.
    """

    spread: Tensor

    def __init__(self, dimension: int, condition: int, hidden: Sequence[int], floor: float, spread: Tensor) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("spread", spread.clone(), persistent=False)
        self.basis = nn.Parameter(torch.eye(dimension)) if dimension <= _LARGEST_BASIS else None
        self.skips = nn.ModuleList(nn.Linear(dimension, width) for width in hidden)
        pairs = itertools.pairwise(hidden)
        self.weights = nn.ParameterList(torch.rand(after, before) * 2 / before for before, after in pairs)
        self.out = nn.Parameter(torch.zeros(hidden[-1]))
        # what depends on the condition, all at once: curvature q, slope a, and bias b and gate of each layer
        self.sizes = [dimension, dimension, *hidden, *hidden]
        self.modulate = nn.Linear(condition, sum(self.sizes))
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def condition(self, condition: Tensor) -> Tensor:
        """Whatever depends on the condition alone: ``(C, e)`` in, ``(C, sum of sizes)`` out."""
        return self.modulate(condition)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """The potential of each cell.

        Parameters
        ----------
        x
            Shape ``(B, d)``.
        state
            Shape ``(B, sum of sizes)``: rows of what :meth:`condition` returned.

        Returns
        -------
        Shape ``(B,)``.
        """
        n = len(self.skips)
        curvature, slope, *layers = state.split(self.sizes, dim=1)
        biases, gates = layers[:n], [functional.softplus(gate + _UNIT) for gate in layers[n:]]
        scaled = x / self.spread
        h = functional.softplus(self.skips[0](scaled) + biases[0])
        for weight, skip, bias, gate in zip(self.weights, self.skips[1:], biases[1:], gates[:-1], strict=True):
            h = functional.softplus((gate * h) @ weight.clamp(min=0).T + skip(scaled) + bias)
        turned = x if self.basis is None else x @ self.basis.T
        bowl = self.floor * x.square() + (1 - self.floor) * functional.softplus(curvature + _UNIT) * turned.square()
        return (0.5 * bowl + slope * x).sum(dim=1) + (gates[-1] * h) @ self.out.clamp(min=0)

    def gradient(self, x: Tensor, state: Tensor, create_graph: bool = False) -> Tensor:
        """The gradient at each cell, ``(B, d)``; `create_graph` for learning from it."""
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self(x, state).sum(), x, create_graph=create_graph)
        return gradient

    @torch.no_grad()
    def project(self) -> None:
        """Put negative weights, which count as 0, back to 0: further below they would never return."""
        for weight in [*self.weights, self.out]:
            weight.clamp_(min=0)


class CellOT(TransportModel):
    """Conditional CellOT; see the module's equations.

    Lightning's ``global_step`` (and ``max_steps``) counts every step of both optimisers: ``g_steps + 1`` for each batch.

    Parameters
    ----------
    space, components
        Where cells are moved: ``pca``, the first principal axes of the training cells; ``scvi``, the latent space of an scVI
        model that is trained on the training cells first, for which 10 to 30 components are usual; or ``genes``, which the
        paper uses for a few dozen features. In hundreds of genes distances are mostly noise, and training is slower.
    scvi
        Options of that scVI model, as in :func:`perturbzoo.models.scvi_space.understand_options`; None for its defaults.
    start
        What is added to every map: ``identity``, nothing, as in the paper; ``mean_shift``, the mean change of the training
        conditions; ``additive``, the sum of what each target did alone, and for a target nobody measured alone what its
        neighbours in the graph and the mean single say. The model is then already the baseline before training, and learns
        what differs. ``measured``: as additive, but each training condition starts from its own mean change, a combination
        too: for filling in distributions of what was measured.
    keep_residual
        Keep what the axes cannot hold from the control cell; otherwise predict the decoded position, as the paper does, which
        loses the variance beyond the axes.
    hidden
        Widths of the convex layers; the paper's are 64, 64, 64, 64.
    width
        Length of condition vectors.
    floor
        Least curvature of the potentials: transport stretches no direction by more than its inverse. The paper has none,
        and its dual can diverge.
    context
        Let the context's mean control position modulate conditions, where there are several contexts.
    embedding, dimension
        A table of vectors for targets beside the learned ones, as in :func:`perturbzoo.models.embedding.embed_targets`.
    perturbation_graph
        As in :func:`perturbzoo.data.graphs.build_graph`; None takes the data module's.
    unseen_rate
        Share of targets treated as never perturbed in steps of g, by start and encoder, whereby g learns what table and graph tell
        about a target. f, which is no part of predictions, always sees the condition.
    g_steps
        Steps of g for each step of f, on the same batch. The paper's 10 are on batches of their own.
    average
        Predict with the running mean of g's weights, of which a step of f keeps this share; 0 for the latest weights, as in the
        paper. The two players circle around the solution, and the mean of their positions is nearer to it.
    lr, f_lr, betas
        Adam's, for g and f; the paper's learning rate is 1e-4 for both, over 100,000 steps of f.
    """

    differentiates_in_forward = True

    def __init__(
        self,
        space: Space = "pca",
        components: int = 50,
        scvi: dict[str, Any] | None = None,
        start: Start = "additive",
        keep_residual: bool = True,
        hidden: Sequence[int] = (64, 64),
        width: int = 32,
        floor: float = 0.1,
        context: bool = True,
        embedding: dict[str, Any] | str | None = None,
        dimension: int = 20,
        perturbation_graph: list[dict[str, Any]] | None = None,
        unseen_rate: float = 0.25,
        g_steps: int = 4,
        average: float = 0.98,
        lr: float = 5e-3,
        f_lr: float = 1e-2,
        betas: tuple[float, float] = (0.5, 0.9),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # two optimisers that play against each other
        self.automatic_optimization = False
        self.check_arguments()

    def build(self) -> None:
        self.build_space()
        sizes = (self.latent.dimension, self.hparams["width"], list(self.hparams["hidden"]), self.hparams["floor"])
        self.f = ConvexPotential(*sizes, self.latent.spread)
        self.g = ConvexPotential(*sizes, self.latent.spread)
        # opponents share no parameter
        self.f_conditions, self.g_conditions = self.new_condition_encoder(), self.new_condition_encoder()
        self.mean = AveragedModel(nn.ModuleList([self.g, self.g_conditions]), avg_fn=self._towards).requires_grad_(False)

    def _towards(self, mean: Tensor, latest: Tensor, count: Tensor | int) -> Tensor:
        # at first a mean of the latest third of the steps, or the untrained weights would stay in it for long
        return torch.lerp(mean, latest, max(1 - self.hparams["average"], 1 / (0.3 * float(count) + 1)))

    def transport(self, batch: PerturbationBatch, position: Tensor) -> Tensor:
        # training plays against the latest weights, everything else asks their mean
        players: Any = (self.g, self.g_conditions) if self.training else self.mean.module
        g, conditions = players
        state = g.condition(conditions(batch.table, self.position_of_context(batch.context_control)))
        return g.gradient(position, state[batch.row])

    # ------------------------------------------------------------------ the dual

    def away(self, batch: PerturbationBatch, hidden: Tensor) -> Tensor:
        """Shape ``(C, d)``: position of the start without the hidden targets minus that of the start with them."""
        table, control = batch.table, batch.context_control
        return self.latent.difference(control + self.start_change(table, hidden), control + self.start_change(table))

    def g_loss(self, batch: PerturbationBatch, source: Tensor) -> Tensor:
        """``mean f(T(x)) - <x, T(x)>`` over the batch, of which g learns, in training without the targets that :meth:`hide` draws.

        f knows all targets: what g moves from another start is brought to where f expects it.
        """
        context, hidden = self.position_of_context(batch.context_control), self.hide(batch.table)
        with torch.no_grad():
            opponent = self.f.condition(self.f_conditions(batch.table, context))
        state = self.g.condition(self.g_conditions(batch.table, context, hidden))
        moved = self.g.gradient(source, state[batch.row], create_graph=True)
        if hidden is not None:
            moved = moved + self.away(batch, hidden)[batch.row]
        return (self.f(moved, opponent[batch.row]) - (source * moved).sum(dim=1)).mean()

    def f_loss(self, batch: PerturbationBatch, source: Tensor, target: Tensor) -> Tensor:
        """``mean f(y) - f(T(x))`` over the batch, of which f learns."""
        context = self.position_of_context(batch.context_control)
        moved = self.transport(batch, source).detach()
        state = self.f.condition(self.f_conditions(batch.table, context))[batch.row]
        return (self.f(target, state) - self.f(moved, state)).mean()

    def loss(self, batch: PerturbationBatch) -> dict[str, Tensor]:
        """Both losses. Each is minimised over its own potential; their sum means nothing."""
        source, target = self.source_and_target(batch)
        return {"g": self.g_loss(batch, source), "f": self.f_loss(batch, source, target)}

    def training_step(self, batch: PerturbationBatch, batch_idx: int) -> None:  # type: ignore[override]
        with torch.no_grad():
            source, target = self.source_and_target(batch)
        optimizers: Any = self.optimizers()
        f_optimizer, g_optimizer = optimizers
        self.toggle_optimizer(g_optimizer)  # no gradients for f, which the loss of g runs through
        for _ in range(self.hparams["g_steps"]):
            g_loss = self.g_loss(batch, source)
            self._step(g_optimizer, g_loss, self.g)
        self.untoggle_optimizer(g_optimizer)
        f_loss = self.f_loss(batch, source, target)
        self._step(f_optimizer, f_loss, self.f)
        self.mean.update_parameters(nn.ModuleList([self.g, self.g_conditions]))
        terms = {"train/g": g_loss.detach(), "train/f": f_loss.detach()}
        self.log_dict(terms, batch_size=len(batch), on_step=False, on_epoch=True, sync_dist=True)
        self.log(
            "train/loss", f_loss.detach(), batch_size=len(batch), on_step=True, on_epoch=True, prog_bar=True, sync_dist=True
        )

    def _step(self, optimizer: Any, loss: Tensor, potential: ConvexPotential) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        potential.project()

    def configure_optimizers(self) -> Any:
        players = ((self.f, self.f_conditions), (self.g, self.g_conditions))
        return [
            torch.optim.Adam(nn.ModuleList(player).parameters(), lr=lr, betas=tuple(self.hparams["betas"]))
            for lr, player in zip((self.hparams["f_lr"], self.hparams["lr"]), players, strict=True)
        ]
