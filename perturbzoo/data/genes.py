"""Gene identifiers: from Ensembl ids to symbols and back, by the user's own table."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd

from perturbzoo.data.tables import find_column, read_table
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened

SYMBOL_COLUMNS = (
    *("symbol", "gene_symbol", "gene_symbols", "gene_name", "gene_names", "hgnc_symbol", "approved_symbol"),
    *("external_gene_name", "feature_name", "name", "gene"),
)
ENSEMBL_COLUMNS = (
    *("ensembl", "ensembl_id", "ensembl_gene_id", "ensembl_ids", "ensg", "gene_id", "gene_ids", "gene_stable_id"),
    *("feature_id", "id"),
)

# ENSG... in human, ENSMUSG... in mouse; a version (.5) and GENCODE's mark of the second copy on chromosome Y may follow
_ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{11})(?:\.\d+)?(_PAR_Y)?$")


def strip_version(name: str) -> str:
    """Drop the version of an Ensembl gene id: ENSG00000143514.5 -> ENSG00000143514. Other names come back as they are."""
    found = _ENSEMBL.match(name)
    return found.group(1) + (found.group(2) or "") if found else name


def read_gene_table(source: str | os.PathLike[str] | pd.DataFrame) -> pd.DataFrame:
    """Read pairs of symbol and Ensembl id.

    Parameters
    ----------
    source
        A csv or tsv (gzipped or not), or a DataFrame such as ``adata.var``; its index counts as a column too. The
        columns are found by name (:data:`SYMBOL_COLUMNS`, :data:`ENSEMBL_COLUMNS`), and by their content where it is
        clear: a column of Ensembl ids is the Ensembl column, whatever its name.

    Returns
    -------
    pandas.DataFrame
        Columns `symbol` and `ensembl` (without version), one row for each distinct pair.

    Raises
    ------
    PerturbZooError
        No column of either kind.
    """
    if isinstance(source, pd.DataFrame):
        where, table = "gene table", source.reset_index().astype(str)
    else:
        where, table = str(source), read_table(source)
    ids = {str(column): float(table[column].str.match(_ENSEMBL).mean()) for column in table.columns}
    named = find_column(table.columns, ENSEMBL_COLUMNS)
    # 'gene_id' may hold symbols; half is a low bar because genes without an id are common
    ensembl = named if named is not None and ids[named] > 0.5 else max(ids, key=ids.__getitem__, default=None)
    if ensembl is None or ids[ensembl] <= 0.5:
        raise PerturbZooError(f"{where}: no column of Ensembl gene ids (ENSG00000143514); the columns are {shortened(ids, 8)}")
    symbol = find_column((column for column in table.columns if str(column) != ensembl), SYMBOL_COLUMNS)
    if symbol is None:
        if len(table.columns) != 2:
            raise PerturbZooError(
                f"{where}: no column of gene symbols; the columns are {shortened(ids, 8)}; "
                f"name it one of {', '.join(SYMBOL_COLUMNS)}"
            )
        symbol = next(str(column) for column in table.columns if str(column) != ensembl)
    pairs = pd.DataFrame({"symbol": table[symbol].str.strip(), "ensembl": table[ensembl].map(strip_version)})
    # scanpy and Ensembl leave the symbol empty, or repeat the id, where a gene has none
    named_genes = ~pairs["symbol"].isin(["", "nan", "None", "-"]) & ~pairs["symbol"].str.match(_ENSEMBL)
    return pairs[named_genes & pairs["ensembl"].str.match(_ENSEMBL)].drop_duplicates(ignore_index=True)


def map_genes(
    names: Sequence[str],
    table: str | os.PathLike[str] | pd.DataFrame,
    to: Literal["symbol", "ensembl"] = "symbol",
    duplicates: Literal["refuse", "keep"] = "refuse",
) -> tuple[list[str], list[str]]:
    """Translate gene names; names that are of the wanted kind already stay as they are.

    Parameters
    ----------
    names
        Symbols, Ensembl ids (with or without version), or a mixture.
    table
        See :func:`read_gene_table`.
    to
        The wanted kind.
    duplicates
        What to do where several genes would get one name: `refuse`, or let all of them `keep` the name they came with.

    Returns
    -------
    names
        The new names, in the same order. A name that cannot be translated stays.
    unmapped
        The names that could not be translated: not in the table, or ambiguous (the table gives several answers, of
        which none is better; these are also named in one warning).

    Raises
    ------
    PerturbZooError
        An unknown `to`; a table without the columns; no name known to the table; several genes with one name.
    """
    if to not in ("symbol", "ensembl"):
        raise PerturbZooError(f"map_genes: to='{to}' is neither 'symbol' nor 'ensembl'")
    pairs = read_gene_table(table)
    start = "ensembl" if to == "symbol" else "symbol"
    plain = pd.Series([strip_version(str(name)) for name in names], dtype=object)
    ambiguous = set(pairs.loc[pairs[start].duplicated(keep=False), start])
    answer = pairs[~pairs[start].isin(ambiguous)].set_index(start)[to]
    mapped = plain.map(answer)
    already = plain.isin(set(pairs[to])) | ((to == "ensembl") & plain.str.match(_ENSEMBL))
    unknown = (mapped.isna() & ~already).to_numpy(dtype=bool)
    if len(names) and unknown.all():
        raise PerturbZooError(
            f"none of the {len(names)} genes ({shortened(names, 3)}) is in the gene table ({shortened(pairs[start], 3)}): "
            "is it of the same species?"
        )
    several = [name for name in plain[unknown] if name in ambiguous]
    if several:
        warnings.warn(
            f"{len(several)} genes have several {to} names in the table and keep their own: {shortened(several)}",
            PerturbZooWarning,
            stacklevel=2,
        )
    old = np.array([str(name) for name in names], dtype=object)
    # a wanted name may still carry a version: ENSG00000143514.5 becomes ENSG00000143514
    new = np.where(unknown, old, np.where(mapped.notna(), mapped.to_numpy(dtype=object), plain.to_numpy(dtype=object)))
    clash = pd.Series(new).duplicated(keep=False).to_numpy() & ~pd.Series(old).duplicated(keep=False).to_numpy()
    if clash.any() and duplicates == "refuse":
        shared = sorted(set(new[clash]))
        raise PerturbZooError(
            f"{int(clash.sum())} genes would share {len(shared)} {to} names ({shortened(shared)}): sum or drop them in the "
            "file, or let them keep the names they came with (duplicates='keep')"
        )
    new = np.where(clash, old, new)
    return new.tolist(), old[unknown].tolist()
