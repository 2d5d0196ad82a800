"""Splits as cell-gears makes them: for the same seed, the lists of cell-gears 0.1.2's own splitter.

What its draws depend on, all of which is kept: the legacy generator of numpy, the order of its calls, which of them
draw with replacement, targets sorted by name, combinations sorted as they are spelled (`simulation`) or in the order of
the file (`combo_seen2`, `no_test`). `scripts/compare_splits.py` runs both side by side. Roohani et al., Nature
Biotechnology 2024, https://doi.org/10.1038/s41587-023-01905-6; https://github.com/snap-stanford/GEARS.

Beyond it: combinations of any number of targets, and each call has its own generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from perturbzoo.data.split_methods import Assignment, Part, SplitInput, category_of, fraction_of, require_combinations
from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.perturbation import parse_condition


def simulation(
    data: SplitInput,
    seed: int,
    *,
    train_gene_set_size: float = 0.75,
    combo_seen2_train_frac: float = 0.75,
    labels: Sequence[str] | None = None,
) -> Assignment:
    """Hold out targets, as GEARS' `simulation` does; the same lists as cell-gears 0.1.2 for the same seed.

    A share of the targets is seen. Conditions with an unseen target are tested, and so is a share of the combinations
    of seen targets. The same again on what is left, with .9 and .9, gives val. Categories count a target as seen where
    the round that held the condition out did, so targets of val are seen ones for test (as in the publication).

    Parameters
    ----------
    train_gene_set_size
        Share of the targets that are seen.
    combo_seen2_train_frac
        Share of the combinations of seen targets that train.
    labels
        The conditions as a file for cell-gears spells them (``"A+ctrl"``, ``"B+A"``), in its order. The draws of
        cell-gears depend on both; give them to repeat a published split. Default: canonical strings, sorted.
    """
    order = _spelled(data, labels)
    target_share = fraction_of("train_gene_set_size", train_gene_set_size)
    combination_share = fraction_of("combo_seen2_train_frac", combo_seen2_train_frac)
    rest, test = _hold_out_targets(order, data, seed, target_share, combination_share)
    train, val = _hold_out_targets(rest, data, seed, 0.9, 0.9)
    assigned: Assignment = {(condition, None): ("train", None) for condition in train}
    assigned.update({(condition, None): ("val", category) for condition, category in val.items()})
    assigned.update({(condition, None): ("test", category) for condition, category in test.items()})
    return assigned


def simulation_single(
    data: SplitInput, seed: int, *, train_gene_set_size: float = 0.75, labels: Sequence[str] | None = None
) -> Assignment:
    """Hold out targets of a screen of singles, as `simulation_single` of cell-gears does.

    Raises
    ------
    PerturbZooError
        The data hold combinations.
    """
    if data.combinations:
        raise PerturbZooError(
            f"split 'simulation_single' is for singles, and {len(data.combinations)} of {len(data.targets)} conditions are "
            f"combinations ({shortened(data.combinations, 3)}): use 'simulation'"
        )
    return simulation(data, seed, train_gene_set_size=train_gene_set_size, labels=labels)


def _hold_out_targets(
    order: Mapping[str, str], data: SplitInput, seed: int, target_share: float, combination_share: float
) -> tuple[dict[str, str], dict[str, str]]:
    """One round of `simulation`: what is left, spelled and ordered as before, and the category of what is held out."""
    targets = sorted({target for condition in order for target in data.targets[condition]})
    seen = set(_draw(np.random.RandomState(seed), targets, target_share))
    held: dict[str, str] = {}
    composable: dict[int, list[str]] = {}
    for condition in order:
        size, known = len(data.targets[condition]), len(seen.intersection(data.targets[condition]))
        if known < size:
            held[condition] = category_of(known, size)
        elif size > 1:
            composable.setdefault(size, []).append(condition)
    for size, pool in sorted(composable.items()):
        pool.sort(key=order.__getitem__)
        # cell-gears seeds again before it draws combinations; sizes beyond two, which it does not know, do likewise
        kept = set(_draw(np.random.RandomState(seed), pool, combination_share))
        held.update({condition: category_of(size, size) for condition in pool if condition not in kept})
    return {condition: label for condition, label in order.items() if condition not in held}, held


def combo_seen0(
    data: SplitInput,
    seed: int,
    *,
    test_fraction: float = 0.1,
    val_fraction: float = 0.1,
    labels: Sequence[str] | None = None,
) -> Assignment:
    """Hold out drawn targets: their singles and the combinations of them alone; mixed combinations are left out.

    Like `combo_seen1`, `combo_seen2` and `single`: as cell-gears does, one round for test and one for val on the rest.
    Targets are drawn with replacement, as many as the fraction of the singles.

    Raises
    ------
    PerturbZooError
        The data hold no combinations (not `single`).
    """
    require_combinations(data, "combo_seen0")
    return _two_rounds(data, seed, labels, test_fraction, val_fraction, lambda size, unseen: size - unseen == 0)


def combo_seen1(
    data: SplitInput,
    seed: int,
    *,
    test_fraction: float = 0.1,
    val_fraction: float = 0.1,
    labels: Sequence[str] | None = None,
) -> Assignment:
    """Hold out drawn targets: their singles, and combinations with at most one other target. See `combo_seen0`."""
    require_combinations(data, "combo_seen1")
    return _two_rounds(data, seed, labels, test_fraction, val_fraction, lambda size, unseen: size - unseen <= 1)


def single(
    data: SplitInput,
    seed: int,
    *,
    test_fraction: float = 0.1,
    val_fraction: float = 0.1,
    labels: Sequence[str] | None = None,
) -> Assignment:
    """Hold out the singles of drawn targets; combinations with such a target are left out. See `combo_seen0`."""
    return _two_rounds(data, seed, labels, test_fraction, val_fraction, lambda size, unseen: size == 1)


def combo_seen2(
    data: SplitInput,
    seed: int,
    *,
    test_fraction: float = 0.1,
    val_fraction: float = 0.1,
    labels: Sequence[str] | None = None,
) -> Assignment:
    """Hold out drawn combinations, whatever else trains (drawn with replacement). See `combo_seen0`."""
    require_combinations(data, "combo_seen2")
    return _two_rounds(data, seed, labels, test_fraction, val_fraction, None)


def no_test(data: SplitInput, seed: int, *, val_fraction: float = 0.1, labels: Sequence[str] | None = None) -> Assignment:
    """Train on everything but val, which is drawn with replacement, as cell-gears does. The one split without test."""
    rest = list(_spelled(data, labels))
    random = np.random.RandomState(seed)
    fraction = fraction_of("val_fraction", val_fraction)
    _draw_targets(random, rest, data, fraction)
    val = set(_draw(random, rest, fraction, replace=True))
    return {(condition, None): ("val" if condition in val else "train", None) for condition in rest}


def _two_rounds(
    data: SplitInput,
    seed: int,
    labels: Sequence[str] | None,
    test_fraction: float,
    val_fraction: float,
    tested: Callable[[int, int], bool] | None,
) -> Assignment:
    """Hold out for test, then for val.

    `tested` tells from the number of targets, and that of drawn ones among them, whether a condition that has a drawn
    target is held out or left out. None: combinations themselves are drawn.
    """
    fractions = {"test": fraction_of("test_fraction", test_fraction), "val": fraction_of("val_fraction", val_fraction)}
    rest = list(_spelled(data, labels))
    random = np.random.RandomState(seed)
    assigned: Assignment = {}
    parts: tuple[Part, ...] = ("test", "val")
    for part in parts:
        # drawn in every case: the state of the generator afterwards is part of the published lists
        drawn = _draw_targets(random, rest, data, fractions[part])
        if tested is None:
            combinations = [condition for condition in rest if len(data.targets[condition]) > 1]
            held = set(_draw(random, combinations, fractions[part], replace=True))
            touched = held
        else:
            unseen = {condition: len(drawn.intersection(data.targets[condition])) for condition in rest}
            touched = {condition for condition, count in unseen.items() if count}
            held = {condition for condition in touched if tested(len(data.targets[condition]), unseen[condition])}
        assigned.update({(condition, None): (part, None) for condition in rest if condition in held})
        rest = [condition for condition in rest if condition not in touched]
    assigned.update({(condition, None): ("train", None) for condition in rest})
    return assigned


def _draw_targets(random: np.random.RandomState, conditions: list[str], data: SplitInput, fraction: float) -> set[str]:
    targets = sorted({target for condition in conditions for target in data.targets[condition]})
    singles = sum(len(data.targets[condition]) == 1 for condition in conditions)
    return set(_draw(random, targets, fraction, of=singles, replace=True))


def _draw(
    random: np.random.RandomState, items: Sequence[str], fraction: float, *, of: int | None = None, replace: bool = False
) -> list[str]:
    """Draw a fraction of the items (or of the number `of`), rounded down."""
    count = int((len(items) if of is None else of) * fraction)
    return [items[position] for position in random.choice(len(items), count, replace=replace)]


def _spelled(data: SplitInput, labels: Sequence[str] | None) -> dict[str, str]:
    """Canonical string -> spelling, in the order that draws are made in."""
    if labels is None:
        return {condition: condition for condition in data.targets}
    spelled: dict[str, str] = {}
    for label in labels:
        spelled.setdefault(str(parse_condition(label)), label)
    if missing := [condition for condition in data.targets if condition not in spelled]:
        raise PerturbZooError(f"split: {len(missing)} conditions of the data are not among labels ({shortened(missing)})")
    return {condition: label for condition, label in spelled.items() if condition in data.targets}
