"""The sparse network of a linear simulation, the effects that spread over it, and the gene-to-term table that describes it.

Called by :mod:`perturbzoo.simulate.linear`; knows nothing of cells or counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.linalg import splu

HUBS_PER_PROCESS = 3
REPRESSOR_SHARE = 0.15
MAX_SPECTRAL_RADIUS = 0.7


@dataclass(frozen=True)
class RegulatoryLayout:
    """N nodes: the measured genes, then the unmeasured targets. Per node its process; per target what it does there."""

    names: np.ndarray  # (N,)
    weights: sparse.csc_matrix  # (N, N), W[target, regulator]
    process: np.ndarray  # (N,)
    targets: np.ndarray  # (T,), sorted, so that names of doubles come in canonical order
    direction: np.ndarray  # (T,), +1 activates the process, -1 represses it
    main_hub: np.ndarray  # (T,), 0 ... HUBS_PER_PROCESS - 1


def build_network(
    n_genes: int,
    n_targets: int,
    n_hidden: int,
    n_processes: int,
    crosstalk: float,
    shared_response: float,
    rng: np.random.Generator,
) -> RegulatoryLayout:
    """Draw the network that :func:`perturbzoo.simulate.simulate_linear` describes; its arguments are explained there."""
    n_nodes, n_hubs = n_genes + n_hidden, n_processes * HUBS_PER_PROCESS
    shuffled = rng.permutation(n_genes)
    hubs, targets = shuffled[:n_hubs], np.sort(shuffled[n_hubs : n_hubs + n_targets - n_hidden])
    targets = np.concatenate([targets, np.arange(n_genes, n_nodes)])
    process = np.empty(n_nodes, dtype=np.int64)
    # dealt out in turn: every process has its hubs, and as many targets as any other
    process[hubs] = np.arange(n_hubs) % n_processes
    process[targets] = rng.permutation(np.arange(n_targets) % n_processes)
    rest = np.setdiff1d(np.arange(n_genes), np.concatenate([hubs, targets]))
    process[rest] = rng.permutation(np.arange(len(rest)) % n_processes)

    regulators = np.concatenate([hubs, targets])
    n_regulators = len(regulators)
    reach = np.where(process[:, None] == process[regulators], 1.0, crosstalk)  # (N, regulators)
    is_regulator = np.zeros(n_nodes, dtype=bool)
    is_regulator[regulators] = True
    # hubs regulate half of the other genes of their process, targets few of them; about one edge per regulator from others
    probability = np.where(np.arange(n_regulators) < n_hubs, 0.5, 0.15) * reach
    probability[is_regulator] = np.minimum(1.0, n_processes / n_regulators) * reach[is_regulator]
    weight = np.where(is_regulator[:, None], 0.2, 0.4) * rng.normal(0, 1, reach.shape)
    weight *= rng.random(reach.shape) < probability

    # a target acts on the hubs of its process, on one of them most
    direction = np.where(rng.random(n_targets) < REPRESSOR_SHARE, -1.0, 1.0)
    onto_hubs = rng.uniform(0.2, 1.0, (n_hubs, n_targets)) * (process[hubs][:, None] == process[targets])
    weight[hubs, n_hubs:] = np.where(onto_hubs > 0, direction * onto_hubs, weight[hubs, n_hubs:])
    main_hub = onto_hubs.argmax(0) // n_processes
    weight[hubs[process[hubs] == 0], n_hubs:] += shared_response * rng.uniform(0.5, 1.5, (HUBS_PER_PROCESS, n_targets))
    weight[:, n_hubs:] *= rng.lognormal(0, 0.4, n_targets)  # some targets matter more than others
    weight[regulators, np.arange(n_regulators)] = 0

    # all cycles run among regulators, so their block alone decides whether effects die out
    radius = np.abs(np.linalg.eigvals(weight[regulators])).max()
    weight[regulators] *= min(1.0, MAX_SPECTRAL_RADIUS / radius) if radius > 0 else 1.0
    rows, columns = np.nonzero(weight)
    digits = max(4, len(str(n_genes)))  # of one width, so that names sort as the nodes do
    genes = [f"GENE{index + 1:0{digits}d}" for index in range(n_genes)]
    names = np.array(genes + [f"HIDDEN{index + 1:0{digits}d}" for index in range(n_hidden)])
    matrix = sparse.csc_matrix((weight[rows, columns], (rows, regulators[columns])), shape=(n_nodes, n_nodes))
    return RegulatoryLayout(names, matrix, process, targets, direction, main_hub)


def propagate(weights: sparse.spmatrix, shift: np.ndarray) -> np.ndarray:
    """Solve ``(I - W) l = shift``: the steady log rates under constant shifts.

    Parameters
    ----------
    weights
        Shape ``(N, N)``, ``W[target, regulator]``, spectral radius below 1.
    shift
        Shape ``(N, C)``, natural log.

    Returns
    -------
    ndarray
        Shape ``(N, C)``.
    """
    # few nodes are regulators, so most columns of I - W are those of the identity and the factors stay sparse
    return splu((sparse.identity(weights.shape[0]) - weights).tocsc()).solve(shift)


def annotate(network: RegulatoryLayout, n_processes: int, rng: np.random.Generator) -> pd.DataFrame:
    """Make the gene-to-term table that :func:`perturbzoo.simulate.simulate_linear` describes; every node has at least one term."""
    names, process, targets = network.names, network.process, network.targets
    sides = np.where(network.direction > 0, "positive", "negative")
    true = [(name, f"process{number + 1:02d}") for name, number in zip(names, process, strict=True)]
    for node, side, hub in zip(targets, sides, network.main_hub, strict=True):
        term = f"process{process[node] + 1:02d}"
        true += [(names[node], f"{term}_{side}"), (names[node], f"{term}_hub{hub + 1}")]
    kept = [true[index] for index in np.flatnonzero(rng.random(len(true)) >= 0.1)]

    wrong = names[rng.random(len(names)) < 0.1]
    wrong_terms = [f"process{number + 1:02d}" for number in rng.integers(n_processes, size=len(wrong))]
    unrelated = np.repeat(names, 1 + rng.poisson(1, len(names)))
    # about eight genes each: wide terms that mean nothing would drown the overlap of those that mean something
    numbers = rng.integers(max(1, len(unrelated) // 8), size=len(unrelated))
    unrelated_terms = [f"unrelated{number + 1:04d}" for number in numbers]
    noise = [*zip(wrong, wrong_terms, strict=True), *zip(unrelated, unrelated_terms, strict=True)]
    table = pd.DataFrame([*kept, *noise], columns=["gene", "term"])
    return table.drop_duplicates().sort_values(["gene", "term"], ignore_index=True)
