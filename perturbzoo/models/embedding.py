"""Vectors for targets: what lets a model say something about a target it never saw perturbed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from perturbzoo.data.datamodule import TrainingPseudobulks
from perturbzoo.data.reading import expand_path
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooError, shortened


def pseudobulk_pca(bulks: TrainingPseudobulks, dimension: int) -> np.ndarray:
    """Scores of the genes on the first principal components of the training pseudobulks.

    Genes are the observations and pseudobulks (training pairs and controls) the variables, as in the bilinear model of
    Ahlmann-Eltze et al. (Nature Methods 2025).

    Parameters
    ----------
    bulks
        The training pseudobulks, log1p-normalised.
    dimension
        Number of components K; fewer where there are fewer pseudobulks.

    Returns
    -------
    Shape ``(G, K)``, float64.
    """
    values = np.concatenate([bulks.control_mean, bulks.mean]).T  # (G, contexts + P)
    centred = values - values.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    scores = left * singular
    # a component's sign is arbitrary: fix it so that the same data give the same numbers on every machine
    scores *= np.sign(scores[np.abs(scores).argmax(axis=0), np.arange(scores.shape[1])])
    return scores[:, : min(dimension, scores.shape[1])]


def read_embedding(path: str) -> tuple[list[str], np.ndarray]:
    """Read a table of vectors: names and a ``(names, K)`` float64 array.

    CSV, TSV or parquet with the names in the first column, or npz with arrays ``names`` and ``vectors``.

    Raises
    ------
    PerturbZooError
        The file is missing, or is no such table.
    """
    file = expand_path(path)
    if not file.is_file():
        raise PerturbZooError(f"embedding '{file}': no such file; give 'pca' or the path of a table")
    try:
        names, vectors = _read_table(file)
    except (ValueError, KeyError, IndexError, OSError, ImportError, BadZipFile) as error:
        reason = f"{error!s:.200}".strip().split("\n")[0]
        raise PerturbZooError(f"embedding '{file}' is no table of names and numbers: {reason}") from error
    if vectors.ndim != 2 or len(names) != len(vectors) or not np.isfinite(vectors).all():
        raise PerturbZooError(f"embedding '{file}': expected one finite vector per name, got shape {vectors.shape}")
    if len(set(names)) < len(names):
        raise PerturbZooError(f"embedding '{file}': {len(names) - len(set(names))} names occur more than once")
    return names, vectors


def _read_table(file: Path) -> tuple[list[str], np.ndarray]:
    import pandas as pd

    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            return [str(name) for name in arrays["names"]], np.asarray(arrays["vectors"], dtype=np.float64)
    if file.suffix == ".parquet":
        table = pd.read_parquet(file)
        table = table if isinstance(table.index[0], str) else table.set_index(table.columns[0])
    else:
        separator = "\t" if ".tsv" in file.name or ".txt" in file.name else ","
        table = pd.read_csv(file, sep=separator, index_col=0)
    return table.index.astype(str).tolist(), table.to_numpy(dtype=np.float64)


def embed_targets(embedding: str, dimension: int, spec: DataSpec, bulks: TrainingPseudobulks) -> dict[str, Any]:
    """Vectors for the targets, as tensors for the checkpoint.

    Parameters
    ----------
    embedding
        ``"pca"`` for :func:`pseudobulk_pca` (measured genes only), or the path of a table (:func:`read_embedding`).
    dimension
        Number of components for ``"pca"``.
    spec, bulks
        The data.

    Returns
    -------
    ``vectors`` ``(T, K)`` float32 with zeros where a target has none, ``known`` ``(T,)`` bool, and ``extra``: names beyond
    the spec's targets that also have a vector, so that a model can be asked about them.

    Raises
    ------
    PerturbZooError
        The table has no vector for any target of the data, or `dimension` is no positive number.
    """
    if dimension < 1:
        raise PerturbZooError(f"dimension is {dimension}: give 1 or more components")
    if embedding == "pca":
        names: Sequence[str] = spec.genes
        vectors = pseudobulk_pca(bulks, dimension)
    else:
        names, vectors = read_embedding(embedding)
    position = {name: row for row, name in enumerate(names)}
    if embedding != "pca" and not any(target in position for target in spec.targets):
        raise PerturbZooError(
            f"embedding '{embedding}' has no vector for any of the {len(spec.targets)} targets ({shortened(spec.targets)}): "
            "are its names of the same kind (symbols, Ensembl)?"
        )
    extra = sorted(set(names) - set(spec.targets))
    targets = [*spec.targets, *extra]
    known = np.array([target in position for target in targets])
    filled = np.zeros((len(targets), vectors.shape[1]), dtype=np.float32)
    filled[known] = vectors[[position[target] for target in targets if target in position]]
    return {"vectors": torch.from_numpy(filled), "known": torch.from_numpy(known), "extra": extra}
