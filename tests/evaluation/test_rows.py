"""Kinds and ranks of rows: ties, directions, gaps."""

from __future__ import annotations

import numpy as np
import pandas as pd

from perturbzoo.evaluation.rows import kinds_of_rows, rank_rows


def test_kinds() -> None:
    names = ["KNN", "NoChange", "Ridge (same embedding)", "split-half ceiling", "technical duplicate"]
    assert list(kinds_of_rows(names).values()) == ["model", "floor", "floor", "ceiling", "ceiling"]
    assert kinds_of_rows([]) == {}


def _summary(**means: dict[str, float]) -> pd.DataFrame:
    rows = [
        {"model": model, "category": "all", "metric": metric, "mean": mean}
        for metric, of in means.items()
        for model, mean in of.items()
    ]
    return pd.DataFrame(rows)


def test_ranks_with_ties_and_directions() -> None:
    summary = _summary(
        pearson_delta={"A": 0.5, "B": 0.5, "C": 0.9, "D": 0.1},
        mse={"A": 0.5, "B": 0.4, "C": 0.1, "D": 0.2},
        variance_recovery={"A": 0.7, "B": 1.2, "C": 3.0, "D": np.nan},
    )
    ranks = rank_rows(summary, ["A", "B", "C", "D"])
    assert ranks["pearson_delta"].tolist() == [2.5, 2.5, 1.0, 4.0]
    assert ranks["mse"].tolist() == [4.0, 3.0, 1.0, 2.0]
    np.testing.assert_array_equal(ranks["variance_recovery"], [2.0, 1.0, 3.0, np.nan])
    assert list(rank_rows(summary, ["A", "D"])["mse"]) == [2.0, 1.0]
