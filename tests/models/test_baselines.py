"""Every baseline against its closed form, written out in NumPy or taken from scikit-learn, and its way through Lightning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neighbors import KNeighborsRegressor

import perturbzoo
from perturbzoo.data.batch import encode_conditions
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.models import BASELINES, find_model
from perturbzoo.models.baselines import KNN, Additive, Baseline, Bilinear, MatchingMean, NoChange, Ridge, TrainingMean
from perturbzoo.perturbation import parse_condition

GENES = [f"G{number}" for number in range(20)]
SINGLES = [f"G{number}" for number in range(14)]
EMBEDDING_BASELINES = (Bilinear, Ridge, KNN)


def ask(model: Baseline, conditions: Sequence[str], contexts: Sequence[int] | None = None) -> np.ndarray:
    """The model's deltas for conditions, ``(C, G)``."""
    spec = model.get_spec()
    context = [0] * len(conditions) if contexts is None else list(contexts)
    table = encode_conditions([parse_condition(text) for text in conditions], context, model.target_names, spec.default_kind)
    with torch.inference_mode():
        delta, variance = model.delta(table, torch.zeros(len(conditions), spec.n_genes))
    assert variance is None
    return delta.numpy()


def fitted(model: Baseline, screen: Any) -> Baseline:
    model.fit_closed_form(*screen)
    return model


def close(actual: np.ndarray, desired: np.ndarray) -> None:
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- without embeddings


TRAINED = ["A", "B", "C", "A+C"]
ASKED = ["B", "D", "B+C", "A+D", "A+B+C", "D+E", "A+B+E"]


def test_no_change_is_zero(make_screen: Any) -> None:
    close(ask(fitted(NoChange(), make_screen(TRAINED, other_targets="DE")), ASKED), np.zeros((7, 6)))


def test_training_mean_counts_each_pair_once(make_screen: Any) -> None:
    screen = make_screen(TRAINED, other_targets="DE")
    screen[1].count[:] = [10, 500, 30, 40]
    mean = (screen[1].mean - screen[1].control_mean[0]).mean(axis=0)
    close(ask(fitted(TrainingMean(), screen), ASKED), np.tile(mean, (7, 1)))


def test_matching_mean_averages_the_targets(make_screen: Any) -> None:
    """Systema: the mean of the targets' singles, the mean of all training perturbations standing in for an unseen target."""
    screen = make_screen(TRAINED, other_targets="DE")
    a, b, c, ac = screen[1].mean - screen[1].control_mean[0]
    mean = (a + b + c + ac) / 4
    expected = [b, mean, (b + c) / 2, (a + mean) / 2, (a + b + c) / 3, mean, (a + b + mean) / 3]
    close(ask(fitted(MatchingMean(), screen), ASKED), np.array(expected))


@pytest.mark.parametrize("mean_for_missing", [True, False])
def test_additive_sums_the_targets(make_screen: Any, mean_for_missing: bool) -> None:
    """Ahlmann-Eltze et al.: control + sum of the singles' changes; doubles of the training set are not used."""
    screen = make_screen(TRAINED, other_targets="DE")
    a, b, c, _ = screen[1].mean - screen[1].control_mean[0]
    missing = (a + b + c) / 3 if mean_for_missing else np.zeros(6)
    expected = [b, missing, b + c, a + missing, a + b + c, 2 * missing, a + b + missing]
    close(ask(fitted(Additive(mean_for_missing), screen), ASKED), np.array(expected))


def test_without_singles_the_sum_shares_a_combination_among_its_targets(make_screen: Any) -> None:
    """Doubles only: the sum over two unknown targets is then the mean double, not twice that."""
    screen = make_screen(["A+B", "C+D"])
    mean = (screen[1].mean - screen[1].control_mean[0]).mean(axis=0)
    close(ask(fitted(Additive(), screen), ["A+C", "A", "A+B+C"]), np.array([mean, mean / 2, 1.5 * mean]))
    close(ask(fitted(MatchingMean(), screen), ["A+C", "A"]), np.array([mean, mean]))


