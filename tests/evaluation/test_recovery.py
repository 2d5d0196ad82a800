"""Recovery of differentially expressed genes on tables of tests made by hand, after cell-eval2's definitions."""

from __future__ import annotations

import numpy as np
import pytest

from perturbzoo.evaluation import recovery
from perturbzoo.evaluation.differential import Differential, unchanged

N = 40


def _tests(lfc: dict[int, float], others: float = 0.0) -> Differential:
    """One condition: the named genes are significant, with their fold change."""
    fold, p = np.full((1, N), others), np.ones((1, N))
    for gene, value in lfc.items():
        fold[0, gene], p[0, gene] = value, 0.001
    return Differential(p, p, fold)


def _recovery(predicted: Differential, observed: Differential, *targets: int) -> dict[str, float]:
    mask = np.zeros((1, N), dtype=bool)
    mask[0, list(targets)] = True
    return {name: float(values[0]) for name, values in recovery.recovery(predicted, observed, mask).items()}


TRUTH = {gene: (10.0 - gene) * (-1) ** gene for gene in range(10)}  # genes 0 ... 9, magnitudes 10 ... 1, signs alternate


def test_overlaps_by_hand() -> None:
    # predicted, by magnitude: 20, 0, 21, 1, 9; of the ten observed genes 0, 1, 9 are among them
    found = _recovery(_tests({20: 9.0, 0: 8.0, 21: -7.0, 1: -6.0, 9: 1.0}), _tests(TRUTH))
    assert found["de_overlap"] == pytest.approx(3 / 10)
    assert found["de_precision"] == pytest.approx(2 / 5)  # the first five of either: 0 and 1
    assert found["de_recall"] == pytest.approx(3 / 10)
    assert found["de_jaccard"] == pytest.approx(3 / 12)
    assert found["de_n_significant_observed"] == 10
    assert found["de_n_significant_predicted"] == 5
    # of the five called genes 20 and 21 do not change: sign 0; 9 has the wrong one
    assert found["de_model_direction_match"] == pytest.approx(2 / 5)
    for k in recovery.TOP:
        assert found[f"de_overlap_top{k}"] == found["de_overlap"]  # fewer genes than k
        assert found[f"de_precision_top{k}"] == found["de_precision"]


def test_the_first_k_of_more() -> None:
    n = 120
    lfc = np.arange(n, 0.0, -1.0)[None]
    p = np.full((1, n), 1e-6)
    swapped = lfc.copy()
    swapped[0, :30] = 0.5  # the first thirty fall to the end
    found = recovery.recovery(Differential(p, p, swapped), Differential(p, p, lfc), np.zeros((1, n), dtype=bool))
    assert found["de_overlap_top50"] == pytest.approx(20 / 50)
    assert found["de_overlap_top100"] == pytest.approx(
        80 / 100
    )  # its 31 ... 120 and ten of the others, of which are 10 among 1 ... 100
    assert found["de_overlap"] == 1


def test_fold_changes_by_hand() -> None:
    guess = dict(TRUTH)
    guess[0], guess[1] = -2.5, 0.5  # wrong signs
    found = _recovery(_tests(guess), _tests(TRUTH))
    assert found["de_direction_match"] == pytest.approx(8 / 10)
    assert found["de_lfc_nmae"] == pytest.approx((12.5 + 9.5) / 55)
    x, y = np.argsort(np.argsort(list(TRUTH.values()))), np.argsort(np.argsort(list(guess.values())))
    assert found["de_lfc_spearman"] == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_significance_of_the_prediction_does_not_matter_for_fold_changes() -> None:
    guess = _tests(TRUTH)
    weak = Differential(np.ones((1, N)), np.ones((1, N)), guess.log2_fold_change)
    found = _recovery(weak, _tests(TRUTH))
    assert found["de_direction_match"] == 1
    assert found["de_lfc_spearman"] == pytest.approx(1)
    assert found["de_lfc_nmae"] == 0
    assert found["de_recall"] == found["de_precision"] == found["de_model_direction_match"] == 0


