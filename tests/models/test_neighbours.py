"""What neighbours say about a target: weights worked by hand, what never counts, and strengths whose best value is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from perturbzoo.data.batch import ConditionTable, encode_conditions
from perturbzoo.data.graph import Graph, union_graph
from perturbzoo.data.graphs import edge_list_graph
from perturbzoo.models.known import TrainingDeltas
from perturbzoo.models.neighbours import Neighbours
from perturbzoo.perturbation import parse_condition

Edges = Sequence[tuple[str, str, float]]


def graph_of(names: Sequence[str], **kinds: Edges) -> Graph:
    """A union of undirected graphs, one for each kind."""
    frames = {kind: pd.DataFrame(edges, columns=["source", "target", "weight"]) for kind, edges in kinds.items()}
    return union_graph({kind: edge_list_graph(frame, names) for kind, frame in frames.items()})


def known_of(screen: Any) -> TrainingDeltas:
    known = TrainingDeltas(screen[0], singles_only=True)
    known.fit(screen[1])
    return known


def table_of(screen: Any, conditions: Sequence[str], contexts: Sequence[int] | None = None) -> ConditionTable:
    context = [0] * len(conditions) if contexts is None else list(contexts)
    return encode_conditions([parse_condition(text) for text in conditions], context, screen[0].targets, "knockout")


def weights_of(
    screen: Any,
    conditions: Sequence[str],
    contexts: Sequence[int] | None = None,
    *,
    strength: Sequence[float] = (1.0, 1.0),
    **kinds: Edges,
) -> Tensor:
    known, graph = known_of(screen), graph_of(screen[0].targets, **kinds).to_state() if kinds else None
    neighbours = Neighbours(known, graph, len(screen[0].targets))
    neighbours.strength.copy_(torch.tensor(strength))
    return neighbours(known, table_of(screen, conditions, contexts))


def close(actual: Tensor, desired: Any, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(actual.numpy(), np.asarray(desired), rtol=0, atol=atol)


# ---------------------------------------------------------------------- weights


def test_three_singles_and_a_graph(make_screen: Any) -> None:
    """Strength 2, edges D-A of 0.5 and D-B of 0.25: a = (1, 0.5, 0), w = a / 2.5, and 0.4 is left for the mean."""
    screen = make_screen(["A", "B", "C"], other_targets=["D", "E"])
    weights = weights_of(screen, ["D", "E"], strength=[2.0, 1.0], go=[("D", "A", 0.5), ("B", "D", 0.25)])
    third = 0.4 / 3
    close(weights, [[0.4 + third, 0.2 + third, third], [1 / 3] * 3])


def test_without_a_graph_it_is_the_mean_single(make_screen: Any) -> None:
    """Combinations do not take part."""
    screen = make_screen(["A", "A+B", "B"], other_targets=["D"])
    known = known_of(screen)
    assert len(known) == 2
    neighbours = Neighbours(known, None, 3)
    neighbours.fit(known)
    close(neighbours(known, table_of(screen, ["D", "A"])), [[0.5, 0.5], [0.5, 0.5]])


def test_weights_sum_to_one(make_screen: Any) -> None:
    screen = make_screen(["A", "B", "C"], other_targets=["D"])
    weights = weights_of(screen, ["A", "D"], strength=[5.0, 0.3], go=[("D", "A", 0.5), ("A", "C", 1.0), ("B", "D", 0.1)])
    close(weights.sum(dim=1), [1.0, 1.0])
    assert (weights >= 0).all()


def test_a_single_never_counts_for_itself(make_screen: Any) -> None:
    """What is left for A, whose only neighbour is B, is the mean; of what is close, none is A's own."""
    screen = make_screen(["A", "B", "C"])
    close(weights_of(screen, ["A"], go=[("A", "B", 1.0)]), [[1 / 6, 1 / 2 + 1 / 6, 1 / 6]])


def test_kinds_do_not_speak_for_each_other(make_screen: Any) -> None:
    """An activated neighbour says nothing about a knockout, and the other way round."""
    screen = make_screen(["A", "B:activation", "C"], other_targets=["D"])
    edges = [("D", "A", 1.0), ("D", "B", 1.0)]
    close(weights_of(screen, ["D", "D:activation"], go=edges) - 1 / 6, [[1 / 2, 0, 0], [0, 1 / 2, 0]])


def test_neighbours_of_the_same_context_count(make_screen: Any) -> None:
    """A in both contexts: each context hears its own; a new context, -1, hears both."""
    screen = make_screen([("A", 0), ("A", 1), ("C", 0)], other_targets=["D"], n_contexts=2)
    weights = weights_of(screen, ["D", "D", "D"], [0, 1, -1], go=[("D", "A", 1.0)])
    close(weights, [[1 / 2 + 1 / 4, 0, 1 / 4], [0, 1, 0], [1 / 3 + 1 / 9, 1 / 3 + 1 / 9, 1 / 9]])


