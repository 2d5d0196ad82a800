"""Figure of the paths that carry a condition's change through the network, in layers from the perturbed genes.

Called by notebooks and scripts with the tables of :func:`perturbzoo.grn.attribution.explain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from perturbzoo.errors import PerturbZooError, near_matches, shortened
from perturbzoo.plotting.style import COLOURS, SMALL, axes_of_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARROW = " -> "
ACTIVATES, REPRESSES = COLOURS[0], COLOURS[5]
_THIN, _THICK = 0.8, 5.0  # points, of lines
_NODE = 900  # points squared
_LAYER, _ROW = 1.7, 0.75  # inches that a layer and a gene in it take


def plot_paths(
    paths: pd.DataFrame,
    edges: pd.DataFrame,
    *,
    genes: Sequence[str] | None = None,
    n_paths: int = 12,
    changes: pd.DataFrame | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the strongest paths: perturbed genes (squares) left, each gene as far right as its shortest drawn path is long.

    Lines are as wide as what the drawn paths carry over them (sum of magnitudes). Blue arrows activate, red bars repress;
    edges back to an earlier layer, or within one, are bent. Each line's `gid` is "A -> B".

    Parameters
    ----------
    paths
        Columns `gene`, `path` ("A -> B -> C") and `contribution`; rows whose path has no edge are left out.
    edges
        Columns `regulator`, `target` and `response`, whose sign is the edge's.
    genes
        Show paths to these only; None: to all in `paths`.
    n_paths
        How many paths, by magnitude of the contribution.
    changes
        Columns `gene` and `change` (natural log of levels): colours the genes, with a scale. None: white.
    ax
        Where to draw; a new figure by default.

    Returns
    -------
    Axes

    Raises
    ------
    PerturbZooError
        A column is missing, there is no path to draw, or `edges` lack an edge of a path.
    """
    for name, table, columns in (
        ("paths", paths, ("gene", "path", "contribution")),
        ("edges", edges, ("regulator", "target", "response")),
        ("changes", changes, ("gene", "change")),
    ):
        if table is not None and (missing := [column for column in columns if column not in table.columns]):
            raise PerturbZooError(f"plot_paths: {name} lack the columns {shortened(missing)}; give the tables of explain")
    known = set(paths["gene"])
    for gene in genes or ():
        if gene not in known:
            raise PerturbZooError(f"plot_paths: no path to '{gene}'{near_matches(gene, known)}")
    chosen = paths[paths["path"].str.contains(ARROW, regex=False) & (paths["contribution"] != 0)]
    chosen = chosen if genes is None else chosen[chosen["gene"].isin(genes)]
    chosen = chosen.sort_values("contribution", key=np.abs, ascending=False, kind="stable").head(n_paths)
    if chosen.empty:
        raise PerturbZooError("plot_paths: no path with an edge to draw: nothing moves along the network")
    sign = {(str(e.regulator), str(e.target)): float(np.sign(e.response)) for e in edges.itertuples()}
    graph, starts = _graph(chosen, sign)
    place = _layered(graph, starts)
    layers = [graph.nodes[gene]["layer"] for gene in graph]
    rows = max(np.bincount(layers))
    ax = axes_of_size(ax, 1.5 + _LAYER * (max(layers) + 1), 1.2 + _ROW * rows)
    _draw_genes(ax, graph, place, starts, changes)
    largest = max(carried for _, _, carried in graph.edges(data="carried"))
    for colour, style, of in ((ACTIVATES, "-|>", 1), (REPRESSES, "|-|,widthA=0,widthB=0.5", -1)):
        for regulator, target, data in graph.edges(data=True):
            if (data["sign"] >= 0) is not (of > 0):
                continue
            forward = graph.nodes[target]["layer"] > graph.nodes[regulator]["layer"]
            (line,) = nx.draw_networkx_edges(
                graph,
                place,
                edgelist=[(regulator, target)],
                ax=ax,
                width=_THIN + (_THICK - _THIN) * data["carried"] / largest,
                edge_color=colour,
                arrowstyle=style,
                arrowsize=14,
                node_size=1.2 * _NODE,  # lines end a little before the gene, so that bars are seen
                connectionstyle=f"arc3,rad={0.0 if forward else 0.3}",
                alpha=0.85,
            )
            line.set_gid(f"{regulator}{ARROW}{target}")
    handles = [Line2D([], [], color=colour, linewidth=2) for colour in (ACTIVATES, REPRESSES)]
    ax.legend(
        handles, ["activates", "represses"], fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(0, 0), ncols=2
    )
    ax.margins(0.15)
    ax.set_axis_off()
    return ax


