"""The references of the zoo, their own code, beside our models on the screen of bench_zoo.py: times, memory, and what is passed.

::

    git clone https://github.com/bunnech/cellot CELLOT       # bars quoted from commit 522d2b9
    git clone https://github.com/bowang-lab/scGPT SCGPT      # cebd6fa
    python scripts/bench_zoo_references.py --cpa_setup CPA --cellot_source CELLOT --scgpt_source SCGPT
    python scripts/bench_zoo_references.py --cpa_python CPA/bin/python --cellot_source CELLOT --scgpt_source SCGPT --threads 1

``--cpa_setup`` makes an environment of Python 3.10 with cpa-tools 0.8.8 and what it pins (torch 2.0, scvi-tools 0.20; 6 GB), by
uv, because pip's resolver does not come to an end. A reference that is not given is left out, and its
bar is not claimed. All sides use ``--threads`` threads, each in a process of its own, one at a time, sides in turn.
bench_zoo_peer.py is what runs under the other interpreters, and says what is worked around.

Bars:

- CPA, at most 1/3: seconds for each cell that updates the autoencoder, in the training pass of an epoch. The reference's own
  ``train`` updates it on one batch of three, whose cells are counted, with the time of all three. Its batches have 128 cells;
  ours 512, so it is timed with 512 too. Ours counts perturbed cells only, though controls take part. With the reference's
  network sizes beside.
- CellOT, at most 1/20: one conditional model of all conditions against one reference model per condition, to the same
  distance (bench_zoo_transport.py). The reference's time is that of its best distance on held-out cells within
  ``--iterations``, of which it takes 100,000 by default, the mean over ``--conditions``. Ours is the time of the whole fit,
  principal axes included, until the mean distance over the same conditions is no larger; that over all is printed. As all conditions
  are measured, ours start from each one's mean change (``start: measured``); the default start, which is there for unseen
  conditions, is printed beside, and so is that mean change alone.
- Transformer, at most 1: a training step at 4 x 1,536 tokens, 12 x 512 x 8 (bench_transformer.py).

The table has our models, and the references where they ran: cells are perturbed ones; a reference's epoch is as many of them.
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

import anndata
import numpy as np
import pandas as pd
from bench_gears_data import HERE, Bars, gears_name, run, write_json
from bench_zoo import MODELS, TIMED_EPOCHS, make_screen
from bench_zoo_transport import Distances, prepare

PEER, ZOO, TRANSPORT = HERE / "bench_zoo_peer.py", HERE / "bench_zoo.py", HERE / "bench_zoo_transport.py"
# two that cpa-tools lacks: newer ones have dropped what it imports
CPA_PINS = ("cpa-tools==0.8.8", "pyarrow<15", "pandas<2.2")
CPA_SIZES = {"n_latent": 128, "n_hidden": 256, "n_layers": 3}
# every condition is measured: each can start from its own mean change, and no target has to be treated as an unseen one
MEASURED = {"start": "measured", "unseen_rate": 0.0}
# model, its arguments, epochs; those without arguments are for comparison
OT_FITS: dict[str, tuple[str, dict[str, Any], int]] = {
    "cellot": ("cellot", MEASURED, 10),
    "flow_matching": ("flow_matching", MEASURED, 20),
    "cellot, default start": ("cellot", {}, 40),
    "flow, default start": ("flow_matching", {}, 40),
}
ALONE = {"PYTHONPATH": ""}


class Table:
    """A line for each model of either side."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, model: str, side: str, cells_per_second: float, cells: int, done: dict[str, Any], note: str = "") -> None:
        row = {
            "model": model,
            "side": side,
            "seconds_per_epoch": cells / cells_per_second,
            "cells_per_second": cells_per_second,
        }
        self.rows.append(row | {"peak_mib": done.get("peak_mib"), "parameters": done["parameters"], "note": note})

    def report(self, results: Path) -> None:
        results.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(self.rows).round(3).to_csv(results / "references.csv", index=False)
        print(f"\n{'':<15}{'':<11}{'s per epoch':>12}{'cells/s':>10}{'peak MiB':>10}{'parameters':>12}  ")
        for row in self.rows:
            memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
            seconds, rate = row["seconds_per_epoch"], row["cells_per_second"]
            numbers = f"{seconds:>12,.2f}{rate:>10,.{0 if rate > 100 else 1}f}{memory:>10}{row['parameters']:>12,}"
            print(f"{row['model']:<15}{row['side']:<11}{numbers}  {row['note']}")