def test_the_same_target_elsewhere_is_a_relation_of_its_own(make_screen: Any) -> None:
    """At another dose or in another context A tells about A with the last strength, of whatever context it is."""
    screen = make_screen([("A", 0), ("A@2", 0), ("A", 1), ("C", 0), ("C", 1)], other_targets=["D"], n_contexts=2)
    weights = weights_of(screen, ["A", "A@3", "A", "A"], [0, 0, 1, -1], strength=[1.0, 3.0], go=[("C", "D", 1.0)])
    first, second = np.array([1, 1, 0, 1, 0]) / 3, np.array([0, 0, 1, 0, 1]) / 2  # the means of the contexts
    close(weights[0], np.array([0, 3, 3, 0, 0]) / 7 + first / 7)
    close(weights[1], np.array([3, 3, 3, 0, 0]) / 10 + first / 10)
    close(weights[2], np.array([3, 3, 0, 0, 0]) / 7 + second / 7)
    # nobody was measured in a new context: all that is known of A counts
    close(weights[3], np.array([3, 3, 3, 0, 0]) / 10 + np.full(5, 0.2) / 10)


def test_relations_add_up(make_screen: Any) -> None:
    screen = make_screen(["A", "B", "C"], other_targets=["D"])
    weights = weights_of(
        screen, ["D"], strength=[2.0, 1.0, 1.0], go=[("D", "A", 1.0)], string=[("D", "A", 0.5), ("D", "B", 0.5)]
    )
    close(weights, [[2.5 / 4 + 1 / 12, 0.5 / 4 + 1 / 12, 1 / 12]])


def test_order_of_targets_is_of_no_consequence(make_screen: Any) -> None:
    """The graph's nodes, its edges and the conditions asked for, in any order."""
    screen = make_screen(["A", "B", "C", "E"], other_targets=["D", "F"])
    edges = [("D", "A", 0.5), ("D", "B", 0.25), ("F", "E", 0.7), ("F", "D", 0.9), ("A", "F", 0.2)]
    known, asked = known_of(screen), ["D", "F", "A"]
    expected = weights_of(screen, asked, strength=[2.0, 1.0], go=edges)
    close(weights_of(screen, asked[::-1], strength=[2.0, 1.0], go=edges[::-1]), expected.flip(0))
    # the same data whose targets are numbered in another order
    names = ["F", "C", "A", "E", "B", "D"]
    known.table = encode_conditions([parse_condition(name) for name in "ABCE"], [0] * 4, names, "knockout")
    neighbours = Neighbours(known, graph_of(names, go=edges).to_state(), 6)
    neighbours.strength.copy_(torch.tensor([2.0, 1.0]))
    table = encode_conditions([parse_condition(name) for name in asked], [0] * 3, names, "knockout")
    close(neighbours(known, table), expected)


def test_each_condition_is_answered_alone(make_screen: Any) -> None:
    """The same target asked twice, or beside others, has the same weights."""
    screen = make_screen(["A", "B", "C"], other_targets=["D"])
    edges = [("D", "A", 0.5), ("A", "B", 0.25)]
    together = weights_of(screen, ["D", "A", "D", "B"], go=edges)
    for row, name in enumerate(["D", "A", "D", "B"]):
        close(weights_of(screen, [name], go=edges)[0], together[row])


# ---------------------------------------------------------------------- strengths


def _twins(noise: float, n_pairs: int = 20, n_genes: int = 50) -> tuple[list[str], np.ndarray]:
    """Targets in pairs whose changes are alike up to noise, pairs being unlike each other."""
    generator = np.random.default_rng(0)
    shared = generator.normal(size=(n_pairs, n_genes)).repeat(2, axis=0)
    names = [f"{letter}{pair:02}" for pair in range(n_pairs) for letter in "ab"]
    return names, shared + noise * generator.normal(size=shared.shape)


def _fitted(make_screen: Any, names: list[str], deltas: np.ndarray, **kinds: Edges) -> tuple[TrainingDeltas, Neighbours]:
    screen = make_screen(names, genes=[f"g{number}" for number in range(deltas.shape[1])])
    screen[1].mean[:] = screen[1].control_mean[0] + deltas
    known = known_of(screen)
    # the spec sorts targets, the training pairs keep their order
    neighbours = Neighbours(known, graph_of(screen[0].targets, **kinds).to_state(), len(names))
    neighbours.fit(known)
    return known, neighbours


