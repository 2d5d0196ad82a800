"""Reading checkpoints: tensors, numbers and strings only, and a class from the fixed list of the zoo."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbzoo.errors import PerturbZooError

if TYPE_CHECKING:
    from perturbzoo.models.base import PerturbationModel


def read_checkpoint(path: str | os.PathLike[str], map_location: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint file with ``torch.load(weights_only=True)``.

    Raises
    ------
    PerturbZooError
        The file is missing, truncated, holds a pickled object, or was not written by this package; there is no such device.
    """
    import torch

    file = Path(os.path.expandvars(os.path.expanduser(os.fspath(path))))
    if not file.is_file():
        raise PerturbZooError(f"{file}: no such checkpoint")
    try:
        torch.empty(0, device=map_location)
    except (RuntimeError, AssertionError) as error:
        raise PerturbZooError(f"device '{map_location}' cannot be used here; give cpu, or cuda where there is a GPU") from error
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        # bytes that are no pickle at all end in an operand that does not exist
        if "Weights only load failed" in str(error) and "Unsupported operand" not in str(error):
            raise PerturbZooError(
                f"{file}: refused: it holds pickled objects, which could run any code; perturbzoo checkpoints hold tensors, "
                "numbers and strings only"
            ) from error
        raise PerturbZooError(f"{file}: not a readable checkpoint (truncated or damaged?)") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise PerturbZooError(f"{file}: not a readable checkpoint (truncated or damaged?)") from error
    if not isinstance(checkpoint, dict) or "perturbzoo" not in checkpoint:
        raise PerturbZooError(f"{file}: not a perturbzoo checkpoint; one is written by 'perturbzoo fit'")
    return checkpoint


def plain_values(value: Any) -> Any:
    """What a checkpoint may hold: paths become text, NumPy's numbers Python's, tuples lists; anything else stays."""
    import numpy as np

    if type(value) is dict:
        return {name: plain_values(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return [plain_values(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


def check_header(checkpoint: dict[str, Any], expected_class: str | None = None) -> dict[str, Any]:
    """Return the checkpoint's ``perturbzoo`` part after checking its version and class.

    Raises
    ------
    PerturbZooError
        It was written by a newer version, by something else, or by another model than `expected_class`.
    """
    from perturbzoo.models.base import CHECKPOINT_SCHEMA

    header = checkpoint.get("perturbzoo")
    if not isinstance(header, dict) or not {"schema", "version", "class", "arguments", "spec", "prepared"} <= set(header):
        raise PerturbZooError("not a perturbzoo checkpoint; one is written by 'perturbzoo fit'")
    if header["schema"] > CHECKPOINT_SCHEMA:
        raise PerturbZooError(
            f"the checkpoint was written by perturbzoo {header['version']} (schema {header['schema']}), this version reads up "
            f"to schema {CHECKPOINT_SCHEMA}: upgrade perturbzoo"
        )
    if expected_class is not None and header["class"] != expected_class:
        raise PerturbZooError(f"the checkpoint holds a {header['class']}, not a {expected_class}")
    return header


def load(path: str | os.PathLike[str], map_location: str = "cpu") -> PerturbationModel:
    """Load a trained model from its checkpoint alone, ready to predict.

    Parameters
    ----------
    path
        A ``best.ckpt`` or ``last.ckpt`` that a fit left; ``$VAR`` is expanded.
    map_location
        Device for its tensors.

    Returns
    -------
    The model in evaluation mode; ``model.predict(adata, ["KLF1+CEBPA"])`` predicts.

    Raises
    ------
    PerturbZooError
        See :func:`read_checkpoint` and :func:`check_header`.
    """
    from perturbzoo.models import find_model

    checkpoint = read_checkpoint(path, map_location)
    header = check_header(checkpoint)
    model: PerturbationModel = find_model(header["class"])(**header["arguments"])
    model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, KeyError) as error:
        raise PerturbZooError(f"{path}: its weights do not fit the {header['class']} it describes: was it edited?") from error
    return model.eval().to(map_location)
