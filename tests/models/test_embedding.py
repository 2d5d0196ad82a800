"""Vectors for targets: components and eigenmaps by their definitions, tables in every format, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from anndata import AnnData

from perturbzoo.data.datamodule import PerturbSeqDataModule, TrainingPseudobulks
from perturbzoo.data.graph import Graph, union_graph
from perturbzoo.data.graphs import edge_list_graph
from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.models import embedding as module
from perturbzoo.models.embedding import (
    embed_targets,
    pseudobulk_pca,
    read_embedding,
    screen_pca,
    spectral_embedding,
    understand_embedding,
)

pytestmark = pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")

VECTORS = np.array([[1.0, 2.0], [3.0, -4.5], [0.0, 1e-3]])


def test_pca_scores_the_genes(make_screen: Any) -> None:
    """Scores are centred, uncorrelated, of falling variance, and rebuild the centred pseudobulks."""
    _, bulks = make_screen([("A", 0), ("B", 1), ("C", 0)], genes=list("ABCDEFGHIJ"), n_contexts=2)
    values = np.vstack([bulks.control_mean, bulks.mean]).T
    centred = values - values.mean(axis=0)
    scores = pseudobulk_pca(bulks, 99)
    assert scores.shape == (10, 5)
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=1e-12)
    gram = scores.T @ scores
    np.testing.assert_allclose(gram, np.diag(np.sort(np.linalg.eigvalsh(centred.T @ centred))[::-1]), atol=1e-10)
    np.testing.assert_allclose(scores @ np.linalg.lstsq(scores, centred, rcond=None)[0], centred, atol=1e-10)
    np.testing.assert_array_equal(pseudobulk_pca(bulks, 2), scores[:, :2])


def test_the_sign_of_a_component_is_fixed(make_screen: Any) -> None:
    """The order of genes and of pseudobulks, which turns signs in an SVD, changes nothing."""
    _, bulks = make_screen(["A", "B", "C", "D"], genes=list("ABCDEFGHIJ"))
    scores = pseudobulk_pca(bulks, 3)
    largest = scores[np.abs(scores).argmax(axis=0), np.arange(3)]
    assert (largest > 0).all()
    genes, pairs = np.random.default_rng(0).permutation(10), [2, 0, 3, 1]
    shuffled = TrainingPseudobulks(
        conditions=bulks.conditions,
        contexts=bulks.contexts,
        mean=bulks.mean[pairs][:, genes],
        count=bulks.count,
        control_mean=bulks.control_mean[:, genes],
    )
    np.testing.assert_allclose(pseudobulk_pca(shuffled, 3), scores[genes], atol=1e-10)


@pytest.mark.parametrize("name", ["v.csv", "v.csv.gz", "v.tsv", "v.txt", "v.npz"])
def test_formats(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["KLF1", "HLA-A", "AC012345.1"]
    file = tmp_path / name
    if name.endswith(".npz"):
        np.savez(file, names=np.array(names), vectors=VECTORS)
    else:
        pd.DataFrame(VECTORS, index=names).to_csv(file, sep="," if ".csv" in name else "\t")
    monkeypatch.setenv("TABLES", str(tmp_path))
    read, vectors = read_embedding(f"$TABLES/{name}")
    assert read == names
    np.testing.assert_array_equal(vectors, VECTORS)
    assert vectors.dtype == np.float64


def test_numbers_as_names(tmp_path: Path) -> None:
    """Entrez identifiers are names too."""
    pd.DataFrame(VECTORS, index=[7157, 10664, 3]).to_csv(tmp_path / "entrez.csv")
    assert read_embedding(str(tmp_path / "entrez.csv"))[0] == ["7157", "10664", "3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "no table"),
        ("words.csv", b"gene,x\nA,1\nB,word\n", "no table.*word"),
        ("hole.csv", b"gene,x,y\nA,1,2\nB,3,\n", "one finite vector per name"),
        ("infinite.csv", b"gene,x\nA,inf\n", "one finite vector per name"),
        ("twice.csv", b"gene,x\nA,1\nA,2\nB,3\n", "1 names occur more than once"),
        ("narrow.csv", b"gene\nA\nB\n", r"one finite vector per name, got shape \(2, 0\)"),
        ("ragged.csv", b"gene,x,y\nA,1,2\nB,3,4,5\n", "no table"),
        ("nothing.csv", b"gene,x\nA,0\nB,0\n", "all its numbers are 0"),
        ("screen.h5ad", b"", r"a screen, no table: write \{kind: pca"),
        ("binary.csv", b"\xff\xfe\x00\x01", "no table"),
        ("cut.npz", b"PK\x03\x04not really", "no table"),
    ],
)
def test_bad_tables(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PerturbZooError, match=message) as caught:
        read_embedding(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"vectors": VECTORS}, "names"),
        ({"names": np.array(["A"]), "vectors": VECTORS}, "one finite vector per name"),
        ({"names": np.array(["A", "B", "C"]), "vectors": VECTORS[:, 0]}, "one finite vector per name"),
        ({"names": np.array(["A", "B", "C"], dtype=object), "vectors": VECTORS}, "no table"),
    ],
)
def test_bad_archives(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    """Arrays of Python objects would be pickles: never loaded."""
    np.savez(tmp_path / "v.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(PerturbZooError, match=message):
        read_embedding(str(tmp_path / "v.npz"))


def test_a_missing_file_says_so() -> None:
    with pytest.raises(PerturbZooError, match=r"nowhere\.csv': no such file"):
        read_embedding("nowhere.csv")


def test_targets_and_the_names_beyond_them(make_screen: Any, tmp_path: Path) -> None:
    screen = make_screen(["A", "X"], other_targets=["B"])
    pd.DataFrame(VECTORS, index=["Z", "A", "B"]).to_csv(tmp_path / "v.csv")
    embedded = embed_targets(str(tmp_path / "v.csv"), 10, *screen)
    assert screen[0].targets == ("A", "B", "X")
    assert embedded["extra"] == ["Z"]
    assert embedded["known"].tolist() == [True, True, False, True]
    np.testing.assert_allclose(embedded["vectors"].numpy(), [[3.0, -4.5], [0.0, 1e-3], [0, 0], [1.0, 2.0]], rtol=1e-6)


def test_pca_knows_measured_genes_only(make_screen: Any) -> None:
    spec, bulks = make_screen(["A", "C", "X"])
    embedded = embed_targets("pca", 2, spec, bulks)
    assert embedded["extra"] == ["B", "D", "E", "F"]
    assert embedded["known"].tolist() == [True, True, False, True, True, True, True]
    scores = pseudobulk_pca(bulks, 2)
    np.testing.assert_allclose(
        embedded["vectors"].numpy(), np.vstack([scores[[0, 2]], [[0, 0]], scores[[1, 3, 4, 5]]]), rtol=1e-6
    )


def test_a_table_of_other_names_is_refused(make_screen: Any, tmp_path: Path) -> None:
    pd.DataFrame(VECTORS, index=["ENSG01", "ENSG02", "ENSG03"]).to_csv(tmp_path / "v.csv")
    with pytest.raises(PerturbZooError, match=r"no vector for any of the 2 targets \(A, B\).*Ensembl"):
        embed_targets(str(tmp_path / "v.csv"), 10, *make_screen(["A", "B"]))


# ---------------------------------------------------------------------- the argument


@pytest.mark.parametrize(
    ("embedding", "understood"),
    [
        (None, None),
        ("learned", None),
        ({"kind": "learned"}, None),
        ("pca", {"kind": "pca", "fill": "zero", "fine_tune": False}),
        ("$X/v.csv", {"kind": "table", "path": "$X/v.csv", "fill": "zero", "fine_tune": False}),
        (Path("v.csv"), {"kind": "table", "path": "v.csv", "fill": "zero", "fine_tune": False}),
        (
            {"kind": "table", "path": "v.csv", "fill": "mean", "fine_tune": True},
            {"kind": "table", "path": "v.csv", "fill": "mean", "fine_tune": True},
        ),
    ],
)
def test_ways_to_say_it(embedding: Any, understood: dict[str, Any] | None) -> None:
    assert understand_embedding(embedding) == understood


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        ({"kind": "spectrl", "graph": []}, r"kind 'spectrl' is none of.*did you mean 'spectral'"),
        ({"path": "v.csv"}, "kind '' is none of learned, pca, spectral, table"),
        ({"kind": "table", "file": "v.csv"}, r"unknown key 'file'.*it takes fill, fine_tune, path, dimension"),
        ({"kind": "learned", "fill": "zero", "graph": []}, "unknown key 'graph'"),
        ({"kind": "table"}, "no path was given"),
        ({"kind": "spectral", "graph": []}, "no graph was given"),
        ({"kind": "pca", "fill": "zeros"}, "fill 'zeros' is none of zero, mean, error"),
        (["pca"], "expected 'learned', 'pca', the path of a table or a mapping"),
    ],
)
def test_what_is_not_understood(embedding: Any, message: str) -> None:
    with pytest.raises(PerturbZooError, match=message):
        understand_embedding(embedding)


def test_a_closed_form_model_learns_no_vectors(make_screen: Any) -> None:
    with pytest.raises(PerturbZooError, match="closed-form model learns no vectors"):
        embed_targets("learned", 10, *make_screen(["A"]))


# ---------------------------------------------------------------------- targets without a vector


@pytest.fixture
def table(tmp_path: Path) -> str:
    """Vectors of A and B, which are targets, and of Z, which is none."""
    pd.DataFrame(VECTORS, index=["Z", "A", "B"]).to_csv(tmp_path / "v.csv")
    return str(tmp_path / "v.csv")


@pytest.mark.parametrize(
    ("fill", "vector", "said", "usable"),
    [
        ("zero", [0.0, 0.0], "they get zeros", [True, True, False, False, False, True]),
        ("mean", [1.5, -2.2495], "they get the mean vector", [True] * 6),  # of A and B; Z is no target of the data
    ],
)
def test_missing_targets_are_named_and_filled(
    make_screen: Any, table: str, fill: str, vector: list[float], said: str, usable: list[bool]
) -> None:
    screen = make_screen(["A", "X", "B"], other_targets=["Y"])
    with pytest.warns(PerturbZooWarning, match=rf"v\.csv' has no vector for 2 of 4 targets \(X, Y\): {said}") as caught:
        embedded = embed_targets({"kind": "table", "path": table, "fill": fill}, 10, *screen, others=["W", "A"])
    assert len([warning for warning in caught if warning.category is PerturbZooWarning]) == 1
    assert embedded["extra"] == ["W", "Z"]
    assert embedded["known"].tolist() == [True, True, False, False, False, True]
    assert embedded["usable"].tolist() == usable
    expected = [[3.0, -4.5], [0.0, 1e-3], vector, vector, vector, [1.0, 2.0]]
    np.testing.assert_allclose(embedded["vectors"].numpy(), expected, rtol=1e-6)


def test_missing_targets_can_be_an_error(make_screen: Any, table: str) -> None:
    wanted = {"kind": "table", "path": table, "fill": "error"}
    with pytest.raises(PerturbZooError, match=r"no vector for 1 of 3 targets \(X\): add them"):
        embed_targets(wanted, 10, *make_screen(["A", "X", "B"]))
    embed_targets(wanted, 10, *make_screen(["A", "B"]))


def test_a_table_of_another_width_is_refused(make_screen: Any, table: str) -> None:
    screen = make_screen(["A", "B"])
    with pytest.raises(PerturbZooError, match=r"v\.csv': its vectors have 2 numbers, not dimension 320"):
        embed_targets({"kind": "table", "path": table, "dimension": 320}, 10, *screen)
    assert embed_targets({"kind": "table", "path": table, "dimension": 2}, 10, *screen)["vectors"].shape == (3, 2)


@pytest.mark.parametrize(("embedding", "dimension"), [("pca", 0), ({"kind": "pca", "dimension": -1}, 10)])
def test_no_components(make_screen: Any, embedding: Any, dimension: int) -> None:
    with pytest.raises(PerturbZooError, match=r"dimension is (0|-1): give 1 or more"):
        embed_targets(embedding, dimension, *make_screen(["A", "B"]))


def test_the_mapping_says_the_dimension(make_screen: Any) -> None:
    screen = make_screen(["A", "B", "C", "D"])
    assert embed_targets({"kind": "pca", "dimension": 3}, 2, *screen)["vectors"].shape[1] == 3
    assert embed_targets({"kind": "pca"}, 2, *screen)["vectors"].shape[1] == 2


# ---------------------------------------------------------------------- eigenmaps of a graph


def _graph(edges: list[tuple[str, str, float]], names: list[str] | None = None) -> Graph:
    frame = pd.DataFrame(edges, columns=["source", "target", "weight"])
    return edge_list_graph(frame, names or sorted({*frame["source"], *frame["target"]}))


def _random_graph(n: int = 30, seed: int = 0) -> Graph:
    generator = np.random.default_rng(seed)
    pairs = [(i, j) for i in range(n) for j in range(i) if generator.random() < 0.15 or i == j + 1]
    return _graph([(f"n{i:02}", f"n{j:02}", generator.uniform(0.1, 1)) for i, j in pairs])


def test_a_ring_is_a_circle() -> None:
    """The smoothest functions on a ring of n nodes are sqrt(2) cos and sin of 2 pi i / n: distances are chords."""
    n = 7
    names, coordinates = spectral_embedding(_graph([(str(i), str((i + 1) % n), 1.0) for i in range(n)]), 2)
    assert names == [str(i) for i in range(n)]
    step = np.arange(n)[:, None] - np.arange(n)
    chords = 2 * np.sqrt(2) * np.abs(np.sin(np.pi * step / n))
    distance = np.linalg.norm(coordinates[:, None] - coordinates, axis=-1)
    np.testing.assert_allclose(distance, chords, atol=1e-10)


def test_eigenmaps_solve_their_equation() -> None:
    """Against SciPy's solver of the generalised problem (D - A) f = lambda D f, written out."""
    graph = _random_graph()
    n, (source, destination) = len(graph), graph.edge_index.numpy()
    weight = np.zeros((n, n))
    weight[source, destination] = graph.edge_weight.numpy()
    np.fill_diagonal(weight, 0)
    adjacency = weight + weight.sum() / n / n  # mean degree / n
    degree = np.diag(adjacency.sum(axis=1))
    _, solutions = scipy.linalg.eigh(degree - adjacency, degree)
    assert np.ptp(solutions[:, 0]) < 1e-10  # the constant one, which is left out
    _, coordinates = spectral_embedding(graph, n - 1)
    expected = solutions[:, 1:] * np.sqrt(np.trace(degree))
    assert coordinates.shape == expected.shape
    np.testing.assert_allclose(np.abs(coordinates), np.abs(expected), atol=1e-6)
    np.testing.assert_allclose(coordinates.T @ degree @ coordinates, np.eye(n - 1) * np.trace(degree), atol=1e-6)


