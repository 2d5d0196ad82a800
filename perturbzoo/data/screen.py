"""A screen: the cells of one experiment with their conditions, contexts and covariates understood, values untouched."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo.data import columns
from perturbzoo.data.reading import (
    check_unique,
    detect_value_space,
    filter_cells,
    keep_rows,
    name_of_values,
    row_sums,
    values_as_csr,
)
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened
from perturbzoo.perturbation import Condition, parse_conditions

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbzoo.data.spec import ValueSpace


@dataclass
class Columns:
    """How to read the obs and var columns of a screen; None means: detect.

    Attributes
    ----------
    layer
        Layer that holds the values, or None for X.
    condition_key
        obs column of perturbation labels.
    control_labels
        Spellings of control beyond the usual ones.
    separator
        What joins the targets of a combination beyond ``+`` and ``;``, such as ``_``.
    dose_key
        obs column(s) of doses, one number for each target of the label.
    kind
        Kind of perturbation that labels do not spell out.
    covariates
        obs columns that are given to models.
    match_on
        The covariates whose levels form the strata in which controls are matched; None for all of them.
    size_factor_key
        obs column of size factors; None for total counts.
    value_space
        ``"counts"`` or ``"log1p"``.
    gene_key
        var column of gene names; None for the index.
    gene_table
        Table of symbols and Ensembl identifiers that gene names are translated with, to symbols.
    cell_filter
        Cells to keep, such as ``"grna_frac > .5 and n_counts >= 500"``.
    min_cells
        Conditions with fewer cells in a context are left out.
    """

    layer: str | None = None
    condition_key: str | None = None
    control_labels: Sequence[str] = ()
    separator: str | None = None
    dose_key: str | Sequence[str] | None = None
    kind: str | None = None
    covariates: Sequence[str] = ()
    match_on: Sequence[str] | None = None
    size_factor_key: str | None = None
    value_space: ValueSpace | None = None
    gene_key: str | None = None
    gene_table: str | None = None
    cell_filter: str | None = None
    min_cells: int = 10


@dataclass
class Screen:
    """Cells with their meaning.

    Attributes
    ----------
    values
        Shape ``(cells, genes)``, float32 CSR: counts or log1p values as the file held them.
    genes
        Gene names, unique.
    conditions
        The distinct conditions; control is among them.
    condition
        Shape ``(cells,)``: index into `conditions`.
    covariates, covariate
        Levels of each covariate, and shape ``(cells, V)`` level indices.
    match_on, contexts, context
        The covariates that form contexts, their observed combinations, and shape ``(cells,)`` indices.
    size_factor
        Shape ``(cells,)``, counts; zeros where the file held log1p values.
    obs_names, obs
        Names of the cells and their obs table.
    value_space, kind, condition_key, where
        What was understood, and the file's name for messages.
    report
        Lines saying what was understood, for the user.
    """

    values: sparse.csr_matrix
    genes: list[str]
    conditions: list[Condition]
    condition: np.ndarray
    covariates: dict[str, tuple[str, ...]]
    covariate: np.ndarray
    match_on: tuple[str, ...]
    contexts: list[tuple[str, ...]]
    context: np.ndarray
    size_factor: np.ndarray
    obs: pd.DataFrame
    value_space: ValueSpace
    kind: str
    condition_key: str
    where: str
    report: list[str] = field(default_factory=list)

    @property
    def is_control(self) -> np.ndarray:
        """Shape ``(cells,)``, bool."""
        return np.array([condition.is_control for condition in self.conditions])[self.condition]

    def pairs(self) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Distinct (condition, context) index pairs without control, and each cell's pair, -1 for control.

        Pairs are ordered by the condition's canonical string, then by context.
        """
        rank = np.argsort(np.argsort([str(condition) for condition in self.conditions], kind="stable"))
        key = rank[self.condition].astype(np.int64) * len(self.contexts) + self.context
        perturbed = ~self.is_control
        distinct, inverse = np.unique(key[perturbed], return_inverse=True)
        by_rank = np.argsort(rank)
        pair = np.full(len(key), -1)
        pair[perturbed] = inverse
        return [(int(by_rank[k // len(self.contexts)]), int(k % len(self.contexts))) for k in distinct], pair

    def keep(self, cells: np.ndarray) -> Screen:
        """Return the screen of the cells marked in a ``(cells,)`` bool array, without the contexts and levels it loses."""
        if cells.all():
            return self
        contexts, context = np.unique(self.context[cells], return_inverse=True)
        covariate = self.covariate[cells]
        levels = {}
        for position, (name, known) in enumerate(self.covariates.items()):
            used, covariate[:, position] = np.unique(covariate[:, position], return_inverse=True)
            levels[name] = tuple(known[level] for level in used)
        return replace(
            self,
            values=keep_rows(self.values, cells),
            condition=self.condition[cells],
            covariates=levels,
            covariate=covariate,
            contexts=[self.contexts[position] for position in contexts],
            context=context,
            size_factor=self.size_factor[cells],
            obs=self.obs.loc[cells],
        )


def read_labels(obs: pd.DataFrame, wanted: Columns, where: str, kind: str) -> tuple[list[Condition], np.ndarray, str]:
    """Parse the condition column: distinct conditions, each cell's index among them, and the column's name."""
    labels = wanted.control_labels
    key = wanted.condition_key or columns.find_condition_column(obs, labels, where)
    text = columns.require_column(obs, key, "condition_key", where)
    dose_keys = [wanted.dose_key] if isinstance(wanted.dose_key, str) else list(wanted.dose_key or ())
    if not dose_keys and kind in ("compound", "cytokine"):
        dose_keys = [name for name in columns.DOSE_COLUMNS if name in obs.columns][:1]
    doses = None
    if dose_keys:
        first, *others = (columns.require_column(obs, name, "dose_key", where) for name in dose_keys)
        for other in others:
            first = first.astype(str).str.cat(other.astype(str), sep="+")
        doses = first.tolist()
    try:
        conditions, codes = parse_conditions(text.tolist(), separator=wanted.separator, doses=doses, control_labels=labels)
    except PerturbZooError as error:
        said = f"obs['{key}']" + "".join(f" with doses of obs['{name}']" for name in dose_keys[:1])
        raise PerturbZooError(f"{where}, {said}: {error}") from error
    return conditions, codes, key


def match_levels(
    obs: pd.DataFrame, names: Sequence[str], where: str, levels: Mapping[str, Sequence[str]] | None = None
) -> tuple[dict[str, tuple[str, ...]], np.ndarray]:
    """Encode covariate columns: their levels and the ``(cells, V)`` indices into them, -1 for a level not in `levels`."""
    found: dict[str, tuple[str, ...]] = {}
    codes = np.zeros((len(obs), len(names)), dtype=np.int64)
    for position, name in enumerate(names):
        text = columns.require_column(obs, name, "covariates", where).astype(str)
        known = tuple(levels[name]) if levels is not None else tuple(sorted(text.unique()))
        codes[:, position] = pd.Categorical(text, categories=list(known)).codes
        found[name] = known
    return found, codes


def find_contexts(obs: pd.DataFrame, match_on: Sequence[str]) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Distinct combinations of levels of `match_on`, sorted, and each cell's index among them."""
    if not match_on:
        return [()], np.zeros(len(obs), dtype=np.int64)
    levels = obs[list(match_on)].astype(str)
    group = levels.groupby(list(match_on), sort=True, observed=True)
    contexts = [key if isinstance(key, tuple) else (key,) for key in group.groups]
    return contexts, group.ngroup().to_numpy()


def gene_names(adata: AnnData, wanted: Columns, where: str) -> list[str]:
    """Gene names from the index or from ``gene_key``, translated by ``gene_table`` if one is given."""
    names = adata.var_names.astype(str).tolist()
    if wanted.gene_key:
        names = columns.require_column(adata.var, wanted.gene_key, "gene_key", where, "var").astype(str).tolist()
    if wanted.gene_table:
        from perturbzoo.data.genes import map_genes

        names, unmapped = map_genes(names, wanted.gene_table, to="symbol")
        if unmapped:
            warnings.warn(
                f"{where}: {len(unmapped)} genes are not in {wanted.gene_table} and keep their names ({shortened(unmapped)})",
                PerturbZooWarning,
                stacklevel=2,
            )
    check_unique(pd.Index(names), "genes", where)
    return names


def size_factors(values: sparse.csr_matrix, obs: pd.DataFrame, key: str | None, where: str) -> np.ndarray:
    """Counts of each cell, from its row or from the obs column `key`."""
    if key is None:
        return row_sums(values)
    column = pd.to_numeric(columns.require_column(obs, key, "size_factor_key", where), errors="coerce").to_numpy(dtype=float)
    if not np.isfinite(column).all() or (column < 0).any():
        raise PerturbZooError(f"{where}: obs['{key}'] (size_factor_key) holds values that are no positive numbers")
    return column


def understand(adata: AnnData, wanted: Columns, where: str, *, own: bool) -> Screen:
    """Read conditions, covariates, contexts, gene names and size factors of a screen, checking as it goes.

    Parameters
    ----------
    adata
        The cells.
    wanted
        Which columns to use; what is None is detected.
    where
        The file's name, for messages.
    own
        Whether the values may be changed in place later; otherwise they are copied here.

    Raises
    ------
    PerturbZooError
        See the messages: missing columns, no controls, only controls, bad values, duplicate names.
    """
    check_unique(adata.obs_names, "cells", where)
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise PerturbZooError(f"{where}: {adata.n_obs} cells x {adata.n_vars} genes: there is nothing to read")
    genes = gene_names(adata, wanted, where)
    values = values_as_csr(adata, wanted.layer, where)
    values = values if own else values.copy()
    # entries that stand twice in a row count together; log1p of each alone would be wrong
    values.sum_duplicates()
    space = detect_value_space(values, wanted.value_space, where, name_of_values(wanted.layer))
    kind = wanted.kind or columns.find_kind(adata.obs) or columns.DEFAULT_KIND
    conditions, codes, key = read_labels(adata.obs, wanted, where, kind)
    covariates, covariate = match_levels(adata.obs, wanted.covariates, where)
    match_on = tuple(wanted.covariates if wanted.match_on is None else wanted.match_on)
    for name in match_on:
        columns.require_column(adata.obs, name, "match_on", where)
    contexts, context = find_contexts(adata.obs, match_on)
    factors = np.zeros(adata.n_obs)
    if space == "counts":
        factors = size_factors(values, adata.obs, wanted.size_factor_key, where)
    screen = Screen(
        values=values,
        genes=genes,
        conditions=conditions,
        condition=codes,
        covariates=covariates,
        covariate=covariate,
        match_on=match_on,
        contexts=contexts,
        context=context,
        size_factor=factors,
        obs=adata.obs,
        value_space=space,
        kind=kind,
        condition_key=key,
        where=where,
    )
    return _report(_choose_cells(screen, wanted), wanted, adata.obs)


def _choose_cells(screen: Screen, wanted: Columns) -> Screen:
    """Apply the filters, and refuse what is left if it is no screen."""
    where, dropped = screen.where, []
    control = screen.is_control
    if not control.any():
        raise PerturbZooError(
            f"{where}: no control cells in obs['{screen.condition_key}']: name their label with control_labels "
            f"(it holds {shortened([str(c) for c in screen.conditions])})"
        )
    if control.all():
        raise PerturbZooError(f"{where}: only control cells in obs['{screen.condition_key}']: nothing was perturbed")
    keep = np.ones(len(screen.condition), dtype=bool)
    if wanted.cell_filter:
        keep = filter_cells(screen.obs, wanted.cell_filter, where)
        if not keep.any():
            raise PerturbZooError(f"{where}: cell_filter '{wanted.cell_filter}' leaves no cell")
        dropped.append(f"{int((~keep).sum())} cells by cell_filter")
    if screen.value_space == "counts" and (empty := keep & (screen.size_factor <= 0)).any():
        warnings.warn(f"{where}: {int(empty.sum())} cells without any count are left out", PerturbZooWarning, stacklevel=4)
        keep &= ~empty
    for cells, kind in ((control, "control"), (~control, "perturbed")):
        if not (keep & cells).any():
            because = f"cell_filter '{wanted.cell_filter}'" if wanted.cell_filter else "leaving out cells without any count"
            raise PerturbZooError(f"{where}: none of the {int(cells.sum())} {kind} cells remains after {because}")
    screen = screen.keep(keep)
    pairs, pair = screen.pairs()
    sizes = np.bincount(pair[pair >= 0], minlength=len(pairs))
    small = np.flatnonzero(sizes < wanted.min_cells)
    if len(small):
        names = [str(screen.conditions[pairs[position][0]]) for position in small]
        dropped.append(f"{len(small)} conditions with fewer than {wanted.min_cells} cells ({shortened(names)})")
        keep = ~np.isin(pair, small)
        if not (keep & (pair >= 0)).any():
            raise PerturbZooError(
                f"{where}: no condition has {wanted.min_cells} cells (the largest has {int(sizes.max())}): lower min_cells"
            )
        screen = screen.keep(keep)
    with_controls = np.bincount(screen.context[screen.is_control], minlength=len(screen.contexts)) > 0
    perturbed = np.bincount(screen.context[~screen.is_control], minlength=len(screen.contexts)) > 0
    orphans = [" | ".join(screen.contexts[position]) for position in np.flatnonzero(perturbed & ~with_controls)]
    if orphans:
        raise PerturbZooError(
            f"{where}: no control cells in {len(orphans)} of the strata of {', '.join(screen.match_on)} ({shortened(orphans)}): "
            "shorten match_on, or leave those cells out with cell_filter"
        )
    if dropped:
        screen.report.append("left out: " + "; ".join(dropped))
    return screen


def _report(screen: Screen, wanted: Columns, obs: pd.DataFrame) -> Screen:
    """Say in a few lines what was understood."""
    control = screen.is_control
    used = [screen.conditions[code] for code in np.unique(screen.condition)]
    singles = sum(len(condition) == 1 for condition in used)
    combinations = sum(len(condition) > 1 for condition in used)
    read_as: dict[str, Any] = {"counts": "raw counts", "log1p": "log1p-normalised values"}
    lines = [
        f"{screen.where}: {len(screen.condition):,} cells x {len(screen.genes):,} genes, {read_as[screen.value_space]}",
        f"conditions from obs['{screen.condition_key}']: {singles} single, {combinations} combined, "
        f"{int(control.sum()):,} control cells; kind '{screen.kind}'",
    ]
    if screen.value_space == "counts":
        lines.append(f"size factors: {wanted.size_factor_key or 'total counts'}, median {np.median(screen.size_factor):,.0f}")
    if screen.match_on:
        lines.append(f"controls matched on {', '.join(screen.match_on)}: {len(screen.contexts)} contexts")
    elif others := [name for name in columns.covariate_candidates(obs) if name not in wanted.covariates]:
        lines.append(f"not matched on {', '.join(others)}: add them to covariates to match controls within their levels")
    screen.report[:0] = lines
    return screen
