"""Retrieval scores on examples worked by hand, at their fixed points, and under permutations."""

from __future__ import annotations

import numpy as np
import pytest

from perturbzoo.evaluation.retrieval import Distance, centroid_accuracy, discrimination_score

DISTANCES: tuple[Distance, ...] = ("cosine", "l1", "l2")
OBSERVED = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 2.0, 2.0]])


def test_ranks_by_hand() -> None:
    # prediction 0 = (0, 1, 1): city block 3, 1, 2 from the three effects: two are closer than its own
    # prediction 1 = (0, 1, 0): its own effect. Prediction 2 = (1, 1, 1): city block 2, 2, 3
    predicted = np.array([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(discrimination_score(predicted, OBSERVED, "l1"), [0.0, 1.0, 0.0])
    # squared Euclidean: (3, 1, 2), (2, 0, 5), (2, 2, 3)
    np.testing.assert_allclose(discrimination_score(predicted, OBSERVED, "l2"), [0.0, 1.0, 0.0])
    # cosines: (0, .71, 1), (0, 1, .71), (.58, .58, .82)
    np.testing.assert_allclose(discrimination_score(predicted, OBSERVED, "cosine"), [0.0, 1.0, 1.0])
    # over n instead of n - 1: from 1 / n to 1
    np.testing.assert_allclose(discrimination_score(predicted, OBSERVED, "l1", scale="all"), [1 / 3, 1.0, 1 / 3])


def test_ties_share_the_mean_rank() -> None:
    # (1, 1, 0) is at distance 1 from effects 0 and 1, and 4 from 2 (city block): two ranks shared, .5 of a rank lost of 2
    predicted = np.tile([1.0, 1.0, 0.0], (3, 1))
    np.testing.assert_allclose(discrimination_score(predicted, OBSERVED, "l1"), [0.75, 0.75, 0.0])
    np.testing.assert_allclose(centroid_accuracy(predicted, OBSERVED), [0.75, 0.75, 0.0])


@pytest.mark.parametrize("distance", DISTANCES)
def test_fixed_points(distance: Distance) -> None:
    observed = np.random.default_rng(0).normal(size=(9, 20))
    np.testing.assert_array_equal(discrimination_score(observed, observed, distance), 1.0)
    constant = np.tile(observed.mean(axis=0) + 0.1, (9, 1))
    # one profile: the ranks are 0 ... n - 1 in some order
    assert discrimination_score(constant, observed, distance).mean() == pytest.approx(0.5)
    assert sorted(discrimination_score(constant, observed, distance)) == pytest.approx(np.arange(9) / 8)
    assert discrimination_score(observed[:1], observed[:1], distance) == pytest.approx([np.nan], nan_ok=True)


def test_no_change_is_half_in_each_condition_by_cosine() -> None:
    observed = np.random.default_rng(1).normal(size=(6, 5))
    skip = np.eye(6, 5, dtype=bool)
    np.testing.assert_array_equal(discrimination_score(np.zeros((6, 5)), observed, "cosine", skip), 0.5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_leaving_genes_out_is_as_if_they_were_not_measured(distance: Distance) -> None:
    generator = np.random.default_rng(2)
    predicted, observed = generator.normal(size=(2, 8, 12))
    skip = generator.random((8, 12)) < 0.2
    skip[3] = False
    expected = []
    for row in range(8):
        kept = ~skip[row]
        p, o = predicted[row, kept], observed[:, kept]
        if distance == "cosine":
            d = 1 - o @ p / np.linalg.norm(o, axis=1) / np.linalg.norm(p)
        else:
            d = np.linalg.norm(o - p, ord=1 if distance == "l1" else 2, axis=1)
        expected.append(1 - (d < d[row]).sum() / 7)
    np.testing.assert_allclose(discrimination_score(predicted, observed, distance, skip), expected)


def test_all_targets_of_a_combination_can_be_left_out() -> None:
    # the combination is recognised by its two targets alone, which are no news
    observed = np.array([[5.0, 5.0, 0.0, 0.1], [0.0, 0.0, 1.0, 0.0]])
    predicted = np.array([[5.0, 5.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    both = np.array([[True, True, False, False], [False, False, False, False]])
    np.testing.assert_array_equal(discrimination_score(predicted, observed, "l1"), [1.0, 1.0])
    np.testing.assert_array_equal(discrimination_score(predicted, observed, "l1", both), [0.0, 1.0])


@pytest.mark.parametrize("distance", DISTANCES)
def test_order_of_conditions_and_genes_does_not_matter(distance: Distance) -> None:
    generator = np.random.default_rng(3)
    observed = generator.normal(size=(7, 11))
    predicted = observed + generator.normal(size=(7, 11))
    rows, genes = generator.permutation(7), generator.permutation(11)
    once = discrimination_score(predicted, observed, distance)
    np.testing.assert_allclose(discrimination_score(predicted[rows], observed[rows], distance), once[rows])
    np.testing.assert_allclose(discrimination_score(predicted[:, genes], observed[:, genes], distance), once)


def test_a_row_without_a_value_is_left_out() -> None:
    predicted = OBSERVED.copy()
    predicted[1] = np.nan
    np.testing.assert_array_equal(discrimination_score(predicted, OBSERVED, "l2"), [1.0, np.nan, 1.0])


def test_profiles_predicted_more_than_once() -> None:
    """Each row by its own count, with the genes that it leaves out."""
    generator = np.random.default_rng(4)
    observed, exclude = generator.normal(size=(6, 5)), np.eye(6, 5, dtype=bool)
    predicted = generator.normal(size=(3, 5))[[2, 0, 2, 1, 0, 2]]
    found = discrimination_score(predicted, observed, "l1", exclude)
    for row in range(6):
        distance = np.abs(predicted[row] - observed)[:, ~exclude[row]].sum(axis=1)
        assert found[row] == pytest.approx(np.mean(distance[np.arange(6) != row] > distance[row]))
