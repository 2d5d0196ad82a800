"""Vectors for targets: principal components by their definition, and tables in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from perturbzoo.data.datamodule import TrainingPseudobulks
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.embedding import embed_targets, pseudobulk_pca, read_embedding

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
