r"""Vectors of targets: what a target is to a model, whether it was ever perturbed or not.

A target t has a learned vector :math:`e_t` if it was perturbed in training, a row :math:`p_t` of a table if one was given
(projected to the model's width), and neighbours in graphs. With :math:`q_t = e_t + P p_t` and, for each relation r (kind of
graph), its normalised weights :math:`A^r`:

.. math:: v_t = M\, q_t + \sum_r M_r \sum_u A^r_{tu} q_u + b.

A target nobody perturbed lacks :math:`e_t`: what it does is what its table row and its perturbed neighbours say. That is
learned in training by leaving out :math:`e_t` of some trained targets (`unseen_rate` of the models).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.graph import Graph
from perturbzoo.data.graphs import build_graph, universe
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooWarning, shortened
from perturbzoo.models.embedding import Embedding, embed_targets, understand_embedding
from perturbzoo.models.known import TrainingDeltas


def prepare_targets(
    data: PerturbSeqDataModule,
    spec: DataSpec,
    *,
    embedding: Embedding = None,
    dimension: int = 20,
    perturbation_graph: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Read tables and graphs for the targets, for the checkpoint; names beyond the spec's that they tell about are added.

    Parameters
    ----------
    data, spec
        The training cells, and the targets.
    embedding, dimension
        As in :func:`perturbzoo.models.embedding.embed_targets`; None or ``learned`` for learned vectors alone.
    perturbation_graph
        As in :func:`perturbzoo.data.graphs.build_graph`; None takes the data module's, an empty list none.

    Returns
    -------
    ``extra``, names beyond the spec's; ``trained`` and ``informed`` ``(T,)`` bool: perturbed in training; that, or has a row
    in the table, or is next to one of these; ``graph``, and what :func:`~perturbzoo.models.embedding.embed_targets` returns,
    where there are any.
    """
    sources = (data.hparams["perturbation_graph"] if perturbation_graph is None else perturbation_graph) or []
    others = universe(sources) if sources else ()
    table: dict[str, Any] = {"extra": sorted(set(others) - set(spec.targets))}
    if understand_embedding(embedding) is not None:
        table = embed_targets(embedding, dimension, spec, data.training_pseudobulks(), data, others)
    names = [*spec.targets, *table.pop("extra")]
    trained = torch.zeros(len(names), dtype=torch.bool)
    known = TrainingDeltas(spec).table
    trained[known.targets[known.present & (known.dose > 0)]] = True
    informed = trained | table["known"] if table else trained.clone()
    prepared: dict[str, Any] = {"trained": trained, "informed": informed, **table}
    graph = None
    if sources:
        graph = build_graph(sources, names, expression=data.training_cells(), genes=spec.genes)
        source, destination = graph.edge_index
        telling = informed[source] & (source != destination)
        if not (telling & (destination < len(spec.targets))).any():
            warnings.warn(
                "the perturbation graph joins no trained target of these data to another of their targets: it says nothing here",
                PerturbZooWarning,
                stacklevel=2,
            )
        informed[destination[telling]] = True
    return _keep(prepared, graph, names, len(spec.targets))


def _keep(prepared: dict[str, Any], graph: Graph | None, names: Sequence[str], n_targets: int) -> dict[str, Any]:
    """Leave out the names beyond the spec's about which nothing is known; warn about the spec's own."""
    lost = [name for name, known in zip(names[:n_targets], prepared["informed"].tolist(), strict=False) if not known]
    if lost:
        warnings.warn(
            f"{len(lost)} targets are neither trained nor in the embedding nor next to such a one in the perturbation graph "
            f"({shortened(lost)}): they get what is common to all targets",
            PerturbZooWarning,
            stacklevel=3,
        )
    rows = [row for row, known in enumerate(prepared["informed"].tolist()) if known or row < n_targets]
    kept = {key: value[rows] if isinstance(value, Tensor) else value for key, value in prepared.items()}
    kept["extra"] = [names[row] for row in rows[n_targets:]]
    if graph is not None:
        kept["graph"] = graph.restrict([names[row] for row in rows]).to_state()
    return kept


