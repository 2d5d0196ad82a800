"""Every network inference of the package on networks and data that nobody here made, one table for each.

::

    PERTURBZOO_DATA=FOLDER python scripts/bench_grn_external.py [dream4] [multifactorial] [simulated] [own] [gsd] [sergio] [phoenix] [dixit]
        [--methods zscore zscore_direct lasso ...] [--seed 0]

Prints Markdown. Without names, all. Columns: area under precision-recall, its ratio to a random order, area under ROC, early
precision ratio (BEELINE), and the precision of the first edges with their sign; each over the universe that the heading
states. `halves`: AUPRC of the network from one random half of the cells against the strongest edges from the other half, as many
as the truth has; how far a method agrees with itself. A dash: the method does not apply.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import grn_references as references
import numpy as np
import pandas as pd
from grn_references import Reference
from sklearn.metrics import average_precision_score

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, ScreenEffects, infer_network, score_network
from perturbzoo.grn.inference import RANKED_BY, ranked_edges
from perturbzoo.grn.inference_methods import FROM_SINGLES

# The rows of every table, in order. A name is one of `perturbzoo network --method`, or one of HEADS.
METHODS = (
    "grn_ode",
    "zscore",
    "zscore_direct",
    "total_effect",
    "mra",
    "lasso",
    "interventional",
    "dag",
    "trees",
    "pearson",
    "spearman",
    "partial_correlation",
    "unspliced_pearson",
)


def unspliced_pearson(reference: Reference, seed: int) -> GeneRegulatoryNetwork:
    """Correlate unspliced RNA of the target, which follows its production, with spliced RNA of the regulator: it has a direction."""
    if reference.response is None:
        raise PerturbZooError("no unspliced RNA")
    regulators = np.isin(reference.effects.genes, reference.candidates)
    made, seen = (values / values.std(0).clip(1e-12) for values in (reference.response, reference.effects.delta))
    scores = made.T @ seen / len(made) * regulators
    np.fill_diagonal(scores, 0)
    target, regulator = np.nonzero(scores)
    weight = scores[target, regulator]
    return GeneRegulatoryNetwork(reference.effects.genes, regulator, target, weight, np.sign(weight), np.ones(len(weight)))


def kinetics(reference: Reference, seed: int) -> GeneRegulatoryNetwork:
    """Fit kinetics to levels, without repetitions; time series are not used."""
    if reference.levels is None:
        raise PerturbZooError("nobody was perturbed")
    return infer_network(
        reference.effects, "grn_ode", levels=reference.levels, regulators=reference.candidates, bootstraps=0, seed=seed
    )


# Methods that take more of a Reference than its effects: name -> function of it and a seed.
HEADS: dict[str, Callable[[Reference, int], GeneRegulatoryNetwork]] = {
    "unspliced_pearson": unspliced_pearson,
    "grn_ode": kinetics,
}
LARGEST = {"dag": 150}  # matrix exponentials of more genes take minutes


def infer(reference: Reference, method: str, seed: int = 0, effects: ScreenEffects | None = None) -> GeneRegulatoryNetwork:
    """Return the network that a method sees in a benchmark's data, over its candidates; `effects`: in other data of the same kind."""
    if method in HEADS:
        return HEADS[method](reference, seed)
    used = effects or reference.effects
    if method in FROM_SINGLES and not len(used.singles[0]):
        raise PerturbZooError("nobody was perturbed")
    if len(used.genes) > LARGEST.get(method, len(used.genes)):
        raise PerturbZooError("too many genes")
    return infer_network(used, method, regulators=reference.candidates, bootstraps=0, seed=seed)


