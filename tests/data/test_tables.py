"""The tables users bring: every format that is promised, and one line for each that is not."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from perturbzoo.data.tables import read_edge_list, read_gene_sets, read_table
from perturbzoo.errors import PerturbZooError

EXPECTED = {"TP53": {"GO:0006915", "GO:0003677"}, "KLF1": {"GO:0003677"}}


def gaf_line(symbol: str, qualifier: str, term: str) -> str:
    """One row of a GAF 2.2 file: 17 columns, symbol in the 3rd, qualifier in the 4th, GO id in the 5th."""
    before = ["UniProtKB", "P0", symbol, qualifier, term, "PMID:1", "IDA", "", "P", "a name, with 'quotes", ""]
    return "\t".join([*before, "protein", "taxon:9606", "20200101", "UniProt", "", ""])


FORMATS = {
    "csv": ("go.csv", "gene,go\nTP53,GO:0006915\nTP53,GO:0003677\nKLF1,GO:0003677\nKLF1,\n"),
    "tsv with other names": (
        "go.tsv",
        "aspect\tGO term accession\tGene name\nP\tGO:0006915\tTP53\nF\tGO:0003677\tTP53\nF\tGO:0003677\tKLF1\n",
    ),
    "no header": ("go.txt", "TP53\tGO:0006915\nTP53\tGO:0003677\nKLF1\tGO:0003677\n"),
    "gaf": (
        "goa.gaf",
        "!gaf-version: 2.2\n!generated-by: GOC\n"
        + "\n".join(
            [
                gaf_line("TP53", "involved_in", "GO:0006915"),
                gaf_line("TP53", "enables", "GO:0003677"),
                gaf_line("KLF1", "enables", "GO:0003677"),
                gaf_line("KLF1", "NOT|involved_in", "GO:0006915"),
            ]
        )
        + "\n",
    ),
    "gmt": ("sets.gmt", "GO:0006915\tapoptosis\tTP53\nGO:0003677\thttp://x\tTP53\tKLF1\n"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_gene_sets_of_every_format(tmp_path, name, zipped):
    file, text = FORMATS[name]
    path = tmp_path / (file + ".gz" * zipped)
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert read_gene_sets(path) == EXPECTED


@pytest.mark.parametrize(
    "text",
    [
        "regulator,target,weight\nA,B,-2.5\nA,C,0.5\n",
        "Gene1\tGene2\tscore\nA\tB\t-2.5\nA\tC\t0.5\n",
        "protein1 protein2 combined_score\nA B -2.5\nA C 0.5\n",
        "# made by hand\ntf;target;importance;\nA;B;-2.5;\nA;C;0.5;\n",
    ],
)
def test_edge_lists_with_weights(tmp_path, text):
    path = tmp_path / "edges"
    path.write_text(text)
    edges = read_edge_list(path)
    assert edges.to_dict("list") == {
        "source": ["A", "A"],
        "target": ["B", "C"],
        "weight": [2.5, 0.5],
        "sign": [-1, 0],
    }


@pytest.mark.parametrize(
    ("column", "values"),
    [("mor", ["1.0", "-1.0", "0.0"]), ("Type", ["+", "-", "?"]), ("effect", ["activation", "Repression", "unknown"])],
)
def test_signs_are_not_weights(tmp_path, column, values):
    rows = [f"T{number}\tX\t{value}" for number, value in enumerate(values)]
    path = tmp_path / "signed.tsv"
    path.write_text("\n".join([f"tf\ttarget\t{column}", *rows]))
    edges = read_edge_list(path)
    assert edges["sign"].tolist() == [1, -1, 0]
    assert edges["weight"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        (read_gene_sets, None, "cannot read it"),
        (read_gene_sets, b"", "is empty"),
        (read_gene_sets, b"# only a comment\n", "nothing but comments"),
        (read_gene_sets, b"\x89HDF\r\n\x1a\n\xff\xfe", "not a text file"),
        (read_gene_sets, gzip.compress(b"gene,go\nA,GO:0000001\n" * 99)[:-20], "cannot read it"),
        (read_gene_sets, b"\x1f\x8b\x08\x00 no gzip at all", "cannot read it"),
        (read_gene_sets, b"colour,shape\nred,round\n", "no column of genes; the columns are colour, shape"),
        (read_gene_sets, b"gene,shape\nTP53,round\n", "no column of terms"),
        (read_gene_sets, b"gene,go\n,\n", "no row names both"),
        (read_edge_list, b"tf,goal\nA,B\n", "no column of targets"),
        (read_edge_list, b"tf,target,weight\nA,B,heavy\n", "column 'weight' holds 'heavy'"),
        (read_table, b"a,b\n1,2\n1,2,3\n", "not a table"),
    ],
    # gzip stamps the time: content in the test's name would differ between the workers of a parallel run
    ids=lambda value: "content" if isinstance(value, bytes) else None,
)
def test_bad_files_are_refused_in_one_line(tmp_path, reader, content, message):
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PerturbZooError, match=message) as caught:
        reader(path)
    assert "\n" not in str(caught.value)
    assert "table.csv" in str(caught.value)


def test_a_gmt_line_without_genes_is_named(tmp_path):
    (tmp_path / "sets.gmt").write_text("GO:1\tdescription\tA\nGO:2 description B\n")
    with pytest.raises(PerturbZooError, match="line 2"):
        read_gene_sets(tmp_path / "sets.gmt")


DATA = Path(os.environ.get("PERTURBZOO_DATA", "/nonexistent"))


@pytest.mark.skipif(not DATA.is_dir(), reason="PERTURBZOO_DATA is not set")
@pytest.mark.parametrize(
    ("file", "n_edges"),
    [
        ("networks/dorothea_human_ABC.tsv.gz", 13223),
        ("networks/trrust_human_from_dorothea.tsv.gz", 7041),
        ("networks/yeast_gold_standard_inferelator.tsv.gz", 1403),
        ("benchmarks/beeline_GSD_edges.csv.gz", 86),
        ("benchmarks/sergio_DS4_edges.csv.gz", 137),
    ],
)
def test_real_networks_are_read_whole(file, n_edges):
    """One edge for each line below the header; signs are 1, -1 or unknown."""
    edges = read_edge_list(DATA / file)
    assert len(edges) == n_edges
    assert set(edges["sign"]) <= {-1, 0, 1}
    assert (edges["weight"] == 1).all()
