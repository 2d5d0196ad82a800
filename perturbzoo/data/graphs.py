"""Where graphs over genes and targets come from: co-expression, shared GO terms, shared targets, any edge list.

Callers give training cells only: nothing here knows of splits or models. :func:`build_graph` turns the mapping of a
YAML file into a graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo.data.correlation import strongest_correlations
from perturbzoo.data.graph import Graph, assemble_graph, node_positions, union_graph
from perturbzoo.data.tables import read_edge_list, read_gene_sets
from perturbzoo.errors import PerturbZooError, near_matches, shortened

__all__ = [
    "Graph",
    "GraphConfig",
    "build_graph",
    "coexpression_graph",
    "edge_list_graph",
    "jaccard_graph",
    "regulator_overlap_graph",
    "union_graph",
    "universe",
]

_BLOCK_PAIRS = 1 << 24  # pairs of nodes whose overlap is held at a time


def coexpression_graph(
    expression: sparse.spmatrix | np.ndarray,
    names: Sequence[str],
    top_k: int = 20,
    threshold: float = 0.4,
) -> Graph:
    """Join each gene to the genes it is most correlated with across cells.

    The weight of an edge is ``|r|``, Pearson's correlation of two genes over the cells, as in the GEARS paper
    (https://doi.org/10.1038/s41587-023-01905-6): each destination keeps its `top_k` strongest sources with
    ``|r| > threshold``. A gene that never varies correlates with nothing.

    Parameters
    ----------
    expression
        Shape ``(cells, genes)``, training cells only, log1p-normalised; sparse or dense.
    names
        The genes, in the order of the columns.
    top_k
        Sources kept for each destination, its self loop not counted. Equal correlations are ranked by name.
    threshold
        Edges need ``|r|`` above this, in [0, 1).

    Raises
    ------
    PerturbZooError
        Fewer than two cells, NaN or infinite values, or a shape that does not fit `names`.
    """
    _check_limits(top_k, threshold)
    if expression.shape[1] != len(names):
        raise PerturbZooError(f"co-expression graph: {expression.shape[1]} columns of expression for {len(names)} gene names")
    source, destination, weight = strongest_correlations(expression, top_k, threshold)
    return assemble_graph(names, source, destination, weight, top_k)


def jaccard_graph(sets: Mapping[str, Collection[str]], names: Sequence[str], top_k: int = 20, threshold: float = 0.1) -> Graph:
    """Join nodes whose sets overlap; the weight is Jaccard's ``|A & B| / |A | B|``.

    With GO terms as the sets this is the perturbation graph of GEARS (top 20, and above 0.1 for a graph made from a
    user's own terms).

    Parameters
    ----------
    sets
        Node -> its terms. Nodes outside `names` are left out.
    names
        The nodes of the graph. Those without a set keep their self loop only.
    top_k
        Sources kept for each destination. Equal overlaps are ranked by name.
    threshold
        Edges need an overlap above this, in [0, 1).
    """
    _check_limits(top_k, threshold)
    position = node_positions(names)
    members = sorted((name for name in sets if name in position and len(sets[name])), key=position.__getitem__)
    if not members:
        raise PerturbZooError(
            f"none of the {len(names)} nodes ({shortened(names, 3)}) is among the {len(sets)} named in the table "
            f"({shortened(sets, 3)}): are the identifiers of the same kind (symbols, Ensembl)?"
        )
    terms: dict[str, int] = {}
    columns = [[terms.setdefault(term, len(terms)) for term in set(sets[name])] for name in members]
    size = np.array([len(column) for column in columns])
    indptr = np.concatenate([[0], np.cumsum(size)])
    ones = np.ones(indptr[-1], dtype=np.float32)
    membership = sparse.csr_matrix((ones, np.concatenate(columns), indptr), shape=(len(members), len(terms)))
    transposed = membership.T.tocsr()
    rows = max(1, _BLOCK_PAIRS // len(members))
    candidates = []
    for start in range(0, len(members), rows):
        shared = (membership[start : start + rows] @ transposed).tocoo()
        destination, source = shared.row + start, shared.col
        overlap = shared.data / (size[destination] + size[source] - shared.data)
        keep = (overlap > threshold) & (destination != source)
        candidates.append((source[keep], destination[keep], overlap[keep]))
    node = np.array([position[name] for name in members])
    source, destination, weight = (np.concatenate(parts) for parts in zip(*candidates, strict=True))
    return assemble_graph(names, node[source], node[destination], weight, top_k)


def regulator_overlap_graph(
    network: str | os.PathLike[str] | pd.DataFrame, names: Sequence[str], top_k: int = 20, threshold: float = 0.1
) -> Graph:
    """Join regulators that share targets; the weight is the Jaccard overlap of their target sets.

    Parameters
    ----------
    network
        A file for :func:`perturbzoo.data.tables.read_edge_list`, or its result: regulators are the sources.
    names, top_k, threshold
        See :func:`jaccard_graph`.
    """
    return jaccard_graph(_target_sets(_edges(network)), names, top_k, threshold)


def edge_list_graph(
    edges: str | os.PathLike[str] | pd.DataFrame,
    names: Sequence[str],
    directed: bool = False,
    top_k: int | None = None,
    threshold: float = 0.0,
) -> Graph:
    """Use the edges of a table.

    Parameters
    ----------
    edges
        A file for :func:`perturbzoo.data.tables.read_edge_list`, or a DataFrame with columns `source`, `target` and
        `weight`. Weights whose largest exceeds 1 (STRING's go to 1000) are divided by it, so that self loops count.
    names
        The nodes. Edges that touch any other node are left out.
    directed
        Keep the direction. Undirected, each edge also runs back, and the stronger of two directions counts.
    top_k
        Sources kept for each destination, strongest first, equal ones by name; None for all.
    threshold
        Edges need a weight above this, after scaling.
    """
    if top_k is not None:
        _check_limits(top_k, 0.0)
    position = node_positions(names)
    table = _edges(edges)
    scale = max(1.0, float(table["weight"].max()) if len(table) else 1.0)
    table = pd.DataFrame(
        {
            "source": table["source"].map(position),
            "destination": table["target"].map(position),
            "weight": table["weight"] / scale,
        }
    ).dropna()
    if table.empty:
        raise PerturbZooError(
            f"no edge of the table joins two of the {len(names)} nodes ({shortened(names, 3)}): "
            "are the identifiers of the same kind (symbols, Ensembl)?"
        )
    if not directed:
        table = pd.concat([table, table.rename(columns={"source": "destination", "destination": "source"})])
    table = table[(table["source"] != table["destination"]) & (table["weight"] > threshold)]
    table = table.groupby(["source", "destination"], as_index=False)["weight"].max().astype({"source": int, "destination": int})
    return assemble_graph(names, table["source"].to_numpy(), table["destination"].to_numpy(), table["weight"].to_numpy(), top_k)


@dataclass(frozen=True)
class _Kind:
    """How one kind of graph is built, which keys its configuration may hold, and which nodes its file knows."""

    build: Callable[..., Graph]
    keys: tuple[str, ...]
    nodes: Callable[[Any], Collection[str]]


_KINDS = {
    "coexpression": _Kind(coexpression_graph, ("top_k", "threshold"), lambda path: ()),
    "go": _Kind(
        lambda path, names, **keys: jaccard_graph(read_gene_sets(path), names, **keys),
        ("path", "top_k", "threshold"),
        read_gene_sets,
    ),
    "regulators": _Kind(
        regulator_overlap_graph, ("path", "top_k", "threshold"), lambda path: set(read_edge_list(path)["source"])
    ),
    "edges": _Kind(
        edge_list_graph,
        ("path", "directed", "top_k", "threshold"),
        lambda path: set(read_edge_list(path)[["source", "target"]].to_numpy().ravel()),
    ),
}

GraphConfig = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def build_graph(
    config: GraphConfig,
    names: Sequence[str],
    *,
    expression: sparse.spmatrix | np.ndarray | None = None,
    genes: Sequence[str] | None = None,
) -> Graph:
    """Build the graph that a configuration describes.

    Parameters
    ----------
    config
        ``{"kind": "coexpression" | "go" | "regulators" | "edges", ...}`` with the arguments of
        :func:`coexpression_graph`, :func:`jaccard_graph`, :func:`regulator_overlap_graph` or :func:`edge_list_graph`,
        and `path` (``$VARIABLES`` are expanded) for all kinds but the first. A list of such mappings gives their
        union, the edge types being the kinds.
    names
        The nodes of the graph.
    expression
        Shape ``(training cells, genes)``, log1p-normalised: what `coexpression` needs.
    genes
        Names of the columns of `expression`, where they are not `names`. Nodes that are not measured come isolated.

    Raises
    ------
    PerturbZooError
        An unknown kind or key, a missing path or expression, or what the builder refuses.
    """
    if not isinstance(config, Mapping):
        parts = [build_graph(part, names, expression=expression, genes=genes) for part in config]
        kinds = [str(part["kind"]) for part in config]
        # two GO files in one union stay apart as go and go_2
        labels = [kind if (n := kinds[:i].count(kind)) == 0 else f"{kind}_{n + 1}" for i, kind in enumerate(kinds)]
        return union_graph(dict(zip(labels, parts, strict=True)))
    kind, keys = _understand(config)
    if kind is not _KINDS["coexpression"]:
        return kind.build(keys.pop("path"), names, **keys)
    if expression is None:
        raise PerturbZooError("graph: kind 'coexpression' needs the expression of training cells, none was given")
    if genes is None:
        return kind.build(expression, names, **keys)
    wanted = node_positions(names)
    columns = [column for column, gene in enumerate(genes) if gene in wanted]
    if not columns:
        raise PerturbZooError(f"graph: none of the {len(names)} nodes is measured; kind 'coexpression' has nothing to join")
    measured = sparse.csr_matrix(expression) if sparse.issparse(expression) else np.asarray(expression)
    return kind.build(measured[:, columns], [genes[column] for column in columns], **keys).restrict(names)


def universe(config: GraphConfig) -> tuple[str, ...]:
    """Return every node that the files of `config` know, sorted: what can be predicted beyond the data's own targets.

    Co-expression knows the measured genes only and adds nothing.
    """
    if not isinstance(config, Mapping):
        return tuple(sorted({name for part in config for name in universe(part)}))
    kind, keys = _understand(config)
    return tuple(sorted(kind.nodes(keys.get("path"))))


def _understand(config: Mapping[str, Any]) -> tuple[_Kind, dict[str, Any]]:
    keys = dict(config)
    name = str(keys.pop("kind", ""))
    if name not in _KINDS:
        raise PerturbZooError(f"graph: kind '{name}' is none of {', '.join(_KINDS)}{near_matches(name, _KINDS)}")
    kind = _KINDS[name]
    for key in keys:
        if key not in kind.keys:
            raise PerturbZooError(
                f"graph of kind '{name}': unknown key '{key}'{near_matches(key, kind.keys)}; it takes {', '.join(kind.keys)}"
            )
    if "path" in kind.keys and not keys.get("path"):
        raise PerturbZooError(f"graph of kind '{name}': no path to its table was given")
    return kind, keys


def _edges(table: str | os.PathLike[str] | pd.DataFrame) -> pd.DataFrame:
    if not isinstance(table, pd.DataFrame):
        return read_edge_list(table)
    missing = {"source", "target"} - set(table.columns)
    if missing:
        raise PerturbZooError(f"edge table: no column {shortened(sorted(missing))}; source, target and weight are expected")
    return table if "weight" in table else table.assign(weight=1.0)


def _target_sets(edges: pd.DataFrame) -> dict[str, set[str]]:
    return {str(source): set(targets) for source, targets in edges.groupby("source")["target"]}


def _check_limits(top_k: int, threshold: float) -> None:
    if top_k < 1:
        raise PerturbZooError(f"graph: top_k is {top_k}; 1 or more is needed")
    if not 0 <= threshold < 1:
        raise PerturbZooError(f"graph: threshold is {threshold:g}; it must be at least 0 and below 1")
