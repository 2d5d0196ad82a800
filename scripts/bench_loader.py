"""Time the loader beside a bare loop, scvi-tools, anndata and cell-load, in one run, and measure its memory.

Makes a screen of counts once (100,000 cells x 2,000 genes, density .108, 200 conditions and 10 % control cells, sorted by
condition, which cell-load's fast mode asks for), then lets every contender deliver dense batches of 1,024 rows from it,
shuffled, on two cores and from a warm cache. Each contender is a process of its own, and they take turns (A B C D A B C D
...), so that whatever else the machine does meets all of them alike: trust the ratios more than the rows per second.
Whoever receives a batch looks for its largest value, so that every value is touched.

::

    python scripts/bench_loader.py --folder /tmp/bench_loader [--genes 5000] [--cell_load_python ENV/bin/python]

A row is one cell, perturbed or control. cell-load lives in an environment of its own::

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 && ENV/bin/pip install cell-load==0.10.4

What is not alike, and cannot be: perturbzoo delivers log1p-normalised values with the table of conditions, matched controls,
size factors and covariates of each batch; scvi-tools, AnnLoader and cell-load deliver raw counts with one or two columns of
obs; the bare loop delivers raw counts and nothing else. perturbzoo, the bare loop, scvi-tools and AnnLoader hold the matrix
in memory, cell-load reads the file for every batch.

Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

ROWS = 1024
CONTROL = "control"
FULL_TURN = 96 * ROWS

Figures = dict[str, list[dict[str, float]]]
Batches = Callable[[], Iterable[Any]]
Values = Callable[[Any], "list[Any]"]


def write_screen(file: Path, cells: int, genes: int, conditions: int, density: float) -> None:
    """Write the synthetic screen: CSR float32 of whole numbers, sorted by cell type and condition."""
    import anndata
    import pandas as pd
    from scipy import sparse

    generator = np.random.default_rng(0)
    # genes differ in how often they are seen; the mean is the density
    seen = generator.beta(0.5, 0.5 * (1 - density) / density, genes)
    blocks = []
    for start in range(0, cells, 1000):
        shape = (min(1000, cells - start), genes)
        present = generator.random(shape, dtype=np.float32) < seen
        counts = np.zeros(shape, dtype=np.float32)
        counts[present] = 1 + generator.poisson(0.7, int(present.sum()))
        # no cell without any count
        counts[:, 0] += counts.sum(axis=1) == 0
        blocks.append(sparse.csr_matrix(counts))
    names = [f"gene{number}" for number in range(genes)]
    labels = np.array([CONTROL, *names[:conditions]])
    chosen = np.concatenate([np.zeros(cells // 10, int), generator.integers(1, conditions + 1, cells - cells // 10)])
    cell_type = generator.integers(0, 2, cells)
    order = np.lexsort([chosen, cell_type])
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(labels[chosen[order]]),
            "cell_type": pd.Categorical(np.array(["A", "B"])[cell_type[order]]),
            "batch": pd.Categorical(generator.choice(["run1", "run2"], cells)),
        },
        index=[f"cell{number}" for number in range(cells)],
    )
    part = file.with_suffix(".part")
    anndata.AnnData(sparse.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=names)).write_h5ad(part)
    part.rename(file)


# ---------------------------------------------------------------------- contenders, each in a process of its own


def data_module(file: Path, rows: int) -> Any:
    """perturbzoo's data module with `rows` cells and controls together in a training batch of 16 conditions."""
    from perturbzoo.data.datamodule import PerturbSeqDataModule

    module = PerturbSeqDataModule(
        path=str(file),
        covariates=["cell_type"],
        split={"method": "random", "seed": 0},
        conditions_per_batch=16,
        cells_per_condition=rows // 32,
        seed=0,
    )
    module.setup()
    return module


def ours(file: Path, rows: int) -> tuple[Batches, Values]:
    """Cells and a matched control for each, `rows` together in a batch."""
    loader = data_module(file, rows).train_dataloader()
    epochs = itertools.count()

    def batches() -> Iterator[Any]:
        loader.sampler.set_epoch(next(epochs))
        return iter(loader)

    return batches, lambda batch: [batch.expression, batch.control]


def bare(file: Path) -> tuple[Batches, Values]:
    """The rows of our first epoch in the same order, known beforehand; nothing but slicing and making them dense."""
    import anndata

    indices = [np.concatenate([index.cells, index.controls]) for index in data_module(file, ROWS).train_dataloader().sampler]
    counts = anndata.read_h5ad(file).X
    return lambda: (counts[rows].toarray() for rows in indices), lambda batch: [batch]


