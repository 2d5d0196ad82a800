"""What is printed and written of a leaderboard: it says so where a baseline wins, and where a metric has nothing to tell."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from perturbzoo.benchmark.leaderboard import leaderboard
from perturbzoo.benchmark.sentences import BEGIN, END, page, sentences, write_page
from perturbzoo.errors import PerturbZooError


def board_of(**means: float) -> pd.DataFrame:
    """A leaderboard of models and baselines whose pearson_delta is the same mean, give or take, in each of six conditions."""
    kinds = {"GEARS": "model", "CPA": "model", "Ridge": "floor", "TrainingMean": "floor", "split-half ceiling": "ceiling"}
    names = [name for name in kinds if name.replace("-", "_").replace(" ", "_") in means]
    rows = [
        {"model": name, "split": "s", "seed": 0 if kinds[name] == "model" else None, "condition": condition, "context": ""}
        | {"category": "single", "pearson_delta": means[name.replace("-", "_").replace(" ", "_")] + 0.01 * number}
        for name in names
        for number, condition in enumerate("ABCDEF")
    ]
    table = pd.DataFrame(rows)
    table["seed"] = table["seed"].astype("Int64")
    return leaderboard(table, {name: kinds[name] for name in names})


def test_a_baseline_that_wins_is_named() -> None:
    (line,) = sentences(board_of(GEARS=0.4, CPA=0.3, Ridge=0.5, TrainingMean=0.1, split_half_ceiling=0.9), "pearson_delta")
    assert line.startswith("pearson_delta: the best mean is a baseline's, Ridge (0.525). Better than every baseline: none.")
    assert "Worse than one: GEARS (-0.1 [-0.1, -0.1] from Ridge, p 0.031), CPA (-0.2 [-0.2, -0.2] from Ridge, p 0.031)." in line
    assert "repeat of the experiment" not in line


def test_a_model_that_wins_is_named_with_the_baseline_it_beats() -> None:
    (line,) = sentences(board_of(GEARS=0.7, CPA=0.5, Ridge=0.5, TrainingMean=0.1, split_half_ceiling=0.9), "pearson_delta")
    assert line.startswith("pearson_delta: best is GEARS (0.725), the best baseline Ridge (0.525).")
    assert "Better than every baseline: GEARS (+0.2 [0.2, 0.2] from Ridge, p 0.031)." in line
    assert "Not to be told from one: CPA (+0 [0, 0] from Ridge, p 1)." in line


def test_a_tie_with_a_baseline_names_it_as_equal() -> None:
    (line,) = sentences(board_of(GEARS=0.5 + 1e-13, CPA=0.4, Ridge=0.5, split_half_ceiling=0.9), "pearson_delta")
    assert line.startswith("pearson_delta: GEARS and Ridge share the best mean (0.525).")
    assert "best is" not in line


def test_a_metric_on_which_a_baseline_reaches_the_ceiling_is_said_to_tell_nothing() -> None:
    (line,) = sentences(board_of(GEARS=0.8, TrainingMean=0.87, split_half_ceiling=0.79), "pearson_delta")
    assert "TrainingMean is as good as a repeat of the experiment (split-half ceiling, 0.815)" in line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    about = {
        "name": "x",
        "title": "A title",
        "description": "What it is.",
        "data": "some cells",
        "stand_in": True,
        "stand_in_note": "",
    }
    about |= {"models": ["GEARS"], "seeds": [0], "splits": ["s"], "metric": "pearson_delta", "version": "1", "finished": 1}
    about["failed"] = [{"model": "CPA", "split": "s", "seed": 0, "reason": "no gene"}]
    (tmp_path / "benchmark.json").write_text(json.dumps(about))
    board_of(GEARS=0.4, Ridge=0.5, split_half_ceiling=0.9).to_csv(tmp_path / "leaderboard.csv", index=False)
    return tmp_path


def test_the_page_has_every_row_and_what_failed(folder: Path) -> None:
    lines = page([folder, folder]).splitlines()
    assert lines.count("## A title") == 2
    assert lines[0] == BEGIN
    assert lines[-1] == END
    (row,) = {line for line in lines if line.startswith("| Ridge |")}
    assert row.startswith("| Ridge | **0.525** [0.5")
    assert any(line.startswith("| **GEARS** | 0.425 [") for line in lines)
    assert any(line.startswith("| *split-half ceiling* | 0.925 [") for line in lines), "a ceiling is never the best"
    assert "- failed: CPA, split s, seed 0: no gene" in lines
    assert any("a stand-in for the public file" in line for line in lines)


def test_what_a_person_wrote_around_the_table_stays(folder: Path) -> None:
    file = folder / "page.md"
    write_page(file, page([folder]))
    file.write_text("# Ours\n\nA paragraph.\n\n" + file.read_text() + "\nThe end.\n")
    write_page(file, f"{BEGIN}\nnew\n{END}\n")
    assert file.read_text() == f"# Ours\n\nA paragraph.\n\n{BEGIN}\nnew\n{END}\n\nThe end.\n"
    file.write_text("something else")
    with pytest.raises(PerturbZooError, match="without the two lines between which the table stands"):
        write_page(file, page([folder]))
    assert file.read_text() == "something else"
