"""Tests between cells against scipy's, gene by gene, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import mannwhitneyu

from perturbzoo.evaluation.differential import Differential, against_control, unchanged


def _cells(seed: int, n: int, n_genes: int = 40) -> np.ndarray:
    generator = np.random.default_rng(seed)
    counts = generator.poisson(generator.gamma(0.5, 2, n_genes), (n, n_genes))
    return np.log1p(counts).astype(np.float32)


def _test(cells: np.ndarray, group: np.ndarray, n_groups: int, control: np.ndarray, **options: int) -> Differential:
    return against_control(sparse.csr_matrix(cells), group, n_groups, sparse.csr_matrix(control), **options)


def test_p_values_are_those_of_scipy() -> None:
    cells, control = _cells(0, 50), _cells(1, 35)
    cells[:, 0] = control[:, 0] = 0  # a gene that nobody expresses
    group = np.repeat([0, 2], [20, 30])
    found = _test(cells, group, 3, control)
    for row in (0, 2):
        mine = cells[group == row].astype(float)
        test = mannwhitneyu(mine, control.astype(float), axis=0, method="asymptotic", use_continuity=False)
        np.testing.assert_allclose(found.p_value[row, 1:], test.pvalue[1:], rtol=1e-9)
        assert found.p_value[row, 0] == 1
        linear = [np.expm1(side.astype(float)).mean(axis=0) + 1e-9 for side in (mine, control)]
        np.testing.assert_allclose(found.log2_fold_change[row], np.log2(linear[0] / linear[1]), atol=1e-9)
    assert found.tested.tolist() == [True, False, True]
    assert np.isnan(found.p_value[1]).all()
    assert not found.significant[1].any()


def test_adjustment_is_within_a_condition() -> None:
    cells, control = _cells(0, 40), _cells(1, 40)
    found = _test(cells, np.repeat([0, 1], 20), 2, control)
    for p, adjusted in zip(found.p_value, found.p_adjusted, strict=True):
        order = np.argsort(p)
        expected = [min(p[order[rank:]] * len(p) / np.arange(rank + 1, len(p) + 1)) for rank in range(len(p))]
        np.testing.assert_allclose(adjusted[order], np.minimum(expected, 1), rtol=1e-12)
    alone = _test(cells[:20], np.zeros(20, dtype=int), 1, control)
    np.testing.assert_allclose(alone.p_adjusted[0], found.p_adjusted[0])


def test_values_below_zero_are_ranked_below_zeros() -> None:
    cells, control = _cells(2, 30), _cells(3, 30)
    cells[::3] *= -1
    found = _test(cells, np.zeros(30, dtype=int), 1, control)
    test = mannwhitneyu(cells.astype(float), control.astype(float), axis=0, method="asymptotic", use_continuity=False)
    np.testing.assert_allclose(found.p_value[0], np.where(np.isnan(test.pvalue), 1, test.pvalue), rtol=1e-9)
    # a mean below 0 has no fold change, and is not significant whatever its p-value
    below = _test(np.full((30, 40), -0.5, dtype=np.float32), np.zeros(30, dtype=int), 1, control + 1)
    assert np.isnan(below.log2_fold_change).all()
    assert (below.p_adjusted < 0.05).all()
    assert not below.significant.any()


def test_order_of_cells_genes_and_conditions_and_threads_do_not_matter() -> None:
    cells, control = _cells(4, 60), _cells(5, 40)
    group = np.repeat([0, 1, 2], 20)
    once = _test(cells, group, 3, control, threads=1)
    generator = np.random.default_rng(6)
    order, genes = generator.permutation(60), generator.permutation(40)
    other = _test(cells[order][:, genes], group[order], 3, control[generator.permutation(40)][:, genes], threads=1)
    for name in ("p_value", "p_adjusted", "log2_fold_change"):
        np.testing.assert_allclose(getattr(other, name), getattr(once, name)[:, genes], rtol=1e-9, atol=1e-12)
    relabelled = _test(cells, 2 - group, 3, control)
    np.testing.assert_array_equal(relabelled.p_value, once.p_value[::-1])


def test_control_cells_do_not_differ_from_themselves() -> None:
    control = _cells(7, 50)
    found, expected = _test(control, np.zeros(50, dtype=int), 1, control), unchanged(1, 40)
    for name in ("p_value", "p_adjusted", "log2_fold_change"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-12)
    assert not expected.significant.any()


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    _test(_cells(0, 20), np.zeros(20, dtype=int), 1, _cells(1, 20))
    assert capfd.readouterr() == ("", "")