def test_large_graphs_are_solved_as_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _random_graph()
    _, dense = spectral_embedding(graph, 5)
    monkeypatch.setattr(module, "_DENSE_NODES", 0)
    _, few = spectral_embedding(graph, 5)
    np.testing.assert_allclose(few, dense, atol=1e-8)


def test_the_order_of_nodes_is_of_no_consequence() -> None:
    graph = _random_graph()
    names, coordinates = spectral_embedding(graph, 4)
    order = np.random.default_rng(1).permutation(len(graph))
    shuffled, moved = spectral_embedding(graph.restrict([graph.names[i] for i in order]), 4)
    assert shuffled == [names[i] for i in order]
    np.testing.assert_allclose(moved, coordinates[order], atol=1e-8)


def test_parts_of_a_graph_lie_apart() -> None:
    """Two cliques that no edge joins: the first coordinate is their difference; a node without edges has no vector."""
    cliques = [(f"{part}{i}", f"{part}{j}", 1.0) for part in "ab" for i in range(4) for j in range(i)]
    names, coordinates = spectral_embedding(_graph(cliques, [*(f"{p}{i}" for p in "ab" for i in range(4)), "alone"]), 1)
    assert "alone" not in names
    np.testing.assert_allclose(np.abs(coordinates), 1, atol=1e-10)
    np.testing.assert_allclose(coordinates[:4], -coordinates[4:], atol=1e-10)


