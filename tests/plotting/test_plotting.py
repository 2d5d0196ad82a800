"""What the figures show: every number drawn is one that was given, labels do not overlap, wrong tables are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.summary import summarise
from perturbzoo.plotting import plot_delta_heatmap, plot_delta_scatter, plot_score_bars, plot_training_curves
from perturbzoo.plotting.effects import spread_apart

GENES = [f"GENE{index:04d}" for index in range(60)]


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def _deltas(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    observed = random.normal(0, 0.5, len(GENES))
    return observed, 0.1 * observed + random.normal(0, 0.01, len(GENES))


def _named(ax: Axes) -> set[str]:
    return {text.get_text() for text in ax.texts}


def test_scatter_names_the_largest_and_the_targets() -> None:
    observed, predicted = _deltas()
    target = GENES[int(np.abs(observed).argmin())]
    ax = plot_delta_scatter(observed, predicted, GENES, condition="A+B", targets=[target, "NOT_MEASURED"], n_labels=8)
    largest = np.array(GENES)[np.argsort(-np.abs(observed))[:7]]
    assert _named(ax) == {target, *largest}
    points = np.concatenate([np.asarray(group.get_offsets()) for group in ax.collections])
    np.testing.assert_allclose(np.sort(points[:, 0]), np.sort(observed))
    np.testing.assert_allclose(points[np.argsort(points[:, 0]), 1], predicted[np.argsort(observed)])
    assert f"{np.corrcoef(observed, predicted)[0, 1]:.2f}" in ax.get_title()
    assert ax.get_xlabel() == "observed delta, log1p-normalised"
    assert ax.get_ylabel() == "predicted delta, log1p-normalised"


@pytest.mark.parametrize("flatness", [1.0, 0.1, 0.0])
def test_scatter_labels_do_not_overlap(flatness: float) -> None:
    observed, predicted = _deltas(1)
    long_names = [f"AC0{index:05d}.1-AS1" for index in range(len(GENES))]
    ax = plot_delta_scatter(observed, flatness * predicted, long_names, n_labels=24)
    ax.figure.canvas.draw()
    # the words only: the extent of an annotation includes its leader, those of Text do not
    boxes = [mpl.text.Text.get_window_extent(text) for text in ax.texts]
    assert len(boxes) == 24
    for position, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[position + 1 :])
        assert box.x0 >= ax.figure.bbox.x0
        assert box.x1 <= ax.figure.bbox.x1


def test_scatter_without_any_change() -> None:
    ax = plot_delta_scatter(np.zeros(3), np.zeros(3), ["A", "B", "C"], n_labels=0)
    assert "undefined" in ax.get_title()
    assert not ax.texts


def test_spread_apart() -> None:
    free = np.array([0.0, 1.0, 2.0])
    np.testing.assert_allclose(spread_apart(free, 0.5, -5, 5), free)
    # a crowd stays centred on its mean, and the last one, far away, is left alone
    np.testing.assert_allclose(spread_apart(np.array([1.0, 1.0, 1.0, 9.0]), 0.5, -5, 10), [0.5, 1.0, 1.5, 9.0])
    # pushed down from the upper end
    np.testing.assert_allclose(spread_apart(np.array([9.9, 10.0, 12.0]), 1.0, 0, 10), [8.0, 9.0, 10.0])


@pytest.mark.parametrize("cluster", [True, False])
def test_heatmap_shows_the_genes_that_change_most(cluster: bool) -> None:
    random = np.random.default_rng(0)
    delta = pd.DataFrame(random.normal(0, 0.01, (6, 30)), [f"T{i}" for i in range(6)], GENES[:30])
    delta.loc["T2", "GENE0007"], delta.loc["T4", "GENE0020"], delta.loc["T5", "GENE0003"] = 1.0, -2.0, 0.5
    ax = plot_delta_heatmap(delta, n_genes=3, cluster=cluster)
    columns = [text.get_text() for text in ax.get_xticklabels()]
    rows = [text.get_text() for text in ax.get_yticklabels()]
    assert sorted(columns) == ["GENE0003", "GENE0007", "GENE0020"]
    assert sorted(rows) == sorted(delta.index)
    if not cluster:
        assert rows == list(delta.index)
    image = ax.get_images()[0]
    np.testing.assert_array_equal(np.asarray(image.get_array()), delta.loc[rows, columns])
    assert image.get_clim() == (-2.0, 2.0)


def test_heatmap_puts_alike_conditions_together() -> None:
    pattern = np.random.default_rng(1).normal(size=(2, 12))
    values = pattern[[0, 1, 0, 1, 0, 1]] + np.random.default_rng(2).normal(0, 0.05, (6, 12))
    ax = plot_delta_heatmap(pd.DataFrame(values, list("abcdef"), GENES[:12]))
    rows = "".join(text.get_text() for text in ax.get_yticklabels())
    assert {frozenset(rows[:3]), frozenset(rows[3:])} == {frozenset("ace"), frozenset("bdf")}
    assert plot_delta_heatmap(pd.DataFrame([[0.0]], ["a"], ["b"])).get_images()


def _summary() -> pd.DataFrame:
    random = np.random.default_rng(0)
    category = ["unseen_single"] * 6 + ["combo_seen1"] * 4
    scores = {}
    for model, level in (("GEARS", 0.6), ("TrainingMean", 0.3), ("NoChange", 0.0), ("split-half ceiling", 0.9)):
        r = level + random.normal(0, 0.05, 10) * (level > 0)
        scores[model] = pd.DataFrame(
            {"condition": list("abcdefghij"), "context": "", "category": category, "pearson_delta": r, "mse": (1 - r) / 99}
        )
    return summarise(scores, categories=["unseen_single", "combo_seen1", "unseen_context"], n_bootstrap=50)


def test_bars_are_the_means() -> None:
    summary = _summary()
    ax = plot_score_bars(summary)
    rows = summary[summary["metric"] == "pearson_delta"].set_index(["model", "category"])
    names = ["all", "unseen_single", "combo_seen1", "unseen_context"]
    for container, model in zip(ax.containers[::2], ("GEARS", "TrainingMean", "NoChange"), strict=True):
        assert container.get_label() == model
        heights = [bar.get_height() for bar in container]
        np.testing.assert_allclose(heights, rows.loc[model].loc[names, "mean"])
    for container, model in zip(ax.containers[1::2], ("GEARS", "TrainingMean", "NoChange"), strict=True):
        segments = container.lines[2][0].get_segments()
        ends = np.array([segment[:, 1] for segment in segments if len(segment)])[:3]
        np.testing.assert_allclose(ends, rows.loc[model].loc[names[:3], ["low", "high"]], atol=1e-12)
    # GEARS, which comes first, stands left of the others in its group; groups do not touch
    edges = np.array([[(bar.get_x(), bar.get_x() + bar.get_width()) for bar in box] for box in ax.containers[::2]])
    assert (edges[:-1, :, 1] <= edges[1:, :, 0]).all()
    assert (edges[-1, :-1, 1] < edges[0, 1:, 0]).all()
    ceiling = next(lines for lines in ax.collections if lines.get_label() == "split-half ceiling")
    levels = [segment[0, 1] for segment in ceiling.get_segments() if len(segment)]
    np.testing.assert_allclose(levels, rows.loc["split-half ceiling"].loc[names[:3], "mean"])
    assert [text.get_text() for text in ax.get_xticklabels()][1:] == [
        "unseen single\n(n = 6)",
        "combo seen1\n(n = 4)",
        "unseen context\n(n = 0)",
    ]
    assert "higher is better" in ax.get_ylabel()


def test_bars_of_one_category() -> None:
    figure, given = plt.subplots()
    ax = plot_score_bars(_summary(), "mse", categories=["combo_seen1"], ax=given)
    assert ax is given
    assert [len(container) for container in ax.containers[::2]] == [1, 1, 1]
    assert "lower is better" in ax.get_ylabel()
    figure.canvas.draw()


def _metrics() -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for epoch, score in enumerate([0.2, 0.5, 0.4]):
        rows += [{"epoch": epoch, "step": 10 * epoch + step, "train/loss_step": 9.0 + step} for step in (0, 5)]
        rows.append({"epoch": epoch, "train/loss_epoch": 4.0 / (epoch + 1), "train/direction": 0.01})
        rows.append({"epoch": epoch, "val/pearson_delta": score, "val/mse": 0.3 - score / 2, "lr": 0.1})
    return pd.DataFrame(rows)


def test_training_curves(tmp_path: Path) -> None:
    _metrics().to_csv(tmp_path / "metrics.csv", index=False)
    losses, correlation, error = plot_training_curves(tmp_path / "metrics.csv")
    curves = {line.get_label(): line for line in losses.lines}
    assert set(curves) == {"loss", "direction"}
    np.testing.assert_allclose(curves["loss"].get_xydata(), [[0, 4], [1, 2], [2, 4 / 3]])
    assert losses.get_yscale() == "log"
    np.testing.assert_allclose(correlation.lines[0].get_ydata(), [0.2, 0.5, 0.4])
    np.testing.assert_allclose(correlation.lines[1].get_xydata(), [[1, 0.5]])
    np.testing.assert_allclose(error.lines[1].get_xydata(), [[1, 0.05]])
    assert [ax.get_xlabel() for ax in (losses, correlation, error)] == ["epoch"] * 3


def test_training_curves_of_a_value_per_step_only() -> None:
    table = pd.DataFrame({"epoch": [0, 0, 1], "train/mse_step": [1.0, 3.0, 5.0]})
    (ax,) = plot_training_curves(table)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 2], [1, 5]])


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    table = _summary()
    infinite = pd.DataFrame([[np.inf]], ["a"], ["b"])
    for message, draw in (
        ("one value per gene", lambda: plot_delta_scatter(np.zeros(3), np.zeros(2), list("abc"))),
        ("NaN or infinite", lambda: plot_delta_scatter([np.nan], [0.0], ["a"])),
        ("is empty", lambda: plot_delta_heatmap(pd.DataFrame())),
        ("NaN or infinite", lambda: plot_delta_heatmap(infinite)),
        ("lacks the columns high, low", lambda: plot_score_bars(table.drop(columns=["low", "high"]))),
        ("metric 'msee' is not in the summary; did you mean 'mse'", lambda: plot_score_bars(table, "msee")),
        ("category 'unseen_singles' is not", lambda: plot_score_bars(table, categories=["unseen_singles"])),
        ("cannot read the metrics", lambda: plot_training_curves(tmp_path / "nowhere.csv")),
        ("cannot read the metrics", lambda: plot_training_curves(tmp_path / "empty.csv")),
        ("no column 'epoch'", lambda: plot_training_curves(pd.DataFrame({"train/loss": [1.0]}))),
        ("no train/ or val/ values", lambda: plot_training_curves(pd.DataFrame({"epoch": [0], "lr": [1.0]}))),
        ("1 axes for 3 panels", lambda: plot_training_curves(_metrics(), axes=[plt.figure().gca()])),
    ):
        with pytest.raises(PerturbZooError, match=message):
            draw()