def table(reference: Reference, methods: list[str], seed: int) -> pd.DataFrame:
    """Score the methods on one benchmark; a row of NaN where one does not apply."""
    rows = {}
    for method in methods:
        start = time.perf_counter()
        try:
            network = infer(reference, method, seed)
        except PerturbZooError:
            rows[method] = {}
            continue
        spent = time.perf_counter() - start
        by = RANKED_BY.get(method, "weight")
        score = score_network(network, reference.truth, regulators=reference.candidates, by=by)
        rows[method] = {
            "AUPRC": score.auprc,
            "x chance": score.auprc_ratio,
            "AUROC": score.auroc,
            "EPR": score.epr,
            "signed": score.signed_precision,
            "halves": self_agreement(reference, method, seed),
            "seconds": spent,
        }
    columns = ["AUPRC", "x chance", "AUROC", "EPR", "signed", "halves", "seconds"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).sort_values("AUPRC", ascending=False, kind="stable")


def self_agreement(reference: Reference, method: str, seed: int) -> float:
    """AUPRC of the network of one half of the cells against the strongest edges of the other's, the mean of both ways."""
    if not reference.halves or method in HEADS or reference.response is not None:
        return float("nan")
    networks = [infer(reference, method, seed, half) for half in reference.halves]
    scores = []
    for one, other in (networks, networks[::-1]):
        first = ranked_edges(other).head(len(reference.truth))
        strongest = GeneRegulatoryNetwork.from_edges(first[["regulator", "target", "weight"]], list(reference.effects.genes))
        scores.append(score_network(one, strongest, regulators=reference.candidates).auprc)
    return float(np.mean(scores))


def markdown(rows: pd.DataFrame) -> str:
    """Format a table: three decimals, one for ratios and seconds, dashes for nothing; the best AUPRC in bold."""
    shown = rows.dropna(axis=1, how="all")
    lines = ["| method | " + " | ".join(shown.columns) + " |", "|---" * (len(shown.columns) + 1) + "|"]
    for name, row in shown.iterrows():
        cells = [
            "-" if pd.isna(value) else f"{value:.1f}" if column in ("x chance", "EPR", "seconds") else f"{value:.3f}"
            for column, value in row.items()
        ]
        if name == shown.index[0] and shown.columns[0] == "AUPRC":
            cells[0] = f"**{cells[0]}**"
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def detectable(reference: Reference) -> str:
    """Say how many true edges leave a trace of two standard deviations of noise in their regulator's own perturbations."""
    effects = reference.effects
    seen = np.zeros((len(effects.genes),) * 2)
    noise = 1.4826 * np.median(np.abs(effects.delta - np.median(effects.delta, 0)), 0)
    perturbed, response, _ = effects.singles
    repeats = np.bincount(np.nonzero(effects.direction)[1], minlength=len(effects.genes))[perturbed]
    seen[:, perturbed] = np.abs(response) / np.maximum(noise, 1e-12)[:, None] * np.sqrt(repeats)
    true = reference.truth.matrix().toarray() != 0
    clear = true & (seen > 2)
    columns = np.isin(reference.truth.genes, reference.candidates)
    pairs = ~np.eye(len(true), dtype=bool) & columns
    return (
        f"{clear.sum()} of {true.sum()} true edges move their target by two standard errors when the regulator is perturbed; "
        f"exactly these first, and all others in random order, would be an AUPRC of "
        f"{average_precision_score(true[pairs], clear[pairs]):.2f}."
    )


def gain(reference: Reference, method: str, over: str, seed: int) -> str:
    """Difference of two methods' AUPRC, with a 95 % interval from 2,000 bootstraps over target genes."""
    columns = np.isin(reference.truth.genes, reference.candidates)
    pairs = ~np.eye(len(columns), dtype=bool) & columns
    true = reference.truth.matrix().toarray() != 0
    scores = [np.abs(infer(reference, name, seed).matrix().toarray()) for name in (method, over)]

    def difference(genes: np.ndarray) -> float:
        rows = pairs[genes]
        one, other = (average_precision_score(true[genes][rows], score[genes][rows]) for score in scores)
        return float(one - other)

    rng, genes = np.random.default_rng(seed), np.arange(len(columns))
    low, high = np.percentile([difference(rng.choice(genes, len(genes))) for _ in range(2000)], [2.5, 97.5])
    return f"AUPRC of `{method}` less that of `{over}`: {difference(genes):+.3f} [{low:+.3f}, {high:+.3f}] over target genes."