def test_a_small_part_takes_no_coordinate_of_its_own() -> None:
    """Two cliques with a bridge, and a far pair: the first coordinate tells the cliques apart, not the pair from the rest."""
    edges = [(f"{part}{i}", f"{part}{j}", 1.0) for part in "ab" for i in range(8) for j in range(i)]
    names, coordinates = spectral_embedding(_graph([*edges, ("a0", "b0", 1.0), ("x", "y", 1.0)]), 1)
    first = dict(zip(names, coordinates[:, 0], strict=True))
    assert {np.sign(first[f"a{i}"]) for i in range(8)} == {-np.sign(first["b7"])}
    assert abs(first["x"]) < 0.2 * abs(first["b7"])


def test_kinds_of_edges_add_up() -> None:
    """The union of a graph with itself is the graph with doubled weights, whose eigenmaps are the same."""
    graph = _random_graph()
    union = union_graph({"go": graph, "string": graph})
    np.testing.assert_allclose(spectral_embedding(union, 3)[1], spectral_embedding(graph, 3)[1], atol=1e-8)


def test_a_graph_without_edges_is_refused() -> None:
    loops = torch.arange(3).expand(2, -1)
    with pytest.raises(PerturbZooError, match="joins no two nodes"):
        spectral_embedding(Graph(("A", "B", "C"), loops, torch.ones(3)), 2)


