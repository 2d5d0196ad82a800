"""Nothing that is fitted looks at validation or test cells: corrupt them, and every bit of it stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from scipy import sparse

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.models import find_model

# G4 is trained within G3+G4 only: singles and combinations are held out
TEST, VALIDATION = ["G0+G1", "G4"], ["G1+G2"]
SPLIT = {"method": "explicit", "test": TEST, "val": VALIDATION}

pytestmark = pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")


def corrupted(adata: Any, cells: np.ndarray) -> Any:
    """The screen with the counts of the marked cells scaled at random, a hundredfold at most, and other genes expressed."""
    generator = np.random.default_rng(0)
    counts = np.asarray(adata.X.todense())
    wrong = np.ceil(counts * generator.uniform(0.1, 100.0, counts.shape))
    wrong = wrong[:, generator.permutation(counts.shape[1])] + generator.poisson(5.0, counts.shape)
    other = adata.copy()
    other.X = sparse.csr_matrix(np.where(cells[:, None], wrong, counts).astype(np.float32))
    return other


@pytest.fixture(scope="module")
def screens(make_adata: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Four h5ad files: as measured; test, then validation and test, and for comparison some training cells corrupted."""
    folder = tmp_path_factory.mktemp("screens")
    adata = make_adata(contexts=("a", "b"), cells_per_condition=15, n_controls=30, n_genes=40)
    label = adata.obs["perturbation"].to_numpy()
    files = []
    for name, cells in [
        ("measured", np.zeros(len(label), dtype=bool)),
        ("test", np.isin(label, TEST)),
        ("held_out", np.isin(label, TEST + VALIDATION)),
        ("trained", np.isin(label, ["G0", "G1", "G3+G4"])),
    ]:
        files.append(str(folder / f"{name}.h5ad"))
        corrupted(adata, cells).write_h5ad(files[-1])
    return tuple(files)


def module(path: str, **arguments: Any) -> PerturbSeqDataModule:
    arguments = {"split": SPLIT, "covariates": ["context"], "n_top_genes": 20, "cells_per_condition": 8, "seed": 0, **arguments}
    return PerturbSeqDataModule(path, **arguments)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict from path to array, string or number."""
    if isinstance(value, dict):
        return {key: leaf for inner in value for key, leaf in flat(value[inner], f"{name}/{inner}").items()}
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value}


def fitted(path: str, name: str, folder: Path, **arguments: Any) -> dict[str, Any]:
    """Everything that a fit of one epoch leaves: spec, prepared tensors, weights."""
    seed_everything(0, verbose=False)
    model = find_model(name)(**arguments)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, **options)
    trainer.fit(model, module(path))
    # selection may prefer another epoch; after the only one, best and last are the same
    return flat({"spec": model.get_spec().to_json(), "prepared": model.prepared, "weights": dict(model.state_dict())})


def different(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    """The leaves that are not the same to the last bit."""
    assert set(first) == set(second)
    return {
        key
        for key, value in first.items()
        if not (np.array_equal(value, second[key]) if isinstance(value, np.ndarray) else value == second[key])
    }


def data_state(path: str) -> dict[str, Any]:
    """Whatever the data module computes from cells."""
    data = module(path)
    data.setup("fit")
    assert data.spec is not None
    bulks = data.training_pseudobulks()
    cells = data.training_cells()
    return {
        "genes": data.spec.genes,
        "depth": data.spec.depth,
        "control_mean": data.spec.control_mean,
        "exact control_mean": data.control_mean,
        "training pairs": data.spec.training_pairs,
        "pseudobulks": bulks.mean,
        "counts of cells": bulks.count,
        "conditions": tuple(map(str, bulks.conditions)),
        "training cells": cells.toarray(),
    }


def test_what_the_data_module_computes(screens: tuple[str, ...]) -> None:
    measured, test, held_out, trained = (data_state(path) for path in screens)
    assert different(measured, test) == set()
    assert different(measured, held_out) == set()
    # the comparison could have failed: of training cells everything depends that may
    assert different(measured, trained) >= {"genes", "depth", "control_mean", "pseudobulks", "training cells"}


def test_validation_and_test_batches_do_change(screens: tuple[str, ...]) -> None:
    """The corruption reaches the cells it is meant for, and no training batch."""
    batches = []
    for path in (screens[0], screens[2]):
        data = module(path)
        data.setup("fit")
        loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
        batches.append({part: [batch.clone() for batch in loader] for part, loader in loaders.items()})
    for part, same in (("train", True), ("val", False), ("test", False)):
        for before, after in zip(batches[0][part], batches[1][part], strict=True):
            assert torch.equal(before.observed, after.observed) is same
            assert torch.equal(before.control, after.control)


@pytest.mark.parametrize(
    ("name", "arguments", "depends"),
    [
        ("Additive", {}, {"/weights/known.value"}),
        ("Bilinear", {"dimension": 4}, {"/prepared/vectors", "/prepared/basis", "/weights/known.value"}),
        (
            "GEARS",
            {"hidden": 8, "uncertainty": True, "coexpression": {"top_k": 5, "threshold": 0.05}},
            {"/prepared/coexpression/edge_weight", "/weights/known.value", "/weights/own_weight", "/weights/head_weight"},
        ),
        (
            "GEARS",
            {"hidden": 8, "paper": True, "coexpression": {"top_k": 5, "threshold": 0.05}},
            {"/prepared/coexpression/edge_weight", "/weights/own_weight", "/weights/targets.learned.weight"},
        ),
    ],
)
def test_what_models_fit(
    name: str, arguments: dict[str, Any], depends: set[str], screens: tuple[str, ...], tmp_path: Path
) -> None:
    """Spec, graphs, embeddings and weights are bit-identical; corrupted training cells change those that are fitted.

    Validation conditions may choose between epochs and calibrate predicted variances, and nothing else; test conditions
    may do nothing.
    """
    measured, test, held_out, trained = (
        fitted(path, name, tmp_path / str(number), **arguments) for number, path in enumerate(screens)
    )
    assert different(measured, test) == set()
    assert different(measured, held_out) <= {"/weights/variance_scale"}
    shared = set(measured) & set(trained)
    assert depends <= shared
    assert depends <= {key for key in shared if different({key: measured[key]}, {key: trained[key]})}


def test_an_unseen_context_keeps_its_controls_to_itself(make_adata: Callable[..., Any]) -> None:
    """Perturbed cells of a context held out are never looked at; its controls are training cells."""
    adata = make_adata(contexts=("a", "b"), cells_per_condition=15, n_controls=30, n_genes=40)
    perturbed = (adata.obs["context"] == "b").to_numpy() & (adata.obs["perturbation"] != "control").to_numpy()
    split = {"method": "unseen_context", "held_out": "b"}
    states = []
    for screen in (adata, corrupted(adata, perturbed)):
        data = PerturbSeqDataModule.from_anndata(screen, split=split, covariates=["context"], n_top_genes=20)
        data.setup("fit")
        assert data.spec is not None
        assert {context for _, context in data.spec.training_pairs} == {0}
        states.append({"spec": data.spec.to_json(), "cells": data.training_cells().toarray()})
    assert different(states[0], states[1]) == set()
