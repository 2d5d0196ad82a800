"""Predictions as cells of whole counts, for :func:`perturbzoo.prediction.predict` and :func:`~perturbzoo.prediction.write_predictions`.

Every predicted cell has the size of a matched control cell. What is drawn at that size depends on the model:

* a likelihood of counts of its own (CPA): that, at rates scaled gene by gene so that the pair's pseudobulk is the one it predicts;
* cells that are moved one by one, with their noise (CellOT, FlowMatching, Transformer): the moved cell, rounded by chance;
* a mean for each condition and context (all others): negative binomials that have this mean, with dispersions fitted to the matched control
  cells given.

Cells are drawn in pieces of one pair, seeded by the pair and the piece: neither other conditions nor their order, nor an interruption,
changes a number.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from perturbzoo.counts.dispersion import count_moments, fit_dispersion
from perturbzoo.counts.drawing import draw_counts, round_cells
from perturbzoo.counts.parts import Parts, digest
from perturbzoo.counts.rates import RateTable
from perturbzoo.data.h5ad_writer import new_h5ad
from perturbzoo.data.query import QueryCells
from perturbzoo.data.reading import expand_path
from perturbzoo.data.requests import Conditions
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.likelihood import expected_log1p
from perturbzoo.prediction import Plan, alike, averages, make_plan, provenance, run

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbzoo.models.base import PerturbationModel

Way = Literal["likelihood", "moved cells", "fitted"]
_FORMAT = 2  # of the draws: another number where the same request gives other counts
_FEW_CONTROLS = 20  # contexts of fewer control cells take the dispersions of all contexts
_SOLVED = 48  # cells of a piece on which the rates of a likelihood are scaled
_STEPS = 12
_PIECE_VALUES = 1 << 22  # cells x genes of a piece, and of a part
_MEANS = 8  # pairs whose means are predicted at a time

SOURCES = {
    "likelihood": "the model's likelihood",
    "moved cells": "control cells moved one by one",
    "fitted": "fitted to the matched control cells",
}


@dataclass
class Piece:
    """Consecutive rows of a plan, all of one request; `number` counts the pieces of that request."""

    request: int
    number: int
    rows: slice


def predict_counts(
    model: PerturbationModel,
    controls: AnnData | str | os.PathLike[str],
    conditions: Conditions,
    n_cells: int | None,
    seed: int,
) -> AnnData:
    """:func:`perturbzoo.prediction.predict` with ``as_counts``: the same numbers as :func:`write_counts`, in memory."""
    adata, plan, parts = _start(model, controls, conditions, n_cells, seed)
    drawn = [block for _, block in _draw(model, plan, parts, range(len(parts)), seed)]
    adata.X = sparse.vstack(drawn, format="csr").astype(np.float32)
    return adata


def write_counts(
    model: PerturbationModel,
    controls: AnnData | str | os.PathLike[str],
    conditions: Conditions,
    output: str | os.PathLike[str],
    n_cells: int | None,
    seed: int,
) -> Path:
    """:func:`perturbzoo.prediction.write_predictions` with ``as_counts``."""
    file = expand_path(output)
    with new_h5ad(output) as writer:
        adata, plan, parts = _start(model, controls, conditions, n_cells, seed)
        kept = Parts(file, _request(model, plan, seed), len(parts), adata.n_vars)
        try:
            for number, block in _draw(model, plan, parts, kept.missing, seed):
                kept.put(number, block)
            writer.start(adata)
            writer.start_csr(sum(map(kept.n_values, range(len(parts)))))
            for number in range(len(parts)):
                writer.append_csr(kept.get(number))
        except BaseException:
            kept.release()
            raise
    kept.remove()
    return file


def _start(
    model: PerturbationModel,
    controls: AnnData | str | os.PathLike[str],
    conditions: Conditions,
    n_cells: int | None,
    seed: int,
) -> tuple[AnnData, Plan, list[list[Piece]]]:
    """The result without its counts, what is to be predicted, and in which parts."""
    from anndata import AnnData

    spec = model.get_spec()
    if spec.depth <= 0:
        raise PerturbZooError(
            f"this {type(model).__name__} was trained on log1p values, which do not say how many counts a cell has: predict as "
            "log1p, or train on raw counts"
        )
    plan = make_plan(model, controls, conditions, n_cells, seed)
    made = provenance(model, seed, "counts") | {"dispersion": SOURCES[_way(model)]}
    var = pd.DataFrame(index=pd.Index(spec.genes))
    adata = AnnData(obs=_obs(plan, spec.size_factor_key or "size_factor"), var=var, uns={"perturbzoo": made})
    return adata, plan, _parts(plan)


def _way(model: PerturbationModel) -> Way:
    if alike(model):
        return "fitted"
    if model.has_count_likelihood:
        return "likelihood"
    return "moved cells" if model.keeps_cell_noise else "fitted"


def _obs(plan: Plan, size_key: str) -> pd.DataFrame:
    """The plan's obs, each cell's size, and the two columns that cell-eval2 and the Virtual Cell Challenge ask for."""
    obs = plan.obs()
    if size_key not in obs:
        obs[size_key] = plan.query.size_factor[plan.cell]
    if "target_gene" not in obs:
        targets = ["+".join(act.target for act in condition) or "non-targeting" for condition, _ in plan.requests]
        obs["target_gene"] = pd.Categorical(np.array(targets, dtype=object)[plan.request])
    if "context" not in obs:
        labels = [plan.query.labels()[context] or "all" for _, context in plan.requests]
        obs["context"] = pd.Categorical(np.array(labels, dtype=object)[plan.request])
    return obs


def _parts(plan: Plan) -> list[list[Piece]]:
    """Pieces of a few million values, together of about as many where pairs are small."""
    n_genes = len(plan.query.fill)
    height = max(1, _PIECE_VALUES // n_genes)
    ends = np.cumsum(np.bincount(plan.request, minlength=len(plan.requests)))
    parts: list[list[Piece]] = []
    room = 0
    for request, (first, last) in enumerate(zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)):
        for number, start in enumerate(range(int(first), int(last), height)):
            piece = Piece(request, number, slice(start, min(start + height, int(last))))
            rows = piece.rows.stop - start
            if rows > room:
                parts.append([])
                room = height
            parts[-1].append(piece)
            room -= rows
    return parts


def _request(model: PerturbationModel, plan: Plan, seed: int) -> str:
    """Hash of everything that the counts depend on."""
    spec, query = model.get_spec(), plan.query
    cells = (query.values.data, query.values.indices, query.values.indptr, query.fill, query.size_factor, query.covariate)
    asked = [(str(condition), query.labels()[context]) for condition, context in plan.requests]
    known = (
        type(model).__name__,
        {k: str(v) for k, v in model.hparams.items()},
        model.state_dict(),
        model.prepared,
        spec.sha256,
    )
    names = tuple(query.obs.index), plan.request, plan.cell
    return digest(_FORMAT, _PIECE_VALUES, seed, asked, known, cells, names)


def _generator(model: PerturbationModel, plan: Plan, piece: Piece, seed: int) -> np.random.Generator:
    condition, context = plan.requests[piece.request]
    name = f"{condition.with_defaults(model.get_spec().default_kind)} in {plan.query.labels()[context]}"
    words = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), dtype=np.uint32)
    return np.random.default_rng([seed, *words.tolist(), piece.number])


def _draw(
    model: PerturbationModel, plan: Plan, parts: list[list[Piece]], wanted: range | list[int], seed: int
) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Draw the wanted parts, in order."""
    pieces = [piece for number in wanted for piece in parts[number]]
    drawn = _fitted(model, plan, pieces, seed) if _way(model) == "fitted" else _by_cell(model, plan, pieces, seed)
    for number in wanted:
        yield number, sparse.vstack([next(drawn) for _ in parts[number]], format="csr")


