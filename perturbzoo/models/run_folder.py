"""The folder that ``perturbzoo test`` leaves: scores by condition, predicted and observed changes, what the data were.

Called by :mod:`perturbzoo.models.testing`; read by ``perturbzoo report`` and ``perturbzoo benchmark``. Every file is written under
another name first: it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import perturbzoo
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.evaluation.calibration import calibration_curve, coverage, error_rank_correlation
from perturbzoo.evaluation.metrics import Array
from perturbzoo.evaluation.pseudobulk import Pseudobulks
from perturbzoo.evaluation.summary import format_table
from perturbzoo.evaluation.table import PRINTED

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbzoo.models.base import PerturbationModel

FOLDER = "test"


def write_run_folder(
    model: PerturbationModel,
    data: PerturbSeqDataModule,
    bulks: Pseudobulks,
    floors: Mapping[str, Array],
    scores: Mapping[str, pd.DataFrame],
    summary: pd.DataFrame,
) -> None:
    """Write the files below ``default_root_dir/test`` and print the table.

    ``conditions.csv``
        One row per model, condition and context: metrics, flags.
    ``summary.csv``
        Means over conditions with intervals.
    ``deltas.h5ad``
        One row per condition and context: see :func:`deltas`.
    ``data.json``
        What the data are: see :func:`describe_data`.
    ``uncertainty.csv``, ``calibration.csv``
        How far a model's intervals can be trusted, if it has any.

    Parameters
    ----------
    model, data
        What was tested, on what.
    bulks
        Predicted and observed pseudobulks of P pairs.
    floors
        Changes that baselines predict, by name, ``(P, G)``.
    scores, summary
        The model's first, then floors, then ceilings.
    """
    folder = Path(model.trainer.default_root_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    described = pd.DataFrame(data.describe_pairs(bulks.pair))
    per_condition = pd.concat([table.assign(model=label) for label, table in scores.items()])
    for frame, file in ((per_condition, "conditions.csv"), (summary, "summary.csv")):
        _write_table(frame, folder / file)
    _whole(folder / "deltas.h5ad", deltas(data, bulks, floors, described).write_h5ad)
    text = json.dumps(describe_data(data, model), indent=1) + "\n"
    _whole(folder / "data.json", lambda path: path.write_text(text))
    print(format_table(summary[summary["metric"].isin(PRINTED)]))
    print(f"\nper condition, all metrics: {folder / 'conditions.csv'}\nsummary: {folder / 'summary.csv'}")
    if bulks.predicted_variance is not None:
        _write_uncertainty(folder, bulks, described)


def deltas(data: PerturbSeqDataModule, bulks: Pseudobulks, floors: Mapping[str, Array], described: pd.DataFrame) -> AnnData:
    """Changes from the control mean of the context, float32, log1p-normalised: one row per condition and context.

    ``X`` is observed; layers are ``predicted``, ``observed_error`` (standard error of the observed mean), ``control`` (its mean),
    ``predicted_error`` where the model gives one, and ``floor:NAME`` for each floor.
    """
    from anndata import AnnData

    assert data.spec is not None
    layers = {
        "predicted": bulks.predicted - bulks.control,
        "observed_error": np.sqrt(bulks.observed_variance / bulks.count[:, None]),
        "control": bulks.control,
        **{f"floor:{label}": change for label, change in floors.items()},
    }
    if bulks.predicted_variance is not None:
        layers["predicted_error"] = np.sqrt(bulks.predicted_variance)
    obs = described[["condition", "context", "category"]].assign(n_cells=bulks.count)
    obs.index = pd.Index([str(row) for row in range(len(obs))])
    return AnnData(
        X=(bulks.observed - bulks.control).astype(np.float32),
        obs=obs,
        var=pd.DataFrame(index=pd.Index(data.spec.genes)),
        layers={name: values.astype(np.float32) for name, values in layers.items()},
    )


def describe_data(data: PerturbSeqDataModule, model: PerturbationModel) -> dict[str, Any]:
    """What the scores rest on, as plain JSON: source, sizes, conditions of each part of the split, contexts, value space."""
    spec = data.spec
    assert spec is not None
    path = data.hparams["path"]
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path or [])
    parts = {part: len({str(data.conditions[pair]) for pair in data.pairs_of(part)}) for part in ("train", "val", "test")}
    return {
        "source": ", ".join(Path(os.fspath(one)).name for one in paths) or "AnnData in memory",
        "genes": spec.n_genes,
        "cells": int(data.expression.shape[0]),
        "controls": int(sum(len(rows) for rows in data.index.controls_by_context)),
        "conditions": parts,
        "contexts": [spec.context_label(number) for number in range(len(spec.contexts))],
        "value_space": spec.value_space,
        "depth": float(spec.depth),
        "split": data.split.summary(),
        "model": type(model).__name__,
        "version": perturbzoo.__version__,
    }


def _write_uncertainty(folder: Path, bulks: Pseudobulks, described: pd.DataFrame) -> None:
    """Print and write how far the model's intervals can be trusted."""
    assert bulks.predicted_variance is not None
    covered = described.assign(
        coverage_90=coverage(bulks),
        predicted_rmse=np.sqrt(bulks.predicted_variance.mean(axis=1)),
        rmse=np.sqrt(np.square(bulks.predicted - bulks.observed).mean(axis=1)),
    )
    by_category = ", ".join(f"{name} {share:.0%}" for name, share in covered.groupby("category")["coverage_90"].mean().items())
    _write_table(covered, folder / "uncertainty.csv")
    _write_table(calibration_curve(bulks), folder / "calibration.csv")
    print(
        f"90 % intervals cover {covered['coverage_90'].mean():.0%} of the expressed genes' pseudobulks ({by_category}); "
        f"predicted and true error of the conditions: Spearman {error_rank_correlation(bulks):.2f}"
    )


def _write_table(frame: pd.DataFrame, path: Path) -> None:
    _whole(path, lambda unfinished: frame.to_csv(unfinished, index=False))


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write the whole file or none."""
    unfinished = path.with_name(f".unfinished.{path.name}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
