"""A Perturb-seq screen from the kinetics of a known network: cells, noise, guides, counts, and the truth behind them.

The equations are those of :mod:`perturbzoo.grn.dynamics`; this room adds molecules' noise and the measurement. For screens
whose answer is a formula see :mod:`perturbzoo.simulate.linear`. Knows no model and no evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, Interventions, RegulatoryDynamics, integrate
from perturbzoo.perturbation import Condition, Intervention, parse_condition
from perturbzoo.simulate.networks import random_network

Result = TypeVar("Result")

CHUNK_VALUES = 1 << 17  # entries of the state that move together: few enough to stay in the processor's cache


def simulate_screen(
    network: GeneRegulatoryNetwork | None = None,
    *,
    n_genes: int = 50,
    in_degree: float = 2.0,
    conditions: Sequence[Condition | str] | None = None,
    n_doubles: int = 0,
    kind: Literal["knockout", "interference", "activation", "overexpression"] = "interference",
    efficacy: tuple[float, float] = (0.8, 0.8),
    non_cutting: float = 0.0,
    cells_per_condition: int = 100,
    n_control: int | None = None,
    contexts: int = 1,
    context_shift: float = 0.5,
    level_spread: float = 0.5,
    kinetics: Literal["additive", "hill", "multiplicative"] = "hill",
    times: Sequence[float] = (10.0,),
    step: float = 0.1,
    noise: float = 0.1,
    depth: float = 4.0,
    depth_spread: float = 0.0,
    dispersion: float = 0.1,
    dropout: float | None = None,
    dropout_slope: float = 1.5,
    seed: int = 0,
) -> AnnData:
    r"""Simulate a Perturb-seq screen on a regulatory network with feedback.

    Cells start at rest in their context, interventions set in at time 0 (or at their onset), and each cell follows

    .. math:: dx = (P(t, x) - \gamma x)\,dt + noise\,\big(\sqrt{P}\,dW_1 + \sqrt{\gamma x}\,dW_2\big)

    the chemical Langevin equation in which a level of 1 is ``noise ** -2`` molecules. A step takes the mean by the
    exponential Euler scheme and one normal number for both noises, with the variance of a step of an Ornstein-Uhlenbeck
    process, :math:`noise^2 (P + \gamma x)(1 - e^{-2 \gamma h}) / 2\gamma`; levels that would be negative are 0. Counts are

    .. math:: n \sim \mathrm{NB}(mean = L\,depth\,x,\; variance = mean + dispersion \cdot mean^2), \quad
        \log L \sim \mathcal N(0, depth\_spread^2)

    Parameters
    ----------
    network
        The truth; all signs known. None: :func:`perturbzoo.simulate.networks.random_network` with `n_genes`,
        `in_degree` and `seed`.
    conditions
        What is done, in the grammar of :mod:`perturbzoo.perturbation` (combinations, doses, windows; control is added by
        itself). None: every gene alone, with `kind`, and `n_doubles` pairs drawn from all.
    kind
        Kind of interventions that spell none out.
    efficacy
        Range from which the efficacy of each target's guide is drawn, the same in all its conditions; multiplies the
        efficacy that a condition spells out.
    non_cutting
        Share of the perturbed cells whose guides do nothing at all; they keep their label.
    cells_per_condition, n_control
        Cells of each perturbed condition, and control cells (None: ten times as many), **in each context**; dealt out evenly
        over `times`.
    contexts, context_shift
        Cell types, and the standard deviation (natural log, per gene) of their basal levels around the first one's.
    level_spread
        Standard deviation of the natural log of the genes' levels; their median is 1.
    kinetics
        Form of the regulation.
    times
        When cells are harvested, in mean mRNA lifetimes after time 0.
    step
        Of the integration.
    noise
        Intrinsic noise; 0 leaves the measurement's only.
    depth, depth_spread
        Expected counts of a gene at level 1, and the standard deviation of the natural log of a cell's size.
    dispersion
        Excess variance of the counts; 0 makes them Poisson.
    dropout, dropout_slope
        Expected count at which half of the counts are lost, and how steeply that falls with its log. None: no dropout.
    seed
        The same seed gives the same bytes.

    Returns
    -------
    AnnData
        ``X``: integer counts, CSR float32, cells in random order. ``obs``: ``perturbation``, ``cell_type``, ``time``, ``size``
        (L), ``cut`` (whether the guides worked). ``uns["network"]``: table of ``regulator, target, weight``, the truth.
        ``uns["truth"]``: names ``condition`` (C, control first), ``gene`` (G), ``cell_type`` (K) and ``target`` with its
        ``efficacy``; ``level`` (K, C, G): levels without noise at the last of `times`, in cells whose guides worked;
        ``kinetics``; ``kind``.

    Raises
    ------
    PerturbZooError
        An argument is outside its range, or a condition names a gene outside the network.
    """
    harvests = [float(time) for time in times]
    for correct, complaint in (
        (cells_per_condition >= 1 and contexts >= 1, "cells_per_condition and contexts start at 1"),
        (n_control is None or n_control >= 1, f"n_control={n_control} must be 1 at least"),
        (0 <= efficacy[0] <= efficacy[1] <= 1, f"efficacy={efficacy} must be (low, high) within [0, 1]"),
        (0 <= non_cutting <= 1, f"non_cutting={non_cutting} is a share, in [0, 1]"),
        (harvests and harvests[0] > 0 and harvests == sorted(set(harvests)), f"times={harvests} must be positive and increase"),
        (0 < step <= 1, f"step={step} must lie above 0 and be no more than one lifetime"),
        (depth > 0, f"depth={depth} must be positive"),
        (dropout is None or dropout > 0, f"dropout={dropout} is an expected count above 0, or None"),
        (
            min(context_shift, level_spread, noise, depth_spread, dispersion, n_doubles, dropout_slope) >= 0,
            "context_shift, level_spread, noise, depth_spread, dispersion, n_doubles and dropout_slope must not be negative",
        ),
    ):
        if not correct:
            raise PerturbZooError(f"simulate_screen: {complaint}")
    truth = network or random_network(n_genes, in_degree=in_degree, seed=seed)
    genes = truth.genes
    guide_rng, level_rng, cell_rng = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(3))

    wanted = _conditions(genes, conditions, n_doubles, kind, guide_rng)
    targets = sorted({target for condition in wanted for target in condition.targets})
    guide = dict(zip(targets, guide_rng.uniform(*efficacy, len(targets)), strict=True))
    acts = Interventions.from_conditions(
        [Condition(replace(act, efficacy=act.efficacy * guide[act.target]) for act in condition) for condition in wanted],
        genes,
        default_kind=kind,
    )
    basal = level_spread * level_rng.normal(0, 1, len(genes))
    shift = np.r_[0, np.full(contexts - 1, context_shift)][:, None] * level_rng.normal(0, 1, (contexts, len(genes)))
    dynamics = RegulatoryDynamics(truth, kinetics=kinetics, reference=np.exp(basal + shift)).requires_grad_(False)

    size = np.full(len(wanted), cells_per_condition)
    size[0] = 10 * cells_per_condition if n_control is None else n_control
    condition = np.tile(np.repeat(np.arange(len(wanted)), size), contexts)
    context = np.repeat(np.arange(contexts), size.sum())
    harvest = np.arange(len(condition)) % len(harvests)
    order = cell_rng.permutation(len(condition))
    condition, context, harvest = condition[order], context[order], harvest[order]
    cut = (condition == 0) | (cell_rng.random(len(condition)) >= non_cutting)
    library = np.exp(depth_spread * cell_rng.normal(0, 1, len(condition)))

    grid = _grid(harvests, step)
    starts = range(0, len(condition), max(1, CHUNK_VALUES // len(genes)))
    # a generator for each chunk: the result does not depend on how many threads there are
    seeds = np.random.SeedSequence([seed, 1]).spawn(len(starts))

    def chunk(number: int) -> sparse.csr_matrix:
        rows = slice(starts[number], starts[number] + starts.step)
        rng = np.random.default_rng(seeds[number])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        cells = acts.select(torch.from_numpy(condition[rows])).restrict(torch.from_numpy(cut[rows]))
        level = _langevin(dynamics, cells, torch.from_numpy(context[rows]), grid, harvest[rows], noise, generator)
        return _counts(level, depth * library[rows], dispersion, dropout, dropout_slope, rng)

    blocks = _in_threads(chunk, len(starts))
    names = [str(condition) for condition in wanted]
    cell_types = [f"type{number + 1}" for number in range(contexts)]
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical.from_codes(condition, names),
            "cell_type": pd.Categorical.from_codes(context, cell_types),
            "time": np.asarray(harvests)[harvest],
            "size": library,
            "cut": cut,
        },
        index=[f"cell{number + 1:06d}" for number in range(len(condition))],
    )
    return AnnData(
        X=sparse.vstack(blocks, format="csr"),
        obs=obs,
        var=pd.DataFrame(index=list(genes)),
        uns={
            "network": truth.edges[["regulator", "target", "weight"]],
            "truth": {
                "condition": np.array(names),
                "gene": np.array(genes),
                "cell_type": np.array(cell_types),
                "target": np.array(targets),
                "efficacy": np.array([guide[target] for target in targets]),
                "level": _true_levels(dynamics, acts, contexts, harvests[-1], step),
                "kinetics": kinetics,
                "kind": kind,
            },
        },
    )


def _conditions(
    genes: Sequence[str], given: Sequence[Condition | str] | None, n_doubles: int, kind: str, rng: np.random.Generator
) -> list[Condition]:
    """Control, then what is asked for, each once."""
    if given is not None:
        if n_doubles:
            raise PerturbZooError("simulate_screen: n_doubles draws pairs of all genes; with conditions, write them there")
        read = [parse_condition(one) if isinstance(one, str) else one for one in given]
        return list(dict.fromkeys([Condition(), *read]))
    pairs = len(genes) * (len(genes) - 1) // 2
    if n_doubles > pairs:
        raise PerturbZooError(f"simulate_screen: n_doubles={n_doubles}, but {len(genes)} genes make {pairs} pairs")
    singles = [Condition([Intervention(gene)]) for gene in genes]
    first, second = np.triu_indices(len(genes), 1)
    drawn = np.sort(rng.choice(pairs, n_doubles, replace=False))
    return [Condition(), *singles, *(singles[first[pair]] | singles[second[pair]] for pair in drawn)]


def _grid(times: Sequence[float], step: float) -> list[tuple[float, float, int]]:
    """Steps as (time, length, index of the harvest that follows or -1); none is longer than `step`."""
    grid = []
    start = 0.0
    for number, stop in enumerate(times):
        count = max(1, round(np.ceil((stop - start) / step - 1e-9)))
        length = (stop - start) / count
        grid += [(start + length * index, length, number if index == count - 1 else -1) for index in range(count)]
        start = stop
    return grid


def _langevin(
    dynamics: RegulatoryDynamics,
    acts: Interventions,
    context: Tensor,
    grid: list[tuple[float, float, int]],
    harvest: np.ndarray,
    noise: float,
    generator: torch.Generator,
) -> np.ndarray:
    """Follow the cells and return each one's level ``(cells, G)`` at its harvest."""
    state = dynamics.control_state[context].clone()
    kept = torch.empty_like(state)
    normal, when = torch.empty_like(state), torch.from_numpy(harvest)
    rates = dynamics.bind(acts, context)
    with torch.no_grad():
        for time, length, harvested in grid:
            production, decay = rates(torch.tensor(time + 0.5 * length), state)
            lost = torch.expm1(decay * -length).neg_()  # 1 - exp(-γ h)
            if noise > 0:
                # 1 - exp(-2 γ h) = lost (2 - lost)
                variance = (production + decay * state) * (lost * (2 - lost)) / decay
                normal.normal_(generator=generator)
                state = torch.lerp(state, production / decay, lost)
                state.add_(variance.sqrt_().mul_(normal), alpha=noise * 0.5**0.5).clamp_(min=0)
            else:
                state = torch.lerp(state, production / decay, lost)
            if harvested >= 0:
                kept = torch.where((when == harvested)[:, None], state, kept)
    return kept.numpy()


