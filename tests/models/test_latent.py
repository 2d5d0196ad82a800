"""What the models that move cells share: the latent space, the start, cells in and cells out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from transport_models import first_batch, fit, module, relative_error, scrambled

import perturbzoo
from perturbzoo.data.batch import encode_conditions
from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.models import CellOT, FlowMatching, latent
from perturbzoo.models.latent import LatentSpace, fit_latent
from perturbzoo.perturbation import parse_condition

pytestmark = pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")

SMALL: dict[Any, dict[str, Any]] = {CellOT: {"hidden": [8, 8], "width": 4}, FlowMatching: {"hidden": 8, "width": 4}}
MODELS = sorted(SMALL, key=lambda model: model.__name__)
SPLIT = {"method": "explicit", "test": ["G0+G1", "G4"]}


@pytest.fixture(scope="module")
def adata(make_adata: Callable[..., Any]) -> Any:
    return make_adata(cells_per_condition=12, n_controls=24, n_genes=12)


# ---------------------------------------------------------------------- the space


def correlated(n: int, genes: int) -> sparse.csr_matrix:
    random = np.random.default_rng(0)
    values = random.normal(size=(n, 3)) @ random.normal(size=(3, genes)) + 0.1 * random.normal(size=(n, genes))
    return sparse.csr_matrix(np.abs(values).astype(np.float32))


@pytest.mark.parametrize("dense", [0, 512])
def test_principal_axes(monkeypatch: pytest.MonkeyPatch, dense: int) -> None:
    """Eigenvectors of the covariance, whether found all at once or from the sparse matrix; positions are uncorrelated."""
    monkeypatch.setattr(latent, "_DENSE", dense)
    cells = correlated(60, 9)
    space = LatentSpace(fit_latent(cells, "pca", 4))
    values, vectors = np.linalg.eigh(np.cov(cells.toarray().T))
    for axis, expected in zip(space.components.numpy(), vectors.T[::-1], strict=False):
        assert abs(axis @ expected) == pytest.approx(1, abs=1e-4)
    variance = values[::-1][:4]
    positions = space.encode(torch.from_numpy(cells.toarray())).numpy()
    np.testing.assert_allclose(np.cov(positions.T), np.diag(variance / variance.mean()), atol=1e-3)
    np.testing.assert_allclose(space.spread, np.sqrt(variance / variance.mean()).clip(0.1), rtol=1e-3)


def test_projection_and_lift() -> None:
    """A change within the axes comes back; one beyond them vanishes; in gene space all of it comes back."""
    cells = correlated(60, 9)
    space = LatentSpace(fit_latent(cells, "pca", 4))
    change = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(space.project(space.lift(change)), change, rtol=1e-4, atol=1e-5)
    within = space.lift(change)
    anything = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    beyond = anything - space.lift(space.project(anything))
    assert beyond.abs().max() > 0.1
    torch.testing.assert_close(space.lift(space.project(within + beyond)), within, rtol=1e-4, atol=1e-5)
    genes = LatentSpace(fit_latent(cells, "genes", 4))
    assert genes.dimension == 9
    torch.testing.assert_close(genes.lift(genes.project(anything)), anything)


# ---------------------------------------------------------------------- the start


def deltas(data: Any) -> dict[str, np.ndarray]:
    """Mean change of each training condition."""
    bulks = data.training_pseudobulks()
    return {str(condition): delta for condition, delta in zip(bulks.conditions, bulks.delta, strict=True)}


@pytest.mark.parametrize("kind", MODELS)
def test_the_untrained_model_is_the_baseline(adata: Any, kind: Any) -> None:
    """Control cells themselves; or each plus the mean change; or plus the sum of what the targets did alone."""
    data = module(adata, SPLIT, cells_per_condition=4)
    asked, changes = ["G0", "G0+G1", "G1+G2", "G4"], {}
    for start in ("identity", "mean_shift", "additive", "measured"):
        model = fit(kind(**SMALL[kind], components=5, start=start), data, 0)
        model.on_fit_start() if start == "identity" else model.known.fit(data.training_pseudobulks())
        changes[start] = model.predict(adata, asked, n_cells=3).layers["delta"].reshape(len(asked), 3, -1)
    known = deltas(data)
    assert {"G0", "G1+G2"} < known.keys()
    assert not {"G0+G1", "G4"} & known.keys()
    singles = np.mean([known[name] for name in ("G0", "G1", "G2", "G3")], axis=0)
    sums = np.stack([known["G0"], known["G0"] + known["G1"], known["G1"] + known["G2"], singles])
    own = np.stack([sums[0], sums[1], known["G1+G2"], singles])
    everything = np.broadcast_to(np.mean(list(known.values()), axis=0), own.shape)
    assert np.abs(own - sums).max() > 0.01
    for start, expected in {"identity": 0 * own, "mean_shift": everything, "additive": sums, "measured": own}.items():
        np.testing.assert_allclose(changes[start], np.repeat(expected[:, None], 3, axis=1), atol=1e-5, err_msg=start)


@pytest.mark.parametrize("start", ["additive", "measured"])
def test_a_hidden_target_starts_as_if_it_was_never_measured(adata: Any, start: Any) -> None:
    """From the mean of the other singles; whatever was measured of it, alone or combined, has no say."""
    data = module(adata, SPLIT, cells_per_condition=4)
    model = fit(FlowMatching(**SMALL[FlowMatching], components=5, start=start), data, 0)
    model.known.fit(data.training_pseudobulks())
    conditions = [parse_condition(text) for text in ("G1", "G1+G2", "G1+G2", "G1+G2", "G0")]
    table = encode_conditions(conditions, [0] * 5, model.target_names, model.get_spec().default_kind)
    hidden = torch.tensor([[True, False], [True, False], [True, True], [False, False], [False, True]])  # the last is padding
    assert table.targets[1].tolist() == [model.target_names.index(name) for name in ("G1", "G2")]
    known = deltas(data)
    others = {one: np.mean([known[name] for name in ("G0", "G1", "G2", "G3") if name != one], axis=0) for one in ("G1", "G2")}
    both = known["G1+G2"] if start == "measured" else known["G1"] + known["G2"]
    expected = np.stack([others["G1"], others["G1"] + known["G2"], others["G1"] + others["G2"], both, known["G0"]])
    np.testing.assert_allclose(model.start_change(table, hidden), expected, atol=1e-5)
    # nothing leaks
    own = [row for row, condition in enumerate(data.training_pseudobulks().conditions) if "G1" in str(condition)]
    assert len(own) > 1
    before = model.start_change(table, hidden)[:2]
    model.known.value[own] += 100.0
    assert torch.equal(model.start_change(table, hidden)[:2], before)


def test_targets_are_hidden_in_training_only(adata: Any) -> None:
    data = module(adata, SPLIT, cells_per_condition=4)
    model = fit(FlowMatching(**SMALL[FlowMatching], unseen_rate=0.5), data, 0)
    table = first_batch(data).table
    assert model.hide(table) is None
    model.train()
    share = torch.stack([model.hide(table) for _ in range(400)]).float().mean()  # of thousands of draws
    assert float(share) == pytest.approx(0.5, abs=0.05)
    assert fit(FlowMatching(**SMALL[FlowMatching], unseen_rate=0.0), data, 0).train().hide(table) is None


@pytest.mark.parametrize("kind", MODELS)
def test_start_and_encoder_hide_the_same_targets(adata: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw for both, in each step. f of CellOT, the opponent, is told everything."""
    drawn: list[Any] = []
    told: dict[str, list[Any]] = {"start": [], "encoder": []}
    hide, start, encode = latent.TransportModel.hide, latent.TransportModel.start_change, latent.ConditionEncoder.forward

    def draw(self: Any, table: Any) -> Any:
        drawn.append(hide(self, table))
        return drawn[-1]

    def begin(self: Any, table: Any, hidden: Any = None) -> Any:
        told["start"].append(hidden)
        return start(self, table, hidden)

    def encoded(self: Any, table: Any, position: Any, hidden: Any = None) -> Any:
        told["encoder"].append(hidden)
        return encode(self, table, position, hidden)

    monkeypatch.setattr(latent.TransportModel, "hide", draw)
    monkeypatch.setattr(latent.TransportModel, "start_change", begin)
    monkeypatch.setattr(latent.ConditionEncoder, "forward", encoded)
    model = kind(**SMALL[kind], components=5, unseen_rate=0.9)
    fit(model, module(adata, SPLIT, cells_per_condition=4), 1)
    assert drawn
    assert all(mask.any() for mask in drawn)
    names = {id(mask) for mask in drawn}
    for masks in told.values():
        assert {id(mask) for mask in masks if mask is not None} == names


