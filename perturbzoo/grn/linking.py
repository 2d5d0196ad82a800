"""What a model's predictions say of the network: edges that differ from the data's, genes out of reach, or no network at all.

Takes arrays of predicted changes and fitted networks; which model predicted, and how networks are fitted, is not its business.
Whether single predictions obey a network is in :mod:`perturbzoo.grn.consistency`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import breadth_first_order
from scipy.stats import false_discovery_control, norm

from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.grn.network import GeneRegulatoryNetwork
from perturbzoo.perturbation import Condition, parse_condition

MEAN_STEPS = 200  # of the mean change with strengths, at most


def compare_edges(
    data: GeneRegulatoryNetwork,
    model: GeneRegulatoryNetwork,
    *,
    edges: int | None = None,
    threshold: float = 0.5,
    by: Literal["weight", "probability"] = "weight",
    regulators: Collection[str] | None = None,
) -> pd.DataFrame:
    """Compare the network that the data support with the one that a model's predictions imply.

    An edge counts as present in a network if its probability is above `threshold`; with `edges`, if it is among so many
    strongest instead, which compares networks whose probabilities are not on one scale. Only genes of both networks count.

    Parameters
    ----------
    data, model
        Fitted in the same way, once to the data and once to the predictions.
    edges
        Number E of edges that are kept of each network; ties go to the first by target and regulator.
    threshold
        Of the probability, where `edges` is None.
    by
        What ranks edges: magnitude of the weight, or probability.
    regulators
        Regulators that the data can speak of (perturbed, or in a prior); None: all. An edge of another one that only the
        model has may be true.

    Returns
    -------
    pandas.DataFrame
        `regulator`, `target`, `status`, `weight_data`, `weight_model`, `probability_data`, `probability_model` (0 where a
        network lacks the edge altogether). `status` is ``"hallucinated"`` (in the model's only), ``"missed"`` (in the
        data's only), ``"opposite"`` (in both, with other signs) or ``"shared"``; in this order, strongest first.

    Raises
    ------
    PerturbZooError
        The networks share no genes, a regulator is unknown, or an argument is outside its range.
    """
    common = set(data.genes).intersection(model.genes)
    unknown = set(regulators or ()).difference(common)
    for holds, complaint in (
        (common, "the networks of data and model have no gene in common"),
        (not unknown, f"regulators that are not genes of both networks: {shortened(sorted(unknown))}"),
        (edges is None or edges >= 1, f"edges={edges} must be 1 at least"),
        (0 <= threshold < 1, f"threshold={threshold} must lie in [0, 1)"),
    ):
        if not holds:
            raise PerturbZooError(f"compare_edges: {complaint}")
    tables = []
    for network in (data, model):
        table = network.edges.drop(columns="sign")
        table = table[table.regulator.isin(common if regulators is None else regulators) & table.target.isin(common)]
        if edges is None:
            table = table.assign(present=table.probability > threshold)
        else:
            rank = table[by].abs().rank(method="first", ascending=False)
            table = table.assign(present=rank <= edges)
        tables.append(table)
    pair = ["regulator", "target"]
    both = tables[0].merge(tables[1], on=pair, how="outer", suffixes=("_data", "_model"))
    here, there = (both[f"present_{side}"].eq(True) for side in ("data", "model"))
    numbers = [f"{value}_{side}" for value in ("weight", "probability") for side in ("data", "model")]
    both[numbers] = both[numbers].fillna(0.0)
    same = np.sign(both.weight_data) == np.sign(both.weight_model)
    status = np.select([there & ~here, here & ~there, here & there & ~same], ["hallucinated", "missed", "opposite"], "shared")
    kept = both.assign(
        status=pd.Categorical(status, ["hallucinated", "missed", "opposite", "shared"], ordered=True),
        strength=both[[f"{by}_data", f"{by}_model"]].abs().max(axis=1),
    )[here | there]
    kept = kept.sort_values(["status", "strength"], ascending=[True, False], kind="stable", ignore_index=True)
    return kept.assign(status=kept.status.astype(str))[[*pair, "status", *numbers]]


def off_targets(
    network: GeneRegulatoryNetwork,
    conditions: Sequence[Condition | str],
    delta: np.ndarray,
    error: np.ndarray | float,
    *,
    false_discovery_rate: float = 0.05,
) -> pd.DataFrame:
    """List genes that a prediction changes although no path of the network leads to them from a target.

    A change counts if it exceeds its standard error: two-sided normal test, with the false discovery rate (Benjamini and
    Hochberg) held over all unreachable genes of all conditions.

    Parameters
    ----------
    network
        Edges of any weight count: leave out those not believed in first.
    conditions
        K of them. A target that is not among the network's genes reaches nothing but itself.
    delta
        Shape ``(K, G)``: predicted changes, log1p-normalised or log levels.
    error
        Standard error that a measured change of this size would have: ``(K, G)``, ``(G,)`` or one number. Where it is 0
        (genes that were never seen) nothing is listed.

    Returns
    -------
    pandas.DataFrame
        `condition`, `gene`, `change`, `z` (change / error) and `q` (the rate at which it would just be listed), largest |z|
        first.

    Raises
    ------
    PerturbZooError
        Shapes do not fit, a value is not finite, or errors are negative or all 0.
    """
    named = [parse_condition(one) if isinstance(one, str) else one for one in conditions]
    delta, error = _checked(delta, error, (len(named), len(network.genes)), "off_targets")
    unreachable = ~reachable(network, named) & (error > 0)
    row, column = np.nonzero(unreachable)
    z = delta[unreachable] / error[unreachable]
    # no pair at all is no reason to stop
    q = false_discovery_control(2 * norm.sf(np.abs(z))) if len(z) else z
    table = pd.DataFrame(
        {
            "condition": np.array([str(one) for one in named], dtype=object)[row],
            "gene": np.array(network.genes, dtype=object)[column],
            "change": delta[unreachable],
            "z": z,
            "q": q,
        }
    )[q <= false_discovery_rate]
    return table.sort_values("z", key=np.abs, ascending=False, kind="stable", ignore_index=True)


def reachable(network: GeneRegulatoryNetwork, conditions: Sequence[Condition]) -> np.ndarray:
    """Shape ``(K, G)``, bool: whether a path leads from one of a condition's targets to a gene; targets reach themselves."""
    place = {gene: number for number, gene in enumerate(network.genes)}
    out = network.matrix().T.tocsr()  # rows are regulators
    out.data[:] = 1.0
    each = sorted({place[target] for condition in conditions for target in condition.targets if target in place})
    reached = np.zeros((len(each), len(place)), dtype=bool)
    for row, gene in enumerate(each):
        reached[row, breadth_first_order(out, gene, return_predecessors=False)] = True
    row_of = {gene: row for row, gene in enumerate(each)}
    found = np.zeros((len(conditions), len(place)), dtype=bool)
    for number, condition in enumerate(conditions):
        rows = [row_of[place[target]] for target in condition.targets if target in place]
        found[number] = reached[rows].any(axis=0)
    return found


@dataclass(frozen=True)
class NetworkSignal:
    """Whether predicted changes carry anything that depends on which gene was perturbed; see :func:`network_signal`.

    Attributes
    ----------
    present
        The verdict: `components` is 1 or more.
    components
        Number of condition-specific components that stand out.
    effective_rank
        Of the specific changes in units of their error: :math:`(\\sum s^2)^2 / \\sum s^4` of their singular values; 0 without any.
    variance_ratio
        Mean square of the specific changes, in units of the error's variance.
    leading, edge
        The largest singular value, and what it must exceed.
    """

    present: bool
    components: int
    effective_rank: float
    variance_ratio: float
    leading: float
    edge: float

    def __str__(self) -> str:
        if self.present:
            return (
                f"network signal: {self.components} condition-specific components (effective rank {self.effective_rank:.1f}, "
                f"variance {self.variance_ratio:.2g} of the noise's)"
            )
        return (
            f"no network signal: changes do not depend on the perturbed gene beyond noise (leading component {self.leading:.2g}, "
            f"detectable from {self.edge:.2g}; variance {self.variance_ratio:.2g} of the noise's)"
        )


def network_signal(
    conditions: Sequence[Condition | str],
    genes: Sequence[str],
    delta: np.ndarray,
    error: np.ndarray | float,
    *,
    context: np.ndarray | None = None,
    noisy: bool = False,
) -> NetworkSignal:
    r"""Test whether predictions differ between conditions in more than strength.

    A network can be read from predictions only if perturbing different genes changes *other* genes differently. So the
    perturbed genes' own changes are left out, and from each prediction what a network-free predictor has too: the mean
    change :math:`\bar\delta` of the context, times a strength of the condition (least squares). What remains, divided by the
    standard error that measured changes have, is a matrix M of K conditions by G genes. A rank-one component of it could be
    told from noise in a screen of this size only if its singular value exceeds :math:`(KG)^{1/4}` (Benaych-Georges and
    Nadakuditi 2012, J. Multivar. Anal. 111:120). No such component: no network signal. The training mean has M = 0.

    Parameters
    ----------
    conditions, genes
        K and G names.
    delta
        Shape ``(K, G)``: predicted changes, log1p-normalised.
    error
        Standard error of a measured change: ``(K, G)``, ``(G,)`` or one number. Where it is 0 the change is left out.
    context
        Shape ``(K,)``, int: each condition's context; None: one.
    noisy
        Whether `delta` itself has this noise (measured changes): then a component must exceed :math:`\sqrt K + \sqrt G`,
        the largest singular value of noise alone, by 5 %.

    Raises
    ------
    PerturbZooError
        As :func:`off_targets`; or fewer than three conditions, which leave nothing to compare.
    """
    named = [parse_condition(one) if isinstance(one, str) else one for one in conditions]
    delta, error = _checked(delta, error, (len(named), len(genes)), "network_signal")
    groups = np.zeros(len(named), dtype=np.int64) if context is None else np.unique(context, return_inverse=True)[1]
    if len(named) < 3:
        raise PerturbZooError(f"network_signal: {len(named)} conditions; at least 3 are needed to see whether they differ")
    if groups.shape != (len(named),):
        raise PerturbZooError(
            f"network_signal: contexts of the shape {groups.shape}; give one for each of {len(named)} conditions"
        )
    place = {gene: number for number, gene in enumerate(genes)}
    kept = np.ones(delta.shape)
    for row, condition in enumerate(named):
        kept[row, [place[target] for target in condition.targets if target in place]] = 0
    kept[error == 0] = 0
    error = np.where(error > 0, error, 1.0)
    weight = 1 / error**2
    one_of = np.eye(groups.max() + 1)[groups]  # (K, contexts)
    total = one_of.T @ weight
    strength = np.ones(len(named))
    mean = (one_of.T @ (weight * kept * delta) / np.maximum(one_of.T @ (weight * kept), 1e-300))[groups]
    for _ in range(MEAN_STEPS):
        # what is left out counts in the mean as what strength and mean say of it
        filled = np.where(kept > 0, delta, strength[:, None] * mean)
        mean = (one_of.T @ (weight * filled) / total)[groups]
        size = (kept * weight * mean**2).sum(1)
        before = strength
        # a strength cannot be told where the mean change is nothing; it then takes nothing away
        strength = (kept * weight * mean * delta).sum(1) / np.where(size > 0, size, 1.0)
        if np.abs(strength - before).max() < 1e-10:
            break
    specific = kept * (delta - strength[:, None] * mean) / error
    # rounding errors of the subtraction are no signal
    specific[np.abs(specific) * error < 1e-6 * np.abs(delta).max(initial=0.0)] = 0
    values = np.linalg.svd(specific, compute_uv=False)
    squares = values**2
    rows, columns = delta.shape
    edge = 1.05 * (np.sqrt(rows) + np.sqrt(columns)) if noisy else (rows * columns) ** 0.25
    components = int((values > edge).sum())
    return NetworkSignal(
        present=components > 0,
        components=components,
        effective_rank=float(squares.sum() ** 2 / (squares**2).sum()) if squares.any() else 0.0,
        variance_ratio=float(squares.sum() / kept.sum()),
        leading=float(values[0]),
        edge=float(edge),
    )


@dataclass(frozen=True, eq=False)
class Link:
    """What a model's predictions say of the network.

    Attributes
    ----------
    data, model
        The network that the data support, and the one fitted in the same way to the predictions alone.
    edges
        Where they differ, :func:`compare_edges`: hallucinated, missed, opposite, shared.
    consistency
        For each condition how far the prediction is from what the data's network makes of it,
        :func:`perturbzoo.grn.consistency.consistency`.
    off_targets
        Genes that a prediction changes although no path of the data's network leads there.
    signal
        Whether the predictions depend on the perturbed gene at all; where not, `model` and `edges` mean nothing.
    """

    data: GeneRegulatoryNetwork
    model: GeneRegulatoryNetwork
    edges: pd.DataFrame
    consistency: pd.DataFrame
    off_targets: pd.DataFrame
    signal: NetworkSignal

    def __str__(self) -> str:
        if not self.signal.present:
            return str(self.signal)
        count = self.edges["status"].value_counts()
        parts = ", ".join(f"{count.get(name, 0)} {name}" for name in ("shared", "hallucinated", "missed", "opposite"))
        return (
            f"{self.signal}\nedges: {parts}\nconsistency with the data's network: ratio to noise "
            f"{self.consistency['ratio'].median():.2f} (median of {len(self.consistency)} conditions)\n"
            f"off-target changes: {len(self.off_targets)}"
        )


def _checked(
    delta: np.ndarray, error: np.ndarray | float, shape: tuple[int, int], caller: str
) -> tuple[np.ndarray, np.ndarray]:
    delta, error = np.asarray(delta, dtype=float), np.asarray(error, dtype=float)
    for holds, complaint in (
        (delta.shape == shape, f"delta has the shape {delta.shape}, not conditions x genes {shape}"),
        (error.shape in ((), shape[1:], shape), f"error has the shape {error.shape}, which does not fit {shape}"),
        (np.isfinite(delta).all(), "delta must be finite"),
        (np.isfinite(error).all() and (error >= 0).all(), "errors must be finite and at least 0"),
        ((error > 0).any(), "all errors are 0: what exceeds noise cannot be told"),
    ):
        if not holds:
            raise PerturbZooError(f"{caller}: {complaint}")
    return delta, np.broadcast_to(error, shape)