def _fitted(model: PerturbationModel, plan: Plan, pieces: list[Piece], seed: int) -> Iterator[sparse.csr_matrix]:
    """Negative binomials at the mean of each request."""
    query = plan.query
    used = {plan.requests[piece.request][1] for piece in pieces}
    tables = _rate_tables(query, model.get_spec().depth, used)
    rates: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    wanted = sorted({piece.request for piece in pieces})
    means = _means(model, plan, wanted)
    for piece in pieces:
        while piece.request not in rates:
            rates = {}
            for request, mean in next(means):
                table, total = tables[plan.requests[request][1]]
                shift = table.shift(mean, total)
                rates[request] = table.rates(mean, shift), table.theta(shift)
        rate, theta = rates[piece.request]
        size = query.size_factor[plan.cell[piece.rows]]
        yield draw_counts(size[:, None] * rate, theta, _generator(model, plan, piece, seed))


def _means(model: PerturbationModel, plan: Plan, wanted: list[int]) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Predicted mean of each request, ``(G,)`` log1p-normalised: its context's control mean and its mean change."""
    control = plan.query.control_mean
    if alike(model):
        blocks = [slice(request, request + 1) for request in wanted]
        averaged = plan.averaged()
        together: list[tuple[int, np.ndarray]] = []
        for rows, values in run(model, averaged, blocks):
            together.append((rows.start, values["X"][0]))
            if len(together) == _MEANS:
                yield together
                together = []
        if together:
            yield together
        return
    for _, values in averages(model, plan):
        yield [(r, control[plan.requests[r][1]] + values["delta"][r]) for r in wanted]