@pytest.mark.parametrize("name", BASELINES)
def test_order_of_a_combination_is_irrelevant(make_screen: Any, name: str) -> None:
    screen = make_screen(SINGLES, genes=GENES)
    model = fitted(find_model(name)(), screen)
    table = encode_conditions(
        [parse_condition("G3+G7+G12")] * 6, [0] * 6, model.target_names, screen[0].default_kind
    )  # canonical: the order is undone here by hand
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    for item in ("targets", "kind", "dose"):
        setattr(table, item, torch.gather(getattr(table, item), 1, orders))
    delta, _ = model.delta(table, torch.zeros(6, len(GENES)))
    close(delta.numpy(), np.tile(delta[0].numpy(), (6, 1)))
    assert table.targets.unique(dim=0).shape[0] == 6


def test_a_pair_of_the_same_context_is_preferred(make_screen: Any) -> None:
    screen = make_screen([("A", 0), ("A", 1), ("B", 0), ("C", 1)], n_contexts=3)
    a0, a1, b0, c1 = screen[1].mean - screen[1].control_mean[screen[1].contexts]
    asked = ["A", "A", "A", "B", "A+C", "A"]
    contexts = [0, 1, 2, 1, 0, -1]
    close(ask(fitted(Additive(), screen), asked, contexts), np.array([a0, a1, (a0 + a1) / 2, b0, a0 + c1, (a0 + a1) / 2]))
    everything = (a0 + a1 + b0 + c1) / 4
    expected = [(a0 + b0) / 2, (a1 + c1) / 2, everything, (a1 + c1) / 2, (a0 + b0) / 2, everything]
    close(ask(fitted(TrainingMean(), screen), asked, contexts), np.array(expected))


def test_unknown_targets_are_refused_by_name(make_screen: Any) -> None:
    model = fitted(Additive(), make_screen(TRAINED))
    with pytest.raises(PerturbZooError, match=r"'F'.*never named"):
        ask(model, ["A+F"])


# ---------------------------------------------------------------------- with embeddings


def prcomp(values: np.ndarray, dimension: int) -> np.ndarray:
    """R's ``prcomp(values)$x[, 1:dimension]``: rows are observations, columns are centred; by the covariance's eigenvectors."""
    centred = values - values.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(centred, rowvar=False))
    return centred @ vectors[:, ::-1][:, :dimension]


def bilinear(gene: np.ndarray, training: np.ndarray, delta: np.ndarray, condition: np.ndarray, penalty: float) -> np.ndarray:
    """Ahlmann-Eltze et al.: W = (G'G + lI)^-1 G' (Y - b) P' (PP' + lI)^-1, prediction G W p + b.

    gene (G, K), training (K, P), delta (G, P), condition (K, C); returns (G, C).
    """
    b = delta.mean(axis=1, keepdims=True)
    left = np.linalg.inv(gene.T @ gene + penalty * np.eye(gene.shape[1]))
    right = np.linalg.inv(training @ training.T + penalty * np.eye(len(training)))
    weights = left @ gene.T @ (delta - b) @ training.T @ right
    return gene @ weights @ condition + b


@pytest.fixture
def wide(make_screen: Any) -> Any:
    """14 singles and a double among 20 genes, all measured but for X."""
    return make_screen([*SINGLES, "G0+G5"], genes=GENES, other_targets=["G15", "X"])


WIDE_ASKED = ["G15", "G3", "G1+G2", "G2+G15+G7", "G19"]  # unseen, seen, combinations, never named
WIDE_TARGETS = [[15], [3], [1, 2], [2, 15, 7], [19]]


def summed(vectors: np.ndarray, targets: list[list[int]]) -> np.ndarray:
    """The conditions' embeddings, (C, K)."""
    return np.array([vectors[rows].sum(axis=0) for rows in targets])


@pytest.mark.parametrize(("dimension", "penalty"), [(10, 0.1), (3, 2.0)])
def test_bilinear_is_the_papers_formula(wide: Any, dimension: int, penalty: float) -> None:
    _, bulks = wide
    gene = prcomp(np.vstack([bulks.control_mean, bulks.mean]).T, dimension)
    training = summed(gene, [[number] for number in range(14)] + [[0, 5]]).T
    expected = bilinear(gene, training, bulks.delta.T, summed(gene, WIDE_TARGETS).T, penalty).T
    model = Bilinear(dimension=dimension, penalty=penalty)
    close(ask(fitted(model, wide), WIDE_ASKED), expected)


