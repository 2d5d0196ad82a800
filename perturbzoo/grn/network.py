"""`GeneRegulatoryNetwork`: who regulates whom, how strongly, in which direction, and how sure that is.

An edge goes regulator -> target, and every matrix here is ``W[target, regulator]``: row i lists what regulates gene i, so
that ``W @ x`` is the input of each gene. Reading of foreign layouts is in :mod:`perturbzoo.grn.network_tables`, comparison
with a truth in :mod:`perturbzoo.grn.scoring`. Knows no model, no cells and no dynamics.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from perturbzoo.errors import PerturbZooError, near_matches, shortened
from perturbzoo.grn.edge_table import COLUMNS, Contradictory, Duplicates, checked_edges, merged_edges

if TYPE_CHECKING:
    import networkx
    from anndata import AnnData
    from torch_geometric.data import Data

Outside = Literal["error", "drop"]
SelfLoops = Literal["error", "drop", "keep"]
UnknownSign = Literal["drop", "activating", "repressing"]


@dataclass(frozen=True, eq=False, repr=False)
class GeneRegulatoryNetwork:
    """E edges between G genes. Make one with :meth:`from_edges` or :meth:`read`, which check and clean.

    Attributes
    ----------
    genes
        The G genes, in the order that `regulator` and `target` count them.
    regulator, target
        Shape ``(E,)``, int64: edge e goes from ``genes[regulator[e]]`` to ``genes[target[e]]``. Sorted by target, then
        regulator; no pair twice.
    weight
        Shape ``(E,)``, float64, never 0: positive activates, negative represses. Where the sign is unknown, the magnitude.
    sign
        Shape ``(E,)``, int8: 1, -1, or 0 for unknown.
    probability
        Shape ``(E,)``, float64 in [0, 1]: belief that the edge exists; 1 where the source says nothing.

    Raises
    ------
    PerturbZooError
        The arrays contradict each other: lengths, ranges, a gene or a pair twice, a weight against its sign.
    """

    genes: tuple[str, ...]
    regulator: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    sign: np.ndarray
    probability: np.ndarray

    def __post_init__(self) -> None:
        dtypes = {"regulator": np.int64, "target": np.int64, "weight": float, "sign": np.int8, "probability": float}
        for field, dtype in dtypes.items():
            object.__setattr__(self, field, np.asarray(getattr(self, field), dtype=dtype))
        object.__setattr__(self, "genes", tuple(map(str, self.genes)))
        names = pd.Index(self.genes)
        shape = self.regulator.shape
        in_range = all(((ends >= 0) & (ends < len(names))).all() for ends in (self.regulator, self.target))
        for holds, complaint in (
            (names.is_unique, f"{names.duplicated().sum()} genes named twice: {shortened(names[names.duplicated()])}"),
            (all(getattr(self, field).shape == shape for field in dtypes), "its arrays differ in length"),
            (in_range, f"an edge points outside its {len(names)} genes"),
            (np.isfinite(self.weight).all() and (self.weight != 0).all(), "weights must be finite and not 0"),
            (((self.probability >= 0) & (self.probability <= 1)).all(), "probabilities must lie in [0, 1]"),
        ):
            if not holds:
                raise PerturbZooError(f"network: {complaint}")
        if (self.sign != np.where(self.sign == 0, 0, np.sign(self.weight))).any() or (self.weight[self.sign == 0] < 0).any():
            raise PerturbZooError(
                "network: a weight contradicts its sign; where the sign is 0 (unknown) the weight is positive"
            )
        order = np.lexsort((self.regulator, self.target))
        for field in dtypes:
            object.__setattr__(self, field, getattr(self, field)[order])
        if ((np.diff(self.regulator) == 0) & (np.diff(self.target) == 0)).any():
            raise PerturbZooError("network: an edge comes twice; GeneRegulatoryNetwork.from_edges says how to merge them")

    def __len__(self) -> int:
        """Number of edges."""
        return len(self.weight)

    def __repr__(self) -> str:
        unknown = int((self.sign == 0).sum())
        return (
            f"GeneRegulatoryNetwork({len(self.genes)} genes, {len(self.regulators)} regulators, {len(self)} edges"
            f"{f', {unknown} of unknown sign' if unknown else ''})"
        )

    @classmethod
    def from_edges(
        cls,
        table: pd.DataFrame,
        genes: Sequence[str] | None = None,
        *,
        outside: Outside = "error",
        self_loops: SelfLoops = "error",
        duplicates: Duplicates = "error",
        contradictory: Contradictory = "error",
    ) -> GeneRegulatoryNetwork:
        """Make a network from a table with one row for each edge.

        Parameters
        ----------
        table
            Columns `regulator` and `target`; optionally `weight` (1 where missing), `sign` (1, -1, 0 for unknown; where
            missing, the weight's own, and unknown without a weight) and `probability` (1 where missing).
        genes
            The genes of the data, in order; None: the genes that the table names, sorted.
        outside
            What becomes of edges that name a gene outside `genes`.
        self_loops
            What becomes of edges from a gene to itself. They are identified by time courses only, hence the default.
        duplicates
            How rows of one pair are merged: the `strongest` weight, the `sum` or the `mean` of the weights. The highest
            probability is kept.
        contradictory
            What becomes of pairs that are listed both as activating and as repressing: their sign becomes `unknown`
            (of the strongest weight), or they are dropped.

        Raises
        ------
        PerturbZooError
            One of the above is met and its option says ``"error"``; a column is missing; a value is no number, is not
            finite, or outside its range; a weight is 0 and no sign says what that means.
        """
        edges = checked_edges(table)
        if genes is not None and not (given := pd.Index(list(map(str, genes)))).is_unique:
            raise PerturbZooError(f"network: genes named twice: {shortened(given[given.duplicated()].unique())}")
        names = pd.Index(sorted({*edges["regulator"], *edges["target"]}) if genes is None else list(map(str, genes)))
        missing = sorted({*edges["regulator"], *edges["target"]}.difference(names))
        if missing and outside == "error":
            raise PerturbZooError(
                f"network: {len(missing)} of its genes are not in the data: {shortened(missing)}"
                f"{near_matches(missing[0], names)}; outside='drop' leaves their edges out"
            )
        edges = edges[edges["regulator"].isin(names) & edges["target"].isin(names)]
        if len(table) and not len(edges):
            raise PerturbZooError(
                f"network: none of its {len(missing)} genes is in the data: {shortened(missing)}; other names?"
            )

        loops = edges["regulator"] == edges["target"]
        if loops.any() and self_loops == "error":
            raise PerturbZooError(
                f"network: {int(loops.sum())} self loops: {shortened(edges['regulator'][loops])}; self_loops='drop' or 'keep'"
            )
        edges = edges if self_loops == "keep" else edges[~loops]
        edges = merged_edges(edges, duplicates, contradictory)
        return cls(
            genes=tuple(names),
            regulator=names.get_indexer(edges["regulator"]),
            target=names.get_indexer(edges["target"]),
            weight=edges["weight"].to_numpy(),
            sign=edges["sign"].to_numpy(),
            probability=edges["probability"].to_numpy(),
        )

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], genes: Sequence[str] | None = None, *, layout: str = "auto", **options: Any
    ) -> GeneRegulatoryNetwork:
        """Read a file in any layout that :func:`perturbzoo.grn.network_tables.read_network_table` knows.

        `genes` and `options` go to :meth:`from_edges`, and so do its errors. Collections of several sources list many
        pairs twice, some with both signs, so for them ``duplicates="strongest", contradictory="unknown"`` is the way.
        """
        from perturbzoo.grn.network_tables import read_network_table

        return cls.from_edges(read_network_table(path, layout), genes, **options)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write :attr:`edges` as parquet where `path` ends in ``.parquet``, else as CSV (``.gz`` allowed)."""
        from perturbzoo.grn.network_tables import write_network_table

        write_network_table(self.edges, path)

    @property
    def edges(self) -> pd.DataFrame:
        """One row for each edge: `regulator`, `target`, `weight`, `sign`, `probability`."""
        names = np.array(self.genes, dtype=object)
        values = (names[self.regulator], names[self.target], self.weight, self.sign, self.probability)
        return pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))

    @property
    def regulators(self) -> tuple[str, ...]:
        """The genes with an outgoing edge, in the order of `genes`."""
        return tuple(self.genes[index] for index in np.unique(self.regulator))

    @property
    def targets(self) -> tuple[str, ...]:
        """The genes with an incoming edge, in the order of `genes`."""
        return tuple(self.genes[index] for index in np.unique(self.target))

    def matrix(self, values: Literal["weight", "probability", "sign"] = "weight") -> sparse.csr_matrix:
        """Return ``W[target, regulator]``, shape ``(G, G)``; an edge whose value is 0 is stored as a zero."""
        shape = (len(self.genes), len(self.genes))
        return sparse.csr_matrix((getattr(self, values).astype(float), (self.target, self.regulator)), shape=shape)

    def restrict(self, genes: Sequence[str]) -> GeneRegulatoryNetwork:
        """Return the network over other genes: edges of all others are dropped, genes it does not know come without edges."""
        names = pd.Index(list(map(str, genes)))
        position = names.get_indexer(self.genes) if names.is_unique else np.zeros(len(self.genes), dtype=int)
        regulator, target = position[self.regulator], position[self.target]
        kept = (regulator >= 0) & (target >= 0)
        values = (self.weight[kept], self.sign[kept], self.probability[kept])
        return GeneRegulatoryNetwork(tuple(names), regulator[kept], target[kept], *values)

    def resolve_signs(self, unknown: UnknownSign) -> GeneRegulatoryNetwork:
        """Return the network with edges of unknown sign dropped, or taken as activating or repressing."""
        open_ = self.sign == 0
        kept = ~open_ if unknown == "drop" else np.ones(len(self), dtype=bool)
        sign = np.where(open_, -1 if unknown == "repressing" else 1, self.sign)
        return GeneRegulatoryNetwork(
            self.genes,
            self.regulator[kept],
            self.target[kept],
            (np.abs(self.weight) * sign)[kept],
            sign[kept],
            self.probability[kept],
        )

    def to_anndata(self, adata: AnnData, key: str = "grn") -> None:
        """Write weights, signs and probabilities to ``adata.varp[key]``, ``[key + '_sign']`` and ``[key + '_probability']``.

        ``adata.uns[key]`` says the orientation. Edges between genes outside ``adata.var_names`` are an error.
        """
        outside = set(self.regulators).union(self.targets).difference(adata.var_names)
        if outside:
            raise PerturbZooError(f"network: {len(outside)} of its genes are not in var_names: {shortened(sorted(outside))}")
        placed = self.restrict(list(adata.var_names))
        adata.varp[key] = placed.matrix()
        adata.varp[f"{key}_sign"] = placed.matrix("sign")
        adata.varp[f"{key}_probability"] = placed.matrix("probability")
        adata.uns[key] = {"orientation": "W[target, regulator]"}

    @classmethod
    def from_anndata(
        cls, adata: AnnData, key: str = "grn", *, orientation: Literal["target, regulator", "regulator, target"] | None = None
    ) -> GeneRegulatoryNetwork:
        """Read ``adata.varp[key]``, and its signs and probabilities where they are there.

        Parameters
        ----------
        orientation
            What the rows and columns of a foreign matrix are. None: what :meth:`to_anndata` wrote down; needed where it
            did not.

        Raises
        ------
        PerturbZooError
            There is no such matrix, or nothing says its orientation.
        """
        if key not in adata.varp:
            raise PerturbZooError(
                f"varp['{key}'] is missing{near_matches(key, adata.varp)}; there are: {shortened(adata.varp)}"
            )
        noted = adata.uns.get(key, {})
        said = orientation or (noted.get("orientation") if isinstance(noted, Mapping) else None)
        if said is None:
            raise PerturbZooError(
                f"varp['{key}'] does not say its orientation: pass orientation='target, regulator' if row i lists what "
                "regulates gene i, else 'regulator, target'"
            )
        rows_are_regulators = said.removeprefix("W[").startswith("regulator")

        def oriented(name: str) -> sparse.csr_matrix:
            values = sparse.csr_matrix(adata.varp[name])
            return values.T.tocsr() if rows_are_regulators else values

        weights = oriented(key).tocoo()
        kept = weights.data != 0
        target, regulator, weight = weights.row[kept], weights.col[kept], weights.data[kept].astype(float)
        at = (target, regulator)
        sign = np.asarray(oriented(f"{key}_sign")[at]).ravel() if f"{key}_sign" in adata.varp else np.sign(weight)
        sure = oriented(f"{key}_probability")[at] if f"{key}_probability" in adata.varp else np.ones(len(weight))
        return cls(tuple(adata.var_names), regulator, target, weight, sign, np.asarray(sure).ravel())

    def to_networkx(self) -> networkx.DiGraph:
        """Return a DiGraph, regulator -> target, with the edge attributes `weight`, `sign` and `probability`."""
        import networkx

        graph = networkx.DiGraph()
        graph.add_nodes_from(self.genes)
        columns = zip(*(self.edges[column].tolist() for column in COLUMNS), strict=True)
        for regulator, target, weight, sign, probability in columns:
            graph.add_edge(regulator, target, weight=weight, sign=sign, probability=probability)
        return graph

    @classmethod
    def from_networkx(cls, graph: networkx.DiGraph, **options: Any) -> GeneRegulatoryNetwork:
        """Read a DiGraph or MultiDiGraph, regulator -> target; edge attributes as in :meth:`to_networkx`, all optional.

        `options` go to :meth:`from_edges`. An undirected graph is an error: it does not say who regulates.
        """
        if not graph.is_directed():
            raise PerturbZooError("network: the networkx graph is undirected and does not say who regulates; give a DiGraph")
        rows = [{"regulator": str(source), "target": str(end), **data} for source, end, data in graph.edges(data=True)]
        table = pd.DataFrame(rows, columns=[*COLUMNS[:2], *(name for name in COLUMNS[2:] if any(name in row for row in rows))])
        return cls.from_edges(table, list(map(str, graph.nodes)), **options)

    def to_pyg(self) -> Data:
        """Return PyG data: `edge_index` (regulators in row 0, as messages flow), `edge_weight`, `sign`, `probability`, `gene`."""
        from torch_geometric.data import Data

        return Data(
            edge_index=torch.from_numpy(np.stack([self.regulator, self.target])),
            edge_weight=torch.from_numpy(self.weight).float(),
            sign=torch.from_numpy(self.sign),
            probability=torch.from_numpy(self.probability).float(),
            gene=list(self.genes),
            num_nodes=len(self.genes),
        )

    @classmethod
    def from_pyg(cls, data: Data, genes: Sequence[str] | None = None) -> GeneRegulatoryNetwork:
        """Read PyG data as :meth:`to_pyg` writes it; `edge_weight`, `sign` and `probability` may be missing.

        `genes` names the nodes where ``data.gene`` does not.
        """
        names = data.get("gene") if genes is None else genes
        if names is None:
            raise PerturbZooError("network: the PyG data do not name their nodes; pass genes=[...], in the order of the nodes")
        regulator, target = data.edge_index.cpu().numpy()
        weight = np.ones(len(target)) if data.get("edge_weight") is None else data.edge_weight.double().cpu().numpy()
        own = np.sign(weight) if data.get("edge_weight") is not None else np.zeros(len(weight))
        sign = own if data.get("sign") is None else data.sign.cpu().numpy()
        sure = np.ones(len(weight)) if data.get("probability") is None else data.probability.double().cpu().numpy()
        return cls(tuple(names), regulator, target, weight, sign, sure)

    def to_state(self) -> dict[str, Any]:
        """Return tensors and lists of strings for a checkpoint that ``torch.load(weights_only=True)`` can read."""
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in COLUMNS}
        return {"genes": list(self.genes), **arrays}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> GeneRegulatoryNetwork:
        """Read what :meth:`to_state` returned; an error where something is missing or does not fit."""
        try:
            return cls(tuple(state["genes"]), *(state[name].cpu().numpy() for name in COLUMNS))
        except (KeyError, AttributeError) as error:
            raise PerturbZooError(f"not a network of a perturbzoo checkpoint: {error!r}; was the file edited?") from error
