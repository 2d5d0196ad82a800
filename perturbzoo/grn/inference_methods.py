r"""Baselines that infer a network from a screen: one function each, one signature, one registry.

Every function takes effects (:class:`perturbzoo.grn.effects.ScreenEffects`), a table of what is `allowed` and a seed, and
returns scores ``W[target, regulator]``, 0 where it sees no edge. Notation: :math:`\Delta_{ki}` is the change of gene i in
condition k. :func:`perturbzoo.grn.inference.infer_network` adds priors, probabilities and a network around them.

Where a method regresses a gene on others, the conditions that perturb **that gene itself** are left out: what its own guide
did says nothing of who regulates it, and would be read as an edge from everything downstream of it.

All take the mRNA of a regulator for its activity. A knockout that leaves the mRNA in place breaks that assumption: then only
`total_effect`, which asks for the label alone, is beyond doubt.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn.effects import ScreenEffects
from perturbzoo.grn.graphical_models import dag, interventional
from perturbzoo.grn.zscores import zscore, zscore_direct

Method: TypeAlias = Callable[[ScreenEffects, np.ndarray, int], np.ndarray]

MOST_SHRINKAGE = 0.8


def pearson(effects: ScreenEffects, allowed: np.ndarray, seed: int = 0) -> np.ndarray:
    """Pearson correlation of the changes of two genes over conditions. Symmetric: it knows no direction."""
    return _masked(_correlation(effects.delta), allowed)


def spearman(effects: ScreenEffects, allowed: np.ndarray, seed: int = 0) -> np.ndarray:
    """Spearman correlation: Pearson's of the ranks. Symmetric."""
    from scipy.stats import rankdata

    return _masked(_correlation(rankdata(effects.delta, axis=0)), allowed)


def partial_correlation(effects: ScreenEffects, allowed: np.ndarray, seed: int = 0) -> np.ndarray:
    r"""Correlation of two genes given all others, :math:`-\Theta_{ij} / \sqrt{\Theta_{ii} \Theta_{jj}}`. Symmetric.

    :math:`\Theta` is the inverse of the covariance of standardised changes, shrunk as Ledoit and Wolf (2004) do, so that it
    exists with fewer conditions than genes. The shrinkage is held at `MOST_SHRINKAGE`: where each gene is perturbed once, its
    changes are nearly all from that condition, the formula takes them for noise and leaves no correlation at all.
    """
    from sklearn.covariance import empirical_covariance, ledoit_wolf_shrinkage, shrunk_covariance

    spread = effects.delta.std(0)
    moving = np.flatnonzero(spread > 0)
    scores = np.zeros(allowed.shape)
    if len(moving) < 2 or len(effects.conditions) < 2:
        return scores
    standard = (effects.delta[:, moving] - effects.delta[:, moving].mean(0)) / spread[moving]
    shrinkage = min(ledoit_wolf_shrinkage(standard, assume_centered=True), MOST_SHRINKAGE)
    precision = np.linalg.inv(shrunk_covariance(empirical_covariance(standard, assume_centered=True), shrinkage))
    size = np.sqrt(np.diag(precision))
    scores[np.ix_(moving, moving)] = -precision / np.outer(size, size)
    return _masked(scores, allowed)


def total_effect(effects: ScreenEffects, allowed: np.ndarray, seed: int = 0) -> np.ndarray:
    """Change of the target where the regulator alone was perturbed, turned to a gain of the regulator.

    It does not tell direct from indirect effects, and has no edge from a gene that nobody perturbed alone.
    """
    perturbed, response, _ = effects.singles
    scores = np.zeros(allowed.shape)
    scores[:, perturbed] = response
    return _masked(scores, allowed)


def mra(effects: ScreenEffects, allowed: np.ndarray, seed: int = 0) -> np.ndarray:
    r"""Modular response analysis: local responses from global ones (Kholodenko et al., PNAS 2002).

    With :math:`R_{ij}` the change of gene i where j alone was perturbed, and every gene perturbed on its own equation,

    .. math:: r_{ij} = -(R^{-1})_{ij} / (R^{-1})_{ii}

    feedback allowed, exact for small effects. Genes that nobody perturbed are regulated, never regulators:
    :math:`r_i = R_i R_P^{-1}` with P the perturbed genes. What they do to P is then ascribed to their own regulators.

    Noise makes the inverse useless: it is Tikhonov's, :math:`(R^T R + \lambda)^{-1} R^T`, and :math:`\lambda` the
    number of perturbed genes times the mean squared standard error, the energy of the noise in a column of R. At no noise it
    is the inverse.
    """
    perturbed, response, error = effects.singles
    scores = np.zeros(allowed.shape)
    if not len(perturbed):
        return scores
    square = response[perturbed]  # (P, P)
    left, size, right = np.linalg.svd(square)
    damping = (error[perturbed] ** 2).sum(0).mean()
    # what a singular matrix does not determine stays 0
    floor = size.max(initial=0) * len(size) * np.finfo(float).eps
    gain = np.divide(size, size**2 + damping, out=np.zeros_like(size), where=size > floor)
    inverse = right.T @ (gain[:, None] * left.T)
    own = np.diag(inverse)
    scores[:, perturbed] = response @ inverse
    local = -np.divide(inverse, own[:, None], out=np.zeros_like(inverse), where=own[:, None] != 0)
    scores[np.ix_(perturbed, perturbed)] = local
    return _masked(scores, allowed)


