"""What the numbers say: whether a model beats the floors, and who is first by which metric. Tables in, tables out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from perturbzoo.evaluation import verdicts
from perturbzoo.evaluation.table import FILE_METRICS

AHEAD, LEVEL, BEHIND, UNKNOWN = "ahead", "level", "behind", "unknown"
_STATES = {verdicts.BEATS: AHEAD, verdicts.TIES: LEVEL, verdicts.LOSES: BEHIND, verdicts.UNKNOWN: UNKNOWN}


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
    return rows[["metric", "state", "rival", "n", "advantage", "low", "high", "floors"]]


def verdict_sentence(model: str, row: Mapping[str, object], label: str, digits: int = 3) -> tuple[str, str]:
    """Answer "does the model beat the floors?" from one row of :func:`compare_with_floors`.

    Returns
    -------
    The answer in a word or two, and the sentence behind it.
    """
    state, rival, n = row["state"], row["rival"], int(row["n"])  # type: ignore[call-overload]
    if state == UNKNOWN:
        return "Unknown.", f"There are too few conditions, or no floors, to compare {model} with on {label}."
    advantage, low, high = (float(row[name]) for name in ("advantage", "low", "high"))  # type: ignore[arg-type]
    pairs = f"{n} conditions, paired, 95 % interval"
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
