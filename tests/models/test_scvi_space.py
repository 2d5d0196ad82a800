"""The latent space of an scVI model: what its positions hold, and that it is the same wherever it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from transport_models import first_batch, fit, module, scrambled

import perturbzoo
from perturbzoo.errors import PerturbZooError
from perturbzoo.models import CellOT, FlowMatching
from perturbzoo.models.scvi_space import ScVISpace, fit_scvi

pytestmark = pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")

QUICK = {"steps": 200, "n_hidden": 16, "batch_size": 64, "lr": 5e-3}
SMALL: dict[Any, dict[str, Any]] = {CellOT: {"hidden": [8, 8], "width": 4}, FlowMatching: {"hidden": 8, "width": 4}}
MODELS = sorted(SMALL, key=lambda model: model.__name__)
SPLIT = {"method": "explicit", "test": ["G0+G1", "G4"], "val": ["G1+G2"]}
SPACE = {"space": "scvi", "components": 3, "scvi": QUICK}


@pytest.fixture(scope="module")
def adata(make_adata: Callable[..., Any]) -> Any:
    return make_adata(cells_per_condition=12, n_controls=40, n_genes=12, contexts=("a", "b"))


def read(adata: Any) -> Any:
    return module(adata, SPLIT, covariates=["context"], cells_per_condition=4)


@pytest.fixture(scope="module")
def two_types() -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Normalised cells of two types, their sizes, and the type: 20 genes, Poisson counts of about 200."""
    random = np.random.default_rng(0)
    kind = np.arange(600) % 2
    rate = random.dirichlet(np.full(20, 2.0), 2)[kind] * random.lognormal(np.log(200), 0.3, (600, 1))
    counts = random.poisson(rate)
    size = counts.sum(axis=1)
    return sparse.csr_matrix(np.log1p(counts * (200 / size[:, None])).astype(np.float32)), size, kind


def test_new_cells_come_back_better_than_as_a_constant(two_types: Any) -> None:
    """Cells not trained on: decoded at their positions, the mean of each type is there, which one profile for all is not."""
    cells, size, kind = two_types
    space = ScVISpace(fit_scvi(cells[:400], size[:400], 200.0, 3, {**QUICK, "steps": 600}))
    new, new_size = torch.from_numpy(cells[400:].toarray()), torch.from_numpy(size[400:]).float()
    decoded = space.decode(space.encode(new), new, new_size).numpy()
    constant = cells[:400].toarray().mean(axis=0)
    for one in (0, 1):
        observed = new.numpy()[kind[400:] == one].mean(axis=0)
        error = np.square(decoded[kind[400:] == one].mean(axis=0) - observed).mean()
        assert error < 0.05 * np.square(constant - observed).mean()
    assert np.square(decoded - new.numpy()).mean() < 0.5 * np.square(constant - new.numpy()).mean()


def test_positions_are_standardised(two_types: Any) -> None:
    """Mean 0 and mean variance 1 over the training cells, as on principal axes."""
    cells, size, _ = two_types
    space = ScVISpace(fit_scvi(cells, size, 200.0, 3, QUICK))
    position = space.encode(torch.from_numpy(cells.toarray())).numpy()
    np.testing.assert_allclose(position.mean(axis=0), 0, atol=1e-4)
    assert position.var(axis=0, ddof=1).mean() == pytest.approx(1, rel=1e-3)
    np.testing.assert_allclose(space.spread, position.std(axis=0, ddof=1).clip(0.1), rtol=1e-3)


def test_same_seed_same_numbers(two_types: Any) -> None:
    """Whatever was drawn before, and nothing that is drawn afterwards changes; another seed gives another space."""
    cells, size, _ = two_types
    short = {**QUICK, "steps": 5}
    torch.manual_seed(1)
    first, drawn = fit_scvi(cells, size, 200.0, 3, short), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    second = fit_scvi(cells, size, 200.0, 3, short)
    for name, value in first["networks"].items():
        assert torch.equal(value, second["networks"][name]), name
    other = fit_scvi(cells, size, 200.0, 3, {**short, "seed": 1})
    assert not torch.equal(first["networks"]["log_dispersion"], other["networks"]["log_dispersion"])


