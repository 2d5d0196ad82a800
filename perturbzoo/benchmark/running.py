"""Which cells of a grid are still to run, and running them: in processes of this machine, or on a cluster through Ray.

A cell that fails costs itself alone. Knows no scores.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perturbzoo.benchmark.cell import CELL, CONFIG, DONE, LOG, PARENT
from perturbzoo.benchmark.experiment import Cell
from perturbzoo.errors import PerturbZooError

LOCK = ".lock"
LOCAL = "local"
"""The address of ``--ray`` that starts a cluster on this machine."""

# what the libraries under a run read their number of threads from
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")
_FOLDERS = ("PERTURBZOO_DATA", "PERTURBZOO_CACHE")


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes
    ----------
    cell
        The cell.
    reason
        Empty where it is finished; else why it is not, in one line.
    seconds
        How long it took, waiting for a worker left out.
    """

    cell: Cell
    reason: str
    seconds: float


def state_of(cell: Cell, output: Path) -> str:
    """``finished``, ``changed`` (finished with another configuration), ``unfinished`` (killed or failed) or ``new``."""
    folder = output / cell.folder
    try:
        done = json.loads((folder / DONE).read_text())
    except FileNotFoundError:
        return "unfinished" if folder.exists() else "new"
    except (OSError, ValueError):
        return "unfinished"
    return "finished" if isinstance(done, dict) and done.get("digest") == cell.digest() else "changed"


def plan(cells: Sequence[Cell], output: Path) -> tuple[list[Cell], str]:
    """The cells that are to run, and a line that says what is reused and what is run."""
    states = [state_of(cell, output) for cell in cells]
    count = Counter(states)
    to_run = [cell for cell, state in zip(cells, states, strict=True) if state != "finished"]
    why = {
        "new": "{} new",
        "unfinished": "{} not finished before",
        "changed": "{} with another configuration than before",
    }
    reasons = ", ".join(text.format(count[state]) for state, text in why.items() if count[state])
    line = (
        f"{len(cells)} run{'s' if len(cells) > 1 else ''}: {count['finished']} finished before and reused, {len(to_run)} to run"
    )
    return to_run, f"{line} ({reasons})" if reasons else line


def threads_for(workers: int) -> int:
    """Threads of each of so many workers, so that together they have no more than this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


def run_cells(
    cells: Sequence[Cell], output: Path, *, workers: int = 1, threads: int | None = None, ray: str | None = None
) -> Iterator[Outcome]:
    """Run cells, and yield each when it has ended.

    Parameters
    ----------
    cells
        Those of :func:`plan`. What an earlier run left in its folder is deleted just before a cell starts.
    output
        Folder of the benchmark. On a cluster it must be one that all machines share.
    workers
        How many run at a time; on a cluster of several machines Ray decides.
    threads
        Of each; None: :func:`threads_for` the workers, or 1 on a cluster, whose machines may be smaller.
    ray
        None: processes of this machine. :data:`LOCAL`: through Ray on this machine. Else the address of a cluster.

    Raises
    ------
    PerturbZooError
        The folder cannot be written, Ray is not installed, or there is no cluster at the address.
    """
    threads = threads or (threads_for(workers) if ray in (None, LOCAL) else 1)
    if ray is None:
        yield from _in_processes(cells, output, workers, threads)
    elif cells:
        yield from _on_ray(cells, output, workers, threads, ray)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold a benchmark's folder for this process alone; the lock ends with the process, however that ends.

    Raises
    ------
    PerturbZooError
        Another process holds it, or the folder cannot be written.
    """
    file = output / LOCK
    try:
        output.mkdir(parents=True, exist_ok=True)
        # not emptied before it is ours: it says who holds it
        held = file.open("a+")
    except OSError as error:
        raise PerturbZooError(f"{output}: cannot be written: {error.strerror or error}") from error
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            held.seek(0)
            raise PerturbZooError(f"another benchmark is running in {output} ({held.read().strip()})") from error
        held.truncate(0)
        held.write(f"{socket.gethostname()}, pid {os.getpid()}\n")
        held.flush()
        yield


