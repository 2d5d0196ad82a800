"""The dose-response figure draws what the model predicts, and refuses what is no curve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from perturbzoo.errors import PerturbZooError
from perturbzoo.plotting import dose_response

GENES = ["A", "B", "C"]


class Linear:
    """Delta of gene g at dose d in context k is ``d (g + 1) + k``."""

    contexts = 2

    def predict(self, controls: AnnData, conditions: Any, *, pseudobulk: bool) -> AnnData:
        assert pseudobulk
        doses = [act.dose for condition in conditions for act in condition for _ in range(self.contexts)]
        context = np.tile(np.arange(self.contexts), len(conditions))
        delta = np.outer(doses, [1.0, 2.0, 3.0]) + context[:, None]
        return AnnData(delta, layers={"delta": delta}, var=pd.DataFrame(index=GENES))


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_curves_are_the_mean_over_contexts() -> None:
    ax = dose_response(Linear(), AnnData(), "drug", [2, 0, 1], ["C", "A"])
    curves = {line.get_label(): line.get_xydata() for line in ax.lines if line.get_label() in GENES}
    assert set(curves) == {"A", "C"}
    np.testing.assert_allclose(curves["C"], [[0, 0.5], [1, 3.5], [2, 6.5]])
    np.testing.assert_allclose(curves["A"], [[0, 0.5], [1, 1.5], [2, 2.5]])
    assert ax.get_xlabel() == "dose of drug"
    assert ax.get_xscale() == "linear"


def test_wide_ranges_are_drawn_on_a_logarithmic_axis() -> None:
    assert dose_response(Linear(), AnnData(), "drug", [0, 0.1, 10], ["A"]).get_xscale() == "symlog"


@pytest.mark.parametrize(
    ("doses", "genes", "said"),
    [
        ([1, 1], ["A"], "at least two"),
        ([0, -1], ["A"], "dose -1"),
        ([0, 1], [], "genes: none"),
        ([0, 1], ["a"], "did you mean 'A'"),
        ([0, 1], ["A"] * 9, "at most 8"),
    ],
)
def test_mistakes(doses: list[float], genes: list[str], said: str) -> None:
    with pytest.raises(PerturbZooError, match=said):
        dose_response(Linear(), AnnData(), "drug", doses, genes)
