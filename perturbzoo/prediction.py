"""Predicting what perturbations nobody measured would do: from control cells and conditions to an AnnData or an h5ad file.

Both ways read cells through the model's own :class:`~perturbzoo.data.spec.DataSpec` and run the same chunks, so they give the
same numbers; the file is written as it is predicted and takes its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

import perturbzoo
from perturbzoo.data.batch import PerturbationBatch, encode_conditions
from perturbzoo.data.query import QueryCells, read_query
from perturbzoo.data.source import BufferPool, CSRSource
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened
from perturbzoo.perturbation import Condition, parse_condition, parse_condition_list

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbzoo.models.base import PerturbationModel

_CHUNK_VALUES = 1 << 23  # cells x genes predicted at a time

ConditionsArgument = str | Condition | Sequence[str | Condition] | pd.DataFrame


@dataclass
class Plan:
    """What will be predicted: N rows, each a control cell (or a context's mean) under a condition.

    Attributes
    ----------
    query
        The control cells, read the model's way.
    requests
        (condition, context of the query) pairs, in the order of the output.
    cells
        For each request the rows of `query` to predict, ``(n,)`` int64; a single -1 for the context's mean.
    """

    query: QueryCells
    requests: list[tuple[Condition, int]]
    cells: list[np.ndarray]

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.cells)


@dataclass
class Chunk:
    """Predictions of consecutive rows of the plan, ``(B, G)`` float32 each: mean, its change from the control, its error."""

    start: int
    mean: np.ndarray
    delta: np.ndarray
    std: np.ndarray | None


def read_conditions(conditions: ConditionsArgument) -> tuple[list[Condition], pd.DataFrame]:
    """Read conditions from ``"A+B,C"``, a list, a table, or the path of a CSV file.

    A table has a column ``condition``, maybe ``dose``, and any covariates of the model.

    Returns
    -------
    conditions
        One per row.
    covariates
        The table's other columns, as text; no columns where only conditions were given.
    """
    if isinstance(conditions, str) and conditions.lower().endswith((".csv", ".tsv")):
        file = Path(os.path.expandvars(conditions))
        if not file.is_file():
            raise PerturbZooError(f"conditions: {file}: no such file")
        conditions = pd.read_csv(file, sep="\t" if file.suffix == ".tsv" else ",", dtype=str)
    if isinstance(conditions, pd.DataFrame):
        table = conditions.astype(str)
        if "condition" not in table.columns:
            raise PerturbZooError(f"conditions: the table has no column 'condition'; it has {shortened(table.columns)}")
        doses = table["dose"] if "dose" in table.columns else [None] * len(table)
        parsed = [parse_condition(text, dose=dose) for text, dose in zip(table["condition"], doses, strict=True)]
        return parsed, table.drop(columns=["condition", "dose"], errors="ignore").reset_index(drop=True)
    if isinstance(conditions, str):
        parsed = parse_condition_list(conditions)
    elif isinstance(conditions, Condition):
        parsed = [conditions]
    else:
        parsed = [item if isinstance(item, Condition) else parse_condition(item) for item in conditions]
    return parsed, pd.DataFrame(index=range(len(parsed)))


def make_plan(
    model: PerturbationModel,
    controls: AnnData | str,
    conditions: ConditionsArgument,
    n_cells: int | None = None,
    pseudobulk: bool = False,
    seed: int = 0,
) -> Plan:
    """Read the control cells and decide which of them to predict under which condition.

    Parameters are those of :func:`predict`.
    """
    if n_cells is not None and n_cells < 1:
        raise PerturbZooError(f"n_cells is {n_cells}: give 1 or more, or leave it out for every control cell")
    parsed, covariates = read_conditions(conditions)
    if not parsed:
        raise PerturbZooError("conditions: none given; write them as 'KLF1+CEBPA,SET'")
    query = read_query(controls, model.get_spec())
    requests: list[tuple[Condition, int]] = []
    for position, condition in enumerate(parsed):
        wanted = covariates.iloc[position].to_dict()
        contexts = query.contexts_with(wanted)
        if not contexts:
            raise PerturbZooError(f"condition '{condition}': no control cells with {wanted}; the query has {query.labels()}")
        requests += [(condition, context) for context in contexts]
    # refuses unknown targets before anything is computed
    encode_conditions([c for c, _ in requests], [0] * len(requests), model.target_names, model.get_spec().default_kind)
    timed = [str(c) for c, _ in requests if any(act.onset != 0 or np.isfinite(act.offset) for act in c)]
    if timed and not model.handles_time:
        warnings.warn(
            f"{type(model).__name__} has no time: the windows of {shortened(timed)} are ignored",
            PerturbZooWarning,
            stacklevel=2,
        )
    generator = np.random.default_rng(seed)
    cells = []
    for _, context in requests:
        pool = query.cells_of(context)
        if pseudobulk:
            cells.append(np.array([-1]))
        elif n_cells is None:
            cells.append(pool)
        else:
            # with replacement only where there are too few: the same cell twice tells nothing new
            cells.append(generator.choice(pool, n_cells, replace=len(pool) < n_cells))
    return Plan(query, requests, cells)


def run(model: PerturbationModel, plan: Plan) -> Iterator[Chunk]:
    """Predict the plan's rows in order, a bounded number at a time."""
    spec, query = model.get_spec(), plan.query
    request = np.repeat(np.arange(len(plan.requests)), [len(rows) for rows in plan.cells])
    cells = np.concatenate(plan.cells)
    n_context = np.array([context for _, context in plan.requests])
    known = query.known_context[n_context]  # the model's index of each request's context
    table = encode_conditions([c for c, _ in plan.requests], known.tolist(), model.target_names, spec.default_kind)
    source, pool = CSRSource(query.values), BufferPool(spec.n_genes)
    size = max(1, _CHUNK_VALUES // spec.n_genes)
    model.eval()
    for start in range(0, len(cells), size):
        rows, wanted = cells[start : start + size], request[start : start + size]
        control = pool.take(len(rows))
        distinct, row = np.unique(wanted, return_inverse=True)
        if rows[0] < 0:
            control[:] = query.control_mean[n_context[wanted]]
        else:
            source.gather(rows, control)
        size_factor = torch.as_tensor(query.size_factor[rows], dtype=torch.float32)
        batch = PerturbationBatch(
            expression=None,
            control=torch.from_numpy(control),
            row=torch.from_numpy(row),
            table=table.select(torch.from_numpy(distinct)),
            context_control=torch.as_tensor(query.control_mean[n_context[distinct]], dtype=torch.float32),
            size_factor=size_factor,
            control_size_factor=size_factor,
            covariates=torch.from_numpy(query.covariate[rows]),
            cell=torch.from_numpy(rows),
            control_cell=torch.from_numpy(rows),
            depth=spec.depth,
        )
        with torch.inference_mode():
            prediction = model.evaluate(batch.to(model.device))
        mean = prediction.mean.float().cpu().numpy()
        variance = prediction.variance
        yield Chunk(start, mean, mean - control, None if variance is None else variance.float().sqrt().cpu().numpy())
        del batch, control


def _obs(plan: Plan) -> pd.DataFrame:
    """Condition, covariates and control cell of each predicted row."""
    request = np.repeat(np.arange(len(plan.requests)), [len(rows) for rows in plan.cells])
    cells = np.concatenate(plan.cells)
    names = np.array([str(condition) for condition, _ in plan.requests])
    context = np.array([context for _, context in plan.requests])[request]
    obs = pd.DataFrame({"condition": pd.Categorical(names[request])})
    for position, name in enumerate(plan.query.match_on):
        levels = np.array([levels[position] for levels in plan.query.contexts])
        obs[name] = pd.Categorical(levels[context])
    averaged = cells < 0
    obs["control_cell"] = np.where(averaged, "mean of controls", plan.query.names[cells])
    obs["n_control_cells"] = np.where(averaged, plan.query.cells_per_context()[context], 1)
    obs.index = pd.Index([f"predicted_{number}" for number in range(len(obs))])
    return obs


def _provenance(model: PerturbationModel, seed: int) -> dict[str, Any]:
    spec = model.get_spec().to_json()
    return {
        "model": type(model).__name__,
        "version": perturbzoo.__version__,
        "data_hash": hashlib.sha256(spec.encode()).hexdigest(),
        "value_space": "log1p-normalised",
        "depth": model.get_spec().depth,
        "seed": seed,
    }


def predict(
    model: PerturbationModel,
    controls: AnnData | str,
    conditions: ConditionsArgument,
    *,
    n_cells: int | None = None,
    pseudobulk: bool = False,
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
        covariates that say in which contexts to predict), or such a table.
    n_cells
        Control cells for each condition and context, drawn with `seed`; None for all of them.
    pseudobulk
        Predict the mean control profile of each context instead of cells.
    seed
        Seed of the draw.

    Returns
    -------
    AnnData with ``X`` the predicted log1p-normalised expression, layer ``delta`` the change from each control, layer
    ``std`` its standard error where the model has one, ``obs`` the condition and covariates, ``uns["perturbzoo"]`` where it
    came from. It is held in memory; :func:`write_predictions` streams to a file.

    Raises
    ------
    PerturbZooError
        An unknown target or covariate level, no control cells, no common genes.
    """
    import anndata

    plan = make_plan(model, controls, conditions, n_cells, pseudobulk, seed)
    chunks = list(run(model, plan))
    adata = anndata.AnnData(
        np.concatenate([chunk.mean for chunk in chunks]),
        obs=_obs(plan),
        var=pd.DataFrame(index=pd.Index(model.get_spec().genes)),
        layers={"delta": np.concatenate([chunk.delta for chunk in chunks])},
        uns={"perturbzoo": _provenance(model, seed)},
    )
    if chunks[0].std is not None:
        adata.layers["std"] = np.concatenate([chunk.std for chunk in chunks if chunk.std is not None])
    return adata


def write_predictions(
    model: PerturbationModel,
    controls: AnnData | str,
    conditions: ConditionsArgument,
    output: str | os.PathLike[str],
    *,
    n_cells: int | None = None,
    pseudobulk: bool = False,
    seed: int = 0,
) -> Path:
    """Predict as :func:`predict` does and write the same numbers to an h5ad file, chunk by chunk.

    The file appears under its name when it is whole; on any failure nothing is left behind.

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
    import anndata
    import h5py
    from rich.progress import track

    file = Path(os.path.expandvars(os.fspath(output)))
    if not file.parent.is_dir():
        raise PerturbZooError(f"{file}: the folder {file.parent} does not exist")
    if not os.access(file.parent, os.W_OK):
        raise PerturbZooError(f"{file}: the folder {file.parent} cannot be written to")
    plan = make_plan(model, controls, conditions, n_cells, pseudobulk, seed)
    genes = model.get_spec().genes
    shape = (len(plan), len(genes))
    temporary = file.with_name(f".{file.name}.part")
    try:
        # everything but the values first: a small AnnData whose X and layers are then replaced by streamed datasets
        empty = anndata.AnnData(
            sparse.csr_matrix(shape, dtype=np.float32),
            obs=_obs(plan),
            var=pd.DataFrame(index=pd.Index(genes)),
            uns={"perturbzoo": _provenance(model, seed)},
        )
        empty.write_h5ad(temporary)
        with h5py.File(temporary, "r+") as store:
            del store["X"]
            datasets: dict[str, h5py.Dataset] = {}
            steps = -(-shape[0] // max(1, _CHUNK_VALUES // shape[1]))
            for chunk in track(run(model, plan), total=steps, description="predicting", disable=steps < 3):
                arrays: Mapping[str, np.ndarray | None] = {
                    "X": chunk.mean,
                    "layers/delta": chunk.delta,
                    "layers/std": chunk.std,
                }
                for key, values in arrays.items():
                    if values is None:
                        continue
                    if key not in datasets:
                        datasets[key] = _dense_dataset(store, key, shape)
                    datasets[key][chunk.start : chunk.start + len(values)] = values
        os.replace(temporary, file)
    except OSError as error:
        raise PerturbZooError(f"{file}: could not be written: {error.strerror or str(error).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return file


def _dense_dataset(store: Any, key: str, shape: tuple[int, int]) -> Any:
    """An empty dense matrix as the h5ad format describes it."""
    rows = max(1, min(shape[0], (1 << 18) // shape[1]))
    dataset = store.create_dataset(key, shape=shape, dtype=np.float32, chunks=(rows, shape[1]))
    dataset.attrs["encoding-type"] = "array"
    dataset.attrs["encoding-version"] = "0.2.0"
    return dataset