def test_a_decoded_cell_has_the_shares_that_the_network_says(two_types: Any) -> None:
    """Many counts, little dispersion: E[log1p(c n)] is log1p of the mean, so that the decoded cell is log1p(total x share)."""
    cells, size, _ = two_types
    fitted = fit_scvi(cells, size, 200.0, 3, {**QUICK, "steps": 5})
    fitted["networks"]["log_dispersion"].fill_(20.0)
    space = ScVISpace(fitted)
    control = torch.from_numpy(cells[:4].toarray())
    # a cell of a million counts, scaled to 200
    decoded = space.decode(space.encode(control), control, torch.full((4,), 1e6))
    total = decoded.expm1().sum(dim=1)
    torch.testing.assert_close(total, control.expm1().sum(dim=1), rtol=5e-3, atol=0.1)
    share = space.networks.share(space.encode(control) * space.scale + space.mean)
    torch.testing.assert_close(share.sum(dim=1), torch.ones(4))
    torch.testing.assert_close(decoded.expm1() / total[:, None], share, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_the_untrained_model_is_the_baseline(adata: Any, kind: Any) -> None:
    """The space changes nothing by itself: each control plus the start, exactly."""
    data = read(adata)
    model = fit(kind(**SMALL[kind], **SPACE, start="mean_shift"), data, 0)
    model.known.fit(data.training_pseudobulks())
    batch = first_batch(data)
    expected = batch.control + model.start_change(batch.table)[batch.row]
    torch.testing.assert_close(model.evaluate(batch).mean, expected, rtol=1e-4, atol=1e-4)
    source, target = model.source_and_target(batch)
    shifted = batch.observed - model.start_change(batch.table)[batch.row]
    torch.testing.assert_close(source, model.latent.encode(batch.control))
    torch.testing.assert_close(target, model.latent.encode(shifted))


def test_without_the_residual_the_decoded_cell_is_predicted(adata: Any) -> None:
    data = read(adata)
    model = scrambled(fit(FlowMatching(**SMALL[FlowMatching], **SPACE, start="identity", keep_residual=False), data, 0), 0.2)
    batch = first_batch(data)
    position = model.latent.encode(batch.control)
    expected = model.latent.decode(model.transport(batch, position), batch.control, batch.control_size_factor)
    torch.testing.assert_close(model.evaluate(batch).mean, expected)
    assert (expected - batch.control).abs().max() > 0.1


@pytest.mark.parametrize("kind", MODELS)
def test_checkpoint_alone_predicts_the_same_cells(adata: Any, kind: Any, tmp_path: Path) -> None:
    model = fit(kind(**SMALL[kind], **SPACE), read(adata), 2, tmp_path)
    # the space is prepared, not learned: it is in the checkpoint once
    assert not [name for name in model.state_dict() if name.startswith("latent.")]
    assert not [name for name, _ in model.named_parameters() if name.startswith("latent.")]
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert "networks" in torch.load(path, weights_only=True)["perturbzoo"]["prepared"]["latent"]
    loaded = perturbzoo.load(path)
    before, after = (one.predict(adata, ["G4", "G0+G1"], n_cells=5) for one in (model, loaded))
    np.testing.assert_array_equal(after.X, before.X)
    assert np.isfinite(before.X).all()
    data = read(adata)
    data.setup()
    batch = first_batch(data)
    position = loaded.latent.encode(batch.control)
    loaded.train()  # no dropout, no running statistics
    assert torch.equal(loaded.latent.encode(batch.control), position)


def test_scvi_needs_counts(adata: Any) -> None:
    logged = adata.copy()
    logged.X = logged.X.log1p()
    with pytest.raises(PerturbZooError, match=r"space 'scvi' needs raw counts.*set space to 'pca'"):
        fit(CellOT(**SMALL[CellOT], **SPACE), read(logged), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": "pca", "scvi": {}}, "scvi: options are given, but space is 'pca'"),
        ({"space": "scvi", "scvi": {"step": 3}}, "unknown option 'step'.*steps"),
        ({"space": "scvi", "scvi": {"steps": 0}}, "steps is 0: give a whole number of 1 or more"),
        ({"space": "scvi", "scvi": {"dropout": 1.0}}, "dropout is 1.0: give a share"),
        ({"space": "scvi", "scvi": {"lr": 0}}, "lr is 0: give a number above 0"),
    ],
)
def test_bad_options(arguments: dict, message: str) -> None:
    with pytest.raises(PerturbZooError, match=message):
        FlowMatching(**arguments)
