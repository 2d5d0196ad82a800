"""CPA: symmetries, what each loss teaches, prediction in the zoo's value space, what it learns, checkpoints, bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from gears_models import first_batch, module, scrambled
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

import perturbzoo
from perturbzoo.data.batch import PerturbationBatch, encode_conditions
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.compositional import adversary_labels, choose_controls, median_dose, trained_levels, with_controls
from perturbzoo.models.cpa import CPA
from perturbzoo.models.disentanglement import disentanglement
from perturbzoo.perturbation import parse_condition

pytestmark = pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")
SMALL: dict[str, Any] = {"n_latent": 6, "n_hidden": 16}


@pytest.fixture(scope="module")
def adata(make_adata: Callable[..., Any]) -> Any:
    return make_adata(cells_per_condition=8, n_controls=16, n_genes=12, contexts=("a", "b"))


@pytest.fixture
def data(adata: Any) -> PerturbSeqDataModule:
    return module(adata, covariates=["context"])


def trainer_of(epochs: int, folder: Path | None = None) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def fit(model: CPA, data: PerturbSeqDataModule, epochs: int) -> CPA:
    """Train; 0 epochs prepare and build the model, no more."""
    trainer_of(epochs).fit(model.train(), data)
    return model.eval()


def asked(model: CPA, batch: PerturbationBatch, conditions: list[str]) -> PerturbationBatch:
    """The controls of a batch in the first context, each under each condition in turn."""
    parsed = [parse_condition(text) for text in conditions]
    table = encode_conditions(parsed, [0] * len(parsed), model.target_names, model.get_spec().default_kind)
    n = len(batch)
    return replace(
        batch,
        expression=None,
        control=batch.control.repeat(len(parsed), 1),
        control_size_factor=batch.control_size_factor.repeat(len(parsed)),
        covariates=batch.covariates.repeat(len(parsed), 1),
        row=torch.arange(len(parsed)).repeat_interleave(n),
        table=table,
    )


def predicted(model: CPA, batch: PerturbationBatch, conditions: list[str]) -> Tensor:
    """Shape ``(conditions, B, G)``."""
    with torch.no_grad():
        mean = model(asked(model, batch, conditions)).mean
    return mean.reshape(len(conditions), len(batch), -1)


# ---------------------------------------------------------------------- symmetries


@pytest.mark.parametrize(
    "options", [{}, {"likelihood": "zinb", "residual": False}, {"likelihood": "gaussian", "variational": True}]
)
def test_permuting_cells_permutes_outputs(data: PerturbSeqDataModule, options: dict[str, Any]) -> None:
    model = scrambled(fit(CPA(**SMALL, **options), data, 0), scale=0.3)
    batch = first_batch(data)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        batch,
        control=batch.control[order],
        row=batch.row[order],
        covariates=batch.covariates[order],
        control_size_factor=batch.control_size_factor[order],
    )
    with torch.no_grad():
        mean, moved = model(batch).mean, model(shuffled).mean
    torch.testing.assert_close(moved, mean[order], rtol=0, atol=1e-5)
    assert not torch.allclose(moved, mean, atol=1e-2)


def test_order_of_a_combination_and_dose_0(data: PerturbSeqDataModule) -> None:
    model = scrambled(fit(CPA(**SMALL), data, 0), scale=0.3)
    batch = first_batch(data)
    one, other, zero, half, plain = predicted(model, batch, ["G0+G1", "G1+G0", "G0@0", "G0@0+G1", "G1"])
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    torch.testing.assert_close(zero, batch.control, rtol=0, atol=1e-6)
    torch.testing.assert_close(half, plain, rtol=0, atol=1e-6)
    assert (plain - batch.control).abs().max() > 0.01
    # columns of a table exchanged, where the parser would sort them
    table = asked(model, batch, ["G0+G1"]).table
    swapped = replace(table, **{name: getattr(table, name).flip(1) for name in ("targets", "kind", "dose")})
    with torch.no_grad():
        torch.testing.assert_close(model.condition_vectors(swapped), model.condition_vectors(table), rtol=0, atol=1e-6)


def test_without_residual_dose_0_is_the_decoded_control(data: PerturbSeqDataModule) -> None:
    """And the prediction is the integral of the likelihood at the control's size, not log1p of its mean."""
    model = scrambled(fit(CPA(**SMALL, residual=False), data, 0), scale=0.2)
    batch = first_batch(data)
    (mean,) = predicted(model, batch, ["G0@0"])
    with torch.no_grad():
        state = model.encode(batch.control)[0] + model.covariates(batch.covariates)
        size = batch.control_size_factor
        distribution = model.head.distribution(model.decode(state), size)
        torch.manual_seed(0)
        cells = torch.stack([distribution.sample() for _ in range(3000)]) * (batch.depth / size)[:, None]
    drawn = torch.log1p(cells)
    error = drawn.std(dim=0) / 3000**0.5
    inside = (drawn.mean(dim=0) - mean).abs() < 4 * error + 1e-3
    assert inside.float().mean() > 0.999
    assert (torch.log1p(cells.mean(dim=0)) - mean > 4 * error).float().mean() > 0.5


