"""`infer_network`: a network from what a screen did, by any of the baselines, with the same prior and probability for all.

The methods are in :mod:`perturbzoo.grn.inference_methods`. Knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from perturbzoo.errors import PerturbZooError, near_matches, shortened
from perturbzoo.grn.effects import ScreenEffects
from perturbzoo.grn.inference_kinetics import REPETITIONS, infer_kinetics
from perturbzoo.grn.inference_methods import FROM_SINGLES, METHODS, SLOW
from perturbzoo.grn.levels import Levels
from perturbzoo.grn.network import GeneRegulatoryNetwork

KINETIC = "grn_ode"
NAMES = (KINETIC, *METHODS)
BOOTSTRAPS = 20
RANKED_BY: dict[str, Literal["weight", "probability"]] = {KINETIC: "probability"}  # all others: weight, which is their score
FEWER = {**dict.fromkeys(SLOW, 0), KINETIC: REPETITIONS}
WEAK = 2.0  # signal to noise below which a gene's own perturbation is not told from none


def infer_network(
    effects: ScreenEffects,
    method: str = "lasso",
    *,
    levels: Levels | None = None,
    prior: GeneRegulatoryNetwork | pd.DataFrame | None = None,
    prior_use: Literal["weight", "restrict"] = "weight",
    prior_strength: float = 0.9,
    regulators: Collection[str] | None = None,
    max_edges: int | None = None,
    bootstraps: int | None = None,
    resample: Literal["errors", "conditions"] | None = None,
    selected: float = 0.1,
    seed: int = 0,
) -> GeneRegulatoryNetwork:
    r"""Infer who regulates whom.

    Parameters
    ----------
    effects
        Changes of genes by condition.
    method
        A name in :data:`perturbzoo.grn.inference_methods.METHODS`, or ``grn_ode``: fitted kinetics
        (:mod:`perturbzoo.grn.inference_kinetics`), for which a prior's edges cost less instead of scoring more.
    levels
        For ``grn_ode``, the same screen on the linear scale; None: `effects` are read as log levels.
    prior
        Edges believed before, as a network or a table with `regulator`, `target` and optionally `probability`; edges of
        other genes are left out, signs and weights are not used.
    prior_use
        ``"weight"``: every score is multiplied by :math:`1 - s (1 - p)`, with p the prior's probability (0 where it does
        not list the pair) and s `prior_strength`. ``"restrict"``: pairs that the prior does not list are no candidates.
        Both are the same for every method.
    prior_strength
        In [0, 1]: at 0 the prior does nothing, at 1 pairs it does not list get no edge.
    regulators
        Genes that may regulate. None: all.
    max_edges
        Keep the strongest only.
    bootstraps
        Repetitions behind `probability`; None: 20, 4 for `grn_ode`, none for trees, `interventional` and `dag`, which are
        slow. 0: every probability is 1.
    resample
        What a repetition changes: effects are redrawn within their ``"errors"``, or ``"conditions"`` are drawn with
        replacement. None: errors where they are known, because a screen that perturbs each gene once loses a third of the
        regulators to a draw of conditions. `mra`, `total_effect` and the z-scores need every condition and always redraw errors.
    selected
        Share of the candidate pairs that count as edges in a repetition. An edge's probability is the share of repetitions
        that have it among those strongest ones, with the same sign.
    seed
        The same seed gives the same network.

    Returns
    -------
    GeneRegulatoryNetwork
        Over all genes of `effects`; pairs that score 0 are no edges.

    Raises
    ------
    PerturbZooError
        An argument is unknown or out of range, no regulator or no edge of the prior is measured, or the method needs genes
        that were perturbed alone and there are none.
    """
    if method not in NAMES:
        raise PerturbZooError(f"no method '{method}'{near_matches(method, NAMES) or ';'} there are {', '.join(NAMES)}")
    repetitions = FEWER.get(method, BOOTSTRAPS) if bootstraps is None else bootstraps
    for holds, complaint in (
        (prior_use in ("weight", "restrict"), f"prior_use is '{prior_use}'; it is 'weight' or 'restrict'"),
        (0 <= prior_strength <= 1, f"prior_strength is {prior_strength:g}, outside [0, 1]"),
        (0 < selected <= 1, f"selected is {selected:g}, a share in (0, 1]"),
        (resample in (None, "errors", "conditions"), f"resample is '{resample}'; it is 'errors' or 'conditions'"),
        (
            resample != "errors" or method in FROM_SINGLES or effects.error.any(),
            "resample is 'errors', but the effects have none; 'conditions' needs none",
        ),
        (repetitions >= 0, f"bootstraps is {repetitions}; 0 is the least"),
        (max_edges is None or max_edges >= 1, f"max_edges is {max_edges}; 1 is the least"),
    ):
        if not holds:
            raise PerturbZooError(f"network inference: {complaint}")
    if method in FROM_SINGLES and not len(effects.singles[0]):
        targets = {target for condition in effects.conditions for target in condition.targets}
        raise PerturbZooError(
            f"{method} needs conditions that perturb one measured gene alone; the targets are {shortened(sorted(targets))}"
        )
    if method == KINETIC:
        from perturbzoo.grn.fitting import FitOptions

        network = infer_kinetics(
            levels or Levels.from_effects(effects),
            prior=None if prior is None else placed_prior(prior, effects.genes, effects.unmeasured),
            restrict=prior_use == "restrict",
            regulators=regulators,
            repetitions=repetitions,
            resample=resample or "errors",
            options=FitOptions(prior_strength=prior_strength),
            seed=seed,
        )
        if max_edges is None:
            return network
        # its weights are effects, which may be large and doubtful: the most probable edges are kept
        kept = np.sort(np.argsort(-network.probability, kind="stable")[:max_edges])
        parts = (getattr(network, name)[kept] for name in ("regulator", "target", "weight", "sign", "probability"))
        return GeneRegulatoryNetwork(network.genes, *parts)
    allowed, factor = _candidates(effects, prior, prior_use, prior_strength, regulators)
    infer = METHODS[method]
    scores = infer(effects, allowed, seed) * factor
    probability = np.ones_like(scores)
    if repetitions:
        count = np.zeros_like(scores)
        size = max(1, round(selected * int(allowed.sum())))
        redraw = resample == "errors" or (resample is None and effects.error.any()) or method in FROM_SINGLES
        for child in np.random.SeedSequence(seed).spawn(repetitions):
            rng = np.random.default_rng(child)
            if redraw:
                again = effects.with_noise(rng)
            else:
                again = effects.select(rng.integers(len(effects.conditions), size=len(effects.conditions)))
            repeated = infer(again, allowed, int(rng.integers(2**31))) * factor
            count += _strongest(repeated, size) & (np.sign(repeated) == np.sign(scores))
        probability = count / repetitions
    kept = scores != 0 if max_edges is None else _strongest(scores, max_edges)
    target, regulator = np.nonzero(kept)
    weight = scores[kept]
    return GeneRegulatoryNetwork(effects.genes, regulator, target, weight, np.sign(weight), probability[kept])


def _candidates(
    effects: ScreenEffects,
    prior: GeneRegulatoryNetwork | pd.DataFrame | None,
    prior_use: str,
    prior_strength: float,
    regulators: Collection[str] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs ``[target, regulator]`` are asked about, and what their scores are multiplied by."""
    names = pd.Index(effects.genes)
    allowed = ~np.eye(len(names), dtype=bool)
    if regulators is not None:
        wanted = names.isin([str(name) for name in regulators])
        if not wanted.any():
            first = next(iter(regulators), "")
            raise PerturbZooError(
                f"none of the {len(regulators)} regulators is a measured gene: {shortened(regulators)}{near_matches(first, names)}"
            )
        allowed &= wanted[None, :]
    factor = np.ones(allowed.shape)
    if prior is not None:
        listed = placed_prior(prior, effects.genes)
        if prior_use == "restrict":
            present = listed.matrix()
            present.data[:] = 1
            allowed &= present.toarray() > 0
            if not allowed.any():
                raise PerturbZooError("the prior lists no pair of a regulator and a measured target: other regulators?")
        else:
            factor = 1 - prior_strength * (1 - listed.matrix("probability").toarray())
    return allowed, factor


