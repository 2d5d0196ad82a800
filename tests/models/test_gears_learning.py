"""GEARS: its losses by hand and by finite differences, its uncertainty, the paper's choices, and what it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from gears_models import ANY_EDGE, UNSEEN, ask, edges, first_batch, fit, module, noise_free, scrambled
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import perturbzoo
from perturbzoo.data.batch import ConditionTable, PerturbationBatch
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.gears import GEARS, autofocus_loss, direction_loss

pytestmark = pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")


@pytest.fixture(scope="module")
def adata(make_adata: Callable[..., Any]) -> Any:
    return make_adata(cells_per_condition=8, n_controls=16, n_genes=12)


@pytest.fixture
def data(adata: Any) -> PerturbSeqDataModule:
    return module(adata)


# ---------------------------------------------------------------------- losses


def batch_of(observed: Tensor, control: Tensor, row: Tensor, n_pairs: int) -> PerturbationBatch:
    """A batch with hand-made values; the table says nothing."""
    nothing = torch.zeros(n_pairs, 1)
    empty = nothing.long()
    cells = torch.zeros(len(row))
    return PerturbationBatch(
        expression=observed,
        control=control,
        row=row,
        table=ConditionTable(empty, empty, nothing, nothing, nothing, nothing, empty[:, 0], empty[:, 0]),
        context_control=torch.zeros(n_pairs, observed.shape[1]),
        size_factor=cells,
        control_size_factor=cells,
        covariates=cells.long()[:, None],
        cell=cells.long(),
        control_cell=cells.long(),
        depth=1.0,
    )


def test_autofocus_by_hand() -> None:
    """Two conditions; the second expresses its first gene only. Mean of error^4 per condition, then over conditions."""
    observed = torch.tensor([[1.0, 2.0], [3.0, 0.0], [1.0, 0.0]])
    predicted = torch.tensor([[2.0, 4.0], [3.0, 1.0], [3.0, 5.0]])
    batch = batch_of(observed, observed, torch.tensor([0, 0, 1]), 2)
    first = ((1.0 + 0.0) / 2 + (16.0 + 1.0) / 2) / 2
    second = 16.0
    assert float(autofocus_loss(predicted, batch)) == pytest.approx((first + second) / 2)
    squares = ((1.0 + 0.0) / 2 + (4.0 + 1.0) / 2) / 2
    assert float(autofocus_loss(predicted, batch, focus=0.0)) == pytest.approx((squares + 4.0) / 2)


def test_direction_loss_by_hand() -> None:
    """Large changes count as the difference of signs squared; around 0 there is a gradient where the sign has none."""
    predicted, observed = torch.tensor([[5.0, 5.0, 0.0, 5.0]]), torch.tensor([[5.0, -5.0, 0.0, 0.0]])
    assert float(direction_loss(predicted, observed)) == pytest.approx((0 + 4 + 0 + 1) / 4)
    small = torch.tensor([[0.01]], requires_grad=True)
    direction_loss(small, torch.tensor([[1.0]])).backward()
    # d/dx (tanh 10x - 1)^2 = 2 (tanh 10x - 1) 10 (1 - tanh^2 10x)
    assert float(small.grad) == pytest.approx(20 * (np.tanh(0.1) - 1) * (1 - np.tanh(0.1) ** 2), rel=1e-5)


def test_gene_weighting_by_hand(data: PerturbSeqDataModule) -> None:
    """Half of the weight goes by the observed change relative to its mean over genes; all weights average 1."""
    model = scrambled(fit(GEARS(hidden=8, gene_weighting=0.5), data, 0))
    batch = first_batch(data)
    with torch.no_grad():
        delta, _ = model.delta(batch.table, batch.context_control)
        total = model.loss(batch)["mse"]
    errors = []
    for pair, (predicted, control) in enumerate(zip(delta.tolist(), batch.context_control.tolist(), strict=True)):
        cells = batch.observed[batch.row == pair].tolist()
        change = [sum(column) / len(cells) - level for column, level in zip(zip(*cells, strict=True), control, strict=True)]
        size = sum(map(abs, change)) / len(change)
        errors += [(0.5 + 0.5 * abs(d) / size) * (p - d) ** 2 for p, d in zip(predicted, change, strict=True)]
    assert float(total) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_condition_mse_is_the_error_of_the_means(data: PerturbSeqDataModule) -> None:
    model = scrambled(fit(GEARS(hidden=8), data, 0))
    batch = first_batch(data)
    with torch.no_grad():
        terms = model.loss(batch)
        delta, _ = model.delta(batch.table, batch.context_control)
    means = torch.stack([batch.observed[batch.row == row].mean(dim=0) for row in range(len(batch.table))])
    assert set(terms) == {"mse"}
    expected = (batch.context_control + delta - means).square().mean()
    torch.testing.assert_close(terms["mse"], expected, rtol=1e-5, atol=0)


def double_batch(batch: PerturbationBatch) -> PerturbationBatch:
    return replace(
        batch,
        expression=batch.observed.double(),
        control=batch.control.double(),
        context_control=batch.context_control.double(),
    )


@pytest.mark.parametrize(
    ("arguments", "train"),
    [
        ({"direction_weight": 0.5}, False),
        ({"direction_weight": 0.5, "residual": False, "unseen_rate": 0.0}, True),
        ({"loss": "autofocus", "direction_weight": 0.5}, False),
        ({"paper": True}, True),
    ],
)
def test_gradients_are_finite_differences(make_adata: Callable[..., Any], arguments: dict[str, Any], train: bool) -> None:
    """All parameters, through graphs, context input and both losses, in float64; batch statistics in training mode too."""
    conditions = ("G0", "G1", "G2", "G0+G1")
    adata = make_adata(conditions=conditions, contexts=("a", "b"), cells_per_condition=3, n_controls=6, n_genes=4)
    data = module(adata, {"method": "no_test"}, covariates=["context"], cells_per_condition=2)
    model = fit(GEARS(hidden=3, coexpression=ANY_EDGE, **arguments), data, 0).double()
    # small enough for max_norm to leave the embeddings alone; in float64, or the differences drown
    scrambled(model, scale=0.25).train(train)
    batch = double_batch(first_batch(data))

    def total(*_: Tensor) -> Tensor:
        return torch.stack(list(model.loss(batch).values())).sum()

    parameters = tuple(model.parameters())
    torch.manual_seed(0)  # the directions that the derivative is taken in
    assert torch.autograd.gradcheck(total, parameters, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
    gradients = torch.autograd.grad(total(), parameters, allow_unused=True)
    silent = {
        name
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True)
        if gradient is None or not gradient.abs().max() > 1e-8
    }
    # a linear layer's bias is lost in a batch normalisation
    assert silent <= {name for name in silent if arguments.get("paper") and name.endswith("bias")}


# ---------------------------------------------------------------------- uncertainty


def test_gradients_of_the_likelihood(make_adata: Callable[..., Any]) -> None:
    """Finite differences for the parameters of the variance; none at all for those of the mean."""
    adata = make_adata(conditions=("G0", "G1", "G0+G1"), cells_per_condition=3, n_controls=6, n_genes=4)
    data = module(adata, {"method": "no_test"}, cells_per_condition=2)
    model = scrambled(fit(GEARS(hidden=3, uncertainty=True), data, 0).double(), scale=0.5)
    batch = double_batch(first_batch(data))
    named = dict(model.named_parameters())
    own = {name: value for name, value in named.items() if name == "log_variance" or name.startswith("variance_head")}
    assert len(own) == 5
    assert torch.autograd.gradcheck(lambda *_: model.loss(batch)["likelihood"], tuple(own.values()), eps=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(model.loss(batch)["likelihood"], list(named.values()), allow_unused=True)
    for name, gradient in zip(named, gradients, strict=True):
        assert (gradient is None or not gradient.any()) == (name not in own), name


def test_asking_for_the_uncertainty_leaves_the_mean_alone(data: PerturbSeqDataModule) -> None:
    plain = scrambled(fit(GEARS(hidden=8), data, 0))
    both = fit(GEARS(hidden=8, uncertainty=True), data, 0)
    missing, unexpected = both.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("variance" in name for name in missing)
    batch = first_batch(data)
    with torch.no_grad():
        prediction = both(batch)
        assert torch.equal(prediction.mean, plain(batch).mean)
    assert prediction.variance.shape == prediction.mean.shape
    assert (prediction.variance > 0).all()
    assert plain(batch).variance is None
    assert set(both.loss(batch)) == {"mse", "likelihood"}


def test_the_variance_is_the_maximum_likelihood(data: PerturbSeqDataModule) -> None:
    """Mean held fixed, the optimum is each gene's mean squared error over the conditions of its kind, and it is finite."""
    model = scrambled(fit(GEARS(hidden=8, uncertainty=True), data, 0))
    for parameter in model.variance_head[-1].parameters():
        nn.init.zeros_(parameter)
    batch = first_batch(data)
    optimizer = torch.optim.LBFGS([model.log_variance], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(batch)["likelihood"] * 100
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        delta, variance = model.delta(batch.table, batch.context_control)
        error = (delta - (batch.condition_means(batch.observed) - batch.context_control)).square()
    # of combinations whose singles were measured, and of all others
    known = torch.isin(batch.table.targets, model.known.table.targets[:, 0]).all(dim=1) & (batch.table.present.sum(dim=1) > 1)
    assert 0 < known.sum() < len(known)
    # G3+G4 has one part that was not measured, as a single has: nothing here has two
    for chosen in (known, ~known):
        expected = error[chosen].mean(dim=0)
        torch.testing.assert_close(variance[chosen], expected.expand_as(variance[chosen]), rtol=1e-2, atol=0)


def test_the_standard_error_reaches_the_prediction(data: PerturbSeqDataModule, adata: Any, tmp_path: Path) -> None:
    model = fit(GEARS(hidden=8, uncertainty=True), data, 2, tmp_path)
    predicted = model.predict(adata, ["G0", "G0+G1"], n_cells=3)
    assert (predicted.layers["std"] > 0).all()
    assert "std" not in fit(GEARS(hidden=8), data, 0).predict(adata, ["G0"], n_cells=3).layers
    loaded = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    assert (loaded.predict(adata, ["G0"], n_cells=3).layers["std"] > 0).all()


def test_a_fit_that_goes_on_keeps_its_variance(data: PerturbSeqDataModule, tmp_path: Path) -> None:
    """The variance starts from the training conditions once; a loaded model keeps what it has learned since."""
    model = fit(GEARS(hidden=8, uncertainty=True), data, 0)
    start = model.log_variance.detach().clone()
    assert (start != -6).any()
    fit(model, data, 1, tmp_path)
    assert not torch.equal(model.log_variance, start)
    loaded = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    learned = loaded.log_variance.detach().clone()
    fit(loaded, data, 0)
    assert torch.equal(loaded.log_variance, learned)


def test_predicted_errors_are_scaled_as_in_test(data: PerturbSeqDataModule, adata: Any) -> None:
    model = fit(GEARS(hidden=8, uncertainty=True), data, 0)
    before = model.predict(adata, ["G0", "G0+G1"], n_cells=3).layers["std"]
    model.variance_scale.fill_(100.0)
    np.testing.assert_allclose(model.predict(adata, ["G0", "G0+G1"], n_cells=3).layers["std"], 10 * before, rtol=1e-5)


# ---------------------------------------------------------------------- the paper's choices


def test_paper_selects_the_original_choices(data: PerturbSeqDataModule) -> None:
    """cell-gears 0.1.2: hidden 64, graphs of 20 neighbours above 0.4, power 4, direction 0.1, Adam 1e-3 and 5e-4 halved."""
    model = fit(GEARS(paper=True), data, 0)
    assert model.hparams["hidden"] == 64
    assert model.choices == {
        "loss": "autofocus",
        "gene_weighting": 0.0,
        "direction_weight": 0.1,
        "residual": False,
        "neighbours": False,
        "start_input": False,
        "relations": False,
        "unseen_rate": 0.0,
        "context": False,
        "norm": "batch",
        "max_norm": 1.0,
        "lr": 1e-3,
        "weight_decay": 5e-4,
        "lr_decay": 0.5,
    }
    assert not any(isinstance(part, nn.LayerNorm) for part in model.modules())
    for name in ("gene_mlp", "fuse_mlp", "recovery_mlp", "cross_mlp"):
        kinds = [type(part) for part in getattr(model, name)]
        assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    optimizer = model.configure_optimizers()
    assert optimizer["optimizer"].defaults["lr"] == 1e-3
    assert optimizer["optimizer"].defaults["weight_decay"] == 5e-4
    assert optimizer["lr_scheduler"]["scheduler"].gamma == 0.5
    assert GEARS(paper=True, norm="layer").choices["norm"] == "layer"


def test_paper_trains_and_keeps_embeddings_bounded() -> None:
    seed_everything(0, verbose=False)
    adata = noise_free()
    data = module(adata, {"method": "no_test"})
    model = GEARS(paper=True, hidden=16, lr=0.01, lr_decay=1.0)
    fit(model, data, 0)
    batch = first_batch(data)
    with torch.no_grad():
        before = {name: float(value) for name, value in model.loss(batch).items()}
    assert set(before) == {"autofocus", "direction"}
    fit(model, data, 40)
    with torch.no_grad():
        after = {name: float(value) for name, value in model.loss(batch).items()}
    assert after["autofocus"] < 0.5 * before["autofocus"]
    predicted = model.predict(adata, ["A", "B+C+D"], n_cells=4)
    assert float(model.gene_embedding.weight.detach().norm(dim=1).max()) <= 1 + 1e-5
    assert np.isfinite(predicted.X).all()


def test_batch_norm_refuses_a_lone_condition(adata: Any) -> None:
    with pytest.raises(PerturbZooError, match="conditions_per_batch 1"):
        fit(GEARS(paper=True, hidden=4), module(adata, conditions_per_batch=1), 1)
    fit(GEARS(hidden=4), module(adata, conditions_per_batch=1), 1)


def test_running_statistics_move_to_another_model(data: PerturbSeqDataModule, tmp_path: Path) -> None:
    """`initialise_from` takes the statistics of batch normalisation with the weights: the same predictions at once."""
    model = fit(GEARS(paper=True, hidden=8), data, 2, tmp_path)
    copy = GEARS(paper=True, hidden=8)
    copy.initialise_from(str(tmp_path / "checkpoints" / "last.ckpt"))
    fit(copy, data, 0)
    last = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    assert torch.equal(ask(copy, ["G0", "G1+G2"]), ask(last, ["G0", "G1+G2"]))  # type: ignore[arg-type]
    assert type(model) is type(copy)


# ---------------------------------------------------------------------- contexts


def opposite_contexts() -> Any:
    """Noise-free log1p cells: G0 raises half of the genes in context a and lowers them in b."""
    from anndata import AnnData

    generator = np.random.default_rng(0)
    effect = np.concatenate([np.full(6, 0.4), np.zeros(6)])
    values, labels, contexts = [], [], []
    for context, sign in (("a", 1), ("b", -1)):
        control = generator.uniform(0.6, 2.0, 12)
        for label, change in (("control", 0 * effect), ("G0", sign * effect), ("G1", -sign * effect), ("G2", 0.2 + 0 * effect)):
            values += [control + change] * 4
            labels += [label] * 4
            contexts += [context] * 4
    obs = pd.DataFrame({"perturbation": labels, "context": contexts}, index=[f"cell{number}" for number in range(len(labels))])
    return AnnData(np.array(values, dtype=np.float32), obs=obs, var=pd.DataFrame(index=[f"G{number}" for number in range(12)]))


def test_the_context_modulates_the_change() -> None:
    seed_everything(0, verbose=False)
    data = module(opposite_contexts(), {"method": "no_test"}, covariates=["context"])
    model = GEARS(hidden=16, residual=False, lr=0.01, lr_decay=1.0, unseen_rate=0.0)
    start = fit(model, data, 0)
    assert model.uses_context
    untrained = ask(start, ["G0", "G0"], [0, 1])
    assert torch.equal(untrained[0], untrained[1])  # the encoder's last layer starts at 0
    fit(model, data, 60)
    a, b = ask(model, ["G0", "G0"], [0, 1])
    assert a[:6].mean() > 0.2
    assert b[:6].mean() < -0.2
    # a context of its own, given by its controls alone: those of a
    control = torch.as_tensor(model.get_spec().control_mean[:1])
    torch.testing.assert_close(ask(model, ["G0"], [-1], control)[0], a, rtol=0, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"paper": True}, {"context": False, "residual": False}])
