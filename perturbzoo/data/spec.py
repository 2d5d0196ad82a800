"""What a trained model must remember of its data, as plain JSON."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from perturbzoo.errors import PerturbZooError

SCHEMA = 1

ValueSpace = Literal["counts", "log1p"]


@dataclass(frozen=True, eq=False)
class DataSpec:
    """Everything a checkpoint needs in order to read new cells and conditions the way the training data were read.

    Attributes
    ----------
    genes
        Names of the G measured genes, in the order of every gene axis.
    targets
        Names of all targets that the training file named, measured or not, in the order of every target axis.
    default_kind
        Kind of an intervention that a condition string does not spell out (``"KLF1"``).
    covariates
        Levels of each covariate, ``{"cell_type": ("K562", "RPE1")}``.
    match_on
        The covariates whose levels form a context, the stratum in which controls are matched.
    contexts
        The observed contexts: one tuple of levels of `match_on` each. ``((),)`` where nothing is matched.
    control_mean
        Shape ``(contexts, genes)``, float32: mean expression of each context's control cells.
    value_space
        What the training file held: raw ``"counts"`` or values already ``"log1p"``-normalised.
    depth
        Counts per cell after normalisation: the median size factor of the training cells. 0 where the file was
        log1p already.
    size_factor_key
        The obs column of size factors, or None for each cell's total counts.
    split
        The split's records, as :meth:`perturbzoo.data.splits.Split.to_json` writes them.
    training_pairs
        The (condition string, context index) pairs the model was fitted on, sorted.
    genes_chosen
        Whether `genes` were chosen from more, over all of which a cell's counts were totalled.
    """

    genes: tuple[str, ...]
    targets: tuple[str, ...]
    default_kind: str
    covariates: dict[str, tuple[str, ...]]
    match_on: tuple[str, ...]
    contexts: tuple[tuple[str, ...], ...]
    control_mean: np.ndarray
    value_space: ValueSpace
    depth: float
    size_factor_key: str | None
    split: str
    training_pairs: tuple[tuple[str, int], ...]
    genes_chosen: bool = False
    schema: int = field(default=SCHEMA)

    @property
    def n_genes(self) -> int:
        return len(self.genes)

    def context_label(self, context: int) -> str:
        """Readable name of a context: its levels joined by ``|``; empty where nothing is matched."""
        return "|".join(self.contexts[context])

    def to_json(self) -> str:
        """Write as JSON; nine significant digits keep every float32 exactly."""
        plain: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        plain["control_mean"] = [[float(f"{value:.9g}") for value in row] for row in self.control_mean]
        return json.dumps(plain)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the JSON text: tells whether two models know the same of their data."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> DataSpec:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        PerturbZooError
            The text comes from a newer version of the package, or is no spec at all.
        """
        try:
            plain = json.loads(text)
            if plain["schema"] > SCHEMA:
                raise PerturbZooError(
                    f"the data spec has schema {plain['schema']}, this perturbzoo reads up to {SCHEMA}: upgrade perturbzoo"
                )
            return cls(
                genes=tuple(plain["genes"]),
                targets=tuple(plain["targets"]),
                default_kind=plain["default_kind"],
                covariates={name: tuple(levels) for name, levels in plain["covariates"].items()},
                match_on=tuple(plain["match_on"]),
                contexts=tuple(tuple(levels) for levels in plain["contexts"]),
                control_mean=np.asarray(plain["control_mean"], dtype=np.float32).reshape(
                    len(plain["contexts"]), len(plain["genes"])
                ),
                value_space=plain["value_space"],
                depth=plain["depth"],
                size_factor_key=plain["size_factor_key"],
                split=plain["split"],
                training_pairs=tuple((condition, int(context)) for condition, context in plain["training_pairs"]),
                genes_chosen=plain.get("genes_chosen", False),
                schema=plain["schema"],
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise PerturbZooError(f"not a perturbzoo data spec: {error!r}; was the checkpoint edited?") from error
