"""Peak memory, time and file size of ``perturbzoo predict``: 100 conditions x 10,000 control cells x 5,000 genes.

Trains GEARS for a moment on a small simulated screen (the weights do not matter here), writes a file of control cells, and
predicts every condition for every cell in a process of its own::

    python scripts/bench_predict.py --scale 0.05

The whole size (``--scale 1``) writes about 22 GB into the folder and removes them again.
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
    options = parser.parse_args()
    warnings.simplefilter("ignore")

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
