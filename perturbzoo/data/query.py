"""Control cells to predict from, read the way a trained model's data were read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo.data import columns
from perturbzoo.data.genes import map_genes
from perturbzoo.data.matching import fill_of, match_genes, matched_sizes
from perturbzoo.data.reading import (
    check_unique,
    detect_value_space,
    expand_path,
    filter_cells,
    group_means,
    name_of_values,
    normalise,
    read_anndata,
    values_as_csr,
)
from perturbzoo.data.screen import find_contexts, match_levels
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened
from perturbzoo.perturbation import parse_condition

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass
class QueryCells:
    """Control cells in a model's genes and value space.

    Attributes
    ----------
    values
        Shape ``(cells, G)``, CSR float32, log1p-normalised, genes in the spec's order; nothing for genes the query lacks.
    fill
        Shape ``(G,)``, float32, to be added to every cell: the model's mean control expression where the query lacks a gene,
        0 elsewhere.
    obs
        The model's covariates, one row per cell; its index holds the cells' names.
    match_on, contexts, context
        As in :class:`perturbzoo.data.screen.Screen`, for the query's own contexts.
    known_context
        Shape ``(contexts,)``: the model's index of each of them, -1 for one it never saw.
    covariate
        Shape ``(cells, V)``: levels in the order of ``spec.covariates``, -1 for a new one.
    size_factor
        Shape ``(cells,)``, counts, those of missing genes estimated; zeros where the model was trained on log1p values.
    control_mean
        Shape ``(contexts, G)``, float32: mean profile of each context, with `fill`.
    """

    values: sparse.csr_matrix
    fill: np.ndarray
    obs: pd.DataFrame
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

    def contexts_with(self, wanted: Mapping[str, str]) -> list[int]:
        """Contexts whose levels agree with the given ones; all of them where nothing is given.

        Raises
        ------
        PerturbZooError
            A name is no covariate that contexts are made of, or no control cell has these levels.
        """
        for name in wanted:
            if name not in self.match_on:
                raise PerturbZooError(
                    f"conditions: column '{name}' is neither 'condition' nor 'dose' nor a covariate on which the model matches "
                    f"controls ({shortened(self.match_on) or 'it has none'})"
                )
        found = [
            position
            for position, levels in enumerate(self.contexts)
            if all(levels[self.match_on.index(name)] == value for name, value in wanted.items())
        ]
        if not found:
            sought = ", ".join(f"{name} '{value}'" for name, value in wanted.items())
            raise PerturbZooError(f"conditions: no control cells with {sought}; there are some of {shortened(self.labels())}")
        return found

    def labels(self) -> list[str]:
        """A name for each context: its levels joined by ``|``."""
        return ["|".join(levels) for levels in self.contexts]

    def averaged(self) -> QueryCells:
        """One cell for each context, the mean of its control cells; covariates that differ within it become unknown (-1)."""
        n_cells = np.bincount(self.context, minlength=len(self.contexts))
        first = np.array([self.cells_of(context)[0] for context in range(len(self.contexts))])
        names = [
            f"mean of {cells} control cells" + (f", {label}" if label else "")
            for cells, label in zip(n_cells, self.labels(), strict=True)
        ]
        covariate = self.covariate[first]
        for context in range(len(self.contexts)):
            mixed = (self.covariate[self.context == context] != covariate[context]).any(axis=0)
            covariate[context, mixed] = -1
        return replace(
            self,
            values=sparse.csr_matrix(self.control_mean),
            fill=np.zeros_like(self.fill),
            obs=self.obs[list(self.match_on)].iloc[first].set_axis(names),
            context=np.arange(len(self.contexts)),
            covariate=covariate,
            size_factor=np.bincount(self.context, weights=self.size_factor) / n_cells,
        )


def read_query(controls: AnnData | str | os.PathLike[str], spec: DataSpec, data: Mapping[str, Any]) -> QueryCells:
    """Read control cells, or the control cells of a whole screen.

    Genes are matched by name: missing ones are filled with the model's mean control expression, others are ignored, and
    their order does not matter; one line says how many.

    Parameters
    ----------
    controls
        The cells, or an h5ad file. Where a column names perturbations, cells labelled as control are used; else all.
    spec
        The model's.
    data
        Arguments of the data module that the model was trained with, for what a spec does not hold: ``condition_key``,
        ``control_labels``, ``separator``, ``cell_filter``, ``layer``, ``gene_table``.

    Raises
    ------
    PerturbZooError
        No control cells, no gene in common, another value space, a covariate or the size factors without their column.
    """
    if isinstance(controls, str | os.PathLike):
        adata, where = read_anndata(controls), os.fspath(controls)
    else:
        adata, where = controls, "the controls"
    rows = _find_controls(adata.obs, data, where)
    if len(rows) < adata.n_obs:
        adata = adata[rows]
    check_unique(adata.obs_names, "cells", where)
    obs = _read_covariates(adata.obs, spec, where)
    layer = data.get("layer") if data.get("layer") in adata.layers else None
    values = values_as_csr(adata, layer, where)
    space = detect_value_space(values, None, where, name_of_values(layer))
    if space != spec.value_space:
        called = {"counts": "raw counts", "log1p": "log1p-normalised values"}
        raise PerturbZooError(
            f"{where}: {name_of_values(layer)} holds {called[space]}, the model was trained on {called[spec.value_space]}"
        )
    names = adata.var_names
    if not names.equals(pd.Index(spec.genes)):
        names = _gene_names(adata, spec, data)
    columns = pd.DataFrame(adata.obs, copy=True)
    del adata  # with the cells that are no controls: of a large screen, two copies at a time are enough
    matched, present = match_genes(values, names, spec, where)
    # entries that stand twice in a row count together; log1p of each alone would be wrong
    matched.sum_duplicates()
    factors = np.zeros(len(columns))
    if space == "counts":
        factors = matched_sizes(values, matched, present, columns, spec, where)
        if not (keep := factors > 0).all():
            if not keep.any():
                raise PerturbZooError(f"{where}: none of its {len(keep)} control cells has any count of the model's genes")
            message = f"{where}: {int((~keep).sum())} control cells without any count are left out"
            warnings.warn(message, PerturbZooWarning, stacklevel=2)
            matched, factors, obs = matched[keep], factors[keep], obs[keep]
        normalise(matched, factors, spec.depth)
    fill = fill_of(spec, present)
    _, covariate = match_levels(obs, list(spec.covariates), where, spec.covariates)
    contexts, context = find_contexts(obs, spec.match_on)
    known = {levels: position for position, levels in enumerate(spec.contexts)}
    groups = [np.flatnonzero(context == position) for position in range(len(contexts))]
    query = QueryCells(
        values=matched,
        fill=fill,
        obs=obs,
        match_on=spec.match_on,
        contexts=contexts,
        context=context,
        known_context=np.array([known.get(levels, -1) for levels in contexts], dtype=np.int64),
        covariate=covariate,
        size_factor=factors,
        control_mean=group_means(matched, groups).astype(np.float32) + fill,
    )
    _warn_of_new_levels(query, spec, where)
    return query


def _find_controls(obs: pd.DataFrame, data: Mapping[str, Any], where: str) -> np.ndarray:
    """Rows of the control cells: those a column labels so, or all where no column names perturbations."""
    key = data.get("condition_key")
    present: list[str] = (
        [key] if key is not None and key in obs.columns else [name for name in columns.CONDITION_COLUMNS if name in obs.columns]
    )
    if not len(obs):
        raise PerturbZooError(f"{where}: it holds no cells")
    control = np.full(len(obs), not present)
    for name in present:
        codes, levels = pd.factorize(obs[name].astype(str))
        control = np.array([_is_control(level, data) for level in levels], dtype=bool)[codes]
        if control.any():
            break
    if not control.any():
        raise PerturbZooError(
            f"{where}: no control cells: no cell is labelled as control in obs column {shortened(present)}; label them "
            "'control', or leave that column out of a file that holds control cells only"
        )
    rows = np.flatnonzero(control)
    if expression := data.get("cell_filter"):
        try:
            kept = filter_cells(obs.iloc[rows], expression, where)
        except PerturbZooError as error:
            message = f"{error}; the filter of the training cells is not applied"
            warnings.warn(message, PerturbZooWarning, stacklevel=3)
            return rows
        if not kept.any():
            raise PerturbZooError(f"{where}: '{expression}', the filter of the training cells, leaves no control cell")
        rows = rows[kept]
    return rows


def _is_control(label: str, data: Mapping[str, Any]) -> bool:
    try:
        labels = data.get("control_labels") or ()
        return parse_condition(label, separator=data.get("separator"), control_labels=labels).is_control
    except PerturbZooError:
        return False


def _read_covariates(obs: pd.DataFrame, spec: DataSpec, where: str) -> pd.DataFrame:
    """The covariates of the model and the columns contexts are made of, as text; one of a single level may be absent."""
    levels = {name: {context[position] for context in spec.contexts} for position, name in enumerate(spec.match_on)}
    levels |= {name: set(known) for name, known in spec.covariates.items()}
    table = pd.DataFrame(index=obs.index.astype(str))
    for name, known in levels.items():
        if name not in obs.columns and len(known) == 1:
            table[name] = pd.Categorical([next(iter(known))] * len(obs))
        else:
            column = columns.require_column(obs, name, "a covariate of the model", where)
            table[name] = pd.Categorical(column.astype(str))
    return table


def _gene_names(adata: AnnData, spec: DataSpec, data: Mapping[str, Any]) -> pd.Index:
    """The index of var, one of its columns, or their translation, whichever names most of the model's genes."""
    text = adata.var.select_dtypes(exclude=["number", "bool"])
    candidates = [pd.Index(names.astype(str)) for names in (adata.var_names, *(text[column] for column in text))]
    if table := data.get("gene_table"):
        for names in tuple(candidates):
            try:
                candidates.append(pd.Index(map_genes(names, expand_path(table), duplicates="keep")[0]))
            except (PerturbZooError, OSError):
                continue  # the table is not at hand any more, or knows none of these names
    return max(candidates, key=lambda names: names.isin(spec.genes).sum())


def _warn_of_new_levels(query: QueryCells, spec: DataSpec, where: str) -> None:
    new = [label for label, known in zip(query.labels(), query.known_context, strict=True) if known < 0]
    for position, name in enumerate(spec.covariates):
        if name not in spec.match_on and (unknown := query.covariate[:, position] < 0).any():
            new += [f"{name} {level}" for level in query.obs[name][unknown].unique()]
    if new:
        message = f"{where}: {shortened(new)}: never seen in training; predicted from the control cells alone"
        warnings.warn(message, PerturbZooWarning, stacklevel=3)
