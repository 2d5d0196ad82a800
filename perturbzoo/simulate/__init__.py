"""Screens with known truth."""

from __future__ import annotations

import importlib
from typing import Any

from perturbzoo.simulate.linear import simulate_linear, truth_frame, write_go_table

# loaded when asked for: they need torch, for which `perturbzoo simulate --help` has no time
_LOCATIONS = {"random_network": "perturbzoo.simulate.networks", "simulate_screen": "perturbzoo.simulate.screen"}

__all__ = ["random_network", "simulate_linear", "simulate_screen", "truth_frame", "write_go_table"]


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'perturbzoo.simulate' has no attribute '{name}'")
    return getattr(importlib.import_module(_LOCATIONS[name]), name)