def _counts(
    level: np.ndarray,
    depth: np.ndarray,
    dispersion: float,
    dropout: float | None,
    slope: float,
    rng: np.random.Generator,
) -> sparse.csr_matrix:
    """Draw Gamma-Poisson counts of ``(cells, G)`` levels, and lose some."""
    mean = level * depth[:, None].astype(np.float32)
    rate = mean
    if dispersion > 0:
        rate = mean * (np.float32(dispersion) * rng.standard_gamma(1 / dispersion, mean.shape, dtype=np.float32))
    counts = rng.poisson(rate).astype(np.float32)
    if dropout is not None:
        # σ(-slope log(mean / dropout)), written so that a mean of 0 is no problem
        counts *= rng.random(mean.shape, dtype=np.float32) >= 1 / (1 + (mean / dropout) ** slope)
    return sparse.csr_matrix(counts)


def _true_levels(dynamics: RegulatoryDynamics, acts: Interventions, contexts: int, time: float, step: float) -> np.ndarray:
    """Levels without noise at the last time, ``(K, C, G)``."""
    starts = range(0, len(acts), max(1, CHUNK_VALUES // len(dynamics.genes)))

    def chunk(number: int) -> np.ndarray:
        kind, part = divmod(number, len(starts))
        rows = torch.arange(starts[part], min(starts[part] + starts.step, len(acts)))
        context = torch.full((len(rows),), kind)
        with torch.no_grad():
            rates = dynamics.bind(acts.select(rows), context)
            return integrate(rates, dynamics.control_state[context], [0.0, time], step=step)[-1].numpy()

    levels = np.concatenate(_in_threads(chunk, contexts * len(starts)))
    return levels.reshape(contexts, len(acts), -1)


def _in_threads(work: Callable[[int], Result], count: int) -> list[Result]:
    """Run ``work(0) ... work(count - 1)`` beside each other, in as many threads as torch has, each of which uses one core.

    Chunks are too small to share the arithmetic of one among cores: the cores would wait for each other at every operation.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, count), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, range(count)))
    finally:
        torch.set_num_threads(threads)
