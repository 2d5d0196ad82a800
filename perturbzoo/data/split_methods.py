"""Ways to divide conditions into train, val and test: what `make_split` calls by name, but for those of cell-gears.

A method sees the perturbed pairs of the data as `SplitInput` and gives an `Assignment`: the part of each (condition,
context), and its category where the method defines one. What it does not name is left out. The key (condition, None)
stands for a condition in all its contexts. Control is never among the pairs: it always trains.

Each method draws from a generator of its own, made from `seed`; numpy's global one is not touched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, TypeVar

import numpy as np

from perturbzoo.errors import PerturbZooError, near_matches, shortened
from perturbzoo.perturbation import Condition, parse_condition, parse_condition_list

Part = Literal["train", "val", "test"]
Pair = tuple[str, str | None]
Assignment = dict[Pair, tuple[Part, str | None]]

Item = TypeVar("Item")

PARTS: tuple[Part, ...] = ("train", "val", "test")

# What the column of a split is called in public files. CPA writes "ood" for what was held out.
PART_SPELLINGS: dict[str, Part] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "holdout", "held_out", "heldout", "ood"), "test"),
}
MISSING_SPELLINGS = ("", "nan", "none", "na", "<na>")


@dataclass(frozen=True)
class SplitInput:
    """The pairs to divide.

    Attributes
    ----------
    rows
        The pairs as they were given, control included, duplicates kept.
    targets
        The distinct targets of each perturbed condition, by canonical string, sorted by it.
    """

    rows: tuple[Pair, ...]
    targets: dict[str, tuple[str, ...]]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Distinct perturbed pairs, sorted."""
        return sorted({pair for pair in self.rows if pair[0] in self.targets}, key=lambda pair: (pair[0], pair[1] or ""))

    @property
    def conditions(self) -> list[str]:
        return list(self.targets)

    @property
    def combinations(self) -> list[str]:
        """Conditions of two targets or more."""
        return [condition for condition, targets in self.targets.items() if len(targets) > 1]

    def contexts(self) -> list[str]:
        """Labels of the contexts, sorted; empty where the pairs name none."""
        return sorted({context for _, context in self.pairs if context is not None})


def category_of(seen: int, targets: int) -> str:
    """Name the category of a held-out condition by how many of its targets were seen in training.

    As GEARS names them (Roohani et al. 2024), for one and two targets; ``combo_seen1_of_3`` for more, and
    ``seen_target`` for a single of a seen target: another dose or kind, or a target known from combinations only.
    """
    if targets == 1:
        return "seen_target" if seen else "unseen_single"
    return f"combo_seen{seen}" if targets == 2 else f"combo_seen{seen}_of_{targets}"


# ---------------------------------------------------------------------- over conditions


def random_conditions(data: SplitInput, seed: int, *, test_fraction: float = 0.2, val_fraction: float = 0.1) -> Assignment:
    """Draw conditions at random; both fractions are of all conditions."""
    shuffled = _shuffled(np.random.RandomState(seed), data.conditions)
    test = _count(shuffled, fraction_of("test_fraction", test_fraction))
    val = min(_count(shuffled, fraction_of("val_fraction", val_fraction)), len(shuffled) - test)
    return _whole(train=shuffled[test + val :], val=shuffled[test : test + val], test=shuffled[:test])


def kfold(data: SplitInput, seed: int, *, folds: int = 5, fold: int = 0, val_fraction: float = 0.1) -> Assignment:
    """Test one of k folds over conditions; val is a fraction of the other folds.

    The folds depend on `seed` and `folds` alone: those of one seed together test each condition exactly once.
    """
    random = np.random.RandomState(seed)
    test = _fold(_shuffled(random, data.conditions), folds, fold, "conditions")
    train, val = _hold_out(random, _without(data.conditions, test), val_fraction)
    return _whole(train=train, val=val, test=test)


def kfold_doubles(data: SplitInput, seed: int, *, folds: int = 5, fold: int = 0, val_fraction: float = 0.2) -> Assignment:
    """Test one of k folds over combinations (of two targets or more); val is a fraction of the others. Singles train.

    Raises
    ------
    PerturbZooError
        There are fewer combinations than folds.
    """
    require_combinations(data, "kfold_doubles")
    random = np.random.RandomState(seed)
    test = _fold(_shuffled(random, data.combinations), folds, fold, "combinations")
    _, val = _hold_out(random, _without(data.combinations, test), val_fraction)
    return _whole(train=set(data.targets) - {*val, *test}, val=val, test=test)


