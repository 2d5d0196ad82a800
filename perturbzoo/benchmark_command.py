"""``perturbzoo benchmark``: models x seeds x splits of an experiment, and the leaderboard; or a page of several leaderboards."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbzoo.errors import PerturbZooError

if TYPE_CHECKING:
    import pandas as pd

    from perturbzoo.benchmark.experiment import Cell, Experiment
    from perturbzoo.benchmark.running import Outcome


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perturbzoo benchmark",
        description="Train and test models x seeds x splits of an experiment, and compare them with every baseline and with what a "
        "repeat of the experiment would score. Finished runs are not run again. docs/benchmark.md says what is on disk and how to "
        "read the leaderboard.",
    )
    parser.add_argument("--config", help="experiment to run: configs/experiment/NAME.yaml")
    parser.add_argument("--output", help="folder to write (default: benchmarks/NAME); with --table, the Markdown file")
    parser.add_argument(
        "--stand_in",
        default="auto",
        choices=["auto", "always", "never"],
        help="read a small file of the same layout: where the public one has not been downloaded, always, or never, which downloads "
        "it (default: auto)",
    )
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    parser.add_argument(
        "--threads", type=int, help="threads of each run (default: the cores divided by --workers; 1 on a cluster)"
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="run through Ray: the address of a cluster, or 'local' for one made here"
    )
    parser.add_argument("--models", nargs="+", help="run these only")
    parser.add_argument("--seeds", nargs="+", type=int, help="run these only")
    parser.add_argument("--splits", nargs="+", help="run these only")
    parser.add_argument(
        "--override",
        nargs="+",
        default=[],
        metavar="FILE",
        help="configurations that count more than the experiment's, such as configs/trainer/gpu.yaml",
    )
    parser.add_argument(
        "--wandb",
        nargs="?",
        const="offline",
        choices=["offline", "online"],
        help="record the leaderboard with Weights & Biases, in the folder of the benchmark (offline, the default) or there and then",
    )
    parser.add_argument("--table", nargs="+", metavar="FOLDER", help="run nothing: write a Markdown page of these benchmarks")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run what is not finished, write the tables, print what they say; status 1 if a run failed."""
    options = _parser().parse_args(arguments)
    for name in ("workers", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise PerturbZooError(f"--{name} is {getattr(options, name)}: give 1 or more")
    if options.table:
        _write_table(options)
        return
    if not options.config:
        raise PerturbZooError("--config is missing: name an experiment, such as configs/experiment/simulated.yaml")

    from perturbzoo.benchmark.experiment import read_experiment

    experiment = read_experiment(options.config, options.stand_in, options.override)
    chosen = experiment.only(options.models, options.seeds, options.splits)
    output = Path(options.output or Path("benchmarks", experiment.name))
    if output.exists() and not output.is_dir():
        raise PerturbZooError(f"--output {output} is a file: name a folder")
    from perturbzoo.benchmark.running import locked

    with locked(output):
        try:
            failed = run(chosen, output, options.workers, options.threads, options.ray)
        except KeyboardInterrupt:
            print(f"\nstopped; the same command goes on with what is not finished in {output}", file=sys.stderr)
            sys.exit(130)
        board = summarise(experiment, output, failed, chosen.cells)
    if board is not None:
        from perturbzoo.benchmark.sentences import printed

        print(f"\n{printed(board, experiment.metric)}")
        if options.wandb:
            _log_to_wandb(experiment, output, board, options.wandb)
    for outcome in failed:
        print(f"failed: {outcome.cell.name}: {outcome.reason} ({output / outcome.cell.folder / 'log.txt'})")
    print(f"\nbenchmark: {output}" + (f"\nleaderboard: {output / 'leaderboard.csv'}" if board is not None else ""), flush=True)
    if failed:
        sys.exit(1)


def run(experiment: Experiment, output: Path, workers: int, threads: int | None, ray: str | None) -> list[Outcome]:
    """Run the cells that are not finished, say how each ended, and return those that failed."""
    from perturbzoo.benchmark.running import plan, run_cells, threads_for

    print(f"{experiment.title}\ndata: {experiment.data}" + (" (a stand-in)" if experiment.is_stand_in else ""))
    cells, line = plan(experiment.cells, output)
    print(line, flush=True)
    if cells:
        where = f"through Ray ({ray})" if ray else f"{workers} at a time"
        print(f"{where}, threads of each: {threads or (threads_for(workers) if ray in (None, 'local') else 1)}", flush=True)
    failed = []
    for number, outcome in enumerate(run_cells(cells, output, workers=workers, threads=threads, ray=ray), start=1):
        ended = f"failed: {outcome.reason}" if outcome.reason else f"{outcome.seconds:.0f} s"
        print(f"[{number}/{len(cells)}] {outcome.cell.name}: {ended}", flush=True)
        if outcome.reason:
            failed.append(outcome)
    return failed


def summarise(experiment: Experiment, output: Path, failed: Sequence[Outcome], asked: Sequence[Cell]) -> pd.DataFrame | None:
    """Write the tables of what is finished, asked for now or before, and return the leaderboard; None where nothing is."""
    from perturbzoo import __version__
    from perturbzoo.benchmark.leaderboard import collect, leaderboard
    from perturbzoo.benchmark.running import error_of, state_of

    states = {cell: state_of(cell, output) for cell in experiment.cells}
    finished = [cell for cell, state in states.items() if state == "finished"]
    reasons = {cell: error_of(output / cell.folder) for cell, state in states.items() if state == "unfinished"}
    reasons.update({outcome.cell: outcome.reason for outcome in failed})
    places = {(cell.model, cell.seed, cell.split) for cell in (*finished, *reasons, *asked)}
    models, seeds, splits = ({place[position] for place in places} for position in range(3))
    about: dict[str, Any] = {
        "name": experiment.name,
        "title": experiment.title,
        "description": experiment.description,
        "data": experiment.data,
        "stand_in": experiment.is_stand_in,
        "stand_in_note": experiment.stand_in_note,
        "models": [name for name in experiment.models if name in models],
        "seeds": [name for name in experiment.seeds if name in seeds],
        "splits": [name for name in experiment.splits if name in splits],
        "metric": experiment.metric,
        "version": __version__,
        "finished": len(finished),
        "failed": [
            {"model": cell.model, "split": cell.split, "seed": cell.seed, "reason": reason or "interrupted"}
            for cell, reason in reasons.items()
        ],
    }
    output.mkdir(parents=True, exist_ok=True)
    board = None
    if finished:
        scores, kinds, notes = collect(finished, output)
        for note in notes:
            print(f"note: {note}")
        board = leaderboard(scores, kinds)
        _write_csv(scores, output / "conditions.csv.gz")
        _write_csv(board, output / "leaderboard.csv")
    unfinished = output / ".benchmark.json.part"
    unfinished.write_text(json.dumps(about, indent=1) + "\n")
    unfinished.replace(output / "benchmark.json")
    if finished:
        from perturbzoo.report import write_report

        print(f"report: {write_report(output, output / 'report.html')}")
    return board


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    unfinished = path.with_name(f".part.{path.name}")
    table.to_csv(unfinished, index=False)
    unfinished.replace(path)


def _log_to_wandb(experiment: Experiment, output: Path, board: pd.DataFrame, mode: Any) -> None:
    """Put the leaderboard into a run of its own, as the logger of fit does: offline unless somebody is logged in and says so."""
    import wandb

    settings = wandb.Settings(silent=True)
    with wandb.init(
        project="perturbzoo", name=experiment.name, job_type="benchmark", dir=output, mode=mode, settings=settings
    ) as run:
        run.log({"leaderboard": wandb.Table(dataframe=board.astype(object).where(board.notna(), None))})
    wandb.teardown()  # or the next run of this process, if there is one, would take over these settings
    print(f"Weights & Biases: {run.dir}" if mode == "offline" else f"Weights & Biases: {run.url}")


def _write_table(options: argparse.Namespace) -> None:
    from perturbzoo.benchmark.sentences import page, write_page

    if not options.output:
        raise PerturbZooError("--table needs --output: the Markdown file to write, such as docs/leaderboard.md")
    write_page(Path(options.output), page([Path(folder) for folder in options.table]))
    print(f"table: {options.output}")
