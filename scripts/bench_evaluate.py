"""How long ``perturbzoo evaluate`` takes and how much memory it needs, beside the packages that do the same.

``python scripts/bench_evaluate.py --folder FOLDER`` writes two files of conditions x cells x genes (counts, 42 % of them not 0) and
measures, each in a process of its own: our pseudobulk metrics, our whole native table (floors and ceilings included), cell-eval2's
``full`` on the same two files (the prediction alone), and the E-distance of every condition from control; then the retrieval score of
many conditions. ``--pertpy_python PYTHON`` names an interpreter that has pertpy, for its E-distance; it needs an environment of its own:
``python3 -m venv /tmp/pertpy && /tmp/pertpy/bin/pip install pertpy==1.0.3 'statsmodels<0.15' filelock``. A line says PASS or MISSED of each bar.
``--million`` measures our pseudobulk metrics alone on files of a million cells (4 GB each). OMP_NUM_THREADS=1 makes it one thread, for
all of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

TIME, MEMORY, E_DISTANCE, AGREEMENT, RETRIEVAL = 1 / 5, 2 / 3, 5.0, 1e-5, 10.0
"""The bars: shares of cell-eval2's time and memory, times as fast as pertpy and how near to it, seconds."""


def control_profile(genes: int, density: float) -> np.ndarray:
    """Expected counts of each gene in a control cell, of which a share `density` is not 0."""
    shape = np.random.default_rng(0).normal(0, 1.5, genes)
    low, high = -12.0, 6.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if -np.expm1(-np.exp(shape + middle)).mean() > density else (middle, high)
    return np.exp(shape + low)


def write_screen(path: Path, conditions: int, cells: int, controls: int, genes: int, seed: int, density: float) -> None:
    """Write counts around a profile for each condition."""
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

    profiles = control_profile(genes, density)
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


def stream_screen(path: Path, conditions: int, cells: int, genes: int, seed: int, density: float) -> None:
    """Write counts in CSR a condition at a time, so that a file of any size is made in little memory; conditions in random order."""
    import h5py
    import pandas as pd
    from anndata import AnnData
    from anndata.io import write_elem
    from scipy import sparse

    profile = control_profile(genes, density)
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


def measured(what: str, work: Callable[[], object]) -> dict[str, float]:
    """Do it in this process; print and return seconds, seconds of processor time and peak memory (GiB, the libraries included)."""
    start, busy = time.perf_counter(), time.process_time()
    work()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {seconds:.1f} s ({busy:.1f} s of processor time), peak {peak:.2f} GiB", flush=True)
    return {"seconds": seconds, "busy": busy, "peak": peak}


def score_native(folder: Path, max_cells: int) -> dict[str, float]:
    """Our own table."""
    import illico  # noqa: F401, loaded before the clock runs, as for the other
    import ot  # noqa: F401

    from perturbzoo.evaluate import evaluate

    warnings.simplefilter("ignore")
    what = f"native, the whole table, {max_cells} cells of each condition" if max_cells else "native, pseudobulk metrics alone"
    return measured(what, lambda: evaluate(folder / "predicted.h5ad", folder / "observed.h5ad", max_cells=max_cells))


def score_full(folder: Path) -> dict[str, float]:
    """cell-eval2's profile full, as its own command runs it: from two files, nothing held that it does not need."""
    from importlib.metadata import version

    import scanpy  # noqa: F401, its engine: loaded before the clock runs
    from cell_eval2 import compute_metrics

    from perturbzoo.evaluation.cell_eval import config

    warnings.simplefilter("ignore")
    settings = config("full", input_type="counts")
    what = f"cell-eval2 {version('cell-eval2')}, full, engine {settings.de.backend}"
    return measured(what, lambda: compute_metrics(folder / "predicted.h5ad", folder / "observed.h5ad", config=settings))


