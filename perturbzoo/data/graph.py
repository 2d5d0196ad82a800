"""A weighted, directed graph over named nodes, as PyG reads it.

An edge goes from its source (row 0 of `edge_index`) to its destination (row 1), the direction in which PyG sends
messages. Every node carries a self loop of weight 1, so a node without neighbours keeps its own features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbzoo.errors import PerturbZooError, shortened

SELF = "self"  # the edge type of self loops in a union


@dataclass(frozen=True, eq=False)
class Graph:
    """A weighted, directed graph over named nodes, self loops included.

    Attributes
    ----------
    names
        The N nodes, in the order `edge_index` counts them.
    edge_index
        Shape ``(2, E)``, int64: sources in row 0, destinations in row 1.
    edge_weight
        Shape ``(E,)``, float32, >= 0.
    edge_type
        Shape ``(E,)``, int64: index into `edge_types`; None for a graph of one type.
    edge_types
        Names of the edge types, the last being ``"self"``; empty for a graph of one type.
    """

    names: tuple[str, ...]
    edge_index: Tensor
    edge_weight: Tensor
    edge_type: Tensor | None = None
    edge_types: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        types = f", types={'|'.join(self.edge_types)}" if self.edge_types else ""
        return f"Graph({len(self)} nodes, {self.edge_index.shape[1]} edges, {len(self.isolated)} isolated{types})"

    @property
    def isolated(self) -> tuple[str, ...]:
        """Nodes whose only edge is their self loop."""
        between = self.edge_index[:, self.edge_index[0] != self.edge_index[1]]
        connected = set(between.unique().tolist())
        return tuple(name for position, name in enumerate(self.names) if position not in connected)

    def restrict(self, names: Sequence[str]) -> Graph:
        """Return the graph over another list of nodes.

        Nodes outside `names` are dropped with their edges; names this graph does not know come isolated.
        """
        position = node_positions(names)
        new = torch.tensor([position.get(name, -1) for name in self.names], dtype=torch.int64)
        edge_index = new[self.edge_index]
        # self loops are made anew for all nodes, those that this graph does not know among them
        kept = (edge_index >= 0).all(dim=0) & (edge_index[0] != edge_index[1])
        return _with_self_loops(
            tuple(position),
            edge_index[:, kept],
            self.edge_weight[kept],
            None if self.edge_type is None else self.edge_type[kept],
            self.edge_types,
        )

    def to_state(self) -> dict[str, Any]:
        """Return tensors and lists of strings for a checkpoint that ``torch.load(weights_only=True)`` can read."""
        state: dict[str, Any] = {
            "names": list(self.names),
            "edge_index": self.edge_index.cpu(),
            "edge_weight": self.edge_weight.cpu(),
            "edge_types": list(self.edge_types),
        }
        if self.edge_type is not None:
            state["edge_type"] = self.edge_type.cpu()
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Graph:
        """Read what :meth:`to_state` returned.

        Raises
        ------
        PerturbZooError
            Something is missing, or an edge points outside the nodes.
        """
        try:
            graph = cls(
                names=tuple(state["names"]),
                edge_index=state["edge_index"],
                edge_weight=state["edge_weight"],
                edge_type=state.get("edge_type"),
                edge_types=tuple(state["edge_types"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PerturbZooError(f"not a graph of a perturbzoo checkpoint: {error!r}; was the file edited?") from error
        index = graph.edge_index
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(graph):
            raise PerturbZooError(f"damaged graph in the checkpoint: an edge points outside its {len(graph)} nodes")
        return graph


def union_graph(graphs: Mapping[str, Graph]) -> Graph:
    """Lay graphs over the same nodes on top of each other; each edge remembers which graph it came from.

    The edge types are the keys of `graphs` and then ``"self"``, which holds one self loop of each node.
    """
    parts = list(graphs.values())
    if not parts:
        raise PerturbZooError("a union needs one graph at least")
    if SELF in graphs or any(part.edge_types for part in parts):
        raise PerturbZooError(f"a union takes graphs of one edge type each, none of them called '{SELF}'")
    names = parts[0].names
    if any(part.names != names for part in parts):
        raise PerturbZooError("the graphs of a union must have the same nodes in the same order: call restrict first")
    between = [part.edge_index[0] != part.edge_index[1] for part in parts]
    return _with_self_loops(
        names,
        torch.cat([part.edge_index[:, keep] for part, keep in zip(parts, between, strict=True)], dim=1),
        torch.cat([part.edge_weight[keep] for part, keep in zip(parts, between, strict=True)]),
        torch.cat([torch.full((int(keep.sum()),), number) for number, keep in enumerate(between)]),
        (*graphs, SELF),
    )


def assemble_graph(
    names: Sequence[str], source: np.ndarray, destination: np.ndarray, weight: np.ndarray, top_k: int | None
) -> Graph:
    """Keep the `top_k` strongest sources of each destination (None: all) and add the self loops.

    Equal weights are ranked by the source's name, never by its position: reordering the genes reorders the graph and
    changes nothing else.
    """
    node_positions(names)
    rank = np.empty(len(names), dtype=np.int64)
    rank[np.argsort(np.asarray(names, dtype=str), kind="stable")] = np.arange(len(names))
    order = np.lexsort((rank[source], -weight, destination))
    source, destination, weight = source[order], destination[order], weight[order]
    if top_k is not None:
        first = np.searchsorted(destination, np.arange(len(names)))
        keep = np.arange(len(destination)) - first[destination] < top_k
        source, destination, weight = source[keep], destination[keep], weight[keep]
    edge_index = torch.from_numpy(np.stack([source, destination]).astype(np.int64))
    return _with_self_loops(tuple(map(str, names)), edge_index, torch.from_numpy(weight.astype(np.float32)))


def node_positions(names: Sequence[str]) -> dict[str, int]:
    """Return each node's index; an error where there is no node, or one is named twice."""
    if not len(names):
        raise PerturbZooError("a graph needs one node at least")
    position = {str(name): number for number, name in enumerate(names)}
    if len(position) < len(names):
        twice = pd.Index(names)[pd.Index(names).duplicated()].unique()
        raise PerturbZooError(f"graph: {len(twice)} nodes are named more than once: {shortened(twice)}")
    return position


def _with_self_loops(
    names: tuple[str, ...],
    edge_index: Tensor,
    edge_weight: Tensor,
    edge_type: Tensor | None = None,
    edge_types: tuple[str, ...] = (),
) -> Graph:
    """Append one self loop of weight 1 to each node; in a typed graph they are of the last type."""
    loops = torch.arange(len(names)).expand(2, -1)
    return Graph(
        names,
        torch.cat([edge_index, loops], dim=1),
        torch.cat([edge_weight, torch.ones(len(names))]),
        None if edge_type is None else torch.cat([edge_type, torch.full((len(names),), len(edge_types) - 1)]),
        edge_types,
    )