def _graph(chosen: pd.DataFrame, sign: dict[tuple[str, str], float]) -> tuple[nx.DiGraph, list[str]]:
    """Return the edges of the paths with what they carry, and the genes that paths start from."""
    graph, starts = nx.DiGraph(), []
    for path, contribution in zip(chosen["path"], chosen["contribution"], strict=True):
        steps = path.split(ARROW)
        starts.append(steps[0])
        # an edge that a path takes twice carries its contribution once
        for edge in dict.fromkeys(nx.utils.pairwise(steps)):
            if edge not in sign:
                raise PerturbZooError(f"plot_paths: the edge {ARROW.join(edge)} of the path '{path}' is not among the edges")
            before = graph.get_edge_data(*edge, default={"carried": 0.0})["carried"]
            graph.add_edge(*edge, carried=before + abs(contribution), sign=sign[edge])
    return graph, list(dict.fromkeys(starts))


def _layered(graph: nx.DiGraph, starts: list[str]) -> dict[str, np.ndarray]:
    """Place each gene in the layer of its distance from a start, next to those that regulate it; sets `layer` of the nodes."""
    distance = nx.multi_source_dijkstra_path_length(graph, set(starts), weight=None)
    nx.set_node_attributes(graph, distance, "layer")
    height: dict[str, float] = {}

    def centre(gene: str) -> float:
        above = [height[other] for other in graph.predecessors(gene) if other in height]
        return float(np.mean(above)) if above else 0.0

    for layer in range(max(distance.values()) + 1):
        members = [gene for gene in graph if distance[gene] == layer]
        members.sort(key=centre)
        # the layout keeps the order in which genes come
        height |= {gene: number - (len(members) - 1) / 2 for number, gene in enumerate(members)}
    ordered = nx.DiGraph()
    ordered.add_nodes_from((gene, graph.nodes[gene]) for gene in sorted(graph, key=lambda gene: (distance[gene], height[gene])))
    return nx.multipartite_layout(ordered, subset_key="layer", align="vertical")


def _draw_genes(
    ax: Axes, graph: nx.DiGraph, place: dict[str, np.ndarray], starts: list[str], changes: pd.DataFrame | None
) -> None:
    value = {} if changes is None else dict(zip(changes["gene"], changes["change"], strict=True))
    shown = [float(value.get(gene, 0.0)) for gene in graph]
    limit = max(map(abs, shown)) or 1.0
    drawn = None
    for shape, members in (("s", starts), ("o", [gene for gene in graph if gene not in starts])):
        if members:
            drawn = nx.draw_networkx_nodes(
                graph,
                place,
                nodelist=members,
                node_shape=shape,
                node_size=_NODE,
                node_color=[float(value.get(gene, 0.0)) for gene in members],
                cmap=plt.get_cmap("PuOr_r"),
                vmin=-limit,
                vmax=limit,
                edgecolors="0.3",
                linewidths=0.8,
                ax=ax,
            )
    if changes is not None and drawn is not None:
        ax.figure.colorbar(drawn, ax=ax, shrink=0.6, label="change of the log level")
    # dark fills, at the ends of the scale, take light text
    for gene, change in zip(graph, shown, strict=True):
        colour = "white" if abs(change) > 0.75 * limit and value else "black"
        nx.draw_networkx_labels(graph, place, labels={gene: gene}, font_size=SMALL, font_color=colour, ax=ax)
