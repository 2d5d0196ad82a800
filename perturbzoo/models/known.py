"""The training deltas, looked up by condition: what every baseline averages and what residual models start from.

Every simple baseline is a weighted mean of the training pairs' deltas, so each is a rule that turns conditions into a
``(C, P)`` matrix of weights; the prediction is one matrix product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from perturbzoo.data.batch import ConditionTable, encode_conditions
from perturbzoo.data.datamodule import TrainingPseudobulks
from perturbzoo.data.spec import DataSpec
from perturbzoo.perturbation import parse_condition

Key = tuple[tuple[int, int, float], ...]


class TrainingDeltas(nn.Module):
    """The deltas of the P training pairs, and rules for weighting them.

    Parameters
    ----------
    spec
        Names the training pairs.
    singles_only
        Keep the pairs of a single target alone, if there are any.

    Attributes
    ----------
    value
        Buffer of shape ``(P, G)``: mean expression of each training pair minus its context's control mean.
    """

    value: Tensor
    _mean: Tensor
    _mean_single: Tensor

    def __init__(self, spec: DataSpec, singles_only: bool = False) -> None:
        super().__init__()
        pairs = [(parse_condition(text), context) for text, context in spec.training_pairs]
        singles = [position for position, (condition, _) in enumerate(pairs) if len(condition) == 1]
        self._kept = singles if singles_only and singles else list(range(len(pairs)))
        conditions = [pairs[position][0] for position in self._kept]
        self._context = torch.tensor([pairs[position][1] for position in self._kept], dtype=torch.int64)
        self.table = encode_conditions(conditions, self._context.tolist(), spec.targets, spec.default_kind)
        self._rows: dict[Key, list[int]] = defaultdict(list)
        for row, key in enumerate(self.keys(self.table)):
            self._rows[key].append(row)
        self.register_buffer("value", torch.zeros(len(conditions), spec.n_genes))
        acts, n_contexts = self.acts(self.table), len(spec.contexts)
        everything = torch.ones(len(self), dtype=torch.bool)
        self.register_buffer("_mean", self._means(everything, n_contexts), persistent=False)
        single = acts == 1
        alone = self._means(single if single.any() else everything, n_contexts)
        # the one intervention of each single; at dose 0, which is none, in the row of a combination
        first = (self.table.present & (self.table.dose > 0)).int().argmax(dim=1)
        self._alone = self.table.single(torch.arange(len(self)), first)
        self._alone.dose[~single] = 0.0
        # without singles, a combination's change is shared among its targets: their sum is then of the right size
        self.register_buffer("_mean_single", alone / acts.clamp(min=1), persistent=False)

    def __len__(self) -> int:
        return len(self._context)

    def _means(self, chosen: Tensor, n_contexts: int) -> Tensor:
        """Weights ``(contexts + 1, P)`` of the mean over the chosen pairs of each context; the last row is for a new one.

        A context without any chosen pair gets the mean over all of them.
        """
        weights = torch.zeros(n_contexts + 1, len(self))
        for context in range(n_contexts + 1):
            same = chosen & (self._context == context)
            same = same if same.any() else chosen
            weights[context, same] = 1.0 / max(int(same.sum()), 1)
        return weights

    def fit(self, bulks: TrainingPseudobulks) -> None:
        """Take over the training pseudobulks, whose rows are the spec's training pairs in order."""
        self.value.copy_(torch.as_tensor(bulks.delta[self._kept], dtype=self.value.dtype))

    @property
    def scale(self) -> Tensor:
        """Root mean square of the deltas."""
        return self.value.square().mean().sqrt().clamp(min=1e-8)

    @staticmethod
    def keys(table: ConditionTable) -> list[Key]:
        """What makes two conditions the same perturbation: targets, kinds and doses, in any order; dose 0 is no act."""
        return [
            tuple(sorted((t, k, d) for t, k, d in zip(*act, strict=True) if t >= 0 and d > 0))
            for act in zip(table.targets.tolist(), table.kind.tolist(), table.dose.tolist(), strict=True)
        ]

    @staticmethod
    def acts(table: ConditionTable) -> Tensor:
        """Shape ``(C,)``: how many interventions of each condition do anything."""
        return (table.present & (table.dose > 0)).sum(dim=1)

    def mean_weights(self, table: ConditionTable) -> Tensor:
        """``(C, P)``: equal weights on the training pairs of the row's context, or on all for a new context."""
        return self._mean[table.context]

    def mean_single_weights(self, table: ConditionTable) -> Tensor:
        """``(C, P)``: equal weights on the training singles of the row's context, or on all for a new context."""
        return self._mean_single[table.context]

    def single_weights(self, table: ConditionTable, *, average: bool, mean_for_missing: bool) -> Tensor:
        """``(C, P)``: weights on the single perturbations of each condition's targets.

        Parameters
        ----------
        table
            C conditions.
        average
            Average the singles (Systema's matching mean) instead of adding them.
        mean_for_missing
            Let a target that was never perturbed alone contribute a mean, otherwise nothing. In an average, which is on the
            scale of whole conditions, it is the mean of all training pairs, as in Systema; in a sum, that of the training
            singles (where there are none: of all training pairs, each divided by its number of targets).
        """
        mean = self._mean if average else self._mean_single
        weights = self.value.new_zeros(len(table), len(self))
        for row, (key, context) in enumerate(zip(self.keys(table), table.context.tolist(), strict=True)):
            share = 1.0 / len(key) if average and key else 1.0
            for act in key:
                if rows := self._rows.get((act,), []):
                    # a single of the same context is preferred; else all contexts count the same
                    same = [known for known in rows if self._context[known] == context] or rows
                    weights[row, same] += share / len(same)
                elif mean_for_missing:
                    weights[row] += share * mean[context]
        return weights

    def measured(self, table: ConditionTable) -> Tensor:
        """Shape ``(C,)``, bool: whether the perturbation was measured in training, in whatever context."""
        return torch.tensor([key in self._rows for key in self.keys(table)], dtype=torch.bool, device=self.value.device)

    def own_weights(self, table: ConditionTable) -> Tensor:
        """``(C, P)``: weights on the condition itself, in its context if measured there, else in all; 0 where it is new."""
        weights = self.value.new_zeros(len(table), len(self))
        for row, (key, context) in enumerate(zip(self.keys(table), table.context.tolist(), strict=True)):
            if rows := self._rows.get(key, []):
                same = [known for known in rows if self._context[known] == context] or rows
                weights[row, same] = 1.0 / len(same)
        return weights

    def response_weights(self, table: ConditionTable) -> Tensor:
        """``(C, P)``: weights on what was measured of C single interventions, the mean over all contexts; 0 where nothing was.

        A dose between measured ones is interpolated over log2(1 + dose), from no change at dose 0; the largest one counts for
        those above it.
        """
        trained = self._alone.to(table.targets.device)
        same = (table.targets == trained.targets.T) & (table.kind == trained.kind.T) & (trained.dose.T > 0)  # (C, P)
        asked, dose = table.dose, trained.dose.T  # (C, 1) and (1, P)
        below = torch.where(same & (dose <= asked), dose, 0.0).amax(dim=1, keepdim=True)
        above = torch.where(same & (dose > asked), dose, torch.inf).amin(dim=1, keepdim=True)
        share = torch.log2((1 + asked) / (1 + below)) / torch.log2((1 + above) / (1 + below))  # 0 where nothing is above
        weights = torch.zeros_like(same, dtype=dose.dtype)
        for level, part in ((below, 1 - share), (above, share)):
            at = (same & (dose == level)).to(dose)
            weights += part * at / at.sum(dim=1, keepdim=True).clamp(min=1)
        return weights

    def without_own(self, table: ConditionTable, weights: Tensor) -> Tensor:
        """Move weights ``(C, P)`` for C single interventions from the pairs that have their targets to the others.

        Where there are no others, weights stay as they are.
        """
        trained = self.table.to(table.targets.device)
        own = ((trained.targets == table.targets[:, :, None]) & (trained.dose > 0)).any(dim=2)  # (C, 1, K) to (C, P)
        others = weights * ~own
        left = others.sum(dim=1, keepdim=True)
        return torch.where(left > 0, others * weights.sum(dim=1, keepdim=True) / torch.where(left > 0, left, 1), weights)

    def sum_weights(
        self,
        table: ConditionTable,
        unmeasured: Callable[[TrainingDeltas, ConditionTable], Tensor],
        hidden: Tensor | None = None,
    ) -> Tensor:
        """``(C, P)``: the sum over targets of what each did alone, or of what would be said of it had it never been perturbed.

        Parameters
        ----------
        table
            C conditions.
        unmeasured
            Gives weights ``(A, P)`` for A single interventions whose target nobody measured alone:
            :class:`perturbzoo.models.neighbours.Neighbours`, or ``TrainingDeltas.mean_single_weights``.
        hidden
            Shape ``(C, K)``, bool: interventions whose target is treated as never perturbed: nothing measured of it has a say.
        """
        row, column = torch.nonzero(table.present & (table.dose > 0), as_tuple=True)
        alone = table.single(row, column)  # A rows, one for each intervention
        parts = self.response_weights(alone)  # (A, P)
        unknown = ~parts.any(dim=1)
        if hidden is not None:
            unknown = unknown | hidden[row, column]
        asked = alone.select(torch.nonzero(unknown).ravel())
        parts[unknown] = self.without_own(asked, unmeasured(self, asked))
        return parts.new_zeros(len(table), len(self)).index_add_(0, row, parts)

    def residual_weights(self, table: ConditionTable) -> Tensor:
        """``(C, P)``: what a residual model starts from: the mean single for a single, the sum of singles for a combination.

        A single does not start from its own delta: nothing would be left to learn from it.
        """
        weights = self.single_weights(table, average=False, mean_for_missing=True)
        single = self.acts(table) == 1
        weights[single] = self._mean_single[table.context[single]]
        return weights