def scvi_tools(file: Path, workers: int) -> tuple[Batches, Values]:
    """Counts of random cells and their batch, by a manager with just these two fields."""
    import anndata
    from scvi.data import AnnDataManager
    from scvi.data.fields import CategoricalObsField, LayerField
    from scvi.dataloaders import AnnDataLoader

    manager = AnnDataManager([LayerField("X", None, is_count_data=True), CategoricalObsField("batch", "batch")])
    manager.register_fields(anndata.read_h5ad(file))
    loader = AnnDataLoader(manager, shuffle=True, batch_size=ROWS, num_workers=workers, persistent_workers=workers > 0)
    return lambda: loader, lambda batch: [batch["X"]]


def ann_loader(file: Path) -> tuple[Batches, Values]:
    """Counts of random cells with all columns of obs."""
    import anndata
    from anndata.experimental import AnnLoader

    loader = AnnLoader(anndata.read_h5ad(file), batch_size=ROWS, shuffle=True)
    return lambda: loader, lambda batch: [batch.X]


def cell_load(file: Path, consecutive: bool) -> tuple[Batches, Values]:
    """Counts of 512 cells of one condition (its default) and of a control for each, by the data module of its README."""
    from cell_load.data_modules import PerturbationDataModule

    config = file.with_suffix(".toml")
    config.write_text(f'[datasets]\nscreen = "{file}"\n[training]\nscreen = "train"\n[zeroshot]\n[fewshot]\n')
    module = PerturbationDataModule(
        toml_config_path=str(config),
        batch_size=1,
        cell_sentence_len=ROWS // 2,
        num_workers=0,
        pert_col="perturbation",
        batch_col="batch",
        cell_type_key="cell_type",
        control_pert=CONTROL,
        embed_key=None,
        output_space="all",
        is_log1p=False,
        use_consecutive_loading=consecutive,
    )
    module.setup()
    loader = module.train_dataloader()
    return lambda: loader, lambda batch: [batch["pert_cell_emb"], batch["ctrl_cell_emb"]]


@dataclass(frozen=True)
class Contender:
    """How to start one, what it imports before its memory is counted, and the rows of one turn."""

    start: Callable[[Path], tuple[Batches, Values]]
    imports: tuple[str, ...]
    rows_per_turn: int = FULL_TURN


OURS = ("anndata", "perturbzoo.data.datamodule")
CONTENDERS = {
    "perturbzoo": Contender(partial(ours, rows=ROWS), OURS),
    "bare loop": Contender(bare, OURS),
    "scvi-tools": Contender(partial(scvi_tools, workers=0), ("scvi.dataloaders",)),
    "scvi-tools, 2 workers": Contender(partial(scvi_tools, workers=2), ("scvi.dataloaders",)),
    "AnnLoader": Contender(ann_loader, ("anndata.experimental",)),
    "cell-load consecutive": Contender(partial(cell_load, consecutive=True), ("cell_load.data_modules",), 24 * ROWS),
    "cell-load random": Contender(partial(cell_load, consecutive=False), ("cell_load.data_modules",), ROWS),
    "perturbzoo, 2 x rows": Contender(partial(ours, rows=2 * ROWS), OURS),
}


def resident_bytes() -> int:
    """Memory of this process in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most it ever was."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(name: str, file: Path) -> None:
    """Be one contender: a line of JSON when ready, then one for each line read from standard input."""
    # whatever libraries print must not mix with the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    contender = CONTENDERS[name]
    for module in contender.imports:
        importlib.import_module(module)
    before = resident_bytes()
    begin = perf_counter()
    batches, values = contender.start(file)

    def endless() -> Iterator[Any]:
        while True:
            yield from batches()

    stream = endless()

    def turn() -> dict[str, float]:
        rows = most = 0
        begin = perf_counter()
        while rows < contender.rows_per_turn:
            arrays = [np.asarray(part) for part in values(next(stream))]
            for array in arrays:
                array.max()
                rows += len(array)
            most = max(most, sum(array.nbytes for array in arrays))
        speed = rows / (perf_counter() - begin)
        return {"rows_per_second": speed, "bytes_per_batch": most, "peak_bytes": peak_bytes() - before}

    # the first turn warms every cache
    turn()
    print(json.dumps({"seconds": perf_counter() - begin}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), file=answers, flush=True)


# ---------------------------------------------------------------------- the run


class Process:
    """A contender in a process of its own."""

    def __init__(self, name: str, python: str, arguments: list[str]) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read after the process has ended
        command = [python, __file__, *arguments, "--contender", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.ready = self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            lines = self.log.read().strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit status {self.process.returncode}")
        return json.loads(line)

    def turn(self) -> dict[str, float]:
        """Let it deliver the rows of one turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        self.process.communicate()


