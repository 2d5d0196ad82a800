"""GEARS: the symmetries of its equations, its graphs, what a condition says, and where it starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gears_models import ANY_EDGE, UNSEEN, ask, edges, first_batch, fit, module, scrambled, table_of
from lightning.pytorch import Trainer, seed_everything

import perturbzoo
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError, PerturbZooWarning
from perturbzoo.models.gears import GEARS

pytestmark = pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")


@pytest.fixture(scope="module")
def adata(make_adata: Callable[..., Any]) -> Any:
    return make_adata(cells_per_condition=8, n_controls=16, n_genes=12)


@pytest.fixture
def data(adata: Any) -> PerturbSeqDataModule:
    return module(adata)


# ---------------------------------------------------------------------- symmetries


@pytest.mark.parametrize("paper", [False, True])
def test_permuting_cells_permutes_outputs(data: PerturbSeqDataModule, paper: bool) -> None:
    model = scrambled(fit(GEARS(paper=paper, hidden=8), data, 0))
    batch = first_batch(data)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    shuffled = replace(batch, control=batch.control[order], row=batch.row[order])
    with torch.no_grad():
        mean, moved = model(batch).mean, model(shuffled).mean
    torch.testing.assert_close(moved, mean[order], rtol=0, atol=1e-6)
    assert not torch.allclose(moved, mean, atol=1e-2)


@pytest.mark.parametrize("paper", [False, True])
def test_permuting_conditions_permutes_deltas(data: PerturbSeqDataModule, paper: bool) -> None:
    model = scrambled(fit(GEARS(paper=paper, hidden=8), data, 0))
    delta = ask(model, ["G0", "G1+G2", "G3"])
    torch.testing.assert_close(ask(model, ["G3", "G0", "G1+G2"]), delta[[2, 0, 1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("paper", [False, True])
def test_order_of_a_combination_is_irrelevant(data: PerturbSeqDataModule, paper: bool) -> None:
    model = scrambled(fit(GEARS(paper=paper, hidden=8), data, 0))
    table = table_of(model, ["G0+G1:activation+G2@2"] * 3)
    orders = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 0, 2]])
    shuffled = {name: torch.gather(getattr(table, name), 1, orders) for name in ("targets", "kind", "dose")}
    with torch.no_grad():
        delta, _ = model.delta(replace(table, **shuffled), torch.zeros(3, 12))
    torch.testing.assert_close(delta, delta[:1].expand(3, -1), rtol=0, atol=1e-5)
    assert delta.abs().max() > 0.1


def test_one_computation_per_condition_is_one_per_cell(data: PerturbSeqDataModule) -> None:
    """Every cell alone in a batch of its own gets the same prediction."""
    model = scrambled(fit(GEARS(hidden=8, uncertainty=True), data, 0))
    batch = first_batch(data)
    with torch.no_grad():
        together = model(batch)
        for cell in range(len(batch)):
            row = batch.row[cell : cell + 1]
            alone = model(
                replace(
                    batch,
                    control=batch.control[cell : cell + 1],
                    row=torch.zeros(1, dtype=torch.int64),
                    table=batch.table.select(row),
                    context_control=batch.context_control[row],
                )
            )
            torch.testing.assert_close(alone.mean[0], together.mean[cell], rtol=0, atol=1e-5)
            torch.testing.assert_close(alone.variance[0], together.variance[cell], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- graphs


@pytest.mark.parametrize("paper", [False, True])
def test_the_coexpression_graph_acts_on_every_cell(data: PerturbSeqDataModule, paper: bool) -> None:
    """The reference gives neighbours to the first cell of a batch only."""
    model = scrambled(fit(GEARS(paper=paper, hidden=8, coexpression=ANY_EDGE), data, 0))
    bare = fit(GEARS(paper=paper, hidden=8, coexpression={"threshold": 0.999}), data, 0)
    bare.load_state_dict(model.state_dict())
    assert model.coexpression_index.shape[1] > 12
    assert bare.coexpression_index.shape[1] == 12  # self loops alone
    batch = first_batch(data)
    with torch.no_grad():
        difference = (model(batch).mean - bare(batch).mean).abs()
    assert len(difference) > 1
    assert (difference.amax(dim=1) > 1e-3).all()
    # the change depends on the condition, so that cells of one condition move together
    for row in batch.row.unique():
        of_row = difference[batch.row == row]
        torch.testing.assert_close(of_row, of_row[:1].expand_as(of_row), rtol=0, atol=1e-5)


def test_targets_nothing_tells_about_are_alike_and_warned_of(adata: Any) -> None:
    data = module(adata, UNSEEN)
    model = GEARS(hidden=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PerturbZooWarning)
        fit(model, data, 0)
        Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(model, data, verbose=False)
    said = [str(warning.message) for warning in caught if "neither trained" in str(warning.message)]
    assert len(said) == 1
    assert "2 targets" in said[0]
    assert "(G3, G4)" in said[0]
    delta = ask(scrambled(model), ["G3", "G4", "G0"])
    assert torch.equal(delta[0], delta[1])
    assert not torch.allclose(delta[0], delta[2], atol=1e-2)
    # what was learned from the others does not speak for them
    before = ask(model, ["G3", "G0"])
    model.targets.learned.weight.data += 1.0
    after = ask(model, ["G3", "G0"])
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-2)
    model.targets.self_map.bias.data += 1.0
    assert not torch.allclose(ask(model, ["G3"])[0], after[0], atol=1e-2)


def test_no_warning_where_every_target_is_trained(adata: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*neither trained")
        fit(GEARS(hidden=4), module(adata), 0)  # G4 trains within a combination


@pytest.mark.parametrize("paper", [False, True])
def test_an_unseen_target_is_told_by_its_neighbours(adata: Any, tmp_path: Path, paper: bool) -> None:
    """G4, never trained, has an edge to G0. In the paper both speak, by PyG's symmetric normalisation; here G0 alone does."""
    graph = edges(tmp_path, ("G4", "G0"), ("G1", "G2"))
    model = GEARS(hidden=8, perturbation_graph=graph, paper=paper, norm="layer", max_norm=1e9)
    model = scrambled(fit(model, module(adata, UNSEEN), 0))
    names = list(model.target_names)
    table = table_of(model, ["G4", "G3", "G0"])
    encoded, learned = model.encode_conditions(table, torch.zeros(3, 12)), model.targets.learned.weight
    influence = []
    for row in range(3):
        (gradient,) = torch.autograd.grad(encoded[row].square().sum(), learned, retain_graph=True)
        influence.append({names[index] for index in torch.nonzero(gradient.abs().sum(dim=1)).ravel().tolist()})
    assert influence == ([{"G0", "G4"}, set(), {"G0", "G4"}] if paper else [{"G0"}, set(), {"G0"}])
    g0, g4 = learned.detach()[names.index("G0")], learned.detach()[names.index("G4")]
    own = model.targets.self_map
    # each node counts itself, so that both have degree 2 and the edge weighs 1/2; without an edge back, G4 keeps its degree
    vector = own((g0 + g4) / 2) if paper else own.bias + model.targets.maps["edges"](g0) / 2**0.5
    expected = model.fuse_mlp(vector + model.kind_embedding(table.kind[0, 0]))
    torch.testing.assert_close(encoded[0], expected, rtol=0, atol=1e-5)


