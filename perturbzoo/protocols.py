"""Scoring a file of predictions by the packages that own a protocol: ``perturbzoo evaluate --protocol vcc2026|full|calibrated``.

Reads and checks two files as :mod:`perturbzoo.evaluate` does, hands their cells to :mod:`perturbzoo.evaluation.cell_eval` or
:mod:`perturbzoo.evaluation.scperteval`, and puts what comes back into the same form of table and summary. Unlike there, the cells
of one context are held in memory, on both sides: the packages need them all.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo.data.screen import Columns
from perturbzoo.data.split_methods import category_of
from perturbzoo.data.two_files import CONTROL, Key, Side, common_rows, control_side, read_sides
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened
from perturbzoo.evaluation.native import NO_CHANGE, PERTURBED_MEAN, PREDICTION
from perturbzoo.evaluation.summary import ALL, format_table, summarise
from perturbzoo.perturbation import parse_condition

if TYPE_CHECKING:
    from anndata import AnnData

Protocol = Literal["vcc2026", "full", "calibrated"]

_OVERALL = ("split-half ceiling", "replicate")  # ceilings that are one number over all conditions
RESCALED = "prediction, rescaled"
"""Model name, in the summary, of the scores of ``vcc2026`` between the mean response (0) and a replicate (1)."""


@dataclass
class ProtocolEvaluation:
    """What came out.

    Attributes
    ----------
    scores
        Tables of one row for each condition (and context), by who predicts: the prediction first, then floors and ceilings.
    summary
        Means over conditions with bootstrap intervals, as :func:`perturbzoo.evaluation.summary.summarise`. Metrics that are one number
        over all conditions have no interval. Further models are ``prediction, rescaled`` (`vcc2026`), ``DRF`` and ``BDS``
        (`calibrated`).
    metrics
        The metrics that are printed, and whether higher is better.
    said
        Lines on what was understood, and which reference is used.
    """

    scores: dict[str, pd.DataFrame]
    summary: pd.DataFrame
    metrics: dict[str, bool]
    said: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list, repr=False)

    @property
    def table(self) -> pd.DataFrame:
        """The prediction's own table: condition, category, context where there are several, metrics."""
        frame = self.scores[PREDICTION]
        return frame if frame["context"].any() else frame.drop(columns="context")

    @property
    def text(self) -> str:
        """The summary as it is printed."""
        return "\n\n".join(self.printed)


