"""The figure of interaction scores: every point is a pair of scores that was given, and what is left out is said."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.interaction import SCORES
from perturbzoo.plotting import plot_interaction_scores
from perturbzoo.plotting.interaction import TITLES

NAMES = [f"A{number}+B{number}" for number in range(12)]


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def _scores(seed: int, names: list[str] = NAMES) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    return pd.DataFrame({"condition": names, **{score: random.uniform(0, 2, len(names)) for score in SCORES}})


def test_points_are_the_scores_of_common_combinations() -> None:
    predicted, observed = _scores(0), _scores(1, [*NAMES[::-1], "C+D"])
    axes = plot_interaction_scores(predicted, observed, scores=["mag", "eq_contr"])
    assert len(axes) == 2
    assert len(axes[0].figure.axes) == 2
    x, y = observed.set_index("condition"), predicted.set_index("condition")
    for ax, score in zip(axes, ("mag", "eq_contr"), strict=True):
        points = np.asarray(ax.collections[0].get_offsets())
        expected = np.column_stack([x.loc[NAMES, score], y.loc[NAMES, score]])
        np.testing.assert_allclose(points[points[:, 0].argsort()], expected[expected[:, 0].argsort()])
        assert ax.get_xlim() == ax.get_ylim()
        line = ax.lines[0].get_xydata()
        np.testing.assert_array_equal(line[:, 0], line[:, 1])
        r = np.corrcoef(expected.T)[0, 1]
        assert f"r = {r:.2f}   n = 12" in ax.get_title()
        assert (ax.get_xlabel(), ax.get_ylabel()) == (f"observed {score}", f"predicted {score}")


def test_names_are_those_furthest_from_the_line() -> None:
    observed = _scores(1)
    predicted = observed.copy()
    predicted.loc[[2, 7], "mag"] += [1.0, -0.5]
    (ax,) = plot_interaction_scores(predicted, observed, scores=["mag"], n_labels=2)
    texts = {text.get_text(): text for text in ax.texts}
    assert set(texts) == {NAMES[2], NAMES[7]}
    for row in (2, 7):
        assert texts[NAMES[row]].xy == (observed.loc[row, "mag"], predicted.loc[row, "mag"])
    ax.figure.canvas.draw()
    boxes = [mpl.text.Text.get_window_extent(text) for text in ax.texts]
    assert not boxes[0].overlaps(boxes[1])
    assert all(box.x1 <= ax.figure.bbox.x1 for box in boxes)


def test_undefined_scores_are_counted() -> None:
    predicted, observed = _scores(0), _scores(1)
    predicted.loc[[0, 1], "dominance"] = [np.nan, np.inf]
    observed.loc[[1, 5], "dominance"] = np.nan
    observed["corr_fit"] = np.nan
    dominance, fit = plot_interaction_scores(predicted, observed, scores=["dominance", "corr_fit"], n_labels=0)
    assert dominance.collections[0].get_offsets().shape == (9, 2)
    assert [text.get_text() for text in dominance.texts] == ["3 undefined"]
    assert [text.get_text() for text in fit.texts] == ["12 undefined"]
    assert fit.get_title() == f"{TITLES['corr_fit']}   n = 0"
    fit.figure.canvas.draw()


def test_panels_of_all_scores_and_given_axes() -> None:
    axes = plot_interaction_scores(_scores(0), _scores(1), scores=SCORES, labels=("model", "data"))
    assert [ax.get_title().split("   ")[0] for ax in axes] == [TITLES[name] for name in SCORES]
    assert axes[0].get_xlabel() == "data c1"
    given = plt.figure().subplots(1, 2)
    assert plot_interaction_scores(_scores(0), _scores(1), scores=["mag", "dcor"], axes=list(given)) == list(given)


def test_what_cannot_be_drawn() -> None:
    predicted, observed = _scores(0), _scores(1)
    for message, arguments, options in (
        ("no interaction score 'magn'; did you mean 'mag'", (predicted, observed), {"scores": ["magn"]}),
        ("the observed scores lack the columns mag", (predicted, observed.drop(columns="mag")), {}),
        ("no combination has both predicted and observed", (predicted, _scores(1, ["C+D"])), {}),
        ("1 axes for 6 scores", (predicted, observed), {"axes": [plt.figure().gca()]}),
    ):
        with pytest.raises(PerturbZooError, match=message):
            plot_interaction_scores(*arguments, **options)
