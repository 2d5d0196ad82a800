"""``perturbzoo evaluate``: the table it writes, and what it says of files that do not go together."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from perturbzoo.cli import main
from perturbzoo.evaluate import evaluate
from perturbzoo.evaluation.table import FILE_METRICS, PRINTED


@pytest.fixture(scope="module")
def adata(make_adata: Callable[..., Any]) -> Any:
    return make_adata(cells_per_condition=8, n_controls=16)


@pytest.fixture(scope="module")
def observed(adata: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("observed") / "observed.h5ad"
    adata.write_h5ad(path)
    return path


def _run(predicted: Any, observed: Path, folder: Path, *options: str) -> pd.DataFrame:
    predicted.write_h5ad(folder / "predicted.h5ad")
    output = folder / "metrics.csv"
    files = ["--predicted", str(folder / "predicted.h5ad"), "--observed", str(observed), "--output", str(output)]
    main(["evaluate", *files, *options])
    return pd.read_csv(output)


def _error(predicted: Any, observed: Path, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        _run(predicted, observed, folder, *options)
    assert stopped.value.code == 2
    assert not (folder / "metrics.csv").exists()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_round_trip(adata: Any, observed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predicted = adata[::2].copy()
    table = _run(predicted, observed, tmp_path, "--summary", str(tmp_path / "summary.csv"), "--seed", "3")
    out = capsys.readouterr().out
    assert list(table)[:2] == ["condition", "category"]
    assert set(FILE_METRICS) <= set(table)
    assert "reference 'shared': changes are from the observed control cells on both sides" in out
    floors = ("no change", "perturbed mean", "additive", "bilinear", "knn")
    ceilings = ("split-half ceiling", "technical duplicate", "interpolated duplicate")
    for row in ("prediction", *floors, *ceilings, "combination of 2", "→1"):
        assert row in out
    pd.testing.assert_frame_equal(table, evaluate(predicted, adata, seed=3).table)
    summary = pd.read_csv(tmp_path / "summary.csv")
    mine = summary[(summary["model"] == "prediction") & (summary["category"] == "all")].set_index("metric")["mean"]
    for name in FILE_METRICS:
        assert mine[name] == pytest.approx(table[name].mean(), nan_ok=True), name
    names = {"metrics.csv", "predicted.h5ad", "summary.csv"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_one_category_is_printed_once(adata: Any, observed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    singles = adata[~adata.obs["perturbation"].str.contains("+", regex=False)].copy()
    table = _run(singles, observed, tmp_path, "--max_cells", "0")
    assert set(table["category"]) == {"single"}
    assert "single (" not in capsys.readouterr().out


def test_our_own_predictions_need_no_option(trained: Path, screen: Path, tmp_path: Path) -> None:
    predicted = str(tmp_path / "predicted.h5ad")
    checkpoint = str(trained / "checkpoints/best.ckpt")
    main(
        ["predict", "--ckpt_path", checkpoint, "--controls", str(screen), "--conditions", "G0,G1+G2,G3", "--output", predicted]
    )
    files = ["--predicted", predicted, "--observed", str(screen), "--output", str(tmp_path / "m.csv")]
    main(["evaluate", *files, "--training", str(screen)])
    table = pd.read_csv(tmp_path / "m.csv")
    assert table["condition"].tolist() == ["G0", "G1+G2", "G3"]
    assert table["category"].eq("trained on").all()
    assert table[list(PRINTED)].drop(columns="de_lfc_spearman").notna().all(axis=None)
    assert table["gi_mag_error"].notna().tolist() == [False, True, False]


@pytest.mark.parametrize("protocol", ["vcc2026", "full", "calibrated"])
def test_protocols_of_other_packages(
    protocol: str, adata: Any, observed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--protocol", protocol, "--min_cells", "8", "--summary", str(tmp_path / "summary.csv")]
    table = _run(adata[adata.obs["perturbation"] != "control"].copy(), observed, tmp_path, *options)
    said = capsys.readouterr()
    assert list(table)[:2] == ["condition", "category"]
    assert len(table) == 8
    assert "reference 'shared': changes are from the observed control cells" in said.out
    assert said.err == ""  # the packages' own notes are kept off the screen
    metric = {"vcc2026": "pds_cosine", "full": "delta_pearson", "calibrated": "pearson_ctrl"}[protocol]
    np.testing.assert_allclose(table[metric], 1, atol=1e-6)
    summary = pd.read_csv(tmp_path / "summary.csv").set_index(["model", "category", "metric"])["mean"]
    assert summary["prediction", "all", metric] == pytest.approx(table[metric].mean())
    assert "perturbed mean" in said.out


PROTOCOL_ERRORS: dict[str, tuple[Callable[[Any], Any], list[str], str]] = {
    "option": (lambda a: a, ["--protocol", "full", "--pds", "cell_eval"], "--pds is of --protocol native, not of full"),
    "own": (lambda a: a, ["--protocol", "vcc2026", "--reference", "own"], "vcc2026 takes changes from the observed controls"),
    "log1p": (
        lambda a: _logged(a),
        ["--protocol", "vcc2026", "--depth", "100"],
        "predicted.h5ad: vcc2026 scores raw counts, and these are log1p values",
    ),
    "one": (
        lambda a: a[a.obs["perturbation"].isin(["G1", "control"])].copy(),
        ["--protocol", "full"],
        "full ranks conditions against each other and there is one alone \\(G1\\)",
    ),
    "few": (lambda a: a, ["--protocol", "calibrated"], "no predicted condition has 30 observed cells \\(the largest has 8\\)"),
}


@pytest.mark.parametrize("case", PROTOCOL_ERRORS)
def test_one_line_for_what_a_protocol_cannot_score(
    case: str, adata: Any, observed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, options, expected = PROTOCOL_ERRORS[case]
    assert re.search(expected, _error(make(adata), observed, tmp_path, capsys, *options))


def _logged(adata: Any) -> Any:
    logged = adata.copy()
    dense = adata.X.toarray()
    logged.X = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 100).astype(np.float32)
    return logged


def _with(adata: Any, change: Callable[[np.ndarray, np.ndarray], None]) -> Any:
    changed = _logged(adata)
    change(changed.X, changed.obs["perturbation"].to_numpy())
    return changed


def _rename(adata: Any, **columns: Callable[[pd.Series], Any]) -> Any:
    changed = adata.copy()
    for name, function in columns.items():
        changed.obs[name] = function(changed.obs[name].astype(str))
    return changed


def _nan(values: np.ndarray, label: np.ndarray) -> None:
    values[np.flatnonzero(label == "G1")[:2], 4] = np.nan


def _changes(values: np.ndarray, label: np.ndarray) -> None:
    values[:] = 100 * (values - values.mean())


def _zero(values: np.ndarray, label: np.ndarray) -> None:
    values[:] = 0


ERRORS: dict[str, tuple[Callable[[Any], Any], list[str], str]] = {
    "genes": (
        lambda a: a.__class__(a.X, a.obs),
        [],
        "no gene is in all of the files: .*predicted.h5ad has 0, 1, 2 and 27 more",
    ),
    "conditions": (
        lambda a: _rename(a, perturbation=lambda s: s.where(s == "control", "X" + s)),
        [],
        "no condition is in both files: .*predicted.h5ad has .*XG0.*; .*observed.h5ad has G0, G0\\+G1",
    ),
    "scale": (
        _logged,
        [],
        "observed.h5ad holds counts and .*predicted.h5ad log1p values: give both in one space, or say with depth",
    ),
    "own controls": (
        lambda a: a[a.obs["perturbation"] != "control"].copy(),
        ["--reference", "own"],
        "predicted.h5ad: reference 'own' needs predicted control cells",
    ),
    "only controls": (
        lambda a: a[a.obs["perturbation"] == "control"].copy(),
        [],
        "predicted.h5ad: only control cells: nothing was predicted",
    ),
    "nan": (
        lambda a: _with(a, _nan),
        ["--depth", "100"],
        "predicted.h5ad: NaN or infinite values in 2 cells of G1: give finite",
    ),
    "nothing": (
        lambda a: _with(a, _zero),
        ["--depth", "100"],
        "predicted.h5ad: every predicted value is 0: nothing was predicted",
    ),
    "changes": (
        lambda a: _with(a, _changes),
        ["--depth", "100"],
        "neither counts nor log1p-normalised expression; changes must",
    ),
    "min cells": (
        lambda a: a,
        ["--min_cells", "9"],
        "no predicted condition has 9 observed cells \\(the largest has 8\\): lower min_cells",
    ),
    "column": (lambda a: a, ["--condition_key", "pertubation"], "no column 'pertubation' .* did you mean 'perturbation'"),
    "context": (lambda a: a, ["--match_on", "batch"], "has no column 'batch'"),
    "folder": (
        lambda a: a,
        ["--summary", "nowhere/s.csv"],
        "--summary nowhere/s.csv: there is no folder nowhere; make it first",
    ),
    "ending": (lambda a: a, ["--summary", "s.txt"], "--summary s.txt: the name must end in .csv, .csv.gz or .parquet"),
    "depth": (lambda a: a, ["--depth", "-1"], "--depth is -1.0: give a positive number"),
    "cells": (lambda a: a, ["--max_cells", "-1"], "--max_cells is -1: give 0 or more"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_one_line_for_a_mistake(
    case: str, adata: Any, observed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, options, expected = ERRORS[case]
    assert re.search(expected, _error(make(adata), observed, tmp_path, capsys, *options))


def test_controls_missing_from_one_file_or_both(
    adata: Any, observed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = adata[adata.obs["perturbation"] != "control"].copy()
    table = _run(bare, observed, tmp_path)
    said = capsys.readouterr()
    assert "changes are from the observed control cells on both sides" in said.out
    assert said.err == ""
    bare.write_h5ad(tmp_path / "bare.h5ad")
    _run(adata, tmp_path / "bare.h5ad", tmp_path)
    said = capsys.readouterr()
    assert "bare.h5ad: no control cells: those of" in said.err
    assert "changes are from the predicted control cells on both sides" in said.out
    (tmp_path / "metrics.csv").unlink()
    error = _error(bare, tmp_path / "bare.h5ad", tmp_path, capsys)
    assert (
        "bare.h5ad: no control cells in obs['perturbation']: name their label with control_labels (it holds G0, G0+G1" in error
    )
    assert len(table) == 8


def _half_zero(values: np.ndarray, label: np.ndarray) -> None:
    values[label == "G1"] = 0


def _one_profile(values: np.ndarray, label: np.ndarray) -> None:
    values[label != "control"] = values[label == "G1"].mean(axis=0)


def _no_change(values: np.ndarray, label: np.ndarray) -> None:
    values[label == "G2"] = values[label == "control"].mean(axis=0) + 0.5


WARNINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "some genes": (
        lambda a: a[:, 3:].copy(),
        "observed.h5ad: 3 of 30 genes are not in the other file and are left out (G0, G1, G2)",
    ),
    "some conditions": (
        lambda a: a[~a.obs["perturbation"].isin(["G2", "G3"])].copy(),
        "not scored, observed but not in",
    ),
    "other conditions": (
        lambda a: _rename(a, perturbation=lambda s: s.replace({"G2": "X"})),
        "not scored, predicted but not in",
    ),
    "zeros": (lambda a: _with(a, _half_zero), "G1: predicted as 0 in every gene, and scored as such"),
    "one profile": (lambda a: _with(a, _one_profile), "one profile is predicted for all 8 conditions"),
    "constant": (lambda a: _with(a, _no_change), "G2: predicted without any difference between genes"),
    "controls": (
        lambda a: _with(a, lambda v, _: v.__iadd__(np.linspace(0, 1, 30))),
        "predicted control cells differ from the observed",
    ),
    "depth": (lambda a: _with(a, lambda v, _: v.__imul__(0.3)), "are both normalised to one depth?"),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_one_line_for_what_is_odd(
    case: str, adata: Any, observed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = WARNINGS[case]
    predicted = make(adata)
    if predicted.X.dtype == np.float32 and not hasattr(predicted.X, "tocsr"):
        observed = tmp_path / "logged.h5ad"
        _logged(adata).write_h5ad(observed)
    table = _run(predicted, observed, tmp_path, "--max_cells", "0")
    lines = [line for line in capsys.readouterr().err.splitlines() if expected in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: ")
    if case == "constant":
        flagged = table.set_index("condition").loc["G2"]
        assert flagged["pearson_delta_undefined"]
        assert flagged["pearson_delta"] == 0
    if case == "zeros":
        assert len(table) == 8


def test_one_condition_alone(adata: Any, observed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It cannot be told from others, nor predicted from others: those columns are empty, those rows are not there."""
    table = _run(adata[adata.obs["perturbation"].isin(["control", "G1"])].copy(), observed, tmp_path).set_index("condition")
    assert "knn: each condition from others" in capsys.readouterr().out  # the other conditions were observed
    one = adata[adata.obs["perturbation"].isin(["control", "G1"])].copy()
    one.write_h5ad(tmp_path / "one.h5ad")
    table = _run(one, tmp_path / "one.h5ad", tmp_path).set_index("condition")
    out = capsys.readouterr().out
    assert "additive, bilinear, knn: left out, one condition has no others" in out
    for row in ("no change", "split-half ceiling", "technical duplicate"):
        assert f"  {row} " in out
    assert "interpolated duplicate" not in out
    assert "  perturbed mean " not in out, "it would be the condition itself"
    assert table.loc["G1", "mse"] == pytest.approx(0, abs=1e-12)
    assert np.isnan(table.loc["G1", "pearson_delta_perturbed_reference"])
    assert table.loc["G1", ["pds_l1", "pds_cosine", "centroid_accuracy", "weighted_mse", "variance_recovery"]].isna().all()


def test_nan_in_what_was_measured(adata: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = _with(adata, _nan)
    measured.write_h5ad(tmp_path / "observed.h5ad")
    error = _error(_logged(adata), tmp_path / "observed.h5ad", tmp_path, capsys)
    assert "observed.h5ad: NaN or infinite values in 2 cells of G1: give finite" in error


def test_conditions_of_one_cell_are_left_out(
    adata: Any, observed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = adata.obs["perturbation"].to_numpy()
    keep = np.ones(len(label), dtype=bool)
    keep[np.flatnonzero(label == "G4")[1:]] = False
    adata[keep].copy().write_h5ad(tmp_path / "observed.h5ad")
    table = _run(adata, tmp_path / "observed.h5ad", tmp_path)
    assert "not scored, fewer than 2 observed cells: G4" in capsys.readouterr().err
    assert "G4" not in set(table["condition"])
    table = _run(adata, tmp_path / "observed.h5ad", tmp_path, "--min_cells", "1").set_index("condition")
    assert np.isfinite(table.loc["G4", "mse"])
    assert np.isnan(table.loc["G4", "e_distance"])
