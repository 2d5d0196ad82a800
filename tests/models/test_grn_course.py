"""GRNODE on a screen with times: which cells it reads, whose time unit it counts in, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData
from lightning import Trainer

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.grn_ode import GRNODE
from perturbzoo.models.network_data import training_course, training_levels
from perturbzoo.simulate import simulate_screen

LIFETIME = 10.0  # hours
TIMES = (0.5, 1.0, 2.0, 4.0, 8.0)


@pytest.fixture(scope="module")
def screen() -> AnnData:
    adata = simulate_screen(n_genes=8, times=TIMES, cells_per_condition=400, n_control=1000, seed=3)
    adata.obs["hours"] = adata.obs["time"] * LIFETIME
    # the sum over eight genes falls with one of them: cells are sized by what was drawn
    adata.obs["depth"] = 32 * adata.obs["size"]
    adata.obs.loc[adata.obs["perturbation"].astype(str) == "control", "hours"] = np.nan
    return adata


def module_of(adata: AnnData) -> PerturbSeqDataModule:
    data = PerturbSeqDataModule.from_anndata(adata, kind="interference", size_factor_key="depth", cells_per_condition=8)
    data.setup("fit")
    return data


def mean_level(data: PerturbSeqDataModule, condition: str, hours: float) -> np.ndarray:
    obs = data.obs
    cells = ((obs["perturbation"].astype(str) == condition) & (obs["hours"] == hours)).to_numpy()
    return np.expm1(data.expression[np.flatnonzero(cells)].toarray().astype(float)).mean(0)


def test_steady_state_is_the_last_time_and_the_course_all_of_them(screen):
    data = module_of(screen)
    levels, course = training_levels(data, "hours"), training_course(data, "hours")
    assert course.times.tolist() == [LIFETIME * time for time in TIMES]
    assert course.conditions == levels.conditions
    for number, condition in enumerate(map(str, levels.conditions)):
        np.testing.assert_allclose(levels.level[number], mean_level(data, condition, 80.0), rtol=1e-4)
        for row, hours in zip(course.row[:, number], course.times, strict=True):
            np.testing.assert_allclose(course.levels.level[row], mean_level(data, condition, hours), rtol=1e-4)
    np.testing.assert_allclose(course.last().level, levels.level)
    assert training_levels(data).level[0] == pytest.approx(course.levels.level[course.row[:, 0]].mean(0), rel=1e-4)


def test_conditions_of_one_time_are_in_the_steady_fit_only(screen):
    first = str(training_levels(module_of(screen)).conditions[0])
    adata = screen.copy()
    adata.obs["hours"] = adata.obs["hours"].where(adata.obs["perturbation"].astype(str) != first, 80.0)
    data = module_of(adata)
    assert first in map(str, training_levels(data, "hours").conditions)
    assert first not in map(str, training_course(data, "hours").conditions)


def test_time_columns_that_are_none_are_refused(screen):
    with pytest.raises(PerturbZooError, match="time_course needs time_key"):
        GRNODE(time_course=True)
    data = module_of(screen)
    with pytest.raises(PerturbZooError, match=r"no column 'hour' .*did you mean 'hours'"):
        training_course(data, "hour")
    with pytest.raises(PerturbZooError, match="no time of at least 0: type1"):
        training_levels(data, "cell_type")
    once = screen.copy()
    once.obs["hours"] = 3.0
    with pytest.raises(PerturbZooError, match="no training condition has cells of two times"):
        training_course(module_of(once), "hours")


@pytest.mark.slow
def test_trajectory_counts_in_hours(screen, tmp_path):
    """A gene whose production falls to a fifth has fallen to 1 - 0.8 (1 - exp(-1)) of its level after a lifetime of ten hours."""
    model = GRNODE(time_key="hours", time_course=True, residual_steps=60, fixed_point_steps=40)
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, limit_train_batches=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(
        model, PerturbSeqDataModule.from_anndata(screen, kind="interference", size_factor_key="depth", cells_per_condition=8)
    )
    decay = model.members()[0].dynamics.decay.numpy()
    np.testing.assert_allclose(decay, 1 / LIFETIME, rtol=0.15)
    controls = screen[screen.obs["perturbation"].astype(str) == "control"].copy()
    target = str(model.get_spec().training_pairs[0][0])
    found = model.trajectory(controls, [target], [LIFETIME])
    own = found.layers["log_change"][0, list(model.get_spec().genes).index(target)]
    assert own == pytest.approx(np.log(1 - 0.8 * (1 - np.exp(-1))), abs=0.15)
