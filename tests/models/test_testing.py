"""The table that `test` prints, on a screen the model was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning
import pandas as pd
import pytest
from anndata import AnnData

import perturbzoo
from perturbzoo.models import Additive

SPLIT = {"method": "explicit", "train": ["G0", "G1", "G2"], "val": ["G3"], "test": ["G4", "G0+G1"]}


def _trainer(folder: Path, **options: object) -> lightning.Trainer:
    return lightning.Trainer(
        default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False, **options
    )


def test_a_file_of_test_conditions_alone(
    make_adata: Callable[..., AnnData], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adata = make_adata()
    data = perturbzoo.PerturbSeqDataModule.from_anndata(adata, split=SPLIT)
    _trainer(tmp_path, max_epochs=1).fit(Additive(), datamodule=data)
    model = perturbzoo.load(tmp_path / "checkpoints" / "best.ckpt")

    whole = _trainer(tmp_path / "whole")
    whole.test(model, datamodule=perturbzoo.PerturbSeqDataModule.from_anndata(adata), verbose=False)
    held_out = adata[adata.obs["perturbation"].isin(["control", "G4", "G0+G1"])].copy()
    alone = _trainer(tmp_path / "alone")
    alone.test(model, datamodule=perturbzoo.PerturbSeqDataModule.from_anndata(held_out), verbose=False)

    tables = [pd.read_csv(tmp_path / name / "test" / "conditions.csv") for name in ("whole", "alone")]
    own = [table[table["model"] == "Additive"].set_index("condition") for table in tables]
    # the model's own split, not the data module's default one, says what is tested
    assert set(own[0].index) >= {"G4", "G0+G1"}
    for condition in ("G4", "G0+G1"):
        assert own[0].loc[condition, "pearson_delta"] == pytest.approx(own[1].loc[condition, "pearson_delta"], abs=1e-6)
    # without training cells there are no baselines, and that is said
    assert "TrainingMean" in set(tables[0]["model"])
    assert set(tables[1]["model"]) == {"Additive", "split-half ceiling"}
    assert "baselines are left out" in capsys.readouterr().out
