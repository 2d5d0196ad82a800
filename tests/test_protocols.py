"""Two files by cell-eval2 and scperteval: what is handed to them, contexts, categories, the table and what is printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbzoo.data.screen import Columns
from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.evaluation import cell_eval, scperteval
from perturbzoo.evaluation.native import NO_CHANGE, PERTURBED_MEAN, PREDICTION
from perturbzoo.protocols import RESCALED, ProtocolEvaluation, evaluate_by

CONDITIONS = ("G0", "G1", "G2", "G0+G1")
TARGETS = {name: name.split("+") for name in CONDITIONS}


@pytest.fixture(scope="module")
def observed(make_adata: Callable[..., Any]) -> Any:
    return make_adata(conditions=CONDITIONS, cells_per_condition=32, n_controls=60, n_genes=40)


@pytest.fixture(scope="module")
def predicted(observed: Any) -> Any:
    """Counts drawn around the observed ones; no control cells."""
    other = observed[observed.obs["perturbation"] != "control"].copy()
    other.X = sparse.csr_matrix(np.random.default_rng(5).poisson(other.X.toarray()).astype(np.float32))
    return other


@pytest.fixture(scope="module")
def challenge(predicted: Any, observed: Any) -> ProtocolEvaluation:
    return evaluate_by(predicted, observed, "vcc2026")


def _with_controls(predicted: Any, observed: Any) -> tuple[Any, Any]:
    """What our adapters take: the same labels on both sides, controls included."""
    import anndata

    whole = observed.copy()
    whole.obs["condition"] = whole.obs["perturbation"].astype(str)
    mine = predicted.copy()
    mine.obs["condition"] = mine.obs["perturbation"].astype(str)
    joined = anndata.concat([mine, whole[whole.obs["condition"] == "control"]], index_unique="-")
    return joined, whole


def test_the_same_numbers_as_by_hand(challenge: ProtocolEvaluation, predicted: Any, observed: Any) -> None:
    mine, theirs = _with_controls(predicted, observed)
    expected = cell_eval.score(mine, theirs, profile="vcc2026", targets=TARGETS)
    table = challenge.table.set_index("condition")
    assert list(challenge.table)[:4] == ["condition", "category", "n_cells", "n_cells_predicted"]
    assert table["category"].to_dict() == {"G0": "single", "G1": "single", "G2": "single", "G0+G1": "combination of 2"}
    assert (table[["n_cells", "n_cells_predicted"]] == 32).all(axis=None)
    metrics = list(expected.scores[PREDICTION])
    pd.testing.assert_frame_equal(table[metrics], expected.scores[PREDICTION].loc[table.index], check_names=False)


def test_spellings_genes_and_order_are_nothing(challenge: ProtocolEvaluation, predicted: Any, observed: Any) -> None:
    other = predicted[::-1, ::-1].copy()
    other.obs["gene"] = other.obs.pop("perturbation").astype(str).replace({"G0+G1": "G1;G0"})
    extra = observed.__class__(
        sparse.hstack([other.X, np.ones((other.n_obs, 1))], format="csr").astype(np.float32),
        other.obs,
        pd.DataFrame(index=[*other.var_names, "more"]),
    )
    with pytest.warns(PerturbZooWarning, match="1 of 41 genes are not in the other file"):
        found = evaluate_by(extra, observed, "vcc2026", predicted_columns=Columns(condition_key="gene"))
    pd.testing.assert_frame_equal(found.table, challenge.table, rtol=1e-6, atol=1e-6)


def test_the_summary(challenge: ProtocolEvaluation) -> None:
    assert list(challenge.scores) == [PREDICTION, NO_CHANGE, PERTURBED_MEAN, cell_eval.DUPLICATE]
    summary = challenge.summary.set_index(["model", "category", "metric"]).sort_index()
    row = summary.loc[(PREDICTION, "all", "pds_cosine")]
    assert row["mean"] == pytest.approx(challenge.table["pds_cosine"].mean())
    assert row["n"] == 4
    # one number over all conditions has no interval
    row = summary.loc[(PREDICTION, "all", "expr_mse_unbiased_capped_norm")]
    ratio = challenge.table["expr_mse_unbiased_capped"].sum() / challenge.table["expr_distance_unbiased"].sum()
    assert row["mean"] == pytest.approx(ratio)
    assert np.isnan(row["low"])
    assert len(summary.loc[(RESCALED, "all")]) == 6
    for part in ("technical duplicate", "replicate", "combination of 2 (1 condition)", "between the mean response (0)"):
        assert part in challenge.text
    assert "expr_real_mass_ratio" not in challenge.text  # a by-product, no score
    assert "expr_real_mass_ratio" in challenge.table


def test_categories_of_a_training_screen(predicted: Any, observed: Any) -> None:
    training = observed[observed.obs["perturbation"].isin(["control", "G0", "G2"])].copy()
    found = evaluate_by(predicted, observed, "calibrated", training=training)
    expected = {"G0": "trained on", "G2": "trained on", "G1": "unseen_single", "G0+G1": "combo_seen1"}
    assert found.table.set_index("condition")["category"].to_dict() == expected


def test_contexts_are_scored_by_themselves(make_adata: Callable[..., Any]) -> None:
    screen = make_adata(conditions=CONDITIONS, cells_per_condition=32, n_controls=60, n_genes=40, contexts=("a", "b"))
    columns = Columns(covariates=["context"])
    both = evaluate_by(screen, screen, "calibrated", columns=columns, depth=200)
    assert both.table["context"].tolist() == ["a"] * 4 + ["b"] * 4
    one = screen[screen.obs["context"] == "b"].copy()
    alone = evaluate_by(one, one, "calibrated", depth=200)
    mine = both.table[both.table["context"] == "b"].drop(columns="context").reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone.table)
    assert sum(line.startswith("a: ") for line in both.said) == sum(line.startswith("b: ") for line in both.said) > 0


def test_a_thin_context_costs_itself_alone(make_adata: Callable[..., Any]) -> None:
    screen = make_adata(conditions=CONDITIONS, cells_per_condition=32, n_controls=60, n_genes=40, contexts=("a", "b"))
    label, level = screen.obs["perturbation"], screen.obs["context"]
    thin = screen[(level == "a") | label.isin(["control", "G0"])].copy()
    found = evaluate_by(thin, thin, "calibrated", columns=Columns(covariates=["context"]), depth=200)
    assert set(found.table["context"]) == {"a"}
    assert any(line.startswith("not scored: b: calibrated compares each condition with the others") for line in found.said)


def test_conditions_predicted_as_nothing_are_said(predicted: Any, observed: Any) -> None:
    empty = predicted.copy()
    empty.X = empty.X.multiply((empty.obs["perturbation"] != "G0").to_numpy()[:, None]).tocsr()
    with pytest.warns(PerturbZooWarning, match="G0: predicted as 0 in every gene"):
        evaluate_by(empty, observed, "calibrated")


def test_values_of_either_kind(predicted: Any, observed: Any) -> None:
    """log1p values, and counts beside them once it is said to how many counts they were normalised."""
    dense = observed.X.toarray()
    logged = observed.copy()
    logged.X = sparse.csr_matrix(np.log1p(dense / dense.sum(axis=1, keepdims=True) * 200).astype(np.float32))
    dense = predicted.X.toarray()
    mine = predicted.copy()
    mine.X = sparse.csr_matrix(np.log1p(dense / dense.sum(axis=1, keepdims=True) * 200).astype(np.float32))
    both = evaluate_by(mine, logged, "full")
    mixed = evaluate_by(predicted, logged, "full", depth=200)
    for metric in ("expr_mae", "delta_pearson", "pds_l2", "de_wilcoxon_lfc_spearman"):
        np.testing.assert_allclose(mixed.table[metric], both.table[metric], atol=1e-5, err_msg=metric)
    assert any("lognorm" in line for line in both.said)
    with pytest.raises(PerturbZooError, match="predicted: vcc2026 scores raw counts, and these are log1p values: give counts"):
        evaluate_by(mine, logged, "vcc2026")
    assert (evaluate_by(mine, logged, "calibrated").table["pearson"] > 0.9).all()


def test_own_controls(predicted: Any, observed: Any) -> None:
    with pytest.raises(PerturbZooError, match="reference 'own' needs predicted control cells"):
        evaluate_by(predicted, observed, "full", reference="own")
    for protocol in ("vcc2026", "calibrated"):
        with pytest.raises(PerturbZooError, match=f"{protocol} takes changes from the observed controls"):
            evaluate_by(predicted, observed, protocol, reference="own")  # type: ignore[arg-type]
    whole, _ = _with_controls(predicted, observed)
    whole.obs["perturbation"] = whole.obs.pop("condition")
    own, shared = (evaluate_by(whole, observed, "full", reference=kind) for kind in ("own", "shared"))  # type: ignore[arg-type]
    # they are the same cells
    np.testing.assert_allclose(own.table["delta_pearson"], shared.table["delta_pearson"], atol=1e-9)
    moved = whole.copy()
    control = (moved.obs["perturbation"] == "control").to_numpy()
    values = moved.X.toarray()
    values[control, :10] += 3
    moved.X = sparse.csr_matrix(values)
    own, still = (evaluate_by(moved, observed, "full", reference=kind) for kind in ("own", "shared"))  # type: ignore[arg-type]
    np.testing.assert_allclose(still.table["delta_pearson"], shared.table["delta_pearson"], atol=1e-9)
    assert (own.table["delta_pearson"] < shared.table["delta_pearson"] - 0.05).all()


def test_which_metrics_can_tell(predicted: Any, observed: Any) -> None:
    found = evaluate_by(predicted, observed, "calibrated", depth=200)
    for name, table in scperteval.score(*map(_logs, _with_controls(predicted, observed))).calibration.items():
        rows = found.summary[(found.summary["model"] == name.upper()) & (found.summary["category"] == "all")]
        means = rows.set_index("metric")["mean"]
        for metric in ("mse", "pearson_ctrl", "nir"):
            assert means[metric] == pytest.approx(table[metric].mean(), abs=1e-5), metric
    line = next(line for line in found.text.splitlines() if line.startswith("mse ↓"))
    assert f"{found.table['mse'].mean():.3f}" in line
    assert line.count("[") == 3
    assert "not scored, fewer than 40 observed cells" not in " ".join(found.said)
    with pytest.raises(PerturbZooError, match="no predicted condition has 40 observed cells \\(the largest has 32\\)"):
        evaluate_by(predicted, observed, "calibrated", min_cells=40)


def _logs(adata: Any) -> Any:
    logged = adata.copy()
    dense = adata.X.toarray()
    logged.X = sparse.csr_matrix(np.log1p(dense / dense.sum(axis=1, keepdims=True) * 200).astype(np.float32))
    return logged
