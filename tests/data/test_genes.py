"""Translating gene names: both directions, versions, ambiguity and clashes."""

from __future__ import annotations

import warnings

import pandas as pd
import pytest

from perturbzoo.data.genes import map_genes, read_gene_table, strip_version
from perturbzoo.errors import PerturbZooError, PerturbZooWarning

IDS = {name: f"ENSG{number:011d}" for number, name in enumerate(["KLF1", "TP53", "HBG2", "TBCE", "TBCE"], start=1)}
TABLE = pd.DataFrame(
    {
        "symbol": ["KLF1", "TP53", "HBG2", "TBCE", "TBCE"],
        "ensembl": [f"ENSG{number:011d}" for number in range(1, 6)],
    }
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ENSG00000143514.5", "ENSG00000143514"),
        ("ENSG00000143514", "ENSG00000143514"),
        ("ENSMUSG00000000001.4", "ENSMUSG00000000001"),
        ("ENSG00000002586.20_PAR_Y", "ENSG00000002586_PAR_Y"),
        ("AC012345.1", "AC012345.1"),
        ("HLA-A", "HLA-A"),
        ("NKX2.1", "NKX2.1"),
    ],
)
def test_only_ensembl_ids_lose_their_version(name, expected):
    assert strip_version(name) == expected


def test_both_directions():
    names, unmapped = map_genes([f"{IDS['TP53']}.12", "KLF1", "MYC", IDS["HBG2"]], TABLE, to="symbol")
    assert names == ["TP53", "KLF1", "MYC", "HBG2"]
    assert unmapped == ["MYC"]
    names, unmapped = map_genes(["TP53", f"{IDS['KLF1']}.3", "MYC"], TABLE, to="ensembl")
    assert names == [IDS["TP53"], IDS["KLF1"], "MYC"]
    assert unmapped == ["MYC"]


def test_there_and_back():
    symbols = ["HBG2", "KLF1", "TP53"]
    ids, _ = map_genes(symbols, TABLE, to="ensembl")
    assert map_genes(ids, TABLE, to="symbol") == (symbols, [])


def test_an_ambiguous_name_is_never_guessed():
    with pytest.warns(PerturbZooWarning, match="TBCE"):
        names, unmapped = map_genes(["TBCE", "KLF1"], TABLE, to="ensembl")
    assert names == ["TBCE", IDS["KLF1"]]
    assert unmapped == ["TBCE"]


def test_clashes_are_refused_with_their_count_or_keep_their_names():
    names = ["ENSG00000000004.1", "ENSG00000000005", "ENSG00000000001"]
    with pytest.raises(PerturbZooError, match=r"2 genes would share 1 symbol names \(TBCE\).*duplicates='keep'"):
        map_genes(names, TABLE)
    assert map_genes(names, TABLE, duplicates="keep") == (["ENSG00000000004.1", "ENSG00000000005", "KLF1"], [])
    # a translated name can also hit one that was there before
    with pytest.raises(PerturbZooError, match="2 genes would share"):
        map_genes(["KLF1", IDS["KLF1"]], TABLE)


@pytest.mark.parametrize(
    "text",
    [
        "gene_id\tgene_name\nENSG00000000001.5\tKLF1\nENSG00000000002.1\tTP53\nENSG00000000009\t\n",
        "Gene stable ID,Gene name\nENSG00000000001,KLF1\nENSG00000000002,TP53\n",
        "A,B\nKLF1,ENSG00000000001\nTP53,ENSG00000000002\n",
        # Ensembl's habit of repeating the id, and a gene_id column that holds something else
        "gene_id,symbol,accession\n1,KLF1,ENSG00000000001\n2,TP53,ENSG00000000002\n3,ENSG00000000003,ENSG00000000003\n",
    ],
)
def test_columns_are_found_by_name_and_by_content(tmp_path, text):
    (tmp_path / "genes.txt").write_text(text)
    pairs = read_gene_table(tmp_path / "genes.txt")
    assert dict(zip(pairs["symbol"], pairs["ensembl"], strict=True)) == {
        "KLF1": "ENSG00000000001",
        "TP53": "ENSG00000000002",
    }


def test_var_of_anndata_with_ids_in_its_index():
    var = pd.DataFrame({"gene_name": ["KLF1", "TP53"], "highly_variable": [True, False]}, index=[IDS["KLF1"], IDS["TP53"]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert map_genes(list(var.index), var) == (["KLF1", "TP53"], [])


@pytest.mark.parametrize(
    ("names", "table", "to", "message"),
    [
        (["KLF1"], TABLE, "entrez", "neither 'symbol' nor 'ensembl'"),
        (["KLF1"], pd.DataFrame({"symbol": ["KLF1"], "number": ["3"]}), "symbol", "no column of Ensembl gene ids"),
        (["KLF1"], TABLE.rename(columns={"symbol": "colour"}).assign(x="y"), "symbol", "no column of gene symbols"),
        (["Klf1", "Trp53"], TABLE, "ensembl", "same species"),
        (["KLF1"], "no_such_table.csv", "symbol", "no_such_table.csv"),
    ],
)
def test_bad_input_in_one_line(names, table, to, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        map_genes(names, table, to=to)
    assert "\n" not in str(caught.value)
