r"""Networks as linear structural equations under interventions: with cycles allowed, and with none.

The change of gene i in condition k, :math:`\delta_{ki}`, obeys

.. math:: \delta_{ki} = \sum_j B_{ij}\,\delta_{kj} + e_{ki}, \qquad e_{ki} \sim \mathcal N(0, v_i)

unless condition k perturbs gene i itself: whatever its level is then, its regulators did not decide it, and its equation is
dropped from that condition (a perfect intervention). Regulators act through their measured mRNA. For a Cas9 knockout, which
cuts what a gene does and not what is made of it, this is right up to one factor for each knocked-out gene: the lost function
and the column of B cannot be told apart.

With :math:`A = I - B` and :math:`T_k` the genes that condition k perturbs, the negative log-likelihood is

.. math:: \sum_k \Big[ \sum_{i \notin T_k} \frac{(\delta_{ki} - B_i \delta_k)^2}{2 v_i}
    - \log |\det A_{\setminus T_k}| \Big], \qquad
    \det A_{\setminus T} = \det A \cdot \det (A^{-1})_{T T}

where :math:`A_{\setminus T}` is A without the rows and columns of T, and the last equation (Jacobi's) is what makes many
conditions cost one inverse. Knows arrays and effects; see :mod:`perturbzoo.grn.inference_methods` for the common signature.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eig, expm
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components

from perturbzoo.grn.effects import ScreenEffects

LEAST_NOISE = 1e-3  # standard deviation of an equation's noise, as a share of its gene's own: v must not become 0
STABLE = 0.98  # largest real part of B's eigenvalues that costs nothing; from 1 on, small disturbances grow
ROUNDS = 20  # at most, of weights given noise, and noise given weights

Penalty = Callable[[np.ndarray], tuple[float, np.ndarray]]


def interventional(effects: ScreenEffects, allowed: np.ndarray, seed: int = 0) -> np.ndarray:
    r"""Return B of the linear structural equations, cycles allowed, by penalised likelihood.

    To the likelihood above come an L1 penalty :math:`\sum_{ij} \lambda_i |B_{ij}|`, with :math:`\lambda_i = \sqrt n\,
    \mathrm{rms}(\delta) / \sqrt{v_i}`, one standard deviation of what noise alone reaches (as in
    :func:`perturbzoo.grn.inference_methods.lasso`), and a stability penalty :math:`K (\max \mathrm{Re}\,\lambda(B) - 0.98)_+^2
    \cdot 10^3`: a cell that small disturbances drive away would not have been measured at rest. The determinant is what a
    regression of each gene on all others lacks: without it, a feedback loop biases both of its edges.
    Interventional likelihoods of cyclic models: Rohbeck et al., CLeaR 2024 (Bicycle); Hyttinen et al., JMLR 2012.
    """
    problem = _Problem.of(effects, allowed)
    return problem.unscaled(problem.fit([problem.determinant, problem.instability]))


def dag(effects: ScreenEffects, allowed: np.ndarray, seed: int = 0) -> np.ndarray:
    r"""Return B of the same equations where no gene may regulate itself through others.

    NOTEARS (Zheng et al., NeurIPS 2018) with the interventional likelihood, whose determinants are then 1: minimise it under
    :math:`h(B) = \mathrm{tr}\,e^{B \circ B} - G = 0` by an augmented Lagrangian. What is left of cycles in the end is cut:
    edges are added from the strongest on, and those that would close a cycle are not. Real networks have feedback; this is for
    comparison.
    """
    problem = _Problem.of(effects, allowed)
    weights = problem.fit([])
    multiplier, stiffness, before = 0.0, 1.0, np.inf
    for _ in range(20):

        def cycles(b: np.ndarray, multiplier: float = multiplier, stiffness: float = stiffness) -> tuple[float, np.ndarray]:
            excess, slope = _cyclicity(b)
            return multiplier * excess + 0.5 * stiffness * excess**2, (multiplier + stiffness * excess) * slope

        weights = problem.solve(weights, [cycles], steps=150)
        excess, _ = _cyclicity(weights)
        if excess < 1e-8:
            break
        multiplier += stiffness * excess
        if excess > 0.25 * before:
            stiffness *= 10
        before = excess
    return without_cycles(problem.unscaled(weights))


def without_cycles(weights: np.ndarray) -> np.ndarray:
    """Keep the strongest entries of ``W[target, regulator]`` that close no cycle; the others become 0."""
    count = len(weights)
    reaches = np.eye(count, dtype=bool)  # [a, b]: there is a path from a to b
    kept = np.zeros_like(weights)
    targets, regulators = np.nonzero(weights)
    for edge in np.argsort(-np.abs(weights[targets, regulators]), kind="stable"):
        target, regulator = targets[edge], regulators[edge]
        if reaches[target, regulator]:
            continue
        kept[target, regulator] = weights[target, regulator]
        reaches |= reaches[:, [regulator]] & reaches[[target], :]
    return kept


def is_acyclic(weights: np.ndarray) -> bool:
    """Whether no gene reaches itself: every strongly connected component is one gene, and no gene regulates itself."""
    return not np.diag(weights).any() and connected_components(weights != 0, connection="strong")[0] == len(weights)


def _cyclicity(weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Return tr exp(B∘B) - G and its gradient: 0 for an acyclic B, and only for one."""
    power = expm(weights**2)
    return float(np.trace(power)) - len(weights), 2 * power.T * weights