def evaluate_by(
    predicted: AnnData | str | os.PathLike[str],
    observed: AnnData | str | os.PathLike[str],
    protocol: Protocol,
    *,
    training: AnnData | str | os.PathLike[str] | None = None,
    reference: Literal["shared", "own"] = "shared",
    columns: Columns | None = None,
    predicted_columns: Columns | None = None,
    depth: float | None = None,
    min_cells: int | None = None,
    seed: int = 0,
) -> ProtocolEvaluation:
    """Score predicted against measured cells by cell-eval2 (`vcc2026`, `full`) or scperteval (`calibrated`).

    Parameters
    ----------
    predicted, observed, training, columns, predicted_columns, depth
        As in :func:`perturbzoo.evaluate.evaluate`; here `training` gives the categories alone. `vcc2026` needs counts on both sides,
        `full` takes counts or log1p values, `calibrated` compares log1p values.
    protocol
        Whose metrics.
    reference
        ``"own"``: changes are from each side's own controls; of `full` alone.
    min_cells
        Conditions with fewer observed cells are left out; by default 2, and 30 for `calibrated`.
    seed
        Of halves and of sampled cells.

    Raises
    ------
    PerturbZooError
        What the files lack for the protocol, and all that :func:`perturbzoo.evaluate.evaluate` refuses.
    """
    from perturbzoo.evaluation.scperteval import MIN_CELLS

    if reference == "own" and protocol != "full":
        raise PerturbZooError(f"{protocol} takes changes from the observed controls: reference 'own' is of native and full")
    if min_cells is None:
        min_cells = MIN_CELLS if protocol == "calibrated" else 2
    columns = columns or Columns()
    sides, said = read_sides(predicted, observed, training, columns, predicted_columns or columns, depth)
    mine, theirs = sides["predicted"], sides["observed"]
    counts = mine.scaled.scale is not None and theirs.scaled.scale is not None
    if protocol == "vcc2026" and not counts:
        logged = next(side.file.where for side in (mine, theirs) if side.scaled.scale is None)
        raise PerturbZooError(f"{logged}: vcc2026 scores raw counts, and these are log1p values: give counts, or use full")
    rows = common_rows(mine, theirs, min_cells)
    contexts = sorted({context for _, context in rows})
    controls = control_side(mine, theirs, contexts, reference)
    category = _categories(rows, mine, sides.get("training"))
    whose = "each side's own" if reference == "own" else "the predicted" if controls is mine else "the observed"
    said.append(f"reference '{reference}': changes are from {whose} control cells")
    scaled = protocol == "calibrated" or not counts
    scores: dict[str, list[pd.DataFrame]] = {}
    extra: list[pd.DataFrame] = []
    metrics: dict[str, bool] = {}
    refused: list[str] = []
    for context in contexts:
        names = [name for name, levels in rows if levels == context]
        keys = [(name, context) for name in names]
        control = (CONTROL, context)
        observed_cells = _cells([(theirs, keys), (controls, [control])], scaled)
        predicted_cells = _cells([(mine, keys), (mine if reference == "own" else controls, [control])], scaled)
        labels = pd.DataFrame(
            {
                "condition": names,
                "category": [category[name] for name in names],
                "context": "|".join(context),
                "n_cells": [theirs.cells_of(key) for key in keys],
                "n_cells_predicted": [mine.cells_of(key) for key in keys],
            }
        )
        where = f"{labels['context'][0]}: " if len(contexts) > 1 else ""
        _say_if_empty(predicted_cells, names, f"{where}{mine.file.where}")
        try:
            if protocol == "calibrated":
                tables, more, metrics, lines = _calibrated(predicted_cells, observed_cells, seed, min_cells)
            else:
                targets = {str(one): one.targets for one in mine.file.conditions if str(one) in set(names)}
                tables, more, metrics, lines = _cell_eval(
                    predicted_cells, observed_cells, protocol, targets, counts, reference == "own", seed
                )
        except PerturbZooError as error:
            # one thin context must not cost the others
            refused.append(f"{where}{error}")
            continue
        said += [f"{where}{line}" for line in lines]
        for who, table in tables.items():
            kept = labels[labels["condition"].isin(table.index)]
            scores.setdefault(who, []).append(kept.join(table, on="condition"))
        extra.append(more)
    if not scores:
        raise PerturbZooError(refused[0])
    said += [f"not scored: {reason}" for reason in refused]
    frames = {who: pd.concat(parts, ignore_index=True) for who, parts in scores.items()}
    return _summed_up(frames, extra, metrics, protocol, said)


def _say_if_empty(predicted: AnnData, names: Sequence[str], where: str) -> None:
    """Warn of conditions that are predicted as nothing; they are scored as such."""
    label = predicted.obs["condition"].astype(str).to_numpy()
    filled = np.asarray(abs(predicted.X).sum(axis=1)).ravel() > 0
    empty = sorted(set(names) - set(label[filled]))
    if empty:
        message = f"{where}: {shortened(empty)}: predicted as 0 in every gene, and scored as such"
        warnings.warn(message, PerturbZooWarning, stacklevel=3)


# ---------------------------------------------------------------------- the packages

_Answer = tuple[dict[str, pd.DataFrame], pd.DataFrame, dict[str, bool], list[str]]


def _cell_eval(
    predicted: AnnData,
    observed: AnnData,
    protocol: Literal["vcc2026", "full"],
    targets: Mapping[str, Sequence[str]],
    counts: bool,
    own_controls: bool,
    seed: int,
) -> _Answer:
    """Tables by who predicts, and what is over all conditions, as (model, metric, value)."""
    from perturbzoo.evaluation import cell_eval

    found = cell_eval.score(
        predicted,
        observed,
        profile=protocol,
        targets=targets,
        input_type="counts" if counts else "lognorm",
        own_controls=own_controls,
        seed=seed,
    )
    over = [(who, name, value) for who, total in found.totals.items() for name, value in total.items()]
    if found.rescaled is not None:
        over += [(RESCALED, row.metric, row.score) for row in found.rescaled.itertuples()]
        over += [(cell_eval.REPLICATE, row.metric, row.replicate) for row in found.rescaled.itertuples()]
    more = pd.DataFrame(over, columns=["model", "metric", "value"])
    return found.scores, more, cell_eval.directions(protocol), found.said


