"""What each model makes of a dose: it is part of the condition, a dose between two measured ones lies between them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooWarning
from perturbzoo.models import CPA, GEARS, CellOT, FlowMatching, Ridge, Transformer
from perturbzoo.models.baselines import TrainingMean

pytestmark = pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")

N_GENES = 10
DOSES = (0.1, 1.0, 10.0)
MODELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "CPA": (CPA, {"n_latent": 8, "n_hidden": 32, "unseen_rate": 0.0, "lr": 1e-2, "lr_decay": 0.95}, 20),
    "GEARS": (GEARS, {"hidden": 16, "residual": False, "unseen_rate": 0.0, "lr": 2e-2}, 60),
    "Transformer": (Transformer, {"width": 16, "layers": 1, "heads": 2, "residual": False, "unseen_rate": 0.0, "lr": 1e-2}, 60),
    "CellOT": (CellOT, {"space": "genes", "start": "identity", "unseen_rate": 0.0}, 30),
    "FlowMatching": (FlowMatching, {"space": "genes", "start": "identity", "hidden": 32, "unseen_rate": 0.0, "lr": 5e-3}, 40),
}


def response(dose: float) -> float:
    """Of the drug: half of what it can do at dose 1."""
    return dose / (1 + dose)


def drug_screen(doses: tuple[float, ...] = DOSES, vectors: dict[str, np.ndarray] | None = None) -> tuple[Any, np.ndarray]:
    """Log1p values of controls and of drugs at doses, and the largest effect of DRUG; cells vary a little, all alike."""
    from anndata import AnnData

    generator = np.random.default_rng(0)
    control, effect = generator.uniform(2.0, 3.0, N_GENES), generator.normal(0, 0.8, N_GENES)
    means = [("control", 1.0, control)]
    if vectors is None:
        means += [("DRUG", dose, control + response(dose) * effect) for dose in doses]
    else:
        means += [(name, 1.0, control + vector) for name, vector in vectors.items()]
    rows = [(label, dose) for label, dose, _ in means for _ in range(64)]
    noise = 0.1 * generator.normal(size=(64, N_GENES))
    values = np.concatenate([mean + noise for _, _, mean in means]).astype(np.float32)
    obs = pd.DataFrame(rows, columns=["perturbation", "dose"], index=[f"cell{number}" for number in range(len(rows))])
    return AnnData(values, obs=obs, var=pd.DataFrame(index=[f"g{number}" for number in range(N_GENES)])), effect


def fitted(name: str, adata: Any, epochs: int | None = None, **more: Any) -> Any:
    kind, arguments, usual = MODELS[name]
    seed_everything(0, verbose=False)
    data = PerturbSeqDataModule.from_anndata(
        adata, kind="compound", split={"method": "no_test"}, min_cells=1, seed=0, cells_per_condition=32, sampling="grouped"
    )
    model = kind(**{**arguments, **more})
    trainer = Trainer(
        max_epochs=usual if epochs is None else epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data)
    return model.eval()


def changes(model: Any, adata: Any, conditions: list[str]) -> np.ndarray:
    """Mean predicted change of each condition, ``(C, G)``."""
    return np.asarray(model.predict(adata, conditions, pseudobulk=True).layers["delta"])


@pytest.mark.parametrize("name", list(MODELS))
def test_a_dose_between_two_measured_ones(name: str) -> None:
    """Trained at 0.1, 1 and 10, asked for 3: the measured doses are learned, the other lies between, near the truth."""
    adata, effect = drug_screen()
    model = fitted(name, adata)
    asked = (0.0, *DOSES, 3.0)
    strength = changes(model, adata, [f"DRUG@{dose}" for dose in asked]) @ effect / (effect @ effect)
    none, low, middle, high, between = strength
    assert none == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose([low, middle, high], [response(dose) for dose in DOSES], atol=0.12)
    assert middle + 0.05 < between < high
    assert between == pytest.approx(response(3.0), abs=0.12)


@pytest.mark.parametrize("kind", ["logsigm", "sigm", "linear", "mlp"])
def test_every_dose_response_of_cpa_grows_between_doses(kind: str) -> None:
    """In the range of the training doses; the linear one does so beyond its fit."""
    adata, effect = drug_screen((0.5, 2.0))
    model = fitted("CPA", adata, epochs=8, dose_response=kind)
    strength = changes(model, adata, [f"DRUG@{dose}" for dose in (0, 0.5, 1.0, 2.0)]) @ effect / (effect @ effect)
    assert strength[0] == pytest.approx(0, abs=1e-6)
    assert (np.diff(strength) > 0.02).all()


def test_cpa_is_told_of_an_unseen_drug_by_its_vector(tmp_path: Path) -> None:
    """C, never measured, has the vector halfway between A's and B's, and gets the change halfway between theirs."""
    (tmp_path / "vectors.csv").write_text("name,x,y\nA,1,0\nB,0,1\nC,0.5,0.5\n")
    generator = np.random.default_rng(1)
    vectors = {"A": generator.normal(0, 0.4, N_GENES), "B": generator.normal(0, 0.4, N_GENES)}
    adata, _ = drug_screen(vectors=vectors)
    model = fitted("CPA", adata, embedding=str(tmp_path / "vectors.csv"), unseen_rate=0.5)
    found = changes(model, adata, ["A", "B", "C"])
    truth = np.stack([vectors["A"], vectors["B"], (vectors["A"] + vectors["B"]) / 2])
    errors = np.square(found - truth).mean(axis=1) / np.square(truth).mean(axis=1)
    assert (errors[:2] < 0.05).all()
    assert errors[2] < 0.25


@pytest.mark.parametrize("name", ["Transformer", "CellOT", "FlowMatching"])
def test_a_start_knows_the_doses_it_has_seen(name: str) -> None:
    """Untrained models are the start: at another dose a target was not measured, and counts as the mean single.

    Models that move cells interpolate it: dose 2 is between 1 and 4 as log2(3) is between log2(2) and log2(5).
    """
    adata, effect = drug_screen((1.0, 4.0))
    extra = adata[adata.obs["perturbation"] == "DRUG"].copy()
    extra.obs["perturbation"] = "OTHER"
    extra.obs_names = [f"other{number}" for number in range(extra.n_obs)]
    both = anndata.concat([adata, extra])
    kind = MODELS[name][0]
    data = PerturbSeqDataModule.from_anndata(both, kind="compound", split={"method": "no_test"}, min_cells=1, seed=0)
    model = kind(width=8, **({"layers": 1, "heads": 2} if name == "Transformer" else {"components": 5}))
    Trainer(
        max_epochs=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, data)
    model.eval().known.fit(data.training_pseudobulks())
    asked = ["DRUG@1+OTHER@4", "DRUG@4+OTHER@4", "DRUG@2+OTHER@4", "DRUG@2"]
    strength = torch.as_tensor(changes(model, both, asked) @ effect / (effect @ effect))
    share = np.log2(3 / 2) / np.log2(5 / 2)
    between = (response(1) + response(4)) / 2 if name == "Transformer" else (1 - share) * response(1) + share * response(4)
    expected = [response(1) + response(4), 2 * response(4), between + response(4), between]
    np.testing.assert_allclose(strength, expected, atol=1e-3)


@pytest.mark.filterwarnings("default::perturbzoo.errors.PerturbZooWarning")
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(Transformer, {"paper": True, "width": 8, "layers": 1, "heads": 2}), (TrainingMean, {}), (Ridge, {"embedding": "pca"})],
)
def test_a_model_without_doses_says_so(kind: Any, arguments: dict[str, Any]) -> None:
    """Once when it is fitted to several doses, once when it is asked about one; not where there are none to lose."""
    adata, _ = drug_screen()
    adata.obs["perturbation"] = adata.obs["perturbation"].replace("DRUG", "g0")

    def said(doses: bool) -> list[str]:
        chosen = adata if doses else adata[np.isin(adata.obs["dose"], [1.0])].copy()
        options: dict[str, Any] = {"kind": "compound", "split": {"method": "no_test"}, "min_cells": 1, "seed": 0}
        data = PerturbSeqDataModule.from_anndata(chosen, cells_per_condition=8, **options)
        model = kind(**arguments)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
            Trainer(max_epochs=1, accelerator="cpu", logger=False, **quiet).fit(model, data)
            model.predict(chosen, ["g0@3"] if doses else ["g0", "g0@0"])
        return [
            str(one.message) for one in caught if issubclass(one.category, PerturbZooWarning) and "dose" in str(one.message)
        ]

    name = kind.__name__
    assert said(doses=True) == [
        f"{name} has no doses as it is set up: conditions at doses 0.1, 1, 10 count as the same",
        f"{name} has no doses as it is set up: g0@3 are predicted as at any dose above 0",
    ]
    assert said(doses=False) == []


@pytest.mark.parametrize("name", list(MODELS))
def test_the_others_have_doses(name: str) -> None:
    kind, arguments, _ = MODELS[name]
    assert kind(**arguments).handles_dose
