"""Experiment files: the grid they make, what counts where two say the same, and what is wrong with them in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from perturbzoo.benchmark.experiment import is_here, merged, read_experiment
from perturbzoo.errors import PerturbZooError

Write = Callable[..., Path]


def test_the_grid_is_models_x_splits_x_seeds(write_experiment: Write, tmp_path: Path) -> None:
    splits = {"a": {"method": "random", "seed": 1}, "b": {"method": "kfold", "folds": 2, "fold": 1}}
    experiment = read_experiment(write_experiment(tmp_path, seeds=[3, 5, 7], splits=splits))
    places = [(cell.model, cell.split, cell.seed) for cell in experiment.cells]
    assert sorted(places) == sorted((m, s, n) for m in ("GEARS", "CPA") for s in splits for n in (3, 5, 7))
    assert len({cell.folder for cell in experiment.cells}) == 12
    for cell in experiment.cells:
        assert cell.config["seed_everything"] == cell.seed
        # the whole split: nothing is left of the one that the data's configuration names
        assert cell.config["data"]["init_args"]["split"] == splits[cell.split]
        assert cell.config["model"]["class_path"] == cell.model
    assert len({cell.digest() for cell in experiment.cells}) == 12


def test_the_later_counts(write_experiment: Write, tmp_path: Path) -> None:
    models = {
        "GEARS": "model/gears.yaml",
        "wide": {"config": "model/gears.yaml", "overrides": {"model": {"init_args": {"hidden": 9}}}},
    }
    overrides = {"trainer": {"max_epochs": 3, "gradient_clip_val": 0.5}, "model": {"init_args": {"hidden": 2, "lr": 0.5}}}
    file = write_experiment(tmp_path, models=models, overrides=overrides)
    (tmp_path / "last.yaml").write_text("trainer: {max_epochs: 8}\n")
    gears, wide = read_experiment(file, overrides=[tmp_path / "last.yaml"]).cells
    assert gears.config["trainer"] == {"max_epochs": 8, "gradient_clip_val": 0.5}
    # the model's file says 4, after the experiment's overrides; what it does not say stays
    assert gears.config["model"]["init_args"] == {"hidden": 4, "lr": 0.5}
    assert wide.config["model"]["init_args"] == {"hidden": 9, "lr": 0.5}


def test_merging_changes_none_of_its_arguments() -> None:
    first: dict[str, Any] = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}
    second: dict[str, Any] = {"a": {"c": [3]}, "d": 5, "f": {"g": 1}}
    both = merged(first, second)
    assert both == {"a": {"b": 1, "c": [3]}, "d": 5, "f": {"g": 1}}
    both["a"]["b"] = 7
    both["f"]["g"] = 7
    assert first == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}
    assert second == {"a": {"c": [3]}, "d": 5, "f": {"g": 1}}


def test_a_part_of_the_grid(write_experiment: Write, tmp_path: Path) -> None:
    experiment = read_experiment(write_experiment(tmp_path, seeds=[0, 1]))
    part = experiment.only(models=["CPA"], seeds=[1])
    assert [(cell.model, cell.split, cell.seed) for cell in part.cells] == [("CPA", "one", 1)]
    assert experiment.only().cells == experiment.cells
    with pytest.raises(PerturbZooError, match=r"--models: .* has no 'GEARZ'; did you mean 'GEARS'"):
        experiment.only(models=["GEARZ"])


def test_the_digest_follows_what_is_run_and_not_where(write_experiment: Write, tmp_path: Path) -> None:
    first = read_experiment(write_experiment(tmp_path / "a")).cells[0]
    moved = read_experiment(write_experiment(tmp_path / "b")).cells[0]
    other = read_experiment(write_experiment(tmp_path / "c", overrides={"trainer": {"max_epochs": 2}})).cells[0]
    assert first.digest() == moved.digest() != other.digest()


def test_a_stand_in_does_not_carry_its_folder_into_the_digest(
    write_experiment: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_experiment(tmp_path, stand_in={"file": "adamson", "seeds": [4], "overrides": {"trainer": {"max_epochs": 6}}})
    digests = []
    for name in ("one", "two"):
        monkeypatch.setenv("PERTURBZOO_CACHE", str(tmp_path / name))
        experiment = read_experiment(file, "always")
        assert experiment.is_stand_in
        assert experiment.stand_in_note.startswith("simulated: ")
        assert experiment.seeds == (4,)
        cell = experiment.cells[0]
        assert cell.config["data"]["init_args"]["path"].startswith(str(tmp_path / name))
        assert cell.config["trainer"] == {"max_epochs": 6, "accelerator": "cpu"}, "added to the experiment's overrides"
        digests.append(cell.digest())
    assert digests[0] == digests[1]
    # the file is here: no stand-in by itself
    plain = read_experiment(file)
    assert not plain.is_stand_in
    assert plain.seeds == (0,)
    assert plain.cells[0].digest() not in digests


def test_a_public_file_is_here_once_it_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERTURBZOO_CACHE", str(tmp_path))
    monkeypatch.delenv("PERTURBZOO_DATA", raising=False)
    assert not is_here("public:norman")
    (tmp_path / "norman.h5ad").touch()
    assert is_here("public:norman")
    assert is_here("embedded:screen.h5ad")
    assert not is_here("$PERTURBZOO_DATA/norman.h5ad")
    assert is_here(str(tmp_path / "norman.h5ad"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'; did you mean 'seeds'"),
        ({"data": None}, "the key 'data' is missing"),
        ({"data": "data/scren.yaml"}, "there is no data/scren.yaml in .*; did you mean 'data/screen.yaml'"),
        ({"models": {}}, "models must name configurations by label"),
        ({"models": ["GEARS"]}, "models must name configurations by label"),
        ({"models": {"GEARS": "model/gers.yaml"}}, "no model/gers.yaml in .*; did you mean 'model/gears.yaml'"),
        ({"models": {"GEARS": {"confg": "x"}}}, "models, GEARS: unknown key 'confg'; did you mean 'config'"),
        ({"models": {"GEARS": "data/screen.yaml"}}, "GEARS: data/screen.yaml has no section 'model'"),
        ({"models": {"a/b": "model/gears.yaml"}}, "models, a/b: a label is a folder's name too"),
        ({"models": {"Additive": "model/gears.yaml"}}, "models, Additive: every run scores this baseline"),
        ({"models": {"KNN (mine)": "model/gears.yaml"}}, "every run scores this baseline"),
        ({"models": {"split-half ceiling": "model/gears.yaml"}}, "every run scores this ceiling"),
        ({"seeds": 3}, r"seeds must be a list of whole numbers, such as \[0, 1, 2\], not 3"),
        ({"seeds": [1.5]}, "seeds must be a list of whole numbers"),
        ({"seeds": [True]}, "seeds must be a list of whole numbers"),
        ({"splits": []}, "splits must be named"),
        ({"splits": {"a": {"seed": 1}}}, "splits, a: give the arguments of a split"),
        ({"splits": {"a": {"method": "kfolds"}}}, "splits, a: no split method 'kfolds'; did you mean 'kfold'"),
        ({"metric": "pearson_dleta"}, "no metric 'pearson_dleta'; did you mean 'pearson_delta'"),
        ({"overrides": [1]}, "overrides must be sections"),
        ({"stand_in": {"files": "norman"}}, "stand_in: unknown key 'files'; did you mean 'file'"),
        ({"stand_in": "norman"}, "stand_in must hold 'file'"),
    ],
)
def test_a_mistake_is_said_in_one_line(write_experiment: Write, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PerturbZooError, match=message) as said:
        read_experiment(write_experiment(tmp_path, **changes))
    assert "\n" not in str(said.value)
    assert "small.yaml" in str(said.value)


def test_stand_ins_that_are_not_there(write_experiment: Write, tmp_path: Path) -> None:
    with pytest.raises(PerturbZooError, match="no stand-in is named there"):
        read_experiment(write_experiment(tmp_path), "always")
    with pytest.raises(PerturbZooError, match="no stand-in 'norma'; did you mean 'norman'"):
        read_experiment(write_experiment(tmp_path, stand_in={"file": "norma"}), "always")


def test_files_that_are_none(write_experiment: Write, tmp_path: Path) -> None:
    file = write_experiment(tmp_path)
    with pytest.raises(PerturbZooError, match=r"smal\.yaml: No such file or directory; did you mean 'small\.yaml'"):
        read_experiment(file.with_name("smal.yaml"))
    file.write_text("models: [")
    with pytest.raises(PerturbZooError, match="not valid YAML"):
        read_experiment(file)
    file.write_text(yaml.safe_dump([1]))
    with pytest.raises(PerturbZooError, match="must hold sections"):
        read_experiment(file)
