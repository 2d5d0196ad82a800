"""The rule of verdicts: p by hand, how often chance alone makes one, and contexts in the place of conditions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbzoo.evaluation.table import FILE_METRICS
from perturbzoo.evaluation.verdicts import BEATS, TIES, UNKNOWN, compare_with_floors, sign_flip_p


def scores(values: np.ndarray, contexts: bool = False) -> pd.DataFrame:
    names = [f"C{row:02d}" for row in range(len(values))]
    table = pd.DataFrame({"condition": names, "context": "", "category": "one", "pearson_delta": values})
    return table.assign(condition="A", context=names) if contexts else table


def test_p_by_hand() -> None:
    # sums of 1, 2, 3 with all signs: 6, 4, 2, 0, 0, -2, -4, -6
    columns = np.array([[1.0, 1.0, -1.0, np.nan], [2.0, 2.0, 2.0, 5.0], [3.0, -3.0, 3.0, 5.0]])
    assert sign_flip_p(columns).tolist() == [2 / 8, 8 / 8, 4 / 8, 2 / 4]


def test_drawn_signs_agree_with_the_test_of_normal_differences() -> None:
    from scipy.stats import ttest_1samp

    sample = np.random.default_rng(5).normal(0.2, 1, (60, 8))
    assert sign_flip_p(sample) == pytest.approx(ttest_1samp(sample, 0).pvalue, abs=0.03)
    assert np.array_equal(sign_flip_p(sample), sign_flip_p(sample))


def test_chance_alone_makes_a_verdict_once_in_twenty_times_at_the_most() -> None:
    random, verdicts = np.random.default_rng(0), []
    metrics = [name for name, higher in FILE_METRICS.items() if higher is not None]
    labels = scores(np.zeros(7)).drop(columns="pearson_delta")
    while len(verdicts) < 1000:
        model, floor = (
            labels.assign(**dict(zip(metrics, random.normal(size=(len(metrics), 7)), strict=True))) for _ in range(2)
        )
        verdicts += list(compare_with_floors(model, {"F": floor}, seed=len(verdicts))["verdict"])
    false, trials = sum(verdict != TIES for verdict in verdicts), len(verdicts)
    # 5 % and two standard errors
    assert false / trials < 0.05 + 2 * np.sqrt(0.05 * 0.95 / trials)


@pytest.mark.parametrize("contexts", [False, True])
def test_conditions_or_contexts_are_the_units(contexts: bool) -> None:
    gain = np.linspace(0.1, 0.2, 7)
    (row,) = compare_with_floors(scores(gain, contexts), {"F": scores(0 * gain, contexts)}).to_dict("records")
    assert (row["verdict"], row["n"], row["p"]) == (BEATS, 7, 2 / 2**7)
    (few,) = compare_with_floors(scores(gain[:5], contexts), {"F": scores(0 * gain[:5], contexts)}).to_dict("records")
    assert few["verdict"] == UNKNOWN
