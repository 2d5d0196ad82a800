"""GRNODE: its value space, what a backbone becomes in it, what it remembers, and the five questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from gears_models import ask, table_of
from lightning.pytorch import Trainer

import perturbzoo
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.models import find_model
from perturbzoo.models.base import PerturbationModel
from perturbzoo.models.grn_ode import GRNODE, TAUS
from perturbzoo.perturbation import parse_condition
from perturbzoo.simulate import simulate_screen

GENES = [f"GENE{number:04d}" for number in range(1, 11)]
SINGLES = GENES[:8]
DOUBLES = [f"{GENES[a]}+{GENES[b]}" for a, b in ((0, 1), (2, 3), (4, 5), (1, 2))]
TEST, VAL = [DOUBLES[0], GENES[6]], [DOUBLES[1], GENES[7]]
QUICK = {"residual_steps": 60, "fixed_point_steps": 30, "lr": 0.1}
ADDITIVE = {"class_path": "Additive"}


@pytest.fixture(scope="module")
def screen() -> Any:
    return simulate_screen(
        n_genes=10, conditions=[*SINGLES, *DOUBLES], cells_per_condition=40, n_control=120, depth=8.0, noise=0.05, seed=5
    )


@pytest.fixture(scope="module")
def controls(screen: Any) -> Any:
    return screen[(screen.obs["perturbation"] == "control").to_numpy()].copy()


def module(adata: Any, **options: Any) -> PerturbSeqDataModule:
    split = options.pop("split", {"method": "explicit", "test": TEST, "val": VAL})
    options = {"condition_key": "perturbation", "kind": "interference", "min_cells": 1, "seed": 0} | options
    return PerturbSeqDataModule.from_anndata(adata, split=split, cells_per_condition=4, **options)


def fit(model: PerturbationModel, data: PerturbSeqDataModule, folder: Path | None = None, batches: int = 1) -> Any:
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=batches,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data)
    return model.eval()


@pytest.fixture(scope="module")
def saved(screen: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network alone."""
    folder = tmp_path_factory.mktemp("alone")
    fit(GRNODE(**QUICK), module(screen), folder)
    return folder / "checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def alone(saved: Path) -> Any:
    return perturbzoo.load(saved)


@pytest.fixture(scope="module")
def wrapped(screen: Any) -> Any:
    """Around sums of singles; tau as the validation conditions have it."""
    return fit(GRNODE(backbone=ADDITIVE, backbone_epochs=1, **QUICK), module(screen))


# ---------------------------------------------------------------------------------------------- value space


def test_expected_change_is_that_of_counts_that_are_drawn(alone):
    """E log1p(unit n) of negative binomial counts n, by 200,000 draws for each gene."""
    change = torch.linspace(-1.5, 1.0, 10)[None]
    found = alone.expected(change, torch.zeros(1, dtype=torch.int64))[0].numpy()
    rng = np.random.default_rng(0)
    mean, alpha = alone.control[0].numpy() / alone.unit, alone.dispersion.numpy()

    def drawn(mean: np.ndarray) -> np.ndarray:
        counts = rng.poisson(mean * rng.gamma(1 / alpha, alpha, (200_000, len(mean))))
        return np.log1p(alone.unit * counts).mean(0)

    np.testing.assert_allclose(found, drawn(mean * np.exp(change[0].numpy())) - drawn(mean), atol=0.012)


def test_log_change_is_the_inverse(alone):
    change = 2 * torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) - 1.2
    context = torch.zeros(6, dtype=torch.int64)
    torch.testing.assert_close(alone.log_change(alone.expected(change, context), context), change, rtol=0, atol=2e-3)
    # beyond what counts can say: the limit, not infinity
    assert float(alone.log_change(torch.full((1, 10), -50.0), context[:1]).min()) == pytest.approx(-6, abs=1e-3)


# ---------------------------------------------------------------------------------------------- the network alone


def test_prediction_is_the_steady_state(alone):
    asked = [GENES[0], DOUBLES[0], GENES[6]]
    table = table_of(alone, asked)
    change, spread = alone.network_change(table)
    assert spread is None
    torch.testing.assert_close(ask(alone, asked), alone.expected(change, table.context))
    network = alone.members()[0]
    torch.testing.assert_close(network.change([parse_condition(text) for text in asked])[:, :10], change)


def test_prediction_comes_near_what_was_measured(alone, screen):
    """Every condition of the training, better than no change at all."""
    data = module(screen)
    data.setup("fit")
    bulks = data.training_pseudobulks()
    observed = torch.as_tensor(bulks.mean - bulks.control_mean[bulks.contexts], dtype=torch.float32)
    found = ask(alone, [str(one) for one in bulks.conditions])
    assert float(((found - observed) ** 2).mean()) < 0.3 * float((observed**2).mean())


