"""The zoo: one file per model. ``MODELS`` is the fixed list of classes that a checkpoint may name."""

from __future__ import annotations

import importlib
from typing import Any

from perturbzoo.errors import PerturbZooError, near_matches

BASELINES = ("NoChange", "TrainingMean", "MatchingMean", "Additive", "Bilinear", "Ridge", "KNN")

MODELS: dict[str, str] = {
    **dict.fromkeys(BASELINES, "perturbzoo.models.baselines"),
    "GEARS": "perturbzoo.models.gears",
    "CPA": "perturbzoo.models.cpa",
    "Transformer": "perturbzoo.models.transformer",
    "Ensemble": "perturbzoo.models.ensemble",
    "CellOT": "perturbzoo.models.cellot",
    "FlowMatching": "perturbzoo.models.flow_matching",
    "GRNODE": "perturbzoo.models.grn_ode",
}

__all__ = ["BASELINES", "MODELS", "find_model"]  # and every name in MODELS, imported when first asked for


def find_model(name: str) -> Any:
    """Return the model class of that name; nothing outside :data:`MODELS` is ever imported.

    Raises
    ------
    PerturbZooError
        The zoo has no such model.
    """
    if name not in MODELS:
        near = near_matches(name, MODELS) or ";"
        raise PerturbZooError(f"no model '{name}' in the zoo{near} it has {', '.join(MODELS)}")
    return getattr(importlib.import_module(MODELS[name]), name)


def __getattr__(name: str) -> Any:
    if name in MODELS:
        return find_model(name)
    raise AttributeError(f"module 'perturbzoo.models' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, *MODELS]
