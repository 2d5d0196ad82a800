"""Two files of cells, and perhaps the screen that a model was trained on, brought together: genes, scale, conditions, controls.

Called by :mod:`perturbzoo.evaluate`. Everything that two files can disagree on is said or refused here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from perturbzoo.data.cell_blocks import CellFile, open_cells
from perturbzoo.data.scales import Scaled, common_scale
from perturbzoo.data.screen import Columns
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, near_matches, shortened
from perturbzoo.perturbation import Condition

if TYPE_CHECKING:
    from anndata import AnnData

Key = tuple[str, tuple[str, ...]]
"""Canonical condition and levels of the context; the canonical string of control is ``control``."""

CONTROL = str(Condition())


@dataclass
class Side:
    """A file with its groups: which cells are of which (condition, context), and how its values are made comparable."""

    file: CellFile
    keys: list[Key]
    code: np.ndarray
    size: np.ndarray
    scaled: Scaled

    def cells_of(self, key: Key) -> int:
        return int(self.size[self.keys.index(key)]) if key in self.keys else 0


def read_sides(
    predicted: AnnData | str | os.PathLike[str],
    observed: AnnData | str | os.PathLike[str],
    training: AnnData | str | os.PathLike[str] | None,
    columns: Columns,
    predicted_columns: Columns,
    depth: float | None,
) -> tuple[dict[str, Side], list[str]]:
    """The files with common genes in one scale, and what to say of them."""
    files = {"observed": open_cells(observed, columns, name="observed")}
    key = files["observed"].condition_key
    files["predicted"] = open_cells(predicted, predicted_columns, name="predicted", key_of_other=key)
    if training is not None:
        files["training"] = open_cells(training, columns, name="training", key_of_other=key)
    genes = _common_genes(files)
    spaces = {name: (predicted_columns if name == "predicted" else columns).value_space for name in files}
    scaled = common_scale(files, genes, spaces, depth)
    sides, said = {}, []
    for name, file in files.items():
        file = file.select(genes)
        n_contexts = len(file.contexts)
        distinct, code = np.unique(file.condition * n_contexts + file.context, return_inverse=True)
        # cells without counts have no expression; a prediction of nothing is scored as what it is
        code = np.where(scaled[name].usable, code, -1)
        keys = [(str(file.conditions[group // n_contexts]), file.contexts[group % n_contexts]) for group in distinct]
        sides[name] = Side(file, keys, code, np.bincount(code[code >= 0], minlength=len(keys)), scaled[name])
        n_conditions = len({condition for condition, _ in keys} - {CONTROL})
        said.append(
            f"{name}: {file.where}: {len(file):,} cells, {n_conditions} conditions from obs['{file.condition_key}'], "
            f"{int(file.is_control.sum()):,} control cells, {scaled[name].said}"
        )
    return {name: sides[name] for name in ("predicted", "observed", "training") if name in sides}, said


def _common_genes(files: dict[str, CellFile]) -> list[str]:
    """Genes that all files have, in the order of the observed ones."""
    shared = set.intersection(*(set(file.genes) for file in files.values()))
    observed, predicted = files["observed"], files["predicted"]
    genes = [gene for gene in observed.genes if gene in shared]
    if not genes:
        raise PerturbZooError(
            f"no gene is in all of the files: {predicted.where} has {shortened(predicted.genes, 3)}, {observed.where} "
            f"{shortened(observed.genes, 3)}; name a var column with gene_key, or translate names with gene_table"
        )
    for file in files.values():
        if len(genes) < len(file.genes):
            missing = [gene for gene in file.genes if gene not in shared]
            _warn(
                f"{file.where}: {len(missing)} of {len(file.genes)} genes are not in the other file and are left out "
                f"({shortened(missing, 3)}): scores are over {len(genes)} genes"
            )
    return genes


def common_rows(predicted: Side, observed: Side, min_cells: int) -> list[Key]:
    """The (condition, context) pairs that both files have cells of; says which are left out."""
    there = {key: size for key, size in zip(observed.keys, observed.size.tolist(), strict=True) if key[0] != CONTROL and size}
    here = {key for key, size in zip(predicted.keys, predicted.size.tolist(), strict=True) if key[0] != CONTROL and size}
    if not here:
        raise PerturbZooError(f"{predicted.file.where}: only control cells: nothing was predicted")
    rows = sorted(key for key in here if there.get(key, 0) >= max(1, min_cells))
    small = sorted(key for key in here if 0 < there.get(key, 0) < min_cells)
    if not rows and small:
        raise PerturbZooError(
            f"{observed.file.where}: no predicted condition has {min_cells} observed cells (the largest has "
            f"{max(there[key] for key in small)}): lower min_cells"
        )
    if not rows:
        first = min(here)
        near = near_matches(key_name(first), [key_name(key) for key in there]) or ";"
        raise PerturbZooError(
            f"no condition is in both files: {predicted.file.where} has {shortened(map(key_name, sorted(here)), 3)}{near} "
            f"{observed.file.where} has {shortened(map(key_name, sorted(there)), 3)}"
        )
    for keys, why in (
        (small, f"fewer than {min_cells} observed cells"),
        (sorted(here - there.keys()), f"predicted but not in {observed.file.where}"),
        (sorted(there.keys() - here), f"observed but not in {predicted.file.where}"),
    ):
        if keys:
            _warn(f"not scored, {why}: {shortened(map(key_name, keys))}")
    return rows


def control_side(predicted: Side, observed: Side, contexts: Sequence[tuple[str, ...]], reference: str) -> Side:
    """Whose control cells are the reference: the observed ones, if there are any."""
    has = {side.file.where: [side.cells_of((CONTROL, context)) > 0 for context in contexts] for side in (predicted, observed)}
    mine, theirs = has[predicted.file.where], has[observed.file.where]
    if reference == "own" and not all(mine):
        raise PerturbZooError(
            f"{predicted.file.where}: reference 'own' needs predicted control cells{_of(contexts, mine)}, and there are none; "
            "name their label with control_labels, or use reference 'shared'"
        )
    if all(theirs):
        return observed
    if not any(theirs) and all(mine):
        _warn(
            f"{observed.file.where}: no control cells: those of {predicted.file.where} are the reference, which a model may have "
            "changed"
        )
        return predicted
    raise PerturbZooError(
        f"{observed.file.where}: no control cells{_of(contexts, theirs)} in obs['{observed.file.condition_key}']: name their label "
        f"with control_labels (it holds {shortened(dict.fromkeys(name for name, _ in observed.keys))})"
    )


def _of(contexts: Sequence[tuple[str, ...]], has: Sequence[bool]) -> str:
    """`` of a|b`` for the contexts without; nothing where there are no contexts."""
    missing = ["|".join(context) for context, there in zip(contexts, has, strict=True) if context and not there]
    return f" of {shortened(missing)}" if missing else ""


def key_name(key: Key) -> str:
    return key[0] + (f" in {'|'.join(key[1])}" if key[1] else "")


def _warn(message: str) -> None:
    warnings.warn(message, PerturbZooWarning, stacklevel=3)