def lasso(effects: ScreenEffects, allowed: np.ndarray, seed: int = 0) -> np.ndarray:
    r"""Lasso of each gene's change on those of its candidate regulators, the gene's own conditions left out.

    .. math:: \min_w \frac{1}{2n} \sum_k (\Delta_{ki} - \sum_j w_j \Delta_{kj})^2 + \alpha_i \sum_j |w_j|

    No intercept: no change is no change. :math:`\alpha_i` is one standard deviation of what noise alone reaches, standard
    error of gene i x root mean square of the regulators :math:`/ \sqrt n`, but at least a thousandth of the level at which
    no regulator is left, which is what counts where no standard errors are known. The universal level, :math:`\sqrt{2
    \log p}` times that, loses weak edges that one condition each supports; the order of the weights and their
    probabilities say which edges to believe.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    noise = np.sqrt((effects.error**2).mean(0))
    scores = np.zeros(allowed.shape)
    for target, columns, x, y in _regressions(effects, allowed):
        count = len(y)
        ceiling = np.abs(x.T @ y).max() / count
        alpha = max(noise[target] * np.sqrt((x**2).mean() / count), 1e-3 * ceiling)
        if alpha >= ceiling:
            continue
        with warnings.catch_warnings():
            # the last digits of correlated regulators' weights take thousands of rounds and change no order
            warnings.simplefilter("ignore", ConvergenceWarning)
            scores[target, columns] = Lasso(alpha=alpha, fit_intercept=False, max_iter=2000).fit(x, y).coef_
    return _masked(scores, allowed)


def trees(effects: ScreenEffects, allowed: np.ndarray, seed: int = 0) -> np.ndarray:
    """Importances of the candidate regulators in a forest for each gene, as GENIE3 (Huynh-Thu et al., PLoS ONE 2010).

    Extremely randomised trees, 100 for each gene, √p regulators tried at each split; the gene's own conditions are left out.
    Importances of a gene sum to 1, as they do where all genes have unit variance, and have no sign: the sign is that of the
    correlation over the same conditions.
    """
    from sklearn.ensemble import ExtraTreesRegressor

    scores = np.zeros(allowed.shape)
    for target, columns, x, y in _regressions(effects, allowed):
        forest = ExtraTreesRegressor(
            100, max_features="sqrt", random_state=np.random.default_rng([seed, target]).integers(2**31)
        )
        importance = forest.fit(x, y).feature_importances_
        together = (x - x.mean(0)).T @ (y - y.mean())
        scores[target, columns] = importance * np.where(together < 0, -1, 1)
    return _masked(scores, allowed)


METHODS: dict[str, Method] = {
    "lasso": lasso,
    "mra": mra,
    "total_effect": total_effect,
    "pearson": pearson,
    "spearman": spearman,
    "trees": trees,
    "partial_correlation": partial_correlation,
    "zscore": zscore,
    "zscore_direct": zscore_direct,
    "interventional": interventional,
    "dag": dag,
}
# These need conditions that perturb a single, measured gene; all others take any.
FROM_SINGLES = ("mra", "total_effect", "zscore", "zscore_direct")
# Repeating these takes long: no probabilities unless asked for.
SLOW = ("trees", "interventional", "dag")


def _correlation(values: np.ndarray) -> np.ndarray:
    """Pearson correlation of columns; 0 for a column that does not vary."""
    centred = values - values.mean(0)
    size = np.linalg.norm(centred, axis=0)
    # what rounding leaves of a constant is no variation
    size[size <= 1e-12 * np.linalg.norm(values, axis=0)] = 0
    unit = np.divide(centred, size, out=np.zeros_like(centred), where=size > 0)
    return unit.T @ unit


def _regressions(effects: ScreenEffects, allowed: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (gene, its candidates, their changes ``(n, p)``, its change ``(n,)``) over conditions that leave the gene alone.

    Genes without candidates, or that do not vary, are passed over.
    """
    for target in np.flatnonzero(allowed.any(1)):
        rows = effects.direction[:, target] == 0
        columns = np.flatnonzero(allowed[target])
        y = effects.delta[rows, target]
        if len(y) > 1 and np.ptp(y) > 0:
            yield int(target), columns, effects.delta[np.ix_(rows, columns)], y


def _masked(scores: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    if not np.isfinite(scores).all():
        raise PerturbZooError("network inference: scores are not finite; are the changes of a gene far beyond log scale?")
    return np.where(allowed, scores, 0.0)
