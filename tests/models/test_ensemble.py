"""The ensemble is the mean of its members, its variance theirs, and its shrinkage the least squares one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from anndata import AnnData

import perturbzoo
from perturbzoo.errors import PerturbZooError
from perturbzoo.models import Ensemble

SPLIT = {"method": "explicit", "train": ["G0", "G1", "G2", "G0+G1"], "val": ["G3", "G1+G2"], "test": ["G4", "G3+G4"]}


@pytest.fixture
def fitted(make_adata: Callable[..., AnnData], tmp_path: Path) -> tuple[Ensemble, perturbzoo.PerturbSeqDataModule]:
    lightning.seed_everything(0)
    data = perturbzoo.PerturbSeqDataModule.from_anndata(make_adata(), split=SPLIT)
    model = Ensemble(members=3, arguments={"hidden": 8, "uncertainty": True})
    trainer = lightning.Trainer(
        max_epochs=2, default_root_dir=tmp_path, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, datamodule=data)
    return model, data


def test_mean_variance_and_shrinkage(fitted: tuple[Ensemble, perturbzoo.PerturbSeqDataModule]) -> None:
    model, data = fitted
    model.eval()
    batch = next(iter(data.test_dataloader()))
    with torch.no_grad():
        members = [member(batch) for member in model.members]
        model.shrinkage.fill_(0.25)
        prediction = model(batch)
    means = torch.stack([member.mean for member in members])
    # every training pair counts once in the training mean
    bulks = data.training_pseudobulks()
    centre = batch.control + torch.as_tensor(bulks.delta.mean(axis=0), dtype=torch.float32)
    torch.testing.assert_close(prediction.mean, centre + 0.25 * (means.mean(dim=0) - centre), rtol=1e-5, atol=1e-5)
    spread = ((means - means.mean(dim=0)) ** 2).sum(dim=0) / 2
    own = torch.stack([member.variance for member in members]).mean(dim=0)
    assert prediction.variance is not None
    torch.testing.assert_close(prediction.variance, spread + own, rtol=1e-4, atol=1e-8)


def test_members_differ_and_the_factor_is_a_share(fitted: tuple[Ensemble, perturbzoo.PerturbSeqDataModule]) -> None:
    model, _ = fitted
    first, second = model.members[0].gene_embedding.weight, model.members[1].gene_embedding.weight
    assert (first - second).abs().max() > 0.1
    assert 0.0 <= float(model.shrinkage) <= 1.0
    assert float(model.variance_scale) != 1.0


def test_the_shrinkage_minimises_the_validation_error(fitted: tuple[Ensemble, perturbzoo.PerturbSeqDataModule]) -> None:
    model, data = fitted
    model.eval()
    factor = float(model.shrinkage)
    errors = {}
    for value in (factor - 0.05, factor, factor + 0.05):
        model.shrinkage.fill_(value)
        total = 0.0
        for batch in data.val_dataloader():
            with torch.no_grad():
                delta = (model(batch).mean - batch.control).double().numpy()
            for row in range(len(batch.table)):
                cells = (batch.row == row).numpy()
                observed = batch.observed[cells].double().mean(0).numpy() - batch.context_control[row].double().numpy()
                total += float(((delta[cells].mean(0) - observed) ** 2).sum())
        errors[value] = total
    if 0.0 < factor < 1.0:
        assert errors[factor] == min(errors.values())
    else:
        inside = min(max(factor, 0.05), 0.95)
        assert errors[factor] <= errors[factor - 0.05 if inside == 0.95 else factor + 0.05]


def test_checkpoint_round_trip(
    fitted: tuple[Ensemble, perturbzoo.PerturbSeqDataModule], make_adata: Callable[..., AnnData], tmp_path: Path
) -> None:
    model, _ = fitted
    loaded = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    before = model.eval().predict(make_adata(), ["G4", "G3+G4"], pseudobulk=True)
    after = loaded.predict(make_adata(), ["G4", "G3+G4"], pseudobulk=True)
    np.testing.assert_allclose(after.X, before.X, atol=1e-6)
    np.testing.assert_allclose(after.layers["std"], before.layers["std"], rtol=1e-5)


@pytest.mark.parametrize(("arguments", "message"), [({"members": 1}, "2 or more"), ({"model": "GEAR"}, "did you mean 'GEARS'")])
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(PerturbZooError, match=message):
        Ensemble(**arguments)


def test_a_closed_form_member_is_refused(make_adata: Callable[..., AnnData], tmp_path: Path) -> None:
    data = perturbzoo.PerturbSeqDataModule.from_anndata(make_adata(), split=SPLIT)
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    with pytest.raises(PerturbZooError, match="trained by steps"):
        trainer.fit(Ensemble(model="Additive"), datamodule=data)