class TargetVectors(nn.Module):
    """The vectors of all T targets.

    With ``fine_tune`` in `prepared` the table's rows are a parameter, which starts at the table; then what a target is without
    having been perturbed is said by its tuned row.

    Parameters
    ----------
    prepared
        What :func:`prepare_targets` returned.
    width
        Length h of a vector.
    relations
        Give each kind of graph, and the target itself, a linear map of its own; otherwise all share one.
    everyone_speaks
        Let targets never perturbed have learned vectors too, as GEARS does: what those mean is learned from their effect on
        their neighbours only. Otherwise they have none and send no messages.
    scale
        Standard deviation of the learned vectors at the start.
    max_norm
        Bound on the length of a learned vector; None for no bound.
    """

    vectors: Tensor
    _has_own: Tensor
    _self_weight: Tensor

    def __init__(
        self,
        prepared: dict[str, Any],
        width: int,
        *,
        relations: bool = True,
        everyone_speaks: bool = False,
        scale: float = 1.0,
        max_norm: float | None = None,
    ) -> None:
        super().__init__()
        n_targets = len(prepared["trained"])
        has_own = speaks = prepared["informed"] if everyone_speaks else prepared["trained"]
        self.register_buffer("_has_own", has_own[:, None].float(), persistent=False)
        self.learned = nn.Embedding(n_targets, width, max_norm=max_norm)
        nn.init.normal_(self.learned.weight, std=scale)
        self.project: nn.Linear | None = None
        if "vectors" in prepared:
            speaks = has_own | prepared["known"]
            # as long as the learned ones on average, whatever the table's unit
            vectors = prepared["vectors"] / prepared["vectors"][prepared["known"]].norm(dim=1).mean() * width**0.5
            if prepared["fine_tune"]:
                self.vectors = nn.Parameter(vectors)
            else:
                self.register_buffer("vectors", vectors, persistent=False)
            self.project = nn.Linear(vectors.shape[1], width, bias=False)
        kinds = Graph.from_state(prepared["graph"]).edge_types[:-1] if "graph" in prepared else ()  # the last is 'self'
        graphs, self_weight = _neighbours(prepared, speaks, relations)
        self.register_buffer("_self_weight", self_weight[:, None], persistent=False)
        self.n_relations = len(graphs)
        for number, (edge_index, edge_weight) in enumerate(graphs):
            self.register_buffer(f"edge_index_{number}", edge_index, persistent=False)
            self.register_buffer(f"edge_weight_{number}", edge_weight, persistent=False)
        self.self_map = nn.Linear(width, width)
        # by name: another model's may come in another order
        self.maps = nn.ModuleDict({kind: nn.Linear(width, width, bias=False) for kind in kinds}) if relations else None

    def forward(self) -> tuple[Tensor, Tensor]:
        """Shape ``(T, h)`` each: the targets' vectors, and what they are without what was learned by perturbing them."""
        index = torch.arange(self.learned.num_embeddings, device=self._has_own.device)
        own = self.learned(index) * self._has_own
        known = torch.zeros_like(own) if self.project is None else self.project(self.vectors)
        heard = [self._heard(number, own + known) for number in range(self.n_relations)]  # of (T, h)
        own, known = own * self._self_weight, known * self._self_weight
        if self.maps is None:
            unseen = self.self_map(known + sum(heard))
        else:
            unseen = self.self_map(known) + sum(
                linear(values) for linear, values in zip(self.maps.values(), heard, strict=True)
            )
        return unseen + own @ self.self_map.weight.T, unseen

    def _heard(self, relation: int, values: Tensor) -> Tensor:
        """Weighted sum of the neighbours' values."""
        source, destination = self.get_buffer(f"edge_index_{relation}")
        messages = values[source] * self.get_buffer(f"edge_weight_{relation}")[:, None]
        return torch.zeros_like(values).index_add_(0, destination, messages)


def _neighbours(prepared: dict[str, Any], speaks: Tensor, relations: bool) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Edges and weights of each kind of graph, symmetrically normalised as by GCN; and the weights of the nodes themselves.

    Each node counts itself with weight 1 in its degree, so that few and weak neighbours say little. Without `relations` there
    is one graph of all edges, and a node's own weight is normalised with them.
    """
    from torch_geometric.nn.conv.gcn_conv import gcn_norm  # half a second, which '--help' has no use for

    own = torch.ones(len(speaks))
    if "graph" not in prepared:
        return [], own
    graph = Graph.from_state(prepared["graph"])
    assert graph.edge_type is not None
    between = (graph.edge_index[0] != graph.edge_index[1]) & speaks[graph.edge_index[0]]
    kinds = [graph.edge_type == number for number in range(len(graph.edge_types) - 1)] if relations else [between]
    edges = []
    for kind in kinds:
        index, weight = graph.edge_index[:, kind & between], graph.edge_weight[kind & between]
        n_edges = len(weight)
        index, weight = gcn_norm(index, weight, len(graph))  # self loops, in the nodes' order, come last
        edges.append((index[:, :n_edges], weight[:n_edges]))
    return edges, own if relations else weight[n_edges:]
