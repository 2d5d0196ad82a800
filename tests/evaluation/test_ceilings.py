"""What one half of the cells says of the other: the definitions of scperteval, and what a half can know."""

from __future__ import annotations

import numpy as np
import pytest
from scperteval.blocks.de import ttest_from_moments

from perturbzoo.evaluation.ceilings import interpolated_duplicate
from perturbzoo.evaluation.pseudobulk import GroupMoments


def _moments(groups: list[np.ndarray]) -> GroupMoments:
    return GroupMoments(
        count=np.array([len(cells) for cells in groups]),
        mean=np.array([cells.mean(axis=0) for cells in groups]),
        variance=np.array([cells.var(axis=0, ddof=1) for cells in groups]),
    )


@pytest.fixture
def screen() -> list[np.ndarray]:
    """Four conditions of some cells by 30 genes; the last gene is 0 everywhere."""
    generator = np.random.default_rng(0)
    effects = generator.normal(0, 1, (4, 30)) * (generator.random((4, 30)) < 0.3)
    cells = [generator.normal(2 + effect, 0.7, (size, 30)) for effect, size in zip(effects, (20, 31, 16, 24), strict=True)]
    for block in cells:
        block[:, -1] = 0.0
    return cells


def test_interpolated_duplicate_is_that_of_scperteval(screen: list[np.ndarray]) -> None:
    halves = [cells[::2] for cells in screen]
    found = interpolated_duplicate(_moments(halves), _moments(screen))
    for row, half in enumerate(halves):
        others = np.concatenate([cells for at, cells in enumerate(screen) if at != row])
        sides = [(cells.mean(axis=0), cells.var(axis=0, ddof=1), len(cells)) for cells in (half, others)]
        alpha = 1 - ttest_from_moments(*sides[0], *sides[1]).pvalue_adj
        mean = np.mean([cells.mean(axis=0) for at, cells in enumerate(screen) if at != row], axis=0)
        np.testing.assert_allclose(found[row], alpha * half.mean(axis=0) + (1 - alpha) * mean, rtol=1e-6)
        assert 0.01 < alpha.mean() < 0.99  # both parts are at work


def test_a_clear_gene_is_the_half_and_an_unchanged_one_the_others(screen: list[np.ndarray]) -> None:
    screen[0][:, 0] += 50
    for cells in screen:
        cells[:, 1] = np.resize([1.0, 3.0], len(cells))  # as far as a test can see, the same in all
    halves = [cells[: len(cells) // 2] for cells in screen]
    found = interpolated_duplicate(_moments(halves), _moments(screen))
    assert found[0, 0] == pytest.approx(halves[0][:, 0].mean(), abs=1e-6)
    others = np.mean([cells[:, 1].mean() for cells in screen[1:]])
    assert found[0, 1] == pytest.approx(others, abs=1e-9)
    np.testing.assert_array_equal(found[:, -1], 0.0)


def test_one_condition_alone_has_no_others(screen: list[np.ndarray]) -> None:
    assert np.isnan(interpolated_duplicate(_moments(screen[:1]), _moments(screen[:1]))).all()


def test_no_half_no_duplicate(screen: list[np.ndarray]) -> None:
    duplicate = _moments([cells[::2] for cells in screen])
    duplicate.mean[1], duplicate.variance[1] = np.nan, np.nan
    found = interpolated_duplicate(duplicate, _moments(screen))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2, 3]]).all()
