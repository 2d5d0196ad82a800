"""What the rows of a table of scores are: models, floors and ceilings, and who is first by which metric."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from perturbzoo.evaluation import ceilings
from perturbzoo.evaluation.summary import ALL
from perturbzoo.evaluation.table import FILE_METRICS

MODEL, FLOOR, CEILING = "model", "floor", "ceiling"
CEILINGS = (ceilings.CEILING, ceilings.DUPLICATE, ceilings.INTERPOLATED)
"""Names of the rows that say what a repeat of the experiment would score."""
FEWEST = 6
"""Conditions that a verdict needs: all of 5 agree by chance once in 16 times, which a sign-flip test at .05 cannot reject."""


def kinds_of_rows(names: Sequence[str]) -> dict[str, str]:
    """Kind of each row of one test: the tested model comes first, ceilings by their names, all others are floors.

    The first is a model also where it is a baseline that is put to the test itself.
    """
    kinds = {name: CEILING if name in CEILINGS else FLOOR for name in names}
    return {**kinds, names[0]: MODEL} if len(names) else {}


def rank_rows(summary: pd.DataFrame, names: Sequence[str], category: str = ALL) -> pd.DataFrame:
    """Rank rows of a summary by their means in every metric: 1 is best, equal means share the mean of their ranks.

    Parameters
    ----------
    summary
        Of :func:`perturbzoo.evaluation.summary.summarise`: columns model, category, metric and mean.
    names
        Rows that compete, in the order of the answer.
    category
        Conditions to rank by.

    Returns
    -------
    Names x metrics; NaN where a row has no value. Where 1 is the best value, by the distance to it.
    """
    rows = summary[(summary["category"] == category) & summary["model"].isin(list(names))]
    means = rows.pivot_table(index="model", columns="metric", values="mean", sort=False, dropna=False)
    means = means.reindex(index=list(names), columns=[name for name in FILE_METRICS if name in means.columns])
    worse = {}
    for metric in means:
        higher = FILE_METRICS[str(metric)]
        worse[metric] = -means[metric] if higher else means[metric] if higher is False else (means[metric] - 1).abs()
    # the same but for rounding is the same
    rounded = pd.DataFrame(worse, index=means.index).map(lambda value: float(f"{value:.9g}"))
    return rounded.rank(method="average")
