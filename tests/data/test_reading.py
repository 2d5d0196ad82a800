"""Reading: the arithmetic against closed forms, value spaces, filters and paths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbzoo.data import reading
from perturbzoo.data.reading import detect_value_space, expand_path, filter_cells, group_means, normalise, row_sums
from perturbzoo.errors import PerturbZooError


def csr(rows: object) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.asarray(rows, dtype=np.float32))


@pytest.fixture(params=[1 << 22, 7], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through a matrix: at once, and a few values at a time."""
    monkeypatch.setattr(reading, "_BLOCK", request.param)


# ---------------------------------------------------------------------- arithmetic


@pytest.mark.usefixtures("blocks")
def test_normalise_is_log1p_of_counts_per_depth() -> None:
    counts = np.array([[0, 1, 3], [8, 0, 0], [0, 0, 0], [2, 5, 1]])
    size_factor = np.array([4.0, 16.0, 1.0, 8.0])
    values = csr(counts)
    normalise(values, size_factor, depth=8.0)
    # rows 1 and 2 by hand: 1 / 4 * 8 = 2, 3 / 4 * 8 = 6; 8 / 16 * 8 = 4
    expected = [[0, np.log(3), np.log(7)], [np.log(5), 0, 0], [0, 0, 0], [np.log(3), np.log(6), np.log(2)]]
    np.testing.assert_allclose(values.toarray(), expected, rtol=1e-6)


def test_normalise_does_not_see_the_depth_of_a_cell() -> None:
    counts = np.random.default_rng(0).poisson(2.0, (20, 15)) + 1
    shallow, deep = csr(counts), csr(counts * 7)
    for values in (shallow, deep):
        normalise(values, row_sums(values), depth=100.0)
    np.testing.assert_allclose(shallow.toarray(), deep.toarray(), rtol=1e-5)
    # with total counts as size factors every cell has the wanted depth
    np.testing.assert_allclose(np.expm1(deep.toarray()).sum(axis=1), 100.0, rtol=1e-5)


@pytest.mark.usefixtures("blocks")
def test_group_means_are_means_of_rows() -> None:
    dense = np.random.default_rng(1).poisson(1.0, (11, 5)).astype(float)
    groups = [np.array([0, 4, 10]), np.array([3]), np.array([], dtype=np.int64), np.array([4, 5, 6, 7])]
    means, squares = (group_means(csr(dense), groups, squared=squared) for squared in (False, True))
    for group, mean, square in zip(groups, means, squares, strict=True):
        if len(group):
            np.testing.assert_allclose(mean, dense[group].mean(axis=0), rtol=1e-12)
            np.testing.assert_allclose(square, (dense[group] ** 2).mean(axis=0), rtol=1e-12)
    np.testing.assert_array_equal(means[2], 0.0)
    assert means.shape == (4, 5)


def test_group_means_leave_the_matrix_as_it_was() -> None:
    values = csr([[1, 2], [3, 0]])
    group_means(values, [np.array([0, 1])], squared=True)
    np.testing.assert_array_equal(values.toarray(), [[1, 2], [3, 0]])


def test_row_sums_skip_empty_rows_and_are_exact() -> None:
    # 2**24 + 1 is no float32: the sum needs float64
    values = csr([[0, 0], [2**24, 1], [0, 0], [0, 3], [0, 0]])
    assert row_sums(values).tolist() == [0, 2**24 + 1, 0, 3, 0]


def test_row_sums_ignore_room_beyond_the_last_value() -> None:
    roomy = sparse.csr_matrix((np.array([1.0, 2, 9, 9], np.float32), [0, 1, 0, 1], [0, 1, 2]), shape=(2, 2))
    assert row_sums(roomy).tolist() == [1, 2]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("rows", "space"),
    [
        ([[0, 1], [200, 3]], "counts"),
        ([[0, 1], [2, 3]], "counts"),
        ([[0, 0.5], [6.2, 3]], "log1p"),
        ([[0, 29.9], [1, 0]], "log1p"),
    ],
)
def test_value_space_is_detected(rows: list[list[float]], space: str) -> None:
    assert detect_value_space(csr(rows), None, "file") == space
    assert detect_value_space(csr(rows), space, "file") == space  # type: ignore[arg-type]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("rows", "wanted", "message"),
    [
        ([[0.5, 0], [31, 0]], None, "fractions up to 31"),
        ([[0.5, 0], [3, 0]], "counts", "value_space is 'counts'"),
        ([[5, 0], [31, 0]], "log1p", "reaches 31"),
        ([[5, 0], [2, 0]], "log1p", "whole numbers"),
        ([[0, 1], [-2, -0.5]], None, "2 of them, smallest -2"),
        ([[0, np.nan], [np.inf, 1]], None, "2 of them"),
        ([[0, np.nan], [-1, 1]], "log1p", "NaN"),
    ],
)
def test_values_that_cannot_be_used(rows: list[list[float]], wanted: str | None, message: str) -> None:
    with pytest.raises(PerturbZooError, match=message):
        detect_value_space(csr(rows), wanted, "file")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- filters and paths

OBS = pd.DataFrame(
    {
        "fraction": [0.2, 0.5, 0.9, np.nan],
        "n counts": [1, 2, 3, 4],
        "line": pd.Categorical(["K562", "RPE1", "K562", "RPE1"]),
        "doublet": [True, False, False, True],
        "guides": pd.array([1, None, 2, 1], dtype="Int64"),
        "orig-ident": ["a", "b", "a", "c"],
    }
)


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("fraction > .5", [2]),
        ("fraction>=0.5", [1, 2]),
        ("fraction < 0.5", [0]),
        ("fraction <= 5e-1", [0, 1]),
        ("n counts == 3", [2]),
        ("n counts != 3", [0, 1, 3]),
        ("line == K562", [0, 2]),
        ("line != 'K562'", [1, 3]),
        ("doublet == False", [1, 2]),
        ("guides == 1", [0, 3]),
        ("orig-ident == a", [0, 2]),
        ("fraction > 0.1 and n counts <= 2 and line == RPE1", [1]),
    ],
)
def test_cell_filter(expression: str, kept: list[int]) -> None:
    assert np.flatnonzero(filter_cells(OBS, expression, "file")).tolist() == kept


def test_paths_expand_variables_and_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCREENS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = tmp_path / "a.h5ad"
    assert [expand_path(text) for text in ("$SCREENS/a.h5ad", "${SCREENS}/a.h5ad", "~/a.h5ad")] == [expected] * 3