def _calibrated(predicted: AnnData, observed: AnnData, seed: int, min_cells: int) -> _Answer:
    """Tables by who predicts, and the calibration by condition, as (model, condition, metric, value)."""
    from perturbzoo.evaluation import scperteval

    found = scperteval.score(predicted, observed, seed=seed, min_cells=min_cells)
    parts = [
        table.rename_axis("condition").reset_index().melt("condition", var_name="metric").assign(model=name.upper())
        for name, table in found.calibration.items()
    ]
    return found.scores, pd.concat(parts, ignore_index=True), found.higher, found.said


# ---------------------------------------------------------------------- cells and labels


def _cells(groups: Sequence[tuple[Side, list[Key]]], scaled: bool) -> AnnData:
    """The cells of some (condition, context) pairs of one file or two: raw values, or log1p-normalised to the common depth."""
    import anndata

    values, labels = [], []
    for side, keys in groups:
        wanted = {key: key[0] for key in keys}
        name_of = np.array([wanted.get(key, "") for key in side.keys], dtype=object)
        name = np.where(side.code >= 0, name_of[side.code], "")
        for start, block in side.file.blocks():
            used = np.flatnonzero(name[start : start + block.shape[0]] != "")
            if not len(used):
                continue
            part = sparse.csr_matrix(block[used], dtype=np.float32)
            if scaled and side.scaled.scale is not None:
                factor = np.repeat(side.scaled.scale[start + used], np.diff(part.indptr))
                part.data = np.log1p(part.data * factor).astype(np.float32)
            values.append(part)
            labels.append(name[start + used])
    obs = pd.DataFrame({"condition": np.concatenate(labels).astype(str)})
    obs.index = obs.index.astype(str)
    return anndata.AnnData(sparse.vstack(values, format="csr"), obs, pd.DataFrame(index=groups[0][0].file.genes))


def _categories(rows: Sequence[Key], predicted: Side, training: Side | None) -> dict[str, str]:
    """How many targets a condition has; with a training screen, how many of them it had seen."""
    trained = set() if training is None else {name for name, _ in training.keys if name != CONTROL}
    known = {target for name in trained for target in parse_condition(name).targets}
    found = {}
    for condition in predicted.file.conditions:
        targets = set(condition.targets)
        if training is None:
            found[str(condition)] = "single" if len(targets) == 1 else f"combination of {len(targets)}"
        elif str(condition) in trained:
            found[str(condition)] = "trained on"
        else:
            found[str(condition)] = category_of(len(targets & known), len(targets))
    return {name: found[name] for name, _ in rows}


# ---------------------------------------------------------------------- the summary


def _summed_up(
    frames: dict[str, pd.DataFrame], extra: list[pd.DataFrame], metrics: dict[str, bool], protocol: Protocol, said: list[str]
) -> ProtocolEvaluation:
    known = {name: metrics.get(name) for frame in frames.values() for name in frame.columns[5:]}
    summary = summarise(frames, metrics=known)
    more = pd.concat(extra, ignore_index=True)
    if protocol == "calibrated":
        labels = frames[PREDICTION][["condition", "category"]].drop_duplicates("condition")
        calibration = {}
        for name, rows in more.groupby("model", sort=False):
            # several contexts: each condition counts once
            wide = rows.pivot_table(index="condition", columns="metric", values="value", sort=False, dropna=False).reset_index()
            calibration[str(name)] = labels.merge(wide, on="condition").assign(context="")
        over = summarise(calibration, metrics=dict.fromkeys(metrics, True))
    else:
        over = more.groupby(["model", "metric"], sort=False)["value"].mean().rename("mean").reset_index()
        n = frames[PREDICTION]["condition"].nunique()
        over = over.assign(category=ALL, n=np.where(over["mean"].isna(), 0, n), low=np.nan, high=np.nan)[list(summary.columns)]
    summary = pd.concat([summary, over], ignore_index=True)
    if protocol == "calibrated":
        return ProtocolEvaluation(frames, summary, metrics, said, [_calibration_text(summary, metrics)])
    shown = summary[summary["metric"].isin(metrics) & summary["model"].isin([*frames, *_OVERALL])]
    if shown["category"].nunique() == 2 or protocol == "full":
        shown = shown[shown["category"] == ALL]  # the one category says the same again; too many metrics for several
    order = {name: position for position, name in enumerate(metrics)}
    shown = shown.sort_values("metric", key=lambda names: names.map(order), kind="stable")
    shown = shown.sort_values("model", key=lambda names: names.map(_position), kind="stable")
    printed = [format_table(shown, metrics=metrics)]
    if (summary["model"] == RESCALED).any():
        printed.append(_rescaled_text(summary))
    return ProtocolEvaluation(frames, summary, metrics, said, printed)


