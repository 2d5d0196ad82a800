"""Conditions with fewer cells than a batch takes of each: drawn repeatedly with one warning, by every model that learns by steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transport_models import fit, module

from perturbzoo.errors import PerturbZooWarning
from perturbzoo.models import CPA, GEARS, CellOT, FlowMatching, Transformer

SMALL: dict[Any, dict[str, Any]] = {
    GEARS: {"hidden": 8},
    CPA: {"n_latent": 4, "n_hidden": 8},
    Transformer: {"width": 8, "layers": 1, "heads": 2},
    CellOT: {"hidden": [8, 8], "width": 4},
    FlowMatching: {"hidden": 8, "width": 4},
}


@pytest.mark.parametrize("sampling", ["condition", "grouped"])
@pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)
def test_resampled_with_one_warning(make_adata: Callable[..., Any], kind: Any, sampling: str) -> None:
    """Two cells, five cells, and fewer controls than a batch holds: no model refuses, and each trains on all of them."""
    adata = make_adata(conditions=("G0", "G1"), cells_per_condition=5, n_controls=7, n_genes=6)
    first = np.flatnonzero(adata.obs["perturbation"] == "G0")
    adata = adata[np.setdiff1d(np.arange(adata.n_obs), first[2:])].copy()
    data = module(adata, cells_per_condition=16, sampling=sampling)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fit(kind(**SMALL[kind]), data, 1)
    ours = [str(warning.message) for warning in caught if issubclass(warning.category, PerturbZooWarning)]
    assert [message for message in ours if "cells" in message] == [
        "2 conditions have fewer than 16 cells (G0, G1): their cells are drawn more than once in a batch"
    ]
    assert np.isfinite(model.predict(adata, ["G0", "G0+G1"]).X).all()


@pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)
def test_a_condition_of_one_cell(make_adata: Callable[..., Any], kind: Any) -> None:
    adata = make_adata(conditions=("G0", "G1"), cells_per_condition=5, n_controls=7, n_genes=6)
    first = np.flatnonzero(adata.obs["perturbation"] == "G0")
    adata = adata[np.setdiff1d(np.arange(adata.n_obs), first[1:])].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fit(kind(**SMALL[kind]), module(adata, cells_per_condition=16), 1)
    assert np.isfinite(model.predict(adata, ["G0"]).X).all()
