"""Networks to simulate: random ones with feedback, uniform, scale-free or in modules, with planted motifs; and parts of known ones.

Called by :mod:`perturbzoo.simulate.screen` and the command; knows nothing of cells or counts.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from perturbzoo.errors import PerturbZooError, PerturbZooWarning, near_matches
from perturbzoo.grn import GeneRegulatoryNetwork

# edges (regulator, target, sign) between the members of a motif
MOTIFS: dict[str, list[tuple[int, int, int]]] = {
    "toggle": [(0, 1, -1), (1, 0, -1)],
    "repressilator": [(0, 1, -1), (1, 2, -1), (2, 0, -1)],
    "feed_forward": [(0, 1, 1), (0, 2, 1), (1, 2, 1)],
    "incoherent_feed_forward": [(0, 1, 1), (0, 2, 1), (1, 2, -1)],
    "negative_feedback": [(0, 1, 1), (1, 0, -1)],
}

# Magnitude of the weights of motifs that are nothing with weaker ones. With Hill kinetics at its reference level a gene answers
# weight / 4 times as strongly as its regulator moves (in logs): two genes switch where that is above 1, three oscillate above 2.
MOTIF_WEIGHT = {"toggle": 6.0, "repressilator": 12.0}


def random_network(
    n_genes: int,
    *,
    n_regulators: int | None = None,
    in_degree: float = 2.0,
    scale_free: float = 0.0,
    modules: int = 1,
    repressing: float = 0.4,
    sign_of: Literal["edge", "regulator"] = "edge",
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
    modules
        Into how many groups the genes are dealt; nine regulators in ten are then from the gene's own group, so that regulators of one
        group share targets.
    repressing, sign_of
        Share of repressing edges, or of regulators that repress all their targets, as the sign is drawn for each edge or regulator.
    strength
        Range from which the magnitudes of the weights are drawn uniformly. The default is for Hill kinetics; with additive or
        multiplicative ones so strong a feedback oscillates or switches: a third of it does not.
    motifs
        Name of a motif (:data:`MOTIFS`) -> how many; each on regulators of its own, before the other edges. Toggles and
        repressilators have weights of their own (:data:`MOTIF_WEIGHT`), with which they switch and oscillate under Hill kinetics.
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
        (1 <= modules <= regulators / 2, f"modules={modules} must lie between 1 and half of {regulators} regulators"),
        (sign_of in ("edge", "regulator"), f"sign_of='{sign_of}' must be edge or regulator"),
        (scale_free >= 0, f"scale_free={scale_free} must not be negative"),
        (0 <= repressing <= 1, f"repressing={repressing} is a share, in [0, 1]"),
        (0 < strength[0] <= strength[1], f"strength={strength} must be (low, high), above 0"),
    ):
        if not correct:
            raise PerturbZooError(f"random_network: {complaint}")
    rng = np.random.default_rng(seed)
    genes = gene_names(n_genes)
    order = rng.permutation(n_genes)[:regulators]  # by rank

    # a stream of its own: these options leave everything else as it is
    kinds_rng = np.random.default_rng([seed, 1])
    rest = kinds_rng.permutation(np.setdiff1d(np.arange(n_genes), order))
    group = np.empty(n_genes, dtype=int)
    group[np.r_[order, rest]] = np.arange(n_genes) % modules
    own_sign = np.where(kinds_rng.random(n_genes) < repressing, -1, 1)

    fixed: dict[tuple[int, int], int] = {}
    planted_weight: dict[tuple[int, int], float] = {}
    places = iter(rng.permutation(order).tolist())
    for name, count in planted.items():
        for _ in range(count):
            nodes = [next(places) for _ in range(members[name])]
            fixed |= {(nodes[source], nodes[end]): sign for source, end, sign in MOTIFS[name]}
            if name in MOTIF_WEIGHT:
                planted_weight |= {(nodes[source], nodes[end]): MOTIF_WEIGHT[name] for source, end, _ in MOTIFS[name]}

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
        if modules > 1:
            inside = group[order] == group[end]
            # nine in ten from the own group, whatever the groups' sizes; all from where there are any
            shares = [(0.9, inside), (0.1, ~inside)]
            weight = sum(share * weight * part / max((weight * part).sum(), 1e-300) for share, part in shares)
        drawn = rng.choice(order, min(int(degree[end]), int((weight > 0).sum())), replace=False, p=weight / weight.sum())
        signs = np.where(rng.random(len(drawn)) < repressing, -1, 1) if sign_of == "edge" else own_sign[drawn]
        rows += [(int(source), end, int(sign)) for source, sign in zip(drawn, signs, strict=True)]
    edges = pd.DataFrame(rows, columns=["regulator", "target", "sign"])
    names = np.array(genes)
    edges["weight"] = rng.uniform(*strength, len(edges))
    edges.loc[: len(fixed) - 1, "weight"] = [
        planted_weight.get(pair, edges["weight"][place]) for place, pair in enumerate(fixed)
    ]
    edges["regulator"], edges["target"] = names[edges["regulator"]], names[edges["target"]]
    return GeneRegulatoryNetwork.from_edges(edges, genes)


def network_from_file(
    path: str | os.PathLike[str],
    n_genes: int | None = None,
    *,
    strength: tuple[float, float] = (1.0, 2.5),
    seed: int = 0,
) -> GeneRegulatoryNetwork:
    """Read a network to simulate: the largest connected part of a file's, or a connected piece of that.

    Collections list pairs twice, with both signs or with none, and genes that regulate themselves. Of a pair listed twice the
    strongest counts; self loops, pairs of both signs and those of no known sign are left out, and a warning says how many.

    Parameters
    ----------
    path
        In any layout that :func:`perturbzoo.grn.network_tables.read_network_table` knows.
    n_genes
        Genes of the piece: from the regulator with the most targets on, neighbours are taken at random. None: the whole part.
    strength
        Range from which magnitudes are drawn uniformly where the file has signs only (all magnitudes equal).
    seed
        The same seed gives the same network.

    Raises
    ------
    PerturbZooError
        The file cannot be read, has no edge of known sign, or no connected part with as many genes.
    """
    from perturbzoo.grn.network_tables import read_network_table

    table = read_network_table(path)
    loops = table["regulator"] == table["target"]
    table = table[~loops]
    signs = table[table["sign"] != 0].groupby(["regulator", "target"])["sign"]
    both = int((signs.nunique() > 1).sum())
    unknown = int((table["sign"] == 0).sum())
    table = table[table["sign"] != 0]
    left_out = [
        f"{count} {what}"
        for count, what in ((int(loops.sum()), "self loops"), (both, "pairs of both signs"), (unknown, "edges of unknown sign"))
        if count
    ]
    if not len(table) or both == signs.ngroups:
        raise PerturbZooError(
            f"{path}: no edge to simulate remains without {' and '.join(left_out)}; give signs or signed weights"
        )
    if left_out:
        warnings.warn(f"{path}: left out {', '.join(left_out)}", PerturbZooWarning, stacklevel=2)
    network = GeneRegulatoryNetwork.from_edges(table, duplicates="strongest", contradictory="drop")

    touching = network.matrix("probability") + network.matrix("probability").T
    _, part = connected_components(touching, directed=False)
    chosen = np.flatnonzero(part == np.bincount(part).argmax())
    if n_genes is not None and not 2 <= n_genes <= len(chosen):
        raise PerturbZooError(
            f"{path}: its largest connected part has {len(chosen)} genes; n_genes={n_genes} must lie between 2 and that"
        )
    rng = np.random.default_rng(seed)
    if n_genes is not None:
        outgoing = np.bincount(network.regulator, minlength=len(part)) * np.isin(np.arange(len(part)), chosen)
        chosen = _connected_piece(touching.tocsr(), int(outgoing.argmax()), n_genes, rng)
    network = network.restrict([network.genes[place] for place in chosen])
    if np.ptp(np.abs(network.weight)) > 0:
        return network
    return replace(network, weight=rng.uniform(*strength, len(network)) * network.sign)


def _connected_piece(touching: sparse.csr_matrix, start: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Grow a piece from `start` by random neighbours of what it has; node numbers, sorted."""
    taken: list[int] = []
    seen, border = {start}, [start]
    while len(taken) < size:
        place = rng.integers(len(border))
        border[place], border[-1] = border[-1], border[place]
        node = border.pop()
        taken.append(node)
        fresh = [other for other in touching[node].indices.tolist() if other not in seen]
        seen.update(fresh)
        border += fresh
    return np.sort(taken)


def gene_names(count: int) -> list[str]:
    """``GENE0001`` and on, of one width, so that names sort as they are counted."""
    digits = max(4, len(str(count)))
    return [f"GENE{number + 1:0{digits}d}" for number in range(count)]
