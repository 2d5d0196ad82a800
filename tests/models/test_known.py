"""The rules that weight training deltas, worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perturbzoo.data.batch import ConditionTable, encode_conditions
from perturbzoo.models.known import TrainingDeltas
from perturbzoo.perturbation import parse_condition

TRAINED = ["A", "B", "A+B", "C@0.5", "A:activation"]


def table_of(
    known: TrainingDeltas, spec: Any, conditions: Sequence[str], contexts: Sequence[int] | None = None
) -> ConditionTable:
    context = [0] * len(conditions) if contexts is None else list(contexts)
    return encode_conditions([parse_condition(text) for text in conditions], context, spec.targets, spec.default_kind)


def check(weights: Tensor, expected: Sequence[Sequence[float]]) -> None:
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=weights.dtype))


def test_singles_are_told_apart_by_kind_and_dose(make_screen: Any) -> None:
    spec, _ = make_screen(TRAINED)
    known = TrainingDeltas(spec)
    asked = table_of(known, spec, ["A", "A:activation", "C@0.5", "C", "A:activation+B", "A:knockout"])
    check(
        known.single_weights(asked, average=False, mean_for_missing=False),
        [
            [1, 0, 0, 0, 0],
            [0, 0, 0, 0, 1],
            [0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0],  # C at dose 1 was never seen alone
            [0, 1, 0, 0, 1],
            [1, 0, 0, 0, 0],  # knockout is the data's own kind
        ],
    )


def test_sum_and_average(make_screen: Any) -> None:
    spec, _ = make_screen(["A", "B", "A+B"], other_targets=["X", "Y"])
    known = TrainingDeltas(spec)
    asked = table_of(known, spec, ["A+B", "A+X", "X", "A+B+X", "control"])
    single, every = [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]
    check(
        known.single_weights(asked, average=False, mean_for_missing=True),
        [[1, 1, 0], [1.5, 0.5, 0], single, [1.5, 1.5, 0], [0, 0, 0]],
    )
    third = 1 / 3
    check(
        known.single_weights(asked, average=True, mean_for_missing=True),
        [[0.5, 0.5, 0], [0.5 + third / 2, third / 2, third / 2], every, [third * (1 + third)] * 2 + [third**2], [0, 0, 0]],
    )
    check(known.single_weights(asked, average=False, mean_for_missing=False)[2:4], [[0, 0, 0], [1, 1, 0]])
    check(known.mean_weights(asked), [every] * 5)


def test_residual_models_start_from_the_mean_single_and_from_the_sum(make_screen: Any) -> None:
    """A trained single does not start from its own delta: nothing would be left to learn."""
    spec, bulks = make_screen(["A", "A+B", "B", "A+C"], other_targets=["X"])
    known = TrainingDeltas(spec, singles_only=True)
    assert len(known) == 2
    known.fit(bulks)
    np.testing.assert_allclose(known.value.numpy(), bulks.delta[[0, 2]], atol=1e-6, rtol=0)
    asked = table_of(known, spec, ["A", "X", "A+B", "A+X", "control"])
    check(known.residual_weights(asked), [[0.5, 0.5], [0.5, 0.5], [1, 1], [1.5, 0.5], [0, 0]])


def test_dose_zero_is_no_act(make_screen: Any) -> None:
    spec, _ = make_screen(["A", "B"])
    known = TrainingDeltas(spec)
    asked = table_of(known, spec, ["A@0", "A@0+B", "A+B@0", "A@0+B@0"])
    check(known.single_weights(asked, average=False, mean_for_missing=True), [[0, 0], [0, 1], [1, 0], [0, 0]])
    check(known.single_weights(asked, average=True, mean_for_missing=True), [[0, 0], [0, 1], [1, 0], [0, 0]])
    check(known.residual_weights(asked), [[0, 0], [0.5, 0.5], [0.5, 0.5], [0, 0]])


def test_contexts(make_screen: Any) -> None:
    """The same context first; all contexts for what was trained elsewhere only, and for a context that is new (-1)."""
    spec, _ = make_screen([("A", 0), ("A", 1), ("B", 1), ("A+B", 1)], n_contexts=3)
    known = TrainingDeltas(spec)
    asked = table_of(known, spec, ["A", "A", "A", "A", "B", "A+B"], [0, 1, 2, -1, 0, 0])
    half = [0.5, 0.5, 0, 0]
    check(
        known.single_weights(asked, average=False, mean_for_missing=True),
        [[1, 0, 0, 0], [0, 1, 0, 0], half, half, [0, 0, 1, 0], [1, 0, 1, 0]],
    )
    quarter, third = [0.25] * 4, 1 / 3
    check(
        known.mean_weights(asked),
        [[1, 0, 0, 0], [0, third, third, third], quarter, quarter, [1, 0, 0, 0], [1, 0, 0, 0]],
    )
    thirds = [third, third, third, 0]
    check(known.residual_weights(asked)[:4], [[1, 0, 0, 0], [0, 0.5, 0.5, 0], thirds, thirds])


def test_combinations_alone(make_screen: Any) -> None:
    """Without singles each combination is shared among its targets, so that a sum of two shares has a double's size."""
    spec, _ = make_screen(["A+B", "C+D", "A+B+C"])
    known = TrainingDeltas(spec, singles_only=True)
    assert len(known) == 3
    asked = table_of(known, spec, ["A", "A+D"])
    share = [1 / 6, 1 / 6, 1 / 9]
    check(known.residual_weights(asked), [share, [2 * weight for weight in share]])


