"""Reading the tables users bring: gene sets, edge lists and identifier maps, whatever their separator and column names.

Files in, plain dictionaries and DataFrames out; nothing here knows of graphs, cells or models.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pandas as pd

from perturbzoo.data.reading import expand_path
from perturbzoo.errors import PerturbZooError, shortened

GENE_COLUMNS = ("gene", "symbol", "gene_symbol", "gene_name", "hgnc_symbol", "db_object_symbol", "gene_id", "locus")
TERM_COLUMNS = ("go", "go_id", "goid", "term", "go_term", "go_term_accession", "term_id", "set", "gene_set", "pathway")
SOURCE_COLUMNS = ("regulator", "tf", "source", "from", "gene1", "protein1", "source_genesymbol", "node1")
TARGET_COLUMNS = ("target", "to", "gene2", "protein2", "target_genesymbol", "node2", "target_gene")
WEIGHT_COLUMNS = ("weight", "score", "importance", "combined_score", "correlation", "confidence_score")
SIGN_COLUMNS = ("mor", "sign", "effect", "type", "regulation", "mode")

_SIGNS = {
    **dict.fromkeys(("+", "activation", "activates", "activator", "positive", "up"), 1),
    **dict.fromkeys(("-", "repression", "represses", "repressor", "inhibition", "inhibits", "negative", "down"), -1),
    **dict.fromkeys(("", "0", "unknown", "nan"), 0),
}
_GO_TERM = re.compile(r"GO:\d{7}$")


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file, gunzipped where its content (not its name) says gzip.

    Raises
    ------
    PerturbZooError
        The file is missing, unreadable, truncated, empty or no text.
    """
    location = expand_path(path)
    try:
        content = location.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PerturbZooError(f"{location}: not a text file; a table (csv, tsv, gaf, gmt, .gz allowed) is expected") from error
    except (OSError, EOFError, zlib.error) as error:
        raise PerturbZooError(f"{location}: cannot read it: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise PerturbZooError(f"{location}: the file is empty")
    return text


def read_table(path: str | os.PathLike[str], *, header: bool = True) -> pd.DataFrame:
    """Read a delimited table as strings; lines starting with ``#`` or ``!`` before the first row are skipped.

    The separator is the one of tab, comma, semicolon and space that the first row holds.

    Raises
    ------
    PerturbZooError
        See :func:`read_text`; also for rows of differing length.
    """
    lines = read_text(path).splitlines()
    first = next((row for row, line in enumerate(lines) if line.strip() and line[0] not in "#!"), None)
    if first is None:
        raise PerturbZooError(f"{path}: nothing but comments")
    separator = next((candidate for candidate in "\t,; " if candidate in lines[first].strip()), ",")
    try:
        return pd.read_csv(
            io.StringIO("\n".join(lines[first:])),
            sep=separator,
            header=0 if header else None,
            dtype=str,
            keep_default_na=False,
            quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL,
            skipinitialspace=True,
        ).fillna("")  # rows that end early
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise PerturbZooError(f"{path}: not a table: {str(error).strip()}") from error


def find_column(columns: Iterable[object], wanted: Sequence[str]) -> str | None:
    """Return the first column of that name, letter case, spaces, dots and dashes aside; the order of `wanted` decides."""
    plain = {re.sub(r"[\s.\-]+", "_", str(column).strip().lower()): str(column) for column in columns}
    return next((plain[name] for name in wanted if name in plain), None)


def require_column(table: pd.DataFrame, wanted: Sequence[str], path: object, what: str) -> str:
    """Like :func:`find_column`, but a missing column is an error that lists what is there."""
    column = find_column(table.columns, wanted)
    if column is None:
        raise PerturbZooError(
            f"{path}: no column of {what}; the columns are {shortened(map(str, table.columns), 8)}; "
            f"name it one of {', '.join(wanted)}"
        )
    return column


def read_gene_sets(path: str | os.PathLike[str]) -> dict[str, set[str]]:
    """Read which terms (GO terms, pathways) each gene belongs to.

    Parameters
    ----------
    path
        One of, gzipped or not:

        - a GAF 2.x annotation file (http://geneontology.org/docs/go-annotation-file-gaf-format-2.2/): column 3 is the
          symbol, column 5 the GO id; rows whose qualifier (column 4) holds NOT are skipped;
        - a GMT file, by its name ``*.gmt``: ``term <tab> description <tab> gene <tab> gene ...``;
        - a table of two or more columns, csv or tsv, one row for each gene and term, whose header names a gene column
          (:data:`GENE_COLUMNS`) and a term column (:data:`TERM_COLUMNS`). Without a header the column of GO ids is
          the term and the other one of two columns the gene.

    Returns
    -------
    dict
        Gene name -> set of its terms.

    Raises
    ------
    PerturbZooError
        The file cannot be read, or holds no gene and term columns.
    """
    name = str(path).lower().removesuffix(".gz")
    if name.endswith(".gmt"):
        return _read_gmt(path)
    rows = read_table(path, header=False)
    first = rows.iloc[0].astype(str)
    if rows.shape[1] >= 15 and _GO_TERM.match(first.iloc[4]):
        rows = rows[~rows[3].str.split("|").map(lambda qualifiers: "NOT" in qualifiers)]
        genes, terms = rows[2], rows[4]
    elif rows.shape[1] == 2 and first.str.match(_GO_TERM).sum() == 1:
        term_column = int(first.str.match(_GO_TERM).to_numpy().argmax())
        genes, terms = rows[1 - term_column], rows[term_column]
    else:
        rows = rows.iloc[1:].set_axis(first.tolist(), axis=1)
        genes = rows[require_column(rows, GENE_COLUMNS, path, "genes")]
        terms = rows[require_column(rows, TERM_COLUMNS, path, "terms")]
    sets: dict[str, set[str]] = defaultdict(set)
    for gene, term in zip(genes, terms, strict=True):
        if gene and term:
            sets[gene].add(term)
    if not sets:
        raise PerturbZooError(f"{path}: no row names both a gene and a term")
    return dict(sets)


def _read_gmt(path: str | os.PathLike[str]) -> dict[str, set[str]]:
    sets: dict[str, set[str]] = defaultdict(set)
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        term, *rest = line.split("\t")
        if len(rest) < 2:
            raise PerturbZooError(f"{path}, line {number}: a GMT line is term, description and genes, separated by tabs")
        for gene in rest[1:]:
            if gene:
                sets[gene].add(term)
    return dict(sets)


def read_edge_list(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a network: one row for each edge.

    Parameters
    ----------
    path
        A csv or tsv (gzipped or not) whose header names the source (:data:`SOURCE_COLUMNS`) and the target
        (:data:`TARGET_COLUMNS`) of each edge, and optionally a weight (:data:`WEIGHT_COLUMNS`) and a sign
        (:data:`SIGN_COLUMNS`: numbers, ``+`` and ``-``, or words such as activation and repression).

    Returns
    -------
    pandas.DataFrame
        Columns `source`, `target`, `weight` (>= 0; 1 where the file has none) and `sign` (1, -1, or 0 for unknown;
        a negative weight counts as a negative sign). Rows in the order of the file, duplicates kept.

    Raises
    ------
    PerturbZooError
        The file cannot be read, lacks a column, or holds weights that are no numbers.
    """
    table = read_table(path)
    source = table[require_column(table, SOURCE_COLUMNS, path, "sources (regulators)")]
    target = table[require_column(table, TARGET_COLUMNS, path, "targets")]
    edges = pd.DataFrame({"source": source, "target": target, "weight": 1.0, "sign": 0})
    if column := find_column(table.columns, WEIGHT_COLUMNS):
        weight = pd.to_numeric(table[column], errors="coerce")
        if weight.isna().any():
            bad = table[column][weight.isna()].iloc[0]
            raise PerturbZooError(f"{path}: column '{column}' holds '{bad}', which is no number")
        edges["weight"], edges["sign"] = weight.abs(), (weight < 0) * -1
    if column := find_column(table.columns, SIGN_COLUMNS):
        signs = read_signs(table[column])
        edges["sign"] = edges["sign"].where(edges["sign"] < 0, signs)
    return edges[(edges["source"] != "") & (edges["target"] != "")].reset_index(drop=True)


def read_signs(column: pd.Series) -> pd.Series:
    """Map numbers and words to 1, -1 or 0; a word that says nothing of a direction is 0, unknown."""
    numbers = pd.to_numeric(column, errors="coerce")
    words = column.str.strip().str.lower().map(_SIGNS).fillna(0)
    signed = (numbers > 0) * 1 - (numbers < 0) * 1
    return signed.where(numbers.notna(), words).astype("int64")
