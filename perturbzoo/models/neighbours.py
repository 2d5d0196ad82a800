r"""What a target's neighbours say about it: the place from which a residual model starts for a target nobody perturbed.

For one intervention with target t, over the training singles p of target :math:`t_p`, with :math:`A^r` the adjacency of
relation r (kind of graph),

.. math:: a_{p} = \sum_r s_r A^r_{t t_p}, \qquad w_p = \frac{a_p}{1 + \sum_{q} a_q},
   \qquad \hat\delta = \sum_p w_p \delta_p + \Big(1 - \sum_p w_p\Big) \bar\delta,

with :math:`\bar\delta` the mean single: many close neighbours count for much, few and far ones for little. The strengths
:math:`s_r \ge 0` are those with the least squared error over the training singles when each is predicted from the others,
genes weighted by the variance of their response, so a graph that tells nothing gets 0 and leaves the mean.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from perturbzoo.data.batch import ConditionTable
from perturbzoo.data.graph import Graph
from perturbzoo.models.known import TrainingDeltas

MOST_SINGLES = 2000  # by which the strengths are fitted: memory grows with their number times that of all


class Neighbours(nn.Module):
    """Weights of training deltas for single interventions.

    Training singles of the same kind and context count (of all contexts for a new one), and those of the same target in
    other contexts or at other doses, which are a relation of their own. A single never counts for itself, except for its share in the mean.

    Parameters
    ----------
    known
        The training deltas.
    graph
        State of a union of graphs over the targets, or None.
    n_targets
        Number of targets T.
    """

    strength: Tensor
    source: Tensor
    destination: Tensor
    weight: Tensor
    relation: Tensor

    def __init__(self, known: TrainingDeltas, graph: dict[str, Any] | None, n_targets: int) -> None:
        super().__init__()
        self.n_targets = n_targets
        if graph is None:
            index, weight, relation, n_relations = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), torch.zeros(0), 1
        else:
            union = Graph.from_state(graph)
            assert union.edge_type is not None
            between = union.edge_index[0] != union.edge_index[1]
            index, weight, relation = union.edge_index[:, between], union.edge_weight[between], union.edge_type[between]
            n_relations = len(union.edge_types)
        self.register_buffer("source", index[0], persistent=False)
        self.register_buffer("destination", index[1], persistent=False)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("relation", relation.long(), persistent=False)
        # of each relation; the last is the target itself
        self.register_buffer("strength", torch.zeros(n_relations))
        single = known.acts(known.table) == 1
        self.singles = torch.nonzero(single).ravel()

    def affinities(self, known: TrainingDeltas, table: ConditionTable) -> Tensor:
        """Shape ``(R, C, P)``: how close each training delta is to each intervention, in each relation.

        Parameters
        ----------
        known
            The training deltas.
        table
            C single interventions.
        """
        trained = known.table.to(table.targets.device)
        target, row = table.targets[:, 0].unique(return_inverse=True)
        place = torch.full((self.n_targets,), -1, device=target.device)
        place[target] = torch.arange(len(target), device=target.device)
        chosen = place[self.destination] >= 0
        near = self.weight.new_zeros(len(self.strength), len(target), self.n_targets)
        near[self.relation[chosen], place[self.destination[chosen]], self.source[chosen]] = self.weight[chosen]
        near[-1, place[target], target] = 1.0
        near = near[:, row][:, :, trained.targets[:, 0].clamp(min=0)]  # (R, C, P)
        same_kind = table.kind[:, :1] == trained.kind[:, 0]
        here = table.context[:, None] == trained.context
        same_context = here | (table.context < 0)[:, None]
        itself = (table.targets[:, :1] == trained.targets[:, 0]) & same_kind & (table.dose[:, :1] == trained.dose[:, 0])
        single = known.acts(trained) == 1
        near = near * (same_kind & single & ~(itself & here))
        near[:-1] *= same_context
        return near

    def forward(self, known: TrainingDeltas, table: ConditionTable) -> Tensor:
        """Shape ``(C, P)``: weights for C single interventions."""
        return self._weights(self.affinities(known, table), self.strength, known.mean_single_weights(table))

    @staticmethod
    def _weights(affinities: Tensor, strength: Tensor, mean: Tensor) -> Tensor:
        close = torch.einsum("r,rcp->cp", strength, affinities)
        close = close / (1 + close.sum(dim=1, keepdim=True))
        return close + (1 - close.sum(dim=1, keepdim=True)) * mean

    def fit(self, known: TrainingDeltas) -> None:
        """Choose the strengths by predicting each training single from the others."""
        if len(self.singles) < 3:
            return
        # in float64 on the CPU: not every device has it, and all give the same strengths
        device, known = self.strength.device, copy.deepcopy(known).cpu()
        self.cpu()
        chosen = self.singles
        if len(chosen) > MOST_SINGLES:
            chosen = chosen[torch.linspace(0, len(chosen) - 1, MOST_SINGLES).long()]
        table = known.table.select(chosen)
        affinities = self.affinities(known, table).double()
        value = known.value.double()
        # genes count by how much they respond: over all genes alike, the neighbours' sampling noise would decide
        response = (value[self.singles] - value[self.singles].mean(dim=0)).square().mean(dim=0)
        products = (value * response) @ value.T  # (P, P): errors need no more than these
        own = torch.nn.functional.one_hot(chosen, len(value)).to(value)
        every = torch.nn.functional.one_hot(self.singles, len(value)).sum(dim=0).to(value)
        # nor does the mean count the single itself; that of all contexts, where it is the only one of its own
        mean = known.mean_single_weights(table).to(value) * (1 - own)
        mean = torch.where(mean.any(dim=1, keepdim=True), mean, every - own)
        mean = mean / mean.sum(dim=1, keepdim=True)
        logarithm = torch.zeros(len(self.strength), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logarithm], max_iter=100, line_search_fn="strong_wolfe")

        def error() -> Tensor:
            optimizer.zero_grad()
            difference = self._weights(affinities, logarithm.exp(), mean) - own
            total = torch.einsum("cp,pq,cq->", difference, products, difference) / products.diagonal().sum()
            # the weakest of pulls to strength 1, so that a relation without edges stays where it is
            total = total + 1e-6 * logarithm.square().sum()
            total.backward()
            return total

        with torch.enable_grad():
            optimizer.step(error)
        self.strength.copy_(logarithm.detach().exp())
        self.to(device)
