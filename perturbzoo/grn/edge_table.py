"""The table of edges behind a network: five columns, checked, and one row for each pair.

Called by :mod:`perturbzoo.grn.network`; knows frames only.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from perturbzoo.errors import PerturbZooError, shortened

Duplicates = Literal["error", "strongest", "sum", "mean"]
Contradictory = Literal["error", "unknown", "drop"]

COLUMNS = ["regulator", "target", "weight", "sign", "probability"]


def checked_edges(table: pd.DataFrame) -> pd.DataFrame:
    """Return the five columns, complete and of the right types; a row with a missing name is an error."""
    absent = [name for name in COLUMNS[:2] if name not in table]
    if absent:
        raise PerturbZooError(f"network: no column {' and '.join(absent)}; the columns are {shortened(table.columns, 8)}")
    edges = pd.DataFrame({name: table.get(name, np.nan) for name in COLUMNS}).reset_index(drop=True)
    if nameless := int(edges[["regulator", "target"]].isna().any(axis=1).sum()):
        raise PerturbZooError(f"network: {nameless} of {len(edges)} edges lack the name of a regulator or target")
    edges[["regulator", "target"]] = edges[["regulator", "target"]].astype(str)
    for name in ("weight", "sign", "probability"):
        numbers = pd.to_numeric(edges[name], errors="coerce")
        wrong = numbers.isna() & edges[name].notna() | np.isinf(numbers.astype(float))
        if wrong.any():
            raise PerturbZooError(
                f"network: {name} of {_named(edges[wrong])} is {edges[name][wrong].iloc[0]!r}, no finite number"
            )
        edges[name] = numbers.astype(float)
    edges["sign"] = np.sign(edges["sign"].fillna(edges["weight"]).fillna(0.0))
    edges["weight"] = edges["weight"].fillna(1.0)
    edges["probability"] = edges["probability"].fillna(1.0)
    for wrong, complaint in (
        (edges["weight"] == 0, "weight 0 is no edge: leave the row out"),
        (~edges["probability"].between(0, 1), "probability must lie in [0, 1]"),
        ((edges["weight"] < 0) & (edges["sign"] > 0), "a negative weight contradicts the sign 1"),
        ((edges["weight"] < 0) & (edges["sign"] == 0), "a negative weight contradicts the sign 0 (unknown)"),
    ):
        if wrong.any():
            raise PerturbZooError(f"network: {complaint}; so in {int(wrong.sum())} edges: {_named(edges[wrong])}")
    # a positive weight beside the sign -1 is a strength: most databases write them so
    edges["weight"] = edges["weight"].abs() * edges["sign"].where(edges["sign"] != 0, 1.0)
    return edges


def merged_edges(edges: pd.DataFrame, duplicates: Duplicates, contradictory: Contradictory) -> pd.DataFrame:
    """Return one row for each pair."""
    pair = ["regulator", "target"]
    twice = edges[edges.duplicated(pair, keep=False)]
    if not len(twice):
        return edges
    signs = twice.groupby(pair)["sign"]
    against = (signs.max() > 0) & (signs.min() < 0)
    if against.any():
        if contradictory == "error":
            raise PerturbZooError(
                f"network: {int(against.sum())} edges are both activating and repressing: {_named(against[against].reset_index())}"
                "; contradictory='unknown' or 'drop'"
            )
        clash = pd.MultiIndex.from_frame(edges[pair]).isin(against.index[against])
        if contradictory == "drop":
            edges = edges[~clash]
        else:
            edges = edges.assign(
                sign=edges["sign"].mask(clash, 0.0), weight=edges["weight"].where(~clash, edges["weight"].abs())
            )
    repeated = edges[edges.duplicated(pair)]
    if len(repeated) and duplicates == "error":
        raise PerturbZooError(
            f"network: {len(repeated.drop_duplicates(pair))} edges come more than once: {_named(repeated)}; "
            "duplicates='strongest', 'sum' or 'mean' merges them"
        )
    groups = edges.groupby(pair, sort=False)
    strength = edges["weight"].abs().groupby([edges["regulator"], edges["target"]], sort=False)
    # rows without a sign beside rows with one take the sign that is known
    known = np.sign(groups["sign"].sum())
    magnitude = {"strongest": strength.max, "sum": strength.sum, "mean": strength.mean}.get(duplicates, strength.max)()
    weight = magnitude * known.where(known != 0, 1.0)
    return pd.DataFrame({"weight": weight, "sign": known, "probability": groups["probability"].max()}).reset_index()


def _named(edges: pd.DataFrame) -> str:
    return shortened(
        [f"{regulator} -> {target}" for regulator, target in zip(edges["regulator"], edges["target"], strict=True)]
    )