def test_bilinear_defaults_are_the_papers() -> None:
    assert dict(Bilinear().hparams) == {"embedding": "pca", "dimension": 10, "penalty": 0.1}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".npz"])
def test_bilinear_takes_targets_from_a_table(wide: Any, tmp_path: Path, suffix: str) -> None:
    """The gene side stays the pseudobulks' PCA; a target with no vector leaves its pairs out of the fit."""
    _, bulks = wide
    vectors = np.random.default_rng(1).normal(size=(20, 4))
    names = [*GENES[1:], "X"]  # G0 has none
    file = tmp_path / f"table{suffix}"
    if suffix == ".npz":
        np.savez(file, names=np.array(names), vectors=vectors)
    else:
        pd.DataFrame(vectors, index=names).to_csv(file, sep="," if suffix == ".csv" else "\t")
    known = np.vstack([np.full(4, np.nan), vectors])  # row of G0, then G1 ... G19, X
    gene = prcomp(np.vstack([bulks.control_mean, bulks.mean]).T, 10)
    training = known[1:14].T
    delta = bulks.delta[1:14].T
    condition = summed(known, [*WIDE_TARGETS, [20]]).T
    expected = bilinear(gene, training, delta, condition, 0.1).T
    model = fitted(Bilinear(embedding=str(file)), wide)
    close(ask(model, [*WIDE_ASKED, "X"]), expected)
    mean = bulks.delta.mean(axis=0)
    close(ask(model, ["G0", "G0+G3"]), np.array([mean, mean]))


@pytest.mark.parametrize("penalty", [0.01, 1.0, 50.0])
def test_ridge_is_scikit_learns(wide: Any, penalty: float) -> None:
    _, bulks = wide
    vectors = prcomp(np.vstack([bulks.control_mean, bulks.mean]).T, 6)
    reference = SklearnRidge(alpha=penalty).fit(summed(vectors, [[n] for n in range(14)] + [[0, 5]]), bulks.delta)
    expected = reference.predict(summed(vectors, WIDE_TARGETS))
    close(ask(fitted(Ridge(dimension=6, penalty=penalty), wide), WIDE_ASKED), expected)


@pytest.mark.parametrize("k", [1, 4, 100])
def test_knn_is_scikit_learns(wide: Any, k: int) -> None:
    _, bulks = wide
    vectors = prcomp(np.vstack([bulks.control_mean, bulks.mean]).T, 6)
    reference = KNeighborsRegressor(n_neighbors=min(k, 15)).fit(
        summed(vectors, [[n] for n in range(14)] + [[0, 5]]), bulks.delta
    )
    expected = reference.predict(summed(vectors, WIDE_TARGETS))
    close(ask(fitted(KNN(dimension=6, k=k), wide), WIDE_ASKED), expected)


@pytest.mark.parametrize("kind", EMBEDDING_BASELINES)
def test_embedding_baselines_learn_within_the_context(make_screen: Any, kind: type[Baseline]) -> None:
    """Each context is the same baseline fitted on its own pairs; a context without any learns from all."""
    screen = make_screen(
        [*[(name, 0) for name in SINGLES[:9]], *[(name, 1) for name in SINGLES[4:]]], genes=GENES, n_contexts=3
    )
    bulks = screen[1]
    model = fitted(kind(), screen)
    vectors = prcomp(np.vstack([bulks.control_mean, bulks.mean]).T, 10)
    number = np.array([int(str(condition)[1:]) for condition in bulks.conditions])
    for context, pairs in [
        (0, bulks.contexts == 0),
        (1, bulks.contexts == 1),
        (2, bulks.contexts < 2),
        (-1, bulks.contexts < 2),
    ]:
        asked = summed(vectors, [[15], [2, 6]])
        training, delta = vectors[number[pairs]], bulks.delta[pairs]
        if kind is Bilinear:
            expected = bilinear(vectors, training.T, delta.T, asked.T, 0.1).T
        elif kind is Ridge:
            expected = SklearnRidge(alpha=1.0).fit(training, delta).predict(asked)
        else:
            if context not in (0, 1):
                continue  # the same target in two contexts is equally near: which comes fifth is arbitrary
            expected = KNeighborsRegressor(n_neighbors=5).fit(training, delta).predict(asked)
        close(ask(model, ["G15", "G2+G6"], [context] * 2), expected)