def test_targets_in_a_graph(make_screen: Any, tmp_path: Path) -> None:
    """Targets get the coordinates of the whole file's graph, in which Z, no target, has its place."""
    file = tmp_path / "edges.csv"
    edges = [("A", "B", 1.0), ("B", "Z", 0.5), ("Z", "C", 0.25), ("C", "A", 0.1)]
    pd.DataFrame(edges, columns=["source", "target", "weight"]).to_csv(file, index=False)
    source = {"kind": "edges", "path": str(file)}
    wanted = {"kind": "spectral", "graph": source, "dimension": 2}
    embedded = embed_targets(wanted, 9, *make_screen(["A", "B", "X"]))
    assert embedded["extra"] == ["C", "Z"]
    assert embedded["known"].tolist() == [True, True, False, True, True]
    _, coordinates = spectral_embedding(_graph(edges), 2)
    np.testing.assert_allclose(embedded["vectors"].numpy()[[0, 1, 3, 4]], coordinates, rtol=1e-5)
    listed = embed_targets({**wanted, "graph": [source]}, 9, *make_screen(["A", "B", "X"]))
    assert torch.equal(listed["vectors"], embedded["vectors"])
    with pytest.raises(PerturbZooError, match="'spectral' has no vector for any of the 1 targets"):
        embed_targets(wanted, 9, *make_screen(["X"]))