def ours(options: argparse.Namespace, place: Path, name: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    """Time one of our models in a process of its own."""
    output = place / f"speed_{name}{'_sizes' if arguments else ''}.json"
    more = (options.screen, output, name, TIMED_EPOCHS, json.dumps(arguments or {}))
    done = run(sys.executable, options.threads, {}, ZOO, "one", place, *more)
    rates = (
        statistics.median(cells / seconds for cells, seconds in zip(done["cells"], done[clock], strict=True))
        for clock in ("seconds", "processor")
    )
    return done | dict(zip(("rate", "processor_rate"), rates, strict=True))


# ---------------------------------------------------------------------------------------------- CPA


def write_for_cpa(place: Path) -> None:
    """The screen as the peer reads it, whose anndata is older than the file; once."""
    if not (place / "cpa.npz").exists():
        screen = anndata.read_h5ad(place / "screen.h5ad")
        counts = screen.X.tocsr().astype(np.float32)
        labels = np.array([gears_name(name).removesuffix("+ctrl") for name in screen.obs["perturbation"].astype(str)])
        arrays = {name: getattr(counts, name) for name in ("data", "indices", "indptr", "shape")}
        np.savez(place / "cpa.npz", condition=labels, **arrays)


def compare_cpa(options: argparse.Namespace, place: Path, table: Table, bars: Bars) -> None:
    """Time both sides in turn; the seconds of a cell that updates the autoencoder, on the wall and of the processor."""
    write_for_cpa(place)
    sides: dict[str, list[tuple[np.ndarray, dict[str, Any]]]] = {}
    for _ in range(options.rounds):
        for batch, steps in ((128, options.steps), (512, options.steps // 2)):
            output = place / f"cpa_peer_{batch}.json"
            done = run(options.cpa_python, options.threads, ALONE, PEER, "cpa", place, "screen", output, batch, steps)
            every = done["steps"]
            whole = np.array(done["seconds"])[: steps // every * every].reshape(-1, every, 2).sum(axis=1)
            sides.setdefault(f"cpa-tools, batches of {batch}", []).append((np.median(whole, axis=0) / batch, done))
        for label, arguments in (("ours", {}), ("ours, the reference's sizes", CPA_SIZES)):
            done = ours(options, place, "cpa", arguments)
            sides.setdefault(label, []).append((1 / np.array([done["rate"], done["processor_rate"]]), done))
    print("\nCPA: microseconds for each cell that updates the autoencoder, in each round (processor time)")
    for label, found in sides.items():
        print(f"  {label:<30}" + "".join(f"{1e6 * wall:>8.0f} ({1e6 * cpu:.0f})" for (wall, cpu), _ in found))
        seconds, done = statistics.median(wall for (wall, _), _ in found), found[-1][1]
        if label.startswith("cpa"):
            # an epoch passes every cell once, and updates the autoencoder on a third of them
            note = f"{label.split(', ')[1]}; updates the autoencoder on a third of the cells"
            table.add("cpa", "reference", done["steps"] / seconds, options.cells, done, note)
        elif "," in label:
            table.add("cpa", "ours", 1 / seconds, options.cells, done, label.split(", ")[1])
    for label in ("ours", "ours, the reference's sizes"):
        for peer in list(sides)[:2]:
            pairs = zip(sides[label], sides[peer], strict=True)
            wall, cpu = np.median([mine / theirs for (mine, _), (theirs, _) in pairs], axis=0)
            text = f"CPA, time per cell that updates the autoencoder, {label} / {peer}: {wall:.3f} ({cpu:.3f})"
            if label == "ours":
                bars.add(wall <= 1 / 3, f"{text}, at most .333")
            else:
                print(f"  no bar: {text}")


# ---------------------------------------------------------------------------------------------- optimal transport


def reference_time(place: Path, name: str, score: Distances) -> dict[str, Any]:
    """Best distance of the reference's model of a condition, its time, and that of nine tenths of the way there."""
    done = json.loads((place / f"cellot_{name}.json").read_text())
    moved = np.load(place / f"cellot_{name}.npz")["moved"]
    distance = np.array([score.distances({name: cells})[name] for cells in moved])
    seconds, best = np.array(done["seconds"]), int(distance.argmin())
    near = int(np.argmax(distance <= distance[best] + 0.1 * (distance[0] - distance[best])))
    return done | {"best": distance[best], "time": seconds[best], "near_time": seconds[near], "curve": distance, "at": best}


def compare_transport(options: argparse.Namespace, place: Path, table: Table, bars: Bars) -> None:
    """Reference models of some conditions and our models of all, in turn; times to the same distance."""
    ready = prepare(place, options.screen, options.conditions)
    halves, names = place / "halves", ready["chosen"]
    fits, fitted, found = list(OT_FITS), {}, {}
    score = Distances(halves)
    for number, name in enumerate(names):
        output = halves / f"cellot_{name}.json"
        arguments = (name, output, options.cellot_source, options.iterations)
        run(options.cellot_python, options.threads, ALONE, PEER, "cellot", halves, *arguments)
        found[name] = reference_time(halves, name, score)
        print(f"CellOT's reference of {name}: {found[name]['time'][0]:.0f} s to {found[name]['best']:.4f}", flush=True)
        for label in fits[number :: len(names)]:
            (model, arguments, epochs), output = OT_FITS[label], halves / f"ours_{fits.index(label)}.json"
            more = (options.screen, output, model, epochs, json.dumps(arguments))
            fitted[label] = run(sys.executable, options.threads, {}, TRANSPORT, "fit", halves, *more)
    best, n = statistics.mean(one["best"] for one in found.values()), len(score.conditions)
    time, near = (np.mean([one[key] for one in found.values()], axis=0) for key in ("time", "near_time"))
    last = next(iter(found.values()))
    print(f"\noptimal transport, {n} conditions; squared MMD of held-out cells, mean over {len(names)} conditions and over all")
    for label in ("identity", "shift"):
        part = statistics.mean(ready[label][name] for name in names)
        print(
            f"  {'control cells' if label == 'identity' else 'mean shift':<22}{part:>9.4f}{np.mean(list(ready[label].values())):>9.4f}"
        )
    print(f"  {'reference, its best':<22}{best:>9.4f}{'-':>9}  after {time[0]:.1f} s (processor {time[1]:.1f}) for each condition; "
          f"nine tenths of the way after {near[0]:.1f} s")  # fmt: skip
    per_step = statistics.mean(one["seconds"][-1][0] / (one["every"] * (len(one["seconds"]) - 1)) for one in found.values())
    table.add("cellot", "reference", last["batch"] / per_step, options.cells, last,
              f"one model per condition, batches of {last['batch']}, {last['inner']} steps of g each")  # fmt: skip
    for model, done in fitted.items():
        curve = [
            (point["wall"], point["cpu"], np.mean([point["distance"][name] for name in names]),
             np.mean(list(point["distance"].values())), point["epoch"])
            for point in done["curve"]
        ]  # fmt: skip
        reached = next((point for point in curve if point[2] <= best), None)
        point = reached or min(curve, key=lambda point: point[2])
        when = "reached" if reached else "not reached, closest"
        print(
            f"  {model:<22}{point[2]:>9.4f}{point[3]:>9.4f}  {when} after {point[0]:.1f} s (processor {point[1]:.1f}), epoch {point[4]}"
        )
        ratios = [point[0] / (n * time[0]), point[1] / (n * time[1]), point[0] / (n * near[0])]
        text = f"{model}, all {n} conditions / {n} x the reference's condition, to the same distance: "
        text += f"{ratios[0]:.4f} (processor {ratios[1]:.4f}; to nine tenths of its way {ratios[2]:.4f})" if reached else when
        if OT_FITS[model][1]:
            bars.add(reached is not None and ratios[0] <= 0.05, f"{text}, at most .05")
    curves = {
        "reference": {name: {"seconds": one["seconds"], "distance": one["curve"].tolist()} for name, one in found.items()}
    }
    write_json(options.results / "transport.json", curves | {model: done["curve"] for model, done in fitted.items()})


# ---------------------------------------------------------------------------------------------- transformer and the rest


def compare_transformer(options: argparse.Namespace, place: Path, table: Table, bars: Bars) -> None:
    """A step of either side, in one process, in turn."""
    script, output = HERE / "bench_transformer.py", place / "transformer.json"
    command = [sys.executable, script, "--scgpt_source", options.scgpt_source, "--output", output, "--threads", options.threads]
    output.unlink(missing_ok=True)
    subprocess.run(list(map(str, [*command, "--layers", options.layers, "--steps", options.transformer_steps])))
    if not output.exists():
        raise SystemExit("bench_transformer.py failed")
    done = json.loads(output.read_text())
    bars.add(done["ratio"] <= 1, f"transformer, a step at 4 x 1,536 tokens, {options.layers} layers, ours / scGPT's own: "
             f"{done['ratio']:.2f} (at most 1)")  # fmt: skip
    for side, seconds in done["seconds"].items():
        row = {"parameters": done["parameters"][side]}
        note = f"{options.layers} x 512 x 8, 1,536 tokens, from {len(seconds)} steps of 4 cells"
        table.add("transformer", side, 4 / statistics.median(seconds), options.cells, row, note)


def compare_gears(options: argparse.Namespace, place: Path, table: Table) -> None:
    """The time of cell-gears' training steps at this number of genes; its bars are in bench_gears.py."""
    from bench_gears_data import ACCURACY_GENES, data_module, make_screen, peer

    folder = options.folder / "gears"
    make_screen(folder, ACCURACY_GENES)
    data = data_module(folder, 1)
    pair = next(name for name in data.split.conditions("test") if "+" in name)
    done = peer(options, ALONE, "speed", folder, 1, folder / "peer.json", 20, pair)
    rate = 32 / statistics.median(wall for wall, _ in done["steps"])
    table.add("gears", "reference", rate, options.cells, done | {"peak_mib": None}, "from 20 steps of 32 cells")


def set_up_cpa(folder: Path) -> str:
    """Make an environment with cpa-tools and return its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run(["python3.10", "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "uv"], check=True)
    subprocess.run([str(python.with_name("uv")), "pip", "install", "--python", str(python), *CPA_PINS], check=True)
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment = parser.add_mutually_exclusive_group()
    environment.add_argument("--cpa_python", help="an interpreter that has cpa-tools 0.8.8")
    environment.add_argument("--cpa_setup", type=Path, metavar="FOLDER", help="make an environment with cpa-tools there")
    parser.add_argument("--cellot_source", type=Path, help="a clone of CellOT")
    parser.add_argument("--cellot_python", default=sys.executable, help="with absl-py, ml-collections (default: this one)")
    parser.add_argument("--scgpt_source", type=Path, help="a clone of scGPT")
    parser.add_argument("--gears_python", help="an interpreter that has cell-gears 0.1.2, for the table")
    parser.add_argument("--screen", type=int, default=201, help="seed (default: 201)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="of CPA, each side once (default: 3)")
    parser.add_argument("--steps", type=int, default=45, help="batches of CPA's reference in a round (default: 45)")
    parser.add_argument("--conditions", type=int, default=4, help="for which CellOT's reference is trained (default: 4)")
    parser.add_argument("--iterations", type=int, default=2000, help="of CellOT's reference (default: 2,000)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--transformer_steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_zoo"), help="of the screens (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "zoo", help="of the tables")
    options = parser.parse_args()
    if options.cpa_setup is not None:
        options.cpa_python = set_up_cpa(options.cpa_setup.resolve())
    options.folder = options.folder.resolve()
    options.results.mkdir(parents=True, exist_ok=True)
    place = make_screen(options.folder, 1000, options.screen)
    options.cells = json.loads((place / "screen.json").read_text())["cells"] - 1000
    table, bars = Table(), Bars()
    for name in MODELS:
        done = ours(options, place, name)
        table.add(name, "ours", done["rate"], options.cells, done)
    if options.cpa_python:
        compare_cpa(options, place, table, bars)
    if options.scgpt_source:
        compare_transformer(options, place, table, bars)
    if options.gears_python:
        compare_gears(options, place, table)
    if options.cellot_source:
        compare_transport(options, place, table, bars)
    table.rows.sort(key=lambda row: MODELS.index(row["model"]))
    table.report(options.results)
    print()
    sys.exit(0 if bars.report() else 1)


if __name__ == "__main__":
    main()
