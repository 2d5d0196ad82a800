"""How long one conditional model of all conditions takes to the distance that one reference model per condition reaches.

Half of every condition's cells and of the controls train, the other half are held out. Both sides see positions in one latent
space, the first 50 principal axes of the training half. The measure is the unbiased squared MMD (median heuristic, width from
observed cells) between held-out cells and held-out controls, moved as predicted; it is taken by this file for both sides,
with the clocks stopped.

::

    python bench_zoo_transport.py fit FOLDER SEED OUTPUT.json MODEL EPOCHS ARGUMENTS

trains MODEL with ARGUMENTS, as JSON, and notes its distances after some epochs, in a process of its own; bench_zoo_references.py does the rest.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import lightning.pytorch as pl
import numpy as np
import torch
from bench_gears_data import write_json
from bench_gears_ours import peak
from bench_zoo import data_module, fit
from lightning.pytorch.callbacks import Callback

from perturbzoo.data.reading import normalise
from perturbzoo.evaluation.distribution import median_bandwidth, mmd
from perturbzoo.models.latent import LatentSpace, fit_latent

COMPONENTS = 50
CONTROLS = 250  # held-out controls that are moved
ALL_TRAIN = {"method": "no_test", "val_fraction": 0.0}
GAP = 1.5  # distances are taken after the first epochs, then ever more rarely


def prepare(place: Path, seed: int, chosen: int) -> dict[str, Any]:
    """Cut the screen in halves, project both, and write what either side reads; once.

    Returns
    -------
    Names of the `chosen` conditions, spread evenly over all by how far they are from the controls.
    """
    halves = place / "halves"
    if (halves / f"chosen{chosen}.json").exists():
        return json.loads((halves / f"chosen{chosen}.json").read_text())
    halves.mkdir(exist_ok=True)
    screen = anndata.read_h5ad(place / "screen.h5ad")
    labels = screen.obs["perturbation"].astype(str).to_numpy()
    generator = np.random.default_rng(seed)
    train = np.zeros(len(labels), dtype=bool)
    for name in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == name))
        train[rows[: len(rows) // 2]] = True
    screen[train].write_h5ad(halves / "screen.h5ad")
    shutil.copy(place / "go.csv", halves / "go.csv")
    data = data_module(halves, seed, "cellot", ALL_TRAIN)
    assert data.spec is not None
    latent = LatentSpace(fit_latent(data.training_cells(), "pca", COMPONENTS))
    counts = screen.X.tocsr().astype(np.float32)
    normalise(counts, np.asarray(counts.sum(axis=1)).ravel(), data.spec.depth)
    position = latent.encode(torch.from_numpy(counts.toarray())).numpy()
    held = {name: position[~train & (labels == name)] for name in np.unique(labels)}
    held["control"] = held["control"][:CONTROLS]
    np.savez(halves / "held.npz", **held)
    screen[np.flatnonzero(~train & (labels == "control"))[:CONTROLS]].write_h5ad(halves / "controls.h5ad")
    score = Distances(halves)
    still = score.distances(dict.fromkeys(score.conditions, held["control"]))
    names = spread_evenly(still, chosen)
    source = position[train & (labels == "control")]
    shifted = {}
    for name in score.conditions:
        target = position[train & (labels == name)]
        shifted[name] = held["control"] + target.mean(axis=0) - source.mean(axis=0)
        if name in names:
            parts = {"train_source": source, "train_target": target, "held_source": held["control"], "held_target": held[name]}
            np.savez(halves / f"ot_{name}.npz", **parts)
    result = {"chosen": names, "identity": still, "shift": score.distances(shifted)}
    write_json(halves / f"chosen{chosen}.json", result)
    return result


def spread_evenly(distance: dict[str, float], chosen: int) -> list[str]:
    """Some singles and some combinations, as many of each as is their share, at even quantiles of their distance."""
    singles = sorted((name for name in distance if "+" not in name), key=distance.__getitem__)
    doubles = sorted((name for name in distance if "+" in name), key=distance.__getitem__)
    n_doubles = round(chosen * len(doubles) / len(distance))
    wanted = ((singles, chosen - n_doubles), (doubles, n_doubles))
    return [names[int((number + 0.5) * len(names) / n)] for names, n in wanted for number in range(n)]


class Distances:
    """Distances of moved controls from the held-out cells of each condition."""

    def __init__(self, halves: Path) -> None:
        self.held = dict(np.load(halves / "held.npz"))
        self.control = self.held.pop("control")
        self.conditions = sorted(self.held)
        self.width = {name: median_bandwidth(cells, self.control) for name, cells in self.held.items()}

    def distances(self, moved: dict[str, np.ndarray]) -> dict[str, float]:
        """The squared MMD of each condition, from positions ``(cells, d)``."""
        return {name: mmd(cells, self.held[name], self.width[name]) for name, cells in moved.items()}


class Watch(Callback):
    """Notes time and distances, with the clock stopped while they are computed."""

    def __init__(self, halves: Path) -> None:
        self.score, self.controls = Distances(halves), anndata.read_h5ad(halves / "controls.h5ad")
        self.curve: list[dict[str, Any]] = []
        self.paused = np.zeros(2)
        self.next = 1

    def setup(self, trainer: pl.Trainer, model: pl.LightningModule, stage: str) -> None:
        # before anything is fitted: the principal axes are part of what is timed
        self.start = np.array([time.perf_counter(), time.process_time()])

    def on_train_epoch_end(self, trainer: pl.Trainer, model: Any) -> None:
        now = np.array([time.perf_counter(), time.process_time()])
        epoch = trainer.current_epoch + 1
        if epoch == self.next or epoch == trainer.max_epochs:
            predicted = model.predict(self.controls, self.score.conditions)
            with torch.no_grad():
                position = model.latent.encode(torch.as_tensor(np.asarray(predicted.X))).numpy()
            names = predicted.obs["condition"].astype(str).to_numpy()
            found = self.score.distances({name: position[names == name] for name in self.score.conditions})
            wall, processor = (now - self.start - self.paused).tolist()
            self.curve.append({"epoch": epoch, "wall": wall, "cpu": processor, "distance": found})
            print(f"epoch {epoch}: {wall:.1f} s, distance {np.mean(list(found.values())):.4f}", flush=True)
            self.next = max(epoch + 1, int(epoch * GAP))
            self.paused += np.array([time.perf_counter(), time.process_time()]) - now


def main() -> None:
    _, _, folder, seed, output, name, epochs, arguments = sys.argv
    data = data_module(Path(folder), int(seed), name, ALL_TRAIN)
    watch = Watch(Path(folder))
    model = fit(data, name, int(seed), int(epochs), watch, json.loads(arguments), limit_val_batches=0)
    result = {
        "curve": watch.curve,
        "conditions": len(data.pairs_of("train")),
        "peak_mib": peak(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
    }
    write_json(Path(output), result)


if __name__ == "__main__":
    main()
