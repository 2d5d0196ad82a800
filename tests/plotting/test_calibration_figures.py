"""Figures of uncertainty: the points drawn are those given, the correlation is Spearman's, wrong tables are refused."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from perturbzoo.errors import PerturbZooError
from perturbzoo.plotting import plot_calibration, plot_error_ranks


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_calibration_draws_the_curve_beside_the_diagonal() -> None:
    curve = pd.DataFrame({"level": [0.5, 0.8, 0.9], "coverage": [0.42, 0.8, 0.97]})
    ax = plot_calibration(curve)
    diagonal, drawn = (line.get_xydata() for line in ax.lines)
    np.testing.assert_array_equal(diagonal, [[0, 0], [1, 1]])
    np.testing.assert_array_equal(drawn, curve.to_numpy())
    low, high = ax.get_xlim()
    assert (low, high) == ax.get_ylim()
    assert low < 0.42 < high
    given = plt.subplots()[1]
    assert plot_calibration(curve, ax=given) is given


def test_error_ranks_by_hand() -> None:
    """Ranks 1 2 3 4 against 2 1 3 4: Spearman is 1 - 6 (1 + 1) / (4 x 15) = 0.8."""
    table = pd.DataFrame(
        {
            "condition": list("abcd"),
            "category": ["single", "single", "double", "double"],
            "predicted_rmse": [0.1, 0.2, 0.3, 0.4],
            "rmse": [0.2, 0.1, 0.5, 9.0],
        }
    )
    ax = plot_error_ranks(table)
    assert "0.80" in ax.get_title(loc="left")
    points = {tuple(point) for group in ax.collections for point in np.asarray(group.get_offsets())}
    assert points == set(zip(table["predicted_rmse"], table["rmse"], strict=True))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["double (n = 2)", "single (n = 2)"]


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(PerturbZooError, match=r"lacks.*coverage.*calibration\.csv"):
        plot_calibration(pd.DataFrame({"level": [0.5]}))
    with pytest.raises(PerturbZooError, match=r"lacks.*rmse.*uncertainty\.csv"):
        plot_error_ranks(pd.DataFrame({"category": ["a"], "predicted_rmse": [1.0]}))