def test_order_doses_and_genes_that_nobody_perturbed(alone):
    one, other = ask(alone, [DOUBLES[0]]), ask(alone, ["+".join(reversed(DOUBLES[0].split("+")))])
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert float(ask(alone, [f"{GENES[0]}@0"]).abs().max()) < 1e-3
    full, half = ask(alone, [GENES[0]])[0, 0], ask(alone, [f"{GENES[0]}@0.5"])[0, 0]
    assert full < half < 0
    unseen = ask(alone, [GENES[9]])[0]
    assert unseen[9] < -0.3, "the median guide knocks it down"
    # what is over by the time of the steady state has left nothing
    assert float(ask(alone, [f"{GENES[0]}[1,3]"]).abs().max()) < 1e-3


def test_predict_gives_the_same_and_refuses_the_unknown_in_one_line(alone, controls):
    bulk = alone.predict(controls, [GENES[9], DOUBLES[0]], pseudobulk=True)
    np.testing.assert_allclose(bulk.layers["delta"], ask(alone, [GENES[9], DOUBLES[0]]).numpy(), atol=1e-5)
    assert "std" not in bulk.layers
    with pytest.raises(PerturbZooError, match="NOBODY") as caught:
        alone.predict(controls, ["NOBODY"])
    assert "\n" not in str(caught.value)


def test_targets_that_are_not_measured_are_nodes(screen, controls):
    """The second gene's column is left out: it stays a regulator, and can be asked about, alone and around a model."""
    keep = screen.var_names != GENES[1]
    data = module(screen[:, keep].copy())
    model = fit(GRNODE(backbone=ADDITIVE, backbone_epochs=1, tau=1.0, **QUICK), data)
    network = model.members()[0]
    assert network.nodes == (*screen.var_names[keep], GENES[1])
    assert GENES[1] not in model.network().edges["target"].tolist()
    found = ask(model, [GENES[1], DOUBLES[0]])
    assert found.shape == (2, 9)
    assert bool(torch.isfinite(found).all())
    assert float(found[0].abs().max()) > 0.01


def test_members_differ_and_that_is_the_variance(screen, controls):
    model = fit(GRNODE(members=2, **QUICK), module(screen))
    assert model.predicts_variance
    table = table_of(model, SINGLES[:3])
    change, spread = model.network_change(table)
    each = torch.stack([one.change(one.encode_table(table, model.target_names))[:, :10] for one in model.members()])
    torch.testing.assert_close(change, each.mean(0))
    torch.testing.assert_close(spread, (each[0] - each[1]) ** 2 / 2)
    assert float(spread.max()) > 0
    bulk = model.predict(controls, SINGLES[:3], pseudobulk=True)
    assert (bulk.layers["std"] > 0).all()


# ---------------------------------------------------------------------------------------------- around a model


def test_tau_0_is_the_backbone_to_the_bit(wrapped, screen):
    asked = [*SINGLES, *DOUBLES]
    additive = fit(find_model("Additive")(), module(screen))
    before = float(wrapped.tau)
    try:
        wrapped.tau.fill_(0.0)
        torch.testing.assert_close(ask(wrapped, asked), ask(additive, asked), rtol=0, atol=0)
    finally:
        wrapped.tau.fill_(before)


def test_tau_moves_a_prediction_to_the_fixed_point(wrapped):
    asked = [DOUBLES[0], GENES[0], GENES[5]]
    table = table_of(wrapped, asked)
    limit = wrapped.expected(wrapped.network_change(table)[0], table.context)
    before, distances = float(wrapped.tau), []
    try:
        for tau in (0.0, 0.3, 3.0, 30.0, 1e4):
            wrapped.tau.fill_(tau)
            distances.append(float((ask(wrapped, asked) - limit).square().mean().sqrt()))
    finally:
        wrapped.tau.fill_(before)
    assert distances[0] > 0.01
    assert distances[-1] < 0.1 * distances[0]
    assert distances[-1] <= min(distances) + 1e-6


def test_tau_is_what_is_best_on_the_validation_conditions(wrapped, screen):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    chosen, errors = float(wrapped.tau), {}
    try:
        for tau in TAUS:
            wrapped.tau.fill_(tau)
            errors[tau] = trainer.validate(wrapped, datamodule=module(screen), verbose=False)[0]["val/mse"]
    finally:
        wrapped.tau.fill_(chosen)
    assert chosen in [pytest.approx(tau) for tau in TAUS]
    best = errors[min(TAUS, key=lambda tau: abs(tau - chosen))]
    assert best <= min(errors.values()) * (1 + 1e-3)
    assert best <= errors[0.0]


