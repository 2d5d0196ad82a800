"""What ``test`` prints: the model beside every baseline and the split-half ceiling, on the same cells."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from perturbzoo.data.batch import encode_conditions
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.graph import Graph
from perturbzoo.errors import PerturbZooWarning
from perturbzoo.evaluation.calibration import calibration_curve, coverage, error_rank_correlation
from perturbzoo.evaluation.metrics import perturbed_mean, target_mask
from perturbzoo.evaluation.pseudobulk import GroupMoments, Pseudobulks, assign_halves, de_sets, split_half
from perturbzoo.evaluation.summary import format_table, summarise
from perturbzoo.evaluation.table import at_full_size, score_conditions
from perturbzoo.models import BASELINES, find_model

if TYPE_CHECKING:
    from perturbzoo.models.base import PerturbationModel

CEILING = "split-half ceiling"
ON_EMBEDDINGS = ("Bilinear", "Ridge", "KNN")  # the baselines that take an embedding


def report_test(model: PerturbationModel, bulks: Pseudobulks, data: PerturbSeqDataModule) -> pd.DataFrame:
    """Score the model, all baselines and the ceiling; print the table and write it below ``default_root_dir/test``.

    Parameters
    ----------
    model
        The model under test.
    bulks
        Its predicted pseudobulks beside those observed, of the test pairs.
    data
        Where the test cells, their controls and the training pseudobulks come from.

    Returns
    -------
    The summary: one row per model, split category and metric.
    """
    name = type(model).__name__
    predictions = {name: bulks, **baseline_predictions(data, bulks, model), CEILING: ceiling(data, bulks)}
    described = pd.DataFrame(data.describe_pairs(bulks.pair))
    targets = target_mask([data.conditions[pair].targets for pair in bulks.pair], data_genes(data))
    genes = de_sets(bulks, control_moments(data), targets)
    reference = perturbed_reference(data)[bulks.context]
    scores = {
        label: score_conditions(
            predicted,
            conditions=described["condition"].tolist(),
            contexts=described["context"].tolist(),
            categories=described["category"].tolist(),
            reference=reference,
            de=genes,
        )
        for label, predicted in predictions.items()
    }
    # the halves are half the size of what every other row is compared with
    scores[CEILING] = at_full_size(scores[CEILING])
    summary = summarise(scores)
    if model.trainer.is_global_zero:
        _publish(model, scores, summary)
        if bulks.predicted_variance is not None:
            _publish_uncertainty(model, bulks, described)
    return summary


def perturbed_reference(data: PerturbSeqDataModule) -> np.ndarray:
    """Mean profile of the training perturbations of each context, ``(contexts, G)``: what is common to perturbed cells.

    The control mean where the file holds no training cells, as when a trained model meets another screen.
    """
    training = data.training_pseudobulks()
    if not len(training.mean):
        return data.control_mean
    return perturbed_mean(training.mean, training.contexts, data.control_mean)


def _publish(model: PerturbationModel, scores: dict[str, pd.DataFrame], summary: pd.DataFrame) -> None:
    """Print, write and log the table."""
    name, trainer = type(model).__name__, model.trainer
    folder = Path(trainer.default_root_dir) / "test"
    folder.mkdir(parents=True, exist_ok=True)
    per_condition = pd.concat([table.assign(model=label) for label, table in scores.items()])
    for frame, file in ((per_condition, "conditions.csv"), (summary, "summary.csv")):
        temporary = folder / f"{file}.part"
        frame.to_csv(temporary, index=False)
        temporary.replace(folder / file)
    print(format_table(summary))
    print(f"\nper condition: {folder / 'conditions.csv'}\nsummary: {folder / 'summary.csv'}")
    own = summary[summary["model"] == name]
    rows = own[["category", "metric", "mean"]].to_numpy().tolist()
    values = {f"test/{category}/{metric}": float(mean) for category, metric, mean in rows}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def _publish_uncertainty(model: PerturbationModel, bulks: Pseudobulks, described: pd.DataFrame) -> None:
    """Print and write how far the model's intervals can be trusted."""
    assert bulks.predicted_variance is not None
    covered = described.assign(
        coverage_90=coverage(bulks),
        predicted_rmse=np.sqrt(bulks.predicted_variance.mean(axis=1)),
        rmse=np.sqrt(np.square(bulks.predicted - bulks.observed).mean(axis=1)),
    )
    by_category = ", ".join(f"{name} {share:.0%}" for name, share in covered.groupby("category")["coverage_90"].mean().items())
    folder = Path(model.trainer.default_root_dir) / "test"
    covered.to_csv(folder / "uncertainty.csv", index=False)
    calibration_curve(bulks).to_csv(folder / "calibration.csv", index=False)
    print(
        f"90 % intervals cover {covered['coverage_90'].mean():.0%} of the expressed genes' pseudobulks ({by_category}); "
        f"predicted and true error of the conditions: Spearman {error_rank_correlation(bulks):.2f}"
    )


