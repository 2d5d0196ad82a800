"""One cell of a grid: the process that trains and tests it, ``python -m perturbzoo.benchmark.cell FOLDER``.

A process of its own, so that no run sees what another left in memory, and a crash takes nothing else along. Reads
``FOLDER/config.yaml``; writes what fit and test write, and ``done.json`` when all of it is there. Started by :mod:`.running`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

CONFIG = "config.yaml"
CELL = "cell.json"
DONE = "done.json"
LOG = "log.txt"
PARENT = "PERTURBZOO_BENCHMARK_PID"
"""Environment variable with the process that started this one."""


def main(folder: Path) -> None:
    """Train and test; a mistake ends in its message and a status other than 0, as on the command line."""
    from perturbzoo.cli import main as command

    started = time.monotonic()
    told = ["--config", str(folder / CONFIG), "--trainer.default_root_dir", str(folder)]
    command(["fit", *told])
    # the loggers of the fit are closed; the tables are files
    checkpoint = folder / "checkpoints" / "best.ckpt"
    command(["test", "--ckpt_path", str(checkpoint), *told, "--trainer.logger", "false"])
    # nothing else is written after this file: where it is, the rest is whole
    done = {**json.loads((folder / CELL).read_text()), **_spent(started)}
    unfinished = folder / f".{DONE}.part"
    unfinished.write_text(json.dumps(done, indent=1) + "\n")
    unfinished.replace(folder / DONE)


def _spent(started: float) -> dict[str, float]:
    return {"seconds": round(time.monotonic() - started, 1), "processor_seconds": round(time.process_time(), 1)}


def end_with(parent: int) -> None:
    """Let this process end when `parent`, which started it, does, also where that is killed and can tell nobody."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)

    # where there is no such signal, or the parent died before it was set
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    if PARENT in os.environ:
        end_with(int(os.environ[PARENT]))
    main(Path(sys.argv[1]))
