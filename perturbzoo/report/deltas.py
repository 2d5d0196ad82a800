"""The changes that a page shows: some conditions, some genes of each, of what ``test/deltas.h5ad`` holds.

Called by `content`. Reads only the rows that are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from numpy.typing import NDArray

from perturbzoo.errors import PerturbZooError
from perturbzoo.report.results import Results, Run

FLOOR_LAYER = "floor:"
N_CONDITIONS = 200  # of the picker, at the most
N_GENES = 300  # of each condition
N_NUMBERS = 800_000  # of all of them together: about 4 MB of text
N_ROWS, N_COLUMNS = 24, 40  # of the heat map
KEYS = ["split", "condition", "context"]
TOP = 20  # DE genes of a condition, as in top20_de

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Deltas:
    """Observed and predicted changes of the shown conditions.

    Parameters
    ----------
    conditions
        C rows: split, condition, context, category, n_cells.
    genes
        Names of the G genes that all runs share.
    observed
        Shape ``(C, G)``, log1p-normalised.
    error
        The same, standard error of the observed mean; None where the file has none.
    predicted
        The same of each source (the tested models, then the floors), by name; rows it does not predict are NaN.
    in_file
        How many conditions there are in all.
    """

    conditions: pd.DataFrame
    genes: list[str]
    observed: Array
    error: Array | None
    predicted: dict[str, Array]
    in_file: int


def read_deltas(results: Results, metric: str) -> Deltas | None:
    """Read the conditions to show, those of all splits; None where no run has the file.

    Where there are more than fit, those are chosen that are evenly spread from the worst to the best of the first model by `metric`.
    """
    runs = [run for run in results.runs if (run.folder / "deltas.h5ad").is_file()]
    if not runs:
        return None
    files = [_File(run) for run in runs]
    # the screen of a split is the same for all its models: observations and floors are those of its first
    firsts: dict[str, _File] = {}
    for file in files:
        firsts.setdefault(file.run.split, file)
    shared = set(files[0].genes).intersection(*(file.genes for file in files))
    genes = [gene for gene in files[0].genes if gene in shared]
    if not genes:
        return None
    order = list(results.kinds)  # HDF5 keeps layers by name, the tables have the simplest floors first
    floors = sorted({name for file in firsts.values() for name in file.floors})
    floors.sort(key=lambda name: order.index(name) if name in order else len(order))
    models = list(dict.fromkeys(run.model for run in runs))
    n_sources = len(models) + len(floors)
    room = int(np.clip(N_NUMBERS // (min(N_GENES, len(genes)) * (n_sources + 2)), 20, N_CONDITIONS))
    labels = pd.concat([file.conditions.assign(split=split) for split, file in firsts.items()], ignore_index=True)
    rows = _spread(labels, results.scores[models[0]], metric, room)
    shown = labels.iloc[rows].reset_index(drop=True)
    size = (len(shown), len(genes))
    observed, error = np.full(size, np.nan), np.full(size, np.nan)
    predicted = {name: np.full(size, np.nan) for name in (*models, *floors)}
    for file in files:
        at = np.flatnonzero(shown["split"] == file.run.split)
        places = pd.Series(range(len(file.conditions)), index=_keys(file.conditions)).reindex(_keys(shown.iloc[at]))
        at, places = at[places.notna().to_numpy()], places.dropna().to_numpy(dtype=int)
        predicted[file.run.model][at] = file.read("layers/predicted", places, genes)
        if file is not firsts[file.run.split]:
            continue
        observed[at] = file.read("X", places, genes)
        if file.has_error:
            error[at] = file.read("layers/observed_error", places, genes)
        for name in file.floors:
            predicted[name][at] = file.read(f"layers/{FLOOR_LAYER}{name}", places, genes)
    return Deltas(
        conditions=shown,
        genes=genes,
        observed=observed,
        error=error if all(file.has_error for file in firsts.values()) else None,
        predicted=predicted,
        in_file=len(labels),
    )


class _File:
    """One deltas.h5ad: its labels; its numbers on request."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path = run.folder / "deltas.h5ad"
        try:
            with h5py.File(self.path) as file:
                obs, var = read_elem(file["obs"]), read_elem(file["var"])
                layers = list(file["layers"]) if "layers" in file else []
        except (OSError, KeyError, ValueError) as error:
            raise PerturbZooError(f"{self.path}: cannot be read as h5ad: {error}") from error
        missing = [f"obs['{name}']" for name in ("condition", "context", "category", "n_cells") if name not in obs]
        missing += [] if "predicted" in layers else ["layers['predicted']"]
        if missing:
            raise PerturbZooError(f"{self.path} lacks {', '.join(missing)}; test again with this version of perturbzoo")
        labels = obs[["condition", "context", "category"]].astype(str)
        self.conditions = labels.assign(n_cells=obs["n_cells"].to_numpy(dtype=int)).reset_index(drop=True)
        self.genes = [str(name) for name in var.index]
        self.floors = [name.removeprefix(FLOOR_LAYER) for name in layers if name.startswith(FLOOR_LAYER)]
        self.has_error = "observed_error" in layers

    def read(self, element: str, rows: NDArray[np.intp], genes: list[str]) -> Array:
        """Some rows of a matrix, with these genes in this order."""
        order = np.argsort(rows, kind="stable")
        with h5py.File(self.path) as file:
            stored = file[element]
            # HDF5 wants rising row numbers; a sparse matrix is read whole
            found = read_elem(stored)[rows] if isinstance(stored, h5py.Group) else stored[rows[order]][np.argsort(order)]
        values = np.asarray(found.todense() if hasattr(found, "todense") else found, dtype=np.float64)
        return values if genes == self.genes else values[:, pd.Index(self.genes).get_indexer(genes)]


