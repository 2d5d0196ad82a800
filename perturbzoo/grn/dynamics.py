r"""The kinetics of a regulatory network, as one differentiable module.

With G genes, mRNA x (or its unspliced u and spliced x), protein p where it is modelled, and the active level y = p, else x:

.. math::

    \dot x_i &= v_i\, f_i(y; W)\, \kappa_i(t) + s_i(t) - \gamma_i x_i \\
    \dot u_i &= v_i f_i \kappa_i - \beta_i u_i, \qquad \dot x_i = \beta_i u_i + s_i - \gamma_i x_i \quad\text{(splicing)} \\
    \dot p_i &= \delta_i x_i - \delta_i p_i \quad\text{(protein, in units of its mRNA)}

The regulation f lies between 0 and 1, in three forms (`kinetics`), with the level :math:`\tilde y = \eta y` that targets see:

.. math::

    \text{additive} &: f_i = \sigma(b_i + \textstyle\sum_j W_{ij}\,\varphi_j(\tilde y_j)), \qquad
        \varphi_j(y) = (\log(y + \epsilon_j) - \log(m_j + \epsilon_j)) / \mathit{spread}_j \\
    \text{hill} &: \text{the same with}\; \varphi_j(y) = h_j(y) = y^{n_j} / (y^{n_j} + H_j^{n_j}), \quad n_j \in [1, 4] \\
    \text{multiplicative} &: f_i = \sigma(b_i) \textstyle\prod_j \left( h_j e^{\min(W_{ij}, 0)}
        + (1 - h_j)\, e^{-\max(W_{ij}, 0)} \right)

In the last, a bound regulator changes the production :math:`e^{W_{ij}}`-fold against an unbound one, whatever its sign. m is
the reference level (mean of controls). As f is bounded, so is the state: it cannot leave
:math:`[0, \max(x(0), (v \kappa + s) / \gamma)]`. Interventions set :math:`\kappa, \eta, s`, and clamps; see
:mod:`perturbzoo.grn.interventions`.

Only ratios v / γ follow from steady states: γ is fixed unless `learn_turnover`, and 1 unless half-lives are given.

Controls are measured best. `anchored` kinetics keep them a steady state whatever W becomes: b is then the logit of f at the
reference level, from which the drive is counted (multiplicative: of its first factor), and :math:`v = \gamma m / f(m)` follows.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.grn.interventions import Effects, Interventions
from perturbzoo.grn.network import GeneRegulatoryNetwork

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # torch says it once, at the first
    torch.eye(1).to_sparse_csr()

Kinetics = Literal["additive", "hill", "multiplicative"]
Ends: TypeAlias = tuple[Tensor, Tensor, Tensor]  # where edges arrive, whence they come, where each sink's begin
KINETICS = ("additive", "hill", "multiplicative")
EDGE_VALUES = 1 << 20  # values of edges that are gathered together
DENSE_LIMIT = 500  # genes up to which a dense W pays


class RegulatoryDynamics(nn.Module):
    """Kinetics on a network; a new one has its reference level as a steady state in every context.

    Parameters
    ----------
    network
        Edges and their signs; W starts at its weights.
    kinetics
        ``"additive"``, ``"hill"`` or ``"multiplicative"``, as above.
    reference
        Shape ``(G,)`` or ``(K, G)``: levels of control cells, > 0, in each of K contexts; None: 1. Mean of
        depth-normalised counts, not their log. Its mean over contexts is m.
    spread
        Shape ``(G,)``: standard deviation of the log level, which scales φ of the additive form; None: 1.
    decay
        Shape ``(G,)`` or a number: γ, > 0, per time unit.
    floor
        ε as a fraction of the reference level: how deep below it φ of the additive form still falls. A knocked-out
        regulator acts as ``log(floor / (1 + floor)) / spread``.
    headroom
        How far production can rise above its rate at the reference level: v = headroom x γ m there (additive, hill), by
        the choice of b. For multiplicative, f at most is ``1 - 1 / headroom``, lowered by the network itself.
    splicing, protein
        Model unspliced RNA, and protein. The state is then ``(..., S)``, with S a multiple of G; :meth:`split` names the parts.
    splicing_rate, protein_decay
        β and δ, per time unit.
    rank
        W = A diag(α) B with this inner size, from the network's leading singular vectors; None: one weight for each edge.
    dense
        Multiply with a dense W: faster for up to 500 genes with many edges.
    activation_fold
        A: factor of production under activation at dose 1; number or ``(G,)``.
    gain
        Overexpression at dose 1 adds ``gain`` reference levels at steady state; number or ``(G,)``.
    clamp_speed
        Factor of the turnover of a clamped gene: how fast it gets to its level.
    learn_turnover
        Whether γ, β and δ are trained.
    anchored
        Keep the reference level of every context a steady state whatever the weights become: for fitting.

    Attributes
    ----------
    weight
        Shape ``(E,)``: W of each edge, in the network's order. With a rank: `left` (G, r), `scale` (r,), `right` (r, R).
    bias
        Shape ``(K, G)``: b.
    source, target
        Shape ``(E,)``: an edge's regulator, as index into the R `regulators`, and its target gene.
    layers
        Names of the parts of the state.

    Raises
    ------
    PerturbZooError
        An option is outside its range, a sign is unknown, or shapes do not fit.
    """

    regulators: Tensor
    source: Tensor
    target: Tensor
    row_start: Tensor
    by_source: Tensor
    source_start: Tensor
    control_level: Tensor
    reference: Tensor
    spread: Tensor
    epsilon: Tensor
    activation_fold: Tensor
    gain: Tensor

    def __init__(
        self,
        network: GeneRegulatoryNetwork,
        *,
        kinetics: Kinetics = "additive",
        reference: Tensor | np.ndarray | None = None,
        spread: Tensor | np.ndarray | None = None,
        decay: Tensor | np.ndarray | float = 1.0,
        floor: float = 0.05,
        headroom: float = 2.0,
        splicing: bool = False,
        protein: bool = False,
        splicing_rate: Tensor | np.ndarray | float = 4.0,
        protein_decay: Tensor | np.ndarray | float = 0.5,
        rank: int | None = None,
        dense: bool = False,
        activation_fold: Tensor | np.ndarray | float = 5.0,
        gain: Tensor | np.ndarray | float = 5.0,
        clamp_speed: float = 50.0,
        learn_turnover: bool = False,
        anchored: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        n, most, unknown = len(network.genes), len(network.regulators), network.edges[network.sign == 0]
        for correct, complaint in (
            (kinetics in KINETICS, f"kinetics='{kinetics}' is not one of {', '.join(KINETICS)}"),
            (floor > 0, f"floor={floor} must be positive"),
            (headroom > 1, f"headroom={headroom} must be above 1: production must be able to rise"),
            (clamp_speed >= 1, f"clamp_speed={clamp_speed} must be 1 at least"),
            (not dense or n <= DENSE_LIMIT, f"dense=True is for up to {DENSE_LIMIT} genes, the network has {n}; leave it out"),
            (
                rank is None or 1 <= rank < most,
                f"rank={rank} must lie between 1 and {most - 1}, below the number of regulators",
            ),
            (rank is None or kinetics != "multiplicative", "multiplicative kinetics are a product over edges and have no rank"),
            (
                not (dense and (rank or kinetics == "multiplicative")),
                "dense=True is for additive and hill kinetics without a rank",
            ),
            (len(unknown) == 0, f"{len(unknown)} edges have no known sign ({_pairs(unknown)}): call network.resolve_signs"),
        ):
            if not correct:
                raise PerturbZooError(f"dynamics: {complaint}")

        def per_gene(value: Tensor | np.ndarray | float, name: str, contexts: bool = False) -> Tensor:
            values = torch.as_tensor(value, dtype=dtype)
            fits = values.ndim == 0 or (values.shape[-1] == n and values.ndim <= 1 + contexts)
            bad = None if fits else f"has shape {tuple(values.shape)}; give one for each of {n} genes"
            if fits and not bool((torch.isfinite(values) & (values > 0)).all()):
                low = (~(values > 0) | ~torch.isfinite(values)).expand(*values.shape[:-1], n).reshape(-1, n).any(0)
                bad = f"must be positive; it is not for {shortened(np.array(network.genes)[low.numpy()])}"
            if bad:
                raise PerturbZooError(f"dynamics: {name} {bad}")
            return values.expand(*values.shape[:-1], n).clone()

        self.genes, self.kinetics, self.rank, self.dense = network.genes, kinetics, rank, dense
        self.splicing, self.protein, self.clamp_speed, self.anchored = splicing, protein, clamp_speed, anchored
        self.layers = (*(("unspliced", "spliced") if splicing else ("mrna",)), *(("protein",) if protein else ()))
        self.entries = tuple(
            gene if len(self.layers) == 1 else f"{gene} ({layer})" for layer, gene in itertools.product(self.layers, self.genes)
        )
        level = per_gene(1.0 if reference is None else reference, "reference", contexts=True)
        level = level if level.ndim == 2 else level[None]
        mean = level.mean(0)
        regulators, source = np.unique(network.regulator, return_inverse=True)
        for name, values in (
            ("regulators", torch.from_numpy(regulators)),
            ("source", torch.from_numpy(source)),
            ("target", torch.from_numpy(network.target)),
            ("row_start", torch.from_numpy(np.searchsorted(network.target, np.arange(n + 1)))),
            ("by_source", torch.from_numpy(np.argsort(source, kind="stable"))),
            ("source_start", torch.from_numpy(np.searchsorted(np.sort(source), np.arange(most + 1)))),
            ("control_level", level),
            ("reference", mean),
            ("spread", per_gene(1.0 if spread is None else spread, "spread")),
            ("epsilon", floor * mean),
            ("activation_fold", per_gene(activation_fold, "activation_fold")),
            ("gain", per_gene(gain, "gain")),
        ):
            self.register_buffer(name, values)
        self.raw_decay = nn.Parameter(_inverse_softplus(per_gene(decay, "decay")), requires_grad=learn_turnover)
        if splicing:
            rate = _inverse_softplus(per_gene(splicing_rate, "splicing_rate"))
            self.raw_splicing = nn.Parameter(rate, requires_grad=learn_turnover)
        if protein:
            rate = _inverse_softplus(per_gene(protein_decay, "protein_decay"))
            self.raw_protein_decay = nn.Parameter(rate, requires_grad=learn_turnover)
        if kinetics != "additive":
            self.raw_half = nn.Parameter(_inverse_softplus(mean[self.regulators]))
            self.raw_power = nn.Parameter(torch.full((len(regulators),), -0.6931471805599453, dtype=dtype))  # n = 2
        if rank is None:
            self.weight = nn.Parameter(torch.tensor(network.weight, dtype=dtype))  # a copy: a fit must not change the network
        else:
            # a fixed start vector: the same network gives the same parameters
            left, values, right = svds(network.matrix()[:, regulators], k=rank, v0=np.ones(most))
            self.left = nn.Parameter(torch.as_tensor(left.copy(), dtype=dtype))
            self.scale = nn.Parameter(torch.as_tensor(values.copy(), dtype=dtype))
            self.right = nn.Parameter(torch.as_tensor(right.copy(), dtype=dtype))

        # b and v such that the reference level of each context is a steady state
        share = torch.tensor(1 / headroom if kinetics != "multiplicative" else 1 - 1 / headroom, dtype=dtype)
        self.bias = nn.Parameter(torch.logit(share).expand(level.shape).clone())
        with torch.no_grad():
            if kinetics != "multiplicative" and not anchored:
                self.bias.sub_(self._drive(level))
            if not anchored:
                production = softplus(self.raw_decay) * level / self._regulation(level, self.bias)
                self.raw_production = nn.Parameter(_inverse_softplus(production))

    def extra_repr(self) -> str:
        weights = f"rank {self.rank}" if self.rank else f"{len(self.target)} edges"
        return (
            f"{len(self.genes)} genes, {len(self.regulators)} regulators, {weights}, {self.kinetics}, {'+'.join(self.layers)}"
        )

    @property
    def decay(self) -> Tensor:
        """Shape ``(G,)``: γ."""
        return softplus(self.raw_decay)

    @property
    def production(self) -> Tensor:
        """Shape ``(K, G)``: v, the production at f = 1."""
        if self.anchored and self.kinetics != "multiplicative":
            return self.decay * self.control_level / torch.sigmoid(self.bias)  # b is the logit of f there
        if self.anchored:
            return self.decay * self.control_level / self._regulation(self.control_level, self.bias)
        return softplus(self.raw_production)

    @property
    def absolute_bias(self) -> Tensor:
        """Shape ``(K, G)``: b as it stands in the equations."""
        if self.anchored and self.kinetics != "multiplicative":
            return self.bias - self._drive(self.control_level)
        return self.bias

    @property
    def control_state(self) -> Tensor:
        """Shape ``(K, S)``: the reference levels, a steady state until the parameters change; where to start from later."""
        parts = [self.control_level]
        if self.splicing:
            parts = [self.control_level * (self.decay / softplus(self.raw_splicing)).detach(), *parts]
        return torch.cat([*parts, *([self.control_level] if self.protein else [])], dim=-1)

    def split(self, state: Tensor) -> dict[str, Tensor]:
        """Name the parts of a state ``(..., S)``: each ``(..., G)``."""
        return dict(zip(self.layers, state.split(len(self.genes), dim=-1), strict=True))

    def weights(self) -> Tensor:
        """Dense ``W[target, regulator]``, shape ``(G, G)``."""
        n = len(self.genes)
        if self.rank is not None:
            among = (self.left * self.scale) @ self.right
            return among.new_zeros(n, n).index_copy(1, self.regulators, among)
        return self.weight.new_zeros(n, n).index_put((self.target, self.regulators[self.source]), self.weight)

    def terms(
        self, time: Tensor, state: Tensor, acts: Interventions | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Production and decay rate of each entry of the state.

        Parameters
        ----------
        time
            Scalar, time unit of the data.
        state
            Shape ``(..., S)``, >= 0.
        acts
            Interventions whose leading shape is that of the state; None: none.
        context
            Shape ``(...)``, int64: context of each row; None: the first.

        Returns
        -------
        production, decay
            Shape ``(..., S)`` each; the state's derivative is ``production - decay * state``.
        """
        parts = self.split(state)
        effects = Effects() if acts is None else acts.effects(time, self.activation_fold)
        mature = parts["spliced" if self.splicing else "mrna"]
        active = parts["protein"] if self.protein else mature
        active = active if effects.function is None else active * effects.function
        bias, most = (values[0] if context is None else values[context] for values in (self.absolute_bias, self.production))
        decay = self.decay.expand_as(mature)
        made = most * self._regulation(active, bias)
        made = made if effects.production is None else made * effects.production
        extra = None if effects.source is None else effects.source * self.gain * self.reference * self.decay
        productions, decays = [], []
        if self.splicing:
            splicing = softplus(self.raw_splicing)
            productions, decays = [made], [splicing.expand_as(mature)]
            made = splicing * parts["unspliced"]
        # foreign cDNA has no introns: it adds to the mature RNA
        made = made if extra is None else made + extra
        if effects.hold is not None and effects.level is not None:
            made = made * (1 - effects.hold) + decay * self.reference * effects.level
            faster = 1 + (self.clamp_speed - 1) * effects.hold
            made, decay = made * faster, decay * faster
        productions, decays = [*productions, made], [*decays, decay]
        if self.protein:
            turnover = softplus(self.raw_protein_decay)
            productions, decays = [*productions, turnover * mature], [*decays, turnover.expand_as(mature)]
        if len(self.layers) == 1:
            return made, decay
        return torch.cat(productions, dim=-1), torch.cat(decays, dim=-1)

    def forward(self, time: Tensor, state: Tensor, acts: Interventions | None = None, context: Tensor | None = None) -> Tensor:
        """The derivative, shape ``(..., S)``; arguments as :meth:`terms`."""
        production, decay = self.terms(time, state, acts, context)
        return production - decay * state

    def bind(self, acts: Interventions | None = None, context: Tensor | None = None) -> BoundDynamics:
        """Fix the interventions and contexts of the rows: what :mod:`perturbzoo.grn.solvers` integrates."""
        return BoundDynamics(self, acts, context)

    def _signal(self, level: Tensor) -> Tensor:
        """φ of the regulators: levels ``(..., G)`` -> ``(..., R)``; only regulators cost anything."""
        level = level.index_select(-1, self.regulators)
        if self.kinetics == "additive":
            epsilon, reference = self.epsilon[self.regulators], self.reference[self.regulators]
            return torch.log((level + epsilon) / (reference + epsilon)) / self.spread[self.regulators]
        power = 1 + 3 * torch.sigmoid(self.raw_power)
        # h = σ(n log(y / H)); the tiny number keeps the gradient at 0 finite and, for n = 1, right
        return torch.sigmoid(power * (torch.log(level + 1e-12) - torch.log(softplus(self.raw_half))))

    def _drive(self, level: Tensor) -> Tensor:
        """Sum over regulators of W φ: ``(..., G)`` -> ``(..., G)``."""
        if not len(self.source):
            return torch.zeros_like(level)
        signal = self._signal(level)
        if self.rank is not None:
            return ((signal @ self.right.T) * self.scale) @ self.left.T
        if self.dense:
            among = self.weight.new_zeros(len(self.genes), len(self.regulators))
            return signal @ among.index_put((self.target, self.source), self.weight).T
        flat = signal.reshape(-1, len(self.regulators))
        forth, back = (self.target, self.source, self.row_start), (self.source, self.target, self.source_start)
        return _EdgeSum.apply(flat, self.weight, forth, back, self.by_source).reshape(level.shape)

    def _gathered(self, each: Tensor) -> Tensor:
        """Add up values of edges ``(E, rows)`` at their targets: ``(rows, G)``."""
        return each.new_zeros(len(self.genes), each.shape[1]).index_add(0, self.target, each).T

    def _regulation(self, level: Tensor, bias: Tensor) -> Tensor:
        """f, between 0 and 1: ``(..., G)`` -> ``(..., G)``."""
        if self.kinetics != "multiplicative" or not len(self.source):
            return torch.sigmoid(bias + self._drive(level))
        bound = self._signal(level).reshape(-1, len(self.regulators)).T.index_select(0, self.source)  # (E, rows)
        weight = self.weight[:, None]
        factor = bound * torch.exp(weight.clamp(max=0)) + (1 - bound) * torch.exp(-weight.clamp(min=0))
        return torch.exp(logsigmoid(bias) + self._gathered(torch.log(factor)).reshape(level.shape))


