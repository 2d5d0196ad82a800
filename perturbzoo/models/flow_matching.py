r"""Flow matching with optimal-transport couplings: a velocity field, conditioned on the perturbation, that carries controls to cells.

Tong et al., TMLR 2024, https://arxiv.org/abs/2302.00482 (minibatch couplings); Lipman et al., ICLR 2023,
https://arxiv.org/abs/2210.02747; for perturbations, CellFlow (Klein et al. 2025, https://doi.org/10.1101/2025.04.11.648220).

In each batch the m controls :math:`x` and the m perturbed cells :math:`y` of a condition c in the latent space
(:mod:`perturbzoo.models.latent`) are coupled by the permutation :math:`\pi` of least squared movement, and a network
learns the velocity of the straight line between the partners:

.. math::
    x_t &= (1 - t)\, x_i + t\, y_{\pi(i)}, \qquad t \sim U(0, 1) \\
    L &= \mathbb{E}\, \big\| v(x_t, t; e_c) - (y_{\pi(i)} - x_i) \big\|^2 \\
    T_c(x) &= x + \int_0^1 v(x_t, t; e_c)\, dt .

With couplings of large batches the lines do not cross and :math:`T_c` is near the optimal map; random couplings (``coupling:
independent``) carry the same distribution along curved ways. The last layer starts at 0: the untrained map is the
identity, to which the start of the latent module is added. The map is deterministic, one cell out for each cell in.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from perturbzoo.data.batch import PerturbationBatch
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.latent import Space, Start, TransportModel

_FREQUENCIES = 8


class VelocityField(nn.Module):
    """Velocity of cells at times, under conditions.

    Parameters
    ----------
    dimension
        Length d of a cell's position.
    condition
        Length e of a condition vector.
    hidden
        Width h of the layers.
    layers
        Residual layers.
    spread
        Shape ``(d,)``: standard deviation of each axis.
    """

    spread: Tensor
    frequency: Tensor

    def __init__(self, dimension: int, condition: int, hidden: int, layers: int, spread: Tensor) -> None:
        super().__init__()
        self.register_buffer("spread", spread.clone(), persistent=False)
        self.register_buffer("frequency", math.pi * torch.arange(1, _FREQUENCIES + 1), persistent=False)
        self.cell = nn.Linear(dimension, hidden)
        self.time = nn.Linear(2 * _FREQUENCIES, hidden)
        self.modulate = nn.Linear(condition, hidden * (1 + 2 * layers))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        # x and the condition act on the velocity directly too: maps between near-Gaussian cells are near-affine
        self.linear = nn.Linear(dimension + condition, dimension)
        self.last = nn.Linear(hidden, dimension)
        for layer in (self.linear, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def condition(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Whatever depends on the condition alone: ``(C, e)`` in; ``(C, h (1 + 2 layers))`` and ``(C, d)`` out."""
        direct = condition @ self.linear.weight[:, -condition.shape[1] :].T + self.linear.bias
        return self.modulate(condition), direct

    def forward(self, x: Tensor, t: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """Velocities.

        Parameters
        ----------
        x
            Shape ``(B, d)``.
        t
            Shape ``(B,)`` or ``()``, from 0 to 1.
        state
            ``(B, h (1 + 2 layers))`` and ``(B, d)``: rows of what :meth:`condition` returned.

        Returns
        -------
        Shape ``(B, d)``.
        """
        modulation, direct = state
        angle = t[..., None] * self.frequency
        scaled = x / self.spread
        h = self.cell(scaled) + self.time(torch.cat([angle.sin(), angle.cos()], dim=-1))
        added, *films = modulation.split(h.shape[1], dim=1)
        h = h + added
        for norm, layer, scale, shift in zip(self.norms, self.layers, films[::2], films[1::2], strict=True):
            h = h + layer(nn.functional.silu(norm(h) * (1 + scale) + shift))
        return self.last(nn.functional.silu(h)) + x @ self.linear.weight[:, : x.shape[1]].T + direct

    def integrate(self, x: Tensor, state: tuple[Tensor, Tensor], steps: int) -> Tensor:
        """Follow the field from time 0 to 1 by the midpoint rule, ``(B, d)``."""
        width = 1.0 / steps
        for step in range(steps):
            start = x.new_tensor(step * width)
            middle = x + 0.5 * width * self(x, start, state)
            x = x + width * self(middle, start + 0.5 * width, state)
        return x


def couple(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The permutation of least total squared movement.

    Parameters
    ----------
    source, target
        Shape ``(m, d)`` each.

    Returns
    -------
    Shape ``(m,)``: the row of `target` that each row of `source` goes to.
    """
    import ot  # a second, which '--help' has no use for

    # with equal weights and sizes a corner of the polytope, which the exact solver returns, is a permutation
    return ot.emd([], [], ot.dist(source, target)).argmax(axis=1)


class FlowMatching(TransportModel):
    """Conditional flow matching between control and perturbed cells; see the module's equations.

    Parameters
    ----------
    space, components
        Where cells are moved: ``pca``, the first principal axes of the training cells; ``scvi``, the latent space of an scVI
        model that is trained on the training cells first, for which 10 to 30 components are usual; or ``genes``.
    scvi
        Options of that scVI model, as in :func:`perturbzoo.models.scvi_space.understand_options`; None for its defaults.
    start
        What is added to every map: ``identity``, nothing; ``mean_shift``, the mean change of the training conditions;
        ``additive``, the sum of what each target did alone, and for a target nobody measured alone what its neighbours in the graph
        and the mean single say; ``measured``: as additive, but each training condition starts from its own mean change, a
        combination too: for filling in distributions of what was measured.
    keep_residual
        Keep what the axes cannot hold from the control cell; otherwise predict the decoded position.
    coupling
        ``optimal`` or ``independent`` partners within the batch. Optimal ones need many cells of each condition in a batch
        (``cells_per_condition`` of the data): few have chance neighbours.
    hidden, layers
        Width and number of residual layers.
    width
        Length of condition vectors.
    context
        Let the context's mean control position modulate conditions, where there are several contexts.
    embedding, dimension
        A table of vectors for targets beside the learned ones, as in :func:`perturbzoo.models.embedding.embed_targets`.
    perturbation_graph
        As in :func:`perturbzoo.data.graphs.build_graph`; None takes the data module's.
    unseen_rate
        Share of targets treated as never perturbed in a training step, by start and network, whereby the network learns what
        table and graph tell about a target.
    integration_steps
        Steps of the midpoint rule from control to prediction.
    lr, weight_decay
        AdamW's.
    """

    def __init__(
        self,
        space: Space = "pca",
        components: int = 50,
        scvi: dict[str, Any] | None = None,
        start: Start = "additive",
        keep_residual: bool = True,
        coupling: Literal["optimal", "independent"] = "optimal",
        hidden: int = 128,
        layers: int = 2,
        width: int = 32,
        context: bool = True,
        embedding: dict[str, Any] | str | None = None,
        dimension: int = 20,
        perturbation_graph: list[dict[str, Any]] | None = None,
        unseen_rate: float = 0.25,
        integration_steps: int = 10,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.check_arguments()
        if coupling not in ("optimal", "independent"):
            raise PerturbZooError(f"coupling is '{coupling}': give optimal or independent")

    def build(self) -> None:
        self.build_space()
        sizes = (self.hparams["width"], self.hparams["hidden"], self.hparams["layers"])
        self.velocity = VelocityField(self.latent.dimension, *sizes, self.latent.spread)
        self.conditions = self.new_condition_encoder()

    def state(self, batch: PerturbationBatch, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the field needs of each cell's condition: computed for each pair, then gathered."""
        context = self.position_of_context(batch.context_control)
        modulation, direct = self.velocity.condition(self.conditions(batch.table, context, hidden))
        return modulation[batch.row], direct[batch.row]

    def transport(self, batch: PerturbationBatch, position: Tensor) -> Tensor:
        return self.velocity.integrate(position, self.state(batch), self.hparams["integration_steps"])

    def partners(self, batch: PerturbationBatch, source: Tensor, target: Tensor) -> Tensor:
        """The target of each source cell, ``(B, d)``, from its own pair."""
        if self.hparams["coupling"] == "independent":
            return target  # the loader draws cells and controls independently of each other
        # bfloat16 has no NumPy type
        row, x, y = batch.row.cpu().numpy(), source.float().cpu().numpy(), target.float().cpu().numpy()
        partner = np.arange(len(row))
        for pair in range(len(batch.table)):
            cells = np.flatnonzero(row == pair)
            partner[cells] = cells[couple(x[cells], y[cells])]
        return target[torch.from_numpy(partner).to(target.device)]

    def loss(self, batch: PerturbationBatch) -> dict[str, Tensor]:
        t = torch.rand(len(batch), device=batch.control.device)
        hidden = self.hide(batch.table)
        with torch.no_grad():
            source, target = self.source_and_target(batch, hidden)
            target = self.partners(batch, source, target)
        velocity = self.velocity(torch.lerp(source, target, t[:, None]), t, self.state(batch, hidden))
        return {"velocity": (velocity - (target - source)).square().mean()}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])
