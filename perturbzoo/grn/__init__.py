"""Gene regulatory networks, and their kinetics under interventions. Knows no model and no Lightning."""

from __future__ import annotations

from perturbzoo.grn.dynamics import BoundDynamics, RegulatoryDynamics
from perturbzoo.grn.effects import ScreenEffects
from perturbzoo.grn.inference import identifiability_report, infer_network
from perturbzoo.grn.interventions import Interventions
from perturbzoo.grn.network import GeneRegulatoryNetwork
from perturbzoo.grn.scoring import NetworkScore, compare_networks, score_network
from perturbzoo.grn.solvers import integrate
from perturbzoo.grn.steady import steady_state

__all__ = [
    "BoundDynamics",
    "GeneRegulatoryNetwork",
    "Interventions",
    "NetworkScore",
    "RegulatoryDynamics",
    "ScreenEffects",
    "compare_networks",
    "identifiability_report",
    "infer_network",
    "integrate",
    "score_network",
    "steady_state",
]