def test_a_coexpression_graph_comes_from_training_cells(make_adata: Any) -> None:
    data = PerturbSeqDataModule.from_anndata(make_adata(n_genes=12), split={"method": "explicit", "test": ["G4"]})
    data.setup("fit")
    wanted = {"kind": "spectral", "graph": {"kind": "coexpression", "threshold": 0.0}, "dimension": 3}
    embedded = embed_targets(wanted, 9, data.spec, data.training_pseudobulks(), data)
    correlation = np.abs(np.corrcoef(data.training_cells().toarray().T))
    frame = pd.DataFrame(correlation, index=data.spec.genes, columns=data.spec.genes)
    edges = [(a, b, frame.loc[a, b]) for a in frame for b in frame if a < b]
    names, coordinates = spectral_embedding(_graph(edges, sorted(frame)), 3)
    found = dict(zip([*data.spec.targets, *embedded["extra"]], embedded["vectors"].numpy(), strict=True))
    np.testing.assert_allclose(np.stack([found[name] for name in names]), coordinates, atol=1e-3)
    with pytest.raises(PerturbZooError, match="needs the expression of training cells"):
        embed_targets(wanted, 9, data.spec, data.training_pseudobulks())


# ---------------------------------------------------------------------- another screen


@pytest.fixture(scope="module")
def other(make_adata: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AnnData]:
    """Another screen's file; its targets are G2, G3, G5 and, only in a combination, G7."""
    adata = make_adata(conditions=("G2", "G3", "G5", "G2+G7"), seed=3)
    file = tmp_path_factory.mktemp("other") / "other.h5ad"
    adata.write_h5ad(file)
    return file, adata


