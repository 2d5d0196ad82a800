"""What the numbers say: whether a model beats the floors. Of a run it is computed, of a benchmark read. Tables in, tables out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd

from perturbzoo.evaluation import verdicts
from perturbzoo.evaluation.summary import ALL
from perturbzoo.evaluation.table import FILE_METRICS

AHEAD, LEVEL, BEHIND, UNKNOWN = "ahead", "level", "behind", "unknown"
_STATES = {verdicts.BEATS: AHEAD, verdicts.TIES: LEVEL, verdicts.LOSES: BEHIND, verdicts.UNKNOWN: UNKNOWN}
_COLUMNS = ["metric", "state", "rival", "n", "advantage", "low", "high", "floors"]


def compare_with_floors(model: pd.DataFrame, floors: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Compare a model with every floor, by the rule of :func:`perturbzoo.evaluation.verdicts.compare_with_floors`.

    Returns
    -------
    One row per metric: metric, state (``ahead``, ``level``, ``behind`` or ``unknown``), rival (the floor that the state rests on),
    n, advantage (above 0 in favour of the model), low, high, floors.
    """
    rows = verdicts.compare_with_floors(model, floors)
    rows = rows.rename(columns={"decisive_floor": "rival", "difference": "advantage"})
    lower = [FILE_METRICS[name] is False for name in rows["metric"]]
    rows.loc[lower, ["advantage", "low", "high"]] = -rows.loc[lower, ["advantage", "high", "low"]].to_numpy(dtype=float)
    rows["state"] = rows["verdict"].map(_STATES)
    unknown = rows["state"] == UNKNOWN
    rows["rival"] = rows["rival"].where(~unknown, "")
    rows[["advantage", "low", "high"]] = rows[["advantage", "low", "high"]].astype(float).where(~unknown, np.nan)
    return rows[_COLUMNS]


def read_verdicts(board: pd.DataFrame, model: str, floors: Collection[str]) -> pd.DataFrame:
    """What a benchmark's table says of a model and the floors, as :func:`compare_with_floors` returns it: nothing is computed.

    Parameters
    ----------
    board
        ``leaderboard.csv``.
    model
        One of its rows.
    floors
        Names of its floors.
    """
    board = board[board["category"] == ALL]
    known = board[board["model"].isin(list(floors)) & board["mean"].notna()].groupby("metric").size()
    rows = []
    for row in board[board["model"] == model].to_dict("records"):
        metric = str(row["metric"])
        if FILE_METRICS.get(metric) is None:
            continue
        state = _STATES.get(str(row["verdict"]), UNKNOWN)
        paired = row.get("difference_n", row["n"])
        n = int(row["n"] if pd.isna(paired) else paired)
        found = {"metric": metric, "state": state, "rival": str(row["decisive_floor"]), "n": n}
        ends = (row["difference"], row["difference_low"], row["difference_high"])
        if not FILE_METRICS[metric]:
            ends = (-ends[0], -ends[2], -ends[1])
        rows.append({**found, **dict(zip(("advantage", "low", "high"), ends, strict=True)), "floors": known.get(metric, 0)})
    return pd.DataFrame(rows, columns=_COLUMNS)


def verdict_sentence(
    model: str, row: Mapping[str, object], label: str, digits: int = 3, unit: str = "conditions"
) -> tuple[str, str]:
    """Answer "does the model beat the floors?" from one row of :func:`compare_with_floors` or :func:`read_verdicts`.

    Parameters
    ----------
    model, row, label, digits
        The model, what is known of it, the metric's name, decimals.
    unit
        What is paired.

    Returns
    -------
    The answer in a word or two, and the sentence behind it.
    """
    state, rival, n = row["state"], row["rival"], int(row["n"])  # type: ignore[call-overload]
    if state == UNKNOWN:
        return "Unknown.", f"There are too few {unit}, or no floors, to compare {model} with on {label}."
    advantage, low, high = (float(row[name]) for name in ("advantage", "low", "high"))  # type: ignore[arg-type]
    pairs = f"{n} {unit}, paired, 95 % interval"
    if state == AHEAD:
        many = f"all {row['floors']} floors" if int(row["floors"]) > 1 else "the floor"  # type: ignore[call-overload]
        size = written(advantage, low, high, digits)
        return "Yes.", f"{model} beats {many} on {label}; the closest is {rival}, behind by {size} ({pairs})."
    if state == BEHIND:
        size = written(-advantage, -high, -low, digits)
        return "No.", f"The floor {rival} beats {model} on {label}, by {size} ({pairs})."
    size = written(advantage, low, high, digits)
    return "Not shown.", f"{model} cannot be told from the floor {rival} on {label}: its advantage is {size} ({pairs})."


def written(value: float, low: float, high: float, digits: int = 3) -> str:
    """A number with its interval, with true minus signs."""
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(value, low, high, d=digits).replace("-", "\u2212")


def digits_for(values: np.ndarray) -> int:
    """Decimals to write these numbers with: three from 0.1 on, fewer of numbers above 10, three figures of small ones."""
    largest = float(np.nanmax(np.abs(values), initial=0.0))
    power = np.floor(np.log10(largest)) if largest > 0 else 0
    return int(np.clip(2 - power if power < -1 else 3 - power if power > 0 else 3, 0, 8))