def _rate_tables(query: QueryCells, depth: float, used: set[int]) -> dict[int, tuple[RateTable, float]]:
    """For each context: dispersions of its control cells and the rates that give a mean at their sizes; what the rates sum to.

    That is 1 where sizes are totals of these genes, and the controls' share where they are of more.
    """
    cells = {context: query.cells_of(context) for context in used}
    pooled = None
    tables = {}
    for context in sorted(used):
        rate = np.expm1(query.control_mean[context].astype(np.float64)) / depth
        moments = count_moments(query.values, query.size_factor, depth, cells[context])
        if len(cells[context]) >= _FEW_CONTROLS:
            phi = fit_dispersion(moments, rate)
        else:
            if pooled is None:
                everything = np.arange(query.values.shape[0])
                pooled = fit_dispersion(count_moments(query.values, query.size_factor, depth, everything), rate)
            phi = pooled
        table = RateTable(query.size_factor[cells[context]], depth, phi)
        tables[context] = table, float(moments.count.sum() / moments.size)
    return tables


def _by_cell(model: PerturbationModel, plan: Plan, pieces: list[Piece], seed: int) -> Iterator[sparse.csr_matrix]:
    """Moved cells, rounded by chance; or the model's own likelihood."""
    query, depth = plan.query, model.get_spec().depth
    own = _way(model) == "likelihood"
    for piece, (rows, values) in zip(pieces, run(model, plan, [piece.rows for piece in pieces], likelihood=own), strict=True):
        size, generator = query.size_factor[plan.cell[rows]], _generator(model, plan, piece, seed)
        if not own:
            yield round_cells(values["X"], size, depth, generator)
            continue
        context = plan.requests[piece.request][1]
        target = query.control_mean[context] + values["delta"].mean(axis=0, dtype=np.float64)
        factor = _scale_likelihood(values["counts"], values["theta"], values.get("zero"), size, depth, target)
        yield draw_counts(values["counts"] * factor, values["theta"].astype(np.float64), generator, values.get("zero"))


def _scale_likelihood(
    counts: np.ndarray, theta: np.ndarray, zero: np.ndarray | None, size: np.ndarray, depth: float, target: np.ndarray
) -> np.ndarray:
    """Factors ``(G,)`` on expected counts ``(B, G)`` at which the mean over cells of E[log1p-normalised] is `target` ``(G,)``.

    Newton's method on the logarithm of the factor, on cells of evenly spaced sizes: their expectations vary smoothly.
    """
    order = np.argsort(size, kind="stable")
    some = order[np.unique(np.linspace(0, len(order) - 1, min(_SOLVED, len(order))).round().astype(int))]
    mean, scale = torch.from_numpy(counts[some]).double(), torch.from_numpy(depth / size[some]).double()
    stays = 1.0 if zero is None else 1 - torch.from_numpy(zero[some]).double()
    dispersion = torch.from_numpy(theta).double()
    wanted = torch.from_numpy(np.maximum(target, 0.0))
    log_factor = torch.zeros(len(target), dtype=torch.float64)
    open_ = wanted > 1e-9
    for _ in range(_STEPS):
        with torch.inference_mode(False), torch.enable_grad():
            at = log_factor.clone().requires_grad_()
            reached = (stays * expected_log1p(mean.clone() * at.exp(), dispersion.clone(), scale.clone())).mean(dim=0)
            (slope,) = torch.autograd.grad(reached.sum(), at)
        # on logs of both sides, on which the relation is nearly a line
        gap = wanted.clamp(min=1e-9).log() - reached.detach().clamp(min=1e-12).log()
        step = gap * reached.detach() / slope.clamp(min=1e-12)
        log_factor = torch.where(open_, (log_factor + step.clamp(-3, 3)).clamp(-15, 15), log_factor)
        if float((gap.abs() * wanted * open_).max()) < 1e-5:
            break
    return np.where(open_.numpy(), log_factor.exp().numpy(), 0.0)
