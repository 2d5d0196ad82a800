"""Vectors of targets: normalisation by hand and against PyG, who speaks, what an unseen target is, and what is known of whom."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from gears_models import UNSEEN, ask, edges, fit, module, scrambled
from torch_geometric.nn import GCNConv

import perturbzoo
from perturbzoo.data.graph import Graph, union_graph
from perturbzoo.data.graphs import edge_list_graph
from perturbzoo.errors import PerturbZooWarning
from perturbzoo.models.gears import GEARS
from perturbzoo.models.targets import TargetVectors, prepare_targets

Edges = Sequence[tuple[str, str, float]]
PATH: Edges = [("A", "B", 0.5), ("B", "C", 1.0)]
WIDTH = 4


def graph_of(names: Sequence[str], **kinds: Edges) -> Graph:
    """A union of undirected graphs, one for each kind."""
    frames = {kind: pd.DataFrame(edges, columns=["source", "target", "weight"]) for kind, edges in kinds.items()}
    return union_graph({kind: edge_list_graph(frame, names) for kind, frame in frames.items()})


def prepared_of(names: str, trained: str, *, vectors: dict[str, list[float]] | None = None, **kinds: Edges) -> dict[str, Any]:
    """What `prepare_targets` would return for targets of one letter each."""
    prepared: dict[str, Any] = {"trained": torch.tensor([name in trained for name in names])}
    prepared["informed"] = torch.ones(len(names), dtype=torch.bool)
    if kinds:
        prepared["graph"] = graph_of(list(names), **kinds).to_state()
    if vectors is not None:
        width = len(next(iter(vectors.values())))
        known = torch.tensor([name in vectors for name in names])
        table = torch.tensor([vectors.get(name, [0.0] * width) for name in names])
        prepared |= {"vectors": table, "known": known, "usable": known, "fine_tune": False}
    return prepared


def model_of(prepared: dict[str, Any], **arguments: Any) -> TargetVectors:
    """With every parameter at random but the same for the same shapes in the same order."""
    torch.manual_seed(0)
    model = TargetVectors(prepared, WIDTH, **arguments)
    torch.nn.init.normal_(model.self_map.bias)
    return model


# ---------------------------------------------------------------------- graphs


@pytest.mark.parametrize("relations", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_a_target_of_which_nothing_is_known(relations: bool, graph: bool) -> None:
    """It is what is common to all: the bias, to the last bit, whatever was learned for others."""
    model = model_of(prepared_of("ABCX", "ABC", **({"go": PATH} if graph else {})), relations=relations)
    seen, unseen = model()
    assert torch.equal(seen[3], model.self_map.bias)
    assert torch.equal(unseen[3], model.self_map.bias)
    assert not torch.allclose(seen[0], model.self_map.bias, atol=0.1)


def test_one_graph_is_normalised_as_by_pyg() -> None:
    """With one map for all and a vector for everyone: exactly a graph convolution."""
    model = model_of(prepared_of("ABC", "A", go=PATH), relations=False, everyone_speaks=True)
    reference = GCNConv(WIDTH, WIDTH)
    reference.load_state_dict({"bias": model.self_map.bias, "lin.weight": model.self_map.weight})
    graph = graph_of(list("ABC"), go=PATH)
    between = graph.edge_index[0] != graph.edge_index[1]
    with torch.no_grad():
        expected = reference(model.learned.weight, graph.edge_index[:, between], graph.edge_weight[between])
        torch.testing.assert_close(model()[0], expected, rtol=0, atol=1e-6)
    # degrees 1 + 0.5, 1 + 0.5 + 1 and 1 + 1: a neighbour's weight is w / sqrt(d d'), a node's own is 1 / d
    a, b, c = model.learned.weight.detach()
    ab, bc = 0.5 / (1.5 * 2.5) ** 0.5, 1 / (2.5 * 2) ** 0.5
    mixed = torch.stack([a / 1.5 + ab * b, ab * a + b / 2.5 + bc * c, bc * b + c / 2])
    torch.testing.assert_close(model()[0].detach(), model.self_map(mixed).detach(), rtol=0, atol=1e-6)


def test_a_relation_has_a_map_of_its_own() -> None:
    """By hand: what is heard goes through the relation's map, the target itself, whole, through its own."""
    model = model_of(prepared_of("ABC", "ABC", go=PATH))
    seen, unseen = (values.detach() for values in model())
    a, b, c = model.learned.weight.detach()
    ab, bc = 0.5 / (1.5 * 2.5) ** 0.5, 1 / (2.5 * 2) ** 0.5
    with torch.no_grad():
        heard = model.maps["go"](torch.stack([ab * b, ab * a + bc * c, bc * b]))
        torch.testing.assert_close(unseen, heard + model.self_map.bias, rtol=0, atol=1e-6)
        torch.testing.assert_close(seen, heard + model.self_map(model.learned.weight), rtol=0, atol=1e-6)


