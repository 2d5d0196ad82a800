"""Does the split-half ceiling say what a repeat of the experiment would score?

``python scripts/check_ceiling.py SCREEN.h5ad ...`` halves the cells of each screen at random, takes one half for the prediction of the
other, and prints its scores beside the ceiling and the perturbed mean, which are made from the other half alone.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from perturbzoo.data.h5ad import read_cells
from perturbzoo.evaluate import evaluate
from perturbzoo.evaluation.native import CEILING, PERTURBED_MEAN, PREDICTION

METRICS = [
    "pearson_delta",
    "pearson_delta_perturbed_reference",
    "direction_top20_de",
    "mse_top20_de",
    "mse",
    "pds_cosine",
    "centroid_accuracy",
    "weighted_mse",
    "weighted_r2_delta",
]


def repeat(file: Path, seed: int) -> pd.DataFrame:
    """Score one half of a screen's cells against the other: metrics by row of the table."""
    adata = read_cells(file, None)
    half = np.random.default_rng(seed).permutation(adata.n_obs) % 2 == 0
    found = evaluate(adata[half].copy(), adata[~half].copy(), max_cells=0)
    summary = found.summary[found.summary["category"] == "all"]
    means = summary.pivot(index="metric", columns="model", values="mean")
    return means.loc[METRICS, [PREDICTION, CEILING, PERTURBED_MEAN]].rename(columns={PREDICTION: "repeat"})


def main() -> None:
    """Print a table for each screen, averaged over halvings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--halvings", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for file in options.files:
        tables = [repeat(file, seed) for seed in range(options.halvings)]
        print(
            f"\n{file.name}, mean of {len(tables)} halvings\n{(sum(tables[1:], tables[0]) / len(tables)).round(4).to_string()}",
            flush=True,
        )


if __name__ == "__main__":
    main()