def test_targets_are_as_far_apart_as_their_changes(other: tuple[Path, AnnData]) -> None:
    """All components keep distances: those of the mean log1p-normalised changes of the other screen."""
    file, adata = other
    names, scores = screen_pca(str(file), 99)
    assert sorted(names) == ["G2", "G3", "G5"]
    counts = adata.X.toarray()
    total = counts.sum(axis=1, keepdims=True)
    values = pd.DataFrame(np.log1p(counts / total * np.median(total)))
    means = values.groupby(adata.obs["perturbation"].to_numpy()).mean()
    changes = means.loc[names].to_numpy()
    distance = np.linalg.norm(changes[:, None] - changes, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(scores[:, None] - scores, axis=-1), distance, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(screen_pca(str(file), 2)[1], scores[:, :2])


def test_targets_of_another_screen(make_screen: Any, other: tuple[Path, AnnData]) -> None:
    """A measured gene that the other screen did not perturb alone has no vector."""
    genes = [f"G{number}" for number in range(8)]
    wanted = {"kind": "pca", "path": str(other[0]), "dimension": 2}
    with pytest.warns(PerturbZooWarning, match=r"no vector for 2 of 4 targets \(G1, G7\)"):
        embedded = embed_targets(wanted, 9, *make_screen(["G1", "G2", "G3", "G7"], genes=genes))
    assert embedded["known"].tolist() == [False, True, True, False, True]
    assert embedded["extra"] == ["G5"]
    names, scores = screen_pca(str(other[0]), 2)
    rows = [names.index(name) for name in ("G2", "G3", "G5")]
    np.testing.assert_allclose(embedded["vectors"].numpy()[[1, 2, 4]], scores[rows], rtol=1e-5)
    with pytest.raises(PerturbZooError, match="no vector for any of the 1 targets"):
        embed_targets(wanted, 9, *make_screen(["A"]))


def test_how_to_read_another_screen(make_adata: Any, tmp_path: Path) -> None:
    adata = make_adata(conditions=("G2", "G3"))
    adata.obs["what"] = adata.obs.pop("perturbation")
    adata.write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(PerturbZooError):
        screen_pca(str(tmp_path / "other.h5ad"), 2)
    assert sorted(screen_pca(str(tmp_path / "other.h5ad"), 2, condition_key="what")[0]) == ["G2", "G3"]
    with pytest.raises(PerturbZooError, match=r"'data' takes arguments of the data module: .*'condition_kye'"):
        screen_pca(str(tmp_path / "other.h5ad"), 2, condition_kye="what")


def test_the_screen_to_learn_from_is_no_other_screen(other: tuple[Path, AnnData], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its test cells would take part."""
    file, _ = other
    monkeypatch.setenv("SCREENS", str(file.parent))
    data = PerturbSeqDataModule(str(file), split={"method": "explicit", "test": ["G5"]})
    data.setup("fit")
    with pytest.raises(PerturbZooError, match="the screen to learn from, test cells and all"):
        embed_targets({"kind": "pca", "path": "$SCREENS/other.h5ad"}, 2, data.spec, data.training_pseudobulks(), data)


def test_a_screen_of_combinations_alone_says_so(make_adata: Any, tmp_path: Path) -> None:
    make_adata(conditions=("G2+G3", "G3+G5")).write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(PerturbZooError, match="no target that was perturbed alone"):
        screen_pca(str(tmp_path / "other.h5ad"), 2)
