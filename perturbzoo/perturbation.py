"""What was done to a cell: `Intervention` and `Condition`, and the one place that reads and writes their strings.

The grammar, in the order in which the pieces of one intervention stand::

    condition     control  |  intervention + intervention + ...      (";" separates as "+" does)
    intervention  target :kind @dose [onset,offset] ~efficacy        (everything but the target may be left out)
    example       KLF1:activation@0.5[2,6]+CEBPA

A target is written bare where that is unambiguous (``HLA-A``, ``AC012345.1``, ``IFN-beta``, ``chr1:1000-2000``), else in
double quotes, with a backslash before a double quote or a backslash: ``"(+)-JQ1"``, and ``"CTRL"`` for the gene that is
spelled like a control. ``str`` of a condition is canonical: equal conditions have equal strings and
``parse_condition(str(c)) == c`` for every valid `c`.

This module knows nothing of data, models or tensors, and imports nothing heavy.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from perturbzoo.errors import PerturbZooError, near_matches

if TYPE_CHECKING:
    import numpy as np

KINDS = ("knockout", "interference", "activation", "overexpression", "clamp", "compound", "cytokine")

# In lower case; compared without regard to case. Vehicles (DMSO, PBS) are not here: whether they are the control is a
# fact about the experiment, said with `control_labels`.
CONTROL_SPELLINGS = ("control", "ctrl", "nt", "non-targeting", "non_targeting", "nontargeting", "negctrl", "unperturbed")

# Factor and divisor that bring a concentration to micromolar; two, because 9 / 1000 is 0.009 and 9 * 1e-3 is not.
_MICROMOLAR = {"nM": (1.0, 1000.0), "uM": (1.0, 1.0), "µM": (1.0, 1.0), "μM": (1.0, 1.0), "mM": (1000.0, 1.0)}

_UNSIGNED = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMBER = re.compile(rf"([+-]?(?:{_UNSIGNED}|inf))\s*({'|'.join(_MICROMOLAR)})?")
_QUOTED = r'"(?:[^"\\]|\\.)*"'
# A separator inside any of these does not separate: quotes, parentheses, a time window, a number such as @1e+5.
_PROTECTED = rf"{_QUOTED}|\([^()]*\)|\[[^\[\]]*\]|[@~]\s*{_UNSIGNED}"
# What is written without quotes. On reading, more passes than is ever written (spaces, "(17-DMAG)", chr1:1,000-2,000).
_BARE = re.compile(r'[^"\\+;:@~,()\[\]]+(?::[0-9]+-[0-9]+)?')
_ACT = re.compile(
    rf"(?P<name>{_QUOTED}|[^\":@~\[\]]*(?::[0-9,]+(?:-[0-9,]+)?)?)\s*"
    r"(?::(?P<kind>[^@\[~]*))?"
    r"(?:@(?P<dose>[^\[~]*))?"
    r"(?:\[(?P<onset>[^,\]]*),(?P<offset>[^,\]]*)\]\s*)?"
    r"(?:~(?P<efficacy>.*))?",
    re.DOTALL,
)


@functools.total_ordering
@dataclass(frozen=True, slots=True)
class Intervention:
    """One act on one target.

    Parameters
    ----------
    target
        Gene, genomic element, compound or cytokine: printable, no space at either end.
    kind
        One of `KINDS`, or None for the default kind of the data, which lives in the `DataSpec`.
    dose
        At least 0; 1 is the dose of the experiment where none was recorded. Compounds: micromolar, unless the data
        say otherwise throughout.
    onset, offset
        When the act begins and ends, in the time unit of the data; an offset of infinity means that it lasts.
    efficacy
        Fraction of the full effect that is reached, 0 to 1.

    Raises
    ------
    PerturbZooError
        Any of the above does not hold.
    """

    target: str
    kind: str | None = None
    dose: float = 1.0
    onset: float = 0.0
    offset: float = math.inf
    efficacy: float = 1.0

    def __post_init__(self) -> None:
        text = self.target
        if not isinstance(text, str) or not text or not text.isprintable() or text != text.strip():
            raise PerturbZooError(f"target {_show(text)} must be non-empty, printable text without spaces at its ends")
        if self.kind is not None:
            _check_kind(self.kind)
        for field in ("dose", "onset", "offset", "efficacy"):
            value = getattr(self, field)
            try:
                # Adding 0.0 turns -0.0 into 0.0: equal interventions must have equal strings.
                object.__setattr__(self, field, float(value) + 0.0)
            except (TypeError, ValueError, OverflowError):
                raise PerturbZooError(f"{field} of target {_show(self.target)} must be a number, not {_show(value)}") from None
        rules = (
            (math.isfinite(self.dose) and self.dose >= 0, f"dose {self.dose} must be finite and at least 0"),
            (math.isfinite(self.onset), f"onset {self.onset} must be finite"),
            (self.offset > self.onset, f"offset {self.offset} must be later than onset {self.onset}"),
            (0 <= self.efficacy <= 1, f"efficacy {self.efficacy} must lie between 0 and 1"),
        )
        for holds, message in rules:
            if not holds:
                raise PerturbZooError(f"target {_show(self.target)}: {message}")

    def _key(self) -> tuple[str, str, float, float, float, float]:
        return (self.target, self.kind or "", self.dose, self.onset, self.offset, self.efficacy)

    def __lt__(self, other: object) -> bool:
        # Not dataclass(order=True), which cannot compare a kind of None with a name.
        return self._key() < other._key() if isinstance(other, Intervention) else NotImplemented

    def __str__(self) -> str:
        """Canonical string; settings that have their default value are left out."""
        text = self.target
        if not _BARE.fullmatch(text) or text.lower() in CONTROL_SPELLINGS:
            text = '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
        if self.kind is not None:
            text += f":{self.kind}"
        if self.dose != 1:
            text += f"@{_number_text(self.dose)}"
        if (self.onset, self.offset) != (0, math.inf):
            text += f"[{_number_text(self.onset)},{'' if self.offset == math.inf else _number_text(self.offset)}]"
        if self.efficacy != 1:
            text += f"~{_number_text(self.efficacy)}"
        return text


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Condition:
    """A frozen, order-free set of interventions. The empty one is control, and false as an empty set is.

    Parameters
    ----------
    interventions
        Any number; kept as a sorted tuple. Exact duplicates collapse.

    Raises
    ------
    PerturbZooError
        A target comes twice with the same kind (None counts as its own) and window but another dose or efficacy.
    """

    interventions: tuple[Intervention, ...]

    def __init__(self, interventions: Iterable[Intervention] = ()) -> None:
        acts = tuple(interventions)
        for act in acts:
            if not isinstance(act, Intervention):
                raise PerturbZooError(f"Condition takes Interventions, not {_show(act)}; parse_condition reads text")
        object.__setattr__(self, "interventions", tuple(sorted(set(acts))))
        seen: dict[tuple[str, str | None, float, float], Intervention] = {}
        for act in self.interventions:
            other = seen.setdefault((act.target, act.kind, act.onset, act.offset), act)
            if other != act:
                raise PerturbZooError(f"{other} and {act} clash: one target twice needs two kinds or two time windows")

    @property
    def targets(self) -> tuple[str, ...]:
        """Distinct target names, sorted."""
        return tuple(dict.fromkeys(act.target for act in self.interventions))

    @property
    def is_control(self) -> bool:
        return not self.interventions

    def with_defaults(self, kind: str) -> Condition:
        """Return the condition with `kind` in place of every kind that is None."""
        _check_kind(kind)
        return Condition(replace(act, kind=kind) if act.kind is None else act for act in self.interventions)

    def __str__(self) -> str:
        return "+".join(map(str, self.interventions)) or "control"

    def __repr__(self) -> str:
        return f"Condition({str(self)!r})"

    def __len__(self) -> int:
        return len(self.interventions)

    def __iter__(self) -> Iterator[Intervention]:
        return iter(self.interventions)

    def __or__(self, other: Condition) -> Condition:
        """Both conditions at once."""
        return Condition(self.interventions + other.interventions) if isinstance(other, Condition) else NotImplemented


def parse_condition(
    text: str,
    *,
    separator: str | None = None,
    dose: float | str | None = None,
    kind: str | None = None,
    control_labels: str | Collection[str] = (),
) -> Condition:
    """Read one condition: the canonical string, or a spelling found in public data.

    ``control``, ``ctrl``, ``NT``, ``non-targeting`` (any case) are control, and add nothing beside a target:
    ``A+ctrl`` and ``ctrl+A`` are ``A``. ``A+B`` and ``A;B`` are combinations; ``A_B`` is one target unless
    ``separator="_"``. Parentheses and the window's brackets protect a separator inside them. A dose may carry ``nM``,
    ``uM`` (or µM) or ``mM`` and is then converted to micromolar: ``JQ1@500nM`` is ``JQ1@0.5``; a plain number is taken
    as it stands.

    Parameters
    ----------
    text
        What to read; the module's docstring has the grammar.
    separator
        A further separator, beside ``+`` and ``;``. Canonical strings are read without one.
    dose
        Dose from a column of its own: a number, or text with one dose per target, separated like the targets
        (``"10;0.5"``). GEARS' ``"1+1"`` beside ``A+ctrl`` counts the control too; its dose, like that of any control,
        is not looked at, so it may be missing. A dose of 0 gives the intervention at dose 0, not control: control is
        what the label says it is.
    kind
        Kind of the interventions that spell none out; default None, the data's own.
    control_labels
        Further spellings of control, for example ``["DMSO"]``; compared without regard to case.

    Raises
    ------
    PerturbZooError
        The text cannot be read; nothing else is raised, whatever the text.
    """
    if kind is not None:
        _check_kind(kind)
    if separator is not None and (not separator or re.search(r'["\\:@~()\[\]]', separator)):
        raise PerturbZooError(f'separator {separator!r} must be non-empty and hold none of " \\ : @ ~ ( ) [ ]')
    separators = ("+", ";") if separator is None else (separator, "+", ";")
    labels = [control_labels] if isinstance(control_labels, str) else control_labels
    controls = {str(label).strip().lower() for label in (*CONTROL_SPELLINGS, *labels)}
    if not isinstance(text, str):
        raise PerturbZooError(f"a condition must be text such as 'KLF1+CEBPA' or 'control', not {_show(text)}")
    if text.strip().lower() in controls:
        return Condition()
    try:
        parts = _split(text, separators)
        named = [part.lower() not in controls for part in parts]
        doses = [None] * len(parts) if dose is None else _doses_of_parts(str(dose), separators, named)
        return Condition(
            _parse_act(part, given, kind, controls)
            for part, given, is_target in zip(parts, doses, named, strict=True)
            if is_target
        )
    except PerturbZooError as error:
        raise PerturbZooError(f"condition {_show(text)}: {error}") from None


def parse_condition_list(text: str, *, separator: str | None = None, control_labels: Collection[str] = ()) -> list[Condition]:
    """Read conditions separated by commas, ``KLF1+CEBPA,SET[2,6]``: a comma in a window or in quotes does not count."""
    return [parse_condition(part, separator=separator, control_labels=control_labels) for part in _split(text, (",",))]


def parse_conditions(
    labels: Sequence[str],
    *,
    doses: Sequence[float] | Sequence[str] | None = None,
    separator: str | None = None,
    kind: str | None = None,
    control_labels: str | Collection[str] = (),
) -> tuple[list[Condition], np.ndarray]:
    """Read a whole column, each distinct label (with its dose) once.

    Parameters
    ----------
    labels
        One label per cell: list, array, or pandas Series, categorical or not.
    doses
        One dose per cell, or None. Other parameters as in `parse_condition`.

    Returns
    -------
    conditions
        The C distinct conditions, control first, then by canonical string, whatever the order of the cells.
    codes
        Shape ``(cells,)``, int64: each cell's index into `conditions`.

    Raises
    ------
    PerturbZooError
        Labels are missing, or one cannot be read: says which, in how many cells, and how many others there are.
    """
    # Here, not above: the command line's help imports this module and has no time for pandas.
    import numpy as np
    import pandas as pd

    read = functools.partial(parse_condition, separator=separator, kind=kind, control_labels=control_labels)
    read("control")  # so that a wrong option is not blamed on a label
    label_codes, label_levels = pd.factorize(pd.Series(labels))
    cells = len(label_codes)
    if missing := int((label_codes < 0).sum()):
        raise PerturbZooError(f"{missing} of {cells} cells have no condition label (missing value); label or drop them")
    if doses is not None and len(doses) != cells:
        raise PerturbZooError(f"{cells} condition labels but {len(doses)} doses; give one per cell")
    dose_codes, dose_levels = pd.factorize(pd.Series(np.zeros(cells) if doses is None else doses), use_na_sentinel=False)
    keys, key_of_cell = np.unique(label_codes * len(dose_levels) + dose_codes, return_inverse=True)
    parsed: list[Condition] = []
    failures: list[str] = []
    for key, count in zip(keys.tolist(), np.bincount(key_of_cell, minlength=len(keys)).tolist(), strict=True):
        label, dose = divmod(key, len(dose_levels))
        try:
            parsed.append(read(label_levels[label], dose=None if doses is None else dose_levels[dose]))
        except PerturbZooError as error:
            failures.append(f"{error} ({count} of {cells} cells)")
    if failures:
        more = f"; other unreadable labels: {len(failures) - 1}" if len(failures) > 1 else ""
        raise PerturbZooError(failures[0] + more)
    conditions = sorted(set(parsed), key=lambda condition: (len(condition) > 0, str(condition)))
    position = {condition: index for index, condition in enumerate(conditions)}
    return conditions, np.array([position[condition] for condition in parsed], dtype=np.int64)[key_of_cell]


def _parse_act(part: str, dose: str | None, kind: str | None, controls: Collection[str]) -> Intervention:
    """Read ``target:kind@dose[onset,offset]~efficacy``; `dose` and `kind` come from outside the text."""
    match = _ACT.fullmatch(part)
    if not match:
        form = "target:kind@dose[onset,offset]~efficacy"
        raise PerturbZooError(f"cannot read {_show(part)}: write {form}, and an unusual target in double quotes")
    name, own_kind, own_dose = match["name"].strip(), match["kind"], match["dose"]
    if name.startswith('"'):
        name = re.sub(r"\\(.)", r"\1", name[1:-1], flags=re.DOTALL)
    elif name.lower() in controls:
        raise PerturbZooError(f'control takes no settings; if {_show(name)} is a target, write it as "{name}"')
    elif name.count("(") != name.count(")") or re.search(r"(?<![0-9]),|,(?![0-9])", name):
        problem = f"{_show(name)} holds a comma or half a pair of parentheses"
        raise PerturbZooError(f"{problem}: write the target in double quotes, or name the separator of the targets")
    if not name:
        raise PerturbZooError("a target is missing; write 'control' for no perturbation, and 'A+B' for two targets")
    if own_kind is not None:
        kind = own_kind.strip()
        _check_kind(kind, "; a target with a colon in its name is written in double quotes")
    if dose is not None and own_dose is not None:
        raise PerturbZooError(f"the dose of {_show(name)} is given twice, in the label and beside it")
    dose = own_dose if dose is None else dose
    onset, offset = (match["onset"] or "").strip(), (match["offset"] or "").strip()
    return Intervention(
        target=name,
        kind=kind,
        dose=1.0 if dose is None else _number(dose, "dose", concentration=True),
        onset=_number(onset, "onset") if onset else 0.0,
        offset=_number(offset, "offset") if offset else math.inf,
        efficacy=1.0 if match["efficacy"] is None else _number(match["efficacy"], "efficacy"),
    )


def _split(text: str, separators: Sequence[str]) -> list[str]:
    """Cut at the separators that nothing protects, and strip the pieces."""
    cut = "|".join(map(re.escape, separators))
    parts = [""]
    for match in re.finditer(rf"(?:{_PROTECTED})|({cut})|.", text, re.DOTALL):
        if match[1] is None:
            parts[-1] += match[0]
        else:
            parts.append("")
    return [part.strip() for part in parts]


def _doses_of_parts(dose: str, separators: Sequence[str], named: Sequence[bool]) -> list[str | None]:
    """Give each part of a label its dose; `named` tells the targets from the controls beside them."""
    doses = re.split(rf"(?<![eE])(?:{'|'.join(map(re.escape, separators))})", dose)
    if len(doses) == len(named):
        return [*doses]
    if len(doses) != sum(named):
        raise PerturbZooError(f"dose {_show(dose)} holds {len(doses)} for {sum(named)} targets; give one each, as '1+0.5'")
    remaining = iter(doses)
    return [next(remaining) if is_target else None for is_target in named]


def _number(text: str, what: str, concentration: bool = False) -> float:
    match = _NUMBER.fullmatch(text.strip())
    if not match or (match[2] and not concentration):
        unit = ", optionally with nM, uM or mM" if concentration else ""
        raise PerturbZooError(f"{what} {_show(text.strip())} is not a number{unit}")
    factor, divisor = _MICROMOLAR[match[2] or "uM"]
    return float(match[1]) * factor / divisor


def _number_text(value: float) -> str:
    """Shortest text that reads back as the same number, without the plus sign of 1e+16."""
    return repr(value).removesuffix(".0").replace("e+", "e")


def _check_kind(kind: str, hint: str = "") -> None:
    if kind not in KINDS:
        near = near_matches(kind, KINDS) if isinstance(kind, str) else ""
        raise PerturbZooError(f"{_show(kind)} is not a kind of intervention ({', '.join(KINDS)}){hint}{near}")


def _show(text: object) -> str:
    """Quote what the user gave on one line, cut where it is long."""
    shown = repr(text) if isinstance(text, str) else " ".join(repr(text).split())
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