@pytest.mark.parametrize("kind", EMBEDDING_BASELINES)
def test_a_target_without_vector_gets_the_training_mean(wide: Any, kind: type[Baseline]) -> None:
    mean = wide[1].delta.mean(axis=0)
    close(ask(fitted(kind(), wide), ["X", "G1+X"]), np.array([mean, mean]))


@pytest.mark.parametrize("kind", EMBEDDING_BASELINES)
def test_no_trained_target_has_a_vector(make_screen: Any, kind: type[Baseline]) -> None:
    """As in the Norman subset, where hardly any target is measured: everything gets the training mean."""
    screen = make_screen(["X", "Y", "Z"], other_targets=["A"])
    mean = screen[1].delta.mean(axis=0)
    close(ask(fitted(kind(), screen), ["A", "X+Y", "B"]), np.tile(mean, (3, 1)))


@pytest.mark.parametrize("kind", EMBEDDING_BASELINES)
def test_targets_of_the_table_that_no_data_named(wide: Any, tmp_path: Path, kind: type[Baseline]) -> None:
    """A name beyond the data with the vector of G3 is predicted as G3 is; names without a vector are refused."""
    vectors = np.random.default_rng(2).normal(size=(20, 4))
    table = pd.DataFrame(vectors, index=GENES)
    table.loc["TWIN"] = table.loc["G3"]
    table.to_csv(tmp_path / "table.csv")
    model = fitted(kind(embedding=str(tmp_path / "table.csv")), wide)
    twin, g3 = ask(model, ["TWIN", "G3"])
    close(twin, g3)
    assert np.abs(twin - ask(model, ["G4"])[0]).max() > 0.01
    with pytest.raises(PerturbZooError, match="'NOBODY'"):
        ask(model, ["NOBODY"])


@pytest.mark.parametrize("arguments", [{"penalty": 0.0}, {"penalty": -1.0}])
@pytest.mark.parametrize("kind", [Bilinear, Ridge])
def test_penalty_must_be_positive(kind: Any, arguments: dict[str, float]) -> None:
    with pytest.raises(PerturbZooError, match="penalty"):
        kind(**arguments)


def test_numbers_of_neighbours_and_components_must_be_positive(wide: Any) -> None:
    with pytest.raises(PerturbZooError, match="k is 0"):
        KNN(k=0)
    with pytest.raises(PerturbZooError, match="dimension is 0"):
        fitted(Ridge(dimension=0), wide)


# ---------------------------------------------------------------------- through Lightning


SPLIT = {"method": "explicit", "test": ["G0+G1", "G4"], "val": ["G1+G2"]}


def run(model: Any, data: PerturbSeqDataModule, folder: Path, **options: Any) -> Trainer:
    """Fit for an epoch, quietly."""
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, data)
    return trainer


def normalised(adata: Any, depth: float) -> np.ndarray:
    """log1p of counts per `depth`, from the raw counts."""
    counts = np.asarray(adata.X.todense(), dtype=np.float64)
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * depth)


@pytest.mark.parametrize("name", BASELINES)
def test_fit_test_save_load(name: str, make_adata: Callable[..., Any], tmp_path: Path, capsys: Any) -> None:
    adata = make_adata(contexts=("a", "b"), cells_per_condition=12, n_controls=20)
    arguments = {"covariates": ["context"], "split": SPLIT}
    model = find_model(name)()
    trainer = run(model, PerturbSeqDataModule.from_anndata(adata, **arguments), tmp_path)
    trainer.test(model, PerturbSeqDataModule.from_anndata(adata, **arguments), verbose=False)
    assert name in set(model.test_table["model"])
    asked = ["G0", "G4", "G0+G1", "G0+G1+G3"]
    before = model.predict(adata, asked, n_cells=5)
    for file in ("best", "last"):
        loaded = perturbzoo.load(tmp_path / "checkpoints" / f"{file}.ckpt")
        after = loaded.predict(adata, asked, n_cells=5)
        close(after.X, before.X)
        assert type(loaded) is type(model)
        assert before.obs.equals(after.obs)
    # the checkpoint alone, in a trainer of its own, gives the same table
    again = Trainer(accelerator="cpu", default_root_dir=tmp_path / "again", logger=False, enable_progress_bar=False)
    again.test(loaded, PerturbSeqDataModule.from_anndata(adata, **arguments), verbose=False)
    pd.testing.assert_frame_equal(loaded.test_table, model.test_table)


