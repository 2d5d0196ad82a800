"""What a fitted :class:`perturbzoo.models.grn_ode.GRNODE` can be asked about its network: five questions, a method each.

::

    model = perturbzoo.load("best.ckpt")
    model.network().write("edges.csv")                        # who regulates whom
    model.trajectory(controls, ["STAT1"], [0, 1, 2, 4])       # how the change builds up
    model.counterfactual(cells, ["control"])                  # what these cells would have been
    model.explain("JAK2+STAT1")                               # which paths carry the change
    model.link(other_model)                                   # what another model's predictions say of the network

The mathematics is that of :mod:`perturbzoo.grn`; here it meets cells, names and the zoo's value space.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbzoo.data.batch import encode_conditions
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, near_matches, shortened
from perturbzoo.grn.attribution import Explanation
from perturbzoo.grn.candidates import candidate_network
from perturbzoo.grn.consistency import consistency
from perturbzoo.grn.counterfactual import ExtrinsicNoise, counterfactual
from perturbzoo.grn.fitted import FittedNetwork
from perturbzoo.grn.fitting import fit_network
from perturbzoo.grn.inference_kinetics import mean_network
from perturbzoo.grn.levels import Levels
from perturbzoo.grn.linking import Link, compare_edges, network_signal, off_targets
from perturbzoo.grn.network import GeneRegulatoryNetwork
from perturbzoo.grn.solvers import integrate
from perturbzoo.models.backbone import mean_delta
from perturbzoo.perturbation import Condition, Intervention, parse_condition, parse_conditions

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbzoo.models.base import PerturbationModel


BELIEVED = 0.5  # probability from which an edge counts


class NetworkAnswers:
    """Mixed into GRNODE; needs its fitted networks and its two maps between log levels and the zoo's space."""

    def _first(self) -> FittedNetwork:
        model: Any = self
        model.get_spec()
        members = model.members()
        if not members:
            raise PerturbZooError("GRNODE: the network is not fitted yet: fit the model, or load a checkpoint")
        return members[0]

    def _parsed(self, conditions: str | Condition | Sequence[str | Condition]) -> list[Condition]:
        """Read conditions, and refuse targets that are no node of the network."""
        given = [conditions] if isinstance(conditions, str | Condition) else list(conditions)
        read = [parse_condition(one) if isinstance(one, str) else one for one in given]
        nodes = set(self._first().nodes)
        unknown = sorted({target for one in read for target in one.targets} - nodes)
        if unknown:
            raise PerturbZooError(
                f"{shortened(unknown)}: not a gene of the network{near_matches(unknown[0], nodes)}; it has {len(nodes)} nodes"
            )
        return read

    # ------------------------------------------------------------------ network

    def network(self) -> GeneRegulatoryNetwork:
        """The inferred network; weights and probabilities as :func:`perturbzoo.grn.inference_kinetics.mean_network`."""
        self._first()
        members: Any = self
        return mean_network(members.members())

    # ------------------------------------------------------------------ trajectory

    def trajectory(
        self, cells: AnnData | str | os.PathLike[str], conditions: Sequence[str] | str, times: Sequence[float]
    ) -> AnnData:
        """Follow the mean of control cells after the interventions set in.

        Parameters
        ----------
        cells
            Control cells, or the control cells of a screen, as for ``predict``.
        conditions
            Onsets and offsets are obeyed: ``"STAT1:knockout[2,6]"``.
        times
            Increasing, from 0: in mean mRNA lifetimes, as steady states tell ratios of rates only; in the data's unit, where
            the model was fitted with ``time_course: true``.

        Returns
        -------
        AnnData
            One row for each context, condition and time: ``obs`` with `condition`, `time` and the covariates; ``X``
            log1p-normalised; ``layers['delta']``, and ``layers['log_change']``, the natural log of levels over those of controls.

        Raises
        ------
        PerturbZooError
            A target is unknown, or times do not increase from 0.
        """
        from anndata import AnnData

        model: Any = self
        moments = [float(time) for time in times]
        if not moments or moments[0] < 0 or moments != sorted(set(moments)):
            raise PerturbZooError(f"times {shortened(map(str, moments))} must increase, from 0 or later")
        read = self._parsed(conditions)
        query, context = self._read(cells)
        fitted = self._first()
        start = [0.0, *moments] if moments[0] > 0 else moments
        rows, changes = [], []
        for place, known in enumerate(context.tolist()):
            at = torch.full((len(read),), known)
            rates = fitted.dynamics.bind(fitted.interventions(fitted.encode(read)), at)
            reference = fitted.dynamics.control_level[at]
            with torch.no_grad():
                states = integrate(rates, reference, start)[len(start) - len(moments) :]  # (T, N, nodes)
                change = torch.log(states / reference)[..., : fitted.measured]
            for number, condition in enumerate(read):
                for moment, values in zip(moments, change[:, number], strict=True):
                    rows.append({"condition": str(condition), "time": moment, "context": place})
                    changes.append(values)
        z = torch.stack(changes)
        obs = pd.DataFrame(rows)
        of_row = torch.as_tensor(context[obs["context"].to_numpy()])
        delta = model.expected(z, of_row).numpy()
        averaged = query.averaged().obs.reset_index(drop=True)
        for name in averaged.columns:
            obs[name] = averaged[name].to_numpy()[obs["context"].to_numpy()]
        answer = AnnData(
            query.control_mean[obs["context"].to_numpy()] + delta,
            obs=obs.drop(columns="context").set_axis("row" + obs.index.astype(str)),
            var=pd.DataFrame(index=list(model.get_spec().genes)),
        )
        answer.layers["delta"], answer.layers["log_change"] = delta, z.numpy()
        return answer

    def _read(self, cells: AnnData | str | os.PathLike[str]) -> tuple[Any, np.ndarray]:
        """Cells the way the model's were read, and the network's context of each of theirs (the first for a new one)."""
        from perturbzoo.data.query import read_query

        model: Any = self
        query = read_query(cells, model.get_spec(), model.data_arguments)
        return query, np.maximum(query.known_context, 0)

    # ------------------------------------------------------------------ counterfactual

    def counterfactual(self, cells: AnnData, conditions: Sequence[str] | str) -> AnnData:
        """Say what observed cells would have been under other interventions.

        Abduction: what of a cell's counts is its own, beyond its condition's mean, is inferred from them. Action: its
        interventions are replaced. Prediction: its own part stays. See :mod:`perturbzoo.grn.counterfactual`.

        Parameters
        ----------
        cells
            Observed cells with raw counts, perturbed ones or controls, and the column that says which.
        conditions
            What should have been done to them instead; ``"control"`` takes the perturbation away.

        Returns
        -------
        AnnData
            One row for each cell and condition: ``X``, expected expression, log1p-normalised; ``layers['factual']``, the same
            under the condition that the cell had; ``obs``: `cell`, `observed`, `condition`, `prior_only`: whether the counts
            say so little of the cell that its answer is its population's.

        Raises
        ------
        PerturbZooError
            There are no counts, no column of conditions, or an unknown target.
        """
        import warnings

        from anndata import AnnData

        from perturbzoo.data import columns

        model: Any = self
        spec, data, fitted = model.get_spec(), model.data_arguments, self._first()
        if spec.depth <= 0:
            raise PerturbZooError(
                "counterfactual: the model was trained without counts, and cannot tell a cell's own part from noise"
            )
        labels = data.get("control_labels") or ()
        key = data.get("condition_key")
        if key not in cells.obs.columns:
            key = columns.find_condition_column(cells.obs, labels, "the cells") if key is None else columns.require_column(
                cells.obs, key, "condition_key", "the cells"
            ).name  # fmt: skip
        observed, code = parse_conditions(
            cells.obs[key].astype(str).tolist(), separator=data.get("separator"), control_labels=labels
        )
        wanted = self._parsed(conditions)
        self._parsed(observed)
        bare = cells.copy()
        bare.obs = bare.obs.drop(columns=[name for name in (key, *columns.CONDITION_COLUMNS) if name in bare.obs.columns])
        query, context = self._read(bare)
        if len(query.size_factor) != len(code):
            raise PerturbZooError("counterfactual: some of the cells have no counts of the model's genes; leave them out")
        size = query.size_factor / spec.depth  # expected count at a level of 1 normalised count
        counts = query.values.copy()
        np.expm1(counts.data, out=counts.data)
        counts.data = np.rint(counts.data * np.repeat(size, np.diff(counts.indptr)))
        of_cell = context[query.context]
        noise = ExtrinsicNoise(self._padded(model.extrinsic_loading), self._padded(model.extrinsic_dispersion))
        table = np.zeros((counts.shape[0], len(fitted.nodes)))
        table[:, : fitted.measured] = counts.toarray()
        pairs, row = np.unique(np.stack([code, of_cell]), axis=1, return_inverse=True)
        acts_observed = fitted.interventions(fitted.encode([observed[number] for number in pairs[0]]))
        parts = []
        for condition in wanted:
            answer = counterfactual(
                fitted.dynamics,
                noise,
                table,
                size,
                acts_observed,
                fitted.interventions(fitted.encode([condition] * pairs.shape[1])),
                row=row.ravel(),
                context=torch.as_tensor(pairs[1]),
            )
            parts.append((condition, answer))
        scale = torch.as_tensor(size)
        frames, found, factual = [], [], []
        for condition, answer in parts:
            frames.append(
                pd.DataFrame(
                    {
                        "cell": list(cells.obs_names),
                        "observed": [str(observed[number]) for number in code],
                        "condition": str(condition),
                        "prior_only": answer.prior_only.numpy(),
                    }
                )
            )
            found.append(model.expression_of(answer.level[:, : fitted.measured], scale).numpy())
            factual.append(model.expression_of(answer.factual[:, : fitted.measured], scale).numpy())
        obs = pd.concat(frames, ignore_index=True)
        if (unsure := int(obs["prior_only"].sum())) > len(obs) / 2:
            message = (
                f"{unsure} of {len(obs)} cell-level answers are their population's: the counts say too little of single cells"
            )
            warnings.warn(message, PerturbZooWarning, stacklevel=2)
        result = AnnData(
            np.concatenate(found), obs=obs.set_axis("row" + obs.index.astype(str)), var=pd.DataFrame(index=list(spec.genes))
        )
        result.layers["factual"] = np.concatenate(factual)
        return result

    def _padded(self, values: Tensor) -> Tensor:
        """Nodes that are not measured have no noise of their own."""
        fitted = self._first()
        extra = len(fitted.nodes) - fitted.measured
        return torch.cat([values, values.new_zeros(extra, *values.shape[1:])])

    # ------------------------------------------------------------------ explanation

    def explain(self, condition: str | Condition, *, context: int = 0, **options: Any) -> Explanation:
        """Attribute a condition's predicted change to acts, edges and paths; they sum to it.

        Parameters
        ----------
        condition
            One condition.
        context
            Index of the context.
        options
            `genes`, `n_genes`, `top`, `length` of :func:`perturbzoo.grn.attribution.explain`.

        Raises
        ------
        PerturbZooError
            A target is unknown, or the steady state is not stable.
        """
        from perturbzoo.grn.attribution import explain

        (read,) = self._parsed(condition)
        fitted = self._first()
        return explain(fitted.pruned(), fitted.interventions(fitted.encode([read])), context, **options)

    # ------------------------------------------------------------------ linking

    def link(
        self,
        predictions: PerturbationModel | AnnData | pd.DataFrame | str | os.PathLike[str],
        conditions: Sequence[str | Condition] | None = None,
        *,
        edges: int | None = None,
    ) -> Link:
        """Link another model's predictions to the network.

        Parameters
        ----------
        predictions
            A model of the zoo or its checkpoint; what ``predict(..., pseudobulk=True)`` gave; or a table with a row for each
            condition and a column for each gene: changes of log1p-normalised expression.
        conditions
            For a model: what it is asked about. None: every target of the data alone.
        edges
            Most probable edges of each network that are compared; None: as many as the data's network has that are more probable than
            not. Networks of one size: predictions without noise imply more edges than cells can show.

        Raises
        ------
        PerturbZooError
            The predictions have other genes, or name targets that the network lacks.
        """
        model: Any = self
        spec, fitted = model.get_spec(), self._first()
        named, delta = self._predicted(predictions, conditions)
        context = torch.zeros(len(named), dtype=torch.int64)
        change = model.log_change(torch.as_tensor(delta, dtype=torch.float32), context).numpy().astype(float)
        noise = model.level_error.numpy().astype(float)
        signal = network_signal(named, spec.genes, change, noise)
        own = self.network()
        levels = Levels(
            tuple(spec.genes),
            tuple(named),
            context.numpy(),
            model.control[[0]].numpy() * np.exp(change),
            model.control[[0]].numpy(),
            np.broadcast_to(noise, change.shape),
            noise[None] / 3,
            spec.default_kind,
        )
        prior = fitted.candidates
        candidates = candidate_network(levels, prior.genes[: len(prior.genes)], prior, restrict=True)
        implied = mean_network([fit_network(levels, candidates, model._options())])
        believed = max(1, int((own.probability > BELIEVED).sum()))
        perturbed = {target for one in named for target in one.targets}
        heard = [name for name in own.genes if name in perturbed or name not in set(spec.genes)]
        acts = fitted.interventions(fitted.encode(named))
        nodes = len(fitted.nodes)
        with torch.no_grad():
            level = torch.exp(fitted.change(named))
        level[:, : fitted.measured] = torch.as_tensor(np.exp(change), dtype=level.dtype)
        full_noise = np.full(nodes, 1.0)
        full_noise[: fitted.measured] = noise
        return Link(
            data=own,
            model=implied,
            edges=compare_edges(own, implied, edges=edges or believed, by="probability", regulators=heard or None),
            consistency=consistency(
                fitted.pruned(), level * fitted.dynamics.control_level[context], acts, context, noise=full_noise, own=False
            ),
            off_targets=off_targets(self._moving(), named, np.pad(change, ((0, 0), (0, nodes - fitted.measured))), full_noise),
            signal=signal,
        )

    def _moving(self) -> GeneRegulatoryNetwork:
        """The edges that take part in the kinetics: what no path of them reaches does not move."""
        fitted = self._first()
        kept, edges = (fitted.dynamics.weight != 0).cpu().numpy(), fitted.candidates
        parts = (edges.regulator, edges.target, fitted.dynamics.weight.detach().cpu().double().numpy())
        regulator, target, weight = (part[kept] for part in parts)
        return GeneRegulatoryNetwork(edges.genes, regulator, target, weight, np.sign(weight), np.ones(len(weight)))

    def _predicted(self, predictions: Any, conditions: Sequence[str | Condition] | None) -> tuple[list[Condition], np.ndarray]:
        """Conditions, and their predicted changes ``(N, G)`` in the order of the genes."""
        from perturbzoo.checkpoint import load
        from perturbzoo.models.base import PerturbationModel

        own: Any = self
        spec = own.get_spec()
        model = load(predictions) if isinstance(predictions, str | os.PathLike) else predictions
        if isinstance(model, PerturbationModel):
            if model.get_spec().genes != spec.genes:
                raise PerturbZooError("link: the model was trained on other genes than the network")
            asked = conditions if conditions is not None else [Condition([Intervention(target)]) for target in spec.targets]
            named = self._parsed(list(asked))
            table = encode_conditions(named, [0] * len(named), model.target_names, spec.default_kind)
            control = torch.from_numpy(spec.control_mean)[table.context]
            with torch.no_grad():
                return named, mean_delta(model, table, control).numpy()
        if not isinstance(model, pd.DataFrame):
            if "delta" not in model.layers or "condition" not in model.obs:
                raise PerturbZooError(
                    "link: give what predict(..., pseudobulk=True) returns: layers['delta'], obs['condition']"
                )
            model = model.to_df("delta").groupby(model.obs["condition"].astype(str), observed=True).mean()
        missing = sorted(set(spec.genes) - set(map(str, model.columns)))
        if missing:
            raise PerturbZooError(f"link: the predictions lack {len(missing)} of {spec.n_genes} genes: {shortened(missing)}")
        labels = [str(name) for name in model.index] if conditions is None else [str(one) for one in conditions]
        absent = sorted(set(labels) - set(map(str, model.index)))
        if absent:
            raise PerturbZooError(f"link: the predictions lack {len(absent)} of the conditions: {shortened(absent)}")
        table = model.set_axis(model.index.astype(str)).loc[labels]
        return self._parsed([str(name) for name in table.index]), table[list(spec.genes)].to_numpy(dtype=float)
