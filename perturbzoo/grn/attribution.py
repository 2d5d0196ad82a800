r"""Which interventions, edges and paths carry the change of the steady state.

The steady state :math:`x(s)` is followed from control (s = 0) to the condition (s = 1) while the efficacy of every act
grows as :math:`s \cdot efficacy`. On the log scale :math:`u_i = \log(x_i + \epsilon_i)`, with the local responses
:math:`J_{ij} = \partial \log F_i / \partial u_j` of :mod:`perturbzoo.grn.responses` and the push :math:`b^k` of act k,

.. math::

    \dot u = J \dot u + \sum_k b^k \quad\Rightarrow\quad
    \Delta u = \int_0^1 (I - J)^{-1} \sum_k b^k\, ds = \sum_k \sum_{\text{walks}} \int_0^1 J \cdots J\, b^k\, ds

These are integrated gradients on the strength (Sundararajan et al. 2017, arXiv 1703.01365; among several acts, the shares
of Aumann and Shapley). They are complete *on the log scale*: acts, incoming edges, or all walks, each sum to the change.
Of local responses at control alone only the first order of it would follow.

Knows networks in motion, no model and no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbzoo.errors import PerturbZooError, near_matches
from perturbzoo.grn.dynamics import RegulatoryDynamics
from perturbzoo.grn.interventions import Interventions
from perturbzoo.grn.responses import RestMap, context_rows, control_at_rest, in_double, levels_at_rest
from perturbzoo.grn.steady import gmres
from perturbzoo.perturbation import KINDS

OTHER = "other / feedback"
NODES = 4  # of Gauss and Legendre in each segment of the strength
# a knock-down changes the log level most where little is left, so segments are finer there from the start
START = (0.0, 0.25, 0.5, 0.75, 0.875, 0.9375, 1.0)
# where a segment this narrow does not add up, the state jumps; nearer to the jump steady states are hard to find, and
# a segment narrower than the second is given up where that fails
NARROWEST, HARD = 2.0**-10, 2.0**-5


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where the change of each gene under one condition comes from; natural log of levels, see the module.

    Attributes
    ----------
    genes
        `gene`, `level` (at rest under the condition), `change`, `direct` (what acts do to the gene itself, or what reaches
        it over an edge from a perturbed gene), `indirect` (over edges from other genes), `jump`: change - direct - indirect,
        1e-4 at most unless the steady state switches at some strength, where no path can be followed.
    edges
        `regulator`, `target`, `response` (mean of J along the path: its sign is the regulation's), `contribution` (to the
        target's change; with the acts' own part these sum to `direct + indirect`). Edges that carry nothing are left out.
    shares
        `gene`, `intervention`, `share` (of the change; they sum to ``change - jump``), `alone` (change under this act
        alone), `interaction` (share - alone; summed over acts, what they do beyond the sum of each).
    paths
        `gene`, `path` ("A -> B -> C", from a perturbed gene), `contribution`; strongest first, then one row "other /
        feedback" with the rest of the change.
    """

    genes: pd.DataFrame
    edges: pd.DataFrame
    shares: pd.DataFrame
    paths: pd.DataFrame


