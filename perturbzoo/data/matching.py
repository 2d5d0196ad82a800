"""A trained model's genes in another file: found by name, and sizes of cells as they would be in the training file.

Control cells for prediction (:mod:`perturbzoo.data.query`) and screens to test on (:mod:`perturbzoo.data.preprocessing`) come through
here, so that one file gives the same values on both ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo.data.reading import check_unique, row_sums
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, near_matches, shortened


def match_genes(
    values: sparse.csr_matrix, names: Sequence[str] | pd.Index, spec: DataSpec, where: str, *, stacklevel: int = 3
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Bring genes into the model's order. One warning says how many are missing, ignored or moved.

    Parameters
    ----------
    values
        Shape ``(cells, n)``.
    names
        The n genes of the file.
    spec
        The model's.
    where
        The file's name, for messages.
    stacklevel
        Of the warning.

    Returns
    -------
    matched
        Shape ``(cells, G)``, a copy; nothing for genes that the file lacks.
    present
        Shape ``(G,)``, bool: which of them it has.

    Raises
    ------
    PerturbZooError
        No gene in common, or one of the model's stands twice.
    """
    names, wanted = pd.Index(names), pd.Index(spec.genes)
    if names.equals(wanted):
        return values.copy(), np.ones(spec.n_genes, dtype=bool)  # as most often: nothing to move
    check_unique(names[names.isin(wanted)], "genes", where)
    position = wanted.get_indexer(names)
    columns_found = np.flatnonzero(position >= 0)
    if not len(columns_found):
        raise PerturbZooError(
            f"{where}: none of its {len(names)} genes ({shortened(names, 3)}) is among the model's {spec.n_genes} "
            f"({shortened(spec.genes, 3)}): are the identifiers of the same kind (symbols, Ensembl)?"
        )
    found = position[columns_found]
    present = np.isin(np.arange(spec.n_genes), found)
    n_missing, n_extra = int((~present).sum()), len(names) - len(found)
    notes = []
    if n_missing:
        notes.append(f"{n_missing} are missing and filled with its mean control expression")
    if n_extra:
        notes.append(f"{n_extra} others are ignored")
    if (np.diff(found) < 0).any():
        notes.append(f"{len(found)} stand in another order and are matched by name")
    if notes:
        message = f"{where}: of the model's {spec.n_genes} genes {len(found)} are there: {', '.join(notes)}"
        warnings.warn(message, PerturbZooWarning, stacklevel=stacklevel)
    ones = np.ones(len(found), dtype=np.float32)
    selection = sparse.csr_matrix((ones, (columns_found, found)), shape=(len(names), spec.n_genes))
    return sparse.csr_matrix(values @ selection), present


def fill_of(spec: DataSpec, present: np.ndarray) -> np.ndarray:
    """Shape ``(G,)``, float32: the mean control expression of genes that a file lacks, 0 for the others."""
    return np.where(present, 0, spec.control_mean.mean(axis=0)).astype(np.float32)


def matched_sizes(
    values: sparse.csr_matrix,
    matched: sparse.csr_matrix,
    present: np.ndarray,
    obs: pd.DataFrame,
    spec: DataSpec,
    where: str,
) -> np.ndarray:
    """Size factors ``(cells,)``, counts, comparable with those of the training cells: to be scaled to the spec's depth.

    Parameters
    ----------
    values, matched
        Raw counts of all genes of the file, and what :func:`match_genes` made of them; `present` too.
    obs
        The cells' annotations.

    Raises
    ------
    PerturbZooError
        The model's size factors stood in a column of obs that this file lacks, or that holds no positive numbers.
    """
    key = spec.size_factor_key
    if key is not None:
        if key not in obs.columns:
            raise PerturbZooError(
                f"{where}: obs has no '{key}', the size factors that the model was trained with"
                f"{near_matches(key, obs.columns) or ';'} total counts of these genes are on another scale"
            )
        column = pd.to_numeric(obs[key], errors="coerce").to_numpy(dtype=float)
        if not np.isfinite(column).all() or (column < 0).any():
            raise PerturbZooError(f"{where}: obs['{key}'] (size_factor_key) holds values that are no positive numbers")
        return column
    if spec.genes_chosen:
        # the model's genes are a choice: its cells were scaled to the total of all genes of their file
        return row_sums(values)
    # all genes of the training file: others must not count, and a cell would have had more counts with those it lacks
    mean = np.expm1(spec.control_mean.mean(axis=0, dtype=np.float64))
    return row_sums(matched) / max(float(mean[present].sum() / mean.sum()), 1e-12)
