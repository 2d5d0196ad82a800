"""Sweeps of configs/sweep: what Weights & Biases asks of them, and what the command that they start asks of their parameters."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from perturbzoo.cli import main

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs/sweep").glob("*.yaml"))
BOUNDED = ("uniform", "log_uniform_values", "int_uniform", "q_uniform", "q_log_uniform_values", "inv_log_uniform_values")


def read(file: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(file.read_text()))


def extremes(parameter: dict[str, Any]) -> list[Any]:
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_weights_and_biases_would_take_it(file: Path) -> None:
    """Sweep configuration keys of https://docs.wandb.ai/guides/sweeps/sweep-config-keys."""
    sweep = read(file)
    assert {"program", "method", "metric", "parameters", "command"} <= set(sweep)
    assert set(sweep) <= {
        "program",
        "project",
        "method",
        "metric",
        "parameters",
        "command",
        "early_terminate",
        "name",
        "description",
    }
    assert sweep["method"] in ("bayes", "random", "grid")
    assert sweep["metric"] == {"name": "val/pearson_delta", "goal": "maximize"}, "chosen on validation conditions"
    assert sweep["early_terminate"]["type"] == "hyperband"
    for name, parameter in sweep["parameters"].items():
        if "values" in parameter:
            assert len(parameter["values"]) > 1, name
            assert set(parameter) == {"values"}
        else:
            assert parameter["distribution"] in BOUNDED
            assert parameter["min"] < parameter["max"]
            assert parameter["min"] > 0 or "log" not in parameter["distribution"]
    assert sweep["project"] == "perturbzoo"
    assert sweep["command"][:2] == ["sh", "-c"]
    assert sweep["command"][3:6] == ["sh", "perturbzoo", "fit"]
    assert sweep["command"][-1] == "${args}", "the agent writes --name=value for each parameter there"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_command_takes_every_parameter(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    sweep = read(file)
    names = list(sweep["parameters"])
    for end in (0, -1):  # the first values together, then the last
        values = [extremes(sweep["parameters"][name])[end] for name in names]
        arguments = [f"--{name}={value}" for name, value in zip(names, values, strict=True)]
        with pytest.raises(SystemExit) as stop:
            main([*sweep["command"][5:-1], *arguments, "--print_config"])
        assert stop.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        for name, value in zip(names, values, strict=True):
            found = config
            for part in name.split("."):
                found = found[part]
            assert found == value, name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_run_has_a_folder_of_its_own(file: Path) -> None:
    start = read(file)["command"][:4]
    command = [*start, "echo", "--a=1 2"]
    said = [
        subprocess.run(command, env={**os.environ, "WANDB_RUN_ID": name}, capture_output=True, text=True, check=True).stdout
        for name in ("one", "two")
    ]
    assert said == [f"--a=1 2 --trainer.default_root_dir=sweeps/{name}\n" for name in ("one", "two")]


def test_there_are_sweeps() -> None:
    assert {"gears", "cpa"} <= {file.stem for file in FILES}
