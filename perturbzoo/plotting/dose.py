"""Figures of dose responses: what a model predicts of some genes over the doses of one target.

Called by notebooks with a trained model; knows of it only that it predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from perturbzoo.errors import PerturbZooError, near_matches, shortened
from perturbzoo.perturbation import Condition, Intervention
from perturbzoo.plotting.style import COLOURS, DELTA_LABEL, SMALL, axes_of_size, strip_frame

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


class _Predicts(Protocol):
    def predict(self, controls: AnnData, conditions: Any, **options: Any) -> AnnData: ...


def dose_response(
    model: _Predicts,
    controls: AnnData,
    target: str,
    doses: Sequence[float],
    genes: Sequence[str],
    *,
    kind: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Predicted delta of some genes over the doses of one target, one line per gene.

    Parameters
    ----------
    model
        A trained model.
    controls
        The control cells it predicts from; with several contexts, their mean is drawn.
    target
        The target, alone.
    doses
        At least two, each at least 0, in the unit of the training data; drawn on a logarithmic axis where they span a factor of
        20 or more, with 0 at its left end.
    genes
        Names of the genes to draw.
    kind
        Kind of the perturbation; None for the default of the training data.
    ax
        Where to draw; a new figure by default.

    Raises
    ------
    PerturbZooError
        Fewer than two doses, a dose below 0 or not finite, a gene or a target the model does not know.
    """
    levels = sorted({float(dose) for dose in doses})
    if len(levels) < 2:
        raise PerturbZooError(f"doses: {len(levels)} given, a curve needs at least two different ones, such as 0 and 1")
    if not genes:
        raise PerturbZooError("genes: none given; name those whose response is to be drawn")
    if len(genes) > len(COLOURS):
        raise PerturbZooError(f"genes: {len(genes)} given, at most {len(COLOURS)} lines are told apart by colour")
    # Intervention refuses a dose that is none
    conditions = [Condition([Intervention(target, kind, dose)]) for dose in levels]
    predicted = model.predict(controls, conditions, pseudobulk=True)
    known = pd.Index(predicted.var_names)
    if lost := [gene for gene in genes if gene not in known]:
        near = near_matches(lost[0], known)
        raise PerturbZooError(f"genes: {shortened(lost)} not among the model's {len(known)} genes{near}")
    delta = pd.DataFrame(np.asarray(predicted.layers["delta"])[:, known.get_indexer(list(genes))], columns=list(genes))
    # a context each, in the order of the conditions
    rows = np.repeat(levels, len(delta) // len(levels))
    curve = delta.groupby(rows).mean()

    ax = axes_of_size(ax, 5.2, 3.8)
    ax.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    for gene, colour in zip(genes, COLOURS, strict=False):
        ax.plot(curve.index, curve[gene], color=colour, marker="o", markersize=3, linewidth=1.4, label=gene)
    positive = [level for level in levels if level > 0]
    if positive[-1] >= 20 * positive[0]:
        # linear from 0 to the smallest dose, so that 0 has a place
        ax.set_xscale("symlog", linthresh=positive[0])
    ax.set_xlabel(f"dose of {target}")
    ax.set_ylabel(f"predicted {DELTA_LABEL}")
    ax.legend(fontsize=SMALL, frameon=False)
    strip_frame(ax)
    return ax
