"""Streamed pseudobulks: sums over cells that batches and ranks add to, and the tables made of them at the end.

Called by whatever streams cells (validation, test). Knows nothing of models or of how a batch is made: it gets blocks
of cells and the number of the group each cell belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torchmetrics import Metric

from perturbzoo.evaluation.metrics import RESOLUTION, Array, largest, welch_t


@dataclass
class GroupMoments:
    """Mean and spread of each group of cells. N groups, G genes.

    Attributes
    ----------
    count
        Shape ``(N,)``: cells seen.
    mean
        Shape ``(N, G)``; NaN for a group without cells.
    variance
        Shape ``(N, G)``: unbiased; NaN for a group with fewer than two cells.
    """

    count: NDArray[np.int64]
    mean: Array
    variance: Array


@dataclass
class Pseudobulks:
    """Predicted, observed and control pseudobulks of the pairs that had cells. P rows, G genes.

    Attributes
    ----------
    pair, context
        Shape ``(P,)``: which of the pairs the sums were made for, and its row among the control profiles.
    predicted, observed, control
        Shape ``(P, G)``: `control` is the control mean of the pair's context.
    observed_variance
        Shape ``(P, G)``: unbiased over the pair's cells; NaN where there is one cell.
    count
        Shape ``(P,)``: cells.
    predicted_variance
        Shape ``(P, G)``: mean over cells of the variance the model gave with its predictions, or None.
    """

    pair: NDArray[np.int64]
    context: NDArray[np.int64]
    predicted: Array
    observed: Array
    control: Array
    observed_variance: Array
    count: NDArray[np.int64]
    predicted_variance: Array | None = None

    def __len__(self) -> int:
        return len(self.pair)

    def with_prediction(self, predicted: Array) -> Pseudobulks:
        """Return the same observations beside another prediction, shape ``(P, G)``: a baseline's, a ceiling's."""
        if predicted.shape != self.observed.shape:
            raise ValueError(f"the prediction is {predicted.shape}, the observations are {self.observed.shape}")
        return replace(self, predicted=np.asarray(predicted, dtype=np.float64), predicted_variance=None)


class _Rows(NamedTuple):
    """The groups of a batch in rising order, which of them count, and each cell's place among them."""

    groups: Tensor
    kept: Tensor
    row: Tensor


