"""Interaction scores on vectors with known coefficients, against scikit-learn and hand-worked distances."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import TheilSenRegressor

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.evaluation import interaction
from perturbzoo.evaluation.interaction import (
    SCORES,
    distance_correlation,
    dominance,
    interaction_scores,
    magnitude,
    score_interactions,
    theil_sen,
)
from perturbzoo.evaluation.metrics import Array
from perturbzoo.models.baselines import Additive
from perturbzoo.perturbation import parse_condition
from perturbzoo.prediction import predict

FITTED = ("c1", "c2", "mag", "corr_fit", "dominance")


def _singles(n_genes: int = 60, seed: int = 0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    return random.normal(0, 0.5, n_genes), random.normal(0, 0.3, n_genes)


def _noisy(n_genes: int = 60, seed: int = 0) -> tuple[Array, Array, Array]:
    a, b = _singles(n_genes, seed)
    return a, b, 0.9 * a + 0.4 * b + np.random.default_rng(seed + 100).normal(0, 0.2, n_genes)


# ---------------------------------------------------------------------- the fit


@pytest.mark.parametrize("n_genes", [3, 60, 900])  # all pairs of genes; of 900, random ones
def test_coefficients_of_an_exact_combination(n_genes: int) -> None:
    a, b = _singles(n_genes)
    scores = interaction_scores(a, b, 2 * a + 0.5 * b)
    assert list(scores) == list(SCORES)
    expected = {"c1": 2.0, "c2": 0.5, "mag": np.sqrt(4.25), "dominance": np.log10(4), "corr_fit": 1.0}
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=1e-9), name


def test_the_sum_has_magnitude_root_two_and_no_dominance() -> None:
    a, b = _singles()
    scores = interaction_scores(a, b, a + b)
    assert scores["mag"] == pytest.approx(np.sqrt(2))
    assert scores["dominance"] == pytest.approx(0, abs=1e-9)
    # twice the same single: as similar to the combination, and so contributing as much, as the single itself
    same = interaction_scores(a, 2 * a, 3 * a)
    assert [same[name] for name in ("dcor", "dcor_first", "eq_contr")] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fit_is_that_of_scikit_learn(seed: int) -> None:
    a, b, both = _noisy(seed=seed)
    reference = TheilSenRegressor(fit_intercept=False, max_subpopulation=1e5, max_iter=1000, random_state=1000)
    reference.fit(np.column_stack([a, b]), both)
    np.testing.assert_allclose(theil_sen(a, b, both), reference.coef_, rtol=1e-8)


def test_fit_withstands_outliers() -> None:
    a, b = _singles(100)
    both = 2 * a + 0.5 * b
    both[:8] += 10
    least_squares = np.linalg.lstsq(np.column_stack([a, b]), both, rcond=None)[0]
    assert np.abs(least_squares - [2, 0.5]).max() > 0.1
    # 85 % of the pairs give (2, 0.5) exactly, so that is the median; the iteration stops within its tolerance
    np.testing.assert_allclose(theil_sen(a, b, both), [2, 0.5], atol=2e-3)


def test_genes_that_change_in_neither_single_do_not_vote() -> None:
    a, b, both = _noisy()
    silent = np.zeros(300)
    noise = np.random.default_rng(5).normal(0, 0.1, 300)  # the combination may change there
    padded = [np.concatenate([vector, rest]) for vector, rest in ((a, silent), (b, silent), (both, noise))]
    np.testing.assert_array_equal(theil_sen(*padded), theil_sen(a, b, both))
    reference = TheilSenRegressor(fit_intercept=False, max_subpopulation=1e5, max_iter=1000, random_state=1000)
    assert np.linalg.norm(reference.fit(np.column_stack(padded[:2]), padded[2]).coef_) < 0.01  # 92 % of its pairs say 0


def test_pairs_that_do_not_determine_both_coefficients_give_the_least_norm() -> None:
    # Genes 1 and 2 are alike: c1 + c2 = 1 from them, of least norm (1/2, 1/2). With gene 3: 2 c1 + c2 = 1, so (0, 1), twice.
    a, b, both = np.array([1.0, 1.0, 2.0]), np.array([1.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0])
    np.testing.assert_allclose(theil_sen(a, b, both), [0, 1], atol=2e-3)  # where two of three solutions lie


def test_random_pairs_estimate_what_all_pairs_give() -> None:
    a, b, both = _noisy(300)
    exact = theil_sen(a, b, both)
    drawn = np.array([theil_sen(a, b, both, seed=seed, n_pairs=20_000) for seed in range(10)])
    np.testing.assert_array_equal(drawn[3], theil_sen(a, b, both, seed=3, n_pairs=20_000))
    assert len(np.unique(drawn[:, 0])) == 10
    error = drawn.std(axis=0, ddof=1)
    assert (error < 0.03).all()
    assert (np.abs(drawn.mean(axis=0) - exact) < 4 * error / np.sqrt(10) + 1e-3).all()
    first, second = interaction._gene_pairs(300, 1, 20_000)
    assert (first != second).all()
    # every gene as often: 20,000 draws of 300 are 66.7 each, standard deviation 8.2
    for genes in (first, second):
        count = np.bincount(genes, minlength=300)
        assert len(count) == 300
        assert 25 < count.min() <= count.max() < 110


# ---------------------------------------------------------------------- distance correlation


def test_distance_correlation_of_five_points_by_hand() -> None:
    # x = 0 1 2 3 4: row means of |xi - xj| are 2, 1.4, 1.2, 1.4, 2, their mean 1.6; mean of squares 100 / 25.
    # dVar^2 = 4 + 1.6^2 - 2 (4 + 1.96 + 1.44 + 1.96 + 4) / 5 = 1.216.
    # y = 0 1 0 1 0: row means .4 .6 .4 .6 .4, mean .48; dVar^2 = .48 + .48^2 - 2 (3 x .16 + 2 x .36) / 5 = .2304.
    # Products: pairs of unlike y have distances 1, 1, 1, 1, 3, 3: 2 x 10 / 25 = .8.
    # dCov^2 = .8 + 1.6 x .48 - 2 (.8 + .84 + .48 + .84 + .8) / 5 = .064. Pearson's r is 0.
    x, y = np.arange(5.0), np.array([0.0, 1.0, 0.0, 1.0, 0.0])
    assert np.corrcoef(x, y)[0, 1] == pytest.approx(0)
    assert distance_correlation(x, y) == pytest.approx(np.sqrt(0.064 / np.sqrt(1.216 * 0.2304)))


def _by_definition(x: Array, y: Array) -> float:
    """Székely et al. 2007: both distance matrices whole, doubly centred."""
    centred = []
    for table in (x.reshape(len(x), -1), y.reshape(len(y), -1)):
        distance = np.linalg.norm(table[:, None] - table[None], axis=2)
        centred.append(distance - distance.mean(0) - distance.mean(1)[:, None] + distance.mean())
    (left, right) = centred
    return float(np.sqrt(np.mean(left * right) / np.sqrt(np.mean(left**2) * np.mean(right**2))))


@pytest.mark.parametrize("block", [1, 1000, 1 << 17])  # one row at a time, some, all
def test_distance_correlation_is_its_definition(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(interaction, "_BLOCK", block)
    a, b, both = _noisy(151)
    pair = np.column_stack([a, b])
    three = np.column_stack([a, b, both**2])
    for x, y in ((a, b), (a, both), (pair, both), (three, pair)):
        assert distance_correlation(x, y) == pytest.approx(_by_definition(x, y), rel=1e-9)
    scores = interaction_scores(a, b, both)
    expected = {"dcor": (pair, both), "dcor_singles": (a, b), "dcor_first": (a, both), "dcor_second": (b, both)}
    for name, (x, y) in expected.items():
        assert scores[name] == pytest.approx(_by_definition(x, y), rel=1e-9), name


def test_distance_correlation_invariances() -> None:
    a, b, both = _noisy()
    pair = np.column_stack([a, b])
    value = distance_correlation(pair, both)
    assert 0 < value < 1
    assert distance_correlation(both, pair) == pytest.approx(value)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert distance_correlation(3 * pair @ turn + [5, -1], -7 * both + 2) == pytest.approx(value)
    order = np.random.default_rng(0).permutation(len(a))
    assert distance_correlation(pair[order], both[order]) == pytest.approx(value)
    assert distance_correlation(a, -4 * a + 1) == pytest.approx(1)
    assert distance_correlation(a, np.full(len(a), 0.1)) == 0


# ---------------------------------------------------------------------- one combination


def test_order_of_the_singles_is_irrelevant_up_to_the_swap() -> None:
    a, b, both = _noisy(900)
    forth, back = interaction_scores(a, b, both), interaction_scores(b, a, both)
    swap = {"c1": "c2", "c2": "c1", "dcor_first": "dcor_second", "dcor_second": "dcor_first"}
    for name in SCORES:
        assert forth[name] == pytest.approx(back[swap.get(name, name)], rel=1e-9), name


def test_scale_and_order_of_genes() -> None:
    a, b, both = _noisy()
    scores = interaction_scores(a, b, both)
    stronger = interaction_scores(a, b, 3 * both)
    for name in SCORES:
        factor = 3 if name in ("c1", "c2", "mag") else 1
        assert stronger[name] == pytest.approx(factor * scores[name], abs=5e-3), name  # the fit stops at 1e-3
    order = np.random.default_rng(0).permutation(len(a))
    assert interaction_scores(a[order], b[order], both[order]) == pytest.approx(scores, rel=1e-6)
    # both singles and the combination on another scale: the relation is the same
    assert interaction_scores(5 * a, 5 * b, 5 * both) == pytest.approx(scores, rel=1e-6)


def test_equality_of_contribution() -> None:
    a, b = _singles()
    scores = interaction_scores(a, b, a + 0.1 * b)
    assert scores["dcor_first"] > scores["dcor_second"]
    assert scores["eq_contr"] == scores["dcor_second"] / scores["dcor_first"] < 1


def test_something_new_lowers_the_model_fit() -> None:
    a, b = _singles()
    # what is new is as large as the sum of the singles, and orthogonal to it and to the mean: r is 1 / sqrt 2
    total = (a + b) - (a + b).mean()
    new = np.random.default_rng(1).normal(size=len(a))
    basis = np.linalg.qr(np.column_stack([np.ones(len(a)), a, b, new]))[0]
    new = basis[:, 3] * np.linalg.norm(total)
    fit = theil_sen(a, b, a + b + new)
    expected = np.corrcoef(fit[0] * a + fit[1] * b, a + b + new)[0, 1]
    assert interaction_scores(a, b, a + b + new)["corr_fit"] == pytest.approx(expected)
    assert expected < 1 / np.sqrt(2) + 1e-9  # no combination of the singles does better


def test_magnitude_and_dominance() -> None:
    np.testing.assert_allclose(magnitude([3, 0, -1], [4, 0, 1]), [5, 0, np.sqrt(2)])
    np.testing.assert_allclose(dominance([1, 10, 0.01, -2], [1, 1, 1, -2]), [0, 1, 2, 0])
    # of unlike sign, both 0, and one 0
    np.testing.assert_array_equal(dominance([1, -1, 0, 0, 2], [-1, 1, 0, 1, 0]), [np.nan, np.nan, np.nan, np.inf, np.inf])


def test_dominance_is_undefined_where_signs_differ() -> None:
    a, b = _singles()
    scores = interaction_scores(a, b, a - 0.5 * b)
    assert np.isnan(scores["dominance"])
    assert (scores["c1"], scores["c2"]) == pytest.approx((1, -0.5))


@pytest.mark.parametrize("kind", ["no effect", "rounding", "alike", "alike in float32", "opposite"])
def test_singles_that_do_not_determine_the_coefficients(kind: str) -> None:
    a, _ = _singles()
    random = np.random.default_rng(3)
    b = {
        "no effect": np.zeros(60),
        "rounding": random.normal(0, 1e-8, 60),
        "alike": 2 * a,
        # the same prediction read from two cells: control + delta - control in float32
        "alike in float32": (np.float32(1.7) + a.astype(np.float32) - np.float32(1.7)).astype(float),
        "opposite": -0.1 * a,
    }[kind]
    for first, second in ((a, b), (b, a)):
        scores = interaction_scores(first, second, 0.7 * a + random.normal(0, 0.1, 60))
        assert all(np.isnan(scores[name]) for name in FITTED)
        assert 0 < scores["dcor"] <= 1
        assert np.isfinite(scores["eq_contr"])
    nothing = interaction_scores(np.zeros(60), np.zeros(60), np.zeros(60))
    assert all(np.isnan(nothing[name]) for name in (*FITTED, "eq_contr"))
    assert nothing["dcor"] == nothing["dcor_singles"] == 0


def test_a_combination_without_effect_or_constant() -> None:
    a, b = _singles()
    scores = interaction_scores(a, b, np.zeros(60))
    assert scores["mag"] == 0
    assert all(np.isnan(scores[name]) for name in ("corr_fit", "dominance", "eq_contr"))
    assert scores["dcor"] == scores["dcor_first"] == scores["dcor_second"] == 0
    constant = interaction_scores(a, b, np.full(60, 0.3))
    assert np.isnan(constant["corr_fit"])
    assert np.isnan(constant["eq_contr"])
    assert np.isfinite(constant["mag"])


def test_wrong_vectors() -> None:
    a, b, both = _noisy()
    for message, vectors in (
        ("same genes, 3 or more", (a, b, both[1:])),
        ("same genes, 3 or more", (a[:2], b[:2], both[:2])),
        ("same genes, 3 or more", (np.tile(a, (2, 1)), np.tile(b, (2, 1)), np.tile(both, (2, 1)))),
        ("NaN or infinite", (a, np.where(np.arange(60) == 7, np.inf, b), both)),
        ("NaN or infinite", (a, b, np.where(np.arange(60) == 7, np.nan, both))),
    ):
        with pytest.raises(PerturbZooError, match=message):
            interaction_scores(*vectors)


# ---------------------------------------------------------------------- a table of conditions


def _table() -> pd.DataFrame:
    random = np.random.default_rng(4)
    delta = {name: random.normal(0, 0.5, 40) for name in "ABCD"}
    rows = {
        "D": delta["D"],
        "control": np.zeros(40),
        "B+A": 0.5 * delta["A"] + 2 * delta["B"],
        "A": delta["A"],
        "B": delta["B"],
        "D+C": delta["C"] + delta["D"],
        "C": delta["C"],
    }
    return pd.DataFrame(rows, index=[*"ABCD", *(f"G{gene}" for gene in range(36))]).T


def test_every_double_with_both_singles() -> None:
    table = _table()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score_interactions(table)
    assert list(scores.columns) == ["condition", "first", "second", *SCORES]
    assert scores[["condition", "first", "second"]].to_numpy().tolist() == [["A+B", "A", "B"], ["C+D", "C", "D"]]
    np.testing.assert_allclose(scores[["c1", "c2"]], [[0.5, 2], [1, 1]])
    expected = interaction_scores(*(table.loc[name].to_numpy() for name in ("A", "B", "B+A")))
    assert scores.loc[0, list(SCORES)].to_dict() == pytest.approx(expected)
    parsed = table.set_axis([parse_condition(label) for label in table.index])
    pd.testing.assert_frame_equal(score_interactions(parsed.sample(frac=1, random_state=0)), scores)


def test_combinations_that_cannot_be_scored_are_said() -> None:
    table = _table()
    table.loc["A+C"] = table.loc["A"] + table.loc["C"]
    table.loc["A+B+C"] = 1.0
    table.loc["C"] = np.nan  # was not predicted
    with pytest.warns(PerturbZooWarning) as caught:
        scores = score_interactions(table)
    assert scores["condition"].tolist() == ["A+B"]
    (line,) = [str(warning.message) for warning in caught]
    assert line == (
        "interactions: 2 of 3 combinations of two lack a single (C); 1 combinations of three or more have no such scores (A+B+C)"
    )


def test_singles_are_those_of_the_dose() -> None:
    table = _table().drop(index=["D+C"])
    table = table.rename(index={"B+A": "A@0.5+B"})
    with pytest.raises(PerturbZooError, match=r"lack a single \(A@0\.5\)"):
        score_interactions(table)
    table.loc["A@0.5"] = 0.25 * table.loc["A"]
    np.testing.assert_allclose(score_interactions(table)[["c1", "c2"]], [[2, 2]])


def test_targets_can_be_left_out() -> None:
    table = _table()
    table.loc["B+A", ["A", "B", "C"]] = 50.0
    kept, dropped = score_interactions(table), score_interactions(table, drop_targets=True)
    assert kept.loc[0, "corr_fit"] < 0.9
    assert dropped.loc[0, "corr_fit"] == pytest.approx(1)
    without = score_interactions(table.drop(columns=list("ABCD")))
    pd.testing.assert_frame_equal(dropped, without)


def test_wrong_tables() -> None:
    table = _table()
    twice = pd.concat([table, table.loc[["B+A"]].set_axis(["A+B"])])
    partly = table.copy()
    partly.loc["A", "G3"] = np.nan
    for message, wrong in (
        (r"'A\+B' stands in more than one row", twice),
        ("'A' is NaN or infinite in some genes", partly),
        ("no combination of two.*among the 5 conditions: none of them", table.drop(index=["B+A", "D+C"])),
        (r"2 of 2 combinations of two lack a single \(A, B, C, D\)", table.loc[["B+A", "D+C"]]),
        ("condition 'A:B:C'", table.rename(index={"A": "A:B:C"})),
    ):
        with pytest.raises(PerturbZooError, match=message):
            score_interactions(wrong)


@pytest.mark.parametrize("pseudobulk", [True, False])
def test_predictions_of_the_additive_model_are_additive(make_adata: Callable[..., Any], pseudobulk: bool) -> None:
    screen = make_adata()
    data = PerturbSeqDataModule.from_anndata(screen, kind="knockout", split={"method": "no_test"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerturbZooWarning)
        data.setup()
    assert data.spec is not None
    model = Additive()
    model.fit_closed_form(data.spec, data.training_pseudobulks())
    predictions = predict(model, screen, "G0,G1,G2,G0+G1,G0+G2", n_cells=None if pseudobulk else 7, pseudobulk=pseudobulk)
    delta = predictions.to_df("delta").groupby(predictions.obs["condition"], observed=True).mean()
    scores = score_interactions(delta)
    assert scores["condition"].tolist() == ["G0+G1", "G0+G2"]
    np.testing.assert_allclose(scores[["c1", "c2", "corr_fit"]], 1, atol=1e-3)
    np.testing.assert_allclose(scores["mag"], np.sqrt(2), atol=1e-3)
