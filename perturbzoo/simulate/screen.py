"""A Perturb-seq screen from the kinetics of a known network: cells, noise, guides, counts, and the truth behind them.

The equations are those of :mod:`perturbzoo.grn.dynamics`; this room adds the molecules' noise (:mod:`.langevin`) and the
measurement (:mod:`.counts`). For screens whose answer is a formula, as some benchmarks want them, see
:mod:`perturbzoo.simulate.linear`. Knows no model and no evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from perturbzoo.errors import PerturbZooError, near_matches
from perturbzoo.grn import GeneRegulatoryNetwork, Interventions, RegulatoryDynamics
from perturbzoo.grn.interventions import MECHANISMS
from perturbzoo.perturbation import Condition
from perturbzoo.simulate.counts import draw_counts, expected_log1p
from perturbzoo.simulate.design import Guides, cell_columns, planned_conditions
from perturbzoo.simulate.langevin import CHUNK_VALUES, follow_cells, in_threads, time_grid, true_levels
from perturbzoo.simulate.networks import random_network
from perturbzoo.simulate.truth import annotate_network

MOST_VALUES = 2_000_000_000  # cells x genes; about 16 GB of sparse counts
SETTLING = 5.0  # lifetimes after which the spread of cells that start alike is what it stays


def simulate_screen(
    network: GeneRegulatoryNetwork | None = None,
    *,
    n_genes: int = 50,
    in_degree: float = 2.0,
    conditions: Sequence[Condition | str] | None = None,
    n_singles: int | None = None,
    n_doubles: int = 0,
    doses: Sequence[float] = (1.0,),
    window: tuple[float, float] = (0.0, float("inf")),
    kind: Literal["knockout", "interference", "activation", "overexpression", "clamp"] = "interference",
    guides: int = 1,
    efficacy: tuple[float, float] = (0.8, 0.8),
    non_cutting: float = 0.0,
    cells_per_condition: int = 100,
    n_control: int | None = None,
    contexts: int = 1,
    context_shift: float = 0.5,
    level_spread: float = 0.5,
    kinetics: Literal["additive", "hill", "multiplicative"] = "hill",
    splicing: bool = False,
    splicing_rate: float = 4.0,
    times: Sequence[float] = (10.0,),
    burn_in: float | None = None,
    step: float = 0.1,
    noise: float = 0.1,
    depth: float = 4.0,
    depth_spread: float = 0.0,
    dispersion: float = 0.1,
    dropout: float | None = None,
    dropout_slope: float = 1.5,
    batches: int = 1,
    batch_shift: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> AnnData:
    r"""Simulate a Perturb-seq screen on a regulatory network with feedback.

    Cells start at rest in their context, interventions set in around time 0 (or their onset), and each cell follows

    .. math:: dx = (P(t, x) - \gamma x)\,dt + noise\,\big(\sqrt{P}\,dW_1 + \sqrt{\gamma x}\,dW_2\big)

    the chemical Langevin equation in which a level of 1 is ``noise ** -2`` molecules (with `splicing`, of either kind of RNA, and
    what splicing takes from one the other gets). Counts of gene g in a cell of size L and batch j are

    .. math:: n \sim \mathrm{NB}(mean = L\,depth\,x\,e^{s_{jg}},\; variance = mean + dispersion \cdot mean^2), \quad
        \log L \sim \mathcal N(0, depth\_spread^2), \quad s_{jg} \sim \mathcal N(0, batch\_shift^2)

    Parameters
    ----------
    network
        The truth; all signs known. None: :func:`perturbzoo.simulate.random_network` with `n_genes`, `in_degree` and `seed`.
    conditions
        What is done, in the grammar of :mod:`perturbzoo.perturbation` (combinations, doses, windows; control is added by
        itself). None: `n_singles` genes alone (regulators first; None: every gene) at each of `doses`, and `n_doubles` pairs of them at the
        highest, all within `window` = (onset, offset).
    kind
        Kind of interventions that spell none out.
    guides, efficacy
        Guides for each target, and the range from which each one's efficacy is drawn, the same in all conditions; it multiplies
        the efficacy that a condition spells out.
    non_cutting
        Share of the perturbed cells whose guides do nothing at all; they keep their label.
    cells_per_condition, n_control
        Cells of each perturbed condition, and control cells (None: ten times as many), **in each context**; dealt out evenly
        over `times` and `batches`.
    contexts, context_shift
        Cell types or lines of the one network, and the standard deviation (natural log, per gene) of their basal levels around
        the first one's.
    level_spread
        Standard deviation of the natural log of the genes' levels; their median is 1.
    kinetics
        Form of the regulation.
    splicing, splicing_rate
        Whether to model unspliced RNA too, and the rate at which it is spliced, per lifetime of the spliced.
    times, burn_in
        When cells are harvested, and how long they live before time 0, in mean mRNA lifetimes. None: long enough that cells have
        spread when the first are harvested.
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
    batches, batch_shift
        Batches, crossed with all conditions, and the standard deviation (natural log, per gene) of their effect; a single
        batch has none.
    seed
        The same seed gives the same bytes.
    progress
        Whether to show a bar on a terminal's standard error.

    Returns
    -------
    AnnData
        ``X``: integer counts, CSR float32, cells in random order; of spliced RNA with `splicing`, and then ``layers`` has
        ``spliced`` and ``unspliced``. ``obs``: ``perturbation``, ``kind``, ``dose``, ``guide``, ``cell_type``, ``batch``, ``time``,
        ``size`` (L), ``cut`` (whether the guides worked). ``uns["network"]``: table of ``regulator, target, weight``, the truth;
        ``varp["grn"]`` the same as ``W[target, regulator]``. ``uns["go"]``: table of ``gene, term``; genes with common regulators or
        targets share terms. ``uns["truth"]``, without noise and in cells whose guides worked as their target's do on average: names
        ``condition`` (C, control first), ``gene`` (G), ``cell_type`` (K) and ``target`` with its mean ``efficacy``; ``guide`` and
        ``guide_efficacy``; of shape (K, C, G): ``level`` at the last of `times`, ``effect`` (its natural log less control's),
        ``fixed_point`` (stable steady state; NaN where there is none), ``expression`` (mean of log1p of counts at the median
        depth, without dropout); with several `times`, ``course`` (H, K, C, G); ``time`` (H,), ``kinetics``, ``kind``.
        :func:`perturbzoo.simulate.truth_frame` reads them.

    Raises
    ------
    PerturbZooError
        An argument is outside its range, a condition names a gene outside the network, or the screen would not fit into memory.
    """
    harvests, amounts = [float(time) for time in times], [float(dose) for dose in doses]
    settled = max(0.0, SETTLING - harvests[0]) if burn_in is None and harvests else burn_in or 0.0
    for correct, complaint in (
        (
            min(cells_per_condition, contexts, batches, guides) >= 1,
            "cells_per_condition, contexts, batches and guides start at 1",
        ),
        (
            kind in MECHANISMS,
            f"kind='{kind}' cannot be simulated{near_matches(kind, MECHANISMS)}; one of {', '.join(MECHANISMS)}",
        ),
        (n_control is None or n_control >= 1, f"n_control={n_control} must be 1 at least"),
        (0 <= efficacy[0] <= efficacy[1] <= 1, f"efficacy={efficacy} must be (low, high) within [0, 1]"),
        (0 <= non_cutting <= 1, f"non_cutting={non_cutting} is a share, in [0, 1]"),
        (amounts and min(amounts) >= 0, f"doses={amounts} must be 0 or more, one at least"),
        (harvests and harvests[0] > 0 and harvests == sorted(set(harvests)), f"times={harvests} must be positive and increase"),
        (0 < step <= 1, f"step={step} must lie above 0 and be no more than one lifetime"),
        (min(depth, splicing_rate) > 0, f"depth={depth} and splicing_rate={splicing_rate} must be positive"),
        (dropout is None or dropout > 0, f"dropout={dropout} is an expected count above 0, or None"),
        (
            min(context_shift, level_spread, noise, depth_spread, dispersion, n_doubles, dropout_slope, batch_shift, settled)
            >= 0,
            "context_shift, level_spread, noise, depth_spread, dispersion, n_doubles, dropout_slope, batch_shift and burn_in must "
            "not be negative",
        ),
    ):
        if not correct:
            raise PerturbZooError(f"simulate_screen: {complaint}")
    truth = random_network(n_genes, in_degree=in_degree, seed=seed) if network is None else network
    genes = truth.genes
    streams = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(5))
    guide_rng, level_rng, cell_rng, batch_rng, go_rng = streams

    wanted = planned_conditions(genes, truth.regulators, conditions, kind, n_singles, n_doubles, amounts, window, guide_rng)
    given = Guides.draw(wanted, efficacy, guides, guide_rng)
    acts = Interventions.from_conditions(wanted, genes, default_kind=kind)
    basal = level_spread * level_rng.normal(0, 1, len(genes))
    shift = np.r_[0, np.full(contexts - 1, context_shift)][:, None] * level_rng.normal(0, 1, (contexts, len(genes)))
    dynamics = RegulatoryDynamics(
        truth, kinetics=kinetics, reference=np.exp(basal + shift), splicing=splicing, splicing_rate=splicing_rate
    ).requires_grad_(False)
    seen = np.exp((batch_shift if batches > 1 else 0.0) * batch_rng.normal(0, 1, (batches, len(genes)))).astype(np.float32)

    size = np.full(len(wanted), cells_per_condition)
    size[0] = 10 * cells_per_condition if n_control is None else n_control
    if int(size.sum()) * contexts * len(genes) > MOST_VALUES:
        raise PerturbZooError(
            f"simulate_screen: {int(size.sum()) * contexts:,} cells ({len(wanted)} conditions) x {len(genes):,} genes are more than "
            f"{MOST_VALUES:,} values and do not fit into memory: perturb fewer genes, or take fewer genes or cells"
        )
    condition = np.tile(np.repeat(np.arange(len(wanted)), size), contexts)
    context = np.repeat(np.arange(contexts), size.sum())
    harvest = np.arange(len(condition)) % len(harvests)
    batch = np.arange(len(condition)) // len(harvests) % batches
    order = cell_rng.permutation(len(condition))
    condition, context, harvest, batch = condition[order], context[order], harvest[order], batch[order]
    cut = (condition == 0) | (cell_rng.random(len(condition)) >= non_cutting)
    library = np.exp(depth_spread * cell_rng.normal(0, 1, len(condition)))
    guide = given.deal(condition, cell_rng)
    strength = given.of_cells(condition, guide) * cut[:, None]

    grid = time_grid(harvests, step, -settled)
    starts = range(0, len(condition), max(1, CHUNK_VALUES // dynamics.control_state.shape[-1]))
    # a generator for each chunk: the result does not depend on how many threads there are
    seeds = np.random.SeedSequence([seed, 1]).spawn(len(starts))

    def chunk(number: int) -> dict[str, sparse.csr_matrix]:
        rows = slice(starts[number], starts[number] + starts.step)
        rng = np.random.default_rng(seeds[number])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        cells = acts.select(torch.from_numpy(condition[rows])).restrict(torch.from_numpy(strength[rows]))
        when = torch.from_numpy(harvest[rows])
        state = follow_cells(dynamics, cells, torch.from_numpy(context[rows]), grid, when, noise, generator)
        scale = (depth * library[rows, None]).astype(np.float32) * seen[batch[rows]]
        parts = dynamics.split(torch.from_numpy(state))
        return {
            name: draw_counts(part.numpy() * scale, dispersion, rng, dropout, dropout_slope) for name, part in parts.items()
        }

    blocks = in_threads(chunk, len(starts), "simulating cells" if progress else None)
    layers = {name: sparse.vstack([block.pop(name) for block in blocks], format="csr") for name in dynamics.layers}
    counts = layers["spliced" if splicing else "mrna"]

    typical = acts.restrict(torch.from_numpy(given.of_conditions()))
    course, steady = true_levels(dynamics, typical, contexts, harvests, -settled, step)
    course, steady = course[..., -len(genes) :], steady[..., -len(genes) :]
    level = course[-1]
    total = np.median(np.asarray(counts.sum(1)))
    logs = np.log(np.maximum(level, 1e-12))
    cell_types = [f"type{number + 1}" for number in range(contexts)]
    adata = AnnData(
        X=counts,
        obs=pd.DataFrame(
            {
                **cell_columns(wanted, condition, kind),
                "guide": given.names(condition, guide),
                "cell_type": pd.Categorical.from_codes(context, cell_types),
                "batch": pd.Categorical.from_codes(batch, [f"batch{number + 1}" for number in range(batches)]),
                "time": np.asarray(harvests)[harvest],
                "size": library,
                "cut": cut,
            },
            index=[f"cell{number + 1:06d}" for number in range(len(condition))],
        ),
        var=pd.DataFrame(index=list(genes)),
        layers=layers if splicing else {},
        uns={
            "network": truth.edges[["regulator", "target", "weight"]],
            "go": annotate_network(truth, go_rng),
            "truth": {
                "condition": np.array([str(one) for one in wanted]),
                "gene": np.array(genes),
                "cell_type": np.array(cell_types),
                "target": np.array(given.targets),
                "efficacy": given.efficacy.mean(1),
                "guide": np.array([f"{target}_g{number + 1}" for target in given.targets for number in range(guides)]),
                "guide_efficacy": given.efficacy.ravel(),
                "level": level,
                "effect": logs - logs[:, :1],
                "fixed_point": steady,
                "expression": _expression(level, seen, float(total), depth_spread, dispersion),
                **({"course": course} if len(harvests) > 1 else {}),
                "time": np.asarray(harvests),
                "kinetics": kinetics,
                "kind": kind,
            },
        },
    )
    truth.to_anndata(adata)
    return adata


def _expression(level: np.ndarray, seen: np.ndarray, depth: float, spread: float, dispersion: float) -> np.ndarray:
    """Mean over batches and cells of log1p of normalised counts, of ``(K, C, G)`` levels in batches that see them ``(B, G)``-fold."""
    mean = np.zeros(level.shape)
    for factor in seen:
        share = np.maximum(level, 1e-6) * factor
        mean += expected_log1p(share / share.sum(-1, keepdims=True), depth, spread, dispersion) / len(seen)
    return mean.astype(np.float32)
