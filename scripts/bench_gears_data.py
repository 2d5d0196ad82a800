"""What bench_gears.py gives to both sides: simulated screens, splits, processes of their own to run in."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perturbzoo.data.datamodule import PerturbSeqDataModule

HERE = Path(__file__).resolve().parent
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": "268435456"}
SPEED_GENES, ACCURACY_GENES = 5000, 1000
# counts per cell that give the density of real screens of this many genes
DEPTH = {SPEED_GENES: 4500.0, ACCURACY_GENES: 2000.0}
SEEDS = (1, 2, 3)
# ours, both when timed and when scored
BATCH = {"conditions_per_batch": 8, "cells_per_condition": 100}
PEER, OURS = "cell-gears", "GEARS"


class Bars:
    """What was asked for, what was measured."""

    def __init__(self) -> None:
        self.lines: list[tuple[bool, str]] = []

    def add(self, passed: bool, text: str) -> None:
        self.lines.append((passed, text))

    def report(self) -> bool:
        for passed, text in self.lines:
            print(f"{'pass' if passed else 'FAIL'}  {text}")
        return all(passed for passed, _ in self.lines)


def make_screen(folder: Path, genes: int, seed: int = 0) -> None:
    """Simulate, normalise and write ``screen.h5ad``, ``go.csv`` and what cell-gears wants in its folder; once."""
    if (folder / "screen.json").exists():
        return
    import numpy as np

    from perturbzoo.simulate import simulate_linear, write_go_table

    folder.mkdir(parents=True, exist_ok=True)
    adata = simulate_linear(genes, 100, 60, 100, 1000, depth=DEPTH[genes], seed=seed)
    density = adata.X.nnz / np.prod(adata.X.shape)
    total = np.asarray(adata.X.sum(axis=1)).ravel()
    adata.X.data = np.log1p(adata.X.data * np.repeat(np.median(total) / total, np.diff(adata.X.indptr))).astype(np.float32)
    adata.obs["condition"] = [gears_name(name) for name in adata.obs.pop("perturbation").astype(str)]
    adata.var["gene_name"] = adata.var_names
    write_go_table(adata, folder / "go.csv")
    terms = adata.uns["go"].groupby("gene")["term"].agg(set).to_dict()
    (folder / "gene2go_all.pkl").write_bytes(pickle.dumps(terms))
    adata.uns.clear()
    adata.obs = adata.obs[["condition", "cell_type"]].astype(str)
    adata.write_h5ad(folder / "screen.h5ad")
    fingerprint = zlib.crc32(adata.X.indices.tobytes(), zlib.crc32(adata.X.data.tobytes()))
    write_json(folder / "screen.json", {"density": density, "fingerprint": f"{fingerprint:08x}"})


def gears_name(condition: str) -> str:
    """How cell-gears spells a condition."""
    return "ctrl" if condition == "control" else condition if "+" in condition else f"{condition}+ctrl"


def data_module(folder: Path, seed: int) -> PerturbSeqDataModule:
    """Our data module on the screen; the list of the split goes to cell-gears too."""
    from perturbzoo.data.datamodule import PerturbSeqDataModule

    data = PerturbSeqDataModule(
        path=str(folder / "screen.h5ad"),
        condition_key="condition",
        covariates=[],
        split={"method": "simulation", "seed": seed},
        perturbation_graph=[{"kind": "go", "path": str(folder / "go.csv")}],
        seed=seed,
        **BATCH,
    )
    data.setup()
    parts = {part: [gears_name(name) for name in data.split.conditions(part)] for part in ("train", "val", "test")}
    parts["train"].append("ctrl")
    (folder / f"split_{seed}.pkl").write_bytes(pickle.dumps(parts))
    return data


def write_json(path: Path, content: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.rename(path)


def run(python: str, threads: int, environment: dict[str, str], script: Path, *arguments: object) -> Any:
    """Run a script in a process of its own and read the JSON file it leaves, its fourth argument."""
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    task, folder, seed, output, *rest = map(str, arguments)
    log = Path(output).with_suffix(".log")
    with log.open("w") as stream:
        finished = subprocess.run(
            [python, str(script), task, folder, seed, output, *rest],
            env={**os.environ, **limits, **environment},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    if finished.returncode:
        raise SystemExit(f"{script.name} {task} failed:\n" + "\n".join(log.read_text().splitlines()[-15:]))
    return json.loads(Path(output).read_text())


def peer(options: argparse.Namespace, environment: dict[str, str], *arguments: object) -> Any:
    """Run cell-gears, first making its caches where they are missing."""
    _, folder, seed, *_ = arguments
    python, driver = options.gears_python, HERE / "bench_gears_peer.py"
    if not (Path(str(folder)) / f"prepared_{seed}.json").exists():
        print(f"{PEER}: making its cell graphs and gene graphs ...", flush=True)
        run(python, options.threads, TUNED, driver, "prepare", folder, seed, Path(str(folder)) / f"prepared_{seed}.json")
    return run(python, options.threads, environment, driver, *arguments)