def explain(
    dynamics: RegulatoryDynamics,
    acts: Interventions,
    context: Tensor | int | None = None,
    *,
    genes: Sequence[str] | None = None,
    n_genes: int = 20,
    top: int = 5,
    length: int = 5,
    floor: float = 1e-3,
    tolerance: float = 1e-4,
) -> Explanation:
    """Attribute the change from control to one condition.

    Parameters
    ----------
    acts
        One row: the condition's interventions. Those that end are over at rest and change nothing.
    context
        Index of the context; None: the first.
    genes
        Genes whose paths are listed; None: the `n_genes` that change most.
    top
        Paths for each gene.
    length
        Edges of the longest path; a gene may come twice (feedback). The search keeps the strongest walks to each gene and
        length, which finds the strongest of all if responses do not change along the path, and nearly so otherwise.
    floor
        ε as a fraction of a gene's level in control, so that the log of a level of 0 is finite.
    tolerance
        Of the sum of all contributions, natural log.

    Raises
    ------
    PerturbZooError
        `acts` are not one condition, a gene is unknown, or some steady state on the way is unstable or not found.
    """
    if acts.targets.ndim != 2 or len(acts) != 1:
        raise PerturbZooError(
            f"explain: acts of the shape {tuple(acts.targets.shape)}; give those of one condition: acts.select(torch.tensor([3]))"
        )
    position = {gene: number for number, gene in enumerate(dynamics.genes)}
    for name in genes or ():
        if name not in position:
            raise PerturbZooError(f"explain: '{name}' is not a gene of the network{near_matches(name, position)}")
    flow = _Flow(*in_double(dynamics, acts), context_rows(dynamics, context, 1).cpu(), floor, tolerance)
    names = np.array(dynamics.genes, dtype=object)
    gained, own, on_edges = flow.totals()
    change = flow.change.numpy()
    edge_sum = (on_edges[0] + on_edges[1]).numpy()
    perturbed = np.zeros(len(names), dtype=bool)
    perturbed[[gene for gene, _ in flow.each]] = True
    source, target = flow.regulator.numpy(), flow.target.numpy()
    from_perturbed = perturbed[source]
    direct = own.numpy() + np.bincount(target, edge_sum * from_perturbed, len(names))
    indirect = np.bincount(target, edge_sum * ~from_perturbed, len(names))
    columns = {"gene": names, "level": flow.after.numpy(), "change": change, "direct": direct, "indirect": indirect}
    table = pd.DataFrame({**columns, "jump": change - direct - indirect})

    used = edge_sum != 0
    response = (flow.response @ flow.weight).numpy()
    carried = {"regulator": names[source], "target": names[target], "response": response, "contribution": edge_sum}
    edges = pd.DataFrame(carried)[used].sort_values("contribution", key=np.abs, ascending=False, ignore_index=True)

    alone = flow.alone().numpy()
    share = gained.numpy()
    shares = pd.DataFrame(
        {
            "gene": np.tile(names, len(flow.each)),
            "intervention": np.repeat([f"{names[gene]}:{KINDS[kind]}" for gene, kind in flow.each], len(names)),
            "share": share.ravel(),
            "alone": alone.ravel(),
            "interaction": (share - alone).ravel(),
        }
    )
    chosen = [position[name] for name in genes or ()] or np.argsort(-np.abs(change), kind="stable")[:n_genes].tolist()
    walks = flow.walks(length, max(4 * top, 20))
    rows: list[tuple[str, str, float]] = []
    for gene in chosen:
        mine = np.flatnonzero((walks.end == gene) & (walks.contribution != 0))
        mine = mine[np.argsort(-np.abs(walks.contribution[mine]), kind="stable")][:top]
        texts = [" -> ".join(names[step] for step in path if step >= 0) for path in walks.path[mine]]
        values = walks.contribution[mine].tolist()
        rows += [(str(names[gene]), *row) for row in zip(texts, values, strict=True)]
        rows.append((str(names[gene]), OTHER, float(change[gene]) - sum(values)))
    return Explanation(table, edges, shares, pd.DataFrame(rows, columns=["gene", "path", "contribution"]))


@dataclass(frozen=True, eq=False)
class _Walks:
    """W walks: the genes on the way, -1 before the first; the last; and what each contributes to it."""

    path: np.ndarray  # (W, longest)
    end: np.ndarray  # (W,)
    contribution: np.ndarray  # (W,)