# ---------------------------------------------------------------------- what each loss teaches


def gradients(model: CPA, term: Tensor) -> set[str]:
    """First names of the parameters that a term moves."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(term, list(named.values()), allow_unused=True, retain_graph=True)
    return {name.split(".")[0] for name, value in zip(named, found, strict=True) if value is not None and value.abs().max() > 0}


def test_adversaries_and_autoencoder_leave_each_other_alone(data: PerturbSeqDataModule) -> None:
    model = scrambled(fit(CPA(**SMALL), data, 0), scale=0.3).train()
    terms = model.loss(first_batch(data))
    assert set(terms) == {"adversary", "penalty", "likelihood", "confusion", "independence", "response"}
    assert gradients(model, terms["adversary"]) == {"adversary"}
    assert gradients(model, terms["penalty"]) == {"adversary"}
    assert gradients(model, terms["confusion"]) == {"encoder", "to_basal"}
    assert gradients(model, terms["independence"]) == {"encoder", "to_basal"}
    for name in ("likelihood", "response"):
        assert gradients(model, terms[name]) >= {"encoder", "decoder", "head", "targets", "dose", "covariates"}
        assert "adversary" not in gradients(model, terms[name])


def test_alternating_steps(data: PerturbSeqDataModule) -> None:
    """One batch for the autoencoder, two for the adversaries: on those neither decoder nor encoder moves by a bit."""
    model = fit(CPA(paper=True, **SMALL), data, 0).train()
    batch = first_batch(data)
    optimizer = model.configure_optimizers()["optimizer"]
    for turn in range(4):
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        model._batch = turn
        optimizer.zero_grad()
        torch.stack(list(model.loss(batch).values())).sum().backward()
        optimizer.step()
        moved = {name.split(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        if turn % 3 == 0:
            assert moved >= {"encoder", "decoder", "head", "targets", "dose"}
            assert "adversary" not in moved
        else:
            assert moved == {"adversary"}


def test_reversed_confusion_is_minus_the_cross_entropy(data: PerturbSeqDataModule) -> None:
    model = fit(CPA(**SMALL, confusion="reversed", adversary_weight=2.5), data, 0)
    terms = model.loss(first_batch(data))
    assert terms["confusion"].item() == pytest.approx(-2.5 * terms["adversary"].item(), rel=1e-5)


def test_projections_of_an_embedding_are_trained(adata: Any, tmp_path: Path) -> None:
    """The reference leaves them out of every optimiser; and a target that only the table knows can be asked for."""
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 3)), index=[*(f"G{number}" for number in range(5)), "NEW"])
    table.to_csv(tmp_path / "table.csv")
    model = fit(CPA(**SMALL, embedding=str(tmp_path / "table.csv")), module(adata), 0)
    assert model.targets.project is not None
    before = model.targets.project.weight.detach().clone()
    fit(model, module(adata), 1)
    assert not torch.equal(model.targets.project.weight, before)
    batch = first_batch(module_of(model))
    assert (predicted(model, batch, ["NEW"])[0] - batch.control).abs().max() > 0


def module_of(model: CPA) -> PerturbSeqDataModule:
    return model.data


def test_a_control_s_unmatched_covariate_is_unknown(adata: Any) -> None:
    """Controls drawn from anywhere: their cell type is not their cell's, and no adversary is told so."""
    model = fit(CPA(**SMALL), module(adata, covariates=["context"], match_on=[]), 0)
    batch = first_batch(model.data)
    chosen = choose_controls(batch, 0.5)
    assert len(chosen) == len(chosen.unique()) == len(batch) // 2
    cells = with_controls(batch, chosen, model.matched)
    assert (cells.covariates[len(batch) :] == -1).all()
    assert torch.equal(cells.counts[len(batch) :], batch.control_counts[chosen])
    targets, levels = adversary_labels(cells, len(model.target_names), [2])
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(cells)))
    assert (targets[len(batch) :, -1] == 1).all()
    assert torch.equal(levels.sum(dim=1), (cells.covariates[:, 0] >= 0).float())
    assert all(term.isfinite() for term in model.train().loss(batch).values())


def test_rates_decay(data: PerturbSeqDataModule) -> None:
    model = fit(CPA(**SMALL, lr=1e-2, dose_lr=1e-3, lr_decay=0.5), data, 0)
    made = model.configure_optimizers()
    rates = [group["lr"] for group in made["optimizer"].param_groups]
    assert sorted(set(rates)) == [1e-3, 1e-2]
    made["optimizer"].step()
    made["lr_scheduler"]["scheduler"].step()
    assert [group["lr"] for group in made["optimizer"].param_groups] == [rate / 2 for rate in rates]


def test_units_and_levels_come_from_training_pairs(data: PerturbSeqDataModule) -> None:
    spec = fit(CPA(**SMALL), data, 0).get_spec()
    some = replace(spec, training_pairs=(("G0@10", 1), ("G1@1000+G2@0", 1), ("G1@100", 1)))
    assert median_dose(some) == 100
    assert median_dose(spec) == 1
    assert [levels.tolist() for levels in trained_levels(some)] == [[False, True]]
    assert [levels.tolist() for levels in trained_levels(replace(some, match_on=(), contexts=((), ())))] == [[True, True]]


