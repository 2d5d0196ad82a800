"""`infer_kinetics`: a network from fitted kinetics, in the form in which every other method of inference gives one.

The method ``grn_ode`` of :func:`perturbzoo.grn.inference.infer_network`; the fit is :mod:`perturbzoo.grn.fitting`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.grn.candidates import candidate_network
from perturbzoo.grn.fitted import FittedNetwork
from perturbzoo.grn.fitting import FitOptions, fit_network
from perturbzoo.grn.levels import Levels
from perturbzoo.grn.network import GeneRegulatoryNetwork

REPETITIONS = 4


def infer_kinetics(
    levels: Levels,
    *,
    prior: GeneRegulatoryNetwork | None = None,
    restrict: bool = False,
    regulators: Collection[str] | None = None,
    repetitions: int = REPETITIONS,
    resample: Literal["errors", "conditions"] = "errors",
    options: FitOptions | None = None,
    seed: int = 0,
) -> GeneRegulatoryNetwork:
    """Fit the kinetics, and again to redrawn data.

    Parameters
    ----------
    levels
        Pseudobulks. Targets that are not measured become regulators, which nothing regulates.
    prior
        Over the measured genes, maybe with unmeasured targets.
    restrict
        Let its edges alone be candidates.
    regulators
        Genes that may regulate; None: all.
    repetitions
        Fits to redrawn data beside the first.
    resample
        What they redraw: levels within their ``"errors"``, or ``"conditions"`` with replacement.

    Returns
    -------
    GeneRegulatoryNetwork
        Over the measured genes and unmeasured targets; weights and probabilities as :func:`mean_network`.

    Raises
    ------
    PerturbZooError
        There is nothing to fit; see :func:`perturbzoo.grn.fitting.fit_network`.
    """
    chosen = options or FitOptions()
    if repetitions < 0:
        raise PerturbZooError(f"network inference: bootstraps is {repetitions}; 0 is the least")
    targets = sorted({target for condition in levels.conditions for target in condition.targets})
    nodes = [*levels.genes, *(target for target in targets if target not in set(levels.genes))]
    if regulators is not None and not set(map(str, regulators)) & set(nodes):
        raise PerturbZooError(f"none of the {len(regulators)} regulators is a measured gene: {shortened(regulators)}")
    placed = None if prior is None else prior.restrict(nodes)
    candidates = candidate_network(
        levels, nodes, placed, restrict=restrict, regulators=None if regulators is None else [str(name) for name in regulators]
    )
    rng = np.random.default_rng(seed)
    fits: list[FittedNetwork] = []
    for number in range(repetitions + 1):
        again = levels
        if number:
            rows = rng.integers(len(levels.conditions), size=len(levels.conditions))
            again = levels.with_noise(rng) if resample == "errors" else levels.select(np.sort(rows))
        fits.append(fit_network(again, candidates, replace(chosen, seed=seed + number)))
    return mean_network(fits)


def mean_network(fits: Sequence[FittedNetwork]) -> GeneRegulatoryNetwork:
    """Average fits on the same candidates: posterior mean weights, and probabilities of an edge with that sign."""
    weights = np.stack([fit.estimate.cpu().double().numpy() for fit in fits])
    chance = np.stack([fit.probability.cpu().double().numpy() for fit in fits])
    mean = weights.mean(0)
    agree = (chance * (np.sign(weights) == np.sign(mean))).mean(0).clip(0, 1)
    kept = mean != 0
    edges = fits[0].candidates
    return GeneRegulatoryNetwork(
        edges.genes, edges.regulator[kept], edges.target[kept], mean[kept], np.sign(mean[kept]).astype(np.int8), agree[kept]
    )
