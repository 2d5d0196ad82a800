"""What is run again and what is not, and a benchmark from one end to the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbzoo.benchmark import running
from perturbzoo.benchmark.experiment import Experiment, read_experiment
from perturbzoo.benchmark.running import Outcome, error_of, locked, plan, run_cells, state_of, threads_for
from perturbzoo.cli import main
from perturbzoo.errors import PerturbZooError

Write = Callable[..., Path]


@pytest.fixture
def experiment(write_experiment: Write, tmp_path: Path) -> Experiment:
    return read_experiment(write_experiment(tmp_path, seeds=[0, 1]))


def pretend(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let a cell's process be a few lines of Python, which find the cell's folder in `folder`."""
    start = subprocess.Popen
    prelude = "import json, os, pathlib, signal, sys, time\nfolder = pathlib.Path(sys.argv[1])\n"
    finish = "\ndef finish():\n    (folder / 'done.json').write_text((folder / 'cell.json').read_text())\n"

    def popen(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return start([sys.executable, "-c", prelude + finish + script, command[-1]], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(running.subprocess, "Popen", popen)


def run(experiment: Experiment, output: Path, **options: int) -> list[Outcome]:
    return list(run_cells(plan(experiment.cells, output)[0], output, **options))


def test_a_finished_cell_is_not_run_again_and_a_killed_one_is(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    pretend(monkeypatch, "finish()")
    assert plan(experiment.cells, output)[1] == "4 runs: 0 finished before and reused, 4 to run (4 new)"
    assert [outcome.reason for outcome in run(experiment, output)] == [""] * 4
    assert plan(experiment.cells, output) == ([], "4 runs: 4 finished before and reused, 0 to run")
    # what a killed run leaves: all but the last file
    killed, others = experiment.cells[2], [experiment.cells[k] for k in (0, 1, 3)]
    (output / killed.folder / "done.json").unlink()
    (output / killed.folder / "checkpoints").mkdir()
    written = {cell.folder: (output / cell.folder / "done.json").stat().st_mtime_ns for cell in others}
    to_run, line = plan(experiment.cells, output)
    assert to_run == [killed]
    assert line == "4 runs: 3 finished before and reused, 1 to run (1 not finished before)"
    run(experiment, output)
    assert state_of(killed, output) == "finished"
    assert not (output / killed.folder / "checkpoints").exists(), "the run starts from nothing"
    assert written == {cell.folder: (output / cell.folder / "done.json").stat().st_mtime_ns for cell in others}


def test_a_changed_configuration_is_noticed(write_experiment: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    pretend(monkeypatch, "finish()")
    run(read_experiment(write_experiment(tmp_path)), output)
    models = {
        "GEARS": "model/gears.yaml",
        "CPA": {"config": "model/cpa.yaml", "overrides": {"model": {"init_args": {"lr": 0.5}}}},
    }
    to_run, line = plan(read_experiment(write_experiment(tmp_path, models=models)).cells, output)
    assert [cell.model for cell in to_run] == ["CPA"]
    assert line == "2 runs: 1 finished before and reused, 1 to run (1 with another configuration than before)"
    # another version of the package is another run
    monkeypatch.setattr("perturbzoo.__version__", "999")
    assert len(plan(read_experiment(write_experiment(tmp_path)).cells, output)[0]) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digest": "0"}'])
def test_a_damaged_record_is_no_result(experiment: Experiment, tmp_path: Path, content: str) -> None:
    cell = experiment.cells[0]
    (tmp_path / cell.folder).mkdir(parents=True)
    (tmp_path / cell.folder / "done.json").write_text(content)
    assert state_of(cell, tmp_path) != "finished"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("print('working'); print('error: no such gene\\n'); sys.exit(2)", "no such gene"),
        ("raise ValueError('nothing')", "ended with status 1"),
        ("sys.exit(3)", "ended with status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9 (killed, perhaps for want of memory)"),
        ("pass", "ended without a result"),
    ],
)
def test_one_failure_does_not_stop_the_others(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    pretend(monkeypatch, f"if 'CPA' in str(folder) and 'seed-1' in str(folder):\n    {script}\nelse:\n    finish()")
    outcomes = run(experiment, tmp_path / "out", workers=2)
    assert len(outcomes) == 4
    assert {outcome.cell.name: outcome.reason for outcome in outcomes if outcome.reason} == {"CPA, split one, seed 1": reason}


def test_no_more_processes_than_workers_and_no_more_threads_than_cores(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [threads_for(workers) for workers in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    marks = tmp_path / "marks"
    marks.mkdir()
    script = f"""
mark = pathlib.Path({str(marks)!r}) / str(os.getpid())
mark.touch()
time.sleep(0.3)
(folder / 'seen').write_text(f"{{len(list(mark.parent.iterdir()))}} {{os.environ['OMP_NUM_THREADS']}}")
mark.unlink()
finish()
"""
    pretend(monkeypatch, script)
    run(experiment, tmp_path / "out", workers=2)
    seen = [(tmp_path / "out" / cell.folder / "seen").read_text().split() for cell in experiment.cells]
    assert max(int(beside) for beside, _ in seen) <= 2
    assert {threads for _, threads in seen} == {"4"}


def test_processes_end_with_whoever_started_them(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "time.sleep(60 if 'seed-1' in str(folder) else 0); finish()")
    outcomes = run_cells(experiment.only(models=["CPA"]).cells, tmp_path, workers=2)
    assert next(outcomes).cell.seed == 0
    started = time.monotonic()
    outcomes.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 30
    assert state_of(experiment.only(models=["CPA"], seeds=[1]).cells[0], tmp_path) == "unfinished"


def test_a_stopped_benchmark_says_how_to_go_on(
    write_experiment: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM, as a cluster's scheduler sends it, while the second cell runs."""
    pretend(monkeypatch, "if 'CPA' in str(folder):\n    os.kill(os.getppid(), signal.SIGTERM)\n    time.sleep(60)\nfinish()")
    file, output = write_experiment(tmp_path), tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--config", str(file), "--output", str(output)])
    assert stop.value.code == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert [state_of(cell, output) for cell in read_experiment(file).cells] == ["finished", "unfinished"]


def test_one_benchmark_at_a_time_in_a_folder(
    write_experiment: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write_experiment(tmp_path), tmp_path / "out"
    with locked(output), pytest.raises(SystemExit):
        main(["benchmark", "--config", str(file), "--output", str(output)])
    assert f"another benchmark is running in {output} ({socket.gethostname()}, pid {os.getpid()})" in capsys.readouterr().err
    with locked(output):
        pass


def test_a_cell_does_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    child = "import os, time; from perturbzoo.benchmark.cell import end_with; end_with(os.getppid()); print('ready', flush=True); time.sleep(60)"
    script = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(next(line for line in parent.stdout if line.strip() != "ready"))
    assert parent.stdout.readline().strip() == "ready"
    parent.kill()
    # the pipe closes when the last that holds it has ended
    assert parent.stdout.read() == ""
    parent.wait()
    assert pid != parent.pid


def test_progress_is_no_reason(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("epoch 3/20\n")
    assert error_of(tmp_path) == ""
    (tmp_path / "log.txt").write_text("epoch 3/20\nerror: no gene\n\n")
    assert error_of(tmp_path) == "no gene"


# ---------------------------------------------------------------------- for real


@pytest.fixture(scope="module")
def finished(write_experiment: Write, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The file of an experiment whose third model cannot work, and the folder of its benchmark."""
    folder = tmp_path_factory.mktemp("benchmark")
    broken = {"config": "model/gears.yaml", "overrides": {"data": {"init_args": {"min_cells": 10**6}}}}
    models = {"GEARS": "model/gears.yaml", "broken": broken, "CPA": "model/cpa.yaml"}
    file, output = write_experiment(folder, models=models), folder / "out"
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--config", str(file), "--output", str(output), "--workers", "2"])
    assert stop.value.code == 1
    return file, output


def test_what_a_benchmark_leaves(finished: tuple[Path, Path]) -> None:
    _, output = finished
    about = json.loads((output / "benchmark.json").read_text())
    assert about["models"] == ["GEARS", "broken", "CPA"]
    assert about["finished"] == 2
    assert [(one["model"], one["split"], one["seed"]) for one in about["failed"]] == [("broken", "one", 0)]
    assert "no condition has 1000000 cells" in about["failed"][0]["reason"]
    board = pd.read_csv(output / "leaderboard.csv")
    assert {"GEARS", "CPA", "NoChange", "Additive", "split-half ceiling"} <= set(board["model"])
    assert "broken" not in set(board["model"])
    scores = pd.read_csv(output / "conditions.csv.gz")
    assert set(scores.loc[scores["model"] == "CPA", "condition"]) == {"G4", "G3+G4"}
    # the numbers are those of the run itself
    own = pd.read_csv(output / "runs/CPA/one/seed-0/test/summary.csv")
    own = own[(own["model"] == "CPA") & (own["category"] == "all")].set_index("metric")["mean"]
    row = board[(board["model"] == "CPA") & (board["category"] == "all")].set_index("metric")["mean"]
    for metric in ("pearson_delta", "mse", "direction_top20_de"):
        assert row[metric] == pytest.approx(own[metric])
    assert "epoch 1/1" in (output / "runs/CPA/one/seed-0/log.txt").read_text()
    assert not [path for path in output.rglob("*") if path.name.endswith(".part")]


def test_only_what_is_missing_is_run_again(finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    file, output = finished
    files = {path: path.stat().st_mtime_ns for name in ("GEARS", "CPA") for path in (output / "runs" / name).rglob("*")}
    with pytest.raises(SystemExit):
        main(["benchmark", "--config", str(file), "--output", str(output)])
    said = capsys.readouterr().out
    assert "3 runs: 2 finished before and reused, 1 to run (1 not finished before)" in said
    assert "failed: broken, split one, seed 0: " in said
    assert "pearson_delta: " in said
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_a_part_of_the_grid_keeps_the_rest_in_the_table(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = finished
    main(["benchmark", "--config", str(file), "--output", str(output), "--models", "CPA"])
    assert "1 run: 1 finished before and reused, 0 to run" in capsys.readouterr().out
    assert {"GEARS", "CPA"} <= set(pd.read_csv(output / "leaderboard.csv")["model"])
    (failed,) = json.loads((output / "benchmark.json").read_text())["failed"]
    assert failed["model"] == "broken", "what failed before is not forgotten"
    assert "no condition has 1000000 cells" in failed["reason"]


def test_the_leaderboard_goes_into_an_offline_run(
    finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = finished
    main(["benchmark", "--config", str(file), "--output", str(output), "--models", "CPA", "--wandb"])
    assert "Weights & Biases: " in capsys.readouterr().out
    (table,) = (output / "wandb").glob("offline-run-*/files/media/table/*.json")
    logged = json.loads(table.read_text())
    board = pd.read_csv(output / "leaderboard.csv")
    assert logged["columns"] == list(board.columns)
    assert [row[0] for row in logged["data"]] == board["model"].tolist()
    mean = logged["columns"].index("mean")
    written = [np.nan if row[mean] is None else row[mean] for row in logged["data"]]
    assert written == pytest.approx(board["mean"].tolist(), nan_ok=True)


@pytest.mark.slow
def test_a_local_ray_cluster_of_two(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    output = tmp_path / "out"
    cells = experiment.only(seeds=[0]).cells
    outcomes = list(run_cells(cells, output, workers=2, threads=1, ray="local"))
    assert sorted((outcome.cell.name, outcome.reason) for outcome in outcomes) == sorted((cell.name, "") for cell in cells)
    assert [state_of(cell, output) for cell in cells] == ["finished", "finished"]
    assert (output / cells[0].folder / "test/conditions.csv").is_file()


def test_ray_that_is_not_installed(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PerturbZooError, match=r"--ray needs Ray, which is not installed: pip install 'perturbzoo\[cluster\]'"):
        list(run_cells(experiment.cells, tmp_path, ray="local"))


def test_ray_is_imported_for_ray_alone() -> None:
    script = (
        "import sys\nfrom perturbzoo.cli import main\ntry:\n    main(['benchmark', '--help'])\nexcept SystemExit:\n    pass\n"
        "import perturbzoo.benchmark.running\nprint(sorted(set(sys.modules) & {'ray', 'torch', 'lightning', 'wandb'}))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config", "none.yaml"], "none.yaml: No such file or directory"),
        (["--table", "nowhere"], "--table needs --output"),
        (["--table", "nowhere", "--output", "page.md"], "nowhere: no folder of 'perturbzoo benchmark'"),
        (["--config", "x.yaml", "--workers", "0"], "--workers is 0: give 1 or more"),
    ],
)
def test_mistakes_of_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
