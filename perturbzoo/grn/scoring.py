"""How well a network, or any score of gene pairs, recovers a truth or a reference.

Every figure depends on which pairs were asked about, so each comes with its edge universe: the candidate pairs regulator x
target, self loops left out. Knows networks and arrays; which method made the scores is not its business.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import shortest_path
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.grn.network import GeneRegulatoryNetwork

Scores: TypeAlias = GeneRegulatoryNetwork | pd.DataFrame


@dataclass(frozen=True)
class NetworkScore:
    """Agreement of scored pairs with a reference. NaN where a figure is not defined.

    Attributes
    ----------
    universe
        The candidate pairs, in words.
    pairs, edges
        How many candidate pairs there are, and how many of them are edges of the reference.
    chance
        ``edges / pairs``: the AUPRC of a random order.
    auprc, auprc_ratio, auroc
        Area under precision-recall (as average precision), its ratio to `chance`, and area under ROC, of |score|.
    early_precision, epr
        Share of edges among the first `edges` pairs, and its ratio to `chance` (early precision ratio, BEELINE). Ties are
        broken at random, in expectation; a method that lists nothing has an EPR of 1.
    signed_precision
        Share, among as many first pairs as the reference has edges of known sign, of edges whose sign is right too. Pairs
        whose sign the reference does not know are left out.
    sign_accuracy
        Share of right signs among the reference's edges of known sign that have a score other than 0.
    direct_auprc, direct_chance
        Direct against indirect: average precision where the candidates are only those pairs that the reference connects
        by a path, of any length; edges are the positives. And the share of edges among them.
    """

    universe: str
    pairs: int
    edges: int
    chance: float
    auprc: float
    auprc_ratio: float
    auroc: float
    early_precision: float
    epr: float
    signed_precision: float
    sign_accuracy: float
    direct_auprc: float
    direct_chance: float


def score_network(
    prediction: Scores,
    reference: GeneRegulatoryNetwork,
    *,
    regulators: Collection[str] | None = None,
    targets: Collection[str] | None = None,
    by: Literal["weight", "probability"] = "weight",
) -> NetworkScore:
    """Compare scored pairs with a reference network.

    Parameters
    ----------
    prediction
        A network, or a frame of signed scores whose index are targets and whose columns are regulators (W[target,
        regulator]). A pair that it does not have scores 0. Its sign counts where it is a frame or a network's weight.
    reference
        What is taken for true.
    regulators, targets
        The candidates. None: the reference's regulators, and all of the reference's genes.
    by
        For a network, what ranks its edges: ``"weight"`` (magnitude) or ``"probability"``.

    Raises
    ------
    PerturbZooError
        A candidate is not in the reference, no reference edge lies within the universe or all pairs do, a score is not
        finite, or the prediction knows none of the candidates.
    """
    universe = _Universe.of(reference, regulators, targets)
    return _score(universe.scores(prediction, by), universe)


def compare_networks(
    predictions: Mapping[str, Scores],
    reference: GeneRegulatoryNetwork,
    *,
    prior: GeneRegulatoryNetwork | None = None,
    informed: Collection[str] = (),
    prior_strength: float = 1.0,
    regulators: Collection[str] | None = None,
    targets: Collection[str] | None = None,
) -> pd.DataFrame:
    r"""Score several predictions on one universe, each of them also with the same prior.

    A method that was given a prior network is compared fairly only with baselines that were given it too. Each prediction
    that is not `informed` therefore gets a second row, ``"NAME + prior"``, ranked by

    .. math:: rank(|score|) / pairs + prior\_strength \cdot probability_{prior}

    with average ranks of ties; the prior alone has a row too.

    Parameters
    ----------
    predictions
        Name -> network or frame, as in :func:`score_network`.
    prior
        The network that the informed methods were given; None: no second rows.
    informed
        Names of predictions that have used the prior already.
    prior_strength
        At 0 the prior decides nothing, at 1 and above any edge that it is sure of goes before any that it does not have.

    Returns
    -------
    pandas.DataFrame
        One row for each prediction, columns as the attributes of :class:`NetworkScore`.
    """
    universe = _Universe.of(reference, regulators, targets)
    unknown = set(informed).difference(predictions)
    if unknown:
        raise PerturbZooError(f"informed names {shortened(sorted(unknown))}, but the predictions are {shortened(predictions)}")
    rows = {}
    belief = None if prior is None else np.abs(universe.scores(prior, "probability"))
    for name, prediction in predictions.items():
        scores = universe.scores(prediction, "weight")
        rows[name] = _score(scores, universe)
        if belief is not None and name not in informed:
            combined = rankdata(np.abs(scores)) / len(scores) + prior_strength * belief
            rows[f"{name} + prior"] = _score(combined * np.where(scores < 0, -1.0, 1.0), universe)
    if prior is not None:
        rows["prior"] = _score(universe.scores(prior, "probability"), universe)
    return pd.DataFrame.from_dict({name: asdict(score) for name, score in rows.items()}, orient="index")


@dataclass(frozen=True)
class _Universe:
    """P candidate pairs, and what the reference says of each."""

    regulators: pd.Index
    targets: pd.Index
    kept: np.ndarray  # (targets, regulators), bool: not a self loop
    is_edge: np.ndarray  # (P,), bool
    sign: np.ndarray  # (P,): 1, -1; 0 for unknown and for no edge
    reachable: np.ndarray  # (P,), bool: the regulator has a path to the target

    @classmethod
    def of(
        cls, reference: GeneRegulatoryNetwork, regulators: Collection[str] | None, targets: Collection[str] | None
    ) -> _Universe:
        names = pd.Index(reference.genes)
        sources = pd.Index(reference.regulators if regulators is None else list(dict.fromkeys(regulators)))
        ends = pd.Index(reference.genes if targets is None else list(dict.fromkeys(targets)))
        outside = sources.union(ends).difference(names)
        if len(outside):
            raise PerturbZooError(f"network score: {len(outside)} candidates are not in the reference: {shortened(outside)}")
        column, row = names.get_indexer(sources), names.get_indexer(ends)
        kept = row[:, None] != column[None, :]
        present = reference.matrix()
        present.data[:] = 1.0
        paths = np.isfinite(shortest_path(present.T.tocsr(), method="D", unweighted=True, indices=column))  # (regulators, G)
        is_edge = np.asarray(present[row][:, column].todense())[kept] > 0
        if not is_edge.any() or is_edge.all():
            raise PerturbZooError(
                f"network score: {int(is_edge.sum())} of {int(kept.sum())} candidate pairs are edges of the reference; "
                "there must be some that are and some that are not: other regulators or targets?"
            )
        sign = np.asarray(reference.matrix("sign")[row][:, column].todense())[kept]
        return cls(sources, ends, kept, is_edge, sign, paths[:, row].T[kept])

    def __str__(self) -> str:
        return (
            f"{len(self.regulators)} regulators x {len(self.targets)} targets without self loops: {len(self.is_edge)} pairs, "
            f"{int(self.is_edge.sum())} of them edges"
        )

    def scores(self, prediction: Scores, by: str) -> np.ndarray:
        """Signed scores of the P pairs, 0 where the prediction has none."""
        if isinstance(prediction, GeneRegulatoryNetwork):
            rows = columns = pd.Index(prediction.genes)
        else:
            rows, columns = prediction.index, prediction.columns
        if not (rows.is_unique and columns.is_unique):
            raise PerturbZooError("network score: the scores name a gene twice; rows are targets, columns regulators")
        row, column = rows.get_indexer(self.targets), columns.get_indexer(self.regulators)
        if (row < 0).all() or (column < 0).all():
            raise PerturbZooError(
                f"network score: the prediction knows none of the candidates, such as {self.regulators[0]} -> {self.targets[0]}; "
                "are its names of another kind?"
            )
        if isinstance(prediction, GeneRegulatoryNetwork):
            matrix = prediction.matrix()
            if by == "probability":
                # the sign travels with the rank; an unknown one counts as activating
                matrix.data = np.sign(matrix.data) * prediction.matrix("probability").data
            known = matrix[row[row >= 0]][:, column[column >= 0]].toarray()
        else:
            known = prediction.to_numpy(dtype=float)[np.ix_(row[row >= 0], column[column >= 0])]
        values = np.zeros(self.kept.shape)
        values[np.ix_(row >= 0, column >= 0)] = known
        if not np.isfinite(values).all():
            raise PerturbZooError(
                f"network score: {int((~np.isfinite(values)).sum())} scores are NaN or infinite; use 0 for none"
            )
        return values[self.kept]


def _score(scores: np.ndarray, universe: _Universe) -> NetworkScore:
    size, is_edge = np.abs(scores), universe.is_edge
    edges, chance = int(is_edge.sum()), float(is_edge.mean())
    auprc = float(average_precision_score(is_edge, size))
    early = _precision_of_first(size, is_edge.astype(float), edges)
    certain = ~is_edge | (universe.sign != 0)
    signed_edges = int((universe.sign != 0).sum())
    right = (np.sign(scores) == universe.sign) & (universe.sign != 0)
    called = (universe.sign != 0) & (scores != 0)
    reachable = universe.reachable
    indirect = bool((reachable & ~is_edge).any())
    return NetworkScore(
        universe=str(universe),
        pairs=len(scores),
        edges=edges,
        chance=chance,
        auprc=auprc,
        auprc_ratio=auprc / chance,
        auroc=float(roc_auc_score(is_edge, size)),
        early_precision=early,
        epr=early / chance,
        signed_precision=_precision_of_first(size[certain], right[certain].astype(float), signed_edges),
        sign_accuracy=float(right[called].mean()) if called.any() else float("nan"),
        direct_auprc=float(average_precision_score(is_edge[reachable], size[reachable])) if indirect else float("nan"),
        direct_chance=float(is_edge[reachable].mean()) if indirect else float("nan"),
    )


def _precision_of_first(size: np.ndarray, hit: np.ndarray, count: int) -> float:
    """Mean of `hit` over the `count` largest sizes, in expectation over random orders of those that tie at the last place."""
    if not count:
        return float("nan")
    last = np.partition(size, -count)[-count]
    above, tied = size > last, size == last
    places = count - above.sum()
    return float((hit[above].sum() + places * hit[tied].mean()) / count)


def edge_agreement(networks: Sequence[GeneRegulatoryNetwork], first: int) -> float:
    """Mean Jaccard index of the `first` strongest edges over all pairs of networks: how stable an inference is.

    Raises
    ------
    PerturbZooError
        Fewer than two networks, or one with fewer than `first` edges.
    """
    if len(networks) < 2 or min(map(len, networks)) < first or first < 1:
        raise PerturbZooError(f"agreement needs two networks at least, each with {max(first, 1)} edges or more")
    sets = []
    for network in networks:
        strongest = network.edges.assign(size=np.abs(network.weight)).sort_values(
            ["size", "regulator", "target"], ascending=[False, True, True]
        )
        sets.append(set(strongest[["regulator", "target"]].head(first).itertuples(index=False, name=None)))
    pairs = [(one, other) for number, one in enumerate(sets) for other in sets[:number]]
    return float(np.mean([len(one & other) / len(one | other) for one, other in pairs]))
