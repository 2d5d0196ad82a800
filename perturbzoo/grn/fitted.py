"""`FittedNetwork`: kinetics on candidate edges, and what each guide does; what a fit fills in, and what answers questions.

The fit is :mod:`perturbzoo.grn.fitting`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from perturbzoo.data.batch import ConditionTable, encode_conditions
from perturbzoo.grn.dynamics import Kinetics, RegulatoryDynamics
from perturbzoo.grn.interventions import FRACTIONAL, MECHANISMS, Interventions
from perturbzoo.grn.network import GeneRegulatoryNetwork
from perturbzoo.grn.steady import steady_state
from perturbzoo.perturbation import KINDS, Condition

TOLERATED = 2.0  # standard errors: medians of some tens of correlated weights scatter themselves
FEW_CANDIDATES = 20  # of a gene, below which they say little about its own misfit
WEIGHT_SCALE = 1.0  # standard deviation of the weights of true edges, before anything is known
ABSENT = 0.5  # standard errors that an edge's weight must be worth to take part in the kinetics
FAR = torch.tensor(math.inf)
# what is done to a node that is not measured: its level is unknown, and taken up by the weights of its edges
UNMEASURED_STRENGTH = {"interference": 0.8, "activation": 1.0, "overexpression": 1.0, "knockout": 0.99}
# logit of what is taken away, log of what is added, where no guide of the kind was tested
USUAL_STRENGTH = {"interference": 1.0, "activation": 0.0, "overexpression": 0.0, "knockout": 2.0}
NO_DECAY = -4.0  # logit of the share of its own mRNA that a knockout costs a gene, before anything is known


class EncodedConditions(NamedTuple):
    """Conditions as :meth:`FittedNetwork.encode` leaves them: acts without fitted strengths, and where those stand."""

    given: Interventions
    place: Tensor


class FittedNetwork(nn.Module):
    """Kinetics on candidate edges, and what each guide does: new, as a fit starts; later, as it ended.

    Parameters
    ----------
    candidates
        Edges over the nodes: measured genes first, then targets that are not measured, then latent regulators.
    measured
        How many of the nodes are measured genes.
    control
        Shape ``(K, measured)``: control levels of each context, > 0.
    acts
        The (target, kind) pairs that the screen did, whose strengths are fitted.
    default_kind
        Kind of interventions that spell none out.
    kinetics
        Form of the regulation.

    Attributes
    ----------
    dynamics
        The kinetics over all nodes; :meth:`network` gives its edges as a table.
    strength
        Shape ``(A,)``: for each of `acts` the logit of the share that it takes of production (interference) or function
        (knockout), or the log of its dose, in units of the dose that was given (activation, overexpression).
    own
        Shape ``(A,)``: logit of the share of its own mRNA that a knockout costs a gene beyond the network (nonsense-mediated decay).
    shift
        Shape ``(K, measured)``: log of true over measured control levels.
    information, probability, estimate
        Shape ``(E,)``: of each candidate edge the Fisher information about its weight, the posterior probability that it is an edge,
        and its posterior mean weight; see :func:`perturbzoo.grn.fitting.fit_network`.
    """

    information: Tensor
    probability: Tensor
    estimate: Tensor
    prior: Tensor
    shift: Tensor

    def __init__(
        self,
        candidates: GeneRegulatoryNetwork,
        measured: int,
        control: np.ndarray | Tensor,
        acts: Sequence[tuple[str, str]],
        default_kind: str,
        kinetics: Kinetics = "hill",
    ) -> None:
        super().__init__()
        nodes = len(candidates.genes)
        level = torch.as_tensor(np.asarray(control), dtype=torch.float32)
        level = torch.cat([level, level.new_ones(len(level), nodes - measured)], dim=1)
        self.candidates, self.measured, self.default_kind = candidates, measured, default_kind
        self.acts = tuple((target, kind) for target, kind in acts)
        self._measured = frozenset(candidates.genes[:measured])
        self.place = {act: number for number, act in enumerate(self.acts)}
        # a candidate on every pair of few genes is cheapest as a dense product
        dense = nodes <= 500 and len(candidates) > nodes * nodes / 10 and kinetics != "multiplicative"
        start = candidates.resolve_signs("activating")
        self.dynamics = RegulatoryDynamics(start, kinetics=kinetics, reference=level, anchored=True, dense=dense)
        for parameter in self.dynamics.parameters():
            parameter.requires_grad_(False)
        self.strength = nn.Parameter(torch.zeros(len(self.acts)))
        self.own = nn.Parameter(torch.zeros(len(self.acts)))
        self.register_buffer("shift", torch.zeros(len(level), measured))
        self.register_buffer("information", torch.ones(len(candidates)))
        self.register_buffer("prior", torch.as_tensor(candidates.probability, dtype=torch.float32))
        self.register_buffer("probability", torch.ones(len(candidates)))
        self.register_buffer("estimate", torch.zeros(len(candidates)))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of measured genes, unmeasured targets and latent regulators."""
        return self.candidates.genes

    def encode(self, conditions: Sequence[Condition]) -> EncodedConditions:
        """Encode conditions once, to be given the strengths of guides as often as these change.

        Raises
        ------
        PerturbZooError
            A target is no node of the network, or a dose is outside its range.
        """
        table = encode_conditions(conditions, [0] * len(conditions), self.nodes, self.default_kind)
        return self.encode_table(table, self.nodes, tuple(map(str, conditions)))

    def encode_table(self, table: ConditionTable, targets: Sequence[str], labels: Sequence[str] = ()) -> EncodedConditions:
        """Encode a batch's table, whose `targets` count the names in `targets`."""
        unmeasured = torch.tensor([name not in self._measured for name in targets] or [True], device=table.targets.device)
        outside = unmeasured[table.targets.clamp(min=0)]
        # a compound or cytokine has no gene: it is a node of its own, of which there is more
        added = outside & ((table.kind == KINDS.index("compound")) | (table.kind == KINDS.index("cytokine")))
        kind = torch.where(added, KINDS.index("overexpression"), table.kind)
        given = Interventions.from_table(replace(table, kind=kind), targets, self.nodes, labels=labels)
        place = torch.full_like(given.targets, -1)
        for row, column in torch.nonzero(given.targets >= 0).tolist():
            key = self.nodes[int(given.targets[row, column])], KINDS[int(given.kind[row, column])]
            place[row, column] = self.place.get(key, -1)
        return EncodedConditions(given, place)

    def interventions(self, conditions: EncodedConditions) -> Interventions:
        """Conditions with the strengths that were fitted; a guide nobody tested has the median one of its kind."""
        given, place = conditions
        of_kind = {name: given.kind == KINDS.index(name) for name in MECHANISMS}
        inside = (given.targets >= 0) & (given.targets < self.measured)
        strength = self._each(self.strength, place, of_kind, USUAL_STRENGTH)
        taken, made = torch.sigmoid(strength), torch.exp(strength)
        effect, dose = given.efficacy, given.dose
        for name, fixed in UNMEASURED_STRENGTH.items():
            here = of_kind[name]
            if name in FRACTIONAL:
                effect = torch.where(here, effect * torch.where(inside, taken, fixed), effect)
            else:
                dose = torch.where(here, dose * torch.where(inside, made, fixed), dose)
        columns = [given.targets, given.kind, dose, given.onset, given.offset, effect]
        cut = of_kind["knockout"] & inside
        if bool(cut.any()):
            # a knockout's own transcripts may decay: a second act on the same gene, on its production
            lost = torch.sigmoid(self._each(self.own, place, of_kind, {"knockout": NO_DECAY}))
            twins = [
                torch.where(cut, given.targets, -1),
                torch.where(cut, KINDS.index("interference"), -1),
                given.dose,
                given.onset,
                given.offset,
                torch.where(cut, lost * given.efficacy, 0.0),
            ]
            columns = [torch.cat(pair, dim=-1) for pair in zip(columns, twins, strict=True)]
        targets, kind, dose, onset, offset, effect = columns
        return Interventions(targets, kind, dose, onset, offset, effect, ramp=given.ramp, labels=given.labels)

    def _each(self, values: Tensor, place: Tensor, of_kind: dict[str, Tensor], usual: dict[str, float]) -> Tensor:
        """What was fitted for each act; for those nobody tested the median of their kind, for kinds nobody tested a usual one."""
        found = values[place.clamp(min=0)] if len(values) else values.new_zeros(place.shape)
        for name, otherwise in usual.items():
            unknown = (place < 0) & of_kind[name]
            if bool(unknown.any()):
                tested = [number for number, act in enumerate(self.acts) if act[1] == name]
                middle = values[tested].detach().median() if tested else values.new_tensor(otherwise)
                found = torch.where(unknown, middle, found)
        return found

    def change(self, conditions: Sequence[Condition] | EncodedConditions, context: Tensor | None = None) -> Tensor:
        """Log of the steady levels of all nodes over those of the controls, shape ``(N, nodes)``.

        Raises
        ------
        PerturbZooError
            A target is no node, or there is no steady state: names condition and gene.
        """
        encoded = conditions if isinstance(conditions, EncodedConditions) else self.encode(conditions)
        rows = torch.zeros(len(encoded.place), dtype=torch.int64) if context is None else context
        return self.settled(self.interventions(encoded), rows)

    def settled(self, acts: Interventions, context: Tensor) -> Tensor:
        """As :meth:`change`, for acts."""
        reference = self.dynamics.control_level[context]
        state = steady_state(self.dynamics.bind(acts, context), reference, tolerance=1e-4, unstable="keep")
        return torch.log(state / reference)

    def posterior(self, slope: Tensor, prior_strength: float) -> Tensor:
        """Probability that each candidate is an edge, ``(E,)``, given the slope of the data's loss at the fitted weights.

        The formula is :mod:`perturbzoo.grn.fitting`'s.
        """
        information = self.information
        # one Newton step on the likelihood alone takes back what the penalty took
        free = self.dynamics.weight.detach() - slope / information
        share = WEIGHT_SCALE**2 * information
        worth = (free * information.sqrt()) / self._null_spread(free * information.sqrt())
        evidence = 0.5 * worth**2 * share / (1 + share) - 0.5 * torch.log1p(share)
        elsewhere = torch.full_like(free, min(0.5, 2 / len(self.nodes)))
        believed = torch.lerp(elsewhere, (0.5 * self.prior).maximum(elsewhere), prior_strength)
        return torch.sigmoid(torch.logit(believed) + evidence)

    def _null_spread(self, worth: Tensor) -> Tensor:
        """How much wider than tolerated the weights of pairs that are no edges scatter, in standard errors, at least 1, ``(E,)``.

        Most candidates of a gene are no edges, so that the median magnitude tells (Efron 2004, J. Am. Stat. Assoc. 99:96): where
        the kinetics do not fit a gene, all its candidates seem to matter. Genes with few candidates have the spread of all; 1 where
        there are few in all.
        """
        if len(worth) < FEW_CANDIDATES:
            return torch.ones_like(worth)
        size = pd.Series(worth.abs().cpu().numpy())
        group = size.groupby(self.candidates.target)
        middle = group.transform("median").where(group.transform("size") >= FEW_CANDIDATES, size.median())
        spread = (middle / 0.6745 / TOLERATED).clip(lower=1.0)
        return torch.as_tensor(spread.to_numpy(), dtype=worth.dtype, device=worth.device)

    def pruned(self) -> RegulatoryDynamics:
        """The kinetics without edges that were not found: the same, and faster."""
        edges, weight = self.candidates, self.dynamics.weight.detach().cpu().double().numpy()
        kept = weight != 0
        network = GeneRegulatoryNetwork(
            edges.genes,
            edges.regulator[kept],
            edges.target[kept],
            weight[kept],
            np.sign(weight[kept]).astype(np.int8),
            edges.probability[kept],
        )
        dynamics = RegulatoryDynamics(
            network, kinetics=self.dynamics.kinetics, reference=self.dynamics.control_level.cpu(), anchored=True
        ).requires_grad_(False)
        dynamics.bias.copy_(self.dynamics.bias)
        dynamics.raw_decay.copy_(self.dynamics.raw_decay)
        return dynamics