def test_the_best_strength_of_twins(make_screen: Any) -> None:
    """The error is quadratic in the twin's weight w: its minimum is a projection, and s = w / (1 - w) for edges of 1."""
    names, deltas = _twins(noise=0.7)
    edges = [(names[row], names[row + 1], 1.0) for row in range(0, len(names), 2)]
    _, neighbours = _fitted(make_screen, names, deltas, go=edges)
    others = (deltas.sum(axis=0) - deltas) / (len(deltas) - 1)  # the mean of the others
    twin = deltas.reshape(-1, 2, deltas.shape[1])[:, ::-1].reshape(deltas.shape)
    response = deltas.var(axis=0)  # the weight of each gene in the error
    weight = (response * (twin - others) * (deltas - others)).sum() / (response * (twin - others) ** 2).sum()
    assert 0.5 < weight < 0.9
    assert float(neighbours.strength[0]) == pytest.approx(weight / (1 - weight), rel=1e-3)


def test_noise_gets_no_strength_and_news_a_large_one(make_screen: Any) -> None:
    """Twins are joined in one graph; another joins targets that have nothing in common.

    A twin's weight is then 1 / (1 + 0.05^2) of the best, less what the mean and the noise take.
    """
    names, deltas = _twins(noise=0.05)
    generator = np.random.default_rng(1)
    order = generator.permutation(len(names))
    noise = [(names[a], names[b], 1.0) for a, b in zip(order, np.roll(order, 1), strict=True) if a // 2 != b // 2]
    twins = [(names[row], names[row + 1], 1.0) for row in range(0, len(names), 2)]
    known, neighbours = _fitted(make_screen, names, deltas, noise=noise, news=twins)
    noisy, telling, _ = neighbours.strength.tolist()
    assert telling > 100
    assert noisy < 0.01 * telling
    weights = neighbours(known, known.table)
    position = {name: row for row, name in enumerate(names)}
    assert min(float(weights[position[a], position[b]]) for a, b, _ in twins) > 0.97
    assert max(float(weights[position[a], position[b]]) for a, b, _ in noise) < 0.01


def test_noise_alone_leaves_the_mean(make_screen: Any) -> None:
    names, deltas = _twins(noise=10.0)  # of which no pair is left
    edges = [(names[row], names[row + 1], 1.0) for row in range(0, len(names), 2)]
    known, neighbours = _fitted(make_screen, names, deltas, go=edges)
    assert float(neighbours.strength[0]) < 0.2
    twin = neighbours(known, known.table) - 1 / len(names)
    assert twin.abs().max() < 0.2


def test_a_relation_without_edges_keeps_strength_one(make_screen: Any) -> None:
    """Nobody was measured twice: the data say nothing about the last relation."""
    names, deltas = _twins(noise=0.5)
    _, neighbours = _fitted(make_screen, names, deltas, go=[(names[0], names[1], 1.0), (names[2], names[3], 1.0)])
    assert float(neighbours.strength[-1]) == pytest.approx(1.0, abs=1e-4)


def test_nothing_is_fitted_to_two_singles(make_screen: Any) -> None:
    screen = make_screen(["A", "B"], other_targets=["D"])
    known = known_of(screen)
    neighbours = Neighbours(known, graph_of(["A", "B", "D"], go=[("A", "B", 1.0), ("A", "D", 1.0)]).to_state(), 3)
    neighbours.fit(known)
    assert not neighbours.strength.any()
    close(neighbours(known, table_of(screen, ["D"])), [[0.5, 0.5]])


def test_contexts_of_one_single_each(make_screen: Any) -> None:
    """The mean of the others is then that of the other contexts: nothing is divided by 0."""
    screen = make_screen([("A", 0), ("B", 1), ("C", 2)], n_contexts=3)
    known = known_of(screen)
    neighbours = Neighbours(known, graph_of(["A", "B", "C"], go=[("A", "B", 1.0)]).to_state(), 3)
    neighbours.fit(known)
    assert torch.isfinite(neighbours.strength).all()


def test_strengths_are_kept_in_checkpoints(make_screen: Any) -> None:
    names, deltas = _twins(noise=0.5)
    edges = [(names[row], names[row + 1], 1.0) for row in range(0, len(names), 2)]
    known, neighbours = _fitted(make_screen, names, deltas, go=edges)
    fresh = Neighbours(known, graph_of(sorted(names), go=edges).to_state(), len(names))
    fresh.load_state_dict(neighbours.state_dict())
    close(fresh(known, known.table), neighbours(known, known.table))
    assert set(neighbours.state_dict()) == {"strength"}
