r"""What an intervention does to the kinetics of its gene, each kind by its biology.

With the amount :math:`a(t) = dose \cdot efficacy \cdot g(t)`, gene i and all other genes left alone:

==============  ===================================================================================================
interference    production times :math:`1 - a` (CRISPRi, RNAi: less is transcribed)
activation      production times :math:`1 + (A_i - 1) a`, A the fold change at dose 1 (CRISPRa)
overexpression  a source :math:`S_i a` beside the gene's own production, which the network does not regulate (ORF)
knockout        the gene's product acts as if its level were :math:`(1 - a) x_i`: its outgoing edges are cut, its own
                mRNA is still made (Cas9: the protein is lost; what the network makes of the mRNA may even rise)
clamp           production is replaced by what keeps the level at the dose, and turnover is sped up until it is there
==============  ===================================================================================================

The gate :math:`g(t) = \sigma((t - onset)/r)\,\sigma((offset - t)/r)` is half open at the onset; r is the `ramp`. All is
differentiable in dose, efficacy, onset and offset, so timing can be fitted. Any number of acts at once: factors multiply,
sources add, a later clamp goes before an earlier one of the same gene.

Dose 1 of a clamp is the gene's reference level, of an overexpression the source that adds one reference level times the
`gain` of the dynamics. Knows genes by index; states and networks are :mod:`perturbzoo.grn.dynamics`' business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from perturbzoo.errors import PerturbZooError, near_matches, shortened
from perturbzoo.perturbation import KINDS, Condition

MECHANISMS = ("knockout", "interference", "activation", "overexpression", "clamp")
FRACTIONAL = ("knockout", "interference")  # these take something away: no more than all of it


class ActTable(Protocol):
    """What :class:`perturbzoo.data.batch.ConditionTable` looks like from here: all of shape (C, K), targets -1 for padding."""

    targets: Tensor
    kind: Tensor
    dose: Tensor
    onset: Tensor
    offset: Tensor
    efficacy: Tensor


@dataclass
class Effects:
    """What acts do to the genes at one moment; each of shape ``(..., G)``, or None where no act does it.

    Attributes
    ----------
    production
        Factor of own production.
    function
        Factor of the level that the gene's targets see.
    source
        Production from elsewhere, in units of the gene's reference level per its lifetime.
    hold, level
        How much of the production is replaced by a clamp, 0 to 1, and the level it adds to it: what it holds, in reference
        levels, times its share.
    """

    production: Tensor | None = None
    function: Tensor | None = None
    source: Tensor | None = None
    hold: Tensor | None = None
    level: Tensor | None = None


@dataclass
class Interventions:
    """The acts on N rows (conditions or cells), K at most on each; leading shapes beyond one axis are allowed.

    Attributes
    ----------
    targets
        Shape ``(N, K)``, int64: index of the gene, -1 for padding.
    kind
        Shape ``(N, K)``, int64: index into :data:`perturbzoo.perturbation.KINDS`, -1 for padding.
    dose, onset, offset, efficacy
        Shape ``(N, K)``, floating point; may require gradients.
    ramp
        Time within which acts set in and cease, > 0, in the time unit of the data; also a scalar tensor.
    labels
        N names for messages, or none.
    """

    targets: Tensor
    kind: Tensor
    dose: Tensor
    onset: Tensor
    offset: Tensor
    efficacy: Tensor
    ramp: float | Tensor = 0.1
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not float(self.ramp) > 0:
            raise PerturbZooError(
                f"ramp {float(self.ramp)} must be positive: timing is differentiable because acts set in smoothly"
            )
        present = self.targets >= 0
        self._check(present)
        # for each kind that occurs, its columns: which gene (0 where a row has no such act there), and where it has one
        self._columns: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
        for name in MECHANISMS:
            for column in range(self.targets.shape[-1]):
                here = ((self.kind == KINDS.index(name)) & present)[..., column]
                if bool(here.any()):
                    gene = torch.where(here, self.targets[..., column], 0)
                    self._columns.setdefault(name, []).append((column, gene, here))

    def _check(self, present: Tensor) -> None:
        kinds = self.kind.clamp(min=0)
        mechanistic = torch.tensor([name in MECHANISMS for name in KINDS], device=kinds.device)
        fractional = torch.tensor([name in FRACTIONAL for name in KINDS], device=kinds.device)
        dose, efficacy, onset, offset = (value.detach() for value in (self.dose, self.efficacy, self.onset, self.offset))
        for wrong, complaint in (
            (~mechanistic[kinds] | (self.kind < 0), f"has no mechanism in a network; write {', '.join(MECHANISMS)} of a gene"),
            (~(torch.isfinite(dose) & (dose >= 0)), "needs a finite dose of at least 0"),
            (fractional[kinds] & (dose > 1), "takes something away, so its dose must lie between 0 and 1"),
            (~((efficacy >= 0) & (efficacy <= 1)), "needs an efficacy between 0 and 1"),
            (~torch.isfinite(onset) | ~(offset > onset), "must have a finite onset, and an offset later than that"),
        ):
            wrong = wrong & present
            if bool(wrong.any()):
                *rows, column = wrong.nonzero()[0].tolist()
                at = (*rows, column)
                name = KINDS[int(self.kind[at])] if int(self.kind[at]) >= 0 else "an act without a kind"
                where = f"condition '{self.labels[rows[0]]}'" if rows and self.labels else f"row {rows or 0}"
                values = f"dose {float(dose[at]):g}, onset {float(onset[at]):g}, offset {float(offset[at]):g}"
                raise PerturbZooError(f"{where}: {name} of gene number {int(self.targets[at])} ({values}) {complaint}")

    @classmethod
    def from_conditions(
        cls,
        conditions: Sequence[Condition],
        genes: Sequence[str],
        *,
        default_kind: str | None = None,
        ramp: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ) -> Interventions:
        """Encode N conditions.

        Parameters
        ----------
        genes
            The genes of the network, in order.
        default_kind
            Kind of interventions that spell none out.

        Raises
        ------
        PerturbZooError
            A target is outside `genes`, an act has no kind or one without a mechanism (compound, cytokine), or a dose is
            outside its range.
        """
        index = {name: position for position, name in enumerate(genes)}
        outside = sorted({act.target for condition in conditions for act in condition if act.target not in index})
        if outside:
            first = next(str(condition) for condition in conditions if outside[0] in condition.targets)
            raise PerturbZooError(
                f"condition '{first}': target '{outside[0]}' is not a gene of the network{near_matches(outside[0], index)}"
                + (f"; {len(outside)} such targets: {shortened(outside)}" if len(outside) > 1 else "")
            )
        width = max((len(condition) for condition in conditions), default=0) or 1
        shape = (len(conditions), width)
        targets, kind = torch.full(shape, -1), torch.full(shape, -1)
        numbers = {name: torch.zeros(shape, dtype=dtype) for name in ("dose", "onset", "offset", "efficacy")}
        for row, condition in enumerate(conditions):
            for column, act in enumerate(condition):
                named = act.kind or default_kind
                if named is None:
                    raise PerturbZooError(
                        f"condition '{condition}': no kind; write {act.target}:knockout, or pass default_kind"
                    )
                targets[row, column], kind[row, column] = index[act.target], KINDS.index(named)
                for name, values in numbers.items():
                    values[row, column] = getattr(act, name)
        return cls(targets, kind, **numbers, ramp=ramp, labels=tuple(map(str, conditions)))

    @classmethod
    def from_table(
        cls, table: ActTable, targets: Sequence[str], genes: Sequence[str], *, ramp: float = 0.1, labels: Sequence[str] = ()
    ) -> Interventions:
        """Take over a batch's table, whose `targets` count the names in `targets`, for a network of `genes`.

        Raises
        ------
        PerturbZooError
            An act is on a target that is not among the genes; otherwise as :meth:`from_conditions`.
        """
        index = {name: position for position, name in enumerate(genes)}
        position = torch.tensor([index.get(name, -1) for name in targets] or [-1], device=table.targets.device)
        present = table.targets >= 0
        moved = torch.where(present, position[table.targets.clamp(min=0)], -1)
        if bool((present & (moved < 0)).any()):
            names = sorted({targets[number] for number in table.targets[present & (moved < 0)].tolist()})
            raise PerturbZooError(
                f"{len(names)} targets of the batch are not genes of the network: {shortened(names)}{near_matches(names[0], index)}"
            )
        return cls(moved, table.kind, table.dose, table.onset, table.offset, table.efficacy, ramp=ramp, labels=tuple(labels))

    def __len__(self) -> int:
        return self.targets.shape[0]

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """Which kinds occur."""
        return tuple(self._columns)

    def select(self, row: Tensor) -> Interventions:
        """Return the acts of the given rows, int64; from conditions to the cells that are under them."""
        names = tuple(self.labels[number] for number in row.tolist()) if self.labels else ()
        return replace(self._mapped(lambda values: values[row]), labels=names)

    def restrict(self, share: Tensor) -> Interventions:
        """Apply the acts to a subset of the rows only.

        Parameters
        ----------
        share
            Shape ``(N,)``, or ``(N, K)`` for each act its own subset: True or 1 where an act works, False or 0 where it
            does not (a guide that did not cut), anything between for part of the effect. Multiplies the efficacy.
        """
        factor = share.to(self.efficacy.dtype)
        return replace(self, efficacy=self.efficacy * (factor[..., None] if factor.ndim < self.efficacy.ndim else factor))

    def to(self, device: torch.device | str) -> Interventions:
        ramp = self.ramp.to(device) if isinstance(self.ramp, Tensor) else self.ramp
        return replace(self._mapped(lambda values: values.to(device)), ramp=ramp)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Interventions:
        return replace(
            self,
            targets=change(self.targets),
            kind=change(self.kind),
            dose=change(self.dose),
            onset=change(self.onset),
            offset=change(self.offset),
            efficacy=change(self.efficacy),
        )

    def knots(self) -> list[float]:
        """Moments at which an act sets in or ceases, sorted, without infinities."""
        present = self.targets >= 0
        times = torch.cat([self.onset[present], self.offset[present]]).detach()
        return times[torch.isfinite(times)].unique().tolist()

    def gate(self, time: Tensor | float) -> Tensor:
        """How far each act is on, 0 to 1, shape ``(N, K)``; a time of infinity is the far future, where acts that end are over."""
        moment = torch.as_tensor(time, dtype=self.dose.dtype, device=self.dose.device)
        if math.isinf(float(moment)):
            return torch.isinf(self.offset).to(self.dose.dtype)
        lasting = torch.isinf(self.offset)
        # an infinite offset is taken out before the arithmetic: its gradient would be 0 times infinity
        end = torch.where(lasting, torch.zeros_like(self.offset), self.offset)
        closing = torch.where(lasting, torch.ones_like(end), torch.sigmoid((end - moment) / self.ramp))
        return torch.sigmoid((moment - self.onset) / self.ramp) * closing

    def effects(self, time: Tensor | float, activation_fold: Tensor) -> Effects:
        """What the acts do to the genes at `time`.

        Parameters
        ----------
        activation_fold
            Shape ``(G,)``: A, the factor of production under activation at dose 1.

        Returns
        -------
        Effects
            Of shape ``(N, G)`` each.
        """
        if not self._columns:
            return Effects()
        gate = self.gate(time) * self.efficacy
        amount = gate * self.dose
        found = Effects()
        ones = amount.new_ones(*self.targets.shape[:-1], activation_fold.shape[-1])
        for name, columns in self._columns.items():
            for column, gene, here in columns:
                a = torch.where(here, amount[..., column], torch.zeros_like(amount[..., column]))
                if name == "interference":
                    found.production = _times(found.production, ones, gene, 1 - a)
                elif name == "activation":
                    found.production = _times(found.production, ones, gene, 1 + (activation_fold[gene] - 1) * a)
                elif name == "knockout":
                    found.function = _times(found.function, ones, gene, 1 - a)
                elif name == "overexpression":
                    before = torch.zeros_like(ones) if found.source is None else found.source
                    found.source = before.scatter_add(-1, gene[..., None], a[..., None])
                else:
                    w = torch.where(here, gate[..., column], torch.zeros_like(a))
                    before = torch.zeros_like(ones) if found.hold is None else found.hold
                    level = torch.zeros_like(ones) if found.level is None else found.level
                    # level carries its weight: production' = (1 - hold) production + level; each clamp covers those before
                    found.hold = 1 - _times(1 - before, ones, gene, 1 - w)
                    found.level = _times(level, ones, gene, 1 - w).scatter_add(-1, gene[..., None], a[..., None])
        return found


def _times(before: Tensor | None, ones: Tensor, gene: Tensor, factor: Tensor) -> Tensor:
    """Multiply one gene of each row by `factor`, shape (...,)."""
    values = ones if before is None else before
    return values.scatter(-1, gene[..., None], values.gather(-1, gene[..., None]) * factor[..., None])
