"""The one data module of the zoo: from an h5ad file to condition-indexed batches."""

from __future__ import annotations

import itertools
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from scipy import sparse

from perturbzoo.data import columns
from perturbzoo.data.batch import ConditionTable, encode_conditions
from perturbzoo.data.joining import read_files
from perturbzoo.data.loader import BatchLoader
from perturbzoo.data.preprocessing import keep_variable_genes, match_spec
from perturbzoo.data.reading import expand_path, group_means, normalise
from perturbzoo.data.sampling import CellIndex, ConditionSampler, EveryCellSampler, Sampler, Sampling
from perturbzoo.data.screen import Columns, Screen, understand
from perturbzoo.data.source import CSRSource
from perturbzoo.data.spec import DataSpec, ValueSpace
from perturbzoo.data.splits import Split, make_split
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened
from perturbzoo.perturbation import Condition

if TYPE_CHECKING:
    from anndata import AnnData

Part = Literal["train", "val", "test"]


@dataclass
class TrainingPseudobulks:
    """Means of the training cells, in expression (log1p-normalised) units.

    Attributes
    ----------
    conditions, contexts
        The P training pairs: condition and context index of each.
    mean
        Shape ``(P, G)``, float64: mean expression of each pair's cells.
    count
        Shape ``(P,)``: cells of each pair.
    control_mean
        Shape ``(contexts, G)``, float64.
    """

    conditions: list[Condition]
    contexts: np.ndarray
    mean: np.ndarray
    count: np.ndarray
    control_mean: np.ndarray

    @property
    def delta(self) -> np.ndarray:
        """Shape ``(P, G)``: mean of each pair minus the mean of its context's controls."""
        return self.mean - self.control_mean[self.contexts]