def test_weights_follow_the_pairs_through_a_checkpoint(make_screen: Any) -> None:
    """Deltas are kept by a state dict; the rules come from the spec."""
    spec, bulks = make_screen(["A", "B"])
    known, other = TrainingDeltas(spec), TrainingDeltas(spec)
    known.fit(bulks)
    assert list(known.state_dict()) == ["value"]
    other.load_state_dict(known.state_dict())
    asked = table_of(known, spec, ["A+B"])
    sums = [deltas.single_weights(asked, average=False, mean_for_missing=True) @ deltas.value for deltas in (known, other)]
    assert torch.equal(*sums)
    np.testing.assert_allclose(sums[0][0].numpy(), bulks.delta.sum(axis=0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_keys_do_not_depend_on_the_order(make_screen: Any, order: list[int]) -> None:
    spec, _ = make_screen(["A", "B", "C"])
    table = encode_conditions([parse_condition("A@2+B:activation+C")], [0], spec.targets, spec.default_kind)
    shuffled = ConditionTable(**{name: value[:, order] if value.ndim == 2 else value for name, value in vars(table).items()})
    assert TrainingDeltas.keys(shuffled) == TrainingDeltas.keys(table)


def test_own_weights(make_screen: Any) -> None:
    """Kind and dose tell conditions apart, the order of targets does not; a new condition has no weight."""
    spec, _ = make_screen(TRAINED)
    known = TrainingDeltas(spec)
    asked = table_of(known, spec, ["B+A", "A:activation", "C@0.5", "C", "A:activation+B"])
    check(
        known.own_weights(asked),
        [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    )


def test_what_was_measured_of_a_target(make_screen: Any) -> None:
    """Between doses 1 and 7, where log2(1 + dose) is 1 and 3, dose 3 is in the middle; below 1 towards nothing; above 7 as at 7."""
    spec, _ = make_screen(["A", "A@7", "A+B", "B:activation", "A@0+C"], other_targets=["X"])
    known = TrainingDeltas(spec)
    half = float(np.sqrt(2) - 1)  # log2(1 + dose) is 1/2
    asked = table_of(known, spec, ["A", "A@7", "A@3", f"A@{half!r}", "A@100", "B", "B:activation", "C", "X"])
    one, seven, middle, nothing = [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 0]
    others = [nothing, [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], nothing]
    check(known.response_weights(asked), [one, seven, middle, [0.5, 0, 0, 0, 0], seven, *others])
    spec, _ = make_screen([("A", 0), ("A", 1), ("B", 1)], n_contexts=2)
    known = TrainingDeltas(spec)
    check(known.response_weights(table_of(known, spec, ["A", "A", "B"], [0, -1, 0])), [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])


def test_without_own(make_screen: Any) -> None:
    """A target's own pairs, combinations too, give their weight to the others in proportion; the last ones keep it."""
    spec, _ = make_screen(["A", "B", "A+B", "C"])
    known = TrainingDeltas(spec)
    asked = table_of(known, spec, ["A", "C"])
    weights = torch.tensor([[0.4, 0.1, 0.1, 0.2], [0.0, 0.0, 0.0, 0.5]])
    check(known.without_own(asked, weights), [[0, 0.8 / 3, 0, 1.6 / 3], [0, 0, 0, 0.5]])


def test_the_sum_of_what_targets_did_alone(make_screen: Any) -> None:
    """X and hidden targets get what is said of them, without their own pairs; what is measured and shown is itself."""
    spec, _ = make_screen(["A", "B", "C", "A+B"], other_targets=["X"])
    known, mean = TrainingDeltas(spec), TrainingDeltas.mean_single_weights
    asked = table_of(known, spec, ["A", "A+B", "A+X", "control"])
    third = 1 / 3
    check(known.sum_weights(asked, mean), [[1, 0, 0, 0], [1, 1, 0, 0], [1 + third, third, third, 0], [0, 0, 0, 0]])
    hidden = torch.tensor([[True, False], [True, False], [True, True], [True, True]])
    expected = [[0, 0.5, 0.5, 0], [0, 1.5, 0.5, 0], [third, 0.5 + third, 0.5 + third, 0], [0, 0, 0, 0]]
    check(known.sum_weights(asked, mean, hidden), expected)

    def near_b(known: TrainingDeltas, table: ConditionTable) -> Tensor:
        return torch.tensor([0.2, 0.6, 0.2, 0.0]).expand(len(table), -1)

    hidden = torch.tensor([[True, False]] * 4)
    expected = [[0, 0.75, 0.25, 0], [0, 1.75, 0.25, 0], [0.2, 0.75 + 0.6, 0.25 + 0.2, 0], [0, 0, 0, 0]]
    check(known.sum_weights(asked, near_b, hidden), expected)