def test_the_start_is_the_same_in_all_contexts(make_adata: Callable[..., Any]) -> None:
    """That of a pair's own context would leave nothing to learn for a new one, which gets the mean of all."""
    adata = make_adata(conditions=("G0",), contexts=("a", "b", "c"), cells_per_condition=8, n_controls=16, n_genes=6)
    split = {"method": "unseen_context", "held_out": "c", "val_fraction": 0.0}
    data = module(adata, split, covariates=["context"], cells_per_condition=4)
    for start in ("mean_shift", "additive"):
        model = fit(FlowMatching(**SMALL[FlowMatching], start=start), data, 0)
        model.known.fit(data.training_pseudobulks())
        change = model.start_change(data.table)
        expected = torch.as_tensor(data.training_pseudobulks().delta.mean(axis=0), dtype=torch.float32)
        torch.testing.assert_close(change, expected.expand(3, -1), rtol=1e-4, atol=1e-6)
        # where no other target was measured, the mean of all is what an unseen target gets too
        hidden = torch.ones(data.table.targets.shape, dtype=torch.bool)
        torch.testing.assert_close(model.start_change(data.table, hidden), change)


# ---------------------------------------------------------------------- cells in, cells out


@pytest.mark.parametrize("kind", MODELS)
def test_each_cell_is_moved_by_itself(adata: Any, kind: Any) -> None:
    """A prediction depends on the cell, its pair and nothing else in the batch."""
    model = scrambled(fit(kind(**SMALL[kind], components=5), module(adata, SPLIT, cells_per_condition=4), 0), 0.3)
    batch = first_batch(module_ready(adata))
    together = model.evaluate(batch).mean
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))[:5]
    few = replace(batch, control=batch.control[order], row=batch.row[order])
    torch.testing.assert_close(model.evaluate(few).mean, together[order], rtol=1e-4, atol=1e-4)
    change = together - batch.control
    assert (change - batch.condition_means(change)[batch.row]).abs().max() > 1e-2  # not one shift for all cells


