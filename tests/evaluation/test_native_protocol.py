"""The ceiling of the native protocol: what independent repeats of an experiment score, and no better."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from perturbzoo.evaluate import evaluate
from perturbzoo.evaluation.native import CEILING, DUPLICATE, PREDICTION

N_GENES = 200
LABELS = [f"T{number}" for number in range(12)]


def _draw(generator: np.random.Generator, effects: np.ndarray) -> AnnData:
    """Log1p-like values: normal noise of variance 1 around 5 + effect, 30 cells of each condition, 3,000 controls."""
    blocks = [5 + generator.normal(size=(3000, N_GENES)), *(5 + one + generator.normal(size=(30, N_GENES)) for one in effects)]
    labels = np.repeat(["control", *LABELS], [len(block) for block in blocks])
    values = np.clip(np.concatenate(blocks), 0, 20).astype(np.float32)
    genes = pd.DataFrame(index=[f"G{number}" for number in range(N_GENES)])
    obs = pd.DataFrame({"condition": labels}, index=[f"c{row}" for row in range(len(labels))])
    return AnnData(values, obs, genes)


def test_a_repeat_scores_as_the_ceiling_says() -> None:
    generator = np.random.default_rng(0)
    effects = generator.normal(size=(len(LABELS), N_GENES)) * 0.3
    found = evaluate(_draw(generator, effects), _draw(generator, effects), max_cells=0)
    means = {name: found.scores[name].mean(numeric_only=True) for name in (PREDICTION, CEILING, DUPLICATE)}
    # 2 / 30 of the noise's variance; the relative standard error of the mean over 2,400 is .03
    assert means[PREDICTION]["mse"] == pytest.approx(2 / 30, rel=0.1)
    assert means[CEILING]["mse"] == pytest.approx(2 / 30, rel=0.1)
    assert means[DUPLICATE]["mse"] == pytest.approx(4 / 30, rel=0.1), "half of the cells, as they are"
    for name in ("mse_top20_de", "weighted_mse", "mae"):
        assert means[CEILING][name] == pytest.approx(means[PREDICTION][name], rel=0.25), name
    for name in ("pearson_delta", "pearson_delta_perturbed_reference"):
        assert means[CEILING][name] == pytest.approx(means[PREDICTION][name], abs=0.03), name


def test_where_nothing_happens_halves_agree_on_no_direction() -> None:
    found = evaluate(*(_draw(np.random.default_rng(seed), np.zeros((len(LABELS), N_GENES))) for seed in (1, 2)), max_cells=0)
    # 20 genes of 12 conditions: a standard error of .03. Genes chosen by both halves would agree in about 19 of 20
    for name in (PREDICTION, CEILING):
        assert found.scores[name]["direction_top20_de"].mean() == pytest.approx(0.5, abs=0.12), name


def test_a_single_cell_has_no_ceiling() -> None:
    screen = _draw(np.random.default_rng(0), np.zeros((len(LABELS), N_GENES)))
    alone = screen[~screen.obs["condition"].isin(["T0"]) | (screen.obs_names == screen.obs_names[3000])].copy()
    scores = evaluate(screen, alone, max_cells=0, min_cells=1).scores
    for name in (CEILING, DUPLICATE):
        mse = scores[name].set_index("condition")["mse"]
        assert np.isnan(mse["T0"]), name
        assert np.isfinite(mse.drop("T0")).all(), name