def test_the_context_is_off(arguments: dict[str, Any]) -> None:
    data = module(opposite_contexts(), {"method": "no_test"}, covariates=["context"])
    model = scrambled(fit(GEARS(hidden=8, **arguments), data, 2))
    assert not model.uses_context
    assert not any("context" in name for name in model.state_dict())
    a, b = ask(model, ["G0", "G0"], [0, 1])
    assert torch.equal(a, b)


def test_a_single_context_needs_no_encoder(data: PerturbSeqDataModule) -> None:
    model = scrambled(fit(GEARS(hidden=8), data, 0))
    assert model.choices["context"]
    assert not model.uses_context
    assert torch.equal(ask(model, ["G0"], control=torch.zeros(1, 12)), ask(model, ["G0"], control=torch.ones(1, 12)))


# ---------------------------------------------------------------------- learning


@pytest.mark.parametrize("residual", [True, False])
def test_overfits_eight_conditions(residual: bool) -> None:
    seed_everything(0, verbose=False)
    data = module(noise_free(), {"method": "no_test"})
    model = GEARS(hidden=32, residual=residual, lr=0.01, lr_decay=0.99, weight_decay=0.0, unseen_rate=0.0)
    fit(model, data, 0)
    bulks = data.training_pseudobulks()
    asked = [str(condition) for condition in bulks.conditions]
    assert len(asked) == 8
    start = float(np.square(ask(model, asked).numpy() - bulks.delta).mean())
    assert start > 0.05
    fit(model, data, 120)
    assert float(np.square(ask(model, asked).numpy() - bulks.delta).mean()) < 1e-3


