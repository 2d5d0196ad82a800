"""perturbzoo: a PyTorch Lightning zoo of perturbation-response models for single-cell biology.

Names are imported when first used, so that ``import perturbzoo`` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LOCATIONS = {
    "Condition": "perturbzoo.perturbation",
    "DataSpec": "perturbzoo.data.spec",
    "Intervention": "perturbzoo.perturbation",
    "PerturbSeqDataModule": "perturbzoo.data.datamodule",
    "PerturbZooError": "perturbzoo.errors",
    "PerturbationModel": "perturbzoo.models.base",
    "load": "perturbzoo.checkpoint",
    "parse_condition": "perturbzoo.perturbation",
    "write_predictions": "perturbzoo.prediction",
}

__all__ = ["__version__", *_LOCATIONS]


def __getattr__(name: str) -> Any:
    if name in _LOCATIONS:
        return getattr(importlib.import_module(_LOCATIONS[name]), name)
    raise AttributeError(f"module 'perturbzoo' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
