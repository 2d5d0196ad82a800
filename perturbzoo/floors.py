"""Baselines of the zoo as floors for any tool's predictions: fitted on pseudobulks, asked for the conditions that are scored.

Called by :mod:`perturbzoo.evaluate`; ``perturbzoo test`` has the data module of a model to fit them on
(:mod:`perturbzoo.models.testing`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from perturbzoo.data.batch import encode_conditions
from perturbzoo.data.columns import DEFAULT_KIND
from perturbzoo.data.datamodule import TrainingPseudobulks
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooWarning
from perturbzoo.evaluation.metrics import Array
from perturbzoo.models.baselines import KNN, Additive, Baseline, Bilinear, TrainingMean
from perturbzoo.perturbation import Condition

BASELINES: dict[str, type[Baseline]] = {"additive": Additive, "bilinear": Bilinear, "knn": KNN}
"""The floors, as they are called, with the arguments that they have by default. Where a baseline knows nothing of a condition's
targets (additive: none was perturbed alone; bilinear, knn: not measured), it falls back on the mean of what it was fitted on."""

FOLDS = 10


def fitted(
    training: TrainingPseudobulks,
    genes: Sequence[str],
    conditions: Sequence[Condition],
    context: np.ndarray,
    baselines: Mapping[str, type[Baseline]] = BASELINES,
) -> dict[str, Array]:
    """What each baseline, fitted on a training screen, predicts of P conditions.

    Parameters
    ----------
    training
        Pseudobulks of the training conditions; the rows of `control_mean` are the contexts of all conditions, also of those that
        are asked for.
    genes
        Names of the G genes.
    conditions, context
        What is asked for, P each.
    baselines
        Classes by name.

    Returns
    -------
    By name, ``(P, G)`` pseudobulks, log1p-normalised.
    """
    order = sorted(range(len(training.conditions)), key=lambda row: (str(training.conditions[row]), training.contexts[row]))
    bulks = _rows(training, np.array(order, dtype=np.int64))
    named = [target for condition in (*bulks.conditions, *conditions) for target in condition.targets]
    spec = DataSpec(
        genes=tuple(genes),
        targets=tuple(sorted(set(named))),
        default_kind=DEFAULT_KIND,
        covariates={},
        match_on=(),
        contexts=tuple((str(number),) for number in range(len(bulks.control_mean))),
        control_mean=bulks.control_mean.astype(np.float32),
        value_space="log1p",
        depth=0.0,
        size_factor_key=None,
        split="",
        training_pairs=tuple(
            (str(condition), int(number)) for condition, number in zip(bulks.conditions, bulks.contexts, strict=True)
        ),
    )
    table = encode_conditions(conditions, context.tolist(), spec.targets, DEFAULT_KIND)
    control = bulks.control_mean[context]
    predicted = {}
    for name, kind in baselines.items():
        baseline = kind()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PerturbZooWarning)  # that targets have no vector: said in BASELINES
            baseline.fit_closed_form(spec, bulks)
        with torch.inference_mode():
            delta, _ = baseline.delta(table, torch.as_tensor(control, dtype=torch.float32))
        predicted[name] = control + delta.double().numpy()
    return predicted


def cross_fitted(
    observed: TrainingPseudobulks, genes: Sequence[str], n_asked: int, seed: int = 0, folds: int = FOLDS
) -> dict[str, Array]:
    """The same without a training screen: each of the first `n_asked` observed conditions is predicted from others.

    ``additive`` adds the observed singles of a combination; a single is the mean of all observed perturbations. The baselines on
    embeddings are cross-fitted: conditions are dealt into folds at random, one in all its contexts into the same, and a fold is
    predicted by what is fitted on all others.

    Returns
    -------
    As :func:`fitted`, ``(n_asked, G)``; nothing where there are fewer than two conditions.
    """
    names = np.array([str(condition) for condition in observed.conditions])
    distinct, code = np.unique(names, return_inverse=True)
    if len(distinct) < 2:
        return {}
    conditions, context = observed.conditions[:n_asked], observed.contexts[:n_asked]
    whole = fitted(observed, genes, conditions, context, {"additive": Additive, "mean": TrainingMean})
    single = np.array([len(condition) < 2 for condition in conditions])[:, None]
    predicted = {name: np.full((n_asked, len(genes)), np.nan) for name in BASELINES}
    predicted["additive"] = np.where(single, whole["mean"], whole["additive"])
    crossed = {name: kind for name, kind in BASELINES.items() if name != "additive"}
    folds = min(folds, len(distinct))
    fold = (np.random.default_rng(seed).permutation(len(distinct)) % folds)[code]
    for number in range(folds):
        rows = np.flatnonzero(fold[:n_asked] == number)
        if not len(rows):
            continue
        others = _rows(observed, np.flatnonzero(fold != number))
        asked = [conditions[row] for row in rows.tolist()]
        for name, profiles in fitted(others, genes, asked, context[rows], crossed).items():
            predicted[name][rows] = profiles
    return predicted


def _rows(bulks: TrainingPseudobulks, rows: np.ndarray) -> TrainingPseudobulks:
    return TrainingPseudobulks(
        conditions=[bulks.conditions[row] for row in rows.tolist()],
        contexts=bulks.contexts[rows],
        mean=bulks.mean[rows],
        count=bulks.count[rows],
        control_mean=bulks.control_mean,
    )