class _EdgeSum(torch.autograd.Function):
    """Sum over the edges that enter a node, ``(N, sources) -> (N, sinks)``: a sparse product, and sparse products on its way back."""

    @staticmethod
    def forward(ctx: Any, signal: Tensor, weight: Tensor, forth: Ends, back: Ends, order: Tensor) -> Tensor:
        ctx.save_for_backward(signal, weight, order)
        ctx.ends = forth, back
        (_, source, start), sinks = forth, len(forth[2]) - 1
        sparse = torch.sparse_csr_tensor(start, source, weight.detach(), (sinks, signal.shape[1]), check_invariants=False)
        # contiguous again: everything after it would be slower on a transposed one than this copy is
        return (sparse @ signal.detach().T).T.contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        signal, weight, order = ctx.saved_tensors
        (target, source, start), (_, _, source_start) = ctx.ends
        to_signal = to_weight = None
        if ctx.needs_input_grad[0]:
            # the same edges the other way round, ordered by where they now arrive
            forth, back = (source[order], target[order], source_start), (target, source, start)
            to_signal = _EdgeSum.apply(gradient, weight[order], forth, back, torch.argsort(order))
        if ctx.needs_input_grad[1]:
            up, down = gradient.T, signal.T
            size = max(1, EDGE_VALUES // max(1, signal.shape[0]))
            parts = [
                (up.index_select(0, target[first : first + size]) * down.index_select(0, source[first : first + size])).sum(1)
                for first in range(0, len(target), size)
            ]
            to_weight = torch.cat(parts) if parts else torch.zeros_like(weight)
        return to_signal, to_weight, None, None, None


class BoundDynamics:
    """Dynamics with the interventions and contexts of their rows: a system for :mod:`perturbzoo.grn.solvers`.

    `labels` and `entries` name the rows (conditions) and the entries of the state (genes) in messages; `knots` and `ramp`
    say when interventions set in or cease, and how fast.
    """

    def __init__(self, dynamics: RegulatoryDynamics, acts: Interventions | None, context: Tensor | None) -> None:
        if acts is not None and bool((acts.targets >= len(dynamics.genes)).any()):
            raise PerturbZooError(
                f"dynamics: an intervention is on gene number {int(acts.targets.max())}, but there are {len(dynamics.genes)} genes"
            )
        if context is not None and not bool(((context >= 0) & (context < len(dynamics.bias))).all()):
            raise PerturbZooError(
                f"dynamics: contexts {int(context.min())} to {int(context.max())}, but there are {len(dynamics.bias)}"
            )
        self.dynamics, self.acts, self.context = dynamics, acts, context
        self.labels = () if acts is None else acts.labels
        self.entries = dynamics.entries
        self.knots: Sequence[float] = () if acts is None else acts.knots()
        self.ramp = 0.1 if acts is None else float(acts.ramp)
        self.decay_varies = acts is not None and "clamp" in acts.mechanisms

    def __call__(self, time: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.dynamics.terms(time, state, self.acts, self.context)


def _inverse_softplus(values: Tensor) -> Tensor:
    return values + torch.log(-torch.expm1(-values))


def _pairs(edges: object) -> str:
    return shortened(f"{row.regulator} -> {row.target}" for row in edges.itertuples())  # type: ignore[attr-defined]
