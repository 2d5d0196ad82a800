"""The statistics of the leaderboard, on tables small enough to be worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from perturbzoo.benchmark.experiment import Cell
from perturbzoo.benchmark.leaderboard import collect, leaderboard, read_scores
from perturbzoo.errors import PerturbZooError

KINDS = {"M": "model", "NoChange": "floor", "Ridge": "floor", "split-half ceiling": "ceiling"}


def scores_of(*rows: tuple[Any, ...]) -> pd.DataFrame:
    """Rows of model, split, seed, condition, pearson_delta, mse; category by the condition's first letter."""
    table = pd.DataFrame(rows, columns=["model", "split", "seed", "condition", "pearson_delta", "mse"])
    table["seed"] = table["seed"].astype("Int64")
    return table.assign(context="", category=["combo" if "+" in name else "single" for name in table["condition"]], n_cells=10)


def cell_of(board: pd.DataFrame, model: str, metric: str = "pearson_delta", category: str = "all") -> pd.Series:
    rows = board[(board["model"] == model) & (board["metric"] == metric) & (board["category"] == category)]
    assert len(rows) == 1
    return rows.iloc[0]


# split s tests A and B, split t tests B and A+C; two seeds
EXAMPLE = scores_of(
    ("M", "s", 0, "A", 0.2, 3.0),
    ("M", "s", 0, "B", 0.4, 3.0),
    ("M", "s", 1, "A", 0.4, 3.0),
    ("M", "s", 1, "B", 0.8, 3.0),
    ("M", "t", 0, "B", 0.1, 3.0),
    ("M", "t", 0, "A+C", 0.9, 3.0),
    ("M", "t", 1, "B", 0.3, 3.0),
    ("M", "t", 1, "A+C", 0.5, 3.0),
    ("NoChange", "s", None, "A", 0.0, 2.0),
    ("NoChange", "s", None, "B", 0.0, 2.0),
    ("NoChange", "t", None, "B", 0.0, 2.0),
    ("NoChange", "t", None, "A+C", 0.0, 2.0),
    ("Ridge", "s", None, "A", 0.5, 4.0),
    ("Ridge", "s", None, "B", 0.6, 4.0),
    ("Ridge", "t", None, "B", 0.2, 4.0),
    ("Ridge", "t", None, "A+C", 0.1, 4.0),
    ("split-half ceiling", "s", None, "A", 0.9, 1.0),
    ("split-half ceiling", "s", None, "B", 0.9, 1.0),
    ("split-half ceiling", "t", None, "B", 0.9, 1.0),
    ("split-half ceiling", "t", None, "A+C", 0.9, 1.0),
)


def test_seeds_then_splits_then_conditions() -> None:
    board = leaderboard(EXAMPLE, KINDS)
    # A: (.2 + .4) / 2 = .3; B: s .6, t .2 -> .4; A+C: .7
    row = cell_of(board, "M")
    assert row["mean"] == pytest.approx((0.3 + 0.4 + 0.7) / 3)
    assert row["n"] == 3, "a condition counts once however many splits test it"
    assert cell_of(board, "M", category="single")["mean"] == pytest.approx(0.35)
    assert cell_of(board, "M", category="combo")["mean"] == pytest.approx(0.7)
    assert math.isnan(cell_of(board, "M", category="combo")["low"]), "one condition has no interval"
    # Ridge: A .5, B .4, A+C .1
    assert cell_of(board, "Ridge")["mean"] == pytest.approx(1 / 3)
    # means of the seeds: s .3 and .6, t .5 and .4; variances .045 and .005, a degree of freedom each
    assert row["sd_over_seeds"] == pytest.approx(math.sqrt((0.045 + 0.005) / 2))
    assert math.isnan(cell_of(board, "Ridge")["sd_over_seeds"])


def test_ranks_leave_out_ceilings_and_know_which_way_is_up() -> None:
    board = leaderboard(EXAMPLE, KINDS)
    assert [cell_of(board, name)["rank"] for name in ("M", "Ridge", "NoChange")] == [1, 2, 3]
    assert [cell_of(board, name, "mse")["rank"] for name in ("M", "Ridge", "NoChange")] == [2, 3, 1]
    assert pd.isna(cell_of(board, "split-half ceiling")["rank"])
    assert list(dict.fromkeys(board["model"])) == ["M", "Ridge", "NoChange", "split-half ceiling"]
    assert set(board["kind"]) == {"model", "floor", "ceiling"}