def _keys(table: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(table[["condition", "context"]])


def _spread(conditions: pd.DataFrame, scores: pd.DataFrame, metric: str, room: int) -> NDArray[np.intp]:
    """Rows to show, in the order of the file: all of them, or `room` evenly spread over their scores."""
    if len(conditions) <= room:
        return np.arange(len(conditions))
    order = np.arange(len(conditions))
    if metric in scores:
        values = scores.drop_duplicates(KEYS).set_index(KEYS)[metric]
        order = np.argsort(values.reindex(pd.MultiIndex.from_frame(conditions[KEYS])).to_numpy(), kind="stable")
    return np.sort(order[np.linspace(0, len(order) - 1, room).astype(int)])


def choose_genes(deltas: Deltas, targets: Sequence[Sequence[str]]) -> list[NDArray[np.intp]]:
    """For each condition the genes to plot: the largest changes, the targets, and a sample of the others."""
    n_genes = len(deltas.genes)
    if n_genes <= N_GENES:
        return [np.arange(n_genes)] * len(deltas.observed)
    place = {name: position for position, name in enumerate(deltas.genes)}
    largest = np.argsort(-np.abs(np.nan_to_num(deltas.observed)), axis=1, kind="stable")[:, : N_GENES // 3]
    first = next(iter(deltas.predicted.values()))
    foreseen = np.argsort(-np.abs(np.nan_to_num(first)), axis=1, kind="stable")[:, : N_GENES // 6]
    sample = np.random.default_rng(0).permutation(n_genes)
    chosen = []
    for row, names in enumerate(targets):
        own = [place[name] for name in names if name in place]
        order = np.concatenate([np.array(own, dtype=int), largest[row], foreseen[row], sample])
        _, at = np.unique(order, return_index=True)
        chosen.append(np.sort(order[np.sort(at)][:N_GENES]))
    return chosen


def choose_heat_map(deltas: Deltas) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and genes of the heat map.

    Conditions evenly spread over the list; of the genes among the top 20 of any of them by |change| / standard error (by |change| where
    there is no error), those with the largest change in all of them together. Alike rows, and alike genes, lie beside each other.
    """
    from perturbzoo.plotting.effects import alike_together

    rows = np.unique(np.linspace(0, len(deltas.observed) - 1, N_ROWS).astype(int))
    change = np.abs(np.nan_to_num(deltas.observed[rows]))
    strength = change
    if deltas.error is not None:
        error = deltas.error[rows]
        strength = np.divide(change, error, out=np.zeros_like(change), where=error > 0)
    top = np.argsort(-strength, axis=1, kind="stable")[:, :TOP]
    weight = np.zeros_like(change)
    np.put_along_axis(weight, top, np.take_along_axis(change, top, axis=1), axis=1)
    total = weight.sum(axis=0)
    genes = np.argsort(-total, kind="stable")[:N_COLUMNS]
    genes = np.sort(genes[total[genes] > 0])
    shown = np.nan_to_num(deltas.observed[np.ix_(rows, genes)])
    return rows[alike_together(shown)], genes[alike_together(shown.T)]


def as_integers(values: Array, scale: int = 10_000) -> list[Any]:
    """Numbers as whole multiples of 1 / `scale`, None for NaN: half the length in the page."""
    finite = np.isfinite(values)
    whole = np.where(finite, np.rint(np.where(finite, values, 0) * scale), 0).astype(np.int64)
    if finite.all():
        return whole.tolist()
    gaps = whole.astype(object)
    gaps[~finite] = None
    return gaps.tolist()
