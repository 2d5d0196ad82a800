"""Random regulatory networks with feedback: uniform or scale-free out-degrees, and planted motifs.

Called by :mod:`perturbzoo.simulate.screen`; knows nothing of cells or counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from perturbzoo.errors import PerturbZooError, near_matches
from perturbzoo.grn import GeneRegulatoryNetwork

# edges (regulator, target, sign) between the members of a motif
MOTIFS: dict[str, list[tuple[int, int, int]]] = {
    "toggle": [(0, 1, -1), (1, 0, -1)],
    "repressilator": [(0, 1, -1), (1, 2, -1), (2, 0, -1)],
    "feed_forward": [(0, 1, 1), (0, 2, 1), (1, 2, 1)],
    "incoherent_feed_forward": [(0, 1, 1), (0, 2, 1), (1, 2, -1)],
    "negative_feedback": [(0, 1, 1), (1, 0, -1)],
}


def random_network(
    n_genes: int,
    *,
    n_regulators: int | None = None,
    in_degree: float = 2.0,
    scale_free: float = 0.0,
    repressing: float = 0.4,
    strength: tuple[float, float] = (1.0, 2.5),
    motifs: Mapping[str, int] | None = None,
    seed: int = 0,
) -> GeneRegulatoryNetwork:
    """Draw a network; cycles are allowed, self loops are not.

    Parameters
    ----------
    n_genes
        Genes, named ``GENE0001`` and on.
    n_regulators
        How many of them regulate, drawn at random; None: all may.
    in_degree
        Mean number of regulators of a gene: one at least, and a Poisson number more.
    scale_free
        Exponent a: the regulator of rank r is drawn with probability proportional to ``r ** -a``. 0 is uniform; about 1
        gives a few hubs with very many targets.
    repressing
        Share of repressing edges.
    strength
        Range from which the magnitudes of the weights are drawn uniformly. The default is for Hill kinetics; with additive or
        multiplicative ones so strong a feedback oscillates or switches: a third of it does not.
    motifs
        Name of a motif (:data:`MOTIFS`) -> how many; each on regulators of its own, before the other edges.
    seed
        The same seed gives the same network.

    Raises
    ------
    PerturbZooError
        An argument is outside its range, a motif is unknown, or there are too few regulators for the motifs.
    """
    regulators = n_genes if n_regulators is None else n_regulators
    planted = dict(motifs or {})
    for name, count in planted.items():
        if name not in MOTIFS:
            raise PerturbZooError(f"motif '{name}' is not known{near_matches(name, MOTIFS)}; there are {', '.join(MOTIFS)}")
        if count < 0:
            raise PerturbZooError(f"motif '{name}': {count} of them; give 0 or more")
    members = {name: 1 + max(max(edge[:2]) for edge in edges) for name, edges in MOTIFS.items()}
    needed = sum(members[name] * count for name, count in planted.items())
    for correct, complaint in (
        (n_genes >= 2, f"n_genes={n_genes} must be 2 at least"),
        (2 <= regulators <= n_genes, f"n_regulators={regulators} must lie between 2 and n_genes={n_genes}"),
        (needed <= regulators, f"the motifs need {needed} regulators, there are {regulators}"),
        (
            1 <= in_degree < regulators / 2,
            f"in_degree={in_degree} must be 1 at least and below half of {regulators} regulators",
        ),
        (scale_free >= 0, f"scale_free={scale_free} must not be negative"),
        (0 <= repressing <= 1, f"repressing={repressing} is a share, in [0, 1]"),
        (0 < strength[0] <= strength[1], f"strength={strength} must be (low, high), above 0"),
    ):
        if not correct:
            raise PerturbZooError(f"random_network: {complaint}")
    rng = np.random.default_rng(seed)
    genes = gene_names(n_genes)
    order = rng.permutation(n_genes)[:regulators]  # by rank

    fixed: dict[tuple[int, int], int] = {}
    places = iter(rng.permutation(order).tolist())
    for name, count in planted.items():
        for _ in range(count):
            nodes = [next(places) for _ in range(members[name])]
            fixed |= {(nodes[source], nodes[end]): sign for source, end, sign in MOTIFS[name]}

    partners: dict[int, list[int]] = {}
    for source, end in fixed:
        partners.setdefault(end, []).append(source)
        partners.setdefault(source, []).append(end)

    degree = 1 + rng.poisson(in_degree - 1, n_genes)
    degree = np.minimum(degree, regulators - 1)
    for _, end in fixed:
        degree[end] -= 1
    degree = np.maximum(degree, 0)
    chance = np.arange(1, regulators + 1) ** -float(scale_free)
    rows: list[tuple[int, int, int]] = [(*pair, sign) for pair, sign in fixed.items()]
    for end in range(n_genes):
        # the members of a motif are regulated by it as it says: no further edge between them
        free = (order != end) & ~np.isin(order, partners.get(end, []))
        weight = chance * free
        drawn = rng.choice(order, min(int(degree[end]), int(free.sum())), replace=False, p=weight / weight.sum())
        signs = np.where(rng.random(len(drawn)) < repressing, -1, 1)
        rows += [(int(source), end, int(sign)) for source, sign in zip(drawn, signs, strict=True)]
    edges = pd.DataFrame(rows, columns=["regulator", "target", "sign"])
    names = np.array(genes)
    edges["weight"] = rng.uniform(*strength, len(edges))
    edges["regulator"], edges["target"] = names[edges["regulator"]], names[edges["target"]]
    return GeneRegulatoryNetwork.from_edges(edges, genes)


def gene_names(count: int) -> list[str]:
    """``GENE0001`` and on, of one width, so that names sort as they are counted."""
    digits = max(4, len(str(count)))
    return [f"GENE{number + 1:0{digits}d}" for number in range(count)]