def test_targets_are_left_out_of_two_metrics() -> None:
    truth = TRUTH | {30: -5.0}
    guess = {30: -1.0, **{gene: 0.5 * value for gene, value in TRUTH.items()}}
    found = _recovery(_tests(guess), _tests(truth), 30)
    assert found["de_lfc_nmae"] == pytest.approx(0.5)
    only_target = _recovery(_tests({30: -1.0}), _tests(truth), 30)
    assert only_target["de_jaccard"] == 0
    assert only_target["de_recall"] == pytest.approx(1 / 11)


def test_fixed_points() -> None:
    perfect = _recovery(_tests(TRUTH), _tests(TRUTH))
    for name, value in perfect.items():
        best = {"de_lfc_nmae": 0, "de_n_significant_observed": 10, "de_n_significant_predicted": 10}.get(name, 1)
        assert value == pytest.approx(best), name
    nothing = _recovery(unchanged(1, N), _tests(TRUTH))
    expected = {"de_lfc_nmae": 1, "de_lfc_spearman": -1, "de_n_significant_observed": 10}
    for name, value in nothing.items():
        assert value == expected.get(name, 0), name
    # neither side has a significant gene: their union is agreed on
    assert _recovery(unchanged(1, N), unchanged(1, N))["de_jaccard"] == 1


def test_fewer_than_ten_significant_genes() -> None:
    few = {gene: TRUTH[gene] for gene in range(9)}
    found = _recovery(_tests(TRUTH), _tests(few))
    for name in ("de_recall", "de_direction_match", "de_lfc_spearman", "de_lfc_nmae"):
        assert np.isnan(found[name]), name
    assert found["de_overlap"] == 1
    assert found["de_precision"] == pytest.approx(9 / 10)


def test_conditions_without_cells_are_empty() -> None:
    empty = Differential(*(np.full((1, N), np.nan) for _ in range(3)))
    for pair in ((empty, _tests(TRUTH)), (_tests(TRUTH), empty)):
        assert all(np.isnan(value) for value in _recovery(*pair).values())


def test_order_of_genes_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    p = [generator.random((3, N)) ** 4 for _ in range(2)]
    lfc = [generator.normal(size=(3, N)) for _ in range(2)]
    targets = generator.random((3, N)) < 0.1
    sides = [Differential(*pair) for pair in zip(p, p, lfc, strict=True)]
    genes, rows = generator.permutation(N), generator.permutation(3)
    moved = [
        Differential(*(table[rows][:, genes] for table in (one.p_value, one.p_adjusted, one.log2_fold_change))) for one in sides
    ]
    once, other = recovery.recovery(*sides, targets), recovery.recovery(*moved, targets[rows][:, genes])
    for name, values in once.items():
        np.testing.assert_allclose(other[name], values[rows], err_msg=name)


def test_off_target_precision_by_hand() -> None:
    significant = np.zeros((1, N), dtype=bool)
    significant[0, [0, 1, 2, 3]] = True
    targets = np.zeros((1, N), dtype=bool)
    targets[0, 0] = True
    change = np.zeros((1, N))
    change[0, [0, 1, 10, 2, 11]] = [9.0, -5.0, 4.0, 3.0, 0.1]  # without the target: 1, 10, 2, 11
    precision, chance = recovery.off_target_precision(change, significant, targets, k=3)
    assert precision == pytest.approx(2 / 3)
    assert chance == pytest.approx(3 / 39)
    precision, _ = recovery.off_target_precision(change, significant, targets)  # fewer than 50 change
    assert precision == pytest.approx(2 / 4)
    for nothing in (np.zeros((1, N)), np.full((1, N), np.nan)):
        assert np.isnan(recovery.off_target_precision(nothing, significant, targets)[0]).all()


def test_random_choices_have_the_precision_of_chance() -> None:
    generator = np.random.default_rng(1)
    significant = generator.random((400, 200)) < 0.3
    targets = np.zeros((400, 200), dtype=bool)
    precision, chance = recovery.off_target_precision(generator.normal(size=(400, 200)), significant, targets)
    # 400 conditions of 50 genes: a standard error of .003
    assert precision.mean() == pytest.approx(chance.mean(), abs=0.012)
