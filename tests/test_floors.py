"""Baselines as floors of two files: closed forms by hand, and that no condition is predicted from itself."""

from __future__ import annotations

import numpy as np
import pytest

from perturbzoo import floors, parse_condition
from perturbzoo.data.datamodule import TrainingPseudobulks

GENES = [f"G{number}" for number in range(12)]


def _bulks(names: list[str], contexts: list[int] | None = None, seed: int = 0) -> TrainingPseudobulks:
    generator = np.random.default_rng(seed)
    contexts = contexts or [0] * len(names)
    control = generator.uniform(1, 3, (max(contexts) + 1, len(GENES)))
    return TrainingPseudobulks(
        conditions=[parse_condition(name) for name in names],
        contexts=np.array(contexts),
        mean=control[contexts] + generator.normal(0, 0.5, (len(names), len(GENES))),
        count=np.full(len(names), 10),
        control_mean=control,
    )


def test_a_training_screen_gives_the_closed_forms_of_the_zoo() -> None:
    training = _bulks(["G3", "G0", "G1", "G0+G1"])
    asked = [parse_condition(name) for name in ("G0+G3", "G5", "outside")]
    found = floors.fitted(training, GENES, asked, np.zeros(3, dtype=np.int64))
    control, delta = training.control_mean[0], training.delta
    np.testing.assert_allclose(found["additive"][0], control + delta[0] + delta[1], atol=1e-5)
    np.testing.assert_allclose(found["additive"][1], control + delta[:3].mean(axis=0), atol=1e-5)
    # no gene is called so: nothing but the mean of all training pairs is known of it
    for name in ("bilinear", "knn"):
        np.testing.assert_allclose(found[name][2], control + delta.mean(axis=0), atol=1e-5)
    assert list(found) == ["additive", "bilinear", "knn"]


def test_each_context_starts_from_its_own_control() -> None:
    training = _bulks(["G0", "G1", "G0", "G1"], [0, 0, 1, 1])
    asked = [parse_condition("G0+G1")] * 2
    found = floors.fitted(training, GENES, asked, np.array([0, 1]))["additive"]
    for context in (0, 1):
        mine = training.contexts == context
        np.testing.assert_allclose(found[context], training.control_mean[context] + training.delta[mine].sum(axis=0), atol=1e-5)


def test_without_a_training_screen_additive_is_the_sum_or_the_mean() -> None:
    observed = _bulks(["G0", "G1", "G0+G1", "G2"])
    found = floors.cross_fitted(observed, GENES, 4)["additive"]
    np.testing.assert_allclose(found[2], observed.control_mean[0] + observed.delta[:2].sum(axis=0), atol=1e-5)
    for row in (0, 1, 3):
        np.testing.assert_allclose(found[row], observed.mean.mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("name", ["bilinear", "knn"])
def test_no_condition_is_predicted_from_itself(name: str) -> None:
    names = [f"G{number}" for number in range(8)]
    observed, changed = _bulks(names), _bulks(names)
    changed.mean[5] += 100.0
    before, after = (floors.cross_fitted(bulks, GENES, 6, seed=3, folds=4)[name] for bulks in (observed, changed))
    np.testing.assert_array_equal(before[5], after[5])
    assert (np.abs(before - after).max(axis=1) > 1e-3).any()  # it counts for the other folds
    assert before.shape == (6, 12)


def test_a_fold_holds_a_condition_in_all_its_contexts() -> None:
    observed, changed = (_bulks(["G0", "G0", "G1", "G1", "G2", "G2"], [0, 1] * 3) for _ in range(2))
    changed.mean[1] += 100.0
    before, after = (floors.cross_fitted(bulks, GENES, 6)["knn"] for bulks in (observed, changed))
    np.testing.assert_array_equal(before[:2], after[:2])


def test_one_condition_has_no_others() -> None:
    assert floors.cross_fitted(_bulks(["G0"]), GENES, 1) == {}


def test_the_order_of_conditions_does_not_matter() -> None:
    names = ["G2", "G0", "G1+G2", "G1", "G3"]
    observed = _bulks(names)
    order = np.array([3, 0, 4, 2, 1])
    shuffled = TrainingPseudobulks(
        conditions=[observed.conditions[row] for row in order],
        contexts=observed.contexts[order],
        mean=observed.mean[order],
        count=observed.count[order],
        control_mean=observed.control_mean,
    )
    once, again = floors.cross_fitted(observed, GENES, 5), floors.cross_fitted(shuffled, GENES, 5)
    for name, profiles in once.items():
        np.testing.assert_allclose(again[name], profiles[order], atol=1e-5, err_msg=name)