def module_ready(adata: Any) -> Any:
    data = module(adata, SPLIT, cells_per_condition=4)
    data.setup()
    return data


@pytest.mark.parametrize("kind", MODELS)
def test_no_intervention_no_change(adata: Any, kind: Any) -> None:
    data = module_ready(adata)
    model = scrambled(fit(kind(**SMALL[kind], components=5), data, 0), 0.3)
    batch = first_batch(data)
    conditions = [parse_condition(text) for text in ("G0@0", "G0")]
    table = encode_conditions(conditions, [0, 0], model.target_names, model.get_spec().default_kind)
    row = torch.arange(len(batch)) % 2
    asked = replace(batch, table=table, row=row, context_control=batch.context_control[[0, 0]])
    change = model.evaluate(asked).mean - batch.control
    assert not change[row == 0].any()
    assert change[row == 1].abs().max() > 1e-2


def test_without_the_residual_cells_lie_within_the_axes(adata: Any) -> None:
    data = module_ready(adata)
    model = scrambled(fit(FlowMatching(**SMALL[FlowMatching], components=3, keep_residual=False), data, 0), 0.2)
    batch = first_batch(data)
    predicted, space = model.evaluate(batch).mean, model.latent
    within = space.centre + space.lift(space.encode(predicted))
    torch.testing.assert_close(predicted, within, rtol=1e-4, atol=1e-4)
    assert np.linalg.matrix_rank(predicted - predicted.mean(dim=0), tol=1e-3) == 3


@pytest.mark.parametrize("kind", MODELS)
def test_checkpoint_alone_predicts_the_same_cells(adata: Any, kind: Any, tmp_path: Path) -> None:
    split = {**SPLIT, "val": ["G1+G2"]}
    model = fit(kind(**SMALL[kind], components=5), module(adata, split, cells_per_condition=4), 2, tmp_path)
    assert float(model.trainer.callback_metrics["val/e_distance"]) > 0
    loaded = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    before, after = (one.predict(adata, ["G4", "G0+G1"]) for one in (model, loaded))
    assert before.n_obs == 2 * 24  # every control cell under each condition
    np.testing.assert_array_equal(after.X, before.X)
    pseudobulk = loaded.predict(adata, ["G4", "G0+G1"], pseudobulk=True)
    np.testing.assert_allclose(pseudobulk.X, np.asarray(before.X).reshape(2, 24, -1).mean(axis=1), atol=1e-5)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.filterwarnings("default::perturbzoo.errors.PerturbZooWarning")
@pytest.mark.parametrize("kind", MODELS)
def test_small_conditions_are_resampled_with_one_warning(make_adata: Callable[..., Any], kind: Any) -> None:
    data = module(make_adata(conditions=("G0", "G1"), cells_per_condition=5, n_genes=6), cells_per_condition=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(kind(**SMALL[kind]), data, 1)
    ours = [str(warning.message) for warning in caught if issubclass(warning.category, PerturbZooWarning)]
    assert sum("fewer than 16 cells" in message for message in ours) == 1


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": "umap"}, "space is 'umap': give one of pca, genes"),
        ({"start": "zero"}, "start is 'zero': give one of identity, mean_shift, additive, measured"),
        ({"components": 0}, "components is 0: give 1 or more"),
        ({"unseen_rate": 1.5}, "unseen_rate is 1.5: give a share from 0 to 1"),
        ({"hidden": 0}, "hidden is 0: give widths of 1 or more"),
    ],
)
def test_bad_arguments(kind: Any, arguments: dict, message: str) -> None:
    with pytest.raises(PerturbZooError, match=message):
        kind(**arguments)


def test_relative_error_by_hand() -> None:
    start, expected = np.zeros((2, 1)), np.array([[3.0], [4.0]])
    assert relative_error(expected + 0.5, expected, start) == pytest.approx(0.5 / np.sqrt(12.5))


@pytest.mark.parametrize("kind", MODELS)
def test_a_thousand_genes_as_the_space(make_adata: Callable[..., Any], kind: Any) -> None:
    """No axes to find: positions are scaled genes, and above some hundreds the convex potentials curve along the genes."""
    adata = make_adata(conditions=("G0", "G1"), cells_per_condition=16, n_controls=32, n_genes=1000)
    model = fit(kind(**SMALL[kind], space="genes"), module(adata, cells_per_condition=16), 2)
    assert model.latent.dimension == 1000
    if kind is CellOT:
        assert model.g.basis is None
    predicted = model.predict(adata, ["G0+G1"], n_cells=4)
    assert np.isfinite(predicted.X).all()
    assert np.abs(predicted.layers["delta"]).max() > 0.1
