"""Properties that hold for every condition and every text: round trips, order invariance, clear refusals."""

from __future__ import annotations

import math
import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perturbzoo.errors import PerturbZooError
from perturbzoo.perturbation import (
    CONTROL_SPELLINGS,
    KINDS,
    Condition,
    Intervention,
    parse_condition,
    parse_condition_list,
    parse_conditions,
)

# Targets of every printable kind, with those that collide with the grammar made frequent.
TARGETS = st.one_of(
    st.sampled_from([*CONTROL_SPELLINGS, "CTRL", "A:activation", "chr1:1-2", "A@1", 'say "x"', "\\", '\\"', "(", "a,b"]),
    st.text(st.sampled_from(list('AB1 "\\+;:@[]~(),.-_e')), min_size=1, max_size=8),
    st.text(min_size=1, max_size=12),
).filter(lambda text: text.isprintable() and text == text.strip())
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def interventions(draw: st.DrawFn) -> Intervention:
    onset, offset = draw(
        st.one_of(
            st.just((0.0, math.inf)),
            st.tuples(FINITE, st.one_of(FINITE, st.just(math.inf))).filter(lambda window: window[0] < window[1]),
        )
    )
    return Intervention(
        target=draw(TARGETS),
        kind=draw(st.sampled_from([None, *KINDS])),
        dose=draw(st.one_of(st.just(1.0), st.floats(0, allow_nan=False, allow_infinity=False))),
        onset=onset,
        offset=offset,
        efficacy=draw(st.one_of(st.just(1.0), st.floats(0, 1))),
    )


ACTS = st.lists(interventions(), max_size=4, unique_by=lambda act: (act.target, act.kind, act.onset, act.offset))
# The first draw builds Hypothesis' table of all characters, which takes seconds where it is not cached.
PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
PIECES = [*'AB12"\\+;:@[]~(),.-_ eE\n\t', "ctrl", "NT", "inf", "nan", "uM", *KINDS, '"A"', "chr1:1-2", "[1,2]", "@.5", "~.5"]
LABELS = ["B", "ctrl", "A+ctrl", "ctrl+A", "control", "A+B", "B;A"]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=10).map("".join))


def check_one_line(error: PerturbZooError) -> None:
    assert len(str(error).splitlines()) == 1


@given(ACTS)
@PROPERTY
def test_canonical_string_reads_back(acts: list[Intervention]) -> None:
    condition = Condition(acts)
    assert parse_condition(str(condition)) == condition
    assert parse_condition_list(f"{condition},control,{condition}") == [condition, Condition(), condition]


@given(ACTS, st.randoms(use_true_random=False))
@PROPERTY
def test_order_does_not_matter(acts: list[Intervention], shuffler: random.Random) -> None:
    shuffled = list(acts)
    shuffler.shuffle(shuffled)
    first, second = Condition(acts), Condition(shuffled + acts)
    assert first == second
    assert hash(first) == hash(second)
    assert str(first) == str(second)
    written = "+".join(str(act) for act in shuffled) or "control"
    assert parse_condition(written) == first
    assert list(first) == sorted(acts)


@given(TEXTS, st.sampled_from([None, "_", ",", " ", "--"]))
@settings(PROPERTY, max_examples=1000)
def test_any_text_is_read_or_refused_in_one_line(text: str, separator: str | None) -> None:
    try:
        condition = parse_condition(text, separator=separator)
    except PerturbZooError as error:
        check_one_line(error)
    else:
        assert parse_condition(str(condition)) == condition


@given(st.text(max_size=20), st.one_of(st.text(max_size=8), st.floats(), st.none(), st.integers()))
@PROPERTY
def test_any_dose_is_read_or_refused_in_one_line(text: str, dose: object) -> None:
    try:
        condition = parse_condition(text, dose=dose)  # type: ignore[arg-type]
    except PerturbZooError as error:
        check_one_line(error)
    else:
        assert all(math.isfinite(act.dose) for act in condition)


@given(ACTS, ACTS)
@PROPERTY
def test_union_contains_both(left: list[Intervention], right: list[Intervention]) -> None:
    try:
        union = Condition(left) | Condition(right)
    except PerturbZooError:
        # The only reason to refuse: one target with the same kind and window, and another dose or efficacy.
        keys = [{(act.target, act.kind, act.onset, act.offset): act for act in acts} for acts in (left, right)]
        assert any(keys[0][key] != keys[1][key] for key in keys[0].keys() & keys[1].keys())
    else:
        assert set(union) == set(left) | set(right)


@given(st.lists(st.sampled_from(LABELS), max_size=30))
@PROPERTY
def test_column_equals_cell_by_cell(labels: list[str]) -> None:
    conditions, codes = parse_conditions(labels, kind="knockout")
    assert [conditions[code] for code in codes] == [parse_condition(label, kind="knockout") for label in labels]
    assert len(set(conditions)) == len(conditions)
    assert set(codes.tolist()) == set(range(len(conditions)))