def _without(conditions: Sequence[str], removed: Collection[str]) -> list[str]:
    gone = set(removed)
    return [condition for condition in conditions if condition not in gone]


def _fold(shuffled: list[str], folds: int, fold: int, what: str) -> list[str]:
    if not isinstance(folds, Integral) or not 2 <= folds <= len(shuffled):
        raise PerturbZooError(
            f"split: folds must be a whole number, 2 or more, and no more than the {len(shuffled)} {what}; not {folds!r}"
        )
    if not isinstance(fold, Integral) or not 0 <= fold < folds:
        raise PerturbZooError(f"split: fold must be a whole number from 0 to {folds - 1}, not {fold!r}")
    return shuffled[fold::folds]


# ---------------------------------------------------------------------- over contexts


def unseen_context(
    data: SplitInput,
    seed: int,
    *,
    held_out: str | Sequence[str],
    val_held_out: str | Sequence[str] = (),
    val_fraction: float = 0.1,
    seen_fraction: float = 0.0,
) -> Assignment:
    """Test every pair of the held-out contexts; their controls still train.

    Val is the pairs of `val_held_out`, if given: the same task as test, at the price of a context. Else it is a random
    fraction of the remaining pairs. Pairs rather than conditions, so that most conditions of test train in some context.

    Parameters
    ----------
    held_out, val_held_out
        Labels of contexts, or levels of one covariate: ``"A549"`` holds out ``"A549|rep_1"`` and ``"A549|rep_2"``.
    val_fraction
        Not used where `val_held_out` is given.
    seen_fraction
        Share of the conditions, drawn at random, that train in the held-out contexts too, as in Open Problems' challenge of 2023.

    Raises
    ------
    PerturbZooError
        The data have no such context, or one context is given for both.
    """
    test, val = _matching(data, held_out, "held_out"), _matching(data, val_held_out, "val_held_out")
    if both := sorted(test & val):
        raise PerturbZooError(f"split: {shortened(both)} cannot be in held_out and val_held_out at once")
    # a generator of its own: the draw of val is the same without it
    order = _shuffled(np.random.RandomState([seed, 1]), data.conditions)
    seen = set(order[: _count(order, fraction_of("seen_fraction", seen_fraction))])
    tested = [pair for pair in data.pairs if pair[1] in test and pair[0] not in seen]
    rest = [pair for pair in data.pairs if pair[1] not in test or pair[0] in seen]
    if val:
        validated = [pair for pair in rest if pair[1] in val and pair[0] not in seen]
        rest = [pair for pair in rest if pair not in set(validated)]
    else:
        rest, validated = _hold_out(np.random.RandomState(seed), rest, val_fraction)
    return _assign(rest, validated, tested)


def _matching(data: SplitInput, wanted: str | Sequence[str], argument: str) -> set[str]:
    """Labels of the contexts that are named whole, or by one of their levels."""
    labels = data.contexts()
    levels = {part for label in labels for part in (label, *label.split("|"))}
    found: set[str] = set()
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name not in levels:
            known = f"there are {shortened(labels)}" if labels else "the data have none: name their covariates (match_on)"
            raise PerturbZooError(
                f"split: {argument} names the context '{name}'; {known}{near_matches(str(name), sorted(levels))}"
            )
        found.update(label for label in labels if name == label or name in label.split("|"))
    return found


# ---------------------------------------------------------------------- given


def explicit(
    data: SplitInput,
    seed: int,
    *,
    test: str | Sequence[Any],
    val: str | Sequence[Any] = (),
    train: str | Sequence[Any] | None = None,
) -> Assignment:
    """Take lists of conditions (``["A+B", "C"]`` or ``"A+B,C"``), or of (condition, context) pairs. Nothing is drawn.

    Parameters
    ----------
    train
        Default: all that the other lists do not name. If given, what no list names is left out.

    Raises
    ------
    PerturbZooError
        A list names what the data do not hold, or control among val and test, or two lists name the same.
    """
    lists = {"train": () if train is None else train, "val": val, "test": test}
    found: dict[str, set[Pair]] = {}
    for part, given in lists.items():
        items = parse_condition_list(given) if isinstance(given, str) else given
        found[part] = {pair for item in items for pair in _named(data, item, part)}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if both := found[first] & found[second]:
            names = sorted({condition for condition, _ in both})
            raise PerturbZooError(f"split: {shortened(names)} cannot be in {first} and {second} at once")
    if train is None:
        found["train"] = set(data.pairs) - found["val"] - found["test"]
    return _assign(**found)


