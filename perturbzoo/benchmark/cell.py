"""One cell of a grid: the process that trains and tests it, ``python -m perturbzoo.benchmark.cell FOLDER``.

A process of its own, so that no run sees what another left in memory, and a crash takes nothing else along. Reads
``FOLDER/config.yaml``; writes what fit and test write, and ``done.json`` when all of it is there. Started by :mod:`.running`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

CONFIG = "config.yaml"
CELL = "cell.json"
DONE = "done.json"
LOG = "log.txt"


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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
