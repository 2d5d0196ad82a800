"""Colours and sizes that all figures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): told apart with every common colour blindness; blue first, for the model that a figure is about
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
DELTA_LABEL = "delta, log1p-normalised"
SMALL = 8  # points


def axes_of_size(ax: Axes | None, width: float, height: float) -> Axes:
    """Return `ax`, or the axes of a new figure of `width` x `height` inches."""
    if ax is not None:
        return ax
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def strip_frame(ax: Axes) -> None:
    """Take away the upper and right lines, which carry no scale."""
    ax.spines[["top", "right"]].set_visible(False)
