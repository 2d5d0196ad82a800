"""Whether a model beats the floors: one rule, for the page of a run and for the leaderboard of a benchmark. Tables in, tables out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.rows import FEWEST
from perturbzoo.evaluation.summary import ALL, paired_difference
from perturbzoo.evaluation.table import FILE_METRICS

BEATS, TIES, LOSES, UNKNOWN = "beats", "no difference", "loses", ""
SAME = 1e-4
"""Share of a mean below which a difference is rounding, such as that of a model that predicts no change from NoChange."""

_LEVEL = 0.05
# conditions up to which all signs are gone through, and signs drawn above that
_EXACT, _FLIPS = 12, 4000
_COLUMNS = ["metric", "verdict", "decisive_floor", "n", "difference", "low", "high", "p", "floors"]


def compare_with_floors(
    model: pd.DataFrame, floors: Mapping[str, pd.DataFrame], *, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Compare a model with every floor, condition by condition, in every metric that has a better and a worse.

    A model is clear of a floor, or behind it, if three things hold of their paired difference: its bootstrap interval leaves out 0, a
    two-sided sign-flip test over conditions has p below .05, and it is more than :data:`SAME` of the larger mean. The test is there
    because an interval by percentiles is too narrow of few conditions; the interval, because the test alone says nothing of size.

    Parameters
    ----------
    model
        Scores of its conditions (:func:`perturbzoo.evaluation.table.score_conditions`). Contexts take the place of conditions where
        there is one condition only.
    floors
        The same of the floors, by name; of those that are equal the first is named.
    n_bootstrap, seed
        Resamples of the interval; seed of them and of the flips.

    Returns
    -------
    One row per metric: metric, verdict, decisive_floor, n, difference (model - decisive floor), low, high, p, floors (how many
    were compared). `verdict` is ``beats`` if the model is clear of every floor, ``loses`` if it is behind any, ``no difference`` in between, empty
    where no floor has :data:`perturbzoo.evaluation.rows.FEWEST` conditions in common with it. The verdict rests on `decisive_floor`: of those it is behind,
    the one it is farthest behind; else of those it is not clear of, the one it has the least advantage over; else the closest.
    """
    if model["condition"].nunique() == 1 and model["context"].nunique() > 1:
        model, floors = _swapped(model), {name: _swapped(floor) for name, floor in floors.items()}
    parts = [
        _differences(model, floor, n_bootstrap, seed).assign(decisive_floor=name)
        for name, floor in floors.items()
        if len(floor)
    ]
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*_COLUMNS, "advantage", "clear"])
    rows = []
    for metric in (name for name, higher in FILE_METRICS.items() if higher is not None and name in model):
        every = found[(found["metric"] == metric) & found["advantage"].notna()].sort_values("advantage", kind="stable")
        known = every[every["low"].notna() & (every["n"] >= FEWEST)]
        if known.empty:
            nearest = every.iloc[0].to_dict() if len(every) else {"metric": metric, "decisive_floor": "", "n": 0}
            rows.append({**nearest, "verdict": UNKNOWN, "floors": len(every)})
            continue
        clear = known["clear"].astype(bool)
        lost, even = known[clear & (known["advantage"] < 0)], known[~clear]
        verdict = LOSES if len(lost) else TIES if len(even) else BEATS
        decisive = (lost if len(lost) else even if len(even) else known).iloc[0]
        rows.append({**decisive.to_dict(), "verdict": verdict, "floors": len(known)})
    return pd.DataFrame(rows, columns=_COLUMNS)


def sign_flip_p(differences: Array, seed: int = 0) -> Array:
    """Two-sided p of a paired sign-flip test of each column: how often random signs give a sum as far from 0.

    Parameters
    ----------
    differences
        Units x columns; NaN where a unit has no value. All signs are gone through of 12 units or fewer, else 4,000 are drawn.
    seed
        Of the draw.
    """
    result = np.full(differences.shape[1], np.nan)
    here = np.isfinite(differences)
    patterns, which = np.unique(here, axis=1, return_inverse=True)
    for number, used in enumerate(patterns.T):
        n, columns = int(used.sum()), np.flatnonzero(which.ravel() == number)
        if n == 0:
            continue
        values = differences[np.ix_(used, columns)]
        signs = _signs(n, seed)
        # equal but for rounding counts as equal
        reached = np.abs(values.sum(axis=0)) - 1e-9 * np.abs(values).sum(axis=0)
        as_far = (np.abs(signs @ values) >= reached).sum(axis=0)
        # of drawn signs, those that were observed are one draw more (Phipson and Smyth 2010)
        result[columns] = as_far / len(signs) if n <= _EXACT else (as_far + 1) / (len(signs) + 1)
    return result


def _signs(n: int, seed: int) -> NDArray[np.float64]:
    if n <= _EXACT:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    else:
        bits = np.random.default_rng([seed, n]).integers(0, 2, (_FLIPS, n))
    return np.asarray(2.0 * bits - 1, dtype=np.float64)


def _swapped(scores: pd.DataFrame) -> pd.DataFrame:
    return scores.rename(columns={"condition": "context", "context": "condition"})


def _differences(model: pd.DataFrame, floor: pd.DataFrame, n_bootstrap: int, seed: int) -> pd.DataFrame:
    """Paired differences over all conditions, whether each is more than chance, and the advantage, above 0 in favour of the model."""
    keys = ["condition", "context"]
    one, other = (table.assign(**{key: table[key].astype(str) for key in keys}) for table in (model, floor))
    # one category: the categories' own intervals are not asked for here
    table = paired_difference(one.assign(category="any"), other.assign(category="any"), n_bootstrap=n_bootstrap, seed=seed)
    table = table[
        (table["category"] == ALL) & table["metric"].isin([name for name, higher in FILE_METRICS.items() if higher is not None])
    ]
    metrics = list(table["metric"])
    a, b = (side.set_index(keys).reindex(columns=metrics).astype(float) for side in (one, other))
    both = (a - b).sort_index()
    units = both.groupby("condition").sum(min_count=1)
    common = both.notna()
    size = pd.concat([side.reindex(both.index).where(common).mean().abs() for side in (a, b)], axis=1).max(axis=1).to_numpy()
    difference = table["difference"].to_numpy(float)
    p = sign_flip_p(units.to_numpy(float), seed)
    beside_zero = ((table["low"] > 0) | (table["high"] < 0)).to_numpy()
    turned = np.where([bool(FILE_METRICS[name]) for name in metrics], difference, -difference)
    # rounded, so that of floors that are the same but for rounding the first is named
    step = np.where(size > 0, size, 1.0) * 1e-9
    return table.assign(
        p=p, clear=beside_zero & (p < _LEVEL) & (np.abs(difference) > SAME * size), advantage=np.round(turned / step) * step
    )
