"""Networks in the layouts that others write: TRRUST, DoRothEA, CollecTRI, CellOracle base GRNs, SCENIC regulons, edge lists.

Files in, one table with the columns `regulator`, `target`, `weight`, `sign` (1, -1, 0 unknown) and `probability` out, with
the rows as the source lists them; merging and checking is `GeneRegulatoryNetwork.from_edges`' work.
"""

from __future__ import annotations

import ast
import os
import re

import numpy as np
import pandas as pd

from perturbzoo.data.reading import expand_path
from perturbzoo.data.tables import (
    SIGN_COLUMNS,
    SOURCE_COLUMNS,
    TARGET_COLUMNS,
    find_column,
    read_signs,
    read_table,
    read_text,
    require_column,
)
from perturbzoo.errors import PerturbZooError, near_matches

LAYOUTS = ("auto", "edges", "trrust", "dorothea", "collectri", "celloracle", "scenic", "regulons")

# Weights of the first kind may be negative and then say the sign; those of the second are importances and say nothing of it.
SIGNED_WEIGHTS = ("weight", "correlation", "coefficient", "coef", "coef_mean")
UNSIGNED_WEIGHTS = ("importance", "score", "combined_score", "confidence_score", "likelihood")
PROBABILITY_COLUMNS = ("probability", "prob", "edge_probability")
TRRUST_MODES = ("activation", "repression", "unknown")
_REGULON = re.compile(r"(?P<regulator>.+?)(?:_extended)?\s*\((?P<sign>[+\-]|[0-9]+g)\)$")


def read_network_table(path: str | os.PathLike[str], layout: str = "auto") -> pd.DataFrame:
    """Read a network file.

    Parameters
    ----------
    path
        The file; text may be gzipped, a name that ends in ``.parquet`` is read as parquet.
    layout
        ``"auto"`` finds it out. One of:

        - ``"edges"``: a table with columns of regulators and targets (`regulator`, `tf`, `source` ...; `target`, `to` ...),
          optionally a weight, a sign (numbers, ``+`` and ``-``, or words) and a probability;
        - ``"trrust"``: TRRUST v2 raw data, no header: TF, target, Activation | Repression | Unknown, PubMed ids;
        - ``"dorothea"``: columns `tf`, `confidence`, `target`, `mor`;
        - ``"collectri"``: columns `source`, `target`, and `weight` or `mor`; or OmniPath's `source_genesymbol`,
          `target_genesymbol`, `is_stimulation`, `is_inhibition`;
        - ``"celloracle"``: a base GRN: `peak_id`, `gene_short_name`, then one 0/1 column for each TF. Its signs are unknown;
          a pair counts once, whatever the number of peaks;
        - ``"scenic"``: the CSV that ``pyscenic ctx`` writes, three header lines, targets in the column TargetGenes. A
          regulon's pair is listed once, with its highest weight;
        - ``"regulons"``: a GMT file of regulons, ``TF(+) <tab> description <tab> gene ...``.

    Returns
    -------
    pandas.DataFrame
        Columns `regulator`, `target`, `weight` (positive where the sign is unknown), `sign`, `probability`.

    Raises
    ------
    PerturbZooError
        The file cannot be read, is not in that layout, or names no edge.
    """
    if layout not in LAYOUTS:
        raise PerturbZooError(
            f"layout '{layout}' is not known{near_matches(layout, LAYOUTS)}; choose one of {', '.join(LAYOUTS)}"
        )
    if layout in ("scenic", "regulons") or (layout == "auto" and (found := _text_layout(path))):
        edges = _read_scenic(path) if (layout if layout != "auto" else found) == "scenic" else _read_regulons(path)
    else:
        edges = _read_columns(path, layout)
    edges = edges[(edges["regulator"] != "") & (edges["target"] != "")].reset_index(drop=True)
    if not len(edges):
        raise PerturbZooError(f"{path}: no row names both a regulator and a target")
    return edges


