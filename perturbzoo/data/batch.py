"""The batch: cells, their matched controls, and the small table of distinct conditions they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from perturbzoo.errors import PerturbZooError, near_matches
from perturbzoo.perturbation import KINDS, Condition


@dataclass
class ConditionTable:
    """Distinct (condition, context) pairs, encoded. C rows, at most K interventions each.

    Attributes
    ----------
    targets
        Shape ``(C, K)``, int64: index into the target names, -1 where a condition has fewer than K interventions.
    kind
        Shape ``(C, K)``, int64: index into :data:`perturbzoo.perturbation.KINDS`, -1 for padding.
    dose, onset, offset, efficacy
        Shape ``(C, K)``, float32; 0 for padding.
    context
        Shape ``(C,)``, int64: index into ``spec.contexts``, -1 for a context never seen in training.
    pair
        Shape ``(C,)``, int64: index of the row in the list of pairs the table was encoded from.
    """

    targets: Tensor
    kind: Tensor
    dose: Tensor
    onset: Tensor
    offset: Tensor
    efficacy: Tensor
    context: Tensor
    pair: Tensor

    def __len__(self) -> int:
        return self.targets.shape[0]

    def select(self, rows: Tensor) -> ConditionTable:
        """Return the table of the given rows, int64; `pair` keeps pointing into the original list."""
        return ConditionTable(**{item.name: getattr(self, item.name).index_select(0, rows) for item in fields(self)})

    def single(self, row: Tensor, column: Tensor) -> ConditionTable:
        """Return the table in which each row is one intervention of this one, alone."""
        return ConditionTable(
            **{
                item.name: value[row] if (value := getattr(self, item.name)).ndim == 1 else value[row, column][:, None]
                for item in fields(self)
            }
        )

    def split(self, sizes: Sequence[int]) -> list[ConditionTable]:
        """Cut the table into tables of the given numbers of rows; they share its memory."""
        parts = zip(*(getattr(self, item.name).split(list(sizes)) for item in fields(self)), strict=True)
        return [ConditionTable(*part) for part in parts]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ConditionTable:
        return ConditionTable(
            **{item.name: getattr(self, item.name).to(device, non_blocking=non_blocking) for item in fields(self)}
        )

    @property
    def present(self) -> Tensor:
        """Shape ``(C, K)``, bool: where there is an intervention rather than padding."""
        return self.targets >= 0


def encode_conditions(
    conditions: Sequence[Condition],
    contexts: Sequence[int],
    targets: Sequence[str],
    default_kind: str,
) -> ConditionTable:
    """Encode conditions and their contexts as a :class:`ConditionTable`.

    Parameters
    ----------
    conditions, contexts
        One condition and one context index for each of the C rows.
    targets
        The names that ``table.targets`` points into.
    default_kind
        Kind of the interventions that spell none out.

    Raises
    ------
    PerturbZooError
        A condition names a target that is not in `targets`.
    """
    index = {name: position for position, name in enumerate(targets)}
    width = max((len(condition) for condition in conditions), default=0) or 1
    shape = (len(conditions), width)
    table = ConditionTable(
        targets=torch.full(shape, -1),
        kind=torch.full(shape, -1),
        dose=torch.zeros(shape),
        onset=torch.zeros(shape),
        offset=torch.zeros(shape),
        efficacy=torch.zeros(shape),
        context=torch.as_tensor(list(contexts), dtype=torch.int64),
        pair=torch.arange(len(conditions)),
    )
    for row, condition in enumerate(conditions):
        for column, act in enumerate(condition):
            if act.target not in index:
                raise PerturbZooError(
                    f"condition '{condition}': target '{act.target}' was never named in the training data"
                    f"{near_matches(act.target, index) or '.'} A target outside the training data needs a model with an "
                    "embedding or a graph that contains it"
                )
            table.targets[row, column] = index[act.target]
            table.kind[row, column] = KINDS.index(act.kind or default_kind)
            table.dose[row, column] = act.dose
            table.onset[row, column] = act.onset
            table.offset[row, column] = act.offset
            table.efficacy[row, column] = act.efficacy
    return table


@dataclass
class PerturbationBatch:
    """B cells of C distinct (condition, context) pairs, with one matched control cell each.

    Whatever depends on the condition and its context only is computed C times from `table` and `context_control`,
    then gathered with `row`. A plain dataclass: Lightning cannot move a frozen one.

    Attributes
    ----------
    expression
        Shape ``(B, G)``, float32, log1p-normalised: the perturbed cells. None when predicting.
    control
        Shape ``(B, G)``, float32, log1p-normalised: one control cell of the same context for each row.
    row
        Shape ``(B,)``, int64: the row of `table` that each cell belongs to.
    table
        The C distinct pairs.
    context_control
        Shape ``(C, G)``, float32, log1p-normalised: mean control profile of each pair's context.
    size_factor, control_size_factor
        Shape ``(B,)``, float32, counts: depth of each cell. 0 where the file held no counts.
    covariates
        Shape ``(B, V)``, int64: level of each covariate, in the order of ``spec.covariates``; -1 for a new level.
    cell, control_cell
        Shape ``(B,)``, int64: row of each cell in the source it came from.
    depth
        Counts per cell after normalisation, ``spec.depth``.
    time
        Shape ``(B,)``, float32, in the unit of the data, or None where there is one time only.
    """

    expression: Tensor | None
    control: Tensor
    row: Tensor
    table: ConditionTable
    context_control: Tensor
    size_factor: Tensor
    control_size_factor: Tensor
    covariates: Tensor
    cell: Tensor
    control_cell: Tensor
    depth: float
    time: Tensor | None = None

    def __len__(self) -> int:
        return self.row.shape[0]

    @property
    def observed(self) -> Tensor:
        """The perturbed cells' expression, ``(B, G)``; an error where the batch was made for prediction."""
        if self.expression is None:
            raise PerturbZooError("this batch was made for prediction and holds no observed cells")
        return self.expression

    @property
    def counts(self) -> Tensor:
        """Shape ``(B, G)``: the perturbed cells' raw counts, recovered from the expression on its device."""
        return self._counts(self.observed, self.size_factor)

    @property
    def control_counts(self) -> Tensor:
        """Shape ``(B, G)``: the control cells' raw counts."""
        return self._counts(self.control, self.control_size_factor)

    def _counts(self, expression: Tensor, size_factor: Tensor) -> Tensor:
        if self.depth <= 0:
            raise PerturbZooError("the data hold log1p values only: models of counts need a file with raw counts in X")
        # log1p(n depth / s) inverted; float32 keeps integers exact to far beyond any count of a single cell
        return torch.round(torch.expm1(expression) * (size_factor / self.depth)[:, None])

    def condition_means(self, values: Tensor) -> Tensor:
        """Average `values` ``(B, G)`` over the cells of each pair: ``(C, G)``. Pairs without cells give 0."""
        total = values.new_zeros(len(self.table), values.shape[1]).index_add_(0, self.row, values)
        return total / self.cells_per_pair().clamp(min=1)[:, None].to(values.dtype)

    def cells_per_pair(self) -> Tensor:
        """Shape ``(C,)``: how many cells of the batch belong to each pair."""
        return torch.bincount(self.row, minlength=len(self.table))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PerturbationBatch:
        """Move every tensor."""

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor | ConditionTable) else value

        return replace(self, **{item.name: move(getattr(self, item.name)) for item in fields(self)})

    def clone(self) -> PerturbationBatch:
        """Copy every tensor: tensors made in inference mode cannot take part in differentiation, their copies can."""

        def copy(value: Any) -> Any:
            if isinstance(value, ConditionTable):
                return ConditionTable(**{item.name: getattr(value, item.name).clone() for item in fields(value)})
            return value.clone() if isinstance(value, Tensor) else value

        return replace(self, **{item.name: copy(getattr(self, item.name)) for item in fields(self)})
