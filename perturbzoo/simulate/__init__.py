"""Screens with known truth."""

from __future__ import annotations

from perturbzoo.simulate.linear import simulate_linear, truth_frame, write_go_table

__all__ = ["simulate_linear", "truth_frame", "write_go_table"]
