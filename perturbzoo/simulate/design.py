"""Which conditions a simulated screen has, which guide each cell got, and the columns that say so.

Called by :mod:`perturbzoo.simulate.screen`; knows no kinetics and no counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbzoo.errors import PerturbZooError
from perturbzoo.perturbation import Condition, Intervention, parse_condition


def planned_conditions(
    genes: Sequence[str],
    regulators: Sequence[str],
    given: Sequence[Condition | str] | None,
    kind: str,
    n_singles: int | None,
    n_doubles: int,
    doses: Sequence[float],
    window: tuple[float, float],
    rng: np.random.Generator,
) -> list[Condition]:
    """Control, then what is asked for, each once.

    Parameters
    ----------
    given
        The conditions; None: `n_singles` genes alone (regulators first; None: all genes) at each of `doses`, and `n_doubles` pairs
        of them at the highest, all within `window`.
    kind
        The default. Where a condition spells out another, all spell theirs out, so that no reader has to guess.

    Raises
    ------
    PerturbZooError
        There are fewer genes, or pairs of them, than wanted; conditions are given and drawn ones asked for.
    """
    if given is not None:
        if n_doubles or n_singles is not None:
            raise PerturbZooError(
                "simulate_screen: n_singles and n_doubles draw from all genes; with conditions, write them there"
            )
        read = [parse_condition(one) if isinstance(one, str) else one for one in given]
        if any(act.kind not in (None, kind) for condition in read for act in condition):
            read = [condition.with_defaults(kind) for condition in read]
        if all(condition.is_control for condition in read):
            raise PerturbZooError("simulate_screen: conditions name nothing beside control; name one, such as GENE0001")
        return list(dict.fromkeys([Condition(), *read]))
    count = len(genes) if n_singles is None else n_singles
    if not 1 <= count <= len(genes):
        raise PerturbZooError(f"simulate_screen: n_singles={count} must lie between 1 and the {len(genes)} genes")
    pairs = count * (count - 1) // 2
    if n_doubles > pairs:
        raise PerturbZooError(f"simulate_screen: n_doubles={n_doubles}, but {count} genes make {pairs} pairs")
    targets: Sequence[str] = genes
    if n_singles is not None:
        drawn_order = rng.permutation(len(genes))
        # genes that regulate nothing come last: screens ask about regulators
        silent = ~np.isin(genes, regulators)[drawn_order]
        targets = [genes[place] for place in np.sort(drawn_order[np.argsort(silent, kind="stable")][:count])]

    def alone(gene: str, dose: float) -> Condition:
        return Condition([Intervention(gene, dose=dose, onset=window[0], offset=window[1])])

    most = max(doses)
    doubles = []
    if n_doubles:
        first, second = np.triu_indices(count, 1)
        for pair in np.sort(rng.choice(pairs, n_doubles, replace=False)):
            doubles.append(alone(targets[first[pair]], most) | alone(targets[second[pair]], most))
    return [Condition(), *(alone(gene, dose) for gene in targets for dose in doses), *doubles]


@dataclass
class Guides:
    """The guides of a screen's targets.

    Attributes
    ----------
    targets
        The T targets, sorted.
    efficacy
        Shape ``(T, guides)``.
    number
        Shape ``(C, K)``: which target each act of each condition is on; -1 for padding.
    """

    targets: list[str]
    efficacy: np.ndarray
    number: np.ndarray

    @classmethod
    def draw(
        cls, conditions: Sequence[Condition], efficacy: tuple[float, float], guides: int, rng: np.random.Generator
    ) -> Guides:
        """Draw each guide's efficacy uniformly from a range."""
        targets = sorted({target for condition in conditions for target in condition.targets})
        place = {target: number for number, target in enumerate(targets)}
        number = np.full((len(conditions), max(1, *map(len, conditions))), -1)
        for row, condition in enumerate(conditions):
            number[row, : len(condition)] = [place[act.target] for act in condition]
        return cls(targets, rng.uniform(*efficacy, (len(targets), guides)), number)

    def deal(self, condition: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Give each cell a guide for each of its acts, ``(N, K)``; two acts on one target are of one guide."""
        dealt = rng.integers(self.efficacy.shape[1], size=(len(condition), self.number.shape[1]))
        # the first act on the same target, in each condition
        owner = (self.number[:, :, None] == self.number[:, None, :]).argmax(-1)
        return np.take_along_axis(dealt, owner[condition], axis=1)

    def of_cells(self, condition: np.ndarray, guide: np.ndarray) -> np.ndarray:
        """Efficacy of each cell's acts, ``(N, K)``."""
        # a padded act has the first target's, which nothing reads
        return self.efficacy[np.maximum(self.number, 0)[condition], guide]

    def of_conditions(self) -> np.ndarray:
        """Efficacy of each condition's acts with the mean of their target's guides, ``(C, K)``."""
        return self.efficacy.mean(1)[np.maximum(self.number, 0)]

    def names(self, condition: np.ndarray, guide: np.ndarray) -> pd.Categorical:
        """Say which guides each cell has: ``GENE0001_g1+GENE0002_g1``, or ``non-targeting``."""
        distinct, code = np.unique(np.c_[condition, guide], axis=0, return_inverse=True)
        labels = []
        for row, *numbers in distinct.tolist():
            acts = zip(self.number[row].tolist(), numbers, strict=True)
            named = dict.fromkeys(f"{self.targets[target]}_g{number + 1}" for target, number in acts if target >= 0)
            labels.append("+".join(named) or "non-targeting")
        levels, position = np.unique(labels, return_inverse=True)
        return pd.Categorical.from_codes(position[code.ravel()], levels)


def cell_columns(conditions: Sequence[Condition], condition: np.ndarray, kind: str) -> dict[str, pd.Categorical]:
    """Columns ``perturbation``, ``kind`` and ``dose`` of the cells, as the data module reads them; doses of a combination as ``1+0.5``."""
    labels = [str(one) for one in conditions]
    kinds = ["+".join(dict.fromkeys(act.kind or kind for act in one)) or "control" for one in conditions]
    doses = ["+".join(f"{act.dose:g}" for act in one) or "0" for one in conditions]
    columns = {"perturbation": pd.Categorical.from_codes(condition, labels)}
    for name, values in (("kind", kinds), ("dose", doses)):
        levels, position = np.unique(values, return_inverse=True)
        columns[name] = pd.Categorical.from_codes(position[condition], levels)
    return columns