def data_genes(data: PerturbSeqDataModule) -> tuple[str, ...]:
    """Names of the measured genes."""
    assert data.spec is not None
    return data.spec.genes


def baseline_predictions(data: PerturbSeqDataModule, bulks: Pseudobulks, model: PerturbationModel) -> dict[str, Pseudobulks]:
    """Each baseline fitted on the training pseudobulks, predicting the same pairs; none where the file holds no training cells.

    Those on embeddings come twice where the model knows more of its targets than the data say: as they are, and with what the
    model knows (:func:`shared_embedding`).
    """
    training = data.training_pseudobulks()
    spec = data.spec
    assert spec is not None
    trained = {
        (str(condition), int(context)) for condition, context in zip(training.conditions, training.contexts, strict=True)
    }
    if trained != set(spec.training_pairs):
        print("baselines are left out: these data do not hold the cells the model was trained on")
        return {}
    runs: list[tuple[str, str, dict[str, Any] | None]] = [(name, name, None) for name in BASELINES]
    if shared := shared_embedding(model):
        runs += [(f"{name} ({shared[0]})", name, shared[1]) for name in ON_EMBEDDINGS]
    conditions = [data.conditions[pair] for pair in bulks.pair]
    context = data.table.context[torch.from_numpy(bulks.pair)].tolist()
    control = torch.as_tensor(bulks.control, dtype=torch.float32)
    predictions = {}
    for label, name, prepared in runs:
        if name == type(model).__name__:
            continue
        baseline = find_model(name)()
        with warnings.catch_warnings():
            # what a baseline does not know is no news about the model
            warnings.simplefilter("ignore", PerturbZooWarning)
            baseline.fit_closed_form(spec, training, prepared)
        # targets that only this file names come last, where no baseline knows them
        names = list(dict.fromkeys([*baseline.target_names, *model.target_names]))
        table = encode_conditions(conditions, context, names, spec.default_kind)
        with torch.inference_mode():
            delta, _ = baseline.delta(table, control)
        predictions[label] = bulks.with_prediction(bulks.control + delta.double().numpy())
    return predictions


def shared_embedding(model: PerturbationModel) -> tuple[str, dict[str, Any]] | None:
    """What a model that was given an embedding, or else a graph between targets, knows of them, for baselines to use.

    Taken from the model itself, so that a test needs none of the files that it was trained with.

    Returns
    -------
    How to call it, and what :func:`perturbzoo.models.embedding.embed_targets` would return; None where the model was given
    neither, or nothing but the embedding that baselines have by default.
    """
    from perturbzoo.models.embedding import spectral_embedding

    prepared, extra = model.prepared, list(model.target_names[len(model.get_spec().targets) :])
    if "vectors" in prepared and "usable" in prepared:
        if type(model).__name__ in ON_EMBEDDINGS and model.hparams["embedding"] == "pca":
            return None
        return "same embedding", {"extra": extra, **{key: prepared[key] for key in ("vectors", "known", "usable")}}
    if "graph" not in prepared:
        return None
    graph = Graph.from_state(prepared["graph"])
    if len(graph.isolated) == len(graph):
        return None
    connected, coordinates = spectral_embedding(graph, dimension=20)
    rows = [model.target_names.index(name) for name in connected]
    vectors = torch.zeros(len(model.target_names), coordinates.shape[1])
    vectors[rows] = torch.from_numpy(coordinates).float()
    known = torch.zeros(len(vectors), dtype=torch.bool)
    known[rows] = True
    return "spectral of its graph", {"extra": extra, "vectors": vectors, "known": known, "usable": known}


def control_moments(data: PerturbSeqDataModule) -> GroupMoments:
    """Moments of the control cells of each context."""
    return _moments(data, data.index.controls_by_context)


def ceiling(data: PerturbSeqDataModule, bulks: Pseudobulks) -> Pseudobulks:
    """One random half of each pair's cells as the prediction of the other."""
    cells = [data.index.cells_by_pair[pair] for pair in bulks.pair]
    halves = assign_halves(np.repeat(np.arange(len(cells)), [len(rows) for rows in cells]), seed=0)
    ends = np.cumsum([len(rows) for rows in cells])
    groups = [rows[chosen == half] for rows, chosen in zip(cells, np.split(halves, ends[:-1]), strict=True) for half in (0, 1)]
    local = Pseudobulks(**{**vars(bulks), "pair": np.arange(len(cells))})
    return split_half(local, _moments(data, groups))


def _moments(data: PerturbSeqDataModule, groups: list[np.ndarray]) -> GroupMoments:
    mean, variance = data.moments(groups)
    return GroupMoments(count=np.array([len(group) for group in groups]), mean=mean, variance=variance)
