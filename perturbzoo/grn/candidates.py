"""Which edges a network may have: everything for few genes; for many, what a prior lists and what the screen points at.

Knows arrays and names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn.levels import Levels
from perturbzoo.grn.network import GeneRegulatoryNetwork


def candidate_network(
    levels: Levels,
    genes: Sequence[str],
    prior: GeneRegulatoryNetwork | None,
    *,
    screened: int = 20,
    dense_genes: int = 500,
    restrict: bool = False,
    regulators: Sequence[str] | None = None,
) -> GeneRegulatoryNetwork:
    """Collect candidate edges, their prior probability beside them; weights start near 0.

    Parameters
    ----------
    levels
        The screen.
    genes
        Nodes of the network: the measured genes, then targets that are not measured.
    prior
        Over `genes`; its signs are kept. None: nothing is known.
    screened
        Where there are more than `dense_genes` nodes, how many regulators of each gene are added to the prior's: those whose own
        perturbation moved it most against its error, as many again of those whose changes go with its own, and every gene for a
        target that is not measured.
    dense_genes
        Nodes up to which every pair is a candidate.
    restrict
        Let the prior's edges alone be candidates.
    regulators
        Genes that may regulate, beside targets that are not measured, which always may; None: all.

    Raises
    ------
    PerturbZooError
        Nothing is left.
    """
    nodes, measured = len(genes), len(levels.genes)
    position = {name: number for number, name in enumerate(genes)}
    allowed = np.zeros((nodes, nodes), dtype=bool)
    if restrict and prior is None:
        raise PerturbZooError("candidate edges: restrict asks for the edges of a prior, and there is none")
    if not restrict and nodes <= dense_genes:
        allowed[:measured] = True
    elif not restrict:
        allowed |= _screened(levels, position, nodes, screened)
    if prior is not None:
        allowed[prior.target, prior.regulator] = True
    if regulators is not None:
        wanted = set(regulators)
        allowed[:, [number for number, name in enumerate(genes[:measured]) if name not in wanted]] = False
    np.fill_diagonal(allowed, False)
    allowed[measured:] = False  # what is not measured has no regulators that data could show
    target, regulator = np.nonzero(allowed)
    if not len(target):
        raise PerturbZooError("candidate edges: none is left; does the prior name genes of the data?")
    probability, sign = np.zeros((2, nodes, nodes))
    if prior is not None:
        probability[prior.target, prior.regulator] = prior.probability
        sign[prior.target, prior.regulator] = prior.sign
    known = sign[target, regulator]
    start = np.where(known == 0, 1e-6, 1e-6 * known)
    return GeneRegulatoryNetwork(tuple(genes), regulator, target, start, known.astype(np.int8), probability[target, regulator])


def with_latent(candidates: GeneRegulatoryNetwork, measured: int, count: int, seed: int = 0) -> GeneRegulatoryNetwork:
    """Add `count` regulators that nobody measured, each with edges to and from all measured genes.

    Their small random weights tell them apart.
    """
    if not count:
        return candidates
    rng = np.random.default_rng(seed)
    nodes = len(candidates.genes)
    latent = np.repeat(nodes + np.arange(count), measured)
    gene = np.tile(np.arange(measured), count)
    weight = rng.normal(0, 0.1, 2 * len(gene))
    return GeneRegulatoryNetwork(
        (*candidates.genes, *(f"latent{number + 1}" for number in range(count))),
        np.r_[candidates.regulator, latent, gene],
        np.r_[candidates.target, gene, latent],
        np.r_[candidates.weight, weight],
        np.r_[candidates.sign, np.sign(weight).astype(np.int8)],
        np.r_[candidates.probability, np.zeros(2 * len(gene))],
    )


def _screened(levels: Levels, position: dict[str, int], nodes: int, count: int) -> np.ndarray:
    """Mark for each gene the regulators that the screen points at, ``[target, regulator]``."""
    measured = len(levels.genes)
    score = levels.change / levels.error  # (N, G)
    response = np.zeros((nodes, measured))  # of each node's own perturbations, the largest
    moved = np.zeros((len(levels.conditions), measured))
    for row, condition in enumerate(levels.conditions):
        for target in condition.targets:
            number = position[target]
            response[number] = np.maximum(response[number], np.abs(score[row]) / len(condition.targets))
            if number < measured:
                moved[row, number] = 1
    marked = np.zeros((nodes, nodes), dtype=bool)
    np.fill_diagonal(response[:, :measured], 0)
    keep = min(count, nodes - 1)
    best = np.argpartition(-response, keep - 1, axis=0)[:keep]  # (count, G)
    marked[np.arange(measured)[None], best] = response[best, np.arange(measured)[None]] > 1
    # changes that go together, each gene's own perturbations left out
    free = np.where(moved > 0, 0.0, score)
    free -= free.mean(0)
    free /= np.linalg.norm(free, axis=0) + 1e-12
    together = np.abs(free.T @ free)
    np.fill_diagonal(together, 0)
    keep = min(count, measured - 1)
    best = np.argpartition(-together, keep - 1, axis=0)[:keep]
    marked[np.arange(measured)[None], best] = True
    marked[:measured, measured:] = True
    return marked
