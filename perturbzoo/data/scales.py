"""Bringing the values of two files to one scale: counts or log1p-normalised, and to how many counts per cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from perturbzoo.data.cell_blocks import CellFile, Survey, survey
from perturbzoo.data.reading import LOG1P_MAXIMUM, value_problems
from perturbzoo.data.spec import ValueSpace
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened

_FAR = 3.0  # log1p files whose depths differ by this factor were not normalised alike; means of logs lie below by less


@dataclass
class Scaled:
    """How the values of a file become comparable.

    Attributes
    ----------
    scale
        Shape ``(cells,)``: what counts are multiplied by before log1p; None for log1p-normalised values.
    usable
        Shape ``(cells,)``, bool: observed cells without counts are not.
    filled
        Share of values that are stored.
    said
        What the values are, for the user.
    """

    scale: np.ndarray | None
    usable: np.ndarray
    filled: float
    said: str


def common_scale(
    files: Mapping[str, CellFile], genes: list[str], wanted: Mapping[str, ValueSpace | None], depth: float | None
) -> dict[str, Scaled]:
    """Decide what the values of each file are and how they are compared.

    Counts on both sides are divided by the cell's total over the common genes, so that files with other genes are comparable;
    beside log1p values, whose totals were over all genes, by the total over all genes of the file.

    Parameters
    ----------
    files
        By name: ``observed``, ``predicted`` and perhaps ``training``.
    genes
        The common genes.
    wanted
        By the same names: what the user says the values are, or None.
    depth
        Counts per cell that the user wants, or None: what a log1p file says, else the median over the observed cells.

    Raises
    ------
    PerturbZooError
        NaN; negative observed values; values that are neither; counts beside log1p values of unknown depth.
    """
    surveys = {name: survey(file.select(genes)) for name, file in files.items()}
    spaces = {name: _space(files[name], found, wanted[name], name) for name, found in surveys.items()}
    guess = surveys["predicted"].found if "predicted" in surveys else None
    if guess is not None and wanted["predicted"] is None and guess.smallest == guess.largest:
        spaces["predicted"] = spaces["observed"]  # one value everywhere is of either kind
    counts = [name for name, space in spaces.items() if space == "counts"]
    logged = [name for name, space in spaces.items() if space == "log1p"]
    if counts and logged:
        depth = depth if depth is not None else next((files[n].depth for n in logged if files[n].depth is not None), None)
        if depth is None:
            raise PerturbZooError(
                f"{files[counts[0]].where} holds counts and {files[logged[0]].where} log1p values: give both in one space, or say "
                "with depth to how many counts per cell the log1p values were normalised (expected counts with fractions: say "
                "predicted_space counts)"
            )
        surveys |= {n: survey(files[n]) for n in counts if len(genes) < len(files[n].genes)}
    elif counts and depth is None:
        totals = surveys["observed"].totals
        depth = float(np.median(totals[totals > 0])) if (totals > 0).any() else 1.0
    if len(logged) > 1:
        _check_depths(files, {name: surveys[name] for name in logged})
    return {name: _scaled(files[name], surveys[name], spaces[name], depth, name) for name in files}


def _space(file: CellFile, found: Survey, wanted: ValueSpace | None, name: str) -> ValueSpace:
    """What a file's values are; predictions may be somewhat below 0, and fractional counts if the user says so."""
    if found.not_finite.any():
        control = file.is_control
        cells = np.flatnonzero(found.not_finite)
        labels = dict.fromkeys("control" if control[cell] else str(file.conditions[file.condition[cell]]) for cell in cells)
        raise PerturbZooError(
            f"{file.where}: NaN or infinite values in {len(cells)} cells of {shortened(labels)}: give finite values, or leave those "
            "cells out"
        )
    if name == "predicted":
        if found.found.smallest == found.found.largest == 0:
            raise PerturbZooError(f"{file.where}: every predicted value is 0: nothing was predicted")
        if wanted == "counts" and found.found.n_negative == 0:
            return "counts"
        if found.found.n_negative:
            if wanted == "counts" or found.found.smallest < -LOG1P_MAXIMUM or found.found.largest >= LOG1P_MAXIMUM:
                raise PerturbZooError(
                    f"{file.where}: predicted values from {found.found.smallest:g} to {found.found.largest:g}: neither counts nor "
                    "log1p-normalised expression; changes must be added to the controls first"
                )
            return "log1p"
    problems = value_problems(found.found, wanted)
    if problems:
        hint = "; expected counts with fractions are read with value_space counts" if name == "predicted" else ""
        raise PerturbZooError(f"{file.where}: {problems[0]}{hint}")
    return wanted or found.found.space


def _check_depths(files: Mapping[str, CellFile], surveys: Mapping[str, Survey]) -> None:
    """Warn where log1p values of two files seem normalised to other depths."""
    import warnings

    depth = {name: float(np.median(found.linear_totals)) for name, found in surveys.items()}
    for name in surveys:
        if name != "observed" and "observed" in depth and min(depth[name], depth["observed"]) > 0:
            ratio = depth[name] / depth["observed"]
            if max(ratio, 1 / ratio) > _FAR:
                warnings.warn(
                    f"cells of {files[name].where} have {depth[name]:,.0f} counts after expm1, those of {files['observed'].where} "
                    f"{depth['observed']:,.0f}: are both normalised to one depth?",
                    PerturbZooWarning,
                    stacklevel=4,
                )


def _scaled(file: CellFile, found: Survey, space: ValueSpace, depth: float | None, name: str) -> Scaled:
    import warnings

    usable = np.ones(len(file), dtype=bool)
    if space == "log1p":
        return Scaled(None, usable, found.filled, "log1p values")
    assert depth is not None
    empty = found.totals <= 0
    scale = np.where(empty, 0.0, depth / np.where(empty, 1.0, found.totals))
    if name != "predicted" and empty.any():
        usable = ~empty
        message = f"{file.where}: {int(empty.sum())} cells without any count are left out"
        warnings.warn(message, PerturbZooWarning, stacklevel=4)
    return Scaled(scale, usable, found.filled, f"counts, normalised to {depth:,.0f} per cell")