# ---------------------------------------------------------------------- what it learns


def additive_cells() -> Any:
    """Two cell types, four perturbations, effects that add to the cell type's profile; no noise at all. Log1p-normalised."""
    from anndata import AnnData

    generator = np.random.default_rng(0)
    types = {name: generator.uniform(1.0, 2.0, 15) for name in ("a", "b")}
    effects = {"control": np.zeros(15), **{name: generator.normal(0, 0.25, 15) for name in "ABCD"}}
    rows = [(name, label) for name in types for label in effects for _ in range(64)]
    values = np.array([types[name] + effects[label] for name, label in rows], dtype=np.float32)
    obs = pd.DataFrame(rows, columns=["cell_type", "perturbation"], index=[f"cell{number}" for number in range(len(rows))])
    return AnnData(values, obs=obs, var=pd.DataFrame(index=[f"g{number}" for number in range(15)]))


def test_an_unseen_pair_of_perturbation_and_cell_type() -> None:
    """B was seen in cell type a only: in b it does the same, to within a twentieth of its squared effect."""
    seed_everything(0, verbose=False)
    adata = additive_cells()
    split = {"method": "explicit", "test": [["B", "b"]]}
    data = module(adata, split, covariates=["cell_type"], cells_per_condition=4)
    model = fit(CPA(n_latent=8, n_hidden=32, unseen_rate=0.0, lr=1e-2, lr_decay=0.87), data, 20)
    assert model.kind == "gaussian"
    controls = adata[(adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == "b")].copy()
    delta = model.predict(controls, "B", pseudobulk=True).layers["delta"][0]
    chosen = adata.obs["cell_type"] == "b"
    truth = adata[chosen & (adata.obs["perturbation"] == "B")].X.mean(axis=0) - adata[
        chosen & (adata.obs["perturbation"] == "control")
    ].X.mean(axis=0)
    assert np.square(delta - truth).mean() < 0.05 * np.square(truth).mean()


def test_same_seed_same_numbers(adata: Any) -> None:
    results = []
    for _ in range(2):
        seed_everything(5, verbose=False)
        data = module(adata, covariates=["context"])
        results.append(predicted(fit(CPA(**SMALL), data, 2), first_batch(data), ["G0+G1"]))
    assert torch.equal(*results)


def test_a_classifier_reads_what_is_there() -> None:
    generator = np.random.default_rng(0)
    label = np.arange(4).repeat(60)
    told, untold = generator.normal(size=(240, 5)) + 3 * label[:, None], generator.normal(size=(240, 5))
    scores = disentanglement(untold, told, label)
    assert scores["chance"] == 0.25
    assert scores["expression"] > 0.9
    assert abs(scores["basal"] - 0.25) < 0.12


# ---------------------------------------------------------------------- test, checkpoint, mistakes


def test_test_prints_disentanglement_and_the_checkpoint_predicts(
    adata: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = module(adata, covariates=["context"])
    model, trainer = CPA(**SMALL, variational=True), trainer_of(1, tmp_path)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    printed = capsys.readouterr().out
    assert "disentanglement (" in printed
    assert "chance" in printed
    trainer.save_checkpoint(tmp_path / "cpa.ckpt")
    controls = adata[adata.obs["perturbation"] == "control"].copy()
    loaded = perturbzoo.load(str(tmp_path / "cpa.ckpt"))
    model.eval()
    first, second = (each.predict(controls, "G0+G4@0.5,G2") for each in (model, loaded))
    np.testing.assert_array_equal(first.X, second.X)
    assert np.isfinite(first.X).all()


def test_sampled_cells_have_the_predicted_mean(data: PerturbSeqDataModule) -> None:
    model = scrambled(fit(CPA(**SMALL, residual=False), data, 0), scale=0.2)
    batch = asked(model, first_batch(data), ["G0"])
    torch.manual_seed(1)
    with torch.no_grad():
        cells = torch.stack([model.sample(batch) for _ in range(500)])
        mean = model(batch).mean
    assert ((cells.mean(dim=0) - mean).abs() < 5 * cells.std(dim=0) / 500**0.5 + 1e-2).all()


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_likelihoods_of_counts_need_counts(likelihood: str) -> None:
    data = module(additive_cells(), {"method": "explicit", "test": ["D"]})
    with pytest.raises(PerturbZooError, match=f"likelihood '{likelihood}' needs raw counts.*gaussian"):
        fit(CPA(**SMALL, likelihood=likelihood), data, 0)


def test_an_unknown_cell_type_is_predicted_with_a_warning(adata: Any, data: PerturbSeqDataModule) -> None:
    model = fit(CPA(**SMALL), data, 1)
    controls = adata[adata.obs["perturbation"] == "control"].copy()
    controls.obs["context"] = "new"
    with pytest.warns(perturbzoo.errors.PerturbZooWarning, match="never seen in training"):
        assert np.isfinite(model.predict(controls, "G0").X).all()
