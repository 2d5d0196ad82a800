"""scperteval behind our adapter: its numbers, what a perfect and a constant prediction get, calibration, what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation import scperteval as adapter
from perturbzoo.evaluation.native import NO_CHANGE, PERTURBED_MEAN, PREDICTION

CONDITIONS = ("G0", "G1", "G2", "G3", "G0+G1")
INTERPOLATED, DUPLICATE, CELLS = "interpolated duplicate", "technical duplicate", "perturbed cells"


def _logged(adata: Any) -> Any:
    logged = adata.copy()
    dense = adata.X.toarray()
    logged.X = sparse.csr_matrix(np.log1p(dense / dense.sum(axis=1, keepdims=True) * 100).astype(np.float32))
    logged.obs["condition"] = logged.obs["perturbation"]
    return logged


@pytest.fixture(scope="module")
def observed(make_adata: Callable[..., Any]) -> Any:
    return _logged(make_adata(conditions=CONDITIONS, cells_per_condition=40, n_controls=60, n_genes=60))


@pytest.fixture(scope="module")
def predicted(make_adata: Callable[..., Any]) -> Any:
    """Another draw of cells, half of them control cells: an answer of half the size."""
    adata = make_adata(conditions=CONDITIONS, cells_per_condition=40, n_controls=60, n_genes=60, seed=0)
    label = adata.obs["perturbation"].to_numpy()
    dense, generator = adata.X.toarray(), np.random.default_rng(1)
    control = np.flatnonzero(label == "control")
    for name in CONDITIONS:
        cells = np.flatnonzero(label == name)[:20]
        dense[cells] = dense[generator.choice(control, len(cells))]
    adata.X = sparse.csr_matrix(dense)
    return _logged(adata)


@pytest.fixture(scope="module")
def found(predicted: Any, observed: Any) -> adapter.CalibratedScores:
    return adapter.score(predicted, observed)


def test_numbers_are_those_of_the_package(found: adapter.CalibratedScores, predicted: Any, observed: Any) -> None:
    import scperteval

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = scperteval.prepare(observed, "all", seed=0, perturbation_key="condition", control_label="control")
        for name in ("pearson_ctrl", "wmse_exp2", "mse_top_k=50", "nir", "energy_distance_pca_k=50", "de_auprc"):
            column = name.replace("=", "_")
            scored = scperteval.score(handle, name, predicted)
            expected = scored.per_perturbation.set_index("perturbation")["raw_prediction"]
            np.testing.assert_allclose(found.scores[PREDICTION][column], expected[sorted(CONDITIONS)], atol=1e-12, err_msg=name)
            drf, bds = (scperteval.calibrate(handle, name, calibrator=kind) for kind in ("drf", "bds"))  # type: ignore[arg-type]
            assert found.calibration["drf"][column].mean() == pytest.approx(drf.aggregate["mean"])
            assert found.calibration["bds"][column].mean() == pytest.approx(bds.aggregate["bds"])


def test_numbers_are_those_of_the_formulas(found: adapter.CalibratedScores, predicted: Any, observed: Any) -> None:
    means = [
        pd.DataFrame(side.X.toarray()).groupby(side.obs["condition"].to_numpy()).mean().T for side in (predicted, observed)
    ]
    mine, theirs = means
    for name in CONDITIONS:
        row = found.scores[PREDICTION].loc[name]
        assert row["mse"] == pytest.approx(((mine[name] - theirs[name]) ** 2).mean(), rel=1e-4)
        expected = np.corrcoef(mine[name] - theirs["control"], theirs[name] - theirs["control"])[0, 1]
        assert row["pearson_ctrl"] == pytest.approx(expected, abs=1e-5)


def test_calibration_is_made_of_what_is_shown(found: adapter.CalibratedScores) -> None:
    """DRF = (floor - repeat) / (floor - perfect), and BDS the share of conditions where the repeat is better."""
    floor, repeat = found.scores[PERTURBED_MEAN]["mse"], found.scores[INTERPOLATED]["mse"]
    np.testing.assert_allclose(found.calibration["drf"]["mse"], (floor - repeat) / floor, atol=1e-3)
    np.testing.assert_array_equal(found.calibration["bds"]["mse"], repeat < floor)
    floor, repeat = found.scores[CELLS]["de_auroc"], found.scores[DUPLICATE]["de_auroc"]
    np.testing.assert_allclose(found.calibration["drf"]["de_auroc"], (repeat - floor) / (1 - floor), atol=1e-3)
    assert not found.higher["mse"]
    assert found.higher["de_auroc"]


def test_floors_and_ceilings_stand_where_the_package_uses_them(found: adapter.CalibratedScores) -> None:
    assert list(found.scores) == [PREDICTION, NO_CHANGE, PERTURBED_MEAN, CELLS, INTERPOLATED, DUPLICATE]
    assert found.scores[PREDICTION].notna().all(axis=None)
    for metric in found.higher:
        floors = [who for who in (NO_CHANGE, PERTURBED_MEAN, CELLS) if found.scores[who][metric].notna().any()]
        repeats = [who for who in (INTERPOLATED, DUPLICATE) if found.scores[who][metric].notna().any()]
        assert len(floors) == len(repeats) == 1, metric
    # a change from the perturbed mean is none for the mean itself
    assert found.scores[NO_CHANGE]["pearson_pert"].notna().all()


def test_a_perfect_prediction(observed: Any) -> None:
    table = adapter.score(observed, observed).scores[PREDICTION]
    for metric, best in (("mse", 0), ("wmse_exp2", 0), ("pearson_ctrl", 1), ("r2_ctrl", 1), ("rank", 0), ("nir", 1)):
        np.testing.assert_allclose(table[metric], best, atol=1e-6, err_msg=metric)


def test_one_profile_for_all_conditions(observed: Any) -> None:
    same = observed.copy()
    label = same.obs["condition"].to_numpy()
    dense = same.X.toarray()
    for name in CONDITIONS:
        dense[label == name] = dense[label == "G3"]
    same.X = sparse.csr_matrix(dense)
    table = adapter.score(same, observed).scores[PREDICTION]
    # its nearest condition has 1 and its farthest 0, whichever they are
    np.testing.assert_allclose(sorted(table["nir"]), [0, 0.25, 0.5, 0.75, 1])


def test_no_metric_tells_what_is_not_there(observed: Any) -> None:
    """Labels dealt to control cells at random: a repeat is no better than the mean."""
    control = observed[observed.obs["condition"] == "control"].copy()
    cells = np.tile(np.arange(control.n_obs), 8)
    labels = np.repeat(["control", *[f"G{number}" for number in range(11)]], len(cells) // 12)
    obs = pd.DataFrame(
        {"condition": np.random.default_rng(0).permutation(labels)}, index=[f"c{row}" for row in range(len(cells))]
    )
    drawn = control.__class__(control.X[cells], obs, control.var)
    found = adapter.score(drawn, drawn)
    assert found.calibration["bds"]["nir"].mean() < 0.6
    assert found.calibration["drf"]["mse"].mean() < 0.2
    # nothing responds: the metrics of the genes that do are left out, and said to be
    assert "mse_degs_padj_0_05" not in found.higher
    assert any("no gene that responds" in line and "mse_degs_padj_0_05" in line for line in found.said)


def test_order_of_genes_is_nothing(found: adapter.CalibratedScores, predicted: Any, observed: Any) -> None:
    genes = np.random.default_rng(3).permutation(observed.n_vars)
    table = adapter.score(predicted[:, genes].copy(), observed).scores[PREDICTION]
    pd.testing.assert_frame_equal(table, found.scores[PREDICTION], rtol=1e-6, atol=1e-6)


def _few(adata: Any, name: str, keep: int) -> Any:
    label = adata.obs["condition"].to_numpy()
    kept = label != name
    kept[np.flatnonzero(~kept)[:keep]] = True
    return adata[kept].copy()


def test_conditions_with_few_cells_are_left_out(predicted: Any, observed: Any) -> None:
    found = adapter.score(predicted, _few(observed, "G3", 29))
    assert list(found.scores[PREDICTION].index) == ["G0", "G0+G1", "G1", "G2"]
    assert "not scored, fewer than 30 observed cells: G3" in found.said
    found = adapter.score(predicted, _few(observed, "G3", 29), min_cells=20)
    assert "G3" in found.scores[PREDICTION].index


def test_one_profile_for_each_condition(predicted: Any, observed: Any) -> None:
    bulk = predicted
    for name in CONDITIONS:
        bulk = _few(bulk, name, 1)
    found = adapter.score(bulk, observed)
    assert "nir" in found.higher
    assert not {"de_auprc", "energy_distance_top_k_50"} & set(found.higher)
    assert any("predicted as one cell: G0, G0+G1" in line and "de_auprc" in line for line in found.said)


def test_one_line_for_what_it_cannot_score(predicted: Any, observed: Any) -> None:
    with pytest.raises(PerturbZooError, match="no observed control cells: calibrated takes changes from them"):
        adapter.score(predicted, _few(observed, "control", 0))
    few = observed
    for name in CONDITIONS[1:]:
        few = _few(few, name, 10)
    with pytest.raises(PerturbZooError, match="compares each condition with the others and 1 of 5 has 30 observed cells"):
        adapter.score(predicted, few)
