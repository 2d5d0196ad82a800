"""Predict the stimulated cells of a cell type never seen stimulated: how near are whole distributions, on Kang et al. 2018?

    PERTURBZOO_DATA=FOLDER python scripts/kang_transfer.py [--models CellOT FlowMatching:scvi] [--held_out CD4T B ...]

Blood cells with and without interferon beta. For each held-out cell type, models train on the other types' cells; another type
is held out for validation, which chooses the checkpoint. The held-out type's control cells then go through the model, and what
comes out is compared with its stimulated cells, which nothing has seen (scores, halvings and contenders: scripts/distributions.py).
Beside the models: the control cells themselves (identity), and these plus the mean change of the training types (mean shift).
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os

# the matrices are small: threads would wait for each other. Scanpy's choice of genes, by numba, sets the first back
for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from typing import Any

import numpy as np
import pandas as pd
from distributions import arguments, axes_of, begin, show, show_mean, table_of, timed

from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.reading import expand_path


def compare(adata: Any, held_out: str, options: argparse.Namespace) -> pd.DataFrame:
    """A row for each contender, a column for each score."""
    validation = options.validation if options.validation != held_out else options.second_validation

    def make_data(**more: Any) -> PerturbSeqDataModule:
        return PerturbSeqDataModule.from_anndata(
            adata,
            condition_key="perturbation",
            kind="cytokine",
            covariates=["cell_type"],
            n_top_genes=options.genes,
            split={"method": "unseen_context", "held_out": held_out, "val_held_out": validation},
            seed=0,
            **more,
        )

    data = make_data()
    data.setup()
    test = int(data.pairs_of("test")[0])
    observed = data.expression[data.index.cells_by_pair[test]].toarray()
    control = data.expression[data.index.controls_by_context[data.index.context_of_pair[test]]].toarray()
    contenders = {"identity": control, "mean shift": control + data.training_pseudobulks().delta.mean(axis=0)}
    is_control = (adata.obs["cell_type"] == held_out) & (adata.obs["perturbation"] == "control")
    seconds = {}
    for name in options.models:
        model, seconds[name] = timed(name, make_data, options)
        contenders[name] = np.asarray(model.predict(adata[is_control.to_numpy()], ["IFN-beta"]).X)
    table = table_of(contenders, observed, control, axes_of(data), options.halvings)
    table["fit s"] = pd.Series(seconds)
    show(table, f"{held_out}: {len(control)} controls, {len(observed)} stimulated; {validation} validates")
    return table


def main() -> None:
    parser = arguments(__doc__, ["CellOT", "FlowMatching"])
    parser.add_argument("--held_out", nargs="+", default=["CD4T", "FCGR3A+Mono"])
    parser.add_argument("--validation", default="CD8T", help="cell type that chooses the checkpoint")
    parser.add_argument("--second_validation", default="NK", help="the one that does where the first is held out")
    parser.add_argument("--genes", type=int, default=1000)
    options = begin(parser)
    import anndata

    adata = anndata.read_h5ad(expand_path("$PERTURBZOO_DATA/kang2018_pbmc_ifnb.h5ad"))
    tables = [compare(adata, held_out, options) for held_out in options.held_out]
    if len(tables) > 1:
        show_mean(tables, f"mean over {len(tables)} held-out cell types")


if __name__ == "__main__":
    main()