def log_normalised(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Log1p of the observed counts at 10,000 per cell, dense float32, and the cells' labels."""
    import anndata

    adata = anndata.read_h5ad(folder / "observed.h5ad")
    dense = adata.X.toarray()
    dense *= 10_000 / dense.sum(axis=1, keepdims=True)
    return np.log1p(dense), adata.obs["condition"].astype(str).to_numpy()


def e_distances(folder: Path) -> dict[str, float]:
    """E-distance of every condition from control by our samples; written for the comparison."""
    from perturbzoo.evaluation.samples import Sample

    values, label = log_normalised(folder)
    found: dict[str, float] = {}

    def work() -> None:
        names, code = np.unique(label, return_inverse=True)
        origin = values[label == "control"].mean(axis=0, dtype=np.float64)
        control = Sample(values[label == "control"], origin)
        for number, name in enumerate(names):
            sample = Sample(values[code == number], origin)
            if name != "control":
                own = sample.mean_distance("v") + control.mean_distance("v")
                found[name] = 2 * float(np.sqrt(sample.across(control)).mean()) - own

    result = measured(f"E-distance of {len(set(label)) - 1} conditions from control, ours", work)
    (folder / "e_distance.json").write_text(json.dumps(found))
    return result


PERTPY = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import anndata, numpy as np, pertpy
folder = sys.argv[1]
adata = anndata.read_h5ad(folder + "/observed.h5ad")
dense = adata.X.toarray()
dense *= 10_000 / dense.sum(axis=1, keepdims=True)
adata.obsm["genes"] = np.log1p(dense)
distance = pertpy.tl.Distance("edistance", obsm_key="genes")
start, busy = time.perf_counter(), time.process_time()
found = distance.onesided_distances(adata, groupby="condition", selected_group="control", show_progressbar=False)
seconds, busy = time.perf_counter() - start, time.process_time() - busy
ours = json.load(open(folder + "/e_distance.json"))
worst = max(abs(found[name] - value) / max(1.0, abs(value)) for name, value in ours.items())
print(json.dumps({"seconds": seconds, "busy": busy, "worst": worst, "version": pertpy.__version__}))
"""


def in_pertpy(folder: Path, python: str) -> dict[str, float]:
    """The same by pertpy's own function for all conditions, in its own environment."""
    command = [python, "-c", PERTPY, str(folder)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(answer.splitlines()[-1])
    print(
        f"the same by pertpy {found['version']}: {found['seconds']:.1f} s ({found['busy']:.1f} s of processor time), "
        f"largest difference {found['worst']:.1e}",
        flush=True,
    )
    return found


def bar(what: str, value: float, limit: float, *, at_least: bool = False) -> None:
    """Say whether a bar is met."""
    met = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    print(f"{'PASS' if met else 'MISSED'}: {what}: {value:.3g} (bar: {sign} {limit:.3g})", flush=True)


def score_retrieval(conditions: int, genes: int) -> None:
    """Time the discrimination score alone."""
    from perturbzoo.evaluation.retrieval import Distance, discrimination_score

    observed = np.random.default_rng(0).normal(size=(conditions, genes))
    skip = np.eye(conditions, genes, dtype=bool)
    distances: tuple[Distance, ...] = ("cosine", "l1", "l2")
    for distance in distances:
        start, busy = time.perf_counter(), time.process_time()
        discrimination_score(observed, observed, distance, skip)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        print(f"pds_{distance}: {seconds:.1f} s ({busy:.1f} s of processor time)", flush=True)
        bar(f"seconds of pds_{distance}, {conditions:,} conditions x {genes:,} genes", seconds, RETRIEVAL)


def only(folder: Path, what: str) -> None:
    """One measurement in this process; the last line is for the one that started it."""
    name, _, number = what.partition(":")
    result = {
        "native": lambda: score_native(folder, int(number)),
        "full": lambda: score_full(folder),
        "e_distance": lambda: e_distances(folder),
    }[name]()
    print(json.dumps(result), flush=True)


def apart(folder: Path, what: str) -> dict[str, float]:
    """A measurement in a fresh process: the peak of memory never falls."""
    command = [sys.executable, __file__, "--folder", str(folder), "--only", what]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    print("\n".join(lines[:-1]), flush=True)
    return json.loads(lines[-1])


def compare_packages(folder: Path, max_cells: int, pertpy_python: str | None) -> None:
    """Our whole table beside cell-eval2's, and our E-distance beside pertpy's."""
    from importlib.util import find_spec

    mine, theirs = apart(folder, f"native:{max_cells}"), apart(folder, "full")
    print(f"pdex is {'installed' if find_spec('pdex') else 'not installed: cell-eval2 tests genes with scanpy'}", flush=True)
    bar("time of our whole table, share of cell-eval2's", mine["seconds"] / theirs["seconds"], TIME)
    print(f"      (processor time: {mine['busy'] / theirs['busy']:.3g})", flush=True)
    bar("peak memory of our whole table, share of cell-eval2's", mine["peak"] / theirs["peak"], MEMORY)
    ours = apart(folder, "e_distance")
    if pertpy_python is None:
        print("E-distance: not compared, since no --pertpy_python is given", flush=True)
        return
    other = in_pertpy(folder, pertpy_python)
    bar("E-distance of all conditions, times as fast as pertpy", other["seconds"] / ours["seconds"], E_DISTANCE, at_least=True)
    bar("E-distance, largest difference from pertpy's", other["worst"], AGREEMENT)


def main() -> None:
    """Make the files and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where to write the files")
    parser.add_argument("--conditions", type=int, default=160)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--controls", type=int, default=1000)
    parser.add_argument("--genes", type=int, default=5000)
    parser.add_argument(
        "--density", type=float, help="share of a control cell's genes with counts (default: 0.42; --million: 0.1)"
    )
    parser.add_argument("--retrieval", type=int, default=2000, help="conditions of the retrieval score alone; 0: none")
    parser.add_argument(
        "--stream", action="store_true", help="write the files a condition at a time: those of any size fit in memory"
    )
    parser.add_argument("--million", action="store_true", help="1,000 conditions of 1,000 cells, pseudobulk metrics alone")
    parser.add_argument("--max_cells", type=int, help="of each condition, for distances (default: all, --cells)")
    parser.add_argument("--pertpy_python", help="interpreter of an environment with pertpy, for its E-distance")
    parser.add_argument("--ours_alone", action="store_true", help="leave the other packages out")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        return only(options.folder, options.only)
    if options.million:
        options.conditions, options.cells, options.retrieval, options.ours_alone = 1000, 1000, 0, True
    density = options.density or (0.1 if options.million else 0.42)
    for name, seed in (("observed", 2), ("predicted", 3)):
        path, sizes = options.folder / f"{name}.h5ad", (options.conditions, options.cells)
        if options.million or options.stream:
            stream_screen(path, *sizes, options.genes, seed, density)
        else:
            write_screen(path, *sizes, options.controls, options.genes, seed, density)
    max_cells = options.cells if options.max_cells is None else options.max_cells
    apart(options.folder, "native:0")
    if not options.ours_alone:
        compare_packages(options.folder, max_cells, options.pertpy_python)
    elif max_cells and not options.million:
        apart(options.folder, f"native:{max_cells}")
    if options.retrieval:
        score_retrieval(options.retrieval, options.genes)
    return None


if __name__ == "__main__":
    main()
