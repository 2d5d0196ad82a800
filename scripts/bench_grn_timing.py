"""Is the moment at which an act sets in recovered from a time course? Network, time unit and delays all fitted from the cells.

Our simulator: Hill kinetics, 30 genes with feedback, each under CRISPRi whose onset is later than its label says, cells at nine
times. Prints, for each seed, the delay, what was recovered, and two simple answers: no delay, and the time of half the change of the
target itself less ``log 2`` lifetimes, which is right for a gene of known turnover that nothing regulates.

    python scripts/bench_grn_timing.py [seed ...]
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np

from perturbzoo.grn import GeneRegulatoryNetwork
from perturbzoo.grn.candidates import candidate_network
from perturbzoo.grn.course_fitting import CourseOptions, fit_time_course
from perturbzoo.grn.fitted import FittedNetwork
from perturbzoo.grn.fitting import fit_network
from perturbzoo.grn.scoring import score_network
from perturbzoo.grn.timecourse import TimeCourse
from perturbzoo.perturbation import Condition, Intervention, parse_condition
from perturbzoo.simulate import simulate_screen
from perturbzoo.simulate.networks import gene_names

GENES, DELAY, CELLS = 30, 1.5, 100
TIMES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)


def course_of(seed: int, delay: float = DELAY) -> tuple[TimeCourse, GeneRegulatoryNetwork]:
    """Simulate acts that are late, and name them as if they were not."""
    genes = gene_names(GENES)
    late = [Condition([Intervention(gene, onset=delay)]) for gene in genes]
    screen = simulate_screen(
        n_genes=GENES, conditions=late, times=TIMES, cells_per_condition=CELLS * len(TIMES), n_control=10 * CELLS, seed=seed
    )
    read = [parse_condition(label) for label in screen.obs["perturbation"].cat.categories]
    named = [Condition(replace(act, onset=0.0) for act in one) for one in read]
    values = screen.X.astype(np.float64)
    size = np.asarray(values.sum(1)).ravel()
    depth = np.median(size)
    values.data = np.log1p(values.data * np.repeat(depth / size, np.diff(values.indptr)))
    course = TimeCourse.from_cells(
        values,
        genes,
        named,
        screen.obs["perturbation"].cat.codes.to_numpy().astype(int),
        np.zeros(len(size), dtype=int),
        screen.obs["time"].to_numpy(dtype=float),
        unit=float((depth / size).mean()),
        default_kind="interference",
    )
    return course, GeneRegulatoryNetwork.from_edges(screen.uns["network"], genes)


def half_time(course: TimeCourse) -> np.ndarray:
    """Delay of each condition by when its target has made half of its own change, ``log 2`` lifetimes after an onset."""
    change = course.levels.change[course.row]
    found = []
    for number, condition in enumerate(course.conditions):
        own = change[:, number, course.levels.genes.index(condition.targets[0])]
        level = np.r_[1, np.exp(own)]
        half = (1 + level[-1]) / 2
        after = int(np.argmax(level <= half))
        moments = np.r_[0, course.times]
        share = (level[after - 1] - half) / (level[after - 1] - level[after]) if after else 0.0
        found.append(moments[after - 1] + share * (moments[after] - moments[after - 1]) - np.log(2) if after else 0.0)
    return np.array(found)


def main() -> None:
    seeds = [int(word) for word in sys.argv[1:]] or [1, 2, 3]
    print(f"{GENES} genes, CRISPRi, onset late by {DELAY}; {CELLS} cells at each of {len(TIMES)} times up to {TIMES[-1]:g}")
    print("seed | answer            | delay, median | relative error, median | targets within 10 % | unit | AUPRC |  s")
    passed = []
    for seed in seeds:
        course, truth = course_of(seed)
        start = time.perf_counter()
        steady = course.last()
        fitted = fit_network(steady, candidate_network(steady, steady.genes, None))
        before = score(fitted, truth)
        onsets = fit_time_course(course, fitted, CourseOptions(delays="condition"))
        seconds = time.perf_counter() - start
        assert onsets is not None
        unit = float(fitted.dynamics.decay.median())
        for name, delay in (("no delay", np.zeros(GENES)), ("half time", half_time(course)), ("network", onsets.delay)):
            error = np.abs(delay - DELAY) / DELAY
            ours = f"{unit:4.2f} | {score(fitted, truth):5.2f} | {seconds:3.0f}" if name == "network" else "     |       |"
            print(
                f"{seed:4d} | {name:17s} | {np.median(delay):13.3f} | {np.median(error):22.1%} | {(error <= 0.1).mean():19.0%} | {ours}"
            )
        error = np.abs(onsets.delay - DELAY) / DELAY
        inside = np.abs(onsets.delay - DELAY) <= 1.96 * onsets.error
        print(
            f"     standard error {np.median(onsets.error):.3f}, truth within 1.96 of them {inside.mean():.0%}; misfit "
            f"{onsets.misfit:.2f}; worst error {error.max():.0%}; AUPRC of the steady fit {before:.2f}"
        )
        passed.append(bool(np.median(error) <= 0.1))
    print(
        f"delay recovered within 10 % (median over targets), {sum(passed)} of {len(passed)} seeds: {'PASS' if all(passed) else 'MISS'}"
    )


def score(fitted: FittedNetwork, truth: GeneRegulatoryNetwork) -> float:
    from perturbzoo.grn.inference_kinetics import mean_network

    return score_network(mean_network([fitted]), truth).auprc


if __name__ == "__main__":
    main()