def test_targets_of_the_graph_that_no_data_named(adata: Any, tmp_path: Path) -> None:
    """NEW is next to a trained target and can be predicted; FAR is in the file but next to nothing trained."""
    graph = edges(tmp_path, ("G0", "NEW"), ("G0", "G1"), ("FAR", "FURTHER"), ("G3", "G4"))
    with pytest.warns(PerturbZooWarning, match=r"2 targets.*\(G3, G4\).*common"):
        model = fit(GEARS(hidden=8), module(adata, UNSEEN, perturbation_graph=graph), 1, tmp_path)
    assert model.target_names == ("G0", "G1", "G2", "G3", "G4", "NEW")
    scrambled(model)
    delta = ask(model, ["NEW", "G0", "G3", "NEW+G1+G2"])
    assert (torch.cdist(delta, delta) + torch.eye(4) > 1e-2).all()
    with pytest.raises(PerturbZooError, match=r"'FAR'.*never named"):
        ask(model, ["FAR"])
    trained = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    assert trained.predict(adata, ["NEW", "G0+NEW"], n_cells=3).shape == (6, 12)
    with pytest.raises(PerturbZooError, match=r"'FAR'.*never named"):
        trained.predict(adata, ["G0", "FAR"])


def test_without_graph_a_target_never_named_is_refused(data: PerturbSeqDataModule, adata: Any) -> None:
    model = fit(GEARS(hidden=4), data, 0)
    with pytest.raises(PerturbZooError, match=r"'G7'.*never named"):
        model.predict(adata, ["G0+G7"])


def test_a_hidden_target_is_what_an_unseen_one_is(data: PerturbSeqDataModule) -> None:
    """With every target hidden, training sees what prediction makes of a target without vector: kinds differ, targets do not."""
    model = scrambled(fit(GEARS(hidden=8, unseen_rate=1.0, residual=False), data, 0))
    table = table_of(model, ["G0", "G1", "G0:activation"])
    model.train()
    hidden, _ = model.delta(table, torch.zeros(3, 12))
    model.eval()
    model.targets._has_own[:] = 0.0
    unknown, _ = model.delta(table, torch.zeros(3, 12))
    torch.testing.assert_close(hidden, unknown, rtol=0, atol=1e-6)
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=1e-6)
    assert not torch.allclose(hidden[0], hidden[2], atol=1e-2)


# ---------------------------------------------------------------------- what conditions say


@pytest.mark.parametrize("paper", [False, True])
def test_control_and_dose_zero_change_nothing(data: PerturbSeqDataModule, paper: bool) -> None:
    model = scrambled(fit(GEARS(paper=paper, hidden=8), data, 0))
    delta = ask(model, ["control", "G0@0", "G0@0+G1@0", "G0@0+G1", "G1"])
    assert (delta[:3] == 0).all()
    torch.testing.assert_close(delta[3], delta[4], rtol=0, atol=1e-6)
    assert delta[4].abs().max() > 0.1


