"""Splits: the published definitions on hand-worked examples, the lists of cell-gears, invariances, round trips, bad input."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbzoo.data.splits import CATEGORIES, METHODS, Split, SplitRecord, make_split
from perturbzoo.errors import PerturbZooError
from perturbzoo.perturbation import Condition, parse_condition

# Printed by cell-gears' own splitter; the file says with which command.
FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "gears_splits.json").read_text(encoding="utf-8"))

SINGLES = [f"G{number:02}" for number in range(12)]  # padded, so that A+B of increasing numbers is canonical
DOUBLES = [f"{first}+{second}" for first, second in list(combinations(SINGLES, 2))[::4]]
OVER_CONDITIONS = ["simulation", "combo_seen0", "combo_seen1", "combo_seen2", "single", "random", "kfold", "kfold_doubles"]


def pairs_of(conditions: list[str], contexts: tuple[str | None, ...] = (None,)) -> list[tuple[Condition, str | None]]:
    return [(parse_condition(condition), context) for condition in conditions for context in contexts]


def targets_of(conditions: list[str]) -> set[str]:
    return {target for condition in conditions for target in parse_condition(condition).targets}


def in_category(split: Split, part: str, category: str) -> list[str]:
    return [record.condition for record in split.records if (record.part, record.category) == (part, category)]


# ---------------------------------------------------------------------- cell-gears


@pytest.mark.parametrize(
    "case", FIXTURE["cases"], ids=lambda case: f"{case['input']}-{case['method']}-{case['seed']}".replace(" ", "_")
)
def test_same_lists_as_cell_gears(case):
    given_input = FIXTURE["inputs"][case["input"]]
    labels = given_input["labels"]
    arguments = {"labels": labels} if given_input["labels_given"] else {}
    pairs = [(parse_condition(label), None) for label in labels]
    expected = case["lists"]
    if "test" not in expected and case["method"] != "no_test":
        with pytest.raises(PerturbZooError, match="no condition is left to test on"):
            make_split(pairs, case["method"], case["seed"], **arguments)
        return
    split = make_split(pairs, case["method"], case["seed"], **arguments)
    assert split.conditions("val") == expected.get("val", [])
    assert split.conditions("test") == expected.get("test", [])
    assert [condition for condition, _ in split.left_out] == case["in no part"]
    held = {*split.conditions("val"), *split.conditions("test"), *case["in no part"]}
    assert set(split.conditions("train")) == {str(condition) for condition, _ in pairs} - held
    assert len(split.conditions("train")) == case["train"]
    if case["method"] == "simulation":
        for part in ("val", "test"):
            for category in CATEGORIES[1:]:
                assert in_category(split, part, category) == expected.get(f"{part} {category}", [])


def test_fixture_covers_what_is_promised():
    cases = {(case["input"], case["method"]) for case in FIXTURE["cases"]}
    seeds = Counter((case["input"], case["method"]) for case in FIXTURE["cases"])
    assert set(seeds.values()) == {5}
    for method in ("simulation", "combo_seen0", "combo_seen1", "combo_seen2", "single", "no_test"):
        assert {("canonical", method), ("as in a file", method)} <= cases
    assert ("singles", "simulation_single") in cases


def test_published_composition_of_the_norman_screen():
    """The notebook of the GEARS authors prints 9, 52 and 18 unseen combinations for seed 1 of the whole screen."""
    if not os.environ.get("PERTURBZOO_DATA"):
        pytest.skip("PERTURBZOO_DATA is not set: the list of the 236 conditions of Norman 2019 is there")
    import pandas as pd

    name = "scperturb_pairwise_edist_NormanWeissman2019_filtered.csv.gz"
    labels = pd.read_csv(Path(os.environ["PERTURBZOO_DATA"]) / "tables" / name, index_col=0, usecols=[0]).index
    split = make_split([(parse_condition(label, separator="_"), None) for label in labels], "simulation", 1)
    sizes = [len(in_category(split, "test", f"combo_seen{seen}")) for seen in (0, 1, 2)]
    assert sizes == [9, 52, 18]


# ---------------------------------------------------------------------- definitions


@pytest.mark.parametrize("seed", range(1, 6))
def test_simulation_holds_out_targets(seed):
    split = make_split(pairs_of(SINGLES + DOUBLES), "simulation", seed)
    trained = targets_of(split.conditions("train")) | targets_of(split.conditions("val"))
    unseen = set(in_category(split, "test", "unseen_single"))
    assert len(unseen) == 3  # 12 targets, of which int(12 * .75) are seen
    assert not unseen & trained
    for category, seen in (("combo_seen0", 0), ("combo_seen1", 1), ("combo_seen2", 2)):
        members = in_category(split, "test", category)
        assert all(len(targets_of([member]) - unseen) == seen for member in members)
    composable = [double for double in DOUBLES if not targets_of([double]) & unseen]
    assert len(in_category(split, "test", "combo_seen2")) == len(composable) - int(0.75 * len(composable))


@pytest.mark.parametrize("seed", range(1, 6))
def test_simulation_of_triples(seed):
    triples = [f"{a}+{b}+{c}" for a, b, c in list(combinations(SINGLES, 3))[::11]]
    with_triples = make_split(pairs_of(SINGLES + DOUBLES + triples), "simulation", seed)
    without = make_split(pairs_of(SINGLES + DOUBLES), "simulation", seed)
    unseen = set(in_category(with_triples, "test", "unseen_single"))
    assert {r for r in with_triples.records if r.condition not in triples} == set(without.records)
    for record in with_triples.records:
        if record.condition in triples and record.part == "test":
            seen = 3 - len(targets_of([record.condition]) & unseen)
            assert record.category == f"combo_seen{seen}_of_3"


def test_categories_of_other_methods():
    conditions = ["A", "B", "A+B", "E+F", "C", "A+C", "C+D", "B+E", "A+B+C", "C+D+G", "A@2", "E", "F:activation"]
    split = make_split(pairs_of(conditions), "explicit", train=["A", "B", "A+B", "E+F"], test=conditions[4:])
    expected = {
        "A": "seen",
        "C": "unseen_single",
        "A+C": "combo_seen1",
        "C+D": "combo_seen0",
        "B+E": "combo_seen2",  # E trains, in a combination
        "A+B+C": "combo_seen2_of_3",
        "C+D+G": "combo_seen0_of_3",
        "A@2": "seen_target",
        "E": "seen_target",
        "F:activation": "seen_target",
    }
    assert {condition: split.category_of(condition) for condition in expected} == expected


@pytest.mark.parametrize("seed", range(1, 6))
def test_mixed_combinations_are_left_out_of_combo_seen0(seed):
    split = make_split(pairs_of(SINGLES + DOUBLES), "combo_seen0", seed)
    tested = {condition for condition in split.conditions("test") if "+" not in condition}
    left_out = {condition for condition, _ in split.left_out}
    assert tested
    assert not tested & targets_of(split.conditions("train") + split.conditions("val"))
    for double in DOUBLES:
        if targets_of([double]) & tested:
            assert split.part_of(double) == ("test" if targets_of([double]) <= tested else None)
            assert (double in left_out) == (split.part_of(double) is None)


def test_random_fractions():
    split = make_split(pairs_of(SINGLES[:10]), "random", 3, test_fraction=0.3, val_fraction=0.2)
    assert [len(split.conditions(part)) for part in ("train", "val", "test")] == [5, 2, 3]
    tiny = make_split(pairs_of(SINGLES[:3]), "random", 3)  # .2 and .1 of 3: one each
    assert [len(tiny.conditions(part)) for part in ("train", "val", "test")] == [1, 1, 1]


def test_folds_partition_the_conditions():
    splits = [make_split(pairs_of(SINGLES + DOUBLES), "kfold", 7, folds=4, fold=fold) for fold in range(4)]
    tested = Counter(condition for split in splits for condition in split.conditions("test"))
    assert tested == Counter(SINGLES + DOUBLES)
    assert max(len(s.conditions("test")) for s in splits) - min(len(s.conditions("test")) for s in splits) <= 1
    assert all(len(split.conditions("val")) == 2 for split in splits)  # .1 of 21 or 22


def test_folds_over_doubles_train_all_singles():
    splits = [make_split(pairs_of(SINGLES + DOUBLES), "kfold_doubles", 7, folds=5, fold=fold) for fold in range(5)]
    tested = Counter(condition for split in splits for condition in split.conditions("test"))
    assert tested == Counter(DOUBLES)
    for split in splits:
        assert set(SINGLES) <= set(split.conditions("train"))
        assert len(split.conditions("val")) == round(0.2 * (len(DOUBLES) - len(split.conditions("test"))))
        assert {record.category for record in split.records if record.part == "test"} == {"combo_seen2"}


# ---------------------------------------------------------------------- contexts


def test_unseen_context_tests_every_pair_of_it():
    pairs = pairs_of(["A", "B", "A+B", "C"], ("K562|1", "K562|2", "RPE1|1", "RPE1|2"))
    split = make_split(pairs, "unseen_context", held_out="RPE1", val_held_out="K562|2")
    parts = {"K562|1": "train", "K562|2": "val", "RPE1|1": "test", "RPE1|2": "test"}
    assert all(split.part_of(condition, context) == parts[context] for condition, context in pairs)
    assert {r.category for r in split.records if r.part != "train"} == {"unseen_context"}
    assert split.part_of("control", "RPE1|1") == "train"


def test_some_conditions_can_be_seen_in_the_held_out_contexts():
    conditions, contexts = ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J"), ("x", "y", "z")
    wanted = {"held_out": "z", "val_held_out": "y", "seen_fraction": 0.3}
    split = make_split(pairs_of(conditions, contexts), "unseen_context", 3, **wanted)
    parts = {context: {name: split.part_of(name, context) for name in conditions} for context in contexts}
    seen = {name for name in conditions if parts["z"][name] == "train"}
    assert len(seen) == 3
    assert seen == {name for name in conditions if parts["y"][name] == "train"}, "val is the same task as test"
    assert set(parts["x"].values()) == {"train"}
    assert {parts["z"][name] for name in set(conditions) - seen} == {"test"}
    assert {parts["y"][name] for name in set(conditions) - seen} == {"val"}
    assert {r.category for r in split.records if r.part == "test"} == {"unseen_pair"}


def test_unseen_context_draws_val_from_the_other_contexts():
    conditions, contexts = SINGLES[:10], ("resting", "stimulated")
    split = make_split(pairs_of(conditions, contexts), "unseen_context", 2, held_out="stimulated", val_fraction=0.2)
    val = split.conditions("val")
    assert len(val) == 2
    assert all(split.part_of(condition, "resting") == ("val" if condition in val else "train") for condition in conditions)
    # a condition of val trains nowhere, so in the held-out context it is new twice over
    for condition in conditions:
        new = "unseen_context+unseen_single" if condition in val else "unseen_context"
        assert split.category_of(condition, "stimulated") == new
    one_condition = make_split(pairs_of(["A"], ("a", "b", "c")), "unseen_context", held_out="a")
    assert [r.part for r in one_condition.records].count("val") == 1
    assert {r.category for r in one_condition.records if r.part != "train"} == {"unseen_context"}


def test_conditions_are_split_alike_in_all_their_contexts():
    pairs = pairs_of(SINGLES + DOUBLES, ("a", "b"))
    for method in OVER_CONDITIONS:
        split = make_split(pairs, method, 4)
        once = make_split(pairs_of(SINGLES + DOUBLES), method, 4)
        for condition, _ in pairs:
            assert split.part_of(condition, "a") == split.part_of(condition, "b") == once.part_of(condition)
        # a context that the data did not have is in no part: what is said of the others does not hold there
        assert split.part_of(split.conditions("train")[0], "c") is None
        assert once.part_of(split.conditions("train")[0], "c") == "train"


# ---------------------------------------------------------------------- given


def test_explicit_lists():
    pairs = pairs_of(["A", "B", "C", "A+B"], ("x", "y"))
    split = make_split(pairs, "explicit", test=["B+A", ("C", "y")], val="B")
    assert [split.part_of("A", "x"), split.part_of("A+B", "x"), split.part_of("B", "y")] == ["train", "test", "val"]
    assert [split.part_of("C", "x"), split.part_of("C", "y")] == ["train", "test"]
    assert split.category_of("C", "y") == "unseen_pair"
    named = make_split(pairs, "explicit", train=["A", "control"], test=[Condition(parse_condition("C"))])
    assert dict.fromkeys(condition for condition, _ in named.left_out) == dict.fromkeys(["A+B", "B"])


def test_column_of_parts():
    pairs = pairs_of(["A", "B", "C", "D", "control", "A"])
    split = make_split(pairs, "column", values=["Train", "ood", "valid", float("nan"), "test", "training"])
    assert [split.part_of(name) for name in "ABCD"] == ["train", "test", "val", None]
    assert split.left_out == (("D", None),)


# ---------------------------------------------------------------------- invariances


@pytest.mark.parametrize("method", OVER_CONDITIONS)
def test_order_spelling_duplicates_and_control_do_not_matter(method):
    turned = ["ctrl", *DOUBLES[::-1], *("+".join(reversed(double.split("+"))) for double in DOUBLES[:9]), *SINGLES]
    assert make_split(pairs_of(turned), method, 5) == make_split(pairs_of(SINGLES + DOUBLES), method, 5)


@pytest.mark.parametrize("method", OVER_CONDITIONS)
def test_seeds(method):
    state = np.random.get_state()[1].copy()  # noqa: NPY002  cell-gears seeds this one; we leave it alone
    splits = [make_split(pairs_of(SINGLES + DOUBLES), method, seed) for seed in (1, 1, 2, 3)]
    assert splits[0] == splits[1]
    assert len({split.records for split in splits}) == 3
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


@settings(max_examples=60, deadline=None)
@given(
    combined=st.sets(st.frozensets(st.sampled_from("ABCDEFGHIJ"), min_size=2, max_size=4), min_size=10, max_size=25),
    method=st.sampled_from(OVER_CONDITIONS),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_pair_is_in_one_place(combined, method, seed):
    pairs = pairs_of([*"ABCDEFGHIJ", *("+".join(targets) for targets in combined)], ("x", "y"))
    split = make_split(pairs, method, seed)
    placed = [(record.condition, record.context) for record in split.records] + list(split.left_out)
    assert sorted(placed) == sorted({(str(condition), context) for condition, context in pairs})
    assert Split.from_json(split.to_json()) == split


# ---------------------------------------------------------------------- files and tables


def test_round_trip(tmp_path):
    split = make_split(pairs_of(SINGLES + DOUBLES, ("a", "b|c")), "unseen_context", 9, held_out=("a",))
    split.save(tmp_path / "split.json")
    assert Split.load(tmp_path / "split.json") == split
    assert split.arguments == {"held_out": ["a"], "val_held_out": [], "val_fraction": 0.1, "seen_fraction": 0.0}
    assert os.listdir(tmp_path) == ["split.json"]


def test_file_written_by_hand(tmp_path):
    records = '[["B+A", null, "test", "combo_seen2"], ["A", "x", "train", "seen"]]'
    (tmp_path / "split.json").write_text(f'{{"records": {records}}}')
    split = Split.load(tmp_path / "split.json")
    assert split.part_of("A+B", "anywhere") == "test"
    assert [split.part_of("A", "x"), split.part_of("A", "y"), split.part_of("A")] == ["train", None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a split"),
        ("[]", "not a split"),
        ("{}", "not a split"),
        ('{"records": [["A"]]}', "not a split"),
        ('{"records": [["A", null, "tain", "seen"]]}', "tain.*train | val | test"),
        ('{"records": [["A", 3, "train", "seen"]]}', "context or null"),
        ('{"records": [["A", null, "train", "seen"], ["A+ctrl", null, "test", "seen"]]}', "names 'A' twice"),
        ('{"records": [["+", null, "train", "seen"]]}', "target is missing"),
        ('{"schema": 99, "records": []}', "upgrade perturbzoo"),
    ],
)
def test_unreadable_files(tmp_path, text, message):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(PerturbZooError, match=message) as caught:
        Split.load(tmp_path / "split.json")
    assert "split.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(PerturbZooError, match=r"cannot read the split .*No such file"):
        Split.load(tmp_path / "none.json")
    (tmp_path / "split.json").write_bytes(b"\x89HDF\xff\xfe")
    with pytest.raises(PerturbZooError, match="it is no text file"):
        Split.load(tmp_path / "split.json")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    split = make_split(pairs_of(SINGLES), "random")
    split.save(tmp_path / "split.json")
    before = (tmp_path / "split.json").read_text()

    def full(path, text, **_):
        with open(path, "w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PerturbZooError, match="No space left on device"):
        make_split(pairs_of(SINGLES), "random", 2).save(tmp_path / "split.json")
    assert os.listdir(tmp_path) == ["split.json"]
    assert (tmp_path / "split.json").read_text() == before
    with pytest.raises(PerturbZooError, match="cannot write the split"):
        split.save(tmp_path / "no_folder" / "split.json")


def test_summary_says_dash_for_empty_categories():
    records = (SplitRecord("A", None, "train", "seen"), SplitRecord("B", None, "train", "seen"))
    split = Split("explicit", 0, (*records, SplitRecord("A+C", None, "test", "combo_seen1")), left_out=(("D", None),))
    rows = {line.split()[0]: line.split()[1:] for line in split.summary().splitlines()[2:]}
    assert rows == {
        "seen": ["2", "-", "-"],
        "unseen_single": ["-", "-", "-"],
        "combo_seen0": ["-", "-", "-"],
        "combo_seen1": ["-", "-", "1"],
        "combo_seen2": ["-", "-", "-"],
        "in": ["no", "part:", "1", "(D)"],
    }


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("simulatoin", {}, "did you mean 'simulation'"),
        ("random", {"test_frac": 0.1}, "did you mean 'test_fraction'"),
        ("random", {"test_fraction": "half"}, "test_fraction must be a number from 0 to 1, not 'half'"),
        ("random", {"val_fraction": 1.5}, "val_fraction must be a number from 0 to 1"),
        ("random", {"test_fraction": 0}, "no condition is left to test on"),
        ("random", {"test_fraction": 1.0}, "no condition is left to train on"),
        ("simulation", {"train_gene_set_size": 0.0}, "no condition is left to train on"),
        ("simulation", {"labels": ["A"]}, "5 conditions of the data are not among labels"),
        ("simulation_single", {}, "2 of 6 conditions are combinations"),
        ("kfold", {"folds": 1}, "no more than the 6 conditions"),
        ("kfold", {"folds": 7}, "no more than the 6 conditions"),
        ("kfold", {"fold": 5}, "from 0 to 4, not 5"),
        ("kfold_doubles", {}, "no more than the 2 combinations"),
        ("unseen_context", {}, "needs the argument 'held_out'"),
        ("unseen_context", {"held_out": "stimulatd"}, "did you mean 'stimulated'"),
        ("unseen_context", {"held_out": "rest", "val_held_out": ["rest"]}, "held_out and val_held_out at once"),
        ("unseen_context", {"held_out": ["rest", "stimulated"]}, "no condition is left to train on"),
        ("explicit", {"test": []}, "no condition is left to test on"),
        ("explicit", {"test": ["KLF2"]}, "did you mean 'KLF1'"),
        ("explicit", {"test": ["control"]}, "control always trains"),
        ("explicit", {"test": ["A"], "val": ["A"]}, "A cannot be in val and test at once"),
        ("explicit", {"test": [["A", "none"]]}, "'A' in the context 'none'; the data hold it in rest, stimulated"),
        ("explicit", {"test": [3]}, "must list conditions"),
        ("column", {"values": ["train"]}, "1 values for 12 pairs"),
        ("column", {"values": ["train"] * 11 + ["tset"]}, "did you mean 'test'"),
    ],
)
def test_mistakes_are_named_in_one_line(method, arguments, message):
    pairs = pairs_of(["KLF1", "A", "B", "C", "A+B", "B+C"], ("rest", "stimulated"))
    with pytest.raises(PerturbZooError, match=message) as caught:
        make_split(pairs, method, **arguments)
    assert "\n" not in str(caught.value)


def test_column_that_splits_cells_rather_than_conditions():
    with pytest.raises(PerturbZooError, match="both 'train' and 'test' for cells of 'A' in the context 'x'"):
        make_split(pairs_of(["A", "A"], ("x",)), "column", values=["train", "test"])


@pytest.mark.parametrize("method", ["combo_seen0", "combo_seen1", "combo_seen2", "kfold_doubles"])
def test_combination_methods_need_combinations(method):
    with pytest.raises(PerturbZooError, match="none of the 12 conditions names two targets"):
        make_split(pairs_of(SINGLES), method)


def test_nothing_to_split():
    with pytest.raises(PerturbZooError, match="no condition but control"):
        make_split(pairs_of(["control", "ctrl"]))
    with pytest.raises(PerturbZooError, match="seed must be"):
        make_split(pairs_of(SINGLES), seed=-1)
    with pytest.raises(PerturbZooError, match="the data have none"):
        make_split(pairs_of(SINGLES), "unseen_context", held_out="x")


def test_every_method_says_what_it_does():
    assert all(method.__doc__ for method in METHODS.values())