def test_one_checkpoint_holds_both(screen, tmp_path):
    """The backbone by its class and then by its checkpoint: the same, and the same again after reading."""
    data = module(screen)
    fit(find_model("Additive")(), module(screen), tmp_path / "additive")
    path = str(tmp_path / "additive/checkpoints/best.ckpt")
    asked = [DOUBLES[0], GENES[0]]
    first = fit(GRNODE(backbone=ADDITIVE, backbone_epochs=1, tau=1.0, **QUICK), data, tmp_path / "first")
    second = fit(GRNODE(backbone=path, tau=1.0, **QUICK), module(screen), tmp_path / "second")
    torch.testing.assert_close(ask(first, asked), ask(second, asked), rtol=0, atol=1e-5)
    Path(path).unlink()
    for model, folder in ((first, "first"), (second, "second")):
        file = tmp_path / folder / "checkpoints/best.ckpt"
        torch.load(file, weights_only=True)
        torch.testing.assert_close(ask(perturbzoo.load(file), asked), ask(model, asked), rtol=0, atol=1e-6)


def test_checkpoint_of_a_network_alone(saved, alone, screen):
    again = perturbzoo.load(saved)
    torch.testing.assert_close(ask(again, SINGLES), ask(alone, SINGLES), rtol=0, atol=0)
    pd.testing.assert_frame_equal(again.network().edges, alone.network().edges)
    held = torch.load(saved, weights_only=True)
    assert held["perturbzoo"]["class"] == "GRNODE"


def test_a_backbone_of_other_data_is_refused(screen, tmp_path):
    other = module(screen, split={"method": "explicit", "test": [GENES[0]], "val": VAL})
    fit(find_model("Additive")(), other, tmp_path)
    with pytest.raises(PerturbZooError, match="was trained on other data, or another split"):
        fit(GRNODE(backbone=str(tmp_path / "checkpoints/best.ckpt"), **QUICK), module(screen))


@pytest.mark.slow
def test_joint_trains_the_backbone_and_otherwise_it_stays(screen, tmp_path):
    fit(find_model("GEARS")(hidden=4), module(screen), tmp_path, batches=2)
    path = str(tmp_path / "checkpoints/best.ckpt")
    before = perturbzoo.load(path).state_dict()
    moved = {}
    for joint in (False, True):
        model = fit(GRNODE(backbone=path, joint=joint, tau=0.0, **QUICK), module(screen), batches=2)
        after = model.backbone.state_dict()
        moved[joint] = max(
            float((after[name] - value).abs().max()) for name, value in before.items() if value.is_floating_point()
        )
    assert moved[False] == 0
    assert moved[True] > 0


def test_joint_needs_a_backbone_that_takes_steps(screen):
    with pytest.raises(PerturbZooError, match="trained by steps, and Additive is not"):
        fit(GRNODE(backbone=ADDITIVE, backbone_epochs=1, joint=True, **QUICK), module(screen))