class PerturbSeqDataModule(LightningDataModule):
    """Perturb-seq cells as batches indexed by condition.

    Nothing that is fitted (normalisation depth, variable genes, control means, graphs) looks at validation or test cells.

    Parameters
    ----------
    path
        One h5ad file or several; ``$VAR`` is expanded; ``public:norman`` names a public data set, ``embedded:screen.h5ad``
        the simulated default. :meth:`from_anndata` takes cells from memory instead.
    join
        Genes of several files: their intersection, or their union (absent genes count as 0).
    layer
        Layer that holds the values, or None for ``X``.
    condition_key
        obs column of perturbation labels; None to detect it (GEARS, scPerturb, PerturBench, pertpy, ``target_gene``).
    control_labels
        Spellings of control beyond ``control``, ``ctrl``, ``NT``, ``non-targeting`` and their like.
    separator
        What joins the targets of a combination beyond ``+`` and ``;``, such as ``_``.
    dose_key
        obs column(s) with the dose of each target.
    kind
        Kind of perturbation: ``knockout``, ``interference``, ``activation``, ``overexpression``, ``clamp``, ``compound``
        or ``cytokine``; None to read it from a column such as ``perturbation_type``.
    covariates
        obs columns given to the models (cell type, batch, stimulation).
    match_on
        The covariates within whose levels controls are matched; None for all of them.
    size_factor_key
        obs column of size factors; None for each cell's total counts.
    value_space
        ``counts`` or ``log1p``; None to detect it.
    gene_key
        var column of gene names; None for the index.
    gene_table
        A table of symbols and Ensembl identifiers; gene names are translated to symbols with it.
    n_top_genes
        Keep this many highly variable genes of the training cells, and every measured target; None for all genes.
    cell_filter
        Cells to keep, such as ``grna_frac > .5``; several clauses are joined by ``and``.
    min_cells
        Conditions with fewer cells (in a context) are left out.
    split
        Arguments of :func:`perturbzoo.data.splits.make_split`, such as ``{method: simulation, seed: 1}``, or the path of
        a split saved as JSON.
    perturbation_graph
        Sources of a graph between targets, for the models that use one, as :func:`perturbzoo.data.graphs.build_graph` takes
        them: ``[{kind: go, path: gene2go.csv}]``; several are united.
    conditions_per_batch
        Distinct (condition, context) pairs in a training batch.
    cells_per_condition
        Cells of each of them.
    sampling
        ``condition`` pairs each cell with one control; ``grouped`` draws m cells and m independent controls for each
        pair, pair after pair.
    eval_batch_size
        Cells in a validation, test or prediction batch.
    seed
        Seed of the sampling; None for the one given to ``seed_everything``.
    """

    def __init__(
        self,
        path: str | list[str] | None = None,
        join: Literal["intersection", "union"] = "intersection",
        layer: str | None = None,
        condition_key: str | None = None,
        control_labels: list[str] | None = None,
        separator: str | None = None,
        dose_key: str | list[str] | None = None,
        kind: str | None = None,
        covariates: list[str] | None = None,
        match_on: list[str] | None = None,
        size_factor_key: str | None = None,
        value_space: ValueSpace | None = None,
        gene_key: str | None = None,
        gene_table: str | None = None,
        n_top_genes: int | None = None,
        cell_filter: str | None = None,
        min_cells: int = 10,
        split: dict[str, Any] | str | None = None,
        perturbation_graph: list[dict[str, Any]] | None = None,
        conditions_per_batch: int = 16,
        cells_per_condition: int = 32,
        sampling: Sampling = "condition",
        eval_batch_size: int = 1024,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        # not to the loggers: Lightning refuses an argument that the model has too with another value
        self.save_hyperparameters(logger=False)
        self.spec: DataSpec | None = None
        self._given_spec: DataSpec | None = None
        self._adata: AnnData | None = None
        self._bulks: TrainingPseudobulks | None = None
        self._control_variance: np.ndarray | None = None
        self._ready = False

    @classmethod
    def from_anndata(cls, adata: AnnData, **arguments: Any) -> PerturbSeqDataModule:
        """Take the cells from memory; `adata` is not changed. `arguments` are those of the class but for ``path``."""
        module = cls(**arguments)
        module._adata = adata
        return module

    def use_spec(self, spec: DataSpec) -> None:
        """Read the cells the way a trained model's data were read: its genes, depth, contexts and split.

        Pairs that the model's split does not name are test pairs.
        """
        self._given_spec = spec
        self._bulks = self._control_variance = None
        self._ready = False

    # ------------------------------------------------------------------ setting up

    def prepare_data(self) -> None:
        """Download or simulate files that are named but not there yet; Lightning calls it in one process only."""
        graphs = [source["path"] for source in self.hparams["perturbation_graph"] or [] if "path" in source]
        for path in [*self._paths(), *graphs]:
            expand_path(path)

    def _paths(self) -> list[str]:
        path = self.hparams["path"]
        return [os.fspath(path)] if isinstance(path, str | os.PathLike) else [os.fspath(part) for part in path or []]

    def setup(self, stage: str | None = None) -> None:
        """Read, split and normalise, once."""
        if self._ready:
            return
        trained = getattr(getattr(self.trainer, "lightning_module", None), "spec", None)
        if stage != "fit" and self._given_spec is None and trained is not None:
            self._given_spec = trained
        screen = self._read()
        given = self._given_spec
        self._pairs, pair = screen.pairs()
        self.conditions = [screen.conditions[condition] for condition, _ in self._pairs]
        self.split = self._make_split(screen)
        label = ["|".join(context) or None for context in screen.contexts]
        parts = [
            self.split.part_of(str(condition), label[context])
            for condition, (_, context) in zip(self.conditions, self._pairs, strict=True)
        ]
        if given is not None:
            parts = [part or "test" for part in parts]
        self.parts = np.array([part or "left out" for part in parts])
        training = screen.is_control | (pair >= 0) & (self.parts[pair] == "train")
        if given is None and not (self.parts == "train").any():
            raise PerturbZooError(f"{screen.where}: the split '{self.split.name}' leaves no training condition")

        depth, n_measured = 0.0, len(screen.genes)
        if given is not None:
            match_spec(screen, given)
        else:
            if screen.value_space == "counts":
                depth = float(np.median(screen.size_factor[training]))
                normalise(screen.values, screen.size_factor, depth)
            if self.hparams["n_top_genes"] is not None:
                keep_variable_genes(screen, training, self.hparams["n_top_genes"])

        context_of_pair = np.array([context for _, context in self._pairs], dtype=np.int64)
        order = np.argsort(pair, kind="stable")
        starts = np.searchsorted(pair[order], np.arange(len(self._pairs) + 1))
        control = screen.is_control
        self.index = CellIndex(
            cells_by_pair=[order[a:b] for a, b in itertools.pairwise(starts)],
            context_of_pair=context_of_pair,
            controls_by_context=[
                np.flatnonzero(control & (screen.context == context)) for context in range(len(screen.contexts))
            ],
        )
        control_mean = group_means(screen.values, self.index.controls_by_context)
        chosen = len(screen.genes) < n_measured
        self.spec = given or self._make_spec(screen, depth, control_mean.astype(np.float32), chosen)
        if given is not None:
            # a known context keeps its place in the model's list; a new one is -1
            known = {levels: position for position, levels in enumerate(given.contexts)}
            context_of_pair = np.array([known.get(screen.contexts[c], -1) for c in context_of_pair], dtype=np.int64)
        self._screen = screen
        self.control_mean = control_mean
        self.table: ConditionTable = encode_conditions(
            self.conditions, context_of_pair.tolist(), self.target_names(), self.spec.default_kind
        )
        self._report(screen)
        self._ready = True

    def _read(self) -> Screen:
        wanted = Columns(
            **{name: self.hparams[name] for name in Columns.__dataclass_fields__ if self.hparams[name] is not None}
        )
        if self._adata is not None:
            return understand(self._adata, wanted, "the AnnData", own=False)
        paths = self._paths()
        if not paths:
            raise PerturbZooError("no data: give an h5ad file with --data.path, or use PerturbSeqDataModule.from_anndata")
        return read_files(paths, self.hparams["join"], wanted)

    def _make_split(self, screen: Screen) -> Split:
        if self._given_spec is not None:
            return Split.from_json(self._given_spec.split)
        wanted = self.hparams["split"] if self.hparams["split"] is not None else {"method": "simulation", "seed": 1}
        if isinstance(wanted, str):
            return Split.load(expand_path(wanted))
        label = ["|".join(context) or None for context in screen.contexts]
        pairs = [(screen.conditions[condition], label[context]) for condition, context in self._pairs]
        arguments = dict(wanted)
        if arguments.get("method") == "column":
            # a pair may show several values: the split refuses it then
            values = columns.require_column(screen.obs, arguments.pop("column", "split"), "split", screen.where).astype(object)
            shown = pd.DataFrame({"pair": screen.pairs()[1], "value": values.to_numpy()}).drop_duplicates()
            shown = shown[shown["pair"] >= 0]
            pairs, arguments["values"] = [pairs[pair] for pair in shown["pair"]], shown["value"].tolist()
        return make_split(pairs, **arguments)

    def _make_spec(self, screen: Screen, depth: float, control_mean: np.ndarray, genes_chosen: bool) -> DataSpec:
        return DataSpec(
            genes=tuple(screen.genes),
            # all that the file named, also in conditions too small to be kept: a model may be asked about them
            targets=tuple(sorted({target for condition in screen.conditions for target in condition.targets})),
            default_kind=screen.kind,
            covariates=screen.covariates,
            match_on=screen.match_on,
            contexts=tuple(screen.contexts),
            control_mean=control_mean,
            value_space=screen.value_space,
            depth=depth,
            size_factor_key=self.hparams["size_factor_key"] if screen.value_space == "counts" else None,
            split=self.split.to_json(),
            training_pairs=tuple(
                (str(condition), context)
                for condition, (_, context), part in zip(self.conditions, self._pairs, self.parts, strict=True)
                if part == "train"
            ),
            genes_chosen=genes_chosen,
        )

    def target_names(self) -> list[str]:
        """The model's targets, then those that only this file names (a model refuses them unless it has an embedding)."""
        assert self.spec is not None
        named = {target for condition in self.conditions for target in condition.targets}
        return [*self.spec.targets, *sorted(named - set(self.spec.targets))]

    @rank_zero_only
    def _report(self, screen: Screen) -> None:
        assert self.spec is not None
        unmeasured = sorted(set(self.spec.targets) - set(self.spec.genes))
        if unmeasured:
            warnings.warn(
                f"{len(unmeasured)} of {len(self.spec.targets)} targets are not among the measured genes "
                f"({shortened(unmeasured)}): they are condition tokens with an embedding",
                PerturbZooWarning,
                stacklevel=2,
            )
        for line in [*screen.report, self.split.summary()]:
            print(line)

    # ------------------------------------------------------------------ what models fit from

    def training_pseudobulks(self) -> TrainingPseudobulks:
        """Mean expression of every training pair; one pass over the training cells, once."""
        if self._bulks is not None:
            return self._bulks
        chosen = self.pairs_of("train")
        groups = [self.index.cells_by_pair[pair] for pair in chosen]
        self._bulks = TrainingPseudobulks(
            conditions=[self.conditions[pair] for pair in chosen],
            contexts=self.index.context_of_pair[chosen],
            mean=group_means(self._screen.values, groups),
            count=np.array([len(group) for group in groups]),
            control_mean=self.control_mean,
        )
        return self._bulks

    @property
    def control_variance(self) -> np.ndarray:
        """Shape ``(contexts, G)``, float64: unbiased variance over each context's control cells; one pass over them, once."""
        if self._control_variance is None:
            self._control_variance = self.moments(self.index.controls_by_context)[1]
        return self._control_variance

    def moments(self, groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and unbiased variance of the expression of each group of cells, ``(groups, G)`` float64 each.

        The variance of a group with one cell is NaN.
        """
        mean = group_means(self._screen.values, groups)
        size = np.array([len(group) for group in groups], dtype=float)[:, None]
        squares = group_means(self._screen.values, groups, squared=True)
        # rounding may leave a little below 0, or a little above it where there is one cell
        variance = np.maximum(squares - mean**2, 0.0) * (size / np.maximum(size - 1, 1))
        return mean, np.where(size > 1, variance, np.nan)

    @property
    def expression(self) -> sparse.csr_matrix:
        """Expression of all cells, ``(cells, G)`` CSR, log1p-normalised; :attr:`index` counts its rows."""
        return self._screen.values

    @property
    def obs(self) -> pd.DataFrame:
        """The obs table of the cells, in the order of `expression`."""
        return self._screen.obs

    @property
    def size_factor(self) -> np.ndarray:
        """Shape ``(cells,)``: depth of each cell in counts; 0 where the file held none."""
        return self._screen.size_factor

    def _training_rows(self) -> np.ndarray:
        rows = [self.index.cells_by_pair[pair] for pair in self.pairs_of("train")] + self.index.controls_by_context
        return np.sort(np.concatenate(rows))

    def training_cells(self) -> sparse.csr_matrix:
        """Expression of all training cells and controls, ``(cells, G)`` CSR, log1p-normalised."""
        return self.expression[self._training_rows()]

    def training_sizes(self) -> np.ndarray:
        """Size factors of these cells, ``(cells,)``, counts; zeros where there are log1p values only."""
        return self._screen.size_factor[self._training_rows()]

    def pairs_of(self, part: Part) -> np.ndarray:
        """Positions of the (condition, context) pairs of a part of the split."""
        return np.flatnonzero(self.parts == part)

    def describe_pairs(self, pairs: np.ndarray) -> list[dict[str, str]]:
        """Condition, context and split category of each pair, as text."""
        rows = []
        for pair in pairs:
            condition, context = str(self.conditions[pair]), "|".join(self._screen.contexts[self._pairs[pair][1]])
            category = self.split.category_of(condition, context or None) or "new"
            rows.append({"condition": condition, "context": context, "category": category})
        return rows

    # ------------------------------------------------------------------ loaders

    def _seed(self) -> int:
        if self.hparams["seed"] is not None:
            return int(self.hparams["seed"])
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def loader(self, sampler: Sampler) -> BatchLoader:
        """A loader of the batches that `sampler` names."""
        assert self.spec is not None
        return BatchLoader(
            source=CSRSource(self._screen.values),
            sampler=sampler,
            table=self.table,
            control_mean=torch.as_tensor(self.control_mean, dtype=torch.float32),
            context_of_pair=self.index.context_of_pair,
            size_factor=self._screen.size_factor,
            covariates=self._screen.covariate,
            depth=self.spec.depth,
        )

    def train_dataloader(self) -> BatchLoader:
        sampler = ConditionSampler(
            self.index,
            self.pairs_of("train"),
            conditions_per_batch=self.hparams["conditions_per_batch"],
            cells_per_condition=self.hparams["cells_per_condition"],
            mode=self.hparams["sampling"],
            seed=self._seed(),
            **self._ranks(),
        )
        if len(small := sampler.resampled_pairs):
            names = [str(self.conditions[pair]) for pair in small]
            warnings.warn(
                f"{len(small)} conditions have fewer than {sampler.cells_per_condition} cells ({shortened(names)}): "
                "their cells are drawn more than once in a batch",
                PerturbZooWarning,
                stacklevel=2,
            )
        return self.loader(sampler)

    def _every_cell(self, part: Part) -> BatchLoader | list[Any]:
        pairs = self.pairs_of(part)
        if not len(pairs):
            return []
        size = self.hparams["eval_batch_size"]
        return self.loader(EveryCellSampler(self.index, pairs, batch_size=size, seed=self._seed(), **self._ranks()))

    def val_dataloader(self) -> BatchLoader | list[Any]:
        return self._every_cell("val")

    def test_dataloader(self) -> BatchLoader | list[Any]:
        loader = self._every_cell("test")
        if isinstance(loader, list):
            raise PerturbZooError(
                f"the split '{self.split.name}' leaves no test condition: choose another split or other fractions"
            )
        return loader

    def predict_dataloader(self) -> BatchLoader | list[Any]:
        return self.test_dataloader()

    def has_validation(self) -> bool:
        """Whether any condition is held out for validation."""
        return bool((self.parts == "val").any())