class _Flow:
    """The path from control to the condition at n strengths: responses, pushes and speeds, with weights of the integral."""

    def __init__(
        self, dynamics: RegulatoryDynamics, acts: Interventions, context: Tensor, floor: float, tolerance: float
    ) -> None:
        self.dynamics, self.acts, self.context = dynamics, acts, context
        present = (acts.targets[0] >= 0).nonzero()[:, 0].tolist()
        self.columns = present
        self.each = [(int(acts.targets[0, k]), int(acts.kind[0, k])) for k in present]
        self.start = control_at_rest(dynamics)[context]  # (1, S)
        control = self.levels(acts.efficacy.new_zeros(1, acts.targets.shape[1]))[0]
        self.epsilon = floor * control
        end = RestMap(dynamics, acts, context)
        self.regulator, self.target = end.regulator, end.target
        parts = self._follow(tolerance)
        self.weight, self.response = parts["weight"], parts["response"]  # (n,), (E, n)
        self.pushed, self.over_edge, self.speed = parts["pushed"], parts["over_edge"], parts["speed"]  # (k, G | E | G, n)

    def levels(self, share: Tensor) -> Tensor:
        """Levels at rest with each act at its share of strength: ``(n, K)`` -> ``(n, G)``."""
        rows = torch.zeros(len(share), dtype=torch.int64, device=share.device)
        acts = self.acts.select(rows).restrict(share)
        return levels_at_rest(self.dynamics, acts, self.context.expand(len(share)), self.start.expand(len(share), -1))

    def logs(self, level: Tensor) -> Tensor:
        return torch.log(level + self.epsilon)

    def alone(self) -> Tensor:
        """Change of the log levels under each act alone, ``(k, G)``."""
        share = torch.zeros(len(self.columns), self.acts.targets.shape[1], dtype=self.epsilon.dtype, device=self.epsilon.device)
        share[range(len(self.columns)), self.columns] = 1
        return self.logs(self.levels(share)) - self.before if len(share) else self.before.new_zeros(0, len(self.before))

    def _follow(self, tolerance: float) -> dict[str, Tensor]:
        """Halve segments of the strength until the speeds in each sum to the change over it."""
        device, double = self.epsilon.device, self.epsilon.dtype
        width = self.acts.targets.shape[1]
        points, weights = np.polynomial.legendre.leggauss(NODES)
        at, weight = (torch.tensor(values / 2, dtype=double, device=device) for values in (points + 1, weights))
        ends = torch.tensor(START, dtype=double, device=device)
        low, high = ends[:-1], ends[1:]
        known = self.logs(self.levels(ends[:, None].expand(-1, width)))
        self.before, self.change, self.after = known[0], known[-1] - known[0], torch.exp(known[-1]) - self.epsilon
        first, last = known[:-1], known[1:]
        kept: list[dict[str, Tensor]] = []
        while len(low):
            strength = low[:, None] + (high - low)[:, None] * at  # (segments, NODES)
            middle = torch.lerp(low, high, 0.5)
            try:
                rest = self.levels(torch.cat([strength.reshape(-1), middle])[:, None].expand(-1, width))
            except PerturbZooError:
                if not kept or float((high - low).max()) > HARD:
                    raise
                break
            parts = self._speeds(strength.reshape(-1), rest[: strength.numel()])
            parts["weight"] = ((high - low)[:, None] * weight).reshape(-1)
            gained = (parts["speed"].sum(0) * parts["weight"]).reshape(-1, len(low), NODES).sum(-1)  # (G, segments)
            missing = (last - first - gained.T).abs().amax(-1)
            done = (missing <= tolerance / 20) | (high - low <= NARROWEST)
            nodes = done[:, None].expand(-1, NODES).reshape(-1)
            kept.append({name: values[..., nodes] for name, values in parts.items()})
            open_, halves = ~done, self.logs(rest[strength.numel() :])
            low, middle, high = low[open_], middle[open_], high[open_]
            first, halves, last = first[open_], halves[open_], last[open_]
            low, high = torch.cat([low, middle]), torch.cat([middle, high])
            first, last = torch.cat([first, halves]), torch.cat([halves, last])
        return {name: torch.cat([part[name] for part in kept], dim=-1) for name in kept[0]}

    def _speeds(self, strength: Tensor, level: Tensor) -> dict[str, Tensor]:
        """J on edges, the pushes b of each act, and the speeds ``(I - J)^-1 b``, at n strengths with their levels (n, G)."""
        rows = torch.zeros(len(strength), dtype=torch.int64, device=level.device)
        many, contexts = self.acts.select(rows), self.context.expand(len(strength))
        share = strength[:, None].expand(-1, self.acts.targets.shape[1])

        def mapped(share: Tensor) -> RestMap:
            return RestMap(self.dynamics, many.restrict(share), contexts)

        here = mapped(share)
        relative = 1 / (level + self.epsilon).T  # (G, n): d log(x + ε) / dx
        seen = here.slopes(level) * relative[self.target]  # (E, n): of log F, by the level that targets see
        response = seen * (here.function / relative.T).T[self.regulator]
        pushed = level.new_zeros(len(self.columns), level.shape[1], len(strength))
        over_edge = level.new_zeros(len(self.columns), len(self.target), len(strength))
        for number, column in enumerate(self.columns):
            on, off = share.clone(), share.clone()
            on[:, column], off[:, column] = 1, 0
            full, none = mapped(on), mapped(off)
            # at given levels F is affine in the strength of an act, and so is η: the difference is the derivative
            if KINDS[self.each[number][1]] == "knockout":
                lost = ((full.function - none.function) * level).T  # (G, n)
                over_edge[number] = seen * lost[self.regulator]
                pushed[number] = here.push(seen, lost)
            else:
                pushed[number] = (full(level) - none(level)).T * relative
        wanted = pushed.transpose(1, 2)  # (k, n, G)

        def operator(speed: Tensor) -> Tensor:
            # (k, n, G) -> (G, k n), as the map wants it; the same responses for every act
            each = speed.permute(2, 0, 1)
            flowing = response[:, None] * each.index_select(0, self.regulator)
            return speed - torch.zeros_like(each).index_add(0, self.target, flowing).permute(1, 2, 0)

        speed = gmres(operator, wanted, 1e-9)[0] if len(self.columns) else wanted
        return {"response": response, "pushed": pushed, "over_edge": over_edge, "speed": speed.transpose(1, 2)}

    def totals(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Shares of acts ``(k, G)``, what acts do to genes themselves ``(G,)``, and to edges / what flows over them ``(E,)``."""
        knockout = [KINDS[kind] == "knockout" for _, kind in self.each]
        itself = self.pushed[[not cut for cut in knockout]] if self.each else self.pushed
        flowing = self.response * self.speed.sum(0).index_select(0, self.regulator)
        edges = (self.over_edge.sum(0) @ self.weight, flowing @ self.weight)
        return self.speed @ self.weight, itself.sum(0) @ self.weight, edges

    def walks(self, length: int, beam: int) -> _Walks:
        """Walks from the perturbed genes with at most `length` edges, the strongest `beam` to each gene and length."""
        weight, response = self.weight.numpy(), self.response.numpy()
        regulator, target = self.regulator.numpy(), self.target.numpy()
        mean = np.abs(response) @ weight
        order = np.argsort(regulator, kind="stable")
        first = np.searchsorted(regulator[order], np.arange(len(self.before) + 1))
        paths, products, cut = [], [], []
        for number, (gene, kind) in enumerate(self.each):
            if KINDS[kind] == "knockout":
                out = np.flatnonzero(regulator == gene)
                cut.append((np.column_stack([np.full(len(out), gene), target[out]]), self.over_edge[number][out].numpy()))
            else:
                paths.append(np.array([[gene]]))
                products.append(self.pushed[number][[gene]].numpy())
        path = np.concatenate([np.zeros((0, 1), dtype=np.int64), *paths])
        product = np.concatenate([np.zeros((0, len(weight))), *products])
        found = [(path, product @ weight)]
        for step in range(length):
            end, size = path[:, -1], np.abs(product) @ weight
            count = first[end + 1] - first[end]
            walk = np.repeat(np.arange(len(path)), count)
            edge = order[np.arange(len(walk)) - np.repeat(np.cumsum(count) - count, count) + first[end][walk]]
            # a cheap bound first: walks times edges times strengths would be large
            likely = _strongest(target[edge], size[walk] * mean[edge], 2 * beam)
            walk, edge = walk[likely], edge[likely]
            path, product = np.column_stack([path[walk], target[edge]]), product[walk] * response[edge]
            if step == 0:
                path, product = (
                    np.concatenate([path, *(one for one, _ in cut)]),
                    np.concatenate([product, *(p for _, p in cut)]),
                )
            kept = _strongest(path[:, -1], np.abs(product) @ weight, beam)
            path, product = path[kept], product[kept]
            found.append((path, product @ weight))
        rows = [np.pad(steps, ((0, 0), (length + 1 - steps.shape[1], 0)), constant_values=-1) for steps, _ in found]
        path = np.concatenate(rows)
        return _Walks(path, path[:, -1], np.concatenate([values for _, values in found]))


def _strongest(group: np.ndarray, size: np.ndarray, count: int) -> np.ndarray:
    """Rows of the `count` largest sizes of each group, those of size 0 left out."""
    order = np.lexsort((-size, group))
    place = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    return order[(place < count) & (size[order] > 0)]