def _prepare(cell: Cell, output: Path) -> None:
    """Leave in a cell's folder what its process reads, and nothing else."""
    folder = output / cell.folder
    try:
        _make_folder(cell, folder)
    except OSError as error:
        raise PerturbZooError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _make_folder(cell: Cell, folder: Path) -> None:
    from perturbzoo import __version__

    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(yaml.safe_dump(cell.config, sort_keys=False))
    place = {"model": cell.model, "split": cell.split, "seed": cell.seed, "version": __version__, "digest": cell.digest()}
    (folder / CELL).write_text(json.dumps(place, indent=1) + "\n")


# ---------------------------------------------------------------------- on this machine


def _start(folder: Path, threads: int, ends_with_this: bool = True) -> subprocess.Popen[bytes]:
    """Start the process of a cell; all it says goes to its log."""
    environment = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}
    environment.pop(PARENT, None)
    if ends_with_this:
        environment[PARENT] = str(os.getpid())
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "perturbzoo.benchmark.cell", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _in_processes(cells: Sequence[Cell], output: Path, workers: int, threads: int) -> Iterator[Outcome]:
    waiting = list(cells)
    running: dict[subprocess.Popen[bytes], tuple[Cell, float]] = {}
    with _stopped_by_termination():
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    cell = waiting.pop(0)
                    _prepare(cell, output)
                    running[_start(output / cell.folder, threads)] = (cell, time.monotonic())
                for process in [process for process in running if process.poll() is not None]:
                    cell, started = running.pop(process)
                    yield Outcome(cell, _why(process.returncode, output / cell.folder), time.monotonic() - started)
                time.sleep(0.05)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


@contextmanager
def _stopped_by_termination() -> Iterator[None]:
    """Make SIGTERM stop as Ctrl-C does, so that the processes of cells do not outlive this one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _why(status: int, folder: Path) -> str:
    """Why a cell's process ended, from its status and the last line it said; empty if all is well."""
    if status == 0:
        return "" if (folder / DONE).is_file() else "ended without a result"
    if status < 0:
        killed = " (killed, perhaps for want of memory)" if status == -signal.SIGKILL else ""
        return f"ended by signal {-status}{killed}"
    return error_of(folder) or f"ended with status {status}"


def error_of(folder: Path) -> str:
    """The error that a cell's process ended with, from its last line; empty if that is no error."""
    try:
        lines = (folder / LOG).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last.removeprefix("error:").strip() if last.startswith("error:") else ""


# ---------------------------------------------------------------------- through Ray


def run_here(folder: str, threads: int) -> tuple[str, float]:
    """Run the cell of a folder in a process of its own, on the machine where Ray calls this; why it failed, and seconds."""
    started = time.monotonic()
    process = _start(Path(folder), threads, ends_with_this=False)  # Ray ends what its workers leave
    try:
        status = process.wait()
    finally:
        process.kill()
    return _why(status, Path(folder)), time.monotonic() - started


def _on_ray(cells: Sequence[Cell], output: Path, workers: int, threads: int, address: str) -> Iterator[Outcome]:
    ray = _import_ray()
    try:
        if address == LOCAL:
            ray.init(
                num_cpus=workers * threads,
                include_dashboard=False,
                configure_logging=False,
                log_to_driver=False,
                address="local",
            )
        else:
            # where the data and the caches are: folders that every machine must have
            named = {name: os.environ[name] for name in _FOLDERS if name in os.environ}
            ray.init(address=address, configure_logging=False, log_to_driver=False, runtime_env={"env_vars": named})
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise PerturbZooError(f"--ray {address}: no cluster answers there: {' '.join(str(error).split())}") from error
    try:
        pending: dict[Any, Cell] = {}
        for cell in cells:
            # whoever is first in Ray's queue nobody knows: all folders are made before
            _prepare(cell, output)
            gpus = 1 if (cell.config.get("trainer") or {}).get("accelerator") in ("gpu", "cuda") else 0
            # a machine that is lost is news about the cluster, not about the model: once more, elsewhere
            remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=1)(run_here)
            pending[remote.remote(str((output / cell.folder).resolve()), threads)] = cell
        while pending:
            (ended,), _ = ray.wait(list(pending), num_returns=1)
            cell = pending.pop(ended)
            try:
                reason, seconds = ray.get(ended)
            except ray.exceptions.RayError as error:
                reason, seconds = " ".join(str(error).split()) or type(error).__name__, float("nan")
            yield Outcome(cell, reason, seconds)
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    # read when the package is imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise PerturbZooError("--ray needs Ray, which is not installed: pip install 'perturbzoo[cluster]'") from error
    return ray