def csr_bytes(file: Path) -> int:
    """Size of the matrix in memory, with float32 values and int32 indices."""
    import h5py

    with h5py.File(file, "r") as opened:
        matrix = opened["X"]
        return 4 * (len(matrix["data"]) + len(matrix["indices"]) + len(matrix["indptr"]))


def ratio_to(other: str, figures: Figures) -> float:
    """How many times as fast perturbzoo is, turn by turn: neighbours in time met the same machine."""
    pairs = zip(figures["perturbzoo"], figures[other], strict=True)
    return statistics.median(mine["rows_per_second"] / theirs["rows_per_second"] for mine, theirs in pairs)


def bars(figures: Figures, matrix_bytes: int) -> Iterator[tuple[str, bool]]:
    """Yield what is asked of the loader, with what was measured, and whether it holds."""
    for other, bar in (("bare loop", 0.6), ("scvi-tools", 1.5), ("cell-load consecutive", 10.0), ("cell-load random", 10.0)):
        if other in figures and "perturbzoo" in figures:
            ratio = ratio_to(other, figures)
            yield f"{ratio:8.2f} x {other} (at least {bar:g})", ratio >= bar
    for name in ("perturbzoo", "perturbzoo, 2 x rows"):
        if name in figures:
            last = figures[name][-1]
            most = 1.3 * matrix_bytes + 3 * last["bytes_per_batch"]
            yield (
                f"{last['peak_bytes'] / 1e6:8.1f} MB peak of {name} above its imports (at most {most / 1e6:.1f} = 1.3 x the CSR "
                f"of {matrix_bytes / 1e6:.1f} + three batches of {last['bytes_per_batch'] / 1e6:.1f})",
                last["peak_bytes"] <= most,
            )


def main() -> int:
    """Run all contenders in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the synthetic file is kept between runs")
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--conditions", type=int, default=200)
    parser.add_argument("--density", type=float, default=0.108)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender; the median counts")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--cell_load_python", help="interpreter of an environment that has cell-load")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders to run")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    file = options.folder / f"screen_{options.cells}x{options.genes}_{options.conditions}_{options.density:g}.h5ad"
    if options.contender:
        serve(options.contender, file)
        return 0
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    options.folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        print(f"writing {file}")
        write_screen(file, options.cells, options.genes, options.conditions, options.density)

    running: list[Process] = []
    for name in options.only:
        of_cell_load = name.startswith("cell-load")
        if of_cell_load and not options.cell_load_python:
            print(f"{name}: not measured: give --cell_load_python")
            continue
        try:
            running.append(Process(name, options.cell_load_python if of_cell_load else sys.executable, sys.argv[1:]))
        except (RuntimeError, OSError) as error:
            print(f"{name}: not measured: {error}")
    figures: Figures = {process.name: [] for process in running}
    for _ in range(options.repeats):
        for process in running:
            figures[process.name].append(process.turn())
    for process in running:
        process.stop()

    matrix_bytes = csr_bytes(file)
    print(f"\n{options.cells:,} cells x {options.genes:,} genes, {options.cores} cores, median of {options.repeats} turns")
    print(f"{'':24s}{'rows / s':>12s}{'from':>12s}{'to':>12s}{'ours is':>11s}{'peak MB':>10s}{'ready in s':>12s}")
    for process in running:
        speed = [turn["rows_per_second"] for turn in figures[process.name]]
        ratio = f"{ratio_to(process.name, figures):,.2f} x" if "perturbzoo" in figures else "-"
        peak = figures[process.name][-1]["peak_bytes"] / 1e6
        print(
            f"{process.name:24s}{statistics.median(speed):12,.0f}{min(speed):12,.0f}{max(speed):12,.0f}{ratio:>11s}{peak:10,.0f}"
            f"{process.ready['seconds']:12.1f}"
        )
    print("ours is: median over the turns of perturbzoo's rows / s by the other's in the same turn")
    print("peak: of the process above what it holds after its imports; not counted: processes of workers")
    print("ready: reading, checking, normalising (perturbzoo only) and a first turn")
    missed = 0
    for text, holds in bars(figures, matrix_bytes):
        print(f"{'pass' if holds else 'MISS'} {text}")
        missed += not holds
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
