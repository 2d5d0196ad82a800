"""The figure of paths: its lines are the edges of the paths given, in layers, with their signs and weights."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch

from perturbzoo.errors import PerturbZooError
from perturbzoo.plotting import plot_paths
from perturbzoo.plotting.paths import ACTIVATES, REPRESSES

PATHS = pd.DataFrame(
    [
        ("C", "A -> C", 0.4),
        ("C", "A -> B -> C", -0.3),
        ("C", "A -> B -> A -> C", 0.1),
        ("D", "E -> D", -0.2),
        ("D", "A -> B -> C -> D", 0.01),
        ("A", "A", -2.0),
        ("C", "other / feedback", 0.05),
    ],
    columns=["gene", "path", "contribution"],
)
EDGES = pd.DataFrame(
    [("A", "C", 1.0), ("A", "B", 0.5), ("B", "C", -0.7), ("B", "A", 0.2), ("E", "D", -1.0), ("C", "D", 0.3), ("C", "A", 9.0)],
    columns=["regulator", "target", "response"],
)


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def lines_of(ax: plt.Axes) -> dict[str, FancyArrowPatch]:
    return {line.get_gid(): line for line in ax.patches if isinstance(line, FancyArrowPatch)}


def places(ax: plt.Axes) -> dict[str, tuple[float, float]]:
    return {text.get_text(): text.get_position() for text in ax.texts}


def test_lines_are_the_edges_of_the_paths():
    ax = plot_paths(PATHS, EDGES)
    lines, place = lines_of(ax), places(ax)
    assert set(lines) == {"A -> C", "A -> B", "B -> C", "B -> A", "E -> D", "C -> D"}
    assert set(place) == set("ABCDE")
    for gid, line in lines.items():
        regulator, target = gid.split(" -> ")
        np.testing.assert_allclose(line._posA_posB, [place[regulator], place[target]])
    # colours are the signs
    assert {gid: to_hex(line.get_edgecolor()) for gid, line in lines.items()} == {
        gid: (REPRESSES if gid in ("B -> C", "E -> D") else ACTIVATES).lower() for gid in lines
    }
    # widths are linear in what is carried: A -> C 0.4 + 0.1, A -> B 0.3 + 0.1 + 0.01, ...
    carried = {"A -> C": 0.5, "A -> B": 0.41, "B -> C": 0.31, "B -> A": 0.1, "E -> D": 0.2, "C -> D": 0.01}
    thin, thick = 0.8, 5.0
    for gid, amount in carried.items():
        assert lines[gid].get_linewidth() == pytest.approx(thin + (thick - thin) * amount / 0.5)


def test_layers_are_distances_from_perturbed_genes():
    place = places(plot_paths(PATHS, EDGES))
    x = {gene: round(at[0], 6) for gene, at in place.items()}
    assert x["A"] == x["E"] < x["B"] == x["C"] == x["D"]
    place = places(plot_paths(PATHS[:3], EDGES, n_paths=2))
    assert place["A"][0] < place["B"][0] == place["C"][0]
    assert len(set(map(tuple, place.values()))) == 3


def test_what_is_drawn_can_be_chosen():
    given = plt.figure().gca()
    ax = plot_paths(PATHS, EDGES, n_paths=1, ax=given)
    assert ax is given
    assert set(lines_of(ax)) == {"A -> C"}
    assert set(lines_of(plot_paths(PATHS, EDGES, genes=["D"]))) == {"E -> D", "A -> B", "B -> C", "C -> D"}


def test_changes_colour_the_genes():
    changes = pd.DataFrame({"gene": list("ABCDE"), "change": [-2.0, 0.0, 1.0, 0.5, -1.0]})
    ax = plot_paths(PATHS, EDGES, changes=changes)
    squares, circles = (np.asarray(points.get_array()) for points in ax.collections)
    assert squares.tolist() == [-2, -1]
    assert sorted(circles.tolist()) == [0, 0.5, 1]
    assert {points.get_clim() for points in ax.collections} == {(-2, 2)}
    ax.figure.canvas.draw()


def test_what_cannot_be_drawn():
    for message, paths, edges, options in (
        ("paths lack the columns contribution", PATHS.drop(columns="contribution"), EDGES, {}),
        ("edges lack the columns response", PATHS, EDGES.drop(columns="response"), {}),
        ("no path to 'CC'; did you mean 'C'", PATHS, EDGES, {"genes": ["CC"]}),
        ("nothing moves along the network", PATHS[5:], EDGES, {}),
        ("the edge A -> C of the path 'A -> C' is not among the edges", PATHS, EDGES[1:], {}),
    ):
        with pytest.raises(PerturbZooError, match=message):
            plot_paths(paths, edges, **options)