@dataclass
class _Problem:
    """The smooth likelihood and its L1 penalty; K conditions, G genes, all in units of the genes' own spread."""

    delta: np.ndarray  # (K, G), each gene divided by `scale`
    free: np.ndarray  # (K, G), 1 where the gene's own equation holds
    sets: Counter[tuple[int, ...]]  # perturbed genes -> number of conditions
    allowed: np.ndarray  # (G, G)
    scale: np.ndarray  # (G,)
    least: np.ndarray  # (G,): the least that v may be
    noise: np.ndarray  # (G,): v

    @classmethod
    def of(cls, effects: ScreenEffects, allowed: np.ndarray) -> _Problem:
        free = effects.direction == 0
        scale = np.sqrt((effects.delta**2).mean(0))
        scale[scale == 0] = 1
        delta = effects.delta / scale
        count = np.maximum(free.sum(0), 1)
        least = ((effects.error / scale) ** 2 * free).sum(0) / count
        # a gene that only its own perturbation moves has a spread of 0 elsewhere
        spread = (delta**2 * free).sum(0) / count
        least = np.maximum(least, np.maximum(LEAST_NOISE**2 * spread, 1e-10))
        sets = Counter(tuple(np.flatnonzero(row).tolist()) for row in ~free)
        return cls(delta, free.astype(float), sets, allowed, scale, least, np.maximum(0.1 * spread, least))

    def fit(self, terms: list[Penalty]) -> np.ndarray:
        """Fit weights and noise in turns, until the noise stays; B is that of the scaled changes."""
        weights = np.zeros(self.allowed.shape)
        for _ in range(ROUNDS):
            weights = self.solve(weights, terms)
            before, self.noise = self.noise, np.maximum(self.rest(weights), self.least)
            if np.abs(np.log(self.noise / before)).max() < 0.1:
                break
        return weights

    def rest(self, weights: np.ndarray) -> np.ndarray:
        """Return the variance that each gene's chosen regulators leave unexplained, fitted without the penalty's bias."""
        left = np.zeros(len(weights))
        for gene, row in enumerate(weights):
            held = self.free[:, gene] > 0
            # no more regulators than half of the conditions can bear, the strongest
            chosen = np.argsort(-np.abs(row), kind="stable")[: min(np.count_nonzero(row), held.sum() // 2)]
            x, y = self.delta[np.ix_(held, chosen)], self.delta[held, gene]
            missed = y - x @ np.linalg.lstsq(x, y, rcond=None)[0] if len(chosen) else y
            left[gene] = (missed**2).sum() / max(len(y) - len(chosen), 1)
        return left

    def unscaled(self, weights: np.ndarray) -> np.ndarray:
        """Return B in the units of the data, 0 where no edge is allowed."""
        return np.where(self.allowed, weights * self.scale[:, None] / self.scale[None, :], 0.0)

    def solve(self, start: np.ndarray, terms: list[Penalty], steps: int = 400) -> np.ndarray:
        """L-BFGS-B over the positive and negative parts of B, whose sum is the L1 norm."""
        places = np.nonzero(self.allowed)
        penalty = np.sqrt(self.free.sum(0) * (self.delta**2).mean() / self.noise)[places[0]]
        size = len(places[0])

        def objective(parts: np.ndarray) -> tuple[float, np.ndarray]:
            weights = np.zeros(self.allowed.shape)
            weights[places] = parts[:size] - parts[size:]
            rest = (self.delta - self.delta @ weights.T) * self.free
            value = float((rest**2 / self.noise).sum()) / 2 + float(penalty @ (parts[:size] + parts[size:]))
            slope = -(rest / self.noise).T @ self.delta
            for term in terms:
                added, direction = term(weights)
                value, slope = value + added, slope + direction
            return value, np.concatenate([slope[places] + penalty, penalty - slope[places]])

        first = start[places]
        found = minimize(
            objective,
            np.concatenate([np.maximum(first, 0), np.maximum(-first, 0)]),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * (2 * size),
            options={"maxiter": steps, "maxfun": 2 * steps, "ftol": 1e-10, "gtol": 1e-6},
        )
        weights = np.zeros(self.allowed.shape)
        weights[places] = found.x[:size] - found.x[size:]
        return weights

    def determinant(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        r"""Return minus the log-determinants of all conditions, and their gradient :math:`\sum_k A_{\setminus T_k}^{-\top}`."""
        matrix = np.eye(len(weights)) - weights
        # a step that leaps over a determinant of 0 lands in what the stability penalty forbids, and comes back
        _, log_det = np.linalg.slogdet(matrix)
        inverse = np.linalg.inv(matrix)
        value, total = 0.0, np.zeros_like(weights)
        for perturbed, times in self.sets.items():
            place = list(perturbed)
            block = inverse[np.ix_(place, place)]
            value += times * (log_det + np.linalg.slogdet(block)[1])
            total += times * inverse
            if place:
                total -= times * inverse[:, place] @ np.linalg.solve(block, inverse[place])
        return -value, total.T

    def instability(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the penalty on the largest real part of the eigenvalues of B, and its gradient by the eigenvectors."""
        values = np.linalg.eigvals(weights)
        excess = values.real.max() - STABLE
        if excess <= 0:
            return 0.0, np.zeros_like(weights)
        values, left, right = eig(weights, left=True)
        first = int(values.real.argmax())
        a, b = left[:, first].conj(), right[:, first]
        slope = (np.outer(a, b) / (a @ b)).real
        strength = 1e3 * len(self.delta)
        return strength * excess**2, 2 * strength * excess * slope
