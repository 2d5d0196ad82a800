"""Every experiment of configs/experiment: it is read, and the data module understands the cells it names or their stand-in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from perturbzoo.benchmark.experiment import Experiment, read_experiment
from perturbzoo.benchmark.stand_ins import STAND_INS
from perturbzoo.cli import main
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.models import MODELS

FOLDER = Path(__file__).parents[2] / "configs/experiment"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
WITH_STAND_IN = [name for name in NAMES if "stand_in:" in (FOLDER / f"{name}.yaml").read_text()]
REAL = ("gears_norman", "doubles_ahlmann_eltze", "gears_dixit", "kang_transfer")

needs_data = pytest.mark.skipif("PERTURBZOO_DATA" not in os.environ, reason="PERTURBZOO_DATA names no folder of real cells")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERTURBZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def check_splits(experiment: Experiment) -> PerturbSeqDataModule:
    """Read the cells and make every split; return the last one's data."""
    data = None
    for split in experiment.splits:
        cell = next(cell for cell in experiment.cells if cell.split == split)
        data = PerturbSeqDataModule(**cell.config["data"]["init_args"])
        data.setup("fit")
        assert all(len(data.pairs_of(part)) for part in ("train", "test")), split
        assert data.has_validation(), f"{split}: no condition chooses the checkpoint"
    assert data is not None
    return data


def test_all_that_were_promised_are_there() -> None:
    wanted = {"gears_norman", "gears_adamson", "gears_dixit", "replogle_k562", "replogle_rpe1", "doubles_ahlmann_eltze"}
    assert wanted | {"vcc2025", "vcc2026", "open_problems", "kang_transfer"} <= set(WITH_STAND_IN)
    assert {"simulated", "papalexi", "datlinger", "datlinger_unmatched"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_read_with_the_public_file(name: str) -> None:
    """The published set-up, which is never run here."""
    experiment = read_experiment(FOLDER / f"{name}.yaml", "never")
    assert not experiment.is_stand_in
    assert experiment.title
    assert experiment.description
    assert {cell.config["model"]["class_path"] for cell in experiment.cells} <= set(MODELS)
    assert all("max_epochs" in cell.config["trainer"] for cell in experiment.cells)


@pytest.mark.parametrize("name", WITH_STAND_IN)
def test_the_simulated_stand_in_is_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERTURBZOO_DATA", raising=False)
    experiment = read_experiment(FOLDER / f"{name}.yaml")
    assert experiment.is_stand_in, "nothing has been downloaded here"
    assert experiment.stand_in_note.startswith("simulated: ")
    data = check_splits(experiment)
    # the labels of the public file were understood: control is control, and each condition has the targets that it names
    assert data.spec is not None
    assert not any(name.lower() in ("ctrl", "non-targeting", "dimethyl sulfoxide") for name in data.spec.targets)
    public = read_experiment(FOLDER / f"{name}.yaml", "never").cells[0].config["data"]["init_args"]
    used = experiment.cells[0].config["data"]["init_args"]
    changed = {key for key in {*public, *used} if public.get(key) != used.get(key)}
    assert changed <= {"path", "perturbation_graph", "split"}, "one data configuration reads both"


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_the_real_stand_in_is_understood(name: str) -> None:
    experiment = read_experiment(FOLDER / f"{name}.yaml")
    assert experiment.stand_in_note.startswith("real: ")
    check_splits(experiment)


@needs_data
@pytest.mark.parametrize("name", ["papalexi", "datlinger", "datlinger_unmatched"])
def test_real_experiments_test_each_condition_once(name: str) -> None:
    experiment = read_experiment(FOLDER / f"{name}.yaml")
    assert not experiment.is_stand_in
    tested: list[tuple[str, str]] = []
    cells = None
    for split in experiment.splits:
        config = next(cell for cell in experiment.cells if cell.split == split).config["data"]["init_args"]
        data = PerturbSeqDataModule(**config)
        data.setup("fit")
        tested += [(row["condition"], row["context"]) for row in data.describe_pairs(data.pairs_of("test"))]
        cells = data
    assert cells is not None
    every = [(row["condition"], row["context"]) for row in cells.describe_pairs(range(len(cells.parts)))]  # type: ignore[arg-type]
    assert sorted(tested) == sorted(every)


def test_a_stand_in_is_made_once() -> None:
    first = STAND_INS["adamson"]()
    written = first.path.stat().st_mtime_ns
    assert STAND_INS["adamson"]() == first
    assert first.path.stat().st_mtime_ns == written
    assert not first.real


def test_a_cell_line_is_known_by_its_controls_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task of the Virtual Cell Challenge 2026."""
    experiment = read_experiment(FOLDER / "vcc2026.yaml", "always")
    for split in experiment.splits:
        config = next(cell for cell in experiment.cells if cell.split == split).config["data"]["init_args"]
        data = PerturbSeqDataModule(**config)
        data.setup("fit")
        held_out = config["split"]["held_out"]
        assert {row["context"] for row in data.describe_pairs(data.pairs_of("test"))} == {held_out}
        assert held_out not in {row["context"] for part in ("train", "val") for row in data.describe_pairs(data.pairs_of(part))}  # type: ignore[arg-type]
        assert data.spec is not None
        assert len(data.index.controls_by_context[data.spec.contexts.index((held_out,))]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_STAND_IN)
def test_from_one_end_to_the_other(name: str, tmp_path: Path) -> None:
    """One model, one split, one epoch on the stand-in, real where it is here: trained, tested, compared, reported."""
    (tmp_path / "quick.yaml").write_text("trainer: {max_epochs: 1, accelerator: cpu}\n")
    experiment = read_experiment(FOLDER / f"{name}.yaml", "always")
    part = ["--models", experiment.models[0], "--splits", experiment.splits[0], "--seeds", str(experiment.seeds[0])]
    told = [
        "--stand_in",
        "always",
        "--override",
        str(tmp_path / "quick.yaml"),
        "--output",
        str(tmp_path / "out"),
        "--threads",
        "1",
    ]
    main(["benchmark", "--config", str(FOLDER / f"{name}.yaml"), *part, *told])
    about = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert about["stand_in"]
    assert (about["finished"], about["failed"]) == (1, [])
    board = pd.read_csv(tmp_path / "out/leaderboard.csv")
    assert set(board["kind"]) == {"model", "floor", "ceiling"}
    assert np.isfinite(board.loc[(board["category"] == "all") & (board["metric"] == experiment.metric), "mean"]).all()
    assert (tmp_path / "out/report.html").stat().st_size > 100_000
