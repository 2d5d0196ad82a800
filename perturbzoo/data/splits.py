"""Which conditions train, which validate, which test: made with a seed, saved as JSON, read back.

`make_split` is called by the data module with the pairs of the data; `Split` also travels in the `DataSpec` of a
checkpoint. Neither knows of cells. The methods are in `split_methods` and `split_gears`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

from perturbzoo.data import split_gears, split_methods
from perturbzoo.data.split_methods import PARTS, Assignment, Pair, Part, SplitInput, category_of
from perturbzoo.errors import PerturbZooError, near_matches, shortened
from perturbzoo.perturbation import Condition, parse_condition

SCHEMA = 1

CONTROL = str(Condition())
SEEN = "seen"
# Always in the table, also where empty, so that the tables of two splits can be laid side by side.
CATEGORIES = (SEEN, "unseen_single", "combo_seen0", "combo_seen1", "combo_seen2")

METHODS: dict[str, Callable[..., Assignment]] = {
    "simulation": split_gears.simulation,
    "simulation_single": split_gears.simulation_single,
    "combo_seen0": split_gears.combo_seen0,
    "combo_seen1": split_gears.combo_seen1,
    "combo_seen2": split_gears.combo_seen2,
    "single": split_gears.single,
    "no_test": split_gears.no_test,
    "random": split_methods.random_conditions,
    "kfold": split_methods.kfold,
    "kfold_doubles": split_methods.kfold_doubles,
    "unseen_context": split_methods.unseen_context,
    "explicit": split_methods.explicit,
    "column": split_methods.column,
}
# Arguments as long as the data: the records say all that they do.
_NOT_KEPT = ("train", "val", "test", "values", "labels")


@dataclass(frozen=True)
class SplitRecord:
    """The part of one pair.

    Attributes
    ----------
    condition
        Canonical string; never control, which always trains.
    context
        Label of the context (``"stimulated"``, ``"A549|rep_1"``), or None for every context.
    part
        ``"train"``, ``"val"`` or ``"test"``.
    category
        ``"seen"`` for what trains; else what is new about it, such as ``"unseen_single"`` or ``"combo_seen1"``.
    """

    condition: str
    context: str | None
    part: Part
    category: str


@dataclass(frozen=True)
class Split:
    """The parts of all pairs of a data set.

    Attributes
    ----------
    name
        The method, a key of `METHODS`.
    seed
        What the draws were made with.
    records
        One for each pair in a part, sorted by condition and context.
    arguments
        The method's arguments, defaults included, as far as they are not lists of conditions.
    left_out
        The pairs of the data that the method puts in no part.
    """

    name: str
    seed: int
    records: tuple[SplitRecord, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[Pair, ...] = ()

    @cached_property
    def _record(self) -> dict[Pair, SplitRecord]:
        found: dict[Pair, SplitRecord] = {}
        for record in self.records:
            if (record.condition, record.context) in found:
                where = "" if record.context is None else f" in the context '{record.context}'"
                raise PerturbZooError(f"split '{self.name}' names '{record.condition}'{where} twice")
            found[record.condition, record.context] = record
        return found

    def _find(self, condition: Condition | str, context: str | None) -> SplitRecord | None:
        name = _canonical(condition)
        return self._record.get((name, context)) or self._record.get((name, None))

    def part_of(self, condition: Condition | str, context: str | None = None) -> Part | None:
        """Part of a pair; None where the split does not name it, ``"train"`` for control."""
        if record := self._find(condition, context):
            return record.part
        return "train" if _canonical(condition) == CONTROL else None

    def category_of(self, condition: Condition | str, context: str | None = None) -> str | None:
        """Category of a pair; None where the split does not name it (or for control)."""
        record = self._find(condition, context)
        return record.category if record else None

    def conditions(self, part: Part) -> list[str]:
        """Distinct conditions of a part, as canonical strings, sorted. With contexts, a condition can be in several."""
        return sorted({record.condition for record in self.records if record.part == part})

    def summary(self) -> str:
        """Table of how many pairs of each category are in each part, ``-`` where none is."""
        others = sorted({record.category for record in self.records} - set(CATEGORIES))
        lines = [f"split '{self.name}', seed {self.seed}: control and {len(self.conditions('train'))} conditions train"]
        width = max(map(len, (*CATEGORIES, *others)))
        lines.append(" ".join([" " * width, *(f"{part:>6}" for part in PARTS)]))
        for category in (*CATEGORIES, *others):
            counts = [sum((record.category, record.part) == (category, part) for record in self.records) for part in PARTS]
            lines.append(" ".join([category.ljust(width), *(f"{count or '-':>6}" for count in counts)]))
        if self.left_out:
            names = dict.fromkeys(condition for condition, _ in self.left_out)
            lines.append(f"in no part: {len(self.left_out)} ({shortened(names)})")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Write as JSON, one record on a line: short enough to be read and edited."""
        plain = {"schema": SCHEMA, "name": self.name, "seed": self.seed, "arguments": self.arguments}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in plain.items()]
        rows = {"left_out": [list(pair) for pair in self.left_out], "records": [_row(record) for record in self.records]}
        for key, values in rows.items():
            text = ",\n".join(f"  {json.dumps(value)}" for value in values)
            lines.append(f"{json.dumps(key)}: [\n{text}\n]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Split:
        """Read what `to_json` wrote; conditions may be spelled in any way that `parse_condition` reads.

        Raises
        ------
        PerturbZooError
            The text is no split, comes from a newer version, or names a pair twice.
        """
        try:
            plain = json.loads(text)
            schema = int(plain.get("schema", SCHEMA))
            if schema > SCHEMA:
                raise PerturbZooError(
                    f"the split has schema {schema}, this perturbzoo reads up to {SCHEMA}: upgrade perturbzoo"
                )
            records = [SplitRecord(str(parse_condition(row[0])), row[1], row[2], row[3]) for row in plain["records"]]
            left_out = tuple((str(parse_condition(row[0])), row[1]) for row in plain.get("left_out", ()))
            split = cls(
                name=str(plain.get("name", "explicit")),
                seed=int(plain.get("seed", 0)),
                records=tuple(sorted(records, key=lambda record: (record.condition, record.context or ""))),
                arguments=dict(plain.get("arguments", {})),
                left_out=left_out,
            )
        except PerturbZooError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise PerturbZooError(
                f"not a split ({type(error).__name__}: {str(error).splitlines()[0]}): it must be a JSON object with 'records', "
                "a list of [condition, context or null, part, category]"
            ) from error
        for record in split.records:
            texts = (record.category, "" if record.context is None else record.context)
            if record.part not in PARTS or not all(isinstance(text, str) for text in texts):
                row = json.dumps(_row(record))
                raise PerturbZooError(f"split: {row} is no [condition, context or null, train | val | test, category]")
        _ = split._record  # a pair that is named twice is an error here, not at the first look-up
        return split

    def save(self, path: str | Path) -> None:
        """Write as JSON. The file is whole or not there: a temporary one in the same folder is renamed.

        Raises
        ------
        PerturbZooError
            The file cannot be written.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            temporary.write_text(self.to_json(), encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise PerturbZooError(f"cannot write the split {target}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Split:
        """Read a file that `save` wrote.

        Raises
        ------
        PerturbZooError
            The file cannot be read or is no split.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text file"
            raise PerturbZooError(f"cannot read the split {path}: {reason}") from error
        try:
            return cls.from_json(text)
        except PerturbZooError as error:
            raise PerturbZooError(f"{path}: {error}") from error


def make_split(
    pairs: Sequence[tuple[Condition, str | None]], method: str = "simulation", seed: int = 1, **arguments: Any
) -> Split:
    """Divide the conditions of a data set.

    The order of `pairs` is of no consequence, and neither are duplicates nor control.

    Parameters
    ----------
    pairs
        The (condition, label of its context) pairs of the data; None as the label where there are no contexts.
    method
        A key of `METHODS`; each function there says what it does.
    seed
        0 to 2**32 - 1.
    arguments
        Those of the method, such as ``folds=5, fold=0``.

    Raises
    ------
    PerturbZooError
        The method or an argument does not exist, the data do not suit it, or nothing is left to train or to test on.
    """
    if method not in METHODS:
        raise PerturbZooError(f"no split method '{method}': there are {', '.join(METHODS)}{near_matches(method, METHODS)}")
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise PerturbZooError(f"split: seed must be a number from 0 to 2**32 - 1, not {seed!r}")
    targets = {str(condition): condition.targets for condition, _ in pairs if not condition.is_control}
    if not targets:
        raise PerturbZooError("nothing to split: the data hold no condition but control")
    data = SplitInput(
        rows=tuple((str(condition), context) for condition, context in pairs), targets=dict(sorted(targets.items()))
    )
    bound = _bind(method, arguments)
    assigned = METHODS[method](data, seed, **bound)
    found = {pair: assigned.get(pair) or assigned.get((pair[0], None)) for pair in data.pairs}
    records = _with_categories({pair: given for pair, given in found.items() if given}, data)
    parts = {record.part for record in records}
    for part, what in (("train", "train"), ("test", "test")):
        if part not in parts and not (part == "test" and method == "no_test"):
            raise PerturbZooError(
                f"split '{method}', seed {seed}: no condition is left to {what} on, of {len(targets)} in the data: "
                "change its arguments or its seed, or choose another method"
            )
    return Split(
        name=method,
        seed=int(seed),
        records=records,
        arguments={name: _plain(value) for name, value in bound.items() if name not in _NOT_KEPT},
        left_out=tuple(pair for pair, given in found.items() if not given),
    )


def _plain(value: Any) -> Any:
    """The value of an argument as JSON has it, so that a split equals itself after being saved and loaded."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, Integral) else value


def _canonical(condition: Condition | str) -> str:
    return str(condition if isinstance(condition, Condition) else parse_condition(condition))


def _row(record: SplitRecord) -> list[str | None]:
    return [record.condition, record.context, record.part, record.category]


def _bind(method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Complete the arguments of a method with its defaults, refusing what it does not take."""
    _, _, *parameters = inspect.signature(METHODS[method]).parameters.values()
    names = [parameter.name for parameter in parameters]
    for name in arguments:
        if name not in names:
            raise PerturbZooError(
                f"split '{method}' takes no argument '{name}', only {', '.join(names)}{near_matches(name, names)}"
            )
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise PerturbZooError(f"split '{method}' needs the argument '{parameter.name}'")
    return {parameter.name: arguments.get(parameter.name, parameter.default) for parameter in parameters}


def _with_categories(assigned: Assignment, data: SplitInput) -> tuple[SplitRecord, ...]:
    """Make the records; where the method names no category, say what is new compared to the pairs that train.

    A target is seen if any condition that trains names it. A condition that trains elsewhere is an ``unseen_context``
    if nothing trains in its context, else an ``unseen_pair``; new condition and new context are joined by ``+``.
    """
    trained = [pair for pair, (part, _) in assigned.items() if part == "train"]
    conditions, contexts = {condition for condition, _ in trained}, {context for _, context in trained}
    seen = {target for condition in conditions for target in data.targets[condition]}
    records = []
    for (condition, context), (part, category) in assigned.items():
        targets = data.targets[condition]
        if part == "train":
            category = SEEN
        elif category is None:
            new = [] if context in contexts else ["unseen_context"]
            if condition not in conditions:
                new.append(category_of(len(seen.intersection(targets)), len(targets)))
            category = "+".join(new) or "unseen_pair"
        records.append(SplitRecord(condition, context, part, category))
    return tuple(records)