def test_a_loaded_model_goes_on_learning_in_training_mode(data: PerturbSeqDataModule, tmp_path: Path) -> None:
    """`perturbzoo.load` gives a model in evaluation mode; fitting it drops targets again."""
    fit(GEARS(hidden=4), data, 1, tmp_path)
    loaded = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    assert not loaded.training
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(all(part.training for part in pl_module.modules()))

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_epochs=1, accelerator="cpu", callbacks=[Watch()], **options).fit(loaded, data)
    assert seen
    assert all(seen)


def test_save_and_load(make_adata: Callable[..., Any], tmp_path: Path) -> None:
    """Everything at once: contexts, graph, uncertainty, residual; the checkpoint alone gives the same numbers."""
    adata = make_adata(contexts=("a", "b"), cells_per_condition=8, n_genes=12)
    graph = edges(tmp_path, ("G0", "G4"), ("G1", "NEW"))
    model = GEARS(hidden=8, uncertainty=True, direction_weight=0.1, lr=0.01)
    trainer_data = module(adata, UNSEEN, covariates=["context"], perturbation_graph=graph)
    fit(model, trainer_data, 1, tmp_path)
    (tmp_path / "edges.csv").unlink()
    loaded = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    asked = ["G0", "G3", "G4", "NEW", "G0+G1+NEW"]
    before, after = (each.predict(adata, asked, n_cells=4) for each in (model, loaded))
    np.testing.assert_allclose(after.X, before.X, rtol=0, atol=1e-6)
    np.testing.assert_allclose(after.layers["std"], before.layers["std"], rtol=1e-5)
    assert not np.allclose(before.layers["delta"][:8], before.layers["delta"][8:16], atol=1e-3)
