"""A screen and models trained on it once for all tests of prediction."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import anndata
import pandas as pd
import pytest
from lightning.pytorch import seed_everything
from prediction_setting import CONDITIONS, CONTEXTS, N_CONTROLS, Doubling, Trained, data_module, trainer

import perturbzoo
from perturbzoo.models.baselines import Additive
from perturbzoo.models.gears import GEARS


@pytest.fixture(scope="session")
def trained(make_adata: Callable[..., anndata.AnnData], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("prediction")
    adata = make_adata(conditions=CONDITIONS, contexts=CONTEXTS, cells_per_condition=12, n_controls=N_CONTROLS)
    screen, graph = folder / "screen.h5ad", folder / "edges.csv"
    adata.write_h5ad(screen)
    pd.DataFrame({"source": ["G0", "G1"], "target": ["NEW", "G2"], "weight": [1.0, 0.5]}).to_csv(graph, index=False)
    seed_everything(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gears = GEARS(hidden=4, uncertainty=True, lr=0.05, perturbation_graph=[{"kind": "edges", "path": str(graph)}])
        trainer(folder / "gears").fit(gears, data_module(screen))
        trainer(folder / "additive").fit(Additive(), data_module(screen))
    checkpoints = [folder / name / "checkpoints" / "last.ckpt" for name in ("gears", "additive")]
    return Trained(folder, adata, screen, *checkpoints)


@pytest.fixture
def doubling(trained: Trained) -> Doubling:
    model = Doubling()
    model.spec = perturbzoo.load(trained.gears).get_spec()
    model.configure_model()
    return model
