"""Figure of a training run, from the table that Lightning's CSVLogger writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.plotting.style import COLOURS, SMALL, strip_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_training_curves(metrics: str | os.PathLike[str] | pd.DataFrame, *, axes: list[Axes] | None = None) -> list[Axes]:
    """Losses and validation scores over epochs, one panel per kind of value.

    Parameters
    ----------
    metrics
        ``metrics.csv`` of Lightning's CSVLogger, or the table in it: columns ``epoch``, ``train/...``, ``val/...``.
        Of a value logged both per step and per epoch, the mean over the epoch is shown.
    axes
        Where to draw, one per panel; a new figure by default.

    Returns
    -------
    list of Axes
        Training losses first (logarithmic where all are positive), then correlations, then every other validation
        value. A ring marks the best epoch of a validation curve: highest correlation, else lowest value.

    Raises
    ------
    PerturbZooError
        The file cannot be read, holds no epochs, or no ``train/`` or ``val/`` column with a number in it; or the number
        of `axes` is not that of the panels.
    """
    table = metrics if isinstance(metrics, pd.DataFrame) else _read(Path(metrics))
    if "epoch" not in table:
        raise PerturbZooError("the metrics have no column 'epoch': give the metrics.csv that Lightning's CSVLogger writes")
    values = table.rename(columns=str).groupby("epoch").mean(numeric_only=True)
    # without the twin of each value that changes from step to step
    twins = [f"{name.removesuffix('_epoch')}_step" for name in values.columns if name.endswith("_epoch")]
    values = values.drop(columns=twins, errors="ignore")
    values = values.rename(columns=lambda name: name.removesuffix("_epoch")).dropna(axis=1, how="all")
    panels: dict[str, list[str]] = {}
    for name in values.columns:
        if name.startswith("train/"):
            panels.setdefault("training loss", []).append(name)
        elif name.startswith("val/"):
            panels.setdefault("Pearson r, validation" if "pearson" in name else _title(name), []).append(name)
    if not panels:
        raise PerturbZooError(f"the metrics hold no train/ or val/ values; their columns are {shortened(table.columns)}")
    order = sorted(panels, key=lambda title: (title != "training loss", "Pearson" not in title))
    if axes is None:
        layout = ConstrainedLayoutEngine(w_pad=0.1)
        grid = plt.subplots(1, len(panels), figsize=(3.9 * len(panels), 3.3), layout=layout, squeeze=False)[1]
        axes = list(grid[0])
    if len(axes) != len(panels):
        raise PerturbZooError(f"{len(axes)} axes for {len(panels)} panels: {', '.join(order)}")
    for ax, title in zip(axes, order, strict=True):
        _draw(ax, values[panels[title]], title)
    return axes


def _draw(ax: Axes, values: pd.DataFrame, title: str) -> None:
    for position, name in enumerate(values.columns):
        curve = values[name].dropna()
        colour = COLOURS[position % len(COLOURS)]
        dashes = ("-", "--", ":")[position // len(COLOURS) % 3]
        short = name.split("/", 1)[1].replace("_", " ")
        ax.plot(curve.index, curve, color=colour, linestyle=dashes, marker="." if len(curve) < 40 else None, label=short)
        if name.startswith("val/"):
            best = int(curve.argmax() if "pearson" in name else curve.argmin())
            ax.plot(
                curve.index[best : best + 1],
                curve.iloc[best : best + 1],
                "o",
                markersize=9,
                markerfacecolor="none",
                color=colour,
            )
    if title == "training loss" and (values.min() > 0).all() and values.max().max() > 3 * values.min().min():
        ax.set_yscale("log")
    ax.set_xlabel("epoch")
    ax.set_ylabel(title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    if values.shape[1] > 1:
        ax.legend(fontsize=SMALL, frameon=False)
    strip_frame(ax)


def _title(name: str) -> str:
    unit = {"val/mse": "MSE, validation\n(log1p-normalised, squared)"}
    return unit.get(name, f"{name.split('/', 1)[1].replace('_', ' ')}, validation")


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except (OSError, pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise PerturbZooError(f"cannot read the metrics '{path}': {error}") from error
