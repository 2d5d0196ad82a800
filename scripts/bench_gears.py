"""Run GEARS and the reference implementation, cell-gears 0.1.2, on the same simulated data; print tables and what they pass.

::

    python scripts/bench_gears.py all --setup FOLDER               # makes an environment with cell-gears first
    python scripts/bench_gears.py speed --gears_python ENV/bin/python
    python scripts/bench_gears.py accuracy --gears_python ENV/bin/python [--fresh]

Both get one file of log1p-normalised values: 100 single and 60 double perturbations of 100 cells each and 1,000 control
cells, a table of GO-like terms that tells something about unseen targets, and one list of training, validation and test
conditions (cell-gears' `simulation` split, which ours equals: scripts/compare_splits.py). Both use one thread
(``--threads``), each in a process of its own; bench_gears_peer.py is what runs under the other interpreter.

``speed``, 5,000 genes: the peer's training steps (32 cells, its own ``train``), extrapolated to an epoch over its training
cells, without the evaluations it ends an epoch with; whole epochs of ours through ``Trainer.fit``. Then combinations are
predicted, five in one call and each in a call of its own, in which ours reads and checks the controls anew: the peer's mean of
300 control cells, our mean of all of them. The peer starts from its cached
graphs, which took it minutes; our memory includes reading and graphs. Both with the default allocator and with a tuned one
that keeps its memory.

``accuracy``, 1,000 genes, 10 epochs, three seeds (of split and training): each side's best epoch by its own rule, its
predicted changes on the same control mean, scored by :mod:`perturbzoo.evaluation` against the same test cells, beside simple
baselines; and the time to the peer's lowest validation error. The peer's predictions and times are kept in
scripts/results/gears (``--fresh`` makes them anew, a quarter of an hour for each seed).

Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_gears_accuracy import compare_accuracy
from bench_gears_data import HERE, OURS, PEER, SEEDS, SPEED_GENES, TUNED, Bars, data_module, make_screen, peer, run

PINS = ("torch==2.13.0", "cell-gears==0.1.2", "torch_geometric==2.8.1", "pandas==2.3.3")


def compare_speed(options: argparse.Namespace, bars: Bars) -> None:
    """Time both sides with both allocators, print the table, and note what is passed."""
    folder = options.folder / f"genes{SPEED_GENES}"
    make_screen(folder, SPEED_GENES)
    seed = SEEDS[0]
    data = data_module(folder, seed)
    combinations = [name for name in data.split.conditions("test") if "+" in name][: options.predictions]
    del data
    rows: list[tuple[str, str, Any, Any]] = []
    ratios = {}
    for allocator, environment in (("default", {}), ("tuned", TUNED)):
        files = [folder / f"{side}_{allocator}.json" for side in ("peer", "ours")]
        theirs = peer(options, environment, "speed", folder, seed, files[0], options.steps, *combinations)
        script = HERE / "bench_gears_ours.py"
        ours = run(sys.executable, options.threads, environment, script, "speed", folder, seed, files[1], 3, *combinations)
        # wall and processor time of each
        epoch = [statistics.mean(seconds) * theirs["batches"] for seconds in zip(*theirs["steps"], strict=True)]
        own_epoch, alone, own_alone = (
            [statistics.median(seconds) for seconds in zip(*times, strict=True)]
            for times in (ours["passes"], theirs["predictions"], ours["predictions"])
        )
        predict, own_predict, own_cells = (
            [seconds / len(combinations) for seconds in times]
            for times in (theirs["together"], ours["predictions_together"], ours["predictions_300_cells_together"])
        )
        step = [seconds / theirs["batches"] for seconds in epoch]
        own_step = [seconds / ours["steps_per_epoch"] for seconds in own_epoch]
        rows += [
            (allocator, "training step, s", step, own_step),
            (allocator, "training pass of an epoch, s", epoch, own_epoch),
            (allocator, "a combination, of 5 in a call, s", predict, own_predict),
            (allocator, "the same, ours of 300 cells too", predict, own_cells),
            (allocator, "a combination, alone in a call, s", alone, own_alone),
            (allocator, "peak memory, training, MiB", [theirs["training_peak_mib"]], [ours["training_peak_mib"]]),
            (allocator, "peak memory, whole run, MiB", [theirs["peak_mib"]], [ours["peak_mib"]]),
        ]
        ratios[allocator] = (epoch[0] / own_epoch[0], predict[0] / own_predict[0], ours["peak_mib"] / theirs["peak_mib"])
    print(f"\nspeed: {SPEED_GENES} genes, density {json.loads((folder / 'screen.json').read_text())['density']:.2f}")
    print(
        f"{PEER}: {theirs['batches']} batches of 32 cells, {len(theirs['steps'])} of them timed, {theirs['parameters']:,} "
        f"parameters, threads {theirs['threads']}\n"
        f"{OURS}: {ours['training_conditions']} training conditions, at most {ours['conditions']} in a batch with {ours['cells']} "
        f"cells of each, {ours['steps_per_epoch']} batches, {ours['parameters']:,} parameters, threads {ours['threads']}; "
        f"reading, graphs and {len(ours['passes'])} epochs {ours['whole_fit'][0]:.0f} s"
    )
    print(f"{'allocator':<10}{'':<33}{PEER:>12}{OURS:>10}{'ratio':>8}   (processor time)")
    for allocator, what, theirs_, ours_ in rows:
        digits = 0 if "memory" in what else 3
        texts = [f"{a:>12.{digits}f}{b:>10.{digits}f}{a / b:>8.1f}" for a, b in zip(theirs_, ours_, strict=True)]
        print(f"{allocator:<10}{what:<33}{texts[0]}" + "".join(f"   ({' '.join(text.split())})" for text in texts[1:]))
    for (allocator, ratio), least in zip(ratios.items(), (100, 50), strict=True):
        bars.add(ratio[0] >= least, f"epoch, {allocator} allocator: {ratio[0]:.0f} x faster (at least {least})")
        bars.add(ratio[1] >= 200, f"prediction, {allocator} allocator: {ratio[1]:.0f} x faster (at least 200)")
        bars.add(ratio[2] <= 0.25, f"peak memory, {allocator} allocator: {ratio[2]:.3f} of the peer's (at most 0.25)")


def set_up(folder: Path) -> str:
    """Make an environment with cell-gears and return its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINS], check=True)
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "accuracy", "all"])
    environment = parser.add_mutually_exclusive_group(required=True)
    environment.add_argument("--gears_python", help="an interpreter that has cell-gears 0.1.2")
    environment.add_argument("--setup", type=Path, metavar="FOLDER", help="make an environment with cell-gears there")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_gears"), help="data and caches (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of either side (default: 1)")
    parser.add_argument("--steps", type=int, default=20, help="training steps of the peer to time (default: 20)")
    parser.add_argument("--predictions", type=int, default=5, help="combinations to predict (default: 5)")
    parser.add_argument("--fresh", action="store_true", help="train the peer again instead of reading its kept predictions")
    options = parser.parse_args()
    if options.setup is not None:
        options.gears_python = set_up(options.setup.resolve())
    options.folder = options.folder.resolve()
    bars = Bars()
    if options.part in ("speed", "all"):
        compare_speed(options, bars)
    if options.part in ("accuracy", "all"):
        compare_accuracy(options, bars)
    print()
    sys.exit(0 if bars.report() else 1)


if __name__ == "__main__":
    main()
