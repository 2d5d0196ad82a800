"""Starting a model from the weights of another: what ``--init_from`` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from perturbzoo.models.base import PerturbationModel


def take_weights(model: PerturbationModel, path: str, source: PerturbationModel) -> None:
    """Copy what fits: whole tensors of the same shape, and rows and columns of genes and targets of the same name.

    Parameters
    ----------
    model
        Its layers are built; changed in place.
    path
        Where `source` was read from, for the line that says what was taken.
    source
        A model of the same class, maybe of another screen.
    """
    names = {"gene": (source.get_spec().genes, model.get_spec().genes), "target": (source.target_names, model.target_names)}
    shared = {}
    for axis, (old, new) in names.items():
        position = {name: row for row, name in enumerate(old)}
        common = [name for name in new if name in position]
        old_rows = torch.tensor([position[name] for name in common], dtype=torch.int64)
        shared[axis] = (
            old_rows,
            torch.tensor([row for row, name in enumerate(new) if name in position], dtype=torch.int64),
        )
    axes, theirs = model.parameter_axes(), source.state_dict()
    fresh = []
    # running statistics of a batch normalisation belong to its weights
    running = {name: buffer for name, buffer in model.named_buffers() if ".running_" in name}
    for name, own in [*model.named_parameters(), *running.items()]:
        value = theirs.get(name)
        kinds = axes.get(name, (None,) * own.ndim)
        fits = value is not None and all(a == b or k for a, b, k in zip(value.shape, own.shape, kinds, strict=True))
        if value is None or not fits:
            fresh.append(name)
            continue
        index = [shared[kind] if kind else (torch.arange(n), torch.arange(n)) for kind, n in zip(kinds, own.shape, strict=True)]
        with torch.no_grad():
            own[torch.meshgrid(*(new for _, new in index), indexing="ij")] = value[
                torch.meshgrid(*(old for old, _ in index), indexing="ij")
            ].to(own)
    counts = ", ".join(f"{len(shared[axis][1])} of {len(new)} {axis}s" for axis, (_, new) in names.items())
    print(f"weights from {path}: {counts}" + (f"; new: {', '.join(fresh)}" if fresh else ""))
