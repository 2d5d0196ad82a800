"""Predict the cells of doubles never seen, both singles seen: how near are whole distributions, on Norman et al. 2019 (subset)?

    PERTURBZOO_DATA=FOLDER python scripts/norman_distributions.py [--models CellOT FlowMatching CPA] [--folds 5]

K562 cells, 500 genes, 100 cells of a condition. The doubles whose singles are both in the file are divided into folds; those of
a fold are held out in turn, those of the next fold choose the checkpoint, and all else trains. Control cells go through the
model, and what comes out is compared with the double's cells (scores, halvings and contenders: scripts/distributions.py). Beside
the models the control cells themselves (identity), and these plus a change: the mean one of the training conditions, the mean
and the sum of the two singles' changes.

One hundred cells of each condition, fifty of each half: differences of a few hundredths are noise.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):  # small matrices: threads would wait for each other
    os.environ.setdefault(_name, "1")

from typing import Any

import numpy as np
import pandas as pd
from distributions import arguments, axes_of, begin, show, show_mean, table_of, timed

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.reading import expand_path

SHIFTS = {"mean shift": "TrainingMean", "mean of singles": "MatchingMean", "additive shift": "Additive"}


def seen_doubles(adata: Any) -> list[str]:
    """The doubles of which both singles are in the file, by name."""
    labels = adata.obs["perturbation"].unique().tolist()
    return sorted(label for label in labels if "+" in label and set(label.split("+")) <= set(labels))


def compare(adata: Any, test: list[str], validation: list[str], options: argparse.Namespace) -> list[pd.DataFrame]:
    """A table for each double of `test`: a row for each contender, a column for each score."""

    def make_data(**more: Any) -> PerturbSeqDataModule:
        return PerturbSeqDataModule.from_anndata(
            adata,
            condition_key="perturbation",
            kind="activation",
            split={"method": "explicit", "test": test, "val": validation},
            seed=0,
            **more,
        )

    data = make_data()
    data.setup()
    space, control = axes_of(data), data.expression[data.index.controls_by_context[0]].toarray()
    models, seconds = {}, {}
    for name in [*SHIFTS.values(), *options.models]:
        models[name], seconds[name] = timed(name, make_data, options)
    tables = []
    for pair in data.pairs_of("test"):
        double = str(data.conditions[pair])
        observed = data.expression[data.index.cells_by_pair[pair]].toarray()
        contenders = {"identity": control}
        for name, model in models.items():
            shown = next((shift for shift, baseline in SHIFTS.items() if baseline == name), name)
            contenders[shown] = np.asarray(model.predict(adata, [double]).X)
        table = table_of(contenders, observed, control, space, options.halvings)
        table["fit s"] = pd.Series({name: seconds[name] for name in options.models})
        show(table, f"{double}: {len(control)} controls, {len(observed)} cells; {', '.join(validation)} choose the checkpoint")
        tables.append(table)
    return tables


def main() -> None:
    parser = arguments(__doc__, ["CellOT", "FlowMatching", "CPA"])
    parser.add_argument("--folds", type=int, default=5)
    options = begin(parser)
    import anndata

    adata = anndata.read_h5ad(expand_path("$PERTURBZOO_DATA/norman2019_subset.h5ad"))
    doubles = np.random.default_rng(options.seed).permutation(seen_doubles(adata)).tolist()
    folds = [doubles[first :: options.folds] for first in range(options.folds)]
    tables = []
    for fold, test in enumerate(folds):
        tables += compare(adata, test, folds[(fold + 1) % len(folds)], options)
    show_mean(tables, f"mean over {len(tables)} doubles")


if __name__ == "__main__":
    main()
