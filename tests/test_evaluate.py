"""Two files compared: every number from its formula, what must not change it, and the references."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbzoo.data.screen import Columns
from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.evaluate import Evaluation, evaluate
from perturbzoo.evaluation import distribution
from perturbzoo.evaluation.native import CEILING, DUPLICATE, INTERPOLATED, NO_CHANGE, PERTURBED_MEAN
from perturbzoo.evaluation.table import FILE_METRICS

OF_SAMPLES = ["e_distance", "mmd", "sinkhorn"]
OF_TESTS = [name for name in FILE_METRICS if name.startswith(("de_", "log_p_"))]


@pytest.fixture(scope="module")
def observed(make_adata: Callable[..., Any]) -> Any:
    return make_adata(cells_per_condition=20, n_controls=40)


@pytest.fixture(scope="module")
def predicted(observed: Any) -> Any:
    """Other counts than observed: every condition is a mix of itself and of control."""
    generator = np.random.default_rng(5)
    cells = generator.permutation(observed.n_obs)
    mixed = observed[cells].copy()
    dense = mixed.X.toarray()
    control = observed.X[np.flatnonzero(observed.obs["perturbation"] == "control")].mean(axis=0).A1
    dense = generator.poisson(0.6 * dense + 0.4 * control).astype(np.float32)
    is_control = (mixed.obs["perturbation"] == "control").to_numpy()
    dense[is_control] = mixed.X.toarray()[is_control]
    mixed.X = sparse.csr_matrix(dense)
    return mixed


def _table(found: Evaluation, who: str | None = None) -> pd.DataFrame:
    return (found.table if who is None else found.scores[who]).set_index("condition").sort_index()


def _log(adata: Any, depth: float) -> np.ndarray:
    dense = adata.X.toarray().astype(float)
    return np.log1p(dense / dense.sum(axis=1, keepdims=True) * depth)


def _means(adata: Any, depth: float) -> dict[str, np.ndarray]:
    values = pd.DataFrame(_log(adata, depth)).groupby(adata.obs["perturbation"].to_numpy()).mean()
    return {str(label): row.to_numpy() for label, row in values.iterrows()}


def _depth(adata: Any) -> float:
    return float(np.median(adata.X.toarray().sum(axis=1)))


def test_numbers_are_those_of_the_formulas(predicted: Any, observed: Any) -> None:
    depth = _depth(observed)
    mine, theirs = _means(predicted, depth), _means(observed, depth)
    control = theirs["control"]
    names = sorted(set(theirs) - {"control"})
    reference = np.mean([theirs[name] for name in names], axis=0)
    table = _table(evaluate(predicted, observed))
    assert list(table.index) == names
    for name in names:
        p, o, row = mine[name], theirs[name], table.loc[name]
        assert row["mse"] == pytest.approx(((p - o) ** 2).mean(), rel=1e-4)
        assert row["mae"] == pytest.approx(np.abs(p - o).mean(), rel=1e-4)
        assert row["pearson_delta"] == pytest.approx(np.corrcoef(p - control, o - control)[0, 1], abs=1e-5)
        expected = np.corrcoef(p - reference, o - reference)[0, 1]
        assert row["pearson_delta_perturbed_reference"] == pytest.approx(expected, abs=1e-5)
        others = [np.linalg.norm(p - theirs[other]) for other in names if other != name]
        assert row["centroid_accuracy"] == pytest.approx(np.mean(others > np.linalg.norm(p - o)))
        # its own targets are measured genes G0, G1, ...
        kept = [gene for gene, symbol in enumerate(observed.var_names) if symbol not in name.split("+")]
        own = np.abs(p - o)[kept].sum()
        expected = np.mean([np.abs(p - theirs[other])[kept].sum() > own for other in names if other != name])
        assert row["pds_l1"] == pytest.approx(expected)
    spread = [np.var([side[name] for name in names], axis=0).sum() for side in (mine, theirs)]
    assert table["variance_recovery"].mean() == pytest.approx(spread[0] / spread[1], rel=1e-4)


def test_distances_between_cells_are_those_of_two_samples(predicted: Any, observed: Any) -> None:
    depth = _depth(observed)
    for estimator in ("u", "v"):
        table = _table(evaluate(predicted, observed, estimator=estimator))  # type: ignore[arg-type]
        for name in ("G0", "G1+G2"):
            cells = [_log(side[side.obs["perturbation"] == name], depth) for side in (predicted, observed)]
            expected = distribution.energy_distance(*cells, estimator)  # type: ignore[call-arg]
            assert table.loc[name, "e_distance"] == pytest.approx(expected, abs=1e-5)


def test_a_perfect_prediction(observed: Any) -> None:
    table = _table(evaluate(observed, observed))
    for name, higher in FILE_METRICS.items():
        if name in OF_SAMPLES:
            continue  # samples of the same cells: unbiased estimates are below 0
        if name == "off_target_precision" or name.startswith("in_range_"):
            continue  # not all of the 50 genes need to change; a mean need not lie near the median
        best = {True: 1.0, None: 1.0, False: 0.0}[higher]
        values = table[name].mean() if name.endswith("variance_recovery") else table[name]
        if name.startswith("de_"):
            values = values[table["de_n_significant_observed"] > 0]
            assert len(values), name
        if name.startswith(("de_", "gi_", "fold_change_gap")):
            values = values.dropna()  # what needs ten genes, or two singles, or strong changes
            # no gene of this screen changes by so much
            assert len(values) or name in ("fold_change_gap_down10", "fold_change_gap_up3", "fold_change_gap_up10"), name
        np.testing.assert_allclose(values, best, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(table["sinkhorn"], 0.0, atol=1e-6)  # of float32 cells


def test_floors_are_at_their_fixed_points(predicted: Any, observed: Any) -> None:
    found = evaluate(predicted, observed, max_cells=0)
    no_change, mean, ceiling = (_table(found, who) for who in (NO_CHANGE, PERTURBED_MEAN, CEILING))
    np.testing.assert_array_equal(no_change["pearson_delta"], 0.0)
    assert no_change["pearson_delta_undefined"].all()
    np.testing.assert_array_equal(no_change["pds_cosine"], 0.5)
    np.testing.assert_allclose(no_change["variance_recovery"], 0.0, atol=1e-20)
    np.testing.assert_array_equal(mean["pearson_delta_perturbed_reference"], 0.0)
    assert (mean["weighted_r2_delta"] <= 0).all()
    assert mean["centroid_accuracy"].mean() == pytest.approx(0.5)
    assert no_change["centroid_accuracy"].mean() == pytest.approx(0.5)
    assert ceiling["pearson_delta"].mean() > mean["pearson_delta"].mean()
    assert ceiling["centroid_accuracy"].mean() > 0.9
    assert not set(OF_SAMPLES) & set(found.table)


def test_fitted_floors_are_those_of_the_observed_means(predicted: Any, observed: Any) -> None:
    """The distances of a floor are those of the control cells, moved onto the profile that it predicts."""
    depth = _depth(observed)
    means = _means(observed, depth)
    found = evaluate(predicted, observed)
    additive, perturbed_mean = _table(found, "additive"), _table(found, PERTURBED_MEAN)
    profile = means["G0"] + means["G1"] - means["control"]
    assert additive.loc["G0+G1", "mse"] == pytest.approx(((profile - means["G0+G1"]) ** 2).mean(), rel=1e-4)
    singles = additive.index[~additive.index.str.contains("+", regex=False)]
    for metric in ("mse", "pearson_delta", "e_distance"):
        np.testing.assert_allclose(additive.loc[singles, metric], perturbed_mean.loc[singles, metric], rtol=1e-4, atol=1e-5)
    control, cells = (_log(observed[observed.obs["perturbation"] == name], depth) for name in ("control", "G0+G1"))
    moved = control + profile - means["control"]
    expected = distribution.energy_distance(moved, cells)
    assert additive.loc["G0+G1", "e_distance"] == pytest.approx(expected, abs=1e-5)


def test_duplicates(predicted: Any, observed: Any) -> None:
    """The technical duplicate is the ceiling as it is; the interpolated one gives up what its half cannot know."""
    found = evaluate(predicted, observed)
    ceiling, duplicate, interpolated = (_table(found, who) for who in (CEILING, DUPLICATE, INTERPOLATED))
    np.testing.assert_allclose(ceiling["mse"], duplicate["mse"] / 2)
    np.testing.assert_allclose(ceiling["weighted_mse"], duplicate["weighted_mse"] / 2)
    r = duplicate["pearson_delta"]
    np.testing.assert_allclose(ceiling["pearson_delta"], 2 * r / (1 + r))
    for metric in ("pds_l1", "direction_top20_de", "e_distance"):
        np.testing.assert_array_equal(ceiling[metric], duplicate[metric])
    assert interpolated["mse"].mean() < duplicate["mse"].mean()
    assert "e_distance" not in interpolated


def test_order_of_cells_genes_and_conditions_does_not_matter(predicted: Any, observed: Any) -> None:
    once = _table(evaluate(predicted, observed)).drop(columns="sinkhorn")  # of as many cells as a half has, drawn at random
    generator = np.random.default_rng(6)
    cells, genes = generator.permutation(predicted.n_obs), generator.permutation(predicted.n_vars)
    other = _table(evaluate(predicted[cells][:, genes].copy(), observed[generator.permutation(observed.n_obs)].copy()))
    pd.testing.assert_frame_equal(other.drop(columns="sinkhorn"), once, rtol=1e-5, atol=1e-6)


def test_counts_and_their_logarithms_score_alike(predicted: Any, observed: Any) -> None:
    depth = _depth(observed)
    once = _table(evaluate(predicted, observed))
    sides = []
    for adata in (predicted, observed):
        logged = adata.copy()
        logged.X = _log(adata, depth).astype(np.float32)
        sides.append(logged)
    # rounding makes and breaks ties between cells, which tests between cells see
    tested = [name for name in once if name in OF_TESTS]
    again = _table(evaluate(*sides))
    pd.testing.assert_frame_equal(again[tested], once[tested], atol=0.1)
    once = once.drop(columns=tested)
    pd.testing.assert_frame_equal(again.drop(columns=tested), once, rtol=1e-3, atol=1e-4)
    # one side of each, if it is said what the logarithms were normalised to, or the file says so as our own do
    again = _table(evaluate(sides[0], observed, depth=depth)).drop(columns=tested)
    pd.testing.assert_frame_equal(again, once, rtol=1e-3, atol=1e-4)
    sides[0].uns["perturbzoo"] = {"depth": depth}
    again = _table(evaluate(sides[0], observed)).drop(columns=tested)
    pd.testing.assert_frame_equal(again, once, rtol=1e-3, atol=1e-4)


def test_each_side_can_have_its_own_reference(predicted: Any, observed: Any) -> None:
    shifted = predicted.copy()
    depth = _depth(observed)
    shifted.X = (_log(predicted, depth) + 0.3 * np.arange(30) / 30).astype(np.float32)
    logged = observed.copy()
    logged.X = _log(observed, depth).astype(np.float32)
    # a change that predicted controls share is no change from them
    unshifted = predicted.copy()
    unshifted.X = _log(predicted, depth).astype(np.float32)
    with pytest.warns(PerturbZooWarning, match=r"predicted control cells differ .* each side's own are used"):
        own = _table(evaluate(shifted, logged, reference="own", max_cells=0))
    same = _table(evaluate(unshifted, logged, reference="own", max_cells=0))
    for name in ("pearson_delta", "direction_top20_de", "pds_cosine", "pds_l1", "pds_l2"):
        np.testing.assert_allclose(own[name], same[name], atol=1e-5, err_msg=name)
    with pytest.warns(PerturbZooWarning, match="the observed ones are used on both sides"):
        shared = _table(evaluate(shifted, logged, max_cells=0))
    assert (np.abs(shared["pearson_delta"] - own["pearson_delta"]) > 1e-3).all()
    # errors of expression know no reference
    np.testing.assert_allclose(shared["mse"], own["mse"])


def test_contexts_are_scored_by_themselves(make_adata: Callable[..., Any]) -> None:
    # more genes than the sets of variable ones have
    observed = make_adata(cells_per_condition=12, n_controls=30, contexts=("a", "b"), n_genes=230)
    predicted = observed[::2].copy()
    columns = Columns(covariates=["context"])
    together = evaluate(predicted, observed, columns=columns, depth=100, max_cells=0).table
    assert together["context"].value_counts().to_dict() == {"a": 8, "b": 8}
    for level in ("a", "b"):
        parts = [side[side.obs["context"] == level].copy() for side in (predicted, observed)]
        alone = evaluate(*parts, depth=100, max_cells=0).table.set_index("condition")
        mine = together[together["context"] == level].set_index("condition").drop(columns="context")
        pd.testing.assert_frame_equal(mine, alone)


def test_the_training_screen_gives_the_perturbed_mean_and_categories(predicted: Any, observed: Any) -> None:
    label = observed.obs["perturbation"]
    training = observed[label.isin(["control", "G0", "G1", "G0+G1"])].copy()
    tested = observed[label.isin(["control", "G2", "G1+G2", "G3+G4", "G0"])].copy()
    with pytest.warns(PerturbZooWarning, match="not scored, predicted but not in observed: G0\\+G1, G1, G3, G4"):
        found = evaluate(predicted, tested, training=training, max_cells=0, depth=100)
    table = _table(found)
    expected = {"G0": "trained on", "G1+G2": "combo_seen1", "G2": "unseen_single", "G3+G4": "combo_seen0"}
    assert table["category"].to_dict() == expected
    means, mine = _means(observed, 100), _means(predicted, 100)
    reference = np.mean([means[name] for name in ("G0", "G1", "G0+G1")], axis=0)
    correlation = np.corrcoef(mine["G2"] - reference, means["G2"] - reference)[0, 1]
    assert table.loc["G2", "pearson_delta_perturbed_reference"] == pytest.approx(correlation, abs=1e-5)


def test_a_training_screen_of_other_contexts_gives_its_mean_change(make_adata: Callable[..., Any]) -> None:
    both = make_adata(cells_per_condition=12, n_controls=30, contexts=("a", "b"))
    seen, new = (both[both.obs["context"] == level].copy() for level in ("a", "b"))
    predicted = new[::2].copy()
    found = evaluate(predicted, new, training=seen, columns=Columns(covariates=["context"]), depth=100, max_cells=0)
    before, truth, mine = _means(seen, 100), _means(new, 100), _means(predicted, 100)
    reference = truth["control"] + np.mean([before[name] - before["control"] for name in before if name != "control"], axis=0)
    correlation = np.corrcoef(mine["G2"] - reference, truth["G2"] - reference)[0, 1]
    assert _table(found).loc["G2", "pearson_delta_perturbed_reference"] == pytest.approx(correlation, abs=1e-5)
    without = seen[seen.obs["perturbation"] != "control"].copy()
    with pytest.raises(PerturbZooError, match="training: no control cells in the contexts of its conditions"):
        evaluate(predicted, new, training=without, columns=Columns(covariates=["context"]), max_cells=0)


def test_doses_from_a_column_or_from_the_label(observed: Any) -> None:
    screen = observed[observed.obs["perturbation"].isin(["control", "G0", "G1"])].copy()
    is_control = (screen.obs["perturbation"] == "control").to_numpy()
    screen.obs["dose_value"] = np.where(is_control, 0.0, np.arange(screen.n_obs) % 2 + 1.0)
    screen.obs["perturbation_type"] = "drug"
    spelled = screen.copy()
    names = screen.obs["perturbation"].astype(str) + "@" + screen.obs["dose_value"].map("{:g}".format)
    spelled.obs = pd.DataFrame({"condition": np.where(is_control, "control", names)}, index=screen.obs_names)
    for columns in (None, Columns(dose_key="dose_value")):
        table = _table(evaluate(spelled, screen, columns=columns, max_cells=0))
        assert list(table.index) == ["G0", "G0@2", "G1", "G1@2"]  # a dose of 1 is not spelled out
        np.testing.assert_allclose(table["mse"], 0, atol=1e-12)


def test_old_cell_eval_ranks(predicted: Any, observed: Any) -> None:
    now, old = (_table(evaluate(predicted, observed, pds=pds, max_cells=0)) for pds in ("own_targets", "cell_eval"))  # type: ignore[arg-type]
    single = now["category"] == "single"
    # 1 - k / (n - 1) and 1 - k / n, of n = 8 conditions
    np.testing.assert_allclose((1 - now.loc[single, "pds_l1"]) * 7, (1 - old.loc[single, "pds_l1"]) * 8)
    names = sorted(set(observed.obs["perturbation"]) - {"control"})
    means, mine = _means(observed, _depth(observed)), _means(predicted, _depth(observed))
    distance = np.array([np.abs(mine["G0+G1"] - means[name]).sum() for name in names])
    rank = (distance < distance[names.index("G0+G1")]).sum()
    assert old.loc["G0+G1", "pds_l1"] == pytest.approx(1 - rank / 8)


def test_one_profile_for_each_condition_is_enough_for_pseudobulks(predicted: Any, observed: Any) -> None:
    from anndata import AnnData

    depth = _depth(observed)
    means = _means(predicted, depth)
    labels = [name for name in means if name != "control"]
    bulk = AnnData(
        np.array([means[name] for name in labels], dtype=np.float32),
        obs=pd.DataFrame({"condition": labels}, index=[f"p{at}" for at in range(len(labels))]),
        var=observed.var,
        uns={"perturbzoo": {"depth": depth}},
    )
    with pytest.warns(PerturbZooWarning, match="predicted as one cell, so distances between cells are left empty"):
        table = _table(evaluate(bulk, observed))
    full = _table(evaluate(predicted, observed))
    empty = [*OF_SAMPLES, *OF_TESTS, "cell_variance_recovery"]
    assert table[empty].isna().all(axis=None)
    rest = [name for name in FILE_METRICS if name not in empty]
    pd.testing.assert_frame_equal(table[rest], full[rest], rtol=1e-4, atol=1e-5)


def test_sampled_controls_raise_no_alarm(predicted: Any, observed: Any) -> None:
    half = predicted[np.random.default_rng(0).permutation(predicted.n_obs)[: predicted.n_obs // 2]].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PerturbZooWarning)
        evaluate(half, observed, max_cells=0)
