"""Leaderboard, ranks and paired heat maps: what is drawn is what the tables say."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from perturbzoo.errors import PerturbZooError
from perturbzoo.plotting import plot_leaderboard, plot_ranks, plot_top_genes


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


MEANS = {
    "GEARS": (0.6, 0.30),
    "NoChange": (0.0, 0.40),
    "Additive": (0.7, 0.30),
    "split-half ceiling": (0.9, 0.05),
}


def _summary() -> pd.DataFrame:
    rows = [
        {
            "model": model,
            "category": "all",
            "metric": metric,
            "n": 10 - (model == "Additive"),
            "mean": mean,
            "low": mean - 0.1,
            "high": mean + 0.2,
        }
        for model, means in MEANS.items()
        for metric, mean in zip(("pearson_delta", "mse"), means, strict=True)
    ]
    return pd.DataFrame(rows)


def test_leaderboard_draws_the_table_best_first() -> None:
    ax = plot_leaderboard(_summary())
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["split-half ceiling", "Additive (n = 9)", "GEARS", "NoChange"]
    drawn = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_label() in MEANS}
    assert drawn == {"split-half ceiling": (0.9, 0), "Additive": (0.7, 1), "GEARS": (0.6, 2), "NoChange": (0.0, 3)}
    intervals = sorted(tuple(np.round(segment[:, 0], 12)) for group in ax.collections for segment in group.get_segments())
    assert intervals == sorted((round(mean - 0.1, 12), round(mean + 0.2, 12)) for mean, _ in MEANS.values())
    assert "higher is better" in ax.get_xlabel()
    # the dashed line is at the split-half ceiling and says so
    (line,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert line.get_xdata()[0] == 0.9
    assert [(text.get_text(), text.xy[0]) for text in ax.texts] == [("split-half ceiling", 0.9)]
    # the model filled, floors hollow
    faces = {line.get_label(): line.get_markerfacecolor() for line in ax.lines}
    assert faces["NoChange"] == faces["Additive"] == "white" != faces["GEARS"]


def test_leaderboard_where_lower_is_better() -> None:
    ax = plot_leaderboard(_summary(), "mse", kinds=dict.fromkeys(MEANS, "model"))
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert (labels[0], labels[-1]) == ("split-half ceiling", "NoChange")
    assert "lower is better" in ax.get_xlabel()


def test_ranks_with_a_tie() -> None:
    ax = plot_ranks(_summary(), ["pearson_delta", "mse"])
    drawn = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert drawn == {"GEARS": [2.0, 1.5], "Additive": [1.0, 1.5], "NoChange": [3.0, 3.0]}
    assert [text.get_text() for text in ax.texts] == ["Additive", "GEARS", "NoChange", "GEARS, Additive", "NoChange"]
    # each name stands at its point
    assert [text.get_position()[1] for text in ax.texts] == [1.0, 2.0, 3.0, 1.5, 3.0]
    assert ax.yaxis_inverted()


@pytest.mark.parametrize("draw", [plot_leaderboard, lambda table: plot_ranks(table, ["pearson_delta"])])
def test_wrong_tables_are_refused(draw) -> None:
    with pytest.raises(PerturbZooError, match="lacks the columns high, low"):
        draw(_summary().drop(columns=["low", "high"]))
    with pytest.raises(PerturbZooError, match="'pearson_delta' is not in the summary"):
        draw(_summary().query("metric == 'mse'"))


def test_top_genes_side_by_side() -> None:
    random = np.random.default_rng(0)
    names, genes = [f"C{row}" for row in range(6)], [f"G{column}" for column in range(9)]
    observed = pd.DataFrame(random.normal(size=(6, 9)), names, genes)
    predicted = pd.DataFrame(random.normal(size=(6, 9)), names, genes)
    left, right = plot_top_genes(observed, predicted.sample(frac=1, random_state=1).iloc[:, ::-1], n_genes=4)
    rows = [tick.get_text() for tick in left.get_yticklabels()]
    columns = [tick.get_text() for tick in left.get_xticklabels()]
    assert columns == [tick.get_text() for tick in right.get_xticklabels()]
    assert set(columns) == set(observed.abs().max().nlargest(4).index)
    np.testing.assert_array_equal(left.images[0].get_array(), observed.loc[rows, columns])
    np.testing.assert_array_equal(right.images[0].get_array(), predicted.loc[rows, columns])
    assert left.images[0].get_clim() == right.images[0].get_clim()
    with pytest.raises(PerturbZooError, match="different conditions or genes"):
        plot_top_genes(observed, predicted.iloc[1:])
    with pytest.raises(PerturbZooError, match="predicted deltas hold NaN"):
        plot_top_genes(observed, predicted.replace(predicted.iloc[0, 0], np.nan))
