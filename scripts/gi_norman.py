"""Genetic-interaction scores of the Norman subset's doubles, from its cells, beside the published fits.

    PERTURBZOO_DATA=FOLDER python scripts/gi_norman.py [--bootstrap 100] [--min_expression 0 0.1] [--figure FILE.png]

The subset has 100 cells and 500 genes (400 of them without a count in its controls) of the five doubles whose singles it
holds; the publication fitted all cells, z-scored against control, in all genes of more than 0.5 UMI, without the targets.
Agreement can therefore be no more than rough, and five doubles make no correlation worth the name: the table prints both
values of every score, with the interval in which ours lies when the cells of each condition, and the controls, are drawn
again. Cells drawn again are noisier than the cells, which costs model fit and similarity: those can lie above their interval.
All deltas share one control mean of 100 cells, whose noise makes singles alike. ``--min_expression`` lists the thresholds
on the mean control expression (log1p-normalised) above which genes are used.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooWarning
from perturbzoo.evaluation.interaction import score_interactions

# Our score and its column in the published table. corr_fit is of the least-squares fit there, of Theil-Sen here and in GEARS;
# eq_contr is formed as in the notebook GI_dimensionality_reduction_and_statistics.
PUBLISHED = {
    "c1": "ts_coef_first",
    "c2": "ts_coef_second",
    "mag": "ts_norm2",
    "corr_fit": "corr_fit",
    "dominance": "abs_log_ts_ratio",
    "dcor": "dcor",
    "dcor_singles": "dcor_singles",
    "dcor_first": "dcor_first",
    "dcor_second": "dcor_second",
}


def published_scores(file: Path, conditions: pd.Series) -> pd.DataFrame:
    """The published fits under our names, a row for each of `conditions`."""
    table = pd.read_csv(file, index_col="name").loc[conditions.str.replace("+", "_")]
    scores = pd.DataFrame({name: table[column].to_numpy() for name, column in PUBLISHED.items()})
    contributions = scores[["dcor_first", "dcor_second"]]
    scores["eq_contr"] = contributions.min(axis=1) / contributions.max(axis=1)
    return scores.assign(condition=conditions.to_numpy())


def score_cells(
    data: PerturbSeqDataModule, min_expression: float, cells: list[np.ndarray], controls: np.ndarray, genes: np.ndarray | None
) -> tuple[pd.DataFrame, np.ndarray]:
    """Scores of the deltas of these cells of each condition; and the genes used, chosen here unless given."""
    mean, _ = data.moments([*cells, controls])
    genes = mean[-1] > min_expression if genes is None else genes
    return score_interactions(pd.DataFrame((mean[:-1] - mean[-1])[:, genes], index=data.conditions)), genes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", type=int, default=100)
    parser.add_argument("--min_expression", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    if "PERTURBZOO_DATA" not in os.environ:
        sys.exit("gi_norman: the environment variable PERTURBZOO_DATA must name the folder of the data")
    folder = Path(os.environ["PERTURBZOO_DATA"])
    warnings.simplefilter("ignore", PerturbZooWarning)  # ten of the doubles lack a single: said above
    data = PerturbSeqDataModule(path=str(folder / "norman2019_subset.h5ad"), kind="activation", split={"method": "no_test"})
    data.setup()
    cells, controls = data.index.cells_by_pair, data.index.controls_by_context[0]
    for threshold in arguments.min_expression:
        ours, genes = score_cells(data, threshold, cells, controls, None)
        theirs = published_scores(folder / "tables" / "norman2019_regr_fits_final.csv.gz", ours["condition"])
        random = np.random.default_rng(0)
        draws = []
        for _ in range(arguments.bootstrap):
            again = [random.choice(group, len(group)) for group in cells]
            draws.append(score_cells(data, threshold, again, random.choice(controls, len(controls)), genes)[0])
        print(f"\n{int(genes.sum())} genes with mean control expression above {threshold}: ours [5 %, 95 %] | published")
        shown = pd.DataFrame({"double": ours["condition"]})
        for name in [*PUBLISHED, "eq_contr"]:
            drawn = np.array([draw[name] for draw in draws])
            low, high = np.nanpercentile(drawn, 5, axis=0), np.nanpercentile(drawn, 95, axis=0)
            shown[name] = [
                f"{value:.2f} [{a:.2f}, {b:.2f}] | {other:.2f}"
                for value, a, b, other in zip(ours[name], low, high, theirs[name], strict=True)
            ]
        print(shown.set_index("double").T.to_string())
        coefficients = [table[["c1", "c2"]].to_numpy().ravel() for table in (ours, theirs)]
        print(f"Pearson r over the 10 coefficients: {np.corrcoef(*coefficients)[0, 1]:.2f}; over the 5 doubles: ", end="")
        print(", ".join(f"{name} {ours[name].corr(theirs[name]):.2f}" for name in [*PUBLISHED, "eq_contr"]))
        if arguments.figure and threshold == arguments.min_expression[0]:
            import matplotlib as mpl

            mpl.use("Agg")
            from perturbzoo.plotting import plot_interaction_scores

            axes = plot_interaction_scores(ours, theirs, labels=("this subset", "published"))
            axes[0].figure.savefig(arguments.figure, dpi=120)


if __name__ == "__main__":
    main()
