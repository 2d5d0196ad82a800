"""Prediction that cannot be: files whole or not at all, and every mistake said in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prediction_setting import Doubling, Trained, command

import perturbzoo
from perturbzoo import prediction
from perturbzoo.cli import main
from perturbzoo.data.batch import PerturbationBatch
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.base import Prediction

# ---------------------------------------------------------------------------------------------- the file, whole or not at all

DISK_FULL = """
import resource, signal, sys
import perturbzoo.prediction, perturbzoo.models.gears  # importing them needs a temporary folder
from perturbzoo.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 20_000, 60_000):  # at once, in the table of cells, in the matrices
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        main(sys.argv[1:])
    except SystemExit as error:
        print(error.code)
"""


@pytest.mark.slow
def test_full_disk_leaves_nothing(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "predicted.h5ad"
    output.write_text("what was there before")
    # in a process of its own: HDF5 crashes at the end of the process if a write of its failed
    arguments = [sys.executable, "-c", DISK_FULL, *command(trained, output, conditions="G0,G1,G2,G3,X,G0+G1")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2", "2"]
    assert done.stderr.splitlines() == [f"error: {output}: could not be written: File too large"] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["predicted.h5ad"]
    assert output.read_text() == "what was there before"


@pytest.fixture
def no_permission(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):  # as root everything can be written, but not in the kernel's own file system
        yield Path("/proc/self")
    else:
        yield folder
    folder.chmod(0o755)


def test_folder_that_cannot_be_written(trained: Trained, no_permission: Path) -> None:
    with pytest.raises(PerturbZooError, match="could not be written"):
        prediction.write_predictions(perturbzoo.load(trained.gears), trained.screen, "G0", no_permission / "p.h5ad")


def test_interrupted_prediction_leaves_nothing(trained: Trained, doubling: Doubling, tmp_path: Path) -> None:
    output = tmp_path / "predicted.h5ad"
    output.write_text("what was there before")

    def interrupt(batch: PerturbationBatch) -> Prediction:
        raise KeyboardInterrupt

    doubling.forward = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        prediction.write_predictions(doubling, trained.screen, "G0", output)
    assert [path.name for path in tmp_path.iterdir()] == ["predicted.h5ad"]
    assert output.read_text() == "what was there before"


# ---------------------------------------------------------------------------------------------- bad input


def bad_files(trained: Trained, folder: Path) -> dict[str, Any]:
    """Files with something wrong, by name."""
    whole = trained.gears.read_bytes()
    (folder / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, folder / "other.ckpt")
    newer = torch.load(trained.gears, weights_only=True)
    newer["perturbzoo"] |= {"schema": 99, "version": "9.9"}
    torch.save(newer, folder / "newer.ckpt")
    (folder / "broken.h5ad").write_bytes(trained.screen.read_bytes()[:5000])
    perturbed = trained.adata[(trained.adata.obs["perturbation"] != "control").to_numpy()]
    perturbed.write_h5ad(folder / "perturbed.h5ad")
    (folder / "no_column.csv").write_text("name\nG0\n")
    (folder / "empty.csv").write_text("")
    (folder / "no_rows.csv").write_text("condition\n")
    (folder / "covariate.csv").write_text("condition,tissue\nG0,lung\n")
    (folder / "level.csv").write_text("condition,context\nG0,c\n")
    (folder / "dose.csv").write_text("condition,dose\nG0,much\n")
    (folder / "negative.csv").write_text("condition,dose\nG0,-1\n")
    (folder / "folder.h5ad").mkdir()
    return {name.name: name for name in folder.iterdir()}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"ckpt_path": "nowhere.ckpt"}, [], "nowhere.ckpt: no such checkpoint"),
        ({"ckpt_path": "truncated.ckpt"}, [], "truncated.ckpt: not a readable checkpoint (truncated or damaged?)"),
        ({"ckpt_path": "text.ckpt"}, [], "text.ckpt: not a readable checkpoint"),
        ({"ckpt_path": "other.ckpt"}, [], "other.ckpt: not a perturbzoo checkpoint"),
        ({"ckpt_path": "newer.ckpt"}, [], "perturbzoo 9.9 (schema 99), this version reads up to schema 1: upgrade"),
        ({}, ["--device", "abacus"], "device 'abacus' cannot be used here; give cpu"),
        ({"controls": "nowhere.h5ad"}, [], "nowhere.h5ad: no such file"),
        ({"controls": "broken.h5ad"}, [], "broken.h5ad: not a readable h5ad file (truncated or damaged?)"),
        ({"controls": "perturbed.h5ad"}, [], "perturbed.h5ad: no control cells: no cell is labelled as control in obs column"),
        ({"conditions": ""}, [], "a target is missing"),
        ({"conditions": "no_rows.csv"}, [], "conditions: none given"),
        ({"conditions": "empty.csv"}, [], "empty.csv is no table with a column 'condition'"),
        ({"conditions": "nowhere.csv"}, [], "nowhere.csv: no such file"),
        ({"conditions": "no_column.csv"}, [], "the table has no column 'condition'; it has name"),
        ({"conditions": "covariate.csv"}, [], "column 'tissue' is neither 'condition' nor 'dose' nor a covariate"),
        ({"conditions": "level.csv"}, [], "no control cells with context 'c'; there are some of a, b"),
        ({"conditions": "dose.csv"}, [], "dose 'much' is not a number"),
        ({"conditions": "negative.csv"}, [], "dose"),
        ({"conditions": "G0@-1"}, [], "dose"),
        ({"conditions": "G0+"}, [], "a target is missing"),
        ({}, ["--n_cells", "-3"], "n_cells is -3: give 1 or more"),
        ({}, ["--n_cells", "0"], "n_cells is 0: give 1 or more"),
        ({}, ["--n_cells", "3", "--pseudobulk"], "n_cells and pseudobulk exclude each other"),
        ({}, ["--seed", "-1"], "seed is -1: give 0 or more"),
        ({"output": "nowhere/predicted.h5ad"}, [], "nowhere does not exist"),
        ({"output": "predicted.csv"}, [], "give an output name that ends in .h5ad"),
        ({"output": "folder.h5ad"}, [], "a folder has that name"),
    ],
)
def test_mistakes_are_said_in_one_line(
    trained: Trained,
    tmp_path: Path,
    given: dict[str, str],
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = set(bad_files(trained, tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_status:
        main(command(trained, "predicted.h5ad", *options, **given))
    assert exit_status.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == before
