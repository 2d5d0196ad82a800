"""What the simulator costs and whether its cells scatter as theory says; prints PASS or MISS for each bar.

::

    python scripts/bench_simulate.py [--only speed moments edges sergio] [--sergio FOLDER] [--threads 2]

``speed``: a whole screen (cells, counts, truth) of 2,000 genes, 10,000 cells and 200 steps, in a process of its own.
``moments``: mean and variance of one gene that is made and lost at constant rates, against mean m and variance noise^2 m.
``edges``: seconds of the cells alone, from 100 to 10,000 genes with about two edges each, and from 2 to 16 edges a gene.
``sergio``: cells a second beside SERGIO (Dibaeinia and Sinha 2020, Cell Systems 11:252) on the same acyclic networks, which are the
only ones it takes, both with production and decay noise, one process each, one thread each. FOLDER is a clone of its public
repository (GPL-3; only run, in a child process, with the names that numpy has dropped put back). SERGIO follows one course for each
cell type and takes a cell every so many steps of it, 10 unless told otherwise; here each cell is followed by itself. *Same
steps* gives it as many steps for a cell as a cell takes here. Its steps have the length it recommends (0.01), which it takes to
be small against a lifetime; ours are exact in the decay.

Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PARTS = ("speed", "moments", "edges", "sergio")
STEPS = 100  # of a cell, of 0.1 lifetimes: what simulate_screen takes unless told otherwise


def bar(missed: list[str], passed: bool, text: str) -> None:
    """Print what a bar demands and whether it is met."""
    print(f"{'PASS' if passed else 'MISS'}  {text}", flush=True)
    if not passed:
        missed.append(text)


def child(threads: int, *arguments: object) -> dict[str, Any]:
    """Run this script as a part of itself in another process and return what it prints last."""
    environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(f"bench_simulate: {' '.join(map(str, arguments))} failed; its message is above")
    return dict(json.loads(finished.stdout.strip().splitlines()[-1]))


# ---------------------------------------------------------------------- speed


def speed(options: argparse.Namespace, missed: list[str]) -> None:
    found = child(options.threads, "speed")
    print(
        f"2,000 genes x 10,000 cells x 200 steps, 51 conditions: {found['seconds']:.0f} s ({found['cpu']:.0f} s of processor time), "
        f"{found['gib']:.2f} GiB at most"
    )
    bar(missed, found["seconds"] < 180, f"in less than 3 min on {options.threads} cores: {found['seconds']:.0f} s")
    bar(missed, found["gib"] < 3, f"in less than 3 GiB of memory, imports included: {found['gib']:.2f} GiB")


def speed_child() -> dict[str, float]:
    from perturbzoo.simulate import random_network, simulate_screen

    network = random_network(2000)
    conditions = [f"GENE{number:04d}" for number in range(1, 51)]
    started, busy = time.perf_counter(), time.process_time()
    adata = simulate_screen(network, conditions=conditions, cells_per_condition=100, n_control=5000, times=(20.0,))
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    assert adata.shape == (10_000, 2000)
    return {"seconds": seconds, "cpu": cpu, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


# ---------------------------------------------------------------------- moments


def moments(options: argparse.Namespace, missed: list[str]) -> None:
    from perturbzoo.grn import GeneRegulatoryNetwork
    from perturbzoo.simulate import simulate_screen

    alone = GeneRegulatoryNetwork(("A",), *(np.zeros(0) for _ in range(5)))
    depth, cells = 1e6, 400_000
    for noise, step in ((0.1, 0.1), (0.1, 0.5), (0.25, 0.1)):
        adata = simulate_screen(
            alone,
            conditions=["A"],
            cells_per_condition=1,
            n_control=cells,
            level_spread=0.0,
            noise=noise,
            step=step,
            depth=depth,
            dispersion=0.0,
        )
        control = (adata.obs["perturbation"] == "control").to_numpy()
        level = adata.X.toarray()[control, 0].astype(float) / depth
        # the counts are Poisson: their share of the variance, a millionth, is known
        mean, variance = level.mean(), level.var() - level.mean() / depth
        print(
            f"birth and death, noise {noise}, step {step}: mean {mean:.4f} (theory 1), variance {variance:.5f} ({noise**2:.5f})"
        )
        bar(missed, abs(mean - 1) < 0.02, f"mean within 2 % of theory: {100 * (mean - 1):+.2f} %")
        off = variance / noise**2 - 1
        bar(missed, abs(off) < 0.02, f"variance within 2 % of theory: {100 * off:+.2f} %")


# ---------------------------------------------------------------------- edges


def edges(options: argparse.Namespace, missed: list[str]) -> None:
    import torch

    from perturbzoo.grn import Interventions, RegulatoryDynamics
    from perturbzoo.perturbation import Condition
    from perturbzoo.simulate import random_network
    from perturbzoo.simulate.langevin import CHUNK_VALUES, follow_cells, time_grid

    torch.set_num_threads(1)
    grid, total = time_grid([2.0], 0.1), 1000

    def seconds(network: Any) -> float:
        dynamics = RegulatoryDynamics(network, kinetics="hill").requires_grad_(False)
        rows = min(total, max(1, CHUNK_VALUES // len(network.genes)))
        none = Interventions.from_conditions([Condition()] * rows, network.genes)
        context, when, generator = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64), torch.Generator()
        best = np.inf
        for _ in range(3):
            started = time.perf_counter()
            for _ in range(3):
                follow_cells(dynamics, none, context, grid, when, 0.1, generator)
            best = min(best, (time.perf_counter() - started) / 3 * total / rows)
        return best

    print(f"{total:,} cells, {len(grid)} steps, one thread")
    print(f"{'genes':>8}{'edges':>9}{'seconds':>10}{'ns per edge, cell and step':>29}")

    def row(network: Any) -> tuple[int, float]:
        took = seconds(network)
        print(f"{len(network.genes):>8,}{len(network):>9,}{took:>10.3f}{1e9 * took / len(network) / total / len(grid):>29.2f}")
        return len(network), took

    found = [row(random_network(genes)) for genes in (100, 300, 1000, 3000, 10_000)]
    sizes, times = (np.log([one[column] for one in found]) for column in (0, 1))
    slope = np.polyfit(sizes, times, 1)[0]
    bar(missed, slope < 1.1, f"cost linear in edges from 100 to 10,000 genes: seconds grow as edges to the power {slope:.2f}")
    denser = [row(random_network(1000, in_degree=degree)) for degree in (2, 4, 8, 16)]
    slope = np.polyfit(*(np.log([one[column] for one in denser]) for column in (0, 1)), 1)[0]
    bar(missed, slope < 1.1, f"and at 1,000 genes from 2 to 16 edges each: to the power {slope:.2f}")


# ---------------------------------------------------------------------- sergio


def acyclic_network(genes: int, seed: int) -> list[tuple[int, int, float]]:
    """Edges (regulator, target, weight): a tenth are master regulators, every other gene has some earlier genes as regulators."""
    rng = np.random.default_rng(seed)
    masters = max(2, genes // 10)
    found: dict[tuple[int, int], float] = {}
    for target in range(masters, genes):
        for regulator in rng.choice(target, min(target, 1 + rng.poisson(1.0)), replace=False):
            found[int(regulator), target] = rng.uniform(1, 2.5) * (-1 if rng.random() < 0.4 else 1)
    # SERGIO takes no gene without any edge
    for master in range(masters):
        if not any(regulator == master for regulator, _ in found):
            found[master, int(rng.integers(masters, genes))] = rng.uniform(1, 2.5)
    return [(regulator, target, weight) for (regulator, target), weight in found.items()]


def sergio(options: argparse.Namespace, missed: list[str]) -> None:
    if options.sergio is None:
        print("SKIP  SERGIO: give --sergio FOLDER, a clone of github.com/PayamDiba/SERGIO")
        return
    with tempfile.TemporaryDirectory() as place:
        folder = options.sergio
        if not (folder / "SERGIO" / "sergio.py").exists():
            # a bare clone
            packed = subprocess.run(["git", "-C", folder, "archive", "HEAD", "SERGIO"], capture_output=True)
            if packed.returncode:
                sys.exit(f"bench_simulate: {folder} holds neither SERGIO/sergio.py nor a git repository with it")
            subprocess.run(["tar", "-x", "-C", place], input=packed.stdout, check=True)
            folder = Path(place)
        beside_sergio(folder, missed)


def beside_sergio(folder: Path, missed: list[str]) -> None:
    print(
        f"{'genes':>6}{'edges':>7}{'types':>7}{'SERGIO: steps':>15}{'cells/s':>10}{'ours: steps':>13}{'cells/s':>10}{'ratio':>9}"
    )
    for genes, cells in ((100, 20), (400, 4)):
        for types in (1, 9):
            ours = child(1, "ours", genes, types)
            for steps, per_type in ((STEPS, cells), (10, 10 * cells)):
                theirs = child(1, "sergio", genes, types, steps, per_type, folder)
                ratio = ours["rate"] / theirs["rate"]
                print(
                    f"{genes:>6}{theirs['edges']:>7}{types:>7}{steps:>15}{theirs['rate']:>10.2f}{STEPS:>13}{ours['rate']:>10.0f}"
                    f"{ratio:>8.0f}x",
                    flush=True,
                )
                if steps == STEPS:
                    bar(
                        missed,
                        ratio >= 100,
                        f"100 times SERGIO's cells a second, same steps, {genes} genes, {types} types: {ratio:.0f}x",
                    )


def ours_child(genes: int, types: int) -> dict[str, float]:
    """Whole screens: cells, counts and truth."""
    import pandas as pd

    from perturbzoo.grn import GeneRegulatoryNetwork
    from perturbzoo.simulate import simulate_screen
    from perturbzoo.simulate.networks import gene_names

    names = np.array(gene_names(genes))
    table = pd.DataFrame(acyclic_network(genes, 0), columns=["regulator", "target", "weight"])
    table["regulator"], table["target"] = names[table["regulator"]], names[table["target"]]
    network = GeneRegulatoryNetwork.from_edges(table, list(names))
    cells = 2_000_000 // genes // types
    started = time.perf_counter()
    adata = simulate_screen(
        network, conditions=[names[0]], cells_per_condition=1, n_control=cells, contexts=types, times=(STEPS / 10,), step=0.1
    )
    return {"rate": adata.n_obs / (time.perf_counter() - started)}


def sergio_child(genes: int, types: int, steps: int, cells: int, folder: str) -> dict[str, float]:
    """SERGIO's steady-state simulation, its expression without technical noise."""
    for name, kind in (("int", int), ("float", float), ("bool", bool)):
        if name not in np.__dict__:
            setattr(np, name, kind)  # dropped by numpy 1.24
    sys.path.insert(0, folder)
    from SERGIO.sergio import sergio as simulator  # type: ignore[import-not-found]

    network = acyclic_network(genes, 0)
    incoming: dict[int, list[tuple[int, float]]] = {}
    for regulator, target, weight in network:
        incoming.setdefault(target, []).append((regulator, weight))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        targets, masters = Path(place) / "targets.csv", Path(place) / "masters.csv"
        rows = []
        for target, regulators in sorted(incoming.items()):
            columns = [*(one for one, _ in regulators), *(weight for _, weight in regulators), *(2.0 for _ in regulators)]
            rows.append(",".join(map(str, [float(target), float(len(regulators)), *columns])))
        # its reader wants whole numbers where they are counts and names
        targets.write_text("\n".join(row.replace(".0,", ",", 2) for row in rows) + "\n")
        free = [gene for gene in range(genes) if gene not in incoming]
        masters.write_text("".join(f"{gene},{','.join(f'{rate:.3f}' for rate in rng.uniform(1, 4, types))}\n" for gene in free))
        started = time.perf_counter()
        model = simulator(
            number_genes=genes,
            number_bins=types,
            number_sc=cells,
            noise_params=1.0,
            decays=0.8,
            sampling_state=steps,
            noise_type="dpd",
        )
        model.build_graph(str(targets), str(masters), 0)
        model.simulate()
        expression = model.getExpressions()
        took = time.perf_counter() - started
    assert expression.shape == (types, genes, cells)
    return {"rate": types * cells / took, "edges": len(network)}


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--child":
        what, *given = sys.argv[2:]
        if what == "speed":
            found = speed_child()
        elif what == "ours":
            found = ours_child(*map(int, given))
        else:
            found = sergio_child(*map(int, given[:4]), given[4])
        print(json.dumps(found))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--sergio", type=Path, help="clone of SERGIO's repository; without it that part is skipped")
    parser.add_argument("--threads", type=int, default=2, help="threads of the part speed (default: 2)")
    options = parser.parse_args()
    missed: list[str] = []
    started = time.perf_counter()
    for part in PARTS:
        if part in options.only:
            print(f"\n{part}")
            {"speed": speed, "moments": moments, "edges": edges, "sergio": sergio}[part](options, missed)
    print(f"\n{len(missed)} bars missed; {time.perf_counter() - started:.0f} s")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