def test_the_difference_is_to_the_floor_that_decides() -> None:
    board = leaderboard(EXAMPLE, KINDS)
    row = cell_of(board, "M")
    # A .3 - .5, B .4 - .4, A+C .7 - .1
    assert row["decisive_floor"] == "Ridge"
    assert row["difference"] == pytest.approx((-0.2 + 0.0 + 0.6) / 3)
    assert row["difference_low"] == pytest.approx(-0.2), "the least that a resample of these can give"
    assert row["difference_high"] == pytest.approx(0.6)
    assert row["verdict"] == "", "three conditions"
    mse = cell_of(board, "M", "mse")
    assert (mse["decisive_floor"], mse["difference"], mse["difference_low"], mse["difference_high"]) == (
        "NoChange",
        1.0,
        1.0,
        1.0,
    )
    assert mse["p"] == 2 / 8, "of the eight choices of signs two are as far from 0"
    assert cell_of(board, "M", category="combo")["difference"] == pytest.approx(0.6)
    assert pd.isna(cell_of(board, "Ridge")["difference"])


@pytest.mark.parametrize(
    ("metric", "gain", "verdict"), [("pearson_delta", 0.1, "beats"), ("mse", 0.1, "loses"), ("mse", -0.1, "beats")]
)
def test_the_verdict_knows_which_way_is_up(metric: str, gain: float, verdict: str) -> None:
    rows = [(*place, 0.5, 0.5) for place in (("NoChange", "s", None, name) for name in "ABCDEF")]
    table = scores_of(*rows, *(("M", "s", 0, name, 0.5, 0.5) for name in "ABCDEF"))
    table.loc[table["model"] == "M", metric] += gain
    board = leaderboard(table, {"M": "model", "NoChange": "floor"})
    assert cell_of(board, "M", metric)["verdict"] == verdict


@pytest.mark.parametrize(("conditions", "verdict"), [("ABCDE", ""), ("ABCDEF", "beats")])
def test_five_conditions_that_agree_prove_nothing(conditions: str, verdict: str) -> None:
    rows = [
        (name, "s", seed, one, mean, 0.2) for name, seed, mean in (("M", 0, 0.5), ("NoChange", None, 0.1)) for one in conditions
    ]
    row = cell_of(leaderboard(scores_of(*rows), {"M": "model", "NoChange": "floor"}), "M")
    assert row["p"] == 2 / 2 ** len(conditions)
    assert row["difference_low"] == pytest.approx(0.4)
    assert row["verdict"] == verdict


def test_rounding_is_no_difference() -> None:
    rows = [(name, "s", seed, condition, 0.2, 0.2) for name, seed in (("M", 0), ("NoChange", None)) for condition in "ABCDEF"]
    table = scores_of(*rows)
    table.loc[table["model"] == "M", "pearson_delta"] += 1e-7
    row = cell_of(leaderboard(table, {"M": "model", "NoChange": "floor"}), "M")
    assert row["difference_low"] > 0
    assert row["verdict"] == "no difference"


def test_of_floors_that_are_the_same_the_simplest_is_named() -> None:
    names = {"M": 0.5, "Additive": 0.4 + 1e-13, "TrainingMean": 0.4, "MatchingMean": 0.4 + 1e-14}
    table = scores_of(
        *((name, "s", 0 if name == "M" else None, one, mean, 1.0) for name, mean in names.items() for one in "ABCDEF")
    )
    board = leaderboard(table, {name: "model" if name == "M" else "floor" for name in names})
    assert cell_of(board, "M")["decisive_floor"] == "TrainingMean"
    assert list(dict.fromkeys(board["model"])) == ["M", "TrainingMean", "MatchingMean", "Additive"]


def test_the_order_of_rows_is_of_no_consequence() -> None:
    board = leaderboard(EXAMPLE, KINDS)
    shuffled = EXAMPLE.sample(frac=1, random_state=3)
    pd.testing.assert_frame_equal(board, leaderboard(shuffled, KINDS), check_exact=False, rtol=1e-12)
    backwards = dict(reversed(KINDS.items()))
    pd.testing.assert_frame_equal(board, leaderboard(EXAMPLE, backwards), check_exact=False, rtol=1e-12)


def test_a_seed_that_diverged_is_not_averaged_away() -> None:
    table = EXAMPLE.copy()
    table.loc[(table["model"] == "M") & (table["seed"] == 1) & (table["condition"] == "A"), "pearson_delta"] = np.nan
    row = cell_of(leaderboard(table, KINDS), "M")
    assert row["n"] == 2
    assert row["mean"] == pytest.approx((0.4 + 0.7) / 2)


