"""Interaction scores of real doubles beside the fits that Norman et al. 2019 published."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.evaluation.interaction import dominance, magnitude, score_interactions

DATA = Path(os.environ.get("PERTURBZOO_DATA", "/nonexistent"))
real = pytest.mark.skipif(not DATA.is_dir(), reason="real data: set PERTURBZOO_DATA to their folder")


@real
def test_magnitude_and_dominance_are_the_published_ones() -> None:
    fits = pd.read_csv(DATA / "tables" / "norman2019_regr_fits_final.csv.gz", index_col="name")
    assert len(fits) == 125
    c1, c2 = fits["ts_coef_first"], fits["ts_coef_second"]
    np.testing.assert_allclose(magnitude(c1, c2), fits["ts_norm2"], rtol=1e-9)
    same = (c1 * c2 > 0).to_numpy()
    ours = dominance(c1, c2)
    np.testing.assert_allclose(ours[same], fits["abs_log_ts_ratio"][same], rtol=1e-9)
    assert np.isnan(ours[~same]).all()


@real
@pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")
def test_coefficients_of_real_doubles_follow_the_published_ones() -> None:
    """100 cells and 103 expressed genes of each against all cells and genes: only roughly (scripts/gi_norman.py)."""
    data = PerturbSeqDataModule(path=str(DATA / "norman2019_subset.h5ad"), kind="activation", split={"method": "no_test"})
    data.setup()
    mean, _ = data.moments(data.index.cells_by_pair)
    expressed = data.control_mean[0] > 0
    delta = pd.DataFrame((mean - data.control_mean[0])[:, expressed], index=data.conditions)
    scores = score_interactions(delta).set_index("condition")
    doubles = ["KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2"]
    assert scores.index.tolist() == doubles
    fits = pd.read_csv(DATA / "tables" / "norman2019_regr_fits_final.csv.gz", index_col="name")
    published = fits.loc[[double.replace("+", "_") for double in doubles], ["ts_coef_first", "ts_coef_second"]]
    assert np.corrcoef(scores[["c1", "c2"]].to_numpy().ravel(), published.to_numpy().ravel())[0, 1] > 0.5
    # KLF1 and MAPK1, which change the cell most, outweigh their partners
    strong = ["KLF1+MAP2K6", "KLF1+TGFBR2", "MAPK1+TGFBR2"]
    assert (scores.loc[strong, "c1"] > 1.5 * scores.loc[strong, "c2"]).all()