def placed_prior(
    prior: GeneRegulatoryNetwork | pd.DataFrame, genes: Sequence[str], regulators: Sequence[str] = ()
) -> GeneRegulatoryNetwork:
    """Return the prior over the measured genes and further `regulators`, each pair once, without self loops and other genes' edges."""
    table = prior.edges if isinstance(prior, GeneRegulatoryNetwork) else prior
    try:
        placed = GeneRegulatoryNetwork.from_edges(
            table, [*genes, *regulators], outside="drop", self_loops="drop", duplicates="strongest", contradictory="unknown"
        )
    except PerturbZooError as error:
        raise PerturbZooError(f"prior: {error}") from error
    kept = placed.target < len(genes)  # of what is not measured nobody can say what regulates it
    parts = (getattr(placed, name)[kept] for name in ("regulator", "target", "weight", "sign", "probability"))
    return GeneRegulatoryNetwork(placed.genes, *parts)


def read_prior(paths: str | Sequence[str], genes: Sequence[str], regulators: Sequence[str] = ()) -> GeneRegulatoryNetwork:
    """Read one network file or several, whose edges are joined, and place them; see :func:`placed_prior`.

    A pair that several files list keeps the highest probability; files that contradict each other leave its sign unknown.
    """
    from perturbzoo.grn.network_tables import read_network_table

    files = [paths] if isinstance(paths, str) else list(paths)
    if not files:
        raise PerturbZooError("prior: no file given")
    return placed_prior(pd.concat([read_network_table(file) for file in files], ignore_index=True), genes, regulators)


def _strongest(scores: np.ndarray, count: int) -> np.ndarray:
    """Mark the `count` largest magnitudes, fewer where there are not as many above 0; ties go to the first in order."""
    size = np.abs(scores).ravel()
    first = np.argsort(-size, kind="stable")[:count]
    marked = np.zeros(size.shape, dtype=bool)
    marked[first[size[first] > 0]] = True
    return marked.reshape(scores.shape)


