"""Peak memory, time and file size of ``perturbzoo predict``: 100 conditions x 10,000 control cells x 5,000 genes.

Trains GEARS for a moment on a small simulated screen (the weights do not matter here), writes a file of control cells, and
predicts every condition for every cell in a process of its own::

    python scripts/bench_predict.py --scale 0.05

The whole size (``--scale 1``) writes about 22 GB into the folder and removes them again.

``--as counts`` draws whole counts instead: 300 targets x 3 contexts x 400 cells x 18,533 genes, from the training mean of a stand-in screen::

    python scripts/bench_predict.py --as counts --scale 0.02
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad
from scipy import sparse

TARGETS = 20


def counts(n_cells: int, n_genes: int, density: float, generator: np.random.Generator) -> sparse.csr_matrix:
    """Counts of 1 and more at random places, ``(cells, genes)`` CSR float32."""
    matrix = sparse.random(n_cells, n_genes, density, format="csr", dtype=np.float32, rng=generator)
    matrix.data = generator.geometric(0.5, matrix.nnz).astype(np.float32)
    return matrix


def make_checkpoint(folder: Path, n_genes: int, density: float, uncertainty: bool, generator: np.random.Generator) -> Path:
    """Train GEARS for two batches on a small screen."""
    from lightning.pytorch import Trainer

    from perturbzoo import PerturbSeqDataModule
    from perturbzoo.models import GEARS

    labels = np.repeat(["control", *(f"gene{number}" for number in range(TARGETS))], [200] + [20] * TARGETS)
    screen = AnnData(
        counts(len(labels), n_genes, density, generator),
        obs=pd.DataFrame({"perturbation": labels}, index=[f"cell{number}" for number in range(len(labels))]),
        var=pd.DataFrame(index=[f"gene{number}" for number in range(n_genes)]),
    )
    trainer = Trainer(
        default_root_dir=folder, max_epochs=1, limit_train_batches=2, accelerator="cpu", logger=False, enable_progress_bar=False
    )
    trainer.fit(GEARS(uncertainty=uncertainty), PerturbSeqDataModule.from_anndata(screen))
    return folder / "checkpoints" / "last.ckpt"


def bench_counts(options: argparse.Namespace) -> None:
    """The size of a round of the Virtual Cell Challenge 2026: cells/s, peak memory and file size of predict as counts."""
    from lightning.pytorch import Trainer

    from perturbzoo import PerturbSeqDataModule
    from perturbzoo.models.baselines import TrainingMean

    n_genes, n_cells, contexts = 18_533, 400, ("a", "b", "c")
    n_targets = max(2, round(300 * options.scale))
    generator = np.random.default_rng(0)
    rate = generator.lognormal(0, 2.0, n_genes)
    rate *= 15_000 / rate.sum()

    def cells(n: int, labels: np.ndarray, context: np.ndarray) -> AnnData:
        blocks = []
        for start in range(0, n, 256):
            size = generator.lognormal(0, 0.4, (min(256, n - start), 1))
            blocks.append(sparse.csr_matrix(generator.negative_binomial(2.0, 2 / (2 + size * rate)).astype(np.float32)))
        obs = pd.DataFrame({"perturbation": labels, "context": context}, index=[f"cell{number}" for number in range(n)])
        var = pd.DataFrame(index=[f"gene{number}" for number in range(n_genes)])
        return AnnData(sparse.vstack(blocks, format="csr"), obs=obs, var=var)

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        names = [f"gene{number}" for number in range(n_targets)]
        labels = np.tile(np.repeat(["control", *names], [options.controls, *[2] * n_targets]), len(contexts))
        screen = cells(len(labels), labels, np.repeat(contexts, len(labels) // len(contexts)))
        screen.write_h5ad(folder / "screen.h5ad")
        trainer = Trainer(default_root_dir=folder, max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False)
        trainer.fit(TrainingMean(), PerturbSeqDataModule.from_anndata(screen, covariates=["context"], min_cells=2))
        output = folder / "predicted.h5ad"
        command = [sys.executable, "-m", "perturbzoo.cli", "predict", "--as", "counts", "--cells", str(n_cells)]
        command += ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt"), "--controls", str(folder / "screen.h5ad")]
        (folder / "conditions.csv").write_text("\n".join(["condition", *names]) + "\n")
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--conditions", str(folder / "conditions.csv"), "--output", str(output)])
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status:
            sys.exit("predict failed")
        n_rows = n_targets * len(contexts) * n_cells
        assert read_h5ad(output, backed="r").shape == (n_rows, n_genes)
        processor = usage.ru_utime + usage.ru_stime
        print(f"{n_targets} targets x {len(contexts)} contexts x {n_cells} cells x {n_genes:,} genes, whole counts")
        print(f"peak memory of the process  {usage.ru_maxrss / 2**20:8.2f} GiB")
        print(f"wall time                   {wall:8.1f} s (processor {processor:.1f} s), {n_rows / wall:,.0f} cells/s")
        print(f"file                        {output.stat().st_size / 1e9:8.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the conditions (default: 1, which is 100)")
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=5_000)
    parser.add_argument("--density", type=float, default=0.1, help="share of counts that are not 0 (default: 0.1)")
    parser.add_argument("--uncertainty", action="store_true", help="with standard errors, a third matrix")
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="where to write (default: the system's temporary folder)"
    )
    parser.add_argument("--as", dest="space", choices=("log1p", "counts"), default="log1p", help="what to predict")
    parser.add_argument(
        "--controls", type=int, default=2_000, help="control cells in each context, for counts (default: 2,000)"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.space == "counts":
        bench_counts(options)
        return

    names = [f"gene{number}" for number in range(TARGETS)]
    doubles = ("+".join(pair) for pair in itertools.combinations(names, 2))
    conditions = list(itertools.islice(itertools.chain(names, doubles), max(1, round(100 * options.scale))))
    n_rows = len(conditions) * options.cells
    # X alone is not compressed; the layers take a tenth of it in the worst case seen
    needed, free = 1.4 * n_rows * options.genes * 4 / 1e9, shutil.disk_usage(options.folder).free / 1e9
    if needed > free:
        sys.exit(
            f"{options.folder} has {free:.0f} GB free, {needed:.0f} GB are needed: choose another --folder or a smaller --scale"
        )

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        generator = np.random.default_rng(0)
        checkpoint = make_checkpoint(folder, options.genes, options.density, options.uncertainty, generator)
        controls, output = folder / "controls.h5ad", folder / "predicted.h5ad"
        AnnData(
            counts(options.cells, options.genes, options.density, generator),
            obs=pd.DataFrame(index=[f"cell{number}" for number in range(options.cells)]),
            var=pd.DataFrame(index=[f"gene{number}" for number in range(options.genes)]),
        ).write_h5ad(controls)
        command = [sys.executable, "-m", "perturbzoo.cli", "predict", "--ckpt_path", str(checkpoint)]
        command += ["--controls", str(controls), "--conditions", ",".join(conditions), "--output", str(output)]
        start = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status:
            sys.exit("predict failed")
        size = output.stat().st_size
        written = read_h5ad(output, backed="r")
        assert written.shape == (n_rows, options.genes)
        print(
            f"{len(conditions)} conditions x {options.cells:,} cells x {options.genes:,} genes, layers {list(written.layers)}"
        )
        print(f"peak memory of the process  {usage.ru_maxrss / 2**20:8.2f} GiB")
        print(f"wall time                   {wall:8.1f} s (processor {usage.ru_utime + usage.ru_stime:.1f} s)")
        print(
            f"file                        {size / 1e9:8.2f} GB ({n_rows * options.genes * 4 * (1 + len(written.layers)) / 1e9:.1f} GB of values)"
        )


if __name__ == "__main__":
    main()