def _position(model: str) -> int:
    first = (PREDICTION, NO_CHANGE, PERTURBED_MEAN, "technical duplicate", *_OVERALL)
    return first.index(model)


def _rescaled_text(summary: pd.DataFrame) -> str:
    """The prediction between the mean response and a replicate, metric by metric, and their mean."""
    rows = summary[(summary["model"] == RESCALED) & (summary["category"] == ALL)].set_index("metric")["mean"]
    lines = ["between the mean response (0) and a replicate of the experiment (1):"]
    lines += [f"  {name:<44}{value:>8.3f}" if np.isfinite(value) else f"  {name:<44}{'-':>8}" for name, value in rows.items()]
    if rows.notna().all():
        lines.append(f"  {'mean of all':<44}{rows.mean():>8.3f}")
    else:
        lines.append(f"  {'mean of those that are defined':<44}{rows.mean():>8.3f}")
    return "\n".join(lines)


_MARKS = {
    NO_CHANGE: "n",
    PERTURBED_MEAN: "m",
    "perturbed cells": "p",
    "interpolated duplicate": "i",
    "technical duplicate": "t",
}


def _calibration_text(summary: pd.DataFrame, metrics: Mapping[str, bool]) -> str:
    """One line for each metric, those first that can best tell a repeat of the experiment from a prediction without knowledge."""
    found = summary[summary["category"] == ALL].set_index(["model", "metric"])
    lines = [
        "over all conditions; [low, high]: bootstrap interval over conditions; ↑ higher is better, ↓ lower is better",
        "DRF: how far a repeat is on the way from no knowledge (0) to perfect (1); BDS: share of conditions where it is better",
        "",
        f"{'':<31}{'prediction':>24}{'no knowledge':>14}{'repeat':>11}{'DRF':>20}{'BDS':>20}",
    ]
    blind = False
    for metric in found.loc["DRF"]["mean"].sort_values(ascending=False, kind="stable").index:
        mine, drf, bds = (found.loc[(model, metric)] for model in (PREDICTION, "DRF", "BDS"))
        line = f"{metric + (' ↑' if metrics[metric] else ' ↓'):<31}"
        line += (
            f"{_number(mine['mean'])} [{_number(mine['low'])}, {_number(mine['high'])}]".rjust(24)
            if mine["n"]
            else "-".rjust(24)
        )
        for models, width in ((list(_MARKS)[:3], 14), (list(_MARKS)[3:], 11)):
            cell = "-"
            for model in models:
                if (model, metric) in found.index and found.loc[(model, metric), "n"]:
                    cell = f"{_number(found.loc[(model, metric), 'mean'])} {_MARKS[model]}"
            line += cell.rjust(width)
        for row in (drf, bds):
            line += (f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if row["n"] else "-").rjust(20)
        cannot = not (drf["low"] > 0 and bds["low"] > 0.5)
        blind |= cannot
        lines.append(line + (" *" if cannot else ""))
    lines += ["", "; ".join(f"{mark}: {model}" for model, mark in _MARKS.items())]
    if blind:
        lines.append("*: on these data the metric cannot tell a repeat from no knowledge, nor then one model from another")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"
