"""Whether a basal state is free of the perturbation: how well a classifier reads the one from the other, beside chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.sampling import CellIndex, EveryCellSampler

if TYPE_CHECKING:
    from perturbzoo.models.base import PerturbationModel

MAX_CELLS = 2000
MAX_CONDITIONS = 24
FOLDS = 3


def report_disentanglement(
    model: PerturbationModel, data: PerturbSeqDataModule, encode: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Print and log the accuracy at reading the condition from the basal state, from raw expression, and by chance.

    Conditions, control among them, have equally many cells; training conditions where there are any, because those are
    what the autoencoder was to forget.

    Parameters
    ----------
    model, data
        The model under test, and the cells.
    encode
        From log1p-normalised cells ``(B, G)`` to basal states ``(B, L)``.

    Returns
    -------
    ``basal``, ``expression`` and ``chance``; empty where there are too few cells.
    """
    if not model.trainer.is_global_zero:
        return {}
    pairs = data.pairs_of("train")
    expression, label = draw_cells(data, pairs if len(pairs) else data.pairs_of("test"))
    if len(label) == 0 or len(np.unique(label)) < 2:
        print("disentanglement: too few cells for a classifier")
        return {}
    with torch.inference_mode():
        basal = encode(expression.to(model.device)).float().cpu().numpy()
    scores = disentanglement(basal, expression.numpy(), label)
    print(
        f"disentanglement ({len(np.unique(label)) - 1} conditions and control, {len(label):,} cells): a logistic classifier reads the "
        f"condition from the basal state with accuracy {scores['basal']:.3f}, from as many principal components of expression "
        f"{scores['expression']:.3f}, chance {scores['chance']:.3f}"
    )
    for logger in model.trainer.loggers:
        logger.log_metrics(
            {f"test/disentanglement/{name}": value for name, value in scores.items()}, step=model.trainer.global_step
        )
    return scores


def disentanglement(basal: np.ndarray, expression: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Cross-validated accuracy of a logistic classifier.

    Parameters
    ----------
    basal, expression
        Shapes ``(N, L)`` and ``(N, G)``; of the latter as many principal components are used as the former has dimensions.
    label
        Shape ``(N,)``, int; at least three cells of each.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    n_components = min(basal.shape[1], expression.shape[1], len(label) - 1)
    components = PCA(n_components, random_state=0).fit_transform(expression)
    read = {
        name: float(cross_val_score(classifier, values, label, cv=folds).mean())
        for name, values in (("basal", basal), ("expression", components))
    }
    return {**read, "chance": float(np.bincount(label).max() / len(label))}


def draw_cells(data: PerturbSeqDataModule, pairs: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Equally many cells of some conditions and of control.

    Returns
    -------
    expression
        Shape ``(N, G)``, log1p-normalised; N at most :data:`MAX_CELLS`.
    label
        Shape ``(N,)``: the condition, 0 for control; contexts of a condition count as one.
    """
    generator = np.random.default_rng(0)
    index = data.index
    groups: dict[str, list[int]] = {}
    for pair in pairs:
        groups.setdefault(str(data.conditions[pair]), []).append(int(pair))
    names = [name for name in groups if sum(len(index.cells_by_pair[pair]) for pair in groups[name]) >= FOLDS]
    if len(names) > MAX_CONDITIONS:
        names = sorted(generator.choice(names, MAX_CONDITIONS, replace=False))
    contexts = np.unique(index.context_of_pair[pairs])
    pools = [np.concatenate([index.controls_by_context[context] for context in contexts])]
    pools += [np.concatenate([index.cells_by_pair[pair] for pair in groups[name]]) for name in names]
    size = min(MAX_CELLS // len(pools), min(len(pool) for pool in pools))
    if size < FOLDS:
        return torch.empty(0), np.empty(0, dtype=np.int64)
    drawn = np.concatenate([generator.choice(pool, size, replace=False) for pool in pools])
    # all as cells of one pair, at which nobody looks: they come in order
    sampler = EveryCellSampler(
        CellIndex([drawn], np.zeros(1, dtype=np.int64), index.controls_by_context), np.zeros(1, dtype=int)
    )
    expression = torch.cat([batch.observed.clone() for batch in data.loader(sampler)])
    return expression, np.repeat(np.arange(len(pools)), size)