def test_a_model_without_a_split_is_compared_on_the_others() -> None:
    table = EXAMPLE[~((EXAMPLE["model"] == "M") & (EXAMPLE["split"] == "t"))]
    row = cell_of(leaderboard(table, KINDS), "M")
    assert pd.isna(row["rank"]), "it competes with nobody who was scored on more"
    # A .3 - .5, B .6 - .6: the floor's B of split t is not in it
    assert row["n"] == 2
    assert row["difference"] == pytest.approx((-0.2 + 0.0) / 2)


def test_contexts_are_resampled_where_there_is_one_condition() -> None:
    table = scores_of(*((name, "s", 0 if name == "M" else None, "A", 0.5, 0.5) for name in ("M", "NoChange") for _ in range(6)))
    table["context"] = ["u", "v", "w", "x", "y", "z"] * 2
    table.loc[table["model"] == "M", "pearson_delta"] += [0.1, 0.2, 0.1, 0.2, 0.1, 0.2]
    row = cell_of(leaderboard(table, {"M": "model", "NoChange": "floor"}), "M")
    assert row["n"] == 6
    assert row["mean"] == pytest.approx(0.65)
    assert 0.6 <= row["low"] < 0.65 < row["high"] <= 0.7
    assert row["verdict"] == "beats"


# ---------------------------------------------------------------------- reading what the cells left


def leave(output: Path, model: str, seed: int, own: float, floor: float, *, rows: str = "AB", ceiling: float = 0.9) -> Cell:
    """A finished cell of a model of class X, on one split."""
    cell = Cell(model, "s", seed, {}, {})
    folder = output / cell.folder / "test"
    folder.mkdir(parents=True)
    values = {"X": own, "Ridge": floor, "KNN (spectral of its graph)": floor, "split-half ceiling": ceiling}
    tables = [
        pd.DataFrame(
            {"condition": list(rows), "context": "", "category": "single", "n_cells": 9, "pearson_delta": v, "model": name}
        )
        for name, v in values.items()
    ]
    pd.concat(tables).to_csv(folder / "conditions.csv", index=False)
    return cell


def test_floors_come_once_for_each_split(tmp_path: Path) -> None:
    cells = [leave(tmp_path, model, seed, 0.1 * seed, 0.5) for model in ("one", "two") for seed in (1, 2)]
    scores, kinds, notes = collect(cells, tmp_path)
    assert kinds == {
        "one": "model",
        "two": "model",
        "Ridge": "floor",
        "KNN (spectral of its graph)": "floor",
        "split-half ceiling": "ceiling",
    }
    assert notes == []
    assert len(scores) == 2 * 2 * 2 + 3 * 2
    assert list(scores.columns[:7]) == ["model", "split", "seed", "condition", "context", "category", "n_cells"]
    assert scores.loc[scores["model"] == "Ridge", "seed"].isna().all()
    assert sorted(scores.loc[scores["model"] == "two", "seed"].unique()) == [1, 2]
    again, _, _ = collect(cells[::-1], tmp_path)
    pd.testing.assert_frame_equal(leaderboard(scores, kinds), leaderboard(again, kinds))


def test_a_condition_called_na_is_one(tmp_path: Path) -> None:
    cell = leave(tmp_path, "one", 0, 0.1, 0.5, rows=["NA", "None", "A"])  # type: ignore[arg-type]
    scores, kinds, _ = collect([cell], tmp_path)
    assert set(scores["condition"]) == {"NA", "None", "A"}
    assert cell_of(leaderboard(scores, kinds), "one")["n"] == 3


def test_floors_that_disagree_are_named(tmp_path: Path) -> None:
    cells = [
        leave(tmp_path, "one", 0, 0.1, 0.5),
        leave(tmp_path, "two", 0, 0.1, 0.5 + 1e-9),
        leave(tmp_path, "three", 0, 0.1, 0.75),
    ]
    scores, _, notes = collect(cells, tmp_path)
    assert len(notes) == 2
    assert "'Ridge' is not the same in 'one, split s, seed 0' and 'three, split s, seed 0' (pearson_delta by 0.25)" in notes[0]
    assert (scores.loc[scores["model"] == "Ridge", "pearson_delta"] == 0.5).all()
    fewer = leave(tmp_path, "four", 0, 0.1, 0.5, rows="A")
    assert "other conditions" in collect([cells[0], fewer], tmp_path)[2][0]


def test_no_cells_no_scores(tmp_path: Path) -> None:
    scores, kinds, notes = collect([], tmp_path)
    assert scores.empty
    assert kinds == {}
    assert notes == []


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PerturbZooError, match="cannot be read as a table of scores"):
        read_scores(tmp_path / "none.csv")
