"""Run cell-gears 0.1.2 on a prepared screen: what bench_gears.py passes to the interpreter that has it.

::

    python bench_gears_peer.py TASK FOLDER SEED OUTPUT.json [EPOCHS | STEPS] [A+B ...]

FOLDER holds ``screen.h5ad``, ``gene2go_all.pkl`` and ``split_SEED.pkl``; everything that cell-gears caches stays there. The
tasks: ``prepare`` makes its cell graphs and gene graphs; ``speed`` times STEPS training steps and one prediction of each
combination; ``accuracy`` trains EPOCHS epochs with its own ``train`` and writes its predictions to ``OUTPUT.npz``.

Its training loop, losses, evaluation and choice of the best epoch are its own, called as a user would. Only what stops it
on a current machine is worked around:

- it always downloads its GO table: a ``gene2go_all.pkl`` in its folder is taken instead, with ``default_pert_graph=False``;
- it calls ``pandas.Series.nonzero``, which pandas dropped: put back here;
- its GO cache is relative to the working directory and named after the data alone: each screen has a folder of its own;
- random numbers are not seeded where controls are drawn: seeded here.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gears.gears
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from gears import GEARS, PertData

NAME = "screen"
BATCH = 32
WARM_UP = 2
Clock = tuple[float, float]


class Stop(Exception):
    """Everything wanted of a training run is there."""


def clock() -> Clock:
    """Seconds on the wall, and of processor time."""
    return time.perf_counter(), time.process_time()


def since(start: Clock) -> Clock:
    wall, processor = clock()
    return wall - start[0], processor - start[1]


def resident() -> float:
    """Resident memory now, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


class TimedLoader:
    """A data loader that notes how long each batch takes, from asking for it to asking for the next, and may stop early."""

    def __init__(self, loader: Any, steps: int) -> None:
        self.loader, self.steps = loader, steps
        self.seconds: list[Clock] = []

    def __iter__(self) -> Iterator[Any]:
        start = clock()
        for number, batch in enumerate(self.loader, start=1):
            yield batch
            self.seconds.append(since(start))
            if number == self.steps:
                raise Stop
            start = clock()


def load(folder: Path, seed: int) -> Any:
    """A GEARS model on the screen, from the caches where there are any."""
    pd.Series.nonzero = lambda self: self.to_numpy().nonzero()
    (folder / "data").mkdir(exist_ok=True)
    os.chdir(folder)
    np.random.seed(seed)  # noqa: NPY002 - the generator that cell-gears draws from
    torch.manual_seed(seed)
    data = PertData(str(folder), default_pert_graph=False)
    if (folder / NAME / "data_pyg" / "cell_graphs.pkl").exists():
        data.load(data_path=str(folder / NAME))
    else:
        data.new_data_process(NAME, adata=sc.read_h5ad(folder / "screen.h5ad"))
    data.prepare_split("custom", seed=seed, split_dict_path=str(folder / f"split_{seed}.pkl"))
    data.get_dataloader(BATCH)
    model = GEARS(data, device="cpu")
    model.model_initialize()
    return model


def prepare(folder: Path, seed: int) -> dict[str, Any]:
    start = clock()
    load(folder, seed)
    return {"seconds": since(start)}


def speed(folder: Path, seed: int, steps: int, combinations: list[str], after_imports: float) -> dict[str, Any]:
    model = load(folder, seed)
    loaders = model.dataloader
    batches = len(loaders["train_loader"])
    timed = loaders["train_loader"] = TimedLoader(loaders["train_loader"], WARM_UP + steps)
    with contextlib.suppress(Stop):
        model.train(epochs=1)
    training_peak = peak()
    predictions = []
    for combination in combinations:
        start = clock()
        model.predict([combination.split("+")])
        predictions.append(since(start))
    # what it has predicted it remembers
    model.saved_pred = {}
    start = clock()
    model.predict([combination.split("+") for combination in combinations])
    return {
        "together": since(start),
        "batches": batches,
        "steps": timed.seconds[WARM_UP:],
        "predictions": predictions,
        "training_peak_mib": training_peak - after_imports,
        "peak_mib": peak() - after_imports,
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "threads": torch.get_num_threads(),
    }


def peak() -> float:
    """Largest resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def accuracy(folder: Path, seed: int, epochs: int, output: Path) -> dict[str, Any]:
    """Train; note the mean predicted change of each validation condition after each epoch, and of each test condition.

    The pass over all training cells with which ``train`` ends each epoch, to print an error that decides nothing, is left out:
    it would add a quarter to the time.
    """
    model = load(folder, seed)
    loaders, evaluate = model.dataloader, gears.gears.evaluate
    batches = len(loaders["train_loader"])
    curve: list[dict[str, float]] = []
    arrays: dict[str, np.ndarray] = {}
    held: list[Any] = []

    def observed(loader: Any, network: Any, part: str, *rest: Any) -> Any:
        """Its own evaluation, with the changes it predicts summed up on the way."""
        sums: dict[str, Any] = {}

        def look(_: Any, given: tuple[Any], predicted: torch.Tensor) -> None:
            control = given[0].x.reshape(predicted.shape)
            for condition, delta in zip(given[0].pert, (predicted - control).double(), strict=True):
                total, count = sums.get(condition, (0.0, 0))
                sums[condition] = total + delta, count + 1

        handle = network.register_forward_hook(look)
        result = evaluate(loader, network, *rest)
        handle.remove()
        arrays[f"{part}_conditions"] = np.array(sorted(sums))
        arrays[part] = np.stack([(sums[name][0] / sums[name][1]).numpy() for name in sorted(sums)]).astype(np.float32)
        return result

    def instead(loader: Any, network: Any, *rest: Any) -> Any:
        if loader is loaders["test_loader"]:
            observed(loader, network, "test", *rest)
            raise Stop
        if loader is loaders["val_loader"]:
            return held.pop()
        # asked for the training cells, gives what it will be asked for next
        trained = since(start)
        held.append(observed(loaders["val_loader"], network, f"val_{len(curve)}", *rest))
        validated = since(start)
        own = gears.gears.compute_metrics(held[0])[0]["mse_de"]
        curve.append(
            {
                "epoch": len(curve) + 1,
                "trained_wall_s": trained[0],
                "trained_cpu_s": trained[1],
                "wall_s": validated[0],
                "cpu_s": validated[1],
                "own_val_mse_de": float(own),
            }
        )
        return held[0]

    gears.gears.evaluate = instead
    start = clock()
    with contextlib.suppress(Stop):
        model.train(epochs=epochs)
    np.savez_compressed(output.with_suffix(".npz"), **arrays)
    return {"curve": curve, "batches": batches, "threads": torch.get_num_threads()}


def main() -> None:
    after_imports = resident()
    task, folder, seed, output = sys.argv[1], Path(sys.argv[2]).resolve(), int(sys.argv[3]), Path(sys.argv[4]).resolve()
    if task == "prepare":
        result = prepare(folder, seed)
    elif task == "speed":
        result = speed(folder, seed, int(sys.argv[5]), sys.argv[6:], after_imports)
    else:
        result = accuracy(folder, seed, int(sys.argv[5]), output)
    part = output.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(output)


if __name__ == "__main__":
    main()