def test_additive_from_raw_counts(make_adata: Callable[..., Any], tmp_path: Path) -> None:
    """The whole path against NumPy on the counts: depth, control means and sums of singles, in two contexts."""
    adata = make_adata(contexts=("a", "b"), cells_per_condition=12, n_controls=20)
    model = Additive()
    run(model, PerturbSeqDataModule.from_anndata(adata, covariates=["context"], split=SPLIT), tmp_path)
    label, context = adata.obs["perturbation"].to_numpy(), adata.obs["context"].to_numpy()
    total = np.asarray(adata.X.sum(axis=1)).ravel()
    values = normalised(adata, float(np.median(total[~np.isin(label, ["G0+G1", "G4", "G1+G2"])])))
    predicted = model.predict(adata, ["G0+G1", "G4"], pseudobulk=True)
    for level in ("a", "b"):
        mean = {name: values[(label == name) & (context == level)].mean(axis=0) for name in ("control", "G0", "G1", "G2", "G3")}
        change = {name: value - mean["control"] for name, value in mean.items()}
        average = (change["G0"] + change["G1"] + change["G2"] + change["G3"]) / 4
        for condition, expected in (("G0+G1", change["G0"] + change["G1"]), ("G4", average)):
            rows = (predicted.obs["condition"] == condition) & (predicted.obs["context"] == level)
            close(predicted.layers["delta"][rows.to_numpy()][0], expected)
            close(predicted.X[rows.to_numpy()][0], mean["control"] + expected)


@pytest.mark.parametrize("name", ["NoChange", "Ridge"])
def test_checkpoints_of_several_epochs_without_validation(name: str, make_adata: Callable[..., Any], tmp_path: Path) -> None:
    split = {"method": "explicit", "test": ["G0+G1"]}
    model = find_model(name)()
    data = PerturbSeqDataModule.from_anndata(make_adata(), split=split)
    trainer = Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    trainer.fit(model, data)
    assert {file.name for file in (tmp_path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_targets_that_only_the_tested_screen_names(make_adata: Callable[..., Any], tmp_path: Path) -> None:
    """G7 and G9 were never named in training but are measured: test predicts them by their own vectors, as predict does."""
    model = Ridge()
    run(model, PerturbSeqDataModule.from_anndata(make_adata(), split=SPLIT), tmp_path)
    conditions = ("G0", "G1", "G2", "G3", "G4", "G0+G1", "G1+G2", "G3+G4", "G7", "G9")
    wider = make_adata(conditions=conditions, seed=3)
    loaded = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    data = PerturbSeqDataModule.from_anndata(wider)
    tester = Trainer(accelerator="cpu", default_root_dir=tmp_path / "wider", logger=False, enable_progress_bar=False)
    tester.test(loaded, data, verbose=False)
    names = [str(condition) for condition in data.conditions]
    rows = torch.tensor([names.index("G7"), names.index("G9"), names.index("G4")])
    delta, _ = loaded.delta(data.table.select(rows), torch.zeros(3, 30))
    predicted = loaded.predict(wider, ["G7", "G9", "G4"], pseudobulk=True).layers["delta"]
    close(delta.numpy(), predicted)
    assert np.abs(predicted[0] - predicted[1]).max() > 1e-3
    additive = Additive()
    run(additive, PerturbSeqDataModule.from_anndata(make_adata(), split=SPLIT), tmp_path / "additive")
    with pytest.raises(PerturbZooError, match=r"'G7'.*never named"):
        tester.test(additive, PerturbSeqDataModule.from_anndata(wider), verbose=False)
