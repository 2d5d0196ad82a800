"""How long ``perturbzoo evaluate`` takes and how much memory it needs, on a simulated pair of files.

``python scripts/bench_evaluate.py --folder FOLDER`` writes two files of conditions x cells x genes (counts, a tenth of them not 0)
and scores one against the other in a process of its own, with and without the distances between cells; then the retrieval score
alone, for many conditions. ``--million`` does so with files of a million cells (4 GB each). One thread where OMP_NUM_THREADS=1 is set.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def write_screen(path: Path, conditions: int, cells: int, controls: int, genes: int, seed: int) -> None:
    """Write counts around a profile for each condition, about a tenth of the values not 0."""
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

    profiles = np.random.default_rng(0).lognormal(-3.2, 1.5, genes)
    effects = np.random.default_rng(1).normal(0, 0.4, (conditions, genes))
    generator = np.random.default_rng(seed)
    blocks, labels = [], []
    for number in range(-1, conditions):
        rate = profiles * np.exp(effects[number] if number >= 0 else 0)
        size = cells if number >= 0 else controls
        blocks.append(sparse.csr_matrix(generator.poisson(rate, (size, genes)).astype(np.float32)))
        labels += [f"T{number}" if number >= 0 else "control"] * size
    values = sparse.vstack(blocks, format="csr")
    obs = pd.DataFrame({"condition": labels}, index=[f"c{row}" for row in range(len(labels))])
    AnnData(values, obs, pd.DataFrame(index=[f"T{gene}" for gene in range(genes)])).write_h5ad(path)
    print(
        f"{path.name}: {values.shape[0]:,} cells x {genes:,} genes, {values.nnz / np.prod(values.shape):.0%} filled", flush=True
    )


def stream_screen(path: Path, conditions: int, cells: int, genes: int, seed: int) -> None:
    """Write counts in CSR a condition at a time, so that a file of any size is made in little memory; conditions in random order."""
    import h5py
    import pandas as pd
    from anndata import AnnData
    from anndata.io import write_elem
    from scipy import sparse

    profile = np.random.default_rng(0).lognormal(-3.2, 1.5, genes)
    generator, effects = np.random.default_rng(seed), np.random.default_rng(1)
    # control as often as each other condition; a condition's cells are in several places of the file
    order = np.repeat(np.arange(-1, conditions), 4)
    np.random.default_rng(2).shuffle(order)
    scale = {number: profile * np.exp(effects.normal(0, 0.4, genes) * (number >= 0)) for number in range(-1, conditions)}
    share, n_values, pointers, labels = cells // 4, 0, [np.zeros(1, dtype=np.int64)], []
    with h5py.File(path, "w") as file:
        var = pd.DataFrame(index=[f"T{gene}" for gene in range(genes)])
        write_elem(file, "/", AnnData(sparse.csr_matrix((0, genes), dtype=np.float32), var=var))
        group = file["X"]
        for name in ("data", "indices", "indptr"):
            del group[name]
        data, indices = (
            group.create_dataset(name, shape=(0,), maxshape=(None,), dtype=kind, chunks=(1 << 20,))
            for name, kind in (("data", "f4"), ("indices", "i4"))
        )
        for number in order.tolist():
            rate = np.cumsum(scale[number])
            size = generator.poisson(rate[-1], share)
            column = np.searchsorted(rate, generator.random(size.sum()) * rate[-1])
            row = np.repeat(np.arange(share), size)
            block = sparse.coo_matrix((np.ones(len(row), dtype=np.float32), (row, column)), shape=(share, genes)).tocsr()
            for dataset, values in ((data, block.data), (indices, block.indices)):
                dataset.resize((n_values + block.nnz,))
                dataset[n_values:] = values
            pointers.append(block.indptr[1:].astype(np.int64) + n_values)
            n_values += block.nnz
            labels += [f"T{number}" if number >= 0 else "control"] * share
        group["indptr"] = np.concatenate(pointers)
        group.attrs["shape"] = (len(labels), genes)
        obs = pd.DataFrame({"condition": pd.Categorical(labels)}, index=[f"c{row}" for row in range(len(labels))])
        del file["obs"]
        write_elem(file, "obs", obs)
    print(f"{path.name}: {len(labels):,} cells x {genes:,} genes, {n_values / len(labels) / genes:.0%} filled", flush=True)


def score(folder: Path, max_cells: int) -> None:
    """Score in this process; print seconds and peak memory."""
    from perturbzoo.evaluate import evaluate

    start, busy = time.perf_counter(), time.process_time()
    found = evaluate(folder / "predicted.h5ad", folder / "observed.h5ad", max_cells=max_cells)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    what = f"with distances between {max_cells} cells" if max_cells else "pseudobulk metrics alone"
    print(
        f"{len(found.table)} conditions, {what}: {seconds:.1f} s ({busy:.1f} s of processor time), peak {peak:.2f} GiB",
        flush=True,
    )


def score_retrieval(conditions: int, genes: int) -> None:
    """Time the discrimination score alone."""
    from perturbzoo.evaluation.retrieval import Distance, discrimination_score

    observed = np.random.default_rng(0).normal(size=(conditions, genes))
    skip = np.eye(conditions, genes, dtype=bool)
    distances: tuple[Distance, ...] = ("cosine", "l1", "l2")
    for distance in distances:
        start = time.process_time()
        discrimination_score(observed, observed, distance, skip)
        seconds = time.process_time() - start
        print(f"pds_{distance}, {conditions:,} conditions x {genes:,} genes: {seconds:.1f} s of processor time", flush=True)


def main() -> None:
    """Make the files and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where to write the files")
    parser.add_argument("--conditions", type=int, default=160)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--controls", type=int, default=1000)
    parser.add_argument("--genes", type=int, default=5000)
    parser.add_argument("--retrieval", type=int, default=2000, help="conditions of the retrieval score alone; 0: none")
    parser.add_argument(
        "--stream", action="store_true", help="write the files a condition at a time: those of any size fit in memory"
    )
    parser.add_argument("--million", action="store_true", help="1,000 conditions of 1,000 cells, pseudobulk metrics alone")
    parser.add_argument("--max_cells", type=int, nargs="+", default=[0, 100])
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        return score(options.folder, options.only)
    if options.million:
        options.conditions, options.cells, options.max_cells, options.retrieval = 1000, 1000, [0], 0
    for name, seed in (("observed", 2), ("predicted", 3)):
        if options.million or options.stream:
            stream_screen(options.folder / f"{name}.h5ad", options.conditions, options.cells, options.genes, seed)
            continue
        write_screen(options.folder / f"{name}.h5ad", options.conditions, options.cells, options.controls, options.genes, seed)
    for max_cells in options.max_cells:
        # a fresh process each: the peak of memory never falls
        command = [sys.executable, __file__, "--folder", str(options.folder), "--only", str(max_cells)]
        subprocess.run(command, check=True)
    if options.retrieval:
        score_retrieval(options.retrieval, options.genes)
    return None


if __name__ == "__main__":
    main()