def test_dose_and_kind_matter(data: PerturbSeqDataModule) -> None:
    model = scrambled(fit(GEARS(hidden=8, residual=False), data, 0))
    delta = ask(model, ["G0", "G0@0.5", "G0@4", "G0:activation", "G0:knockout@1"])
    distance = torch.cdist(delta, delta)
    assert (distance[:4, :4] + torch.eye(4) > 1e-2).all()
    assert distance[0, 4] == 0  # dose 1 and the data's kind are what is not spelled out


def test_any_number_of_targets(data: PerturbSeqDataModule, adata: Any) -> None:
    model = fit(GEARS(hidden=8), data, 1)
    predicted = model.predict(adata, ["G0+G1+G2", "G0+G1+G2+G3+G4"], pseudobulk=True)
    assert np.isfinite(predicted.X).all()
    assert np.abs(predicted.layers["delta"][0] - predicted.layers["delta"][1]).max() > 1e-2


# ---------------------------------------------------------------------- the baseline it starts from


def test_the_untrained_model_is_the_baseline(make_adata: Callable[..., Any]) -> None:
    """The mean single for singles, the sum of the singles for combinations, in the context asked for."""
    data = module(make_adata(contexts=("a", "b"), cells_per_condition=8, n_genes=12), covariates=["context"])
    model = fit(GEARS(hidden=8, neighbours=False), data, 0)
    bulks = data.training_pseudobulks()
    for context in (0, 1):
        single = {
            str(condition): delta
            for condition, delta, where in zip(bulks.conditions, bulks.delta, bulks.contexts, strict=True)
            if len(condition) == 1 and where == context
        }
        mean = sum(single.values()) / 4
        assert set(single) == {"G0", "G1", "G2", "G3"}
        asked = ["G0", "G4", "G0+G1", "G1+G2", "G3+G4", "G0+G1+G3"]
        g0, g1, g2, g3 = (single[f"G{number}"] for number in range(4))
        expected = np.array([mean, mean, g0 + g1, g1 + g2, g3 + mean, g0 + g1 + g3])
        np.testing.assert_allclose(ask(model, asked, [context] * 6).numpy(), expected, rtol=0, atol=1e-6)


def test_the_untrained_model_starts_from_the_neighbours(adata: Any, tmp_path: Path) -> None:
    """A single from its neighbours and the mean, never from itself; a combination from what was measured, if it was."""
    graph = edges(tmp_path, ("G0", "G1"), ("G0", "G2"), ("G3", "G0"))
    data = module(adata, UNSEEN, perturbation_graph=graph)  # G0, G1, G2, G0+G1, G1+G2 train
    model = fit(GEARS(hidden=8), data, 0)
    model.neighbours.strength[:] = torch.tensor([3.0, 0.0])
    bulks = data.training_pseudobulks()
    g0, g1, g2 = (bulks.delta[[str(name) for name in bulks.conditions].index(single)] for single in ("G0", "G1", "G2"))
    mean = (g0 + g1 + g2) / 3
    # affinities 3 and 3 against 1 for the mean; and 3 against 1
    expected = {
        "G0": (3 * g1 + 3 * g2 + mean) / 7,
        "G1": (3 * g0 + mean) / 4,
        "G3": (3 * g0 + mean) / 4,
        "G4": mean,
        "G0+G1": g0 + g1,
        "G1+G3+G4": g1 + (3 * g0 + mean) / 4 + mean,
    }
    np.testing.assert_allclose(ask(model, list(expected)).numpy(), np.array(list(expected.values())), rtol=0, atol=1e-6)


def test_without_residual_it_starts_elsewhere(data: PerturbSeqDataModule) -> None:
    seed_everything(0, verbose=False)
    model = fit(GEARS(hidden=8, residual=False), data, 0)
    assert "known.value" not in model.state_dict()
    assert ask(model, ["G0", "G1"]).abs().max() > 1e-2


def test_an_empty_list_is_no_graph(adata: Any, tmp_path: Path) -> None:
    """None takes the data module's graph, an empty list does without."""
    data = module(adata, UNSEEN, perturbation_graph=edges(tmp_path, ("G0", "G4")))
    assert "graph" in fit(GEARS(hidden=4), data, 0).prepared
    assert "graph" not in fit(GEARS(hidden=4, perturbation_graph=[]), data, 0).prepared


def test_a_graph_that_says_nothing_is_warned_of(adata: Any, tmp_path: Path) -> None:
    graph = edges(tmp_path, ("G0", "NEW"), ("G3", "G4"))  # of G0 to G2, which train, none is next to a target of the screen
    with pytest.warns(PerturbZooWarning, match="says nothing here"):
        fit(GEARS(hidden=4, perturbation_graph=graph), module(adata, UNSEEN), 0)