def test_relations_add_up() -> None:
    """Each kind is normalised by itself, so that what one says does not depend on the others."""
    other: Edges = [("A", "C", 0.7), ("A", "B", 0.2)]
    both = model_of(prepared_of("ABC", "ABC", go=PATH, string=other))
    total = both()[1] - both.self_map.bias
    parts = []
    for kind, part in {"go": PATH, "string": other}.items():
        alone = model_of(prepared_of("ABC", "ABC", **{kind: part}))
        alone.learned.load_state_dict(both.learned.state_dict())
        alone.maps[kind].load_state_dict(both.maps[kind].state_dict())
        parts.append(alone()[1] - alone.self_map.bias)
        assert parts[-1].abs().max() > 0.1
    torch.testing.assert_close(total, parts[0] + parts[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("relations", [False, True])
@pytest.mark.parametrize("table", [None, {"X": [1.0, 2.0], "B": [0.0, 3.0]}])
def test_unseen_does_not_know_what_was_learned_of_the_target(relations: bool, table: dict[str, list[float]] | None) -> None:
    """The gradient to its own learned vector is exactly 0, and so is that to targets nobody perturbed."""
    prepared = prepared_of("ABCX", "ABC", vectors=table, go=[*PATH, ("X", "A", 0.3), ("X", "C", 1.0)])
    model = model_of(prepared, relations=relations)
    for row, neighbours in enumerate([{1}, {0, 2}, {1}, {0, 2}]):  # X, of row 3, says nothing about A and C
        (gradient,) = torch.autograd.grad(model()[1][row].square().sum(), model.learned.weight)
        assert set(torch.nonzero(gradient.abs().sum(dim=1)).ravel().tolist()) == neighbours
    (gradient,) = torch.autograd.grad(model()[0][0].square().sum(), model.learned.weight)
    assert gradient[0].abs().sum() > 0


@pytest.mark.parametrize("relations", [False, True])
def test_who_was_never_perturbed_says_nothing(relations: bool) -> None:
    """Not even by weighing in a neighbour's degree, unless everyone speaks."""
    alone, beside = prepared_of("ABCX", "ABC", go=PATH), prepared_of("ABCX", "ABC", go=[*PATH, ("X", "B", 1.0)])
    for output in (0, 1):
        apart, joined = (model_of(prepared, relations=relations)()[output] for prepared in (alone, beside))
        assert torch.equal(apart[:3], joined[:3])
        assert not torch.allclose(apart[3], joined[3], atol=0.05)
    loud = model_of(beside, relations=relations, everyone_speaks=True)()[1]
    assert not torch.allclose(loud[1], model_of(alone, relations=relations)()[1][1], atol=0.05)


def test_order_of_targets_is_of_no_consequence() -> None:
    graph: Edges = [*PATH, ("X", "A", 0.3), ("C", "X", 0.6)]
    table = {"X": [1.0, 2.0], "B": [0.5, 3.0]}
    model = model_of(prepared_of("ABCX", "ABC", vectors=table, go=graph))
    moved = TargetVectors(prepared_of("XBAC", "ABC", vectors=table, go=graph[::-1]), WIDTH)
    order = torch.tensor([3, 1, 0, 2])
    moved.load_state_dict({**model.state_dict(), "learned.weight": model.learned.weight[order]})
    for own, other in zip(model(), moved(), strict=True):
        torch.testing.assert_close(other, own[order], rtol=0, atol=1e-6)


def test_lengths_are_bounded() -> None:
    """The bound is on what is used, so that one neighbour's length cannot drown the others."""
    model = model_of(prepared_of("AB", "AB", go=[("A", "B", 1.0)]), max_norm=1.0, scale=50.0)
    seen, unseen = model()
    length = (seen - unseen).detach() @ torch.linalg.inv(model.self_map.weight.T)
    torch.testing.assert_close(length.norm(dim=1), torch.ones(2), rtol=1e-3, atol=0)


# ---------------------------------------------------------------------- tables

TABLE = {"A": [3.0, 0.0, 0.0], "X": [0.0, 1.0, 2.0]}


def test_a_row_of_the_table_goes_through_the_projection() -> None:
    """X was never perturbed: its row is all it has. Rows are on average as long as learned vectors, sqrt(width)."""
    model = model_of(prepared_of("ABX", "AB", vectors=TABLE))
    seen, unseen = model()
    row = torch.tensor(TABLE["X"]) / ((3 + 5**0.5) / 2) * WIDTH**0.5
    expected = model.self_map(model.project(row))
    torch.testing.assert_close(unseen[2], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(seen[2], expected, rtol=0, atol=1e-6)
    # B has no row: without its learned vector it is what is common to all
    torch.testing.assert_close(unseen[1], model.self_map.bias, rtol=0, atol=1e-6)


def test_the_unit_of_the_table_is_of_no_consequence() -> None:
    thousandfold = {name: [1000 * value for value in row] for name, row in TABLE.items()}
    first, second = (model_of(prepared_of("ABX", "AB", vectors=table))() for table in (TABLE, thousandfold))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_a_row_of_the_table_speaks_to_neighbours() -> None:
    """B, which nobody perturbed and which has no row, hears of X by its row."""
    model = model_of(prepared_of("ABX", "A", vectors=TABLE, go=[("B", "X", 1.0)]))
    row = torch.tensor(TABLE["X"]) / ((3 + 5**0.5) / 2) * WIDTH**0.5
    # B is no source, so that of the two only B has a degree above 1
    expected = model.maps["go"](model.project(row) / 2**0.5) + model.self_map.bias
    torch.testing.assert_close(model()[1][1], expected, rtol=0, atol=1e-6)


def test_what_fills_a_row_does_not_speak() -> None:
    """A mean in place of a missing row is used for that target; it is no news for its neighbours."""
    prepared = prepared_of("ABX", "A", vectors={"A": [3.0, 0.0, 0.0]}, go=[("B", "X", 1.0)])
    prepared["vectors"][:] = torch.tensor([3.0, 0.0, 0.0])
    model = model_of(prepared)
    seen, _ = model()
    torch.testing.assert_close(seen[1], seen[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(seen[1], model.self_map(model.project(model.vectors[1])), rtol=0, atol=1e-6)


def test_a_frozen_table_is_no_parameter_and_a_tuned_one_is() -> None:
    prepared = prepared_of("ABX", "AB", vectors=TABLE)
    frozen, tuned = model_of(prepared), model_of({**prepared, "fine_tune": True})
    assert "vectors" not in frozen.state_dict()
    assert "vectors" in tuned.state_dict()
    for own, other in zip(frozen(), tuned(), strict=True):
        assert torch.equal(own, other)  # where it starts
    tuned()[1].square().sum().backward()
    assert tuned.vectors.grad is not None
    assert (tuned.vectors.grad.abs().sum(dim=1) > 0).tolist() == [True, True, True]
    assert not frozen.vectors.requires_grad


# ---------------------------------------------------------------------- what is known of whom


@pytest.fixture(scope="module")
def adata(make_adata: Callable[..., Any]) -> Any:
    return make_adata(cells_per_condition=8, n_controls=16, n_genes=12)


def _prepared(adata: Any, **arguments: Any) -> dict[str, Any]:
    data = module(adata, UNSEEN)
    data.setup("fit")
    return prepare_targets(data, data.spec, **arguments)


@pytest.fixture
def table(tmp_path: Path) -> str:
    """Vectors of G0, of G3, which is tested only, and of OTHER, which no data name."""
    file = tmp_path / "v.csv"
    pd.DataFrame(np.arange(1.0, 7.0).reshape(3, 2), index=["G0", "G3", "OTHER"]).to_csv(file)
    return str(file)


def test_names_of_which_nothing_is_known_are_left_out(adata: Any, tmp_path: Path) -> None:
    """NEW is next to a trained target; FAR is in the file, next to one that nobody knows."""
    graph = edges(tmp_path, ("G0", "NEW"), ("FAR", "FURTHER"), ("NEW", "SECOND"), ("G3", "G1"))
    with pytest.warns(PerturbZooWarning, match=r"1 targets are neither trained.*\(G4\)"):
        prepared = _prepared(adata, perturbation_graph=graph)
    assert prepared["extra"] == ["NEW"]
    assert prepared["trained"].tolist() == [True, True, True, False, False, False]
    assert prepared["informed"].tolist() == [True, True, True, True, False, True]
    assert Graph.from_state(prepared["graph"]).names == ("G0", "G1", "G2", "G3", "G4", "NEW")


def test_targets_of_which_nothing_is_known_are_named(adata: Any) -> None:
    with pytest.warns(PerturbZooWarning, match=r"2 targets are neither trained.*\(G3, G4\).*common to all"):
        assert _prepared(adata)["extra"] == []
    with pytest.warns(PerturbZooWarning, match=r"\(G3, G4\)"):
        assert "vectors" not in _prepared(adata, embedding="learned")


def test_table_and_graph_together(adata: Any, table: str, tmp_path: Path) -> None:
    """A row makes a target known, and who is next to it too; names of the graph alone have no row."""
    graph = edges(tmp_path, ("G4", "OTHER"), ("OTHER", "NEW"), ("FAR", "FURTHER"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PerturbZooWarning)
        prepared = _prepared(adata, embedding=table, perturbation_graph=graph)
    said = [str(warning.message) for warning in caught]
    assert len([text for text in said if "has no vector for 3 of 5 targets (G1, G2, G4)" in text]) == 1
    assert not [text for text in said if "neither trained" in text]
    assert prepared["extra"] == ["NEW", "OTHER"]
    assert prepared["known"].tolist() == [True, False, False, True, False, False, True]
    assert prepared["informed"].all()
    expected = [[1, 2], [0, 0], [0, 0], [3, 4], [0, 0], [0, 0], [5, 6]]
    assert prepared["vectors"].tolist() == expected


def test_a_dose_of_zero_is_no_training(make_adata: Callable[..., Any]) -> None:
    """G3 is named in a training condition without having been perturbed in it."""
    adata = make_adata(cells_per_condition=8, n_controls=16, n_genes=12)
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace({"G3+G4": "G3@0+G4@1"})
    data = module(adata, {"method": "explicit", "test": ["G3"]})
    data.setup("fit")
    assert any("G3@0" in text for text, _ in data.spec.training_pairs)
    with pytest.warns(PerturbZooWarning, match=r"1 targets are neither trained.*\(G3\)"):
        prepared = prepare_targets(data, data.spec)
    assert prepared["trained"].tolist() == [True, True, True, False, True]


@pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")
@pytest.mark.parametrize("fine_tune", [False, True])
def test_checkpoints(adata: Any, table: str, tmp_path: Path, fine_tune: bool) -> None:
    """Table and graph are in the checkpoint: a loaded model needs no files, and keeps what was tuned."""
    graph = edges(tmp_path, ("G4", "OTHER"), ("G0", "G3"))
    embedding = {"kind": "table", "path": table, "fine_tune": fine_tune}
    model = GEARS(hidden=8, embedding=embedding, perturbation_graph=graph, lr=0.05)
    fit(model, module(adata, UNSEEN), 1, tmp_path)
    prepared = model.prepared["vectors"]
    start = prepared / prepared[model.prepared["known"]].norm(dim=1).mean() * 8**0.5
    assert torch.allclose(model.targets.vectors, start, atol=1e-6) != fine_tune
    for file in (Path(table), tmp_path / "edges.csv"):
        file.unlink()
    loaded = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    conditions = ["G0", "G3", "OTHER+G1", "G4"]
    assert torch.equal(loaded.targets.vectors, model.targets.vectors)
    assert torch.equal(ask(loaded, conditions), ask(model, conditions))


@pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")
def test_tuned_rows_move_to_another_screen_by_name(make_adata: Callable[..., Any], table: str, tmp_path: Path) -> None:
    """The screens share G0, G3 and the table; rows of the same name come along, others start anew."""
    embedding = {"kind": "table", "path": table, "fine_tune": True}
    first = make_adata(conditions=("G0", "G1", "G3"), cells_per_condition=8, n_controls=16, n_genes=12)
    second = make_adata(conditions=("G0", "G2", "G3"), cells_per_condition=8, n_controls=16, n_genes=12)
    split = {"method": "explicit", "test": ["G3"]}
    source = GEARS(hidden=8, embedding=embedding, lr=0.05)
    fit(source, module(first, split), 1, tmp_path)
    model = GEARS(hidden=8, embedding=embedding)
    model.initialise_from(str(tmp_path / "checkpoints" / "last.ckpt"))
    fit(model, module(second, split), 0)
    rows = [list(source.target_names).index(name) for name in ("G0", "G3", "OTHER")]
    own = [list(model.target_names).index(name) for name in ("G0", "G3", "OTHER")]
    assert torch.equal(model.targets.vectors[own], source.targets.vectors[rows])
    assert not model.targets.vectors[list(model.target_names).index("G2")].any()


def test_scrambling_a_tuned_table_changes_predictions(adata: Any, table: str) -> None:
    """Of targets with a row, tested or not; nothing else of G3 is known."""
    model = GEARS(hidden=8, embedding={"kind": "table", "path": table, "fine_tune": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerturbZooWarning)
        fit(model, module(adata, UNSEEN), 0)
    scrambled(model)
    before = ask(model, ["G3", "G4"])
    model.targets.vectors.data[list(model.target_names).index("G3")] += 1.0
    after = ask(model, ["G3", "G4"])
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    assert torch.equal(before[1], after[1])