def test_distilled_conditions_join_the_fit(screen, monkeypatch, tmp_path):
    """Five that nobody measured, singles first, as the backbone predicts them, with their weight."""
    from perturbzoo.models import grn_ode

    seen = []
    original = grn_ode.fit_network
    monkeypatch.setattr(grn_ode, "fit_network", lambda levels, *rest: seen.append(levels) or original(levels, *rest))
    model = fit(
        GRNODE(backbone=ADDITIVE, backbone_epochs=1, distil=0.3, distil_conditions=5, tau=0.0, **QUICK),
        module(screen),
        tmp_path,
    )
    (levels,) = seen
    measured = len(levels.conditions) - 5
    np.testing.assert_array_equal(levels.weight, [1.0] * measured + [0.3] * 5)
    extra = levels.conditions[measured:]
    assert not set(extra) & set(levels.conditions[:measured])
    assert {str(one) for one in extra[:2]} == {GENES[6], GENES[7]}
    assert all(len(one) == 2 for one in extra[2:])
    assert (GENES[6], "interference") in model.members()[0].acts
    again = perturbzoo.load(tmp_path / "checkpoints/best.ckpt")
    torch.testing.assert_close(again.network_change(table_of(again, DOUBLES)), model.network_change(table_of(model, DOUBLES)))
    # what the network is shown of them is what the backbone says
    predicted = np.log(levels.level[measured:] / levels.control[0])
    delta = model.expected(torch.as_tensor(predicted, dtype=torch.float32), torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(delta, ask(model, [str(one) for one in extra]), rtol=0, atol=2e-3)


# ---------------------------------------------------------------------------------------------- the five questions


def test_network_is_over_all_nodes(alone):
    network = alone.network()
    assert network.genes == tuple(GENES)
    assert ((network.probability >= 0) & (network.probability <= 1)).all()
    assert (network.edges["regulator"] != network.edges["target"]).all()


def test_trajectory_starts_at_control_and_ends_at_the_steady_state(alone, controls):
    path = alone.trajectory(controls, [GENES[0], DOUBLES[0]], [0, 0.5, 60])
    assert path.obs["time"].tolist() == [0, 0.5, 60] * 2
    change = path.layers["log_change"].reshape(2, 3, 10)
    np.testing.assert_allclose(change[:, 0], 0, atol=1e-5)
    end = alone.network_change(table_of(alone, [GENES[0], DOUBLES[0]]))[0].numpy()
    np.testing.assert_allclose(change[:, 2], end, atol=5e-3)
    # a fraction 1 - exp(-t) of the own change of a level that nothing else moves
    assert change[0, 1, 0] > change[0, 2, 0]
    np.testing.assert_allclose(
        path.layers["delta"][2], alone.expected(torch.from_numpy(change[0, 2:]), torch.zeros(1).long())[0]
    )
    np.testing.assert_allclose(path.X - path.layers["delta"], (path.X - path.layers["delta"])[:1].repeat(6, 0), atol=1e-5)


def test_trajectory_obeys_windows(alone, controls):
    """Nothing before the onset, down until the offset, and back."""
    path = alone.trajectory(controls, f"{GENES[0]}[2,5]", [0, 1, 4.5, 60])
    own = path.layers["log_change"][:, 0]
    assert abs(own[1]) < 1e-2
    assert own[2] < -0.3
    assert np.abs(path.layers["log_change"][3]).max() < 1e-2
    assert alone.trajectory(controls, GENES[0], [3.0]).n_obs == 1


@pytest.mark.parametrize("times", [[], [1, 0.5], [-1, 2], [1, 1]])
def test_times_must_increase(alone, controls, times):
    with pytest.raises(PerturbZooError, match="must increase, from 0 or later"):
        alone.trajectory(controls, GENES[0], times)


def test_counterfactual_of_what_was_done_is_what_was_seen(alone, screen):
    cells = screen[screen.obs["perturbation"].isin([GENES[0], "control"]).to_numpy()].copy()
    cells = cells[np.argsort(cells.obs["perturbation"].to_numpy() != GENES[0], kind="stable")[:60]].copy()
    answer = alone.counterfactual(cells, [GENES[0], "control"])
    assert answer.n_obs == 120
    obs = answer.obs.assign(same=answer.obs["observed"].astype(str) == answer.obs["condition"].astype(str))
    same = obs["same"].to_numpy()
    np.testing.assert_allclose(answer.X[same], answer.layers["factual"][same], atol=1e-5)
    # the knockdown taken away: more of the gene
    rescued = ((obs["observed"] == GENES[0]) & (obs["condition"] == "control")).to_numpy()
    assert (answer.X[rescued][:, 0] > answer.layers["factual"][rescued][:, 0]).all()
    assert obs["prior_only"].dtype == bool


def test_counterfactual_refuses_unknown_conditions(alone, screen):
    with pytest.raises(PerturbZooError, match="NOBODY: not a gene of the network") as caught:
        alone.counterfactual(screen[:5].copy(), ["NOBODY"])
    assert "\n" not in str(caught.value)


def test_explanation_sums_to_the_change(alone):
    found = alone.explain(DOUBLES[0], n_genes=10)
    change = alone.network_change(table_of(alone, [DOUBLES[0]]))[0][0].numpy()
    genes = found.genes.set_index("gene")
    np.testing.assert_allclose(genes.loc[GENES, "change"], change, atol=0.02)
    np.testing.assert_allclose(genes["direct"] + genes["indirect"] + genes["jump"], genes["change"], atol=1e-3)
    paths = found.paths.groupby("gene")["contribution"].sum()
    expected = (genes["change"] - genes["jump"])[paths.index]
    np.testing.assert_allclose(paths, expected, atol=1e-3)


def test_a_network_is_linked_to_its_own_predictions(alone):
    found = alone.link(alone)
    assert found.signal.present
    count = found.edges["status"].value_counts()
    assert count.get("shared", 0) >= count.get("hallucinated", 0)
    assert count.get("opposite", 0) <= 1
    assert found.off_targets.empty
    # what it predicts, it would make of it
    assert found.consistency["ratio"].median() < 0.1
    assert "network signal" in str(found)


def test_the_training_mean_has_no_network(alone, screen):
    mean = fit(find_model("TrainingMean")(), module(screen))
    found = alone.link(mean)
    assert not found.signal.present
    assert str(found).startswith("no network signal")


def test_predictions_are_linked_from_tables_and_from_predict(alone, controls):
    bulk = alone.predict(controls, SINGLES, pseudobulk=True)
    table = pd.DataFrame(bulk.layers["delta"], index=SINGLES, columns=bulk.var_names)
    found = [alone.link(one).signal for one in (bulk, table, table.iloc[:, ::-1])]
    assert found[0].leading == pytest.approx(found[1].leading, rel=1e-4)
    assert found[1] == found[2]
    for wrong, options, message in (
        (table.drop(columns=GENES[:2]), {}, "lack 2 of 10 genes: GENE0001, GENE0002"),
        (table, {"conditions": [DOUBLES[0]]}, f"lack 1 of the conditions: .*{GENES[0]}"),
        (table.rename(index={GENES[0]: "NOBODY"}), {}, "NOBODY: not a gene of the network"),
    ):
        with pytest.raises(PerturbZooError, match=message) as caught:
            alone.link(wrong, **options)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, "members=0: give 1 or more"),
        ({"tau": -1.0}, "tau=-1.0 must not be negative"),
        ({"distil": 1.0}, "joint and distil are about a backbone, and there is none"),
        ({"joint": True}, "joint and distil are about a backbone"),
        ({"distil": -1.0, "backbone": ADDITIVE}, "distil and distil_conditions start at 0"),
        ({"prior_use": "restrict"}, "prior_use='restrict' needs a prior"),
        ({"prior_use": "hard", "prior": "x.csv"}, "neither 'weight' nor 'restrict'"),
        ({"penalty": -1.0}, "penalty=-1 must not be negative"),
        ({"kinetics": "linear"}, "kinetics='linear' is not one of"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        GRNODE(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"class_path": "Additve"}, "no model 'Additve' in the zoo; did you mean 'Additive'"),
        ({"init_args": {}}, "a backbone is {class_path: GEARS, init_args"),
        ("gone.ckpt", "gone.ckpt: no such checkpoint"),
    ],
)
def test_backbones(screen, backbone, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        fit(GRNODE(backbone=backbone, **QUICK), module(screen))
    assert "\n" not in str(caught.value)


def test_priors_of_other_genes_and_with_contradictions(screen, tmp_path):
    for rows, message in (
        ([("P", "Q", 1.0)], "none of its 2 genes"),
        ([("GENE0001", "GENE0001", 1.0)], "self loop|no edge|none"),
    ):
        pd.DataFrame(rows, columns=["regulator", "target", "weight"]).to_csv(tmp_path / "prior.csv", index=False)
        with pytest.raises(PerturbZooError, match=message) as caught:
            fit(GRNODE(prior=str(tmp_path / "prior.csv"), prior_use="restrict", **QUICK), module(screen))
        assert "\n" not in str(caught.value)


def test_questions_before_the_fit_are_refused():
    for ask_it in (lambda model: model.network(), lambda model: model.explain(GENES[0])):
        with pytest.raises(PerturbZooError, match="has seen no data yet"):
            ask_it(GRNODE())


def test_predicted_levels_have_the_first_context_and_the_usual_errors(screen):
    from perturbzoo.models.network_data import joined, predicted_levels, training_levels

    data = module(screen)
    data.setup("fit")
    levels = training_levels(data)
    rows = list(levels.conditions[:2])
    extra = predicted_levels(levels, rows, np.full((2, 10), np.log(2.0)), weight=0.5)
    np.testing.assert_allclose(extra.level, 2 * levels.control.repeat(2, 0))
    np.testing.assert_allclose(extra.error, np.median(levels.error, axis=0)[None].repeat(2, 0))
    both = joined(levels, extra)
    assert len(both.conditions) == len(levels.conditions) + 2
    np.testing.assert_array_equal(both.weight[-2:], 0.5)
    assert joined(levels, None) is levels
    # means of counts, at the training depth
    counts = screen[(screen.obs["perturbation"] == GENES[0]).to_numpy()].X.toarray()
    expected = (counts / counts.sum(1, keepdims=True) * data.spec.depth).mean(0)
    row = [str(one) for one in levels.conditions].index(GENES[0])
    np.testing.assert_allclose(levels.level[row], expected, rtol=2e-3)
    assert levels.unit == pytest.approx(1.0, rel=0.2)
