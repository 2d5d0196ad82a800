r"""Networks from z-scores of single perturbations, as they are and with what goes through others taken off.

With :math:`\Delta_{ij}` the change of gene i where j alone was perturbed, minus the median of gene i over all genes' turns, and
:math:`s_i` its standard deviation over them,

.. math:: z_{ij} = \Delta_{ij} / s_i

Where genes were perturbed in several ways (knocked out, and knocked down), each way has its own z, and they are added. The
gene's own perturbation is in :math:`s_i`: z is the share of what moves i at all that j's loss explains, which is why it beats
the significance of the change on DREAM4 (networks whose genes differ in noise). See
:mod:`perturbzoo.grn.inference_methods` for the common signature.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from perturbzoo.grn.effects import ScreenEffects

SIGNIFICANT = 2.0  # changes below so many standard errors carry nothing further
PASSES, DAMPING = 20, 0.5  # of the iteration that takes indirect effects off


def zscore(effects: ScreenEffects, allowed: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sum of the magnitudes of the z-scores, with the sign of their sum; positive where the regulator activates."""
    total, size = np.zeros(allowed.shape), np.zeros(allowed.shape)
    for perturbed, response, _ in _by_kind(effects):
        spread = response.std(1, keepdims=True)
        z = (response - np.median(response, axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
        total[:, perturbed] += z
        size[:, perturbed] += np.abs(z)
    return np.where(allowed, size * np.where(total < 0, -1, 1), 0.0)


def zscore_direct(effects: ScreenEffects, allowed: np.ndarray, seed: int = 0) -> np.ndarray:
    r"""Z-scores of direct effects, plus what one sparse regression over all data says of the same pair.

    Two views of the data, both in standard deviations of the target, so that their sum needs no weights:

    1. :math:`\sum_{kinds} D_{ij} / \sqrt{\sum_j \Delta_{ij}^2}`: what :func:`direct_part` leaves of the changes, as a share of all
       that moves the gene. No median is taken off: the effects have a control. Where knockouts and knockdowns disagree in
       sign, they cancel.
    2. A lasso of the gene's change on those of all candidates, conditions that perturb the gene itself left out. Where
       `effects.series` is there, the steps of its undisturbed part are further rows: the gene at the end of a step on the
       regulators' mean over it (sampled more slowly than mRNA turns over, levels follow their regulators). The penalty is
       :math:`1 / \sqrt n` in units of the standard deviations, what noise alone reaches in n rows.

    The first knows who was perturbed, but sees each regulator once; the second sees weak edges that many conditions move a
    little. The recipe was chosen on simulated networks of this package, not on the networks it is reported for
    (`docs/network_benchmarks.md`). Taking off indirect effects follows the idea, not the algorithm, of Pinna et al., PLoS ONE 2010.
    """
    scores = np.zeros(allowed.shape)
    for perturbed, response, error in _by_kind(effects):
        size = np.sqrt((response**2).sum(1, keepdims=True))
        scores[:, perturbed] += direct_part(response, perturbed, error) / np.where(size > 0, size, 1)
    return np.where(allowed, scores + _regression(effects, allowed), 0.0)


def direct_part(response: np.ndarray, perturbed: np.ndarray, error: np.ndarray) -> np.ndarray:
    r"""Take off what reaches a gene through others.

    With :math:`D` the direct part, :math:`r_{ik} = D_{ik} / \Delta_{kk}` is what i answers to a unit of k, so that

    .. math:: D_{ij} = \Delta_{ij} \cdot \mathrm{clip}\Big(1 - \frac{1}{\Delta_{ij}}
        \sum_{k \ne i, j} r_{ik}\,\Delta_{kj},\; 0,\; 1\Big)

    solved by damped iteration. That is modular response analysis for significant effects only, and it can only take off: a path
    of the wrong sign leaves the effect as it is, a path that would explain more than there is leaves 0. Where regulation
    saturates, linear paths are wrong by far, and an inverse would invent edges to correct for it.

    Parameters
    ----------
    response
        Shape ``(G, P)``: changes of all genes where each of P was perturbed.
    perturbed
        Shape ``(P,)``: which genes these are.
    error
        Shape ``(G, 1)`` or ``(G, P)``: standard errors of `response`.

    Returns
    -------
    numpy.ndarray
        Shape ``(G, P)``; entries of genes under their own perturbation are left as they are.
    """
    turns = np.arange(len(perturbed))
    ratio = np.divide(error, np.abs(response), out=np.full(response.shape, np.inf), where=response != 0)
    certain = response * np.maximum(1 - (SIGNIFICANT * ratio) ** 2, 0)  # (G, P)
    own = response[perturbed, turns]
    least = np.broadcast_to(error, response.shape)[perturbed, turns]
    # a perturbation that did nothing to its own gene must not make huge responses to a unit of it
    own = np.where(np.abs(own) > least, own, np.where(least > 0, least, np.inf) * np.where(own < 0, -1, 1))
    passed = certain[perturbed].copy()  # (P, P): change of k where j was perturbed
    passed[turns, turns] = 0
    direct, share = certain.copy(), np.ones(response.shape)
    for _ in range(PASSES):
        local = direct / own
        local[perturbed, turns] = 0
        indirect = local @ passed
        explained = np.divide(indirect, response, out=np.zeros(response.shape), where=response != 0)
        share = np.clip(1 - explained, 0, 1)
        share[perturbed, turns] = 1
        direct += DAMPING * (certain * share - direct)
    return response * share


def _by_kind(effects: ScreenEffects) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield for each kind of act: genes perturbed alone ``(P,)``, responses ``(G, P)`` as gains, errors ``(G, P)``.

    Where no errors are known, those of a gene are its median absolute deviation over the perturbed genes' turns, scaled to a
    standard deviation: most perturbations leave most genes alone.
    """
    kinds = [next(iter(condition)).kind or effects.default_kind for condition in effects.conditions]
    for kind in dict.fromkeys(kinds):
        rows = [row for row, (one, condition) in enumerate(zip(kinds, effects.conditions, strict=True)) if one == kind]
        part = effects.select(np.array(rows))
        perturbed, response, error = part.singles
        if len(perturbed):
            middle = np.median(response, axis=1, keepdims=True)
            deviation = 1.4826 * np.median(np.abs(response - middle), axis=1, keepdims=True)
            yield perturbed, response, error if error.any() else np.broadcast_to(deviation, error.shape)


def _regression(effects: ScreenEffects, allowed: np.ndarray) -> np.ndarray:
    """Lasso weights in standard deviations of both genes, ``(G, G)``."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    spread = np.sqrt((effects.delta**2).mean(0))
    spread[spread == 0] = 1
    rows, ends = effects.delta / spread, effects.delta / spread
    left_alone = effects.direction == 0
    if effects.series is not None:
        before, after = effects.series.steps()
        rows = np.concatenate([rows, (before + after) / 2 / spread])
        ends = np.concatenate([ends, after / spread])
        left_alone = np.concatenate([left_alone, np.ones(after.shape, dtype=bool)])
    weights = np.zeros(allowed.shape)
    with warnings.catch_warnings():
        # the last digits of correlated regulators' weights take thousands of rounds and change no order
        warnings.simplefilter("ignore", ConvergenceWarning)
        for target in np.flatnonzero(allowed.any(1)):
            held, columns = left_alone[:, target], np.flatnonzero(allowed[target])
            x, y = rows[np.ix_(held, columns)], ends[held, target]
            if len(y) > 1 and np.ptp(y) > 0:
                weights[target, columns] = Lasso(len(y) ** -0.5, fit_intercept=False, max_iter=2000).fit(x, y).coef_
    return weights
