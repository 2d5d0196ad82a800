"""The columns that rest on tests between cells: put together in parts, by context, and empty where there are no cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from perturbzoo.data.screen import Columns
from perturbzoo.evaluate import Evaluation, evaluate
from perturbzoo.evaluation import cell_tests
from perturbzoo.evaluation.native import CEILING, DUPLICATE, INTERPOLATED, NO_CHANGE, PERTURBED_MEAN, PREDICTION

N_GENES, LABELS = 60, [f"G{number}" for number in range(6)]
BY_LINE = Columns(condition_key="condition", covariates=("line",))


def _screen(seed: int, strength: float, n: int = 25) -> AnnData:
    """Two lines with baselines of their own; each condition moves every third gene."""
    generator, fixed = np.random.default_rng(seed), np.random.default_rng(0)
    base = fixed.gamma(1, 2, (2, N_GENES))
    effects = np.where(np.arange(N_GENES) % 3 == 0, fixed.normal(0, 1.5, (len(LABELS), N_GENES)), 0)
    blocks, labels, lines = [], [], []
    for line in (0, 1):
        for label, effect in [("control", np.zeros(N_GENES)), *zip(LABELS, strength * effects, strict=True)]:
            size = 3 * n if label == "control" else n
            blocks.append(generator.poisson(base[line] * np.exp(effect), (size, N_GENES)))
            labels += [label] * size
            lines += [f"line{line}"] * size
    obs = pd.DataFrame({"condition": labels, "line": lines}, index=[f"c{row}" for row in range(len(labels))])
    values = sparse.csr_matrix(np.log1p(np.concatenate(blocks)).astype(np.float32))
    return AnnData(values, obs, pd.DataFrame(index=[f"G{gene}" for gene in range(N_GENES)]))


@pytest.fixture(scope="module")
def pair() -> tuple[AnnData, AnnData]:
    return _screen(1, 0.7), _screen(2, 1.0)


@pytest.fixture(scope="module")
def found(pair: tuple[AnnData, AnnData]) -> Evaluation:
    return evaluate(*pair, columns=BY_LINE)


def test_contexts_are_tested_against_their_own_controls(pair: tuple[AnnData, AnnData], found: Evaluation) -> None:
    for line in ("line0", "line1"):
        alone = evaluate(*(side[side.obs["line"] == line].copy() for side in pair), columns=Columns(condition_key="condition"))
        together = found.table[found.table["context"] == line].set_index("condition")
        for name in alone.table:
            if name.startswith(("de_", "log_p_", "off_target")):
                expected = alone.table.set_index("condition")[name]
                np.testing.assert_allclose(together[name], expected.loc[together.index], err_msg=name)


def test_a_few_conditions_at_a_time_give_the_same(
    pair: tuple[AnnData, AnnData], found: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_tests, "_VALUES", 2 * 25 * N_GENES)
    pd.testing.assert_frame_equal(evaluate(*pair, columns=BY_LINE).table, found.table)


def test_who_has_columns(found: Evaluation) -> None:
    tested = {name for name in found.table if name.startswith(("de_", "log_p_"))}
    for name in (PREDICTION, NO_CHANGE, CEILING, DUPLICATE):
        assert tested <= set(found.scores[name]), name
    for name in (PERTURBED_MEAN, INTERPOLATED):  # no cells, or control cells that are moved as a whole
        assert not tested & set(found.scores[name].dropna(axis=1, how="all")), name
        assert found.scores[name]["off_target_precision"].notna().all()


def test_no_change_recovers_nothing(found: Evaluation) -> None:
    nothing = found.scores[NO_CHANGE]
    for name in ("de_recall", "de_overlap", "de_precision", "de_jaccard", "de_n_significant_predicted", "log_p_cosine"):
        assert (nothing[name].dropna() == 0).all(), name
    assert (nothing["de_lfc_nmae"].dropna() == 1).all()
    assert nothing["off_target_precision"].isna().all()
    np.testing.assert_array_equal(nothing["de_n_significant_observed"], found.table["de_n_significant_observed"])


def test_a_prediction_of_what_happens_finds_it(found: Evaluation) -> None:
    table = found.table
    assert table["de_direction_match"].mean() > 0.95
    assert table["de_lfc_spearman"].mean() > 0.9
    # effects are .7 of what they are: so are their logarithms
    assert table["de_lfc_nmae"].mean() == pytest.approx(0.3, abs=0.1)
    # twenty genes can change, and fifty are called
    assert (table["off_target_precision"] > table["off_target_chance"]).all()
