"""What ``test`` prints: the model beside every baseline and the ceilings, on the same cells; and the metrics of validation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from perturbzoo.data.batch import encode_conditions
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.graph import Graph
from perturbzoo.errors import PerturbZooWarning
from perturbzoo.evaluation import native
from perturbzoo.evaluation.comparison import Candidate, Comparison, by_context
from perturbzoo.evaluation.interaction_recovery import find_singles
from perturbzoo.evaluation.metrics import RESOLUTION, mse, mse_at, pearson_delta, perturbed_mean, target_mask
from perturbzoo.evaluation.native import CEILING as CEILING
from perturbzoo.evaluation.pseudobulk import GroupMoments, Pseudobulks, assign_halves, de_sets
from perturbzoo.evaluation.retrieval import discrimination_score
from perturbzoo.evaluation.summary import summarise
from perturbzoo.models import BASELINES, find_model
from perturbzoo.models.run_folder import write_run_folder

if TYPE_CHECKING:
    from perturbzoo.models.base import PerturbationModel

ON_EMBEDDINGS = ("Bilinear", "Ridge", "KNN")  # the baselines that take an embedding


def report_test(model: PerturbationModel, bulks: Pseudobulks, data: PerturbSeqDataModule) -> pd.DataFrame:
    """Score the model, all baselines and the ceilings; print the table and write it below ``default_root_dir/test``.

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
    own = Candidate(bulks.predicted, moves_controls=model.changes_cells_alike)
    baselines = {
        label: Candidate(found.predicted, moves_controls=True)
        for label, found in baseline_predictions(data, bulks, model).items()
    }
    scores = score_predictions(data, bulks, {type(model).__name__: own, **baselines})
    summary = summarise(scores)
    if model.trainer.is_global_zero:
        changes = {label: floor.mean - bulks.control for label, floor in baselines.items()}
        write_run_folder(model, data, bulks, changes, scores, summary)
        _log(model, summary)
    return summary


def score_predictions(
    data: PerturbSeqDataModule, bulks: Pseudobulks, predictions: Mapping[str, Candidate]
) -> dict[str, pd.DataFrame]:
    """Score predictions of a data module's pairs, and the ceilings, by the native protocol.

    Parameters
    ----------
    data
        Where the cells are.
    bulks
        What was observed of P pairs.
    predictions
        What is predicted of them, by name.

    Returns
    -------
    As :func:`perturbzoo.evaluation.native.score`; without the metrics of cells, since models are asked for pseudobulks here.
    """
    described = pd.DataFrame(data.describe_pairs(bulks.pair))
    conditions = [data.conditions[pair] for pair in bulks.pair]
    targets = [condition.targets for condition in conditions]
    training = data.training_pseudobulks()
    tested = find_singles(conditions, bulks.context, conditions, bulks.context, bulks.observed)
    comparison = Comparison(
        conditions=described["condition"].tolist(),
        contexts=described["context"].tolist(),
        categories=described["category"].tolist(),
        context=bulks.context,
        targets=target_mask(targets, data_genes(data)),
        is_combination=np.array([len(names) > 1 for names in targets]),
        observed=GroupMoments(bulks.count, bulks.observed, bulks.observed_variance),
        control=control_moments(data),
        reference=perturbed_reference(data),
        candidates=dict(predictions),
        halves=_halves(data, bulks),
        singles=find_singles(conditions, bulks.context, training.conditions, training.contexts, training.mean) | tested,
    )
    return native.score(comparison)


def validation_scores(data: PerturbSeqDataModule, bulks: Pseudobulks) -> dict[str, float]:
    """Means over the validation pairs of the main metrics: all cost less than a batch. Where pairs have no others, no retrieval.

    The DE genes are those of the validation cells, for this score alone.
    """
    reference = perturbed_reference(data)[bulks.context]
    targets = target_mask([data.conditions[pair].targets for pair in bulks.pair], data_genes(data))
    genes = de_sets(bulks, control_moments(data), targets).genes
    changes = bulks.predicted - bulks.control, bulks.observed - bulks.control
    scores = {
        "pearson_delta": pearson_delta(bulks.predicted, bulks.observed, bulks.control),
        "pearson_delta_perturbed_reference": pearson_delta(bulks.predicted, bulks.observed, reference),
        "mse": mse(bulks.predicted, bulks.observed),
        "mse_top20_de": mse_at(bulks.predicted, bulks.observed, genes),
    }
    ranks = by_context(bulks.context, lambda p, o, skip: discrimination_score(p, o, "cosine", skip), *changes, targets)
    if np.isfinite(ranks).any():
        scores["pds_cosine"] = ranks[np.isfinite(ranks)]
    return {name: float(value.mean()) for name, value in scores.items()}


def perturbed_reference(data: PerturbSeqDataModule) -> np.ndarray:
    """Mean profile of the training perturbations of each context, ``(contexts, G)``: what is common to perturbed cells.

    The control mean where the file holds no training cells, as when a trained model meets another screen.
    """
    training = data.training_pseudobulks()
    if not len(training.mean):
        return data.control_mean
    return perturbed_mean(training.mean, training.contexts, data.control_mean)


def _log(model: PerturbationModel, summary: pd.DataFrame) -> None:
    """Hand the model's own numbers to the loggers."""
    own = summary[summary["model"] == type(model).__name__].dropna(subset="mean")
    rows = own[["category", "metric", "mean"]].to_numpy().tolist()
    values = {f"test/{category}/{metric}": float(mean) for category, metric, mean in rows}
    for logger in model.trainer.loggers:
        logger.log_metrics(values, step=model.trainer.global_step)


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
    count = np.array([len(rows) for rows in data.index.controls_by_context])
    return _moments(count, data.control_mean, data.control_variance)


def _halves(data: PerturbSeqDataModule, bulks: Pseudobulks) -> GroupMoments:
    """Moments of two random halves of each pair's cells: row ``2 * pair + half``."""
    cells = [data.index.cells_by_pair[pair] for pair in bulks.pair]
    halves = assign_halves(np.repeat(np.arange(len(cells)), [len(rows) for rows in cells]), seed=0)
    ends = np.cumsum([len(rows) for rows in cells])
    groups = [rows[chosen == half] for rows, chosen in zip(cells, np.split(halves, ends[:-1]), strict=True) for half in (0, 1)]
    return _moments(np.array([len(group) for group in groups]), *data.moments(groups))


def _moments(count: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> GroupMoments:
    """As sums over batches give them: what is left of a constant gene's variance is rounding."""
    return GroupMoments(count, mean, np.where(variance <= RESOLUTION * mean**2, 0.0, variance))