def ranked_edges(network: GeneRegulatoryNetwork, method: str = "lasso") -> pd.DataFrame:
    """Return the edges as a table, strongest first: by what the method ranks by (:data:`RANKED_BY`), then the other, then by name."""
    edges = network.edges.assign(size=lambda table: table["weight"].abs())
    first, second = ("probability", "size") if RANKED_BY.get(method) == "probability" else ("size", "probability")
    order = edges.sort_values([first, second, "regulator", "target"], ascending=[False, False, True, True])
    edges = network.edges
    return edges.loc[order.index].reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class Identifiability:
    """What a screen can say about the edges of a network at all.

    Attributes
    ----------
    genes
        Names of the measured genes.
    signal_to_noise
        For each gene that was perturbed alone, the magnitude of its own change / standard error in its own conditions; infinite
        where no error is known. The genes outside its index were not perturbed alone.
    unmeasured
        Targets that are not measured: only ``grn_ode`` gives them edges.
    condition_number
        Of the responses of the perturbed genes to each other: by how much an inversion may amplify noise. NaN without any.
    edges, unperturbed_edges
        Number of edges, and of those from regulators that nobody perturbed alone: nothing but correlation supports them.
    prior_edges, prior_found, prior_only
        Number of edges of the prior between genes of the network; how many of those the network has; and how many of these rest
        on the prior alone: their regulator was not perturbed, or its own change is below twice its error, so that the data
        do not tell it from other regulators. None without a prior.
    """

    genes: tuple[str, ...]
    signal_to_noise: pd.Series
    unmeasured: tuple[str, ...]
    condition_number: float
    edges: int
    unperturbed_edges: int
    prior_edges: int | None
    prior_found: int | None
    prior_only: int | None

    def __str__(self) -> str:
        ratio = self.signal_to_noise.sort_values(kind="stable")
        lines = [f"genes        {len(self.genes)} measured: {len(ratio)} perturbed alone, {len(self.genes) - len(ratio)} not"]
        if self.unmeasured:
            lines.append(f"             {len(self.unmeasured)} targets are not measured: {shortened(self.unmeasured)}")
        if len(ratio):
            lowest = shortened([f"{gene} {value:.1f}" for gene, value in ratio.head(5).items()])
            lines += [
                f"own change   signal to noise of each perturbed gene in its own condition: median {ratio.median():.1f}, "
                f"{int((ratio < WEAK).sum())} below {WEAK:g}; lowest: {lowest}",
                f"responses    condition number {self.condition_number:.3g}: by so much an inversion may amplify noise",
            ]
        lines.append(
            f"edges        {self.edges:,}, {self.unperturbed_edges:,} of them from regulators that nobody perturbed alone"
        )
        if self.prior_edges is not None:
            lines.append(
                f"prior        {self.prior_edges:,} edges between genes of the network, {self.prior_found:,} of them found; "
                f"{self.prior_only:,} rest on the prior alone (regulator not perturbed, or its own change below {WEAK:g} errors)"
            )
        return "\n".join(lines)


def identifiability_report(
    effects: ScreenEffects,
    network: GeneRegulatoryNetwork,
    prior: GeneRegulatoryNetwork | pd.DataFrame | None = None,
) -> Identifiability:
    """Say what the screen can and cannot tell about the edges of a network that was inferred from it.

    Parameters
    ----------
    effects, network, prior
        What :func:`infer_network` was given, and what it returned.
    """
    perturbed, response, error = effects.singles
    column = np.arange(len(perturbed))
    own, noise = np.abs(response[perturbed, column]), error[perturbed, column]
    ratio = np.divide(own, noise, out=np.where(own > 0, np.inf, 0.0), where=noise > 0)
    names = np.array(effects.genes, dtype=object)
    outside = set(effects.unmeasured)
    # what is not measured has no change of its own, but that of others in its conditions is no mere correlation
    alone = {
        *names[perturbed],
        *(target for one in effects.conditions if len(one) == 1 for target in one.targets if target in outside),
    }
    strong = {*names[perturbed[ratio >= WEAK]], *(alone & outside)}
    edges = network.edges
    listed = None if prior is None else placed_prior(prior, effects.genes, network.genes[len(effects.genes) :]).edges
    found = None if listed is None else edges.merge(listed[["regulator", "target"]], on=["regulator", "target"])
    return Identifiability(
        genes=effects.genes,
        signal_to_noise=pd.Series(ratio, index=pd.Index(names[perturbed], name="gene"), name="signal_to_noise"),
        unmeasured=tuple(effects.unmeasured),
        condition_number=float(np.linalg.cond(response[perturbed])) if len(perturbed) else float("nan"),
        edges=len(edges),
        unperturbed_edges=int((~edges["regulator"].isin(alone)).sum()),
        prior_edges=None if listed is None else len(listed),
        prior_found=None if found is None else len(found),
        prior_only=None if found is None else int((~found["regulator"].isin(strong)).sum()),
    )
