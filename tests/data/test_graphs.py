"""Graphs: correlations against NumPy, overlaps by hand, and what must not depend on the order of the genes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from perturbzoo.data import correlation, graphs
from perturbzoo.data.graphs import (
    Graph,
    build_graph,
    coexpression_graph,
    edge_list_graph,
    jaccard_graph,
    regulator_overlap_graph,
    union_graph,
    universe,
)
from perturbzoo.errors import PerturbZooError


def weights(graph: Graph) -> dict[tuple[str, str], float]:
    """(source, destination) -> weight, by name, without the self loops."""
    names = graph.names
    return {
        (names[source], names[destination]): weight
        for (source, destination), weight in zip(graph.edge_index.T.tolist(), graph.edge_weight.tolist(), strict=True)
        if source != destination
    }


def self_loops(graph: Graph) -> dict[str, float]:
    loops = graph.edge_index[0] == graph.edge_index[1]
    return {
        graph.names[node]: weight
        for node, weight in zip(graph.edge_index[0, loops].tolist(), graph.edge_weight[loops].tolist(), strict=True)
    }


@pytest.fixture
def expression() -> np.ndarray:
    """50 cells x 12 genes in three groups that move together, sparse, with a constant gene and a silent one."""
    rng = np.random.default_rng(0)
    shared = np.repeat(rng.normal(size=(50, 3)), 4, axis=1)
    values = np.maximum(shared + 0.7 * rng.normal(size=(50, 12)), 0) + np.arange(12) * (rng.random((50, 12)) < 0.5)
    values[:, 5] = 0.1
    values[:, 9] = 0.0
    return values.astype(np.float32)


GENES = [f"GENE{number}" for number in range(12)]


@pytest.mark.parametrize("as_sparse", [True, False])
@pytest.mark.parametrize("strip", [4, 5, 1024])
@pytest.mark.parametrize("block", [30, 1 << 23])
def test_coexpression_is_the_absolute_pearson_correlation(expression, as_sparse, strip, block, monkeypatch):
    monkeypatch.setattr(correlation, "_STRIP", strip)
    monkeypatch.setattr(correlation, "_BLOCK_VALUES", block)
    varying = expression.std(axis=0) > 1e-6
    expected = np.zeros((12, 12))
    expected[np.ix_(varying, varying)] = np.abs(np.corrcoef(expression[:, varying].astype(float), rowvar=False))
    graph = coexpression_graph(sparse.csr_matrix(expression) if as_sparse else expression, GENES, 11, 0.0)
    found = np.zeros((12, 12))
    for (source, destination), weight in weights(graph).items():
        found[GENES.index(source), GENES.index(destination)] = weight
    np.testing.assert_allclose(found, expected - np.eye(12) * np.diag(expected), atol=1e-6)


def test_coexpression_keeps_digits_where_the_mean_is_large():
    rng = np.random.default_rng(1)
    values = 1000 + rng.normal(size=(300, 3)).astype(np.float32)
    values[:, 1] = values[:, 0] + 0.5 * values[:, 2]
    expected = np.abs(np.corrcoef(values.astype(float), rowvar=False))
    found = weights(coexpression_graph(values, ["A", "B", "C"], 2, 0.0))
    assert found["A", "B"] == pytest.approx(expected[0, 1], abs=1e-5)
    assert found["C", "A"] == pytest.approx(expected[0, 2], abs=1e-5)


def test_a_constant_gene_has_no_edge_but_its_self_loop(expression):
    graph = coexpression_graph(sparse.csr_matrix(expression), GENES, 11, 0.0)
    assert graph.isolated == ("GENE5", "GENE9")
    assert self_loops(graph) == dict.fromkeys(GENES, 1.0)
    assert torch.isfinite(graph.edge_weight).all()


@pytest.mark.parametrize(("top_k", "threshold"), [(2, 0.0), (11, 0.4), (3, 0.3)])
def test_each_destination_keeps_its_strongest_sources(expression, top_k, threshold):
    every = weights(coexpression_graph(expression, GENES, 11, 0.0))
    kept = weights(coexpression_graph(expression, GENES, top_k, threshold))
    for destination in GENES:
        candidates = sorted(
            ((weight, source) for (source, to), weight in every.items() if to == destination and weight > threshold),
            reverse=True,
        )[:top_k]
        assert {source for source, to in kept if to == destination} == {source for _, source in candidates}


def test_permuting_the_genes_permutes_the_graph(expression):
    order = np.random.default_rng(3).permutation(12)
    one = weights(coexpression_graph(expression, GENES, 3, 0.1))
    other = weights(coexpression_graph(expression[:, order], [GENES[gene] for gene in order], 3, 0.1))
    assert one.keys() == other.keys()
    np.testing.assert_allclose([one[edge] for edge in one], [other[edge] for edge in one], atol=1e-6)


SETS = {"A": {"1", "2", "3"}, "B": {"2", "3", "4"}, "C": {"3"}, "D": {"9"}, "unlisted": {"1", "2", "3"}}


def test_jaccard_by_hand():
    graph = jaccard_graph(SETS, ["A", "B", "C", "D", "E"], top_k=5, threshold=0.0)
    half, third = 2 / 4, 1 / 3
    expected = {("A", "B"): half, ("A", "C"): third, ("B", "C"): third}
    assert weights(graph) == pytest.approx(expected | {(to, source): w for (source, to), w in expected.items()})
    assert graph.isolated == ("D", "E")
    assert self_loops(graph) == dict.fromkeys("ABCDE", 1.0)
    assert weights(jaccard_graph(SETS, list("ABC"), threshold=0.4)).keys() == {("A", "B"), ("B", "A")}


def test_ties_are_broken_by_name_and_not_by_position(monkeypatch):
    sets = {name: {"shared", name} for name in "ABCDEFGH"}  # every pair overlaps by 1/3
    expected = weights(jaccard_graph(sets, list("ABCDEFGH"), top_k=2))
    assert {source for source, to in expected if to == "C"} == {"A", "B"}
    monkeypatch.setattr(graphs, "_BLOCK_PAIRS", 16)
    assert weights(jaccard_graph(sets, list("HCADGBFE"), top_k=2)) == expected


def test_jaccard_agrees_with_sets_on_random_input():
    rng = np.random.default_rng(4)
    names = [f"N{number}" for number in range(40)]
    sets = {name: {f"T{term}" for term in rng.choice(30, size=rng.integers(1, 12))} for name in names}
    found = weights(jaccard_graph(sets, names, top_k=39, threshold=0.2))
    for one in names:
        for other in names:
            overlap = len(sets[one] & sets[other]) / len(sets[one] | sets[other])
            if one != other and overlap > 0.2:
                assert found.pop((one, other)) == pytest.approx(overlap)
    assert not found


def test_regulators_overlap_by_their_targets():
    table = pd.DataFrame({"source": ["R", "R", "S", "S", "S", "T"], "target": ["a", "b", "b", "a", "c", "z"]})
    graph = regulator_overlap_graph(table, ["S", "R", "T"], threshold=0.0)
    assert weights(graph) == pytest.approx({("R", "S"): 2 / 3, ("S", "R"): 2 / 3})


def test_edge_list_directions_duplicates_and_scale():
    table = pd.DataFrame(
        {
            "source": ["A", "A", "B", "C", "A", "A"],
            "target": ["B", "B", "A", "A", "A", "X"],
            "weight": [200.0, 400.0, 100.0, 800.0, 500.0, 700.0],
        }
    )
    names = ["A", "B", "C"]
    assert weights(edge_list_graph(table, names, directed=True)) == pytest.approx(
        {("A", "B"): 0.5, ("B", "A"): 0.125, ("C", "A"): 1.0}
    )
    assert weights(edge_list_graph(table, names)) == pytest.approx(
        {("A", "B"): 0.5, ("B", "A"): 0.5, ("C", "A"): 1.0, ("A", "C"): 1.0}
    )
    assert weights(edge_list_graph(table, names, directed=True, threshold=0.3, top_k=1)) == pytest.approx(
        {("A", "B"): 0.5, ("C", "A"): 1.0}
    )
    assert self_loops(edge_list_graph(table, names)) == dict.fromkeys(names, 1.0)


def test_union_remembers_where_an_edge_came_from():
    one = jaccard_graph(SETS, ["A", "B", "C"], threshold=0.4)
    other = edge_list_graph(pd.DataFrame({"source": ["A"], "target": ["C"]}), ["A", "B", "C"], directed=True)
    both = union_graph({"go": one, "edges": other})
    assert both.edge_types == ("go", "edges", "self")
    typed = {
        (both.names[source], both.names[to], both.edge_types[kind])
        for source, to, kind in zip(*both.edge_index.tolist(), both.edge_type.tolist(), strict=True)
    }
    assert typed == {("A", "B", "go"), ("B", "A", "go"), ("A", "C", "edges")} | {(n, n, "self") for n in "ABC"}
    assert len(typed) == both.edge_index.shape[1]


@pytest.mark.parametrize("typed", [False, True])
def test_restrict_reindexes_by_name(typed):
    graph = jaccard_graph(SETS, ["A", "B", "C", "D"], threshold=0.0)
    graph = union_graph({"go": graph}) if typed else graph
    smaller = graph.restrict(["new", "C", "A"])
    assert smaller.names == ("new", "C", "A")
    assert weights(smaller) == pytest.approx({("A", "C"): 1 / 3, ("C", "A"): 1 / 3})
    assert smaller.isolated == ("new",)
    assert self_loops(smaller) == dict.fromkeys(["new", "C", "A"], 1.0)
    if typed:
        assert sorted(smaller.edge_type.tolist()) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("typed", [False, True])
def test_state_survives_a_weights_only_checkpoint(typed, tmp_path):
    graph = jaccard_graph(SETS, ["A", "B", "C", "D"], threshold=0.0)
    graph = union_graph({"go": graph}) if typed else graph
    torch.save(graph.to_state(), tmp_path / "graph.pt")
    back = Graph.from_state(torch.load(tmp_path / "graph.pt", weights_only=True))
    assert back.names == graph.names
    assert back.edge_types == graph.edge_types
    torch.testing.assert_close(back.edge_index, graph.edge_index)
    torch.testing.assert_close(back.edge_weight, graph.edge_weight)
    assert (back.edge_type is None) is not typed


@pytest.mark.parametrize("damage", [{"edge_index": torch.tensor([[0], [9]])}, {"names": None}, {"edge_weight": ...}])
def test_a_damaged_state_is_refused(damage):
    state = jaccard_graph(SETS, ["A", "B"]).to_state() | damage
    state = {key: value for key, value in state.items() if value is not ...}
    with pytest.raises(PerturbZooError, match="graph"):
        Graph.from_state(state)


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GRAPH_FILES", str(tmp_path))
    (tmp_path / "go.csv").write_text("gene,go\nA,GO:1\nA,GO:2\nB,GO:2\nX,GO:1\n")
    (tmp_path / "net.tsv").write_text("tf\ttarget\tmor\nA\tC\t1\nB\tC\t-1\nB\tA\t0\n")
    return tmp_path


def test_configurations_name_their_builder(files, expression):
    names = ["A", "B", "C"]
    go = build_graph({"kind": "go", "path": "$GRAPH_FILES/go.csv", "threshold": 0.2}, names)
    assert weights(go) == pytest.approx({("A", "B"): 0.5, ("B", "A"): 0.5})
    edges = build_graph({"kind": "edges", "path": "$GRAPH_FILES/net.tsv", "directed": True}, names)
    assert weights(edges) == pytest.approx({("A", "C"): 1.0, ("B", "C"): 1.0, ("B", "A"): 1.0})
    regulators = build_graph({"kind": "regulators", "path": str(files / "net.tsv")}, names)
    assert weights(regulators) == pytest.approx({("A", "B"): 0.5, ("B", "A"): 0.5})
    config = {"kind": "coexpression", "top_k": 2, "threshold": 0.1}
    assert weights(build_graph(config, GENES, expression=expression)) == weights(coexpression_graph(expression, GENES, 2, 0.1))


def test_a_list_of_configurations_is_a_union(files):
    config = [
        {"kind": "go", "path": str(files / "go.csv")},
        {"kind": "edges", "path": str(files / "net.tsv")},
        {"kind": "go", "path": str(files / "go.csv")},
    ]
    assert build_graph(config, ["A", "B", "C"]).edge_types == ("go", "edges", "go_2", "self")
    assert universe(config) == ("A", "B", "C", "X")
    assert universe({"kind": "regulators", "path": str(files / "net.tsv")}) == ("A", "B")
    assert universe({"kind": "coexpression"}) == ()


def test_coexpression_of_targets_of_which_some_are_measured(expression):
    targets = ["GENE2", "elsewhere", "GENE0", "GENE1"]
    graph = build_graph({"kind": "coexpression", "threshold": 0.0}, targets, expression=expression, genes=GENES)
    assert graph.names == tuple(targets)
    assert graph.isolated == ("elsewhere",)
    r = np.corrcoef(expression[:, :3].astype(float), rowvar=False)
    assert weights(graph)["GENE0", "GENE2"] == pytest.approx(abs(r[0, 2]), abs=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "coexpresion"}, "did you mean 'coexpression'"),
        ({}, "kind '' is none of"),
        ({"kind": "go", "path": "x", "topk": 3}, "did you mean 'top_k'"),
        ({"kind": "coexpression", "path": "x"}, "unknown key 'path'"),
        ({"kind": "go"}, "no path"),
        ({"kind": "coexpression"}, "needs the expression"),
        ({"kind": "go", "path": "$NOT_SET_ANYWHERE/go.csv"}, "NOT_SET_ANYWHERE is not set"),
        ({"kind": "go", "path": "$GRAPH_FILES/none.csv"}, "none.csv"),
        ({"kind": "go", "path": "$GRAPH_FILES/go.csv", "top_k": 0}, "top_k is 0"),
        ({"kind": "go", "path": "$GRAPH_FILES/go.csv", "threshold": 1.0}, "threshold is 1"),
        ([], "at least"),
    ],
)
def test_bad_configurations_say_what_is_wrong(files, config, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        build_graph(config, ["A", "B"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        (np.ones((4, 2)), ["A"], "2 columns"),
        (np.ones((1, 2)), ["A", "B"], "two cells"),
        (np.array([[1.0, np.nan], [2.0, 3.0]]), ["A", "B"], "NaN"),
        (np.eye(2), ["A", "A"], "more than once: A"),
    ],
)
def test_bad_expression_is_refused(values, names, message):
    for matrix in (values, sparse.csr_matrix(values)):
        with pytest.raises(PerturbZooError, match=message):
            coexpression_graph(matrix, names)


def test_identifiers_of_another_kind_are_noticed():
    with pytest.raises(PerturbZooError, match="same kind"):
        jaccard_graph(SETS, ["ENSG1", "ENSG2"])
    with pytest.raises(PerturbZooError, match="same kind"):
        edge_list_graph(pd.DataFrame({"source": ["A"], "target": ["B"]}), ["ENSG1", "ENSG2"])


NETWORKS = Path(os.environ.get("PERTURBZOO_DATA", "/nonexistent")) / "networks"


@pytest.mark.skipif(not NETWORKS.is_dir(), reason="PERTURBZOO_DATA is not set")
def test_real_networks():
    path = NETWORKS / "dorothea_human_ABC.tsv.gz"
    regulators = universe({"kind": "regulators", "path": path})
    graph = build_graph({"kind": "regulators", "path": path, "top_k": 5}, regulators)
    assert {"STAT1", "GATA1", "TP53"} <= set(regulators)
    table = pd.read_csv(path, sep="\t")
    sets = table.groupby("tf")["target"].agg(set)
    found = weights(graph)
    for (source, destination), weight in list(found.items())[:50]:
        one, other = sets[source], sets[destination]
        assert weight == pytest.approx(len(one & other) / len(one | other))
    edges = build_graph({"kind": "edges", "path": path, "directed": True}, universe({"kind": "edges", "path": path}))
    assert len(weights(edges)) == len(table.query("tf != target").drop_duplicates(["tf", "target"]))
