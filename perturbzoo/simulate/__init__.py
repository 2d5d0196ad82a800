"""Screens with known truth."""

from __future__ import annotations

import importlib
from typing import Any

# loaded when asked for: they need numpy, scipy and torch, for which `perturbzoo simulate --help` has no time
_LOCATIONS = {
    "network_from_file": "perturbzoo.simulate.networks",
    "random_network": "perturbzoo.simulate.networks",
    "simulate_linear": "perturbzoo.simulate.linear",
    "simulate_screen": "perturbzoo.simulate.screen",
    "truth_frame": "perturbzoo.simulate.truth",
    "write_go_table": "perturbzoo.simulate.truth",
}

__all__ = ["network_from_file", "random_network", "simulate_linear", "simulate_screen", "truth_frame", "write_go_table"]


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'perturbzoo.simulate' has no attribute '{name}'")
    return getattr(importlib.import_module(_LOCATIONS[name]), name)