def write_network_table(edges: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write edges as parquet (``.parquet``) or CSV; whole or not at all."""
    destination = expand_path(path)
    # the temporary name keeps the suffix: pandas chooses the compression by it
    unfinished = destination.with_name(f".{os.getpid()}.{destination.name}")
    try:
        if destination.suffix == ".parquet":
            edges.to_parquet(unfinished, index=False)
        else:
            edges.to_csv(unfinished, index=False)
        unfinished.replace(destination)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise PerturbZooError(f"cannot write the network to '{destination}': {error.strerror}") from error


def _text_layout(path: str | os.PathLike[str]) -> str | None:
    """Recognise the two layouts that are no plain tables."""
    name = str(path).lower().removesuffix(".gz")
    if name.endswith(".gmt"):
        return "regulons"
    if name.endswith(".parquet"):
        return None
    head = read_text(path).splitlines()[:3]
    return "scenic" if any("TargetGenes" in line for line in head) else None


def _read_frame(path: str | os.PathLike[str], *, header: bool) -> pd.DataFrame:
    if not str(path).lower().endswith(".parquet"):
        return read_table(path, header=header)
    try:
        return pd.read_parquet(expand_path(path))
    except (OSError, ValueError) as error:
        raise PerturbZooError(f"{path}: cannot read it as parquet: {error}") from error


def _read_columns(path: str | os.PathLike[str], layout: str) -> pd.DataFrame:
    """Read the layouts that are plain tables, with or without a header."""
    parquet = str(path).lower().endswith(".parquet")
    if layout in ("auto", "trrust") and not parquet:
        rows = read_table(path, header=False)
        modes = rows[2].str.strip().str.lower() if rows.shape[1] in (3, 4) else pd.Series(dtype=str)
        if len(modes) and modes.isin(TRRUST_MODES).all():
            return _edges(rows[0], rows[1], sign=read_signs(modes))
        if layout == "trrust" and find_column(rows.iloc[0], SOURCE_COLUMNS) is None:
            raise PerturbZooError(
                f"{path}: not TRRUST's layout: four columns, TF, target, one of {', '.join(TRRUST_MODES)}, PubMed ids"
            )
    table = _read_frame(path, header=True)
    table.columns = table.columns.map(str)
    gene = find_column(table.columns, ("gene_short_name",))
    if layout == "celloracle" or (layout == "auto" and gene and find_column(table.columns, ("peak_id",))):
        return _read_base_grn(table, require_column(table, ("gene_short_name",), path, "genes"), path)
    regulator = table[require_column(table, SOURCE_COLUMNS, path, "regulators")]
    target = table[require_column(table, TARGET_COLUMNS, path, "targets")]
    weight, sign = pd.Series(1.0, table.index), pd.Series(0, table.index)
    if column := find_column(table.columns, SIGNED_WEIGHTS):
        signed = _numbers(table, column, path)
        weight, sign = signed.abs(), np.sign(signed).astype(int)
    elif column := find_column(table.columns, UNSIGNED_WEIGHTS):
        weight = _numbers(table, column, path)
    if column := find_column(table.columns, SIGN_COLUMNS):
        said = read_signs(table[column].astype(str))
        # a negative weight has said it already
        sign = said.where(sign >= 0, sign)
    elif stimulation := find_column(table.columns, ("is_stimulation", "consensus_stimulation")):
        inhibition = require_column(table, ("is_inhibition", "consensus_inhibition"), path, "inhibition")
        sign = _truth(table[stimulation]) - _truth(table[inhibition])
    column = find_column(table.columns, PROBABILITY_COLUMNS)
    return _edges(regulator, target, weight, sign, _numbers(table, column, path) if column else 1.0)


def _read_base_grn(table: pd.DataFrame, gene: str, path: object) -> pd.DataFrame:
    """Turn peaks x TFs into pairs; a pair is an edge where any peak of the gene has the TF's motif."""
    described = {gene, "peak_id", "Unnamed: 0", "index", ""}
    regulators = [column for column in table.columns if column not in described]
    values = table[regulators].apply(pd.to_numeric, errors="coerce").to_numpy()
    if not regulators or not np.isin(values, (0, 1)).all():
        raise PerturbZooError(
            f"{path}: a CellOracle base GRN holds 0 and 1 in one column for each TF, beside peak_id and {gene}"
        )
    peak, regulator = np.nonzero(values)
    pairs = _edges(pd.Series(regulators)[regulator], table[gene].iloc[peak])
    return pairs.drop_duplicates(["regulator", "target"])


def _read_scenic(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read enriched motifs: one row for each TF and motif, the targets as text, ``[('Fos', 3.2), ('Jun', 1.1)]``."""
    import csv
    import io

    rows = list(csv.reader(io.StringIO(read_text(path))))
    heading = next((row for row in rows[:3] if "TargetGenes" in row), None)
    if heading is None:
        raise PerturbZooError(f"{path}: not the CSV of 'pyscenic ctx': no column TargetGenes in the first three lines")
    body = rows[next(number for number, row in enumerate(rows) if row[:2] == ["TF", "MotifID"]) + 1 :]
    listed, context = heading.index("TargetGenes"), heading.index("Context") if "Context" in heading else None
    found: list[tuple[str, str, float, int]] = []
    for row in body:
        try:
            genes = ast.literal_eval(row[listed])
            sign = 0 if context is None else ("activating" in row[context]) - ("repressing" in row[context])
            found += [(row[0], str(target), float(weight), sign) for target, weight in genes]
        except (ValueError, SyntaxError, TypeError, IndexError) as error:
            raise PerturbZooError(
                f"{path}: TargetGenes of {row[0] if row else 'a row'} is not a list of (gene, weight)"
            ) from error
    table = pd.DataFrame(found, columns=["regulator", "target", "weight", "sign"])
    # several motifs of one TF find the same target
    best = table.groupby(["regulator", "target", "sign"], as_index=False, sort=False)["weight"].max()
    return _edges(best["regulator"], best["target"], best["weight"], best["sign"])


def _read_regulons(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a GMT of regulons; ``TF(+)`` and ``TF(-)`` say the sign, ``TF (35g)`` and a bare ``TF`` do not."""
    found: list[tuple[str, str, int]] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name, *rest = line.split("\t")
        if len(rest) < 2:
            raise PerturbZooError(f"{path}, line {number}: a line of regulons is TF, description and genes, separated by tabs")
        match = _REGULON.match(name.strip())
        sign = {"+": 1, "-": -1}.get(match["sign"], 0) if match else 0
        # some versions of pyscenic put the score where the first gene should be
        genes = [gene for gene in rest[1:] if gene and not gene.startswith("score=")]
        found += [(match["regulator"] if match else name.strip(), gene, sign) for gene in genes]
    table = pd.DataFrame(found, columns=["regulator", "target", "sign"])
    return _edges(table["regulator"], table["target"], sign=table["sign"])


def _edges(
    regulator: pd.Series,
    target: pd.Series,
    weight: pd.Series | float = 1.0,
    sign: pd.Series | int = 0,
    probability: pd.Series | float = 1.0,
) -> pd.DataFrame:
    """Put columns side by side by position; a weight carries its sign where that is known."""

    def values(column: pd.Series | float) -> np.ndarray:
        given = column.to_numpy(dtype=float) if isinstance(column, pd.Series) else float(column)
        return np.broadcast_to(given, len(regulator)).astype(float)

    signs = values(sign)
    return pd.DataFrame(
        {
            "regulator": regulator.astype(str).str.strip().to_numpy(),
            "target": target.astype(str).str.strip().to_numpy(),
            "weight": np.abs(values(weight)) * np.where(signs < 0, -1.0, 1.0),
            "sign": signs.astype(int),
            "probability": values(probability),
        }
    )


def _numbers(table: pd.DataFrame, column: str, path: object) -> pd.Series:
    numbers = pd.to_numeric(table[column], errors="coerce")
    if numbers.isna().any():
        raise PerturbZooError(f"{path}: column '{column}' holds '{table[column][numbers.isna()].iloc[0]}', which is no number")
    return numbers.astype(float)


def _truth(column: pd.Series) -> pd.Series:
    return column.astype(str).str.strip().str.lower().isin(("1", "1.0", "true")).astype(int)