def _named(data: SplitInput, item: Any, part: str) -> list[Pair]:
    """The pairs that one item of a list stands for."""
    if isinstance(item, str | Condition):
        item = (item, None)
    if not isinstance(item, Sequence) or len(item) != 2:
        raise PerturbZooError(f"split: {part} must list conditions or (condition, context) pairs, not {item!r}")
    given, context = item
    condition = str(given if isinstance(given, Condition) else parse_condition(given))
    if condition == "control" and part == "train":
        return []
    if condition not in data.targets:
        hint = ": control always trains" if condition == "control" else near_matches(condition, data.targets)
        raise PerturbZooError(f"split: {part} names '{condition}', which is no perturbed condition of the data{hint}")
    found = [pair for pair in data.pairs if pair[0] == condition and context in (None, pair[1])]
    if not found:
        contexts = [str(pair[1]) for pair in data.pairs if pair[0] == condition]
        raise PerturbZooError(
            f"split: {part} names '{condition}' in the context '{context}'; the data hold it in {shortened(contexts)}"
        )
    return found


def column(data: SplitInput, seed: int, *, values: Sequence[Any]) -> Assignment:
    """Take the part from a column: one value for each pair given, in the usual spellings (`PART_SPELLINGS`).

    Pairs with a missing value are left out. A pair may be given several times, once for each value it has.

    Raises
    ------
    PerturbZooError
        A value is none of the spellings, or one pair has two parts.
    """
    if len(values) != len(data.rows):
        raise PerturbZooError(f"split: {len(values)} values for {len(data.rows)} pairs: give one for each")
    assigned: Assignment = {}
    for pair, value in zip(data.rows, values, strict=True):
        text = str(value).strip().lower()
        if pair[0] not in data.targets or text in MISSING_SPELLINGS:
            continue
        if text not in PART_SPELLINGS:
            raise PerturbZooError(
                f"split: the column says '{value}' for '{pair[0]}'; it must be one of {', '.join(PART_SPELLINGS)}"
                f"{near_matches(text, PART_SPELLINGS)}"
            )
        part = PART_SPELLINGS[text]
        if assigned.setdefault(pair, (part, None))[0] != part:
            where = "" if pair[1] is None else f" in the context '{pair[1]}'"
            raise PerturbZooError(
                f"split: the column says both '{assigned[pair][0]}' and '{part}' for cells of '{pair[0]}'{where}: "
                "a condition cannot be in two parts; conditions are split here, not cells"
            )
    return assigned


# ---------------------------------------------------------------------- shared


def _assign(train: Iterable[Pair], val: Iterable[Pair], test: Iterable[Pair]) -> Assignment:
    parts: dict[Part, Iterable[Pair]] = {"train": train, "val": val, "test": test}
    return {pair: (part, None) for part, pairs in parts.items() for pair in pairs}


def _whole(train: Iterable[str], val: Iterable[str], test: Iterable[str]) -> Assignment:
    """Assign conditions in all their contexts."""
    return _assign(*([(condition, None) for condition in conditions] for conditions in (train, val, test)))


def _shuffled(random: np.random.RandomState, items: Sequence[Item]) -> list[Item]:
    return [items[position] for position in random.permutation(len(items))]


def _hold_out(random: np.random.RandomState, items: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Divide into what stays and a random fraction for val; something always stays."""
    shuffled = _shuffled(random, items)
    count = min(_count(items, fraction_of("val_fraction", fraction)), max(len(items) - 1, 0))
    return shuffled[count:], shuffled[:count]


def _count(items: Collection[Any], fraction: float) -> int:
    """The nearest number of items to a fraction, but one at least where the fraction is not 0."""
    return max(round(len(items) * fraction), 1) if fraction and items else 0


def fraction_of(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise PerturbZooError(f"split: {name} must be a number from 0 to 1, not {value!r}")
    return float(value)


def require_combinations(data: SplitInput, method: str) -> None:
    if not data.combinations:
        raise PerturbZooError(
            f"split '{method}' holds out combinations, and none of the {len(data.targets)} conditions names two targets: "
            "use 'simulation', 'random' or 'kfold'"
        )