def held_out(reference: Reference, methods: tuple[str, ...] = ("lasso", "mra", "interventional", "dag")) -> pd.DataFrame:
    r"""Predict each knockout from a network of the others: :math:`\delta = (I - B_{\setminus t})^{-1} B_{t} \delta_t`.

    The change of the knocked-out gene t is given. Errors are over all other genes and knockouts, relative to predicting no change;
    the ceiling predicts one half of the cells by the other, so its error has the noise of two halves in it.
    """
    effects = reference.effects
    names = list(effects.genes)
    wanted = [(row, names.index(next(iter(condition)).target)) for row, condition in enumerate(effects.conditions)]
    others = ~np.eye(len(names), dtype=bool)
    truth = np.concatenate([effects.delta[row][others[target]] for row, target in wanted])
    guesses: dict[str, list[np.ndarray]] = {"no change": [], "training mean": [], **{method: [] for method in methods}}
    for row, target in wanted:
        rest = np.delete(np.arange(len(wanted)), row)
        training = effects.select(rest)
        guesses["no change"].append(np.zeros(len(names) - 1))
        guesses["training mean"].append(training.delta.mean(0)[others[target]])
        for method in methods:
            weights = infer_network(training, method, bootstraps=0).matrix().toarray()
            keep = np.flatnonzero(others[target])
            moved = np.linalg.solve(
                np.eye(len(keep)) - weights[np.ix_(keep, keep)], weights[keep, target] * effects.delta[row, target]
            )
            guesses[method].append(moved)
    rows = {name: np.concatenate(parts) for name, parts in guesses.items()}
    result = {name: _error(guess, truth) for name, guess in rows.items()}
    first, second = (np.concatenate([half.delta[row][others[target]] for row, target in wanted]) for half in reference.halves)
    result["the other half of the cells"] = _error(first, second)
    return pd.DataFrame.from_dict(result, orient="index", columns=["MSE / no change", "correlation"])


def _error(guess: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    correlation = np.corrcoef(guess, truth)[0, 1] if guess.std() > 0 else np.nan
    return float(((guess - truth) ** 2).sum() / (truth**2).sum()), float(correlation)


BENCHMARKS: dict[str, list[Callable[[], Reference]]] = {
    "dream4": [partial(references.dream4, 1), partial(references.dream4, 2)],
    "multifactorial": [partial(references.dream4, 1, "multifactorial"), partial(references.dream4, 2, "multifactorial")],
    "simulated": [
        partial(references.dream4_like, number, kinetics) for kinetics in ("hill", "multiplicative") for number in range(3)
    ],
    "own": [partial(references.own_screen, seed, cells) for cells in (100, 20) for seed in range(3)],
    "gsd": [references.gsd],
    "sergio": [references.sergio],
    "phoenix": [references.phoenix],
    "dixit": [references.dixit, partial(references.dixit, "dorothea")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = set(options.benchmarks).difference(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    for name in options.benchmarks or BENCHMARKS:
        for read in BENCHMARKS[name]:
            reference = read()
            rows = table(reference, options.methods, options.seed)
            some = infer(reference, "pearson")
            universe = score_network(some, reference.truth, regulators=reference.candidates)
            print(f"\n### {reference.name}\n\n{universe.universe} (chance {universe.chance:.4f}).", end=" ")
            print(reference.note and f"{reference.note[0].upper()}{reference.note[1:]}.", end=" ")
            print(detectable(reference) if len(reference.effects.singles[0]) and name != "dixit" else "")
            print(f"\n{markdown(rows)}", flush=True)
            if name in ("dream4", "phoenix") and {"zscore", "zscore_direct"} <= set(options.methods):
                print(f"\n{gain(reference, 'zscore_direct', 'zscore', options.seed)}", flush=True)
            if name == "dixit" and read is references.dixit:
                print(
                    f"\nHeld-out knockouts, from a network of the other seven:\n\n{markdown(held_out(reference))}", flush=True
                )


if __name__ == "__main__":
    main()
