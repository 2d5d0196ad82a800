"""A Perturb-seq whose answer is a formula: perturbations spread linearly over a sparse regulatory network.

For benchmarks and tests of models: many genes at once, closed-form effects, targets that share processes, unmeasured targets, and
nothing to integrate. Where kinetics, feedback, time, doses or the network itself matter, and for everything a user sees, there is
:mod:`perturbzoo.simulate.screen`. Knows neither models nor evaluation.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from perturbzoo.errors import PerturbZooError
from perturbzoo.simulate.counts import draw_counts, expected_log1p
from perturbzoo.simulate.linear_network import HUBS_PER_PROCESS, annotate, build_network, propagate

KIND_SIGN = {"knockout": -1.0, "interference": -1.0, "activation": 1.0, "overexpression": 1.0}
CHUNK_VALUES = 4_000_000  # dense values drawn at a time, about 130 MB of temporary memory


def simulate_linear(
    n_genes: int = 200,
    n_singles: int = 40,
    n_doubles: int = 30,
    cells_per_condition: int = 100,
    n_control: int = 1000,
    *,
    n_processes: int = 8,
    crosstalk: float = 0.05,
    shared_response: float = 0.4,
    unmeasured_targets: float = 0.0,
    contexts: int = 1,
    context_shift: float = 0.5,
    batches: int = 2,
    batch_shift: float = 0.05,
    kind: Literal["knockout", "interference", "activation", "overexpression"] = "interference",
    strength: float = 2.0,
    efficacy: tuple[float, float] = (0.6, 1.0),
    interaction: float = 0.3,
    depth: float | None = None,
    depth_spread: float = 0.3,
    dispersion: float = 0.2,
    seed: int = 0,
) -> AnnData:
    r"""Simulate a Perturb-seq screen whose noise-free answer is known.

    With the network ``W[target, regulator]``, singles a and b, condition c, context k, batch j, gene g:

    .. math::

        d_a &= \pm\,(I - W)^{-1} e_a \cdot strength \cdot efficacy_a \\
        d_{ab} &= d_a + d_b - interaction \cdot [d_a d_b > 0]\;\mathrm{sign}(d_a)\,\min(|d_a|, |d_b|) \\
        p_{ckj} &= \mathrm{softmax}_g(base_k + batch_j + d_c) \\
        n &\sim \mathrm{NB}(mean = L p,\; variance = L p + dispersion \cdot (L p)^2), \quad
        \log L \sim \mathcal N(\log depth,\; depth\_spread^2)

    d is the latent effect (natural log of the rate; minus for knockout and interference), p the share of the counts, n the
    counts of one cell of size L. A double is sub-additive in the genes that both targets push the same way, and exactly
    additive in all others. Counts being shares of L, a strong rise of some genes lowers all others a little.

    The network has `n_processes` processes, each with three hubs that regulate half of its genes. A target belongs to one
    process, acts on its hubs (15 % of the targets repress them) and on a few genes directly; regulators also regulate
    each other, in loops. An edge to a gene of another process is `crosstalk` times as likely as one within. Targets of
    one process therefore share most downstream genes, and ``uns["go"]`` tells which do: terms of process, direction and
    main hub, a tenth of them missing, a tenth of the genes with a wrong process, and terms that mean nothing. Every
    target also drives the first process, as most perturbations raise one common response in real screens.

    Parameters
    ----------
    n_genes
        Measured genes G, named ``GENE0001`` and on.
    n_singles
        Targets T; each is perturbed alone.
    n_doubles
        Combinations, drawn without replacement from all pairs of targets.
    cells_per_condition, n_control
        Cells of each perturbed condition, and control cells, **in each context**.
    n_processes
        The more there are, the less alike the effects of any two targets.
    crosstalk
        In [0, 1]. At 0, and without a shared response, targets of different processes have no downstream gene in common.
    shared_response
        How strongly each target acts on the hubs of the first process, beside 0.2 to 1 on those of its own. This sets
        how much the mean of the training deltas explains.
    unmeasured_targets
        Fraction of the targets that are not among the measured genes. They are named ``HIDDEN0001`` and on.
    contexts, context_shift
        Cell lines, and the standard deviation (natural log, per gene) of their basal levels around the first one's.
    batches, batch_shift
        Batches, crossed with all conditions, and the standard deviation (natural log, per gene) of their effect.
    kind
        What is done to the targets; sets the sign of the effect.
    strength
        Shift of a target's own rate at efficacy 1, natural log.
    efficacy
        Range (low, high) within [0, 1]; drawn uniformly per target, the same in its single and its doubles.
    interaction
        In [0, 1]. At 0 doubles are additive in latent space, at 1 the stronger of the two effects is all that is left.
    depth, depth_spread
        Median counts per cell (None: five per gene), and the standard deviation of their natural log.
    dispersion
        Excess variance of the counts; 0 makes them Poisson.
    seed
        The same seed gives the same bytes. Network, conditions and GO table do not depend on the numbers of cells.

    Returns
    -------
    AnnData
        ``X``: integer counts, CSR float32, cells in random order. ``obs``: ``perturbation`` (``control``, ``A``, ``A+B``),
        ``cell_type``, ``batch``, ``depth`` (L). ``uns["network"]``: table of ``regulator, target, weight``.
        ``uns["go"]``: table of ``gene, term``. ``uns["truth"]``: names ``condition`` (C, control first), ``gene`` (G),
        ``cell_type`` (K) and ``target`` (T); ``latent`` (C, G), the d above; ``expression`` (K, C, G), noise-free mean of
        ``log1p(n / L * depth)`` over cells and batches; ``efficacy`` (T,); ``kind``. :func:`perturbzoo.simulate.truth_frame` reads them.

    Raises
    ------
    PerturbZooError
        An argument is outside its range, or there are fewer genes than regulators, or fewer pairs than doubles.
    """
    n_hidden = round(unmeasured_targets * n_singles)
    n_regulators = n_singles - n_hidden + n_processes * HUBS_PER_PROCESS
    n_pairs = n_singles * (n_singles - 1) // 2
    depth = 5.0 * n_genes if depth is None else depth
    for correct, complaint in (
        (min(n_singles, cells_per_condition, n_control) >= 1, "n_singles, cells_per_condition, n_control start at 1"),
        (min(n_processes, contexts, batches) >= 1, "n_processes, contexts, batches start at 1"),
        (0 <= crosstalk <= 1, f"crosstalk={crosstalk} must lie in [0, 1]"),
        (0 <= interaction <= 1, f"interaction={interaction} must lie in [0, 1]"),
        (0 <= unmeasured_targets <= 1, f"unmeasured_targets={unmeasured_targets} is a fraction, in [0, 1]"),
        (0 <= efficacy[0] <= efficacy[1] <= 1, f"efficacy={efficacy} must be (low, high) within [0, 1]"),
        (kind in KIND_SIGN, f"kind='{kind}' cannot be simulated here; choose one of {', '.join(KIND_SIGN)}"),
        (depth > 0, f"depth={depth} must be positive"),
        (
            min(strength, shared_response, context_shift, batch_shift, depth_spread, dispersion) >= 0,
            "strength, shared_response, context_shift, batch_shift, depth_spread and dispersion must not be negative",
        ),
        (
            n_genes > n_regulators,
            f"n_genes={n_genes} leaves no gene to regulate beside {n_regulators} regulators (measured targets and "
            f"{HUBS_PER_PROCESS} hubs per process): raise n_genes, or lower n_singles or n_processes",
        ),
        (0 <= n_doubles <= n_pairs, f"n_doubles={n_doubles}, but {n_singles} targets make {n_pairs} pairs"),
    ):
        if not correct:
            raise PerturbZooError(f"simulate_linear: {complaint}")

    network_rng, condition_rng, go_rng, cell_rng = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(4))
    network = build_network(n_genes, n_singles, n_hidden, n_processes, crosstalk, shared_response, network_rng)
    target_names = network.names[network.targets]

    target_efficacy = condition_rng.uniform(*efficacy, size=n_singles)
    drawn = np.sort(condition_rng.permutation(n_pairs)[:n_doubles])
    first, second = (side[drawn] for side in np.triu_indices(n_singles, 1))
    base = condition_rng.normal(0, 1, n_genes) + np.r_[0, np.full(contexts - 1, context_shift)][:, None] * (
        condition_rng.normal(0, 1, (contexts, n_genes))
    )
    batch_effect = batch_shift * condition_rng.normal(0, 1, (batches, n_genes))

    own_shift = np.zeros((len(network.names), n_singles))
    own_shift[network.targets, np.arange(n_singles)] = KIND_SIGN[kind] * strength * target_efficacy
    single = propagate(network.weights, own_shift)[:n_genes].T
    double = combine_effects(single[first], single[second], interaction)
    latent = np.concatenate([np.zeros((1, n_genes)), single, double])
    doubles = [f"{target_names[one]}+{target_names[two]}" for one, two in zip(first, second, strict=True)]
    conditions = np.array(["control", *target_names, *doubles])

    # (contexts, batches, conditions, genes)
    share = np.exp(base[:, None, None, :] + batch_effect[None, :, None, :] + latent)
    share /= share.sum(-1, keepdims=True)
    expression = expected_log1p(share, depth, depth_spread, dispersion).mean(1)

    size = np.full(len(conditions), cells_per_condition)
    size[0] = n_control
    condition = np.tile(np.repeat(np.arange(len(conditions)), size), contexts)
    context = np.repeat(np.arange(contexts), size.sum())
    batch = np.arange(len(condition)) % batches
    order = cell_rng.permutation(len(condition))
    condition, context, batch = condition[order], context[order], batch[order]
    cell_depth = depth * np.exp(depth_spread * cell_rng.normal(0, 1, len(condition)))
    pair = np.ravel_multi_index((context, batch, condition), share.shape[:3])
    counts = _draw_counts(share.reshape(-1, n_genes).astype(np.float32), pair, cell_depth, dispersion, cell_rng)

    cell_types = np.array([f"line{index + 1}" for index in range(contexts)])
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical.from_codes(condition, pd.Index(conditions)),
            "cell_type": pd.Categorical.from_codes(context, pd.Index(cell_types)),
            "batch": pd.Categorical.from_codes(batch, pd.Index([f"batch{index + 1}" for index in range(batches)])),
            "depth": cell_depth,
        },
        index=[f"cell{index + 1:06d}" for index in range(len(condition))],
    )
    genes = network.names[:n_genes]
    edges = network.weights.tocoo()
    return AnnData(
        X=counts,
        obs=obs,
        var=pd.DataFrame(index=genes),
        uns={
            "network": pd.DataFrame(
                {"regulator": network.names[edges.col], "target": network.names[edges.row], "weight": edges.data}
            ),
            "go": annotate(network, n_processes, go_rng),
            "truth": {
                "condition": conditions,
                "gene": genes,
                "cell_type": cell_types,
                "target": target_names,
                "latent": latent.astype(np.float32),
                "expression": expression.astype(np.float32),
                "efficacy": target_efficacy,
                "kind": kind,
            },
        },
    )


def combine_effects(first: np.ndarray, second: np.ndarray, interaction: float) -> np.ndarray:
    """Latent effect of two perturbations at once: their sum, less what both do to the same gene.

    ``d_ab = d_a + d_b - interaction * sign(d_a) * min(|d_a|, |d_b|)`` where the signs agree, else ``d_a + d_b``.

    Parameters
    ----------
    first, second
        Shape ``(..., G)``, natural log.
    interaction
        0 for the plain sum, 1 for the stronger effect alone.
    """
    shared = np.where(first * second > 0, np.sign(first) * np.minimum(np.abs(first), np.abs(second)), 0.0)
    return first + second - interaction * shared


def _draw_counts(
    share: np.ndarray, pair: np.ndarray, cell_depth: np.ndarray, dispersion: float, rng: np.random.Generator
) -> sparse.csr_matrix:
    """Draw Gamma-Poisson counts, cells x genes; `pair` ``(cells,)`` says which row of `share` each cell follows."""
    blocks = []
    step = max(1, CHUNK_VALUES // share.shape[1])
    for start in range(0, len(pair), step):
        rows = slice(start, start + step)
        mean = share[pair[rows]] * cell_depth[rows, None].astype(np.float32)
        blocks.append(draw_counts(mean, dispersion, rng))
    return sparse.vstack(blocks, format="csr")
