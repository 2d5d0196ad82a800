"""Figures that take tables and arrays, and return matplotlib axes. Imports matplotlib: import this room where it is used."""

from __future__ import annotations

from perturbzoo.plotting.calibration import plot_calibration, plot_error_ranks
from perturbzoo.plotting.dose import dose_response
from perturbzoo.plotting.effects import plot_delta_heatmap, plot_delta_scatter, plot_top_genes
from perturbzoo.plotting.interaction import plot_interaction_scores
from perturbzoo.plotting.paths import plot_paths
from perturbzoo.plotting.scores import plot_leaderboard, plot_ranks, plot_score_bars
from perturbzoo.plotting.training import plot_training_curves

__all__ = [
    "dose_response",
    "plot_calibration",
    "plot_delta_heatmap",
    "plot_delta_scatter",
    "plot_error_ranks",
    "plot_interaction_scores",
    "plot_leaderboard",
    "plot_paths",
    "plot_ranks",
    "plot_score_bars",
    "plot_top_genes",
    "plot_training_curves",
]
