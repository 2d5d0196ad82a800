"""The grammar of conditions: the spellings of public files, the canonical string, and every message."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from perturbzoo.errors import PerturbZooError
from perturbzoo.perturbation import (
    Condition,
    Intervention,
    parse_condition,
    parse_condition_list,
    parse_conditions,
)


def one(target: str, kind: str | None = None, **settings: float) -> Condition:
    return Condition([Intervention(target, kind, **settings)])


def both(*targets: str) -> Condition:
    return Condition(Intervention(target) for target in targets)


def check_one_line(error: PerturbZooError) -> None:
    assert len(str(error).splitlines()) == 1


# Reading


@pytest.mark.parametrize("text", ["control", "ctrl", "NT", "nt", "Non-Targeting", "non_targeting", "nontargeting"])
def test_control_spellings(text: str) -> None:
    for written in (text, f" {text} ", f"{text}+ctrl", f"{text};{text}"):
        assert parse_condition(written).is_control
    assert parse_condition(f"A+{text}") == parse_condition(f"{text}+A") == one("A")


@pytest.mark.parametrize("text", ["NegCtrl", "unperturbed", "CONTROL"])
def test_further_control_spellings(text: str) -> None:
    assert parse_condition(text) == Condition()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", one("A")),
        (" A ", one("A")),
        ("A+B", both("A", "B")),
        ("A;B", both("B", "A")),
        ("A + B ; C", both("A", "B", "C")),
        ("A+A", one("A")),
        ("A_B", one("A_B")),
        ("HLA-A", one("HLA-A")),
        ("NKX2-1+HLA-A", both("HLA-A", "NKX2-1")),
        ("AC012345.1", one("AC012345.1")),
        ("IFN-beta", one("IFN-beta")),
        ("DMSO", one("DMSO")),
        ("chr1.11202125_top_two+CITED2_TSS", both("CITED2_TSS", "chr1.11202125_top_two")),
        ("chr1:1000-2000", one("chr1:1000-2000")),
        ("chr1:1,000-2,000", one("chr1:1,000-2,000")),
        ("X:155701", one("X:155701")),
        ("chr1:1000-2000:interference", one("chr1:1000-2000", "interference")),
        ("A:activation", one("A", "activation")),
        ("A : activation @ 2 [ 1 , 3 ] ~ .5", one("A", "activation", dose=2, onset=1, offset=3, efficacy=0.5)),
        ("A[2,6]", one("A", onset=2, offset=6)),
        ("A[2,]", one("A", onset=2)),
        ("A[,6]", one("A", offset=6)),
        ("A[,]", one("A")),
        ("A[-1.5,inf]", one("A", onset=-1.5)),
        ("A~0.8", one("A", efficacy=0.8)),
        ("A@0", one("A", dose=0)),
        ("A@1e+3+B", Condition([Intervention("A", dose=1000), Intervention("B")])),
        ("A@1+2B", both("A", "2B")),
        ("JQ1@500nM", one("JQ1", dose=0.5)),
        ("JQ1@9nM", one("JQ1", dose=0.009)),
        ("JQ1@10uM", one("JQ1", dose=10)),
        ("JQ1@10 µM", one("JQ1", dose=10)),
        ("JQ1@10μM", one("JQ1", dose=10)),
        ("JQ1@0.25mM", one("JQ1", dose=250)),
        ("(+)-JQ1", one("(+)-JQ1")),
        ('"(+)-JQ1"@2', one("(+)-JQ1", dose=2)),
        ("(+)-JQ1+(-)-JQ1", both("(+)-JQ1", "(-)-JQ1")),
        ("Alvespimycin (17-DMAG) HCl", one("Alvespimycin (17-DMAG) HCl")),
        ("2,4-DNP", one("2,4-DNP")),
        ('"CTRL"', one("CTRL")),
        ('"CTRL":knockout+control', one("CTRL", "knockout")),
        (r'"5\"-X\\Y"', one('5"-X\\Y')),
        (
            "KLF1:activation@0.5[2,6]+CEBPA",
            Condition([Intervention("CEBPA"), Intervention("KLF1", "activation", 0.5, 2, 6)]),
        ),
        ("A:knockout+A:activation[4,]", Condition([Intervention("A", "knockout"), Intervention("A", "activation", onset=4)])),
        ("A[0,1]+A@2[3,4]", Condition([Intervention("A", offset=1), Intervention("A", None, 2, 3, 4)])),
    ],
)
def test_reads(text: str, expected: Condition) -> None:
    assert parse_condition(text) == expected
    assert parse_condition(str(expected)) == expected


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        (Condition(), "control"),
        (both("B", "A"), "A+B"),
        (one("HLA-A"), "HLA-A"),
        (one("Tubastatin A"), "Tubastatin A"),
        (one("A", "compound", dose=10.0), "A:compound@10"),
        (one("A", dose=0.1), "A@0.1"),
        (one("A", dose=1e16), "A@1e16"),
        (one("A", dose=np.float64(0.5)), "A@0.5"),
        (one("A", offset=6), "A[0,6]"),
        (one("A", onset=-0.0, offset=6), "A[0,6]"),
        (one("A", onset=2), "A[2,]"),
        (one("A", "knockout", dose=2, onset=2, offset=6.5, efficacy=0.8), "A:knockout@2[2,6.5]~0.8"),
        (one("(+)-JQ1"), '"(+)-JQ1"'),
        (one("control"), '"control"'),
        (one('a"b\\c'), r'"a\"b\\c"'),
        (one("chr1:1000-2000"), "chr1:1000-2000"),
        (one("A:activation"), '"A:activation"'),
        (one("a,b"), '"a,b"'),
    ],
)
def test_writes(condition: Condition, text: str) -> None:
    assert str(condition) == text
    assert repr(condition) == f"Condition({text!r})"


@pytest.mark.parametrize(("separator", "text"), [("_", "A_B"), ("|", "A | B"), (",", "A,B"), ("__", "A__B"), ("_", "A+B_A")])
def test_separator(separator: str, text: str) -> None:
    assert parse_condition(text, separator=separator) == both("A", "B")


def test_separator_leaves_control_spellings_windows_and_numbers_alone() -> None:
    assert parse_condition("non_targeting", separator="_").is_control
    assert parse_condition("A[2,6],B", separator=",") == one("A", onset=2, offset=6) | one("B")
    assert parse_condition("A@1e-3-B", separator="-") == one("A", dose=1e-3) | one("B")


def test_control_labels() -> None:
    assert parse_condition("dmso", control_labels=["DMSO"]).is_control
    assert parse_condition("dmso", control_labels="DMSO").is_control
    assert parse_condition("JQ1+DMSO", control_labels=["DMSO"]) == one("JQ1")
    assert parse_condition("Neg_0+Neg_1", control_labels=["Neg_0+Neg_1"]).is_control
    assert parse_condition("ctrl", control_labels=["DMSO"]).is_control


@pytest.mark.parametrize(
    ("text", "dose", "expected"),
    [
        ("A", 0.5, one("A", dose=0.5)),
        ("A", 0, one("A", dose=0)),
        ("A", np.float32(0.1), one("A", dose=0.1)),
        ("A", "100 nM", one("A", dose=0.1)),
        ("A", 1e16, one("A", dose=1e16)),
        ("A+ctrl", "1+1", one("A")),
        ("A+ctrl", "2+nan", one("A", dose=2)),
        ("ctrl+A", "1+2", one("A", dose=2)),
        ("A+ctrl", 2, one("A", dose=2)),
        ("B+A", "10;0.5", one("B", dose=10) | one("A", dose=0.5)),
        ("A+B+C", "1+1+1", both("A", "B", "C")),
        ("control", float("nan"), Condition()),
        ("ctrl", "1", Condition()),
    ],
)
def test_dose_column(text: str, dose: float | str, expected: Condition) -> None:
    assert parse_condition(text, dose=dose) == expected


def test_dose_column_with_separator() -> None:
    assert parse_condition("A_B", dose="1_2", separator="_") == one("A") | one("B", dose=2)


def test_kind_fills_what_is_not_spelled_out() -> None:
    expected = Condition([Intervention("A", "knockout"), Intervention("B", "activation")])
    assert parse_condition("A+B:activation", kind="knockout") == expected
    assert parse_condition("A+B:activation").with_defaults("knockout") == expected
    assert Condition().with_defaults("knockout") == Condition()


def test_condition_is_a_small_frozen_set() -> None:
    condition = parse_condition("B+A:knockout+A:activation[2,]")
    assert condition.targets == ("A", "B")
    assert len(condition) == 3
    assert not condition.is_control
    assert Condition().is_control
    assert {condition: 1}[parse_condition("A:activation[2,]+A:knockout+B")] == 1
    assert pickle.loads(pickle.dumps(condition)) == copy.deepcopy(condition) == condition
    with pytest.raises(AttributeError):
        condition.interventions = ()  # type: ignore[misc]


def test_interventions_are_ordered() -> None:
    acts = [Intervention("A"), Intervention("A", "activation"), Intervention("A", "activation", 2.0), Intervention("B")]
    assert sorted([acts[2], acts[3], acts[1], acts[0]]) == acts
    assert acts[0] <= acts[1] < acts[2]
    with pytest.raises(TypeError):
        acts[0] < 1  # noqa: B015


# Refusing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": ""}, "target '' must be non-empty, printable text"),
        ({"target": None}, "target None must be non-empty, printable text"),
        ({"target": " A"}, "target ' A' must be .* without spaces at its ends"),
        ({"target": "A\n"}, r"target 'A\\n' must be"),
        ({"target": "A\x00B"}, r"target 'A\\x00B' must be"),
        ({"kind": "knokout"}, "'knokout' is not a kind of intervention .*; did you mean 'knockout'"),
        ({"kind": 3}, "3 is not a kind"),
        ({"dose": -1}, "target 'A': dose -1.0 must be finite and at least 0"),
        ({"dose": math.inf}, "dose inf must be finite"),
        ({"dose": math.nan}, "dose nan must be finite"),
        ({"dose": "much"}, "dose of target 'A' must be a number, not 'much'"),
        ({"efficacy": None}, "efficacy of target 'A' must be a number, not None"),
        ({"onset": -math.inf}, "onset -inf must be finite"),
        ({"onset": math.nan}, "onset nan must be finite"),
        ({"onset": 2, "offset": 2}, "offset 2.0 must be later than onset 2.0"),
        ({"offset": math.nan}, "offset nan must be later than onset 0.0"),
        ({"efficacy": 1.01}, "efficacy 1.01 must lie between 0 and 1"),
        ({"efficacy": -0.1}, "efficacy -0.1 must lie"),
        ({"efficacy": math.nan}, "efficacy nan must lie"),
    ],
)
def test_intervention_refuses(settings: dict, message: str) -> None:
    with pytest.raises(PerturbZooError, match=message) as error:
        Intervention(**{"target": "A", **settings})
    check_one_line(error.value)


def test_condition_refuses() -> None:
    with pytest.raises(PerturbZooError, match="A and A@2 clash: one target twice needs two kinds or two time windows"):
        Condition([Intervention("A", dose=2), Intervention("A")])
    with pytest.raises(PerturbZooError, match="takes Interventions, not 'A'; parse_condition reads text"):
        Condition("A")  # type: ignore[arg-type]
    with pytest.raises(PerturbZooError, match="'ko' is not a kind"):
        one("A").with_defaults("ko")
    with pytest.raises(PerturbZooError, match="clash"):
        parse_condition("A+A:knockout~0.5").with_defaults("knockout")
    with pytest.raises(TypeError):
        one("A") | "B"  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "condition '': a target is missing; write 'control'"),
        ("A+", r"condition 'A\+': a target is missing"),
        ("A++B", "a target is missing"),
        (":activation", "a target is missing"),
        ("@2", "a target is missing"),
        ('""', "a target is missing"),
        ("A:knokout", "condition 'A:knokout': 'knokout' is not a kind of intervention .*did you mean 'knockout'"),
        ("KLF1:CEBPA", "'CEBPA' is not a kind .*a target with a colon in its name is written in double quotes$"),
        ("A:", "'' is not a kind"),
        ('"A":ko', "'ko' is not a kind"),
        ("A:x:activation", "'x:activation' is not a kind"),
        ("control:knockout", "control takes no settings; if 'control' is a target, write it as \"control\""),
        ("A+CTRL@2", "control takes no settings; if 'CTRL' is a target"),
        ("A,B", "'A,B' holds a comma or half a pair of parentheses: .*double quotes, or name the separator"),
        ("(A+B", r"'\(A' holds a comma or half a pair"),
        ("A[2]", r"cannot read 'A\[2\]': write target:kind@dose\[onset,offset\]~efficacy"),
        ("A]", "cannot read"),
        ('"A', "cannot read"),
        ('"A"B', "cannot read"),
        ('5"-X', "cannot read"),
        ("A[1,2]@3", "cannot read"),
        ("A@x", "dose 'x' is not a number, optionally with nM, uM or mM"),
        ("A@", "dose '' is not a number"),
        ("A@nan", "dose 'nan' is not a number"),
        ("A@1_0", "dose '1_0' is not a number"),
        ("A@10um", "dose '10um' is not a number"),
        ("A@0.5:activation", "dose '0.5:activation' is not a number"),
        ("A@-1", "condition 'A@-1': target 'A': dose -1.0 must be finite and at least 0"),
        ("A@1e999", "dose inf must be finite"),
        ("A[x,2]", "onset 'x' is not a number$"),
        ("A[1,2nM]", "offset '2nM' is not a number$"),
        ("A[6,2]", "offset 2.0 must be later than onset 6.0"),
        ("A~", "efficacy '' is not a number$"),
        ("A~2", "efficacy 2.0 must lie between 0 and 1"),
        ("A+A@2", "A and A@2 clash"),
        ("A\nB", r"condition 'A\\nB': target 'A\\nB' must be non-empty, printable text"),
        ("A" * 200 + "+", r"condition 'A{76}\.\.\.: a target is missing"),
    ],
)
def test_text_refused(text: str, message: str) -> None:
    with pytest.raises(PerturbZooError, match=message) as error:
        parse_condition(text)
    check_one_line(error.value)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, "a condition must be text such as 'KLF1[+]CEBPA' or 'control', not None"),
        (math.nan, {}, "must be text .* not nan"),
        ("A", {"kind": "crispri"}, "^'crispri' is not a kind"),
        ("A", {"separator": ""}, "separator '' must be non-empty and hold none of"),
        ("A", {"separator": "@"}, "separator '@' must be"),
        ("A+B", {"dose": 1.0}, "dose '1.0' holds 1 for 2 targets; give one each, as '1[+]0.5'"),
        ("A", {"dose": "1+1+1"}, "holds 3 for 1 targets"),
        ("A", {"dose": math.nan}, "condition 'A': dose 'nan' is not a number"),
        ("A+B", {"dose": "1+high"}, "dose 'high' is not a number"),
        ("A@2", {"dose": 2}, "the dose of 'A' is given twice, in the label and beside it"),
        ("A", {"dose": -2}, "dose -2.0 must be finite and at least 0"),
    ],
)
def test_options_refused(text: str, options: dict, message: str) -> None:
    with pytest.raises(PerturbZooError, match=message):
        parse_condition(text, **options)


# Columns

COLUMN = ["B", "ctrl", "A+ctrl", "ctrl+A", "control", "A+B", "B;A"]


@pytest.mark.parametrize("make", [list, np.array, pd.Series, pd.Categorical, lambda x: pd.Series(x, dtype="category")])
def test_column(make: object) -> None:
    conditions, codes = parse_conditions(make(COLUMN))  # type: ignore[operator]
    assert [str(condition) for condition in conditions] == ["control", "A", "A+B", "B"]
    assert codes.tolist() == [3, 0, 1, 1, 0, 2, 2]
    assert codes.dtype == np.int64


def test_column_with_doses_and_options() -> None:
    labels, doses = ["JQ1", "DMSO", "JQ1", "JQ1_TSA", "JQ1"], ["1", np.nan, "0.1", "1_2", "1.0"]
    conditions, codes = parse_conditions(labels, doses=doses, separator="_", kind="compound", control_labels=["dmso"])
    assert [str(conditions[code]) for code in codes] == [
        "JQ1:compound",
        "control",
        "JQ1:compound@0.1",
        "JQ1:compound+TSA:compound@2",
        "JQ1:compound",
    ]
    assert len(conditions) == 4
    numeric = parse_conditions(["A", "A", "ctrl"], doses=np.array([0.1, 2, np.nan], dtype=np.float32))
    assert [str(condition) for condition in numeric[0]] == ["control", "A@0.1", "A@2"]


def test_column_refused() -> None:
    with pytest.raises(PerturbZooError, match=r"condition 'A:ko': .* \(3 of 5 cells\); other unreadable labels: 1$"):
        parse_conditions(["A:ko", "B", "A:ko", "A:ko", "B@x"])
    with pytest.raises(PerturbZooError, match=r"2 of 3 cells have no condition label \(missing value\)"):
        parse_conditions(["A", None, np.nan])
    with pytest.raises(PerturbZooError, match="2 condition labels but 1 doses; give one per cell"):
        parse_conditions(["A", "B"], doses=[1.0])
    with pytest.raises(PerturbZooError, match=r"must be text .* not .*3.* \(2 of 2 cells\)"):
        parse_conditions([3, 3])
    with pytest.raises(PerturbZooError, match=r"^'ko' is not a kind"):
        parse_conditions(["A"], kind="ko")
    with pytest.raises(PerturbZooError, match=r"dose 'nan' is not a number.* \(1 of 2 cells\)"):
        parse_conditions(["A", "A"], doses=[1.0, np.nan])


def test_list_of_conditions() -> None:
    assert parse_condition_list('KLF1[2,6]+CEBPA, SET ,"a,b"') == [
        one("KLF1", onset=2, offset=6) | one("CEBPA"),
        one("SET"),
        one("a,b"),
    ]
    with pytest.raises(PerturbZooError, match="a target is missing"):
        parse_condition_list("A,,B")


def test_import_is_light() -> None:
    code = "import sys, perturbzoo.perturbation; print(*sorted({'numpy', 'pandas', 'torch', 'scipy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
