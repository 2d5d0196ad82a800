"""The first sentence: wins, ties, losses, also where lower is better; numbers as they are written."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbzoo.evaluation.summary import paired_difference
from perturbzoo.report.verdict import compare_with_floors, digits_for, verdict_sentence, written


def _scores(pearson: np.ndarray, mse: np.ndarray | None = None) -> pd.DataFrame:
    n = len(pearson)
    names = [f"C{row:02d}" for row in range(n)]
    return pd.DataFrame(
        {
            "condition": names,
            "context": "",
            "category": ["one" if row % 2 else "two" for row in range(n)],
            "pearson_delta": pearson,
            "mse": 1 - pearson if mse is None else mse,
        }
    )


HARD = np.linspace(0.1, 0.8, 30)
JITTER = np.where(np.arange(30) % 2, 0.05, -0.05)


@pytest.mark.parametrize(
    ("gain", "answer", "words"),
    [
        (0.1, "Yes.", "M beats all 2 floors on r; the closest is Good, behind by 0.1"),
        (0.0, "Not shown.", "M cannot be told from the floor Good on r"),
        (-0.1, "No.", "The floor Good beats M on r, by 0.1"),
    ],
)
def test_wins_ties_and_loses(gain: float, answer: str, words: str) -> None:
    # the means of the conditions spread over 0.7, the difference is 0.1: seen because it is paired
    model = _scores(HARD + gain + JITTER)
    rows = compare_with_floors(model, {"Bad": _scores(HARD - 0.3), "Good": _scores(HARD)})
    assert list(rows["metric"]) == ["pearson_delta", "mse"]
    row = rows.iloc[0]
    assert verdict_sentence("M", row, "r")[0] == answer
    assert verdict_sentence("M", row, "r")[1].startswith(words)
    assert row["advantage"] == pytest.approx(gain, abs=1e-12)
    # an error that mirrors the correlation gives the same answer with the same numbers
    assert rows.iloc[1]["state"] == row["state"]
    np.testing.assert_allclose(
        rows.iloc[1][["advantage", "low", "high"]].astype(float), row[["advantage", "low", "high"]].astype(float), atol=1e-12
    )


def test_numbers_are_those_of_paired_difference() -> None:
    model, floor = _scores(HARD + 0.1 * JITTER), _scores(HARD[::-1].copy())
    row = compare_with_floors(model, {"F": floor}).set_index("metric").loc["mse"]
    paired = paired_difference(model, floor).set_index(["category", "metric"]).loc[("all", "mse")]
    assert (row["advantage"], row["low"], row["high"]) == (-paired["difference"], -paired["high"], -paired["low"])
    assert row["n"] == paired["n"] == 30


def test_one_floor_in_front_is_a_loss_whatever_the_others() -> None:
    rows = compare_with_floors(_scores(HARD), {"Far behind": _scores(HARD - 0.5), "Just ahead": _scores(HARD + 0.02)})
    assert set(rows["state"]) == {"behind"}
    assert set(rows["rival"]) == {"Just ahead"}


def test_level_names_a_floor_that_the_model_is_level_with() -> None:
    # the nearest floor is clearly beaten, one that is further on average is not: its differences vary more
    wild = np.where(np.arange(30) % 2, 0.9, -0.9)
    rows = compare_with_floors(_scores(HARD), {"Near": _scores(HARD - 0.02), "Wild": _scores(HARD - 0.1 + wild)})
    assert set(rows["state"]) == {"level"}
    assert set(rows["rival"]) == {"Wild"}


def test_floors_scored_on_other_conditions_are_compared_on_the_common_ones() -> None:
    rows = compare_with_floors(_scores(HARD), {"F": _scores(HARD - 0.2).iloc[3:20], "Few": _scores(HARD + 1).iloc[:5]})
    assert rows["state"].tolist() == ["ahead", "ahead"]
    assert rows["n"].tolist() == [17, 17]
    assert rows["advantage"].to_numpy() == pytest.approx(0.2)


def test_too_few_conditions_say_so() -> None:
    rows = compare_with_floors(_scores(HARD[:5]), {"F": _scores(HARD[:5] - 0.5)})
    assert set(rows["state"]) == {"unknown"}
    assert verdict_sentence("M", rows.iloc[0], "r")[0] == "Unknown."
    assert set(compare_with_floors(_scores(HARD), {})["state"]) == {"unknown"}


@pytest.mark.parametrize(
    ("largest", "digits"), [(0.0, 3), (0.5, 3), (1.0, 3), (0.05, 4), (0.00012, 6), (12.0, 2), (12345.0, 0)]
)
def test_digits(largest: float, digits: int) -> None:
    assert digits_for(np.array([largest, np.nan, 0.0])) == digits


def test_written_with_minus_signs() -> None:
    assert written(-0.12345, -0.2, 0.01, 2) == "\u22120.12 [\u22120.20, 0.01]"
