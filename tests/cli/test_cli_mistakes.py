"""Mistakes on the command line: one line that says what would be right, and status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import write_configs

from perturbzoo.checkpoint import read_checkpoint
from perturbzoo.cli import main


def mistakes(screen: Path, trained: Path, folder: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments that are wrong, and what the one line must say."""
    ok = write_configs(folder, screen)
    best = str(trained / "checkpoints/best.ckpt")
    for name, content in {
        "unknown": "model: {class_path: Xyzzy}",
        "near": "model: {class_path: GEAR}",
        "foreign": "model: {class_path: os.system}",
        "syntax": "model: [",
    }.items():
        (folder / f"{name}.yaml").write_text(content)
    (folder / "half.ckpt").write_bytes(Path(best).read_bytes()[:2000])
    harmful = read_checkpoint(best)
    touch = {"class_path": "pathlib.Path.touch", "init_args": {}}
    harmful["perturbzoo"]["arguments"]["coexpression"] = {"top_k": touch}
    torch.save(harmful, folder / "harmful.ckpt")
    data, root = ok[:2], ["--trainer.default_root_dir", str(folder / "root")]
    return {
        "command": (["tset"], "no command 'tset'; did you mean 'test'?"),
        "strange command": (["xyzzy"], "no command 'xyzzy'; 'perturbzoo --help' lists them"),
        "unknown class": (
            ["fit", *data, "--config", str(folder / "unknown.yaml")],
            "no model 'Xyzzy' in the zoo; it has NoChange,",
        ),
        "similar class": (
            ["fit", *data, "--config", str(folder / "near.yaml")],
            "no model 'GEAR' in the zoo; did you mean 'GEARS'?",
        ),
        "class by option": (["fit", *data, "--model", "GEAR"], "no model 'GEAR' in the zoo; did you mean 'GEARS'?"),
        "foreign class": (
            ["fit", *data, "--config", str(folder / "foreign.yaml")],
            "os.system does not correspond to a subclass",
        ),
        "yaml syntax": (["fit", *data, "--config", str(folder / "syntax.yaml")], "syntax.yaml: not valid YAML"),
        "no such yaml": (["fit", "--config", str(folder / "gone.yaml")], "gone.yaml"),
        "no such option": (["fit", *ok, "--model.hiden", "3"], "hiden"),
        "no such trainer option": (["fit", *ok, "--trainer.epochs", "3"], "trainer.epochs"),
        "wrong type": (["fit", *ok, "--trainer.max_epochs", "many"], "trainer.max_epochs"),
        "no model": (["fit", *data], "model"),
        "refused by the model": (
            ["fit", *data, "--model", "Ridge", "--model.penalty=-1"],
            "penalty is -1.0: give a positive number",
        ),
        "refused by Lightning": (["fit", *ok, "--trainer.accelerator", "abacus"], "abacus"),
        "no such data": (["fit", *ok, *root, "--data.path", str(folder / "gone.h5ad")], "gone.h5ad: no such file"),
        "no such column": (["fit", *ok, *root, "--data.condition_key", "perturbations"], "did you mean 'perturbation'?"),
        "no such checkpoint": (["test", "--ckpt_path", str(folder / "gone.ckpt")], "gone.ckpt: no such checkpoint"),
        "no checkpoint given": (["validate"], "perturbzoo validate needs a trained model: --ckpt_path checkpoints/best.ckpt"),
        "half a checkpoint": (["test", "--ckpt_path", str(folder / "half.ckpt")], "half.ckpt: not a readable checkpoint"),
        "harmful checkpoint": (
            ["test", "--ckpt_path", str(folder / "harmful.ckpt")],
            "the class 'pathlib.Path.touch', which is not",
        ),
        "checkpoint in a file": (["fit", *ok, "--ckpt_path", str(folder / "gone.ckpt")], "gone.ckpt: no such checkpoint"),
        "other options": (["test", "--ckpt_path", best, *root, "--model.hidden", "5"], "weights of the checkpoint do not fit"),
        "other class": (["test", "--ckpt_path", best, *root, "--model", "KNN"], "the checkpoint holds a GEARS, not a KNN"),
        "start from another class": (
            ["fit", *data, "--model", "NoChange", *root, "--init_from", best],
            "holds a GEARS: a NoChange cannot",
        ),
        "start from nothing": (["fit", *ok, *root, "--init_from", str(folder / "gone.ckpt")], "gone.ckpt: no such checkpoint"),
        "fewer epochs than done": (["fit", "--ckpt_path", best, *root, "--trainer.max_epochs", "0"], "max_epochs=0"),
    }


@pytest.mark.slow
def test_a_mistake_is_one_line_and_status_2(
    screen: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = []
    for name, (arguments, expected) in mistakes(screen, trained, tmp_path).items():
        capsys.readouterr()
        try:
            main(arguments)
            status: Any = "no error"
        except SystemExit as stop:
            status = stop.code
        except Exception as error:
            status = repr(error)
        err = capsys.readouterr().err
        lines = err.strip().splitlines() or [""]
        said = [line for line in lines if line.startswith("error: ")]
        if status != 2 or said != lines[-1:] or expected not in lines[-1] or "Traceback" in err or "usage:" in err:
            failures.append(f"{name}: status {status}, expected '{expected}' in: {err[-1500:]}")
    assert not failures, "\n\n".join(failures)


@pytest.mark.slow
def test_the_process_itself_ends_with_status_2(screen: Path, tmp_path: Path) -> None:
    """A mistake found inside Lightning's fit, in a process as the user starts it."""
    command = [
        sys.executable,
        "-m",
        "perturbzoo",
        "fit",
        *write_configs(tmp_path, screen),
        "--data.path",
        str(tmp_path / "gone.h5ad"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == f"error: {tmp_path / 'gone.h5ad'}: no such file"
    assert "Traceback" not in done.stderr
