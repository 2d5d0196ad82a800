"""Do predicted combinations interact as the observed ones do? Genetic-interaction scores of both, on the same observed singles.

Definitions of the scores: :mod:`perturbzoo.evaluation.interaction`. Called by the evaluation of two files; arrays only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perturbzoo.evaluation.interaction import interaction_scores
from perturbzoo.evaluation.metrics import Array
from perturbzoo.perturbation import Condition

COMPARED = ("mag", "corr_fit", "dominance", "eq_contr", "dcor")
"""The scores whose errors are reported, as ``gi_*_error``."""

_N_GENES = 500
_N_PAIRS = 20_000


class Singles(NamedTuple):
    """Observed means of the two perturbations of a combination, each alone, ``(G,)``, in the context of the combination."""

    first: Array
    second: Array


def find_singles(
    conditions: Sequence[Condition],
    context: NDArray[np.integer],
    measured: Sequence[Condition],
    measured_context: NDArray[np.integer],
    mean: Array,
) -> dict[int, Singles]:
    """Of P conditions, the combinations of two whose singles were measured in the same context.

    Parameters
    ----------
    conditions, context
        P conditions, and the number of their context.
    measured, measured_context, mean
        Measured conditions, the number of their context and their pseudobulks, ``(M, G)``.
    """
    place = {key: row for row, key in enumerate(zip(measured, measured_context.tolist(), strict=True))}
    found = {}
    for row, (condition, number) in enumerate(zip(conditions, context.tolist(), strict=True)):
        alone = [place.get((Condition([act]), number)) for act in condition]
        if len(alone) == 2 and alone[0] is not None and alone[1] is not None:
            found[row] = Singles(mean[alone[0]], mean[alone[1]])
    return found


def expressed_genes(control: Array) -> NDArray[np.intp]:
    """The 500 genes most expressed in the controls, ``(G,)`` in: the distance correlation takes the square of the number of genes.

    Norman et al. and GEARS take highly expressed genes too (more than .5 UMI in the mean cell): in hardly expressed ones the change of
    a single is noise, which pulls its coefficient to 0.
    """
    return np.sort(np.argsort(-control, kind="stable")[:_N_GENES])


def scores_of(
    combination: Array, control: Array, context: NDArray[np.int64], singles: Mapping[int, Singles]
) -> dict[str, Array]:
    """Interaction scores of each combination whose singles were observed.

    Parameters
    ----------
    combination
        Shape ``(P, G)``: pseudobulks, observed or predicted.
    control
        Shape ``(S, G)``: control means.
    context
        Shape ``(P,)``: row of `control`.
    singles
        By row, for the combinations of two.

    Returns
    -------
    The scores of :data:`COMPARED`, ``(P,)``: of the 500 most expressed genes and 20,000 pairs of them (the coefficients are known to
    a few hundredths). NaN in all other rows, and where a score is not defined; a fit that is constant over genes has a `corr_fit` of 0.
    """
    found = {name: np.full(len(combination), np.nan) for name in COMPARED}
    genes = {one: expressed_genes(control[one]) for one in np.unique(context[list(singles)]).tolist()} if singles else {}
    for row, pair in singles.items():
        kept = genes[int(context[row])]
        base = control[context[row], kept]
        changes = [profile[kept] - base for profile in (pair.first, pair.second, combination[row])]
        if len(kept) < 3 or not all(np.isfinite(change).all() for change in changes):
            continue
        scores = interaction_scores(*changes, n_pairs=_N_PAIRS)
        if np.isnan(scores["corr_fit"]) and np.isfinite(scores["mag"]):
            scores["corr_fit"] = 0.0
        for name in COMPARED:
            found[name][row] = scores[name] if np.isfinite(scores[name]) else np.nan
    return found


def errors(predicted: Mapping[str, Array], observed: Mapping[str, Array]) -> dict[str, Array]:
    """Absolute errors of the scores, ``gi_mag_error`` and so on, ``(P,)``; NaN where either side has none.

    Both sides are scored on the same *observed* singles: GEARS' own figures use predicted ones, where an error in a single
    counts as one in the interaction.
    """
    return {f"gi_{name}_error": np.abs(predicted[name] - observed[name]) for name in COMPARED}
