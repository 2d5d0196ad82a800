"""Control cells to predict from, read the way a trained model's data were read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo.data import columns
from perturbzoo.data.reading import check_unique, detect_value_space, group_means, normalise, read_anndata, values_as_csr
from perturbzoo.data.screen import find_contexts, match_levels, size_factors
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass
class QueryCells:
    """Control cells in a model's genes and value space.

    Attributes
    ----------
    values
        Shape ``(cells, G)``, CSR float32, log1p-normalised, genes in the spec's order.
    names
        Shape ``(cells,)``: cell names.
    match_on, contexts, context
        As in :class:`perturbzoo.data.screen.Screen`, for the query's own contexts.
    known_context
        Shape ``(contexts,)``: the model's index of each of them, -1 for one it never saw.
    covariate
        Shape ``(cells, V)``: levels in the order of ``spec.covariates``, -1 for a new one.
    size_factor
        Shape ``(cells,)``, counts; zeros where the model was trained on log1p values.
    control_mean
        Shape ``(contexts, G)``, float32: mean profile of each context.
    """

    values: sparse.csr_matrix
    names: np.ndarray
    match_on: tuple[str, ...]
    contexts: list[tuple[str, ...]]
    context: np.ndarray
    known_context: np.ndarray
    covariate: np.ndarray
    size_factor: np.ndarray
    control_mean: np.ndarray

    def cells_of(self, context: int) -> np.ndarray:
        """Rows of the cells of a context."""
        return np.flatnonzero(self.context == context)

    def cells_per_context(self) -> np.ndarray:
        """Shape ``(contexts,)``."""
        return np.bincount(self.context, minlength=len(self.contexts))

    def contexts_with(self, wanted: Mapping[str, str]) -> list[int]:
        """Contexts whose levels agree with the given ones; all of them where nothing is given."""
        unknown = [name for name in wanted if name not in self.match_on]
        if unknown:
            raise PerturbZooError(
                f"conditions: column(s) {shortened(unknown)} are no covariates of the model; it matches controls on "
                f"{shortened(self.match_on) or 'nothing'}"
            )
        return [
            position
            for position, levels in enumerate(self.contexts)
            if all(dict(zip(self.match_on, levels, strict=True))[name] == str(value) for name, value in wanted.items())
        ]

    def labels(self) -> str:
        """The contexts, for messages."""
        return shortened([" | ".join(levels) or "one context" for levels in self.contexts])


def read_query(controls: AnnData | str, spec: DataSpec) -> QueryCells:
    """Read control cells, or the control cells of a whole screen.

    Genes are matched by name: missing ones are filled with the model's mean control expression, others are ignored, and
    their order does not matter; one line says how many.

    Raises
    ------
    PerturbZooError
        No control cells, no gene in common, another value space, a covariate without its column.
    """
    adata = read_anndata(controls) if isinstance(controls, str) else controls
    where = controls if isinstance(controls, str) else "the controls"
    check_unique(adata.obs_names, "cells", where)
    obs = adata.obs
    values = values_as_csr(adata, None, where)
    detect_value_space(values, spec.value_space, where)
    is_control = _find_controls(obs, where)
    factors = np.zeros(len(obs))
    if spec.value_space == "counts":
        key = spec.size_factor_key
        if key is not None and key not in obs.columns:
            warnings.warn(
                f"{where}: obs has no '{key}', the size factors the model was trained with: total counts are used",
                PerturbZooWarning,
                stacklevel=2,
            )
            key = None
        factors = size_factors(values, obs, key, where)
        is_control &= factors > 0
    if not is_control.any():
        raise PerturbZooError(f"{where}: none of its control cells has any count")

    keep = np.flatnonzero(is_control)
    obs, factors = obs.iloc[keep], factors[keep]
    values = _match_genes(adata, values[keep], spec, where, factors)
    obs = _fill_covariates(obs, spec, where)
    _, covariate = match_levels(obs, list(spec.covariates), where, spec.covariates)
    contexts, context = find_contexts(obs, spec.match_on)
    known = {levels: position for position, levels in enumerate(spec.contexts)}
    known_context = np.array([known.get(levels, -1) for levels in contexts], dtype=np.int64)
    if new := [" | ".join(levels) for levels in contexts if levels not in known]:
        warnings.warn(
            f"{where}: {shortened(new)}: not among the contexts the model was trained on; predicted from its controls alone",
            PerturbZooWarning,
            stacklevel=2,
        )
    groups = [np.flatnonzero(context == position) for position in range(len(contexts))]
    return QueryCells(
        values=values,
        names=obs.index.astype(str).to_numpy(),
        match_on=spec.match_on,
        contexts=contexts,
        context=context,
        known_context=known_context,
        covariate=covariate,
        size_factor=factors,
        control_mean=group_means(values, groups).astype(np.float32),
    )


def _find_controls(obs: pd.DataFrame, where: str) -> np.ndarray:
    """Shape ``(cells,)``, bool: the control cells of a screen, or all cells where no column names perturbations."""
    if not any(name in obs.columns for name in columns.CONDITION_COLUMNS):
        return np.ones(len(obs), dtype=bool)
    labels = obs[columns.find_condition_column(obs, (), where)].astype(str)
    spelled = dict(zip(labels.unique(), columns.is_control_label(labels.unique().tolist(), ()), strict=True))
    return labels.map(spelled).to_numpy(dtype=bool)


def _fill_covariates(obs: pd.DataFrame, spec: DataSpec, where: str) -> pd.DataFrame:
    """Add covariate columns the query lacks where the model knows a single level."""
    for name, levels in spec.covariates.items():
        if name not in obs.columns and len(levels) == 1:
            obs = obs.assign(**{name: levels[0]})
        else:
            columns.require_column(obs, name, "a covariate of the model", where)
    return obs


def _match_genes(
    adata: AnnData, values: sparse.csr_matrix, spec: DataSpec, where: str, factors: np.ndarray
) -> sparse.csr_matrix:
    """Normalise, and bring the genes into the spec's order."""
    candidates = [adata.var_names.astype(str), *(adata.var[name].astype(str) for name in adata.var.columns)]
    wanted = set(spec.genes)
    # identifiers may stand in a var column (symbols beside an Ensembl index): the one that matches best
    names = max(candidates, key=lambda candidate: len(wanted.intersection(candidate)))
    check_unique(names[names.isin(wanted)], "genes", where)
    position = {name: column for column, name in enumerate(names)}
    present = np.array([gene in position for gene in spec.genes])
    if not present.any():
        raise PerturbZooError(
            f"{where}: none of its {adata.n_vars} genes is among the model's {spec.n_genes} ({shortened(spec.genes, 3)} ...): "
            "are the identifiers of the same kind (symbols, Ensembl)?"
        )
    found = values[:, [position[gene] for gene in spec.genes if gene in position]]
    if spec.value_space == "counts":
        normalise(found, factors, spec.depth)
    n_missing, n_extra = int((~present).sum()), len(set(names) - wanted)
    if n_missing or n_extra:
        filled = f"{n_missing} of the model's {spec.n_genes} genes are missing (filled with its mean control expression), "
        warnings.warn(f"{where}: {filled}{n_extra} others are ignored", PerturbZooWarning, stacklevel=3)
    if not n_missing:
        return sparse.csr_matrix(found)
    fill = sparse.csr_matrix(np.tile(spec.control_mean.mean(axis=0)[~present], (found.shape[0], 1)))
    joined = sparse.hstack([found, fill], format="csr", dtype=np.float32)
    order = np.argsort(np.concatenate([np.flatnonzero(present), np.flatnonzero(~present)]))
    return sparse.csr_matrix(joined[:, order])
