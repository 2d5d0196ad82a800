"""scperteval's protocols: predicted and observed cells in, its metrics per condition out, and how far each metric can be trusted.

A metric is calibrated on the observed cells alone: the dynamic range fraction (DRF) says how far a repeat of the experiment is above a
prediction without knowledge, on the way to a perfect one; the bound discrimination score (BDS) says for how many conditions it is above
it at all. Called by :mod:`perturbzoo.protocols`; no files.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.evaluation.native import NO_CHANGE, PERTURBED_MEAN, PREDICTION

if TYPE_CHECKING:
    from anndata import AnnData

CONDITION = "condition"
"""The obs column of conditions."""
CONTROL = "control"
"""Its label of control cells."""
MIN_CELLS = 30
"""Cells that a condition needs, as the package has it: they are halved."""

ROWS = {
    "control_mean": NO_CHANGE,
    "control": NO_CHANGE,
    "all_perturbed_mean": PERTURBED_MEAN,
    "global_mean": PERTURBED_MEAN,
    "all_perturbed": "perturbed cells",
    "interpolated": "interpolated duplicate",
    "tech_dup": "technical duplicate",
}
"""Our name of each of the package's controls."""


_NO_GENES = "since a condition has no gene that responds (adjusted p below .05)"


@dataclass
class CalibratedScores:
    """What came out.

    Attributes
    ----------
    scores
        By who predicts: one row per condition, in the index, one column per metric. The prediction is compared with all cells of a
        condition; floors and ceilings with one half of them, and each stands where the package uses it (NaN elsewhere).
    calibration
        ``drf`` and ``bds`` by condition: a table each, one row per condition and one column per metric.
    higher
        Whether higher is better, by metric.
    said
        What the user should know, one line each.
    """

    scores: dict[str, pd.DataFrame]
    calibration: dict[str, pd.DataFrame]
    higher: dict[str, bool]
    said: list[str] = field(default_factory=list)


def score(predicted: AnnData, observed: AnnData, *, seed: int = 0, min_cells: int = MIN_CELLS) -> CalibratedScores:
    """Score the prediction with every protocol that can be run, and calibrate each.

    Parameters
    ----------
    predicted, observed
        log1p-normalised cells x the same genes, CSR; ``obs['condition']``, with ``control`` among the observed.
    seed
        Of the halves and of the sample of all perturbed cells.
    min_cells
        Conditions with fewer observed cells are left out.

    Raises
    ------
    PerturbZooError
        No control cells, fewer than two conditions with enough cells.
    """
    # its import sets how many threads the libraries of linear algebra start: not before it is asked for
    import scperteval
    from scperteval.calibrators import CALIBRATORS
    from scperteval.protocols.resolve import resolve_protocols

    label = observed.obs[CONDITION].astype(str)
    size = label.value_counts()
    if CONTROL not in size:
        raise PerturbZooError("no observed control cells: calibrated takes changes from them")
    names = sorted(name for name, cells in size.items() if name != CONTROL and cells >= max(4, min_cells))
    if len(names) < 2:
        raise PerturbZooError(
            f"calibrated compares each condition with the others and {len(names)} of {len(size) - 1} has {max(4, min_cells)} observed "
            "cells: lower min_cells, or use native"
        )
    said = []
    if len(names) < len(size) - 1:
        few = sorted(set(size.index) - {CONTROL, *names})
        said.append(f"not scored, fewer than {max(4, min_cells)} observed cells: {shortened(few)}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        protocols = resolve_protocols(["all"])
        if any("optional dependencies" in str(entry.message) for entry in caught):
            said.append("without sinkhorn_w2: it needs scperteval[sinkhorn]")
        counted = predicted.obs[CONDITION].astype(str).value_counts()
        single = [name for name in names if counted.get(name, 0) < 2]
        if single:
            left_out = [_snake(protocol.name) for protocol in protocols if protocol.representation != "centroid"]
            protocols = [protocol for protocol in protocols if protocol.representation == "centroid"]
            said.append(f"predicted as one cell: {shortened(single)}; left out, since they need cells: {shortened(left_out)}")
        handle = scperteval.prepare(
            observed,
            [protocol.name for protocol in protocols],
            seed=seed,
            min_cells=max(4, min_cells),
            perturbation_key=CONDITION,
            control_label=CONTROL,
        )
        found = CalibratedScores({}, {}, {}, said)
        columns: dict[str, dict[str, pd.Series]] = {PREDICTION: {}, **{row: {} for row in dict.fromkeys(ROWS.values())}}
        calibration: dict[str, dict[str, pd.Series]] = {"drf": {}, "bds": {}}
        refused = {}
        for protocol in protocols:
            metric = _snake(protocol.name)
            try:
                scored = scperteval.score(handle, protocol.name, predicted)
                calibrated = scperteval.calibrate(handle, protocol.name)
            except ValueError as error:  # a condition without any gene that responds, for the metrics of those alone
                refused[metric] = str(error).split(".", 1)[0] if "selected no genes" not in str(error) else _NO_GENES
                continue
            found.higher[metric] = protocol.better == "higher"
            columns[PREDICTION][metric] = _column(scored, "raw_prediction")
            calibration["drf"][metric] = _column(calibrated, "drf")
            raw = {role: _column(calibrated, f"raw_{role}") for role in ("positive", "negative")}
            for role, column in raw.items():
                source = str(calibrated.per_perturbation[role].iloc[0])
                columns[ROWS.get(source, source)][metric] = column
            # of the same values: asked for by itself, everything would be computed again
            bounds = zip(raw["positive"], raw["negative"], strict=True)
            wins = [CALIBRATORS["bds"].per_pert({"positive": top, "negative": floor}, protocol) for top, floor in bounds]
            calibration["bds"][metric] = pd.Series(wins, index=raw["positive"].index)
    for reason in dict.fromkeys(refused.values()):
        left_out = [metric for metric, why in refused.items() if why == reason]
        found.said.append(f"left out, {reason}: {shortened(left_out, 12)}")
    large = {message for message in (str(entry.message) for entry in caught) if "of the reference sample" in message}
    if large:
        found.said.append(
            f"{len(large)} conditions are each a large share of all cells: what is compared with the others has few cells left"
        )
    found.scores = {who: _table(parts, names, found.higher) for who, parts in columns.items() if parts}
    found.calibration = {name: _table(parts, names, found.higher) for name, parts in calibration.items()}
    return found


def _column(result: Any, column: str) -> pd.Series:
    frame = result.per_perturbation
    return frame.set_index(frame["perturbation"].astype(str))[column].astype(float)


def _table(parts: dict[str, pd.Series], names: Sequence[str], metrics: dict[str, bool]) -> pd.DataFrame:
    empty = pd.Series(np.nan, index=list(names))
    table = {metric: parts.get(metric, empty).reindex(list(names)) for metric in metrics}
    return pd.DataFrame(table, index=list(names))


def _snake(name: str) -> str:
    """``mse_top_k=50`` as the name of a column: ``mse_top_k_50``."""
    return re.sub(r"[=.]", "_", name)