class GroupSums(Metric):
    """Sums of expression and of its square over the cells of each group.

    For the control cells of each context, or the random halves of each pair (see :func:`assign_halves`).
    The states are float64 on any device that has it, and sum-reduced over ranks. Call ``update``, not ``forward``.

    Parameters
    ----------
    n_groups, n_genes
        Number of rows N and columns G.
    """

    full_state_update = False
    observed_sum: Tensor
    observed_square_sum: Tensor
    count: Tensor

    def __init__(self, n_groups: int, n_genes: int) -> None:
        super().__init__()
        self.shape = (n_groups, n_genes)
        self._reused: Tensor | None = None
        self.add_state("count", torch.zeros(n_groups, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("observed_sum", "observed_square_sum"):
            self._add_table(name)

    def update(self, group: Tensor, observed: Tensor) -> None:
        """Add a block of cells.

        Parameters
        ----------
        group
            Shape ``(B,)``, int64: each cell's group; a cell with -1 is not counted (padding that evens out ranks).
        observed
            Shape ``(B, G)``: expression.
        """
        self._add_observed(self._count(group), observed.float())

    def compute(self) -> GroupMoments:
        """Return the moments of every group, summed over ranks."""
        count = _numpy(self.count)
        with np.errstate(divide="ignore", invalid="ignore"):
            n = count[:, None].astype(np.float64)
            mean = _numpy(self.observed_sum) / n
            variance = np.maximum(_numpy(self.observed_square_sum) - n * mean**2, 0.0) / np.where(n > 1, n - 1, np.nan)
        # The cells are float32: what is left of a constant gene is rounding, and would make a huge t statistic.
        variance[variance <= RESOLUTION * mean**2] = 0.0
        return GroupMoments(count=count, mean=mean, variance=variance)

    def _add_table(self, name: str) -> None:
        self.add_state(name, torch.zeros(self.shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _count(self, group: Tensor) -> _Rows:
        groups, row, size = group.unique(return_inverse=True, return_counts=True)
        kept = groups >= 0
        self.count.index_add_(0, groups[kept].to(self.count.device), size[kept].to(self.count.device))
        return _Rows(groups, kept, row)

    def _add_observed(self, rows: _Rows, observed: Tensor) -> None:
        self._add("observed_sum", rows, observed)
        self._add("observed_square_sum", rows, torch.mul(observed, observed, out=self._buffer(observed)))

    def _add(self, name: str, rows: _Rows, block: Tensor) -> None:
        """Add a ``(B, G)`` float32 block to the state of that name.

        Cells are summed in float32 over the few groups of the batch first, then added in float64: an ``index_add_`` of
        doubles takes ten times as long, a product with a one-hot matrix three times, and autocast would round it.
        """
        state = getattr(self, name)
        total = block.new_zeros(len(rows.groups), self.shape[1]).index_add_(0, rows.row, block)
        state.index_add_(0, rows.groups[rows.kept].to(state.device), total[rows.kept].to(state.device).double())

    def _buffer(self, block: Tensor) -> Tensor:
        """A reused block of the same size: the page faults of a fresh one take longer than the sums."""
        if self._reused is None or self._reused.shape != block.shape or self._reused.device != block.device:
            with torch.inference_mode(False):
                self._reused = torch.empty(block.shape, device=block.device)
        return self._reused

    def reset(self) -> None:
        """Forget all cells."""
        # Tensors made in inference mode could not be added to by a later pass outside of it.
        with torch.inference_mode(False):
            super().reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Follow the module to its device but keep the dtype: sums in bfloat16 would be worthless."""
        device = fn(torch.empty(0)).device
        # Apple's MPS has no float64: there the sums stay in main memory.
        target = torch.device("cpu") if device.type == "mps" else device
        return super()._apply(lambda tensor: tensor.to(target), exclude_state)


class PseudobulkSums(GroupSums):
    """Predicted and observed pseudobulks of P pairs (condition, context), streamed.

    A pair's predicted pseudobulk is the control mean of its context plus the mean over its cells of *prediction minus
    the matched control cell*. The plain mean of the predictions would carry the sampling noise of the few controls that
    happened to be matched, and the score would measure the draw; in the difference that noise cancels, because a
    prediction is made from the same control cell.

    Parameters
    ----------
    control
        Shape ``(S, G)``: observed control mean of each context, in the value space of the cells.
    context
        Shape ``(P,)``: the row of `control` that belongs to each pair.
    variance
        Whether ``update`` will also be given the model's predicted variance.
    """

    predicted_delta_sum: Tensor
    variance_sum: Tensor

    def __init__(self, control: ArrayLike, context: ArrayLike, variance: bool = False) -> None:
        profiles = np.asarray(control, dtype=np.float64)
        rows = np.asarray(context, dtype=np.int64)
        if profiles.ndim != 2 or rows.ndim != 1:
            raise ValueError("control must be contexts x genes, and context one number for each pair")
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(profiles):
            raise ValueError(f"context must point into the {len(profiles)} rows of control")
        super().__init__(len(rows), profiles.shape[1])
        self.control = profiles
        self.context = rows
        self.variance = variance
        self._add_table("predicted_delta_sum")
        if variance:
            self._add_table("variance_sum")

    # The base class adds cells of groups, this one predictions beside them.
    def update(  # type: ignore[override]
        self, pair: Tensor, predicted: Tensor, control: Tensor, observed: Tensor, variance: Tensor | None = None
    ) -> None:
        """Add a batch of cells.

        Parameters
        ----------
        pair
            Shape ``(B,)``, int64: each cell's pair; a cell with -1 is not counted (padding that evens out ranks).
        predicted, control, observed
            Shape ``(B, G)``: the prediction, the matched control cell it was made from, the perturbed cell.
        variance
            Shape ``(B, G)``: predicted variance, if the sums were made to take it.
        """
        if (variance is not None) != self.variance:
            raise ValueError("variance must be given in every update, or in none, as said when the sums were made")
        rows = self._count(pair)
        self._add_observed(rows, observed.float())
        predicted = predicted.float()
        delta = torch.sub(predicted, control.float(), out=self._buffer(predicted))
        self._add("predicted_delta_sum", rows, delta)
        if variance is not None:
            self._add("variance_sum", rows, variance.float())

    # The pairs that had cells, with their predictions, instead of the moments of all groups.
    def compute(self) -> Pseudobulks:  # type: ignore[override]
        """Return the pseudobulks of the pairs that had at least one cell, summed over ranks."""
        moments = super().compute()
        pair = np.flatnonzero(moments.count)
        control = self.control[self.context[pair]]
        n = moments.count[pair, None]
        return Pseudobulks(
            pair=pair,
            context=self.context[pair],
            predicted=control + _numpy(self.predicted_delta_sum)[pair] / n,
            observed=moments.mean[pair],
            control=control,
            observed_variance=moments.variance[pair],
            count=moments.count[pair],
            predicted_variance=_numpy(self.variance_sum)[pair] / n if self.variance else None,
        )


class DESets(NamedTuple):
    """Top DE genes of P rows, as indices padded with -1: of all genes, and of all but the condition's own targets."""

    genes: NDArray[np.int64]
    genes_no_target: NDArray[np.int64]


def de_sets(pseudobulks: Pseudobulks, controls: GroupMoments, targets: NDArray[np.bool_], k: int = 20) -> DESets:
    """The `k` genes that differ most between the observed cells and the controls of their context (Welch's t).

    Parameters
    ----------
    pseudobulks
        The observed cells; for a test score, the test cells.
    controls
        Moments of the control cells of each context.
    targets
        Shape ``(P, G)``: which genes a condition perturbs (:func:`perturbzoo.evaluation.metrics.target_mask`).
    k
        How many genes.
    """
    context = pseudobulks.context
    t = welch_t(
        pseudobulks.observed,
        pseudobulks.observed_variance,
        pseudobulks.count,
        controls.mean[context],
        controls.variance[context],
        controls.count[context],
    )
    return DESets(genes=largest(t, k), genes_no_target=largest(t, k, exclude=targets))


def assign_halves(pair: ArrayLike, seed: int) -> NDArray[np.int64]:
    """Split the cells of each pair at random into two halves that differ by one cell at most.

    Parameters
    ----------
    pair
        Shape ``(N,)``: the pair of every cell of the part, in an order that does not change between runs.
    seed
        Of the random draw.

    Returns
    -------
    Shape ``(N,)``: 0 or 1. ``2 * pair + half`` is the group to stream into ``GroupSums(2 * n_pairs, n_genes)``.
    """
    cells = np.asarray(pair)
    order = np.lexsort((np.random.default_rng(seed).random(len(cells)), cells))
    _, start, size = np.unique(cells[order], return_index=True, return_counts=True)
    half = np.empty(len(cells), dtype=np.int64)
    half[order] = (np.arange(len(cells)) - np.repeat(start, size)) % 2
    return half


def _numpy(state: Tensor) -> NDArray[Any]:
    return state.detach().cpu().numpy()
