"""Predicting what perturbations nobody measured would do: from control cells and conditions to an AnnData or an h5ad file.

Both ways read cells through the model's own :class:`~perturbzoo.data.spec.DataSpec` and run the same chunks, so they give the
same numbers; the file is written as it is predicted and takes its name only when it is whole.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import perturbzoo
from perturbzoo.data.batch import ConditionTable, PerturbationBatch, encode_conditions
from perturbzoo.data.h5ad_writer import new_h5ad
from perturbzoo.data.query import QueryCells, read_query
from perturbzoo.data.reading import expand_path
from perturbzoo.data.requests import Conditions, read_conditions
from perturbzoo.data.source import BufferPool, CSRSource
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened
from perturbzoo.perturbation import Condition

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbzoo.models.base import PerturbationModel

_CHUNK_VALUES = 1 << 22  # cells x genes predicted and written at a time
_REQUESTS = 8  # changes computed at a time where cells change alike


@dataclass
class Plan:
    """What will be predicted: N rows, each a control cell (or a context's mean) under a condition.

    Attributes
    ----------
    query
        The control cells, read the model's way.
    requests
        Distinct (condition, context of the query) pairs, in the order of the output.
    request, cell
        Shape ``(N,)``, int64: each row's position in `requests`, and its row of `query`.
    """

    query: QueryCells
    requests: list[tuple[Condition, int]]
    request: np.ndarray
    cell: np.ndarray

    def __len__(self) -> int:
        return len(self.cell)

    @property
    def rows_at_a_time(self) -> int:
        """How many rows are predicted and written at a time."""
        return max(1, min(len(self), _CHUNK_VALUES // len(self.query.fill)))

    def averaged(self) -> Plan:
        """The plan of one row for each request, in which the mean of a context's cells stands for them."""
        context = np.array([context for _, context in self.requests])
        return Plan(self.query.averaged(), self.requests, np.arange(len(context)), context)

    def obs(self) -> pd.DataFrame:
        """Condition, covariates and control cell of each row."""
        names = pd.Categorical([str(condition) for condition, _ in self.requests])
        obs = self.query.obs.iloc[self.cell].reset_index(drop=True)
        obs.insert(0, "condition", pd.Series(names[self.request]))
        obs["control_cell"] = pd.Categorical.from_codes(self.cell, self.query.obs.index)
        return obs.set_axis("predicted_" + obs.index.astype(str))


def make_plan(
    model: PerturbationModel,
    controls: AnnData | str | os.PathLike[str],
    conditions: Conditions,
    n_cells: int | None,
    seed: int,
) -> Plan:
    """Read the control cells and decide which of them to predict under which condition.

    Parameters are those of :func:`predict`.
    """
    if n_cells is not None and n_cells < 1:
        raise PerturbZooError(f"n_cells is {n_cells}: give 1 or more, or leave it out for every control cell")
    if seed < 0:
        raise PerturbZooError(f"seed is {seed}: give 0 or more")
    spec, data = model.get_spec(), model.data_arguments
    wanted = read_conditions(conditions, data.get("separator"), data.get("control_labels") or ())
    if not wanted:
        raise PerturbZooError("conditions: none given; write them as 'KLF1+CEBPA,SET'")
    _check_conditions(model, [condition for condition, _ in wanted])
    query = read_query(controls, spec, data)
    # the same condition spelled in two ways is one
    requests: dict[tuple[Condition, int], tuple[Condition, int]] = {}
    twice = []
    for condition, covariates in wanted:
        found = {(condition.with_defaults(spec.default_kind), at): (condition, at) for at in query.contexts_with(covariates)}
        if found.keys() <= requests.keys():
            twice.append(str(condition))
        requests |= {key: request for key, request in found.items() if key not in requests}
    if twice:
        message = f"conditions: {shortened(twice)} named more than once, predicted once"
        warnings.warn(message, PerturbZooWarning, stacklevel=4)
    used = sorted({context for _, context in requests.values()})
    pools = {context: query.cells_of(context) for context in used}
    if n_cells is not None:
        _draw(pools, n_cells, query, seed)
    cells = [pools[context] for _, context in requests.values()]
    request = np.repeat(np.arange(len(cells)), [len(rows) for rows in cells])
    return Plan(query, list(requests.values()), request, np.concatenate(cells))


def _draw(pools: dict[int, np.ndarray], n_cells: int, query: QueryCells, seed: int) -> None:
    """Draw cells of each context: the same for every condition, so that conditions differ by what was done alone."""
    for context, pool in pools.items():
        if len(pool) < n_cells:
            label = f" of {query.labels()[context]}" if query.match_on else ""
            message = f"there are {len(pool)} control cells{label}, fewer than n_cells {n_cells}: some are predicted repeatedly"
            warnings.warn(message, PerturbZooWarning, stacklevel=5)
        # with replacement only where there are too few: the same cell twice tells nothing new
        generator = np.random.default_rng([seed, context])
        pools[context] = generator.choice(pool, n_cells, replace=len(pool) < n_cells)


def _check_conditions(model: PerturbationModel, conditions: Sequence[Condition]) -> None:
    """Refuse unknown targets before anything is read, and say which settings the model cannot follow."""
    encode_conditions(conditions, [0] * len(conditions), model.target_names, model.get_spec().default_kind)
    dosed = [str(c) for c in conditions if any(act.dose not in (0, 1) for act in c)]
    if dosed and not model.handles_dose:
        message = (
            f"{type(model).__name__} has no doses as it is set up: {shortened(dosed)} are predicted as at any dose above 0"
        )
        warnings.warn(message, PerturbZooWarning, stacklevel=4)
    timed = [str(c) for c in conditions if any(act.onset != 0 or np.isfinite(act.offset) for act in c)]
    if timed and not model.handles_time:
        message = f"{type(model).__name__} has no time: the windows of {shortened(timed)} are ignored"
        warnings.warn(message, PerturbZooWarning, stacklevel=4)


def alike(model: PerturbationModel) -> bool:
    """Whether changes can be computed for conditions and not for cells."""
    return model.changes_cells_alike and not model.differentiates_in_forward


Rows = tuple[slice, dict[str, np.ndarray]]


def run(
    model: PerturbationModel, plan: Plan, blocks: Sequence[slice] | None = None, *, likelihood: bool = False
) -> Iterator[Rows]:
    """Predict the plan's rows in order, a bounded number at a time.

    Parameters
    ----------
    blocks
        Which rows at a time; all of them in blocks of :attr:`Plan.rows_at_a_time` if None.
    likelihood
        Also yield the model's own likelihood of counts (:class:`perturbzoo.models.likelihood.CountLikelihood`).

    Yields
    ------
    rows
        Which rows of the plan these are.
    values
        ``(B, G)`` float32 each: ``X``, ``delta``, the change from the control, and its standard error ``std`` where the
        model has one; ``counts``, ``theta`` ``(G,)`` and perhaps ``zero`` of the likelihood.
    """
    from rich.console import Console
    from rich.progress import track

    spec, query = model.get_spec(), plan.query
    context = np.array([context for _, context in plan.requests])
    table = encode_conditions(
        [condition for condition, _ in plan.requests],
        query.known_context[context].tolist(),
        model.target_names,
        spec.default_kind,
    )
    context_control = torch.from_numpy(query.control_mean[context])
    change = _changes(model, table, context_control) if alike(model) else None
    source, pool = CSRSource(query.values), BufferPool(spec.n_genes)
    was_training = model.training
    model.eval()
    try:
        if blocks is None:
            step = plan.rows_at_a_time
            blocks = [slice(start, min(start + step, len(plan))) for start in range(0, len(plan), step)]
        console = Console(stderr=True)
        quiet = len(blocks) < 3 or not console.is_terminal
        for rows in track(blocks, "predicting", console=console, disable=quiet):
            cells = plan.cell[rows]
            requests, row = np.unique(plan.request[rows], return_inverse=True)
            control = pool.take(len(cells))
            source.gather(cells, control)
            control += query.fill
            if change is not None:
                values = {name: value[row] for name, value in change(requests).items()}
                values["X"] = np.add(values["delta"], control)
            else:
                size_factor = torch.as_tensor(query.size_factor[cells], dtype=torch.float32)
                batch = PerturbationBatch(
                    expression=None,
                    control=torch.from_numpy(control),
                    row=torch.from_numpy(row),
                    table=table.select(torch.from_numpy(requests)),
                    context_control=context_control[requests],
                    size_factor=size_factor,
                    control_size_factor=size_factor,
                    covariates=torch.from_numpy(query.covariate[cells]),
                    cell=torch.from_numpy(cells),
                    control_cell=torch.from_numpy(cells),
                    depth=spec.depth,
                )
                with torch.inference_mode():
                    batch = batch.to(model.device)
                    prediction = model.evaluate(batch)
                    own = model.count_likelihood(batch) if likelihood else None
                values = _numpy(prediction.mean, prediction.variance, "X")
                values["delta"] = values["X"] - control
                if own is not None:
                    parts = {"counts": own.mean, "theta": own.theta, "zero": own.zero}
                    values |= {name: value.float().cpu().numpy() for name, value in parts.items() if value is not None}
                # this frame must not keep the buffer in use while the next chunk is gathered
                del batch, prediction, own
            yield rows, values
            del control, values
    finally:
        model.train(was_training)


def _numpy(mean: Tensor, variance: Tensor | None, name: str) -> dict[str, np.ndarray]:
    values = {name: mean.float().cpu().numpy()}
    if variance is not None:
        values["std"] = variance.float().sqrt().cpu().numpy()
    return values


def _changes(
    model: PerturbationModel, table: ConditionTable, context_control: Tensor
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The changes ``(C, G)`` of consecutive requests, each computed once however many cells it is predicted for."""

    @functools.lru_cache(maxsize=1)  # consecutive chunks share one block at most
    def of_block(number: int) -> dict[str, np.ndarray]:
        rows = torch.arange(number * _REQUESTS, min((number + 1) * _REQUESTS, len(table)))
        with torch.inference_mode():
            delta, variance = model.delta(table.select(rows).to(model.device), context_control[rows].to(model.device))
        return _numpy(delta, None if variance is None else variance * model.variance_scale, "delta")

    def of(requests: np.ndarray) -> dict[str, np.ndarray]:
        first, last = int(requests[0]) // _REQUESTS, int(requests[-1]) // _REQUESTS
        blocks = [of_block(number) for number in range(first, last + 1)]
        return {name: np.concatenate([block[name] for block in blocks])[requests - first * _REQUESTS] for name in blocks[0]}

    return of


def averages(model: PerturbationModel, plan: Plan) -> Iterator[Rows]:
    """Predict the plan's rows and yield their mean for each request, all at once."""
    size = np.bincount(plan.request)[:, None]
    sums: dict[str, np.ndarray] = {}
    for rows, values in run(model, plan):
        requests, first = np.unique(plan.request[rows], return_index=True)
        for name, block in values.items():
            if name not in sums:
                sums[name] = np.zeros((len(size), block.shape[1]))
            sums[name][requests] += np.add.reduceat(block, first, axis=0, dtype=np.float64)
    yield slice(0, len(size)), {name: (total / size).astype(np.float32) for name, total in sums.items()}


def _start(
    model: PerturbationModel,
    controls: AnnData | str | os.PathLike[str],
    conditions: Conditions,
    n_cells: int | None,
    pseudobulk: bool,
    seed: int,
) -> tuple[AnnData, Iterator[Rows]]:
    """The result without its matrices, and their rows, which are not computed yet."""
    from anndata import AnnData

    if n_cells is not None and pseudobulk:
        raise PerturbZooError("n_cells and pseudobulk exclude each other: a pseudobulk is made of every control cell")
    plan = make_plan(model, controls, conditions, n_cells, seed)
    rows = run(model, plan)
    if pseudobulk:
        cells, plan = plan, plan.averaged()
        # where cells change alike, the prediction of their mean is the mean of their predictions
        rows = run(model, plan) if alike(model) else averages(model, cells)
    var = pd.DataFrame(index=pd.Index(model.get_spec().genes))
    uns = {"perturbzoo": provenance(model, seed, "log1p-normalised")}
    return AnnData(obs=plan.obs(), var=var, uns=uns), rows


def provenance(model: PerturbationModel, seed: int, value_space: str) -> dict[str, str | float]:
    """Where predictions came from, for ``uns["perturbzoo"]``."""
    spec = model.get_spec()
    return {
        "model": type(model).__name__,
        "version": perturbzoo.__version__,
        "data_hash": spec.sha256,
        "value_space": value_space,
        "depth": spec.depth,
        "seed": seed,
    }


def predict(
    model: PerturbationModel,
    controls: AnnData | str | os.PathLike[str],
    conditions: Conditions,
    *,
    n_cells: int | None = None,
    pseudobulk: bool = False,
    as_counts: bool = False,
    seed: int = 0,
) -> AnnData:
    """Predict the expression of control cells under conditions, measured or not.

    Parameters
    ----------
    model
        A trained model (:func:`perturbzoo.load`).
    controls
        Control cells, or a whole screen, of which the control cells are used: an AnnData or an h5ad file.
    conditions
        ``"KLF1+CEBPA,SET"``, a list of such strings, the path of a CSV file with a column ``condition`` (and ``dose``, and
        covariates that say in which contexts to predict), or such a table. A condition is predicted once, however often it
        is named.
    n_cells
        Control cells in each context, drawn with `seed`, the same for every condition; None for all of them.
    pseudobulk
        Predict one mean profile for each condition and context instead of cells.
    as_counts
        Draw cells of whole counts, CSR, in place of expected expression; see :mod:`perturbzoo.counts.prediction`.
    seed
        Seed of the draws.

    Returns
    -------
    AnnData with ``X`` the predicted log1p-normalised expression, layer ``delta`` the change from each control, layer
    ``std`` its standard error where the model has one, ``obs`` the condition, the covariates and the control cell that was
    predicted from, ``uns["perturbzoo"]`` where it came from (``data_hash`` is the SHA-256 of the model's data spec). It is
    held in memory; :func:`write_predictions` streams to a file.

    Raises
    ------
    PerturbZooError
        An unknown target or covariate level, no control cells, no common genes; see also
        :func:`perturbzoo.data.query.read_query`.
    """
    if as_counts:
        from perturbzoo.counts.prediction import predict_counts

        _refuse_counts_of_means(pseudobulk)
        return predict_counts(model, controls, conditions, n_cells, seed)
    adata, chunks = _start(model, controls, conditions, n_cells, pseudobulk, seed)
    arrays: dict[str, np.ndarray] = {}
    for rows, values in chunks:
        for name, block in values.items():
            if name not in arrays:
                arrays[name] = np.empty(adata.shape, dtype=np.float32)
            arrays[name][rows] = block
    adata.X = arrays.pop("X")
    adata.layers.update(arrays)
    return adata


def write_predictions(
    model: PerturbationModel,
    controls: AnnData | str | os.PathLike[str],
    conditions: Conditions,
    output: str | os.PathLike[str],
    *,
    n_cells: int | None = None,
    pseudobulk: bool = False,
    as_counts: bool = False,
    seed: int = 0,
) -> Path:
    """Predict as :func:`predict` does and write the same numbers to an h5ad file, chunk by chunk.

    The file appears under its name when it is whole; on any failure nothing is left behind, and what had that name before
    stays as it was. ``X`` is stored as it is, the layers compressed. Counts are CSR, compressed; what an interrupted run has drawn of
    them is kept beside the output, and the same call goes on from there.

    Parameters
    ----------
    output
        The h5ad file; its folder must exist.

    Returns
    -------
    The path written.

    Raises
    ------
    PerturbZooError
        As :func:`predict`, and where the folder cannot be written or the disk is full.
    """
    if as_counts:
        from perturbzoo.counts.prediction import write_counts

        _refuse_counts_of_means(pseudobulk)
        return write_counts(model, controls, conditions, output, n_cells, seed)
    with new_h5ad(output) as writer:
        adata, chunks = _start(model, controls, conditions, n_cells, pseudobulk, seed)
        writer.start(adata)
        for rows, values in chunks:
            for name, block in values.items():
                writer.put(name, rows, block)
    return expand_path(output)


def _refuse_counts_of_means(pseudobulk: bool) -> None:
    if pseudobulk:
        raise PerturbZooError("counts and pseudobulk exclude each other: counts are of cells, a pseudobulk is their mean")
