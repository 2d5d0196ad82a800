"""Intervals over conditions: closed forms, what must not change them, what is refused; the printed table."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.summary import format_table, paired_difference, printed, summarise


def _scores(values: np.ndarray | list[float], category: str = "unseen_single", context: str = "K562") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "condition": [f"G{row}" for row in range(len(values))],
            "context": context,
            "category": category,
            "n_cells": 10,
            "pearson_delta": values,
            "mse": np.asarray(values) ** 2 / 100,
        }
    )


def _row(summary: pd.DataFrame, **wanted: str) -> pd.Series:
    for column, value in wanted.items():
        summary = summary[summary[column] == value]
    assert len(summary) == 1
    return summary.iloc[0]


def _normal(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.4, 0.2, size=n)


def test_means_by_category() -> None:
    frame = pd.concat([_scores([0.1, 0.3, 0.8]), _scores([0.5], category="combo_seen0", context="RPE1")])
    summary = summarise({"gears": frame}, n_bootstrap=10)
    assert summary["category"].unique().tolist() == ["all", "combo_seen0", "unseen_single"]
    assert _row(summary, category="unseen_single", metric="pearson_delta")["mean"] == pytest.approx(0.4)
    # mse column: (.01 + .09 + .64 + .25) / 100 / 4
    assert _row(summary, category="all", metric="mse")["mean"] == pytest.approx(0.99 / 400)
    single = _row(summary, category="combo_seen0", metric="pearson_delta")
    assert (single["n"], single["mean"]) == (1, 0.5)
    assert np.isnan(single["low"])


def test_interval_is_that_of_the_mean_and_shrinks_with_the_root_of_n() -> None:
    widths = []
    for n in (40, 640):
        values = _normal(n)
        row = _row(summarise({"m": _scores(values)}, n_bootstrap=4000), category="all", metric="pearson_delta")
        assert row["low"] < values.mean() < row["high"]
        widths.append(row["high"] - row["low"])
        # Normal theory: 2 x 1.96 standard errors.
        assert widths[-1] == pytest.approx(2 * 1.96 * values.std() / np.sqrt(n), rel=0.08)
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(640 / 40), rel=0.3)


def test_same_seed_same_interval_and_another_seed_another() -> None:
    scores = {"m": _scores(_normal(30))}
    one = summarise(scores, seed=1)
    pd.testing.assert_frame_equal(one, summarise(scores, seed=1))
    assert not np.allclose(one["low"], summarise(scores, seed=2)["low"])


def test_order_of_rows_and_other_categories_change_nothing() -> None:
    frame = pd.concat([_scores(_normal(12)), _scores(_normal(9, 1), category="combo_seen0", context="RPE1")])
    expected = summarise({"m": frame})
    shuffled = frame.sample(frac=1.0, random_state=0)
    pd.testing.assert_frame_equal(summarise({"m": shuffled}), expected)
    alone = summarise({"m": frame[frame["category"] == "combo_seen0"]})
    columns = ["n", "mean", "low", "high"]
    one, other = (part[part["category"] == "combo_seen0"][columns].to_numpy() for part in (alone, expected))
    np.testing.assert_array_equal(one, other)


def test_every_model_gets_the_same_resampled_conditions() -> None:
    values = _normal(25)
    summary = summarise({"m": _scores(values), "shifted": _scores(values + 1.0)})
    one, other = (_row(summary, model=m, category="all", metric="pearson_delta") for m in ("m", "shifted"))
    for column in ("mean", "low", "high"):
        assert other[column] == pytest.approx(one[column] + 1.0)


def test_contexts_of_one_condition_are_not_independent_conditions() -> None:
    values = _normal(25)
    once = summarise({"m": _scores(values)})
    twice = summarise({"m": pd.concat([_scores(values), _scores(values, context="RPE1")])})
    pd.testing.assert_frame_equal(once, twice)


def test_a_model_that_leaves_conditions_out_says_how_many_it_has() -> None:
    values = _normal(20)
    partial = values.copy()
    partial[:14] = np.nan
    summary = summarise({"full": _scores(values), "nan": _scores(partial), "short": _scores(values).iloc[14:]})
    for model in ("nan", "short"):
        row = _row(summary, model=model, category="all", metric="pearson_delta")
        assert row["n"] == 6
        assert row["mean"] == pytest.approx(values[14:].mean())
        assert row["low"] < row["mean"] < row["high"]
    assert "  nan (6 of " in format_table(summary)
    assert "  full  " in format_table(summary)


def test_paired_difference_sees_what_overlapping_intervals_hide() -> None:
    values = _normal(30)
    better = _scores(values + 0.02 + 0.001 * _normal(30, 1))
    summary = summarise({"better": better, "worse": _scores(values)})
    one, other = (_row(summary, model=m, category="all", metric="pearson_delta") for m in ("better", "worse"))
    assert one["low"] < other["high"]
    row = _row(paired_difference(better, _scores(values)), category="all", metric="pearson_delta")
    assert row["difference"] == pytest.approx(one["mean"] - other["mean"])
    assert 0.02 < row["low"] < row["difference"] < row["high"] < 0.021
    mirrored = _row(paired_difference(_scores(values), better), category="all", metric="pearson_delta")
    assert mirrored["difference"] == pytest.approx(-row["difference"])
    assert (mirrored["low"], mirrored["high"]) == pytest.approx((-row["high"], -row["low"]))


def test_paired_difference_is_over_the_conditions_that_both_have() -> None:
    values = np.array([0.1, 0.2, 0.6, 0.9])
    row = _row(paired_difference(_scores(values), _scores([0.0, np.nan, 0.0, 0.0])), category="all", metric="mse")
    assert row["n"] == 3
    assert row["difference"] == pytest.approx((0.01 + 0.36 + 0.81) / 300)


def test_what_is_printed() -> None:
    rows = [("m", c, k, 2, 0.1, 0.0, 0.2) for c in ("all", "single", "double") for k in ("pearson_delta", "rmse")]
    summary = pd.DataFrame(rows, columns=["model", "category", "metric", "n", "mean", "low", "high"])
    assert printed(summary)[["category", "metric"]].to_numpy().tolist() == [
        [category, "pearson_delta"] for category in ("all", "single", "double")
    ]
    one = printed(summary[summary["category"] != "double"])
    assert one["category"].tolist() == ["all"]


def test_tables_that_do_not_belong_together_are_refused() -> None:
    frame = _scores([0.1, 0.2])
    with pytest.raises(PerturbZooError, match="scores of 'm' have condition 'G0' in context 'K562' twice"):
        summarise({"m": pd.concat([frame, frame])})
    with pytest.raises(PerturbZooError, match="disagree on the category of condition 'G0' in context 'K562'"):
        summarise({"m": frame, "n": _scores([0.1, 0.2], category="combo_seen0")})
    with pytest.raises(PerturbZooError, match="not to be reported: 'unseen_single'"):
        summarise({"m": frame}, categories=["combo_seen0"])
    with pytest.raises(PerturbZooError, match="no scores"):
        summarise({})


def test_printed_table() -> None:
    scores = {"gears": _scores([0.5, 0.5, 0.5]), "no_change": _scores([0.0, 0.0, 0.0])}
    text = format_table(summarise(scores, categories=["combo_seen0", "unseen_single"]))
    lines = text.splitlines()
    assert "combo_seen0  -" in lines
    header = next(line for line in lines if "pearson_delta" in line)
    assert header.split() == ["pearson_delta", "↑", "mse", "x1e-3", "↓"]
    block = lines[lines.index("unseen_single (3 conditions)") :]
    assert block[1].split() == ["gears", *["0.500", "[0.500,", "0.500]"], *["2.500", "[2.500,", "2.500]"]]
    assert block[2].split() == ["no_change", *["0.000", "[0.000,", "0.000]"], *["0.000", "[0.000,", "0.000]"]]


def test_printed_table_keeps_its_width_and_every_metric() -> None:
    from perturbzoo.evaluation.table import METRICS

    random = np.random.default_rng(0)
    frame = _scores(_normal(9)).assign(**{name: random.normal(0, 10.0**row, 9) for row, name in enumerate(METRICS)})
    text = format_table(summarise({"split-half ceiling": frame, "gears": frame}))
    assert max(len(line) for line in text.splitlines()) <= 120
    squeezed = text.replace("\n", "").replace(" ", "")
    assert all(name.split("_")[0] in squeezed for name in METRICS)
    # Two models and two blocks in every panel, one cell for each metric.
    assert text.count("[") == 1 + 2 * 2 * len(METRICS)
