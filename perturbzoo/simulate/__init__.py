"""Screens with known truth."""

from __future__ import annotations

from perturbzoo.simulate.linear import simulate_linear, truth_frame, write_go_table
from perturbzoo.simulate.random_network import random_network
from perturbzoo.simulate.screen import simulate_screen

__all__ = ["random_network", "simulate_linear", "simulate_screen", "truth_frame", "write_go_table"]
