"""``perturbzoo simulate``: a screen with known truth, as an h5ad file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Simulate a screen and write it, with its gene-to-term table beside it."""
    parser = argparse.ArgumentParser(
        prog="perturbzoo simulate",
        description="Simulate a Perturb-seq screen with known truth. Writes OUTPUT.h5ad and OUTPUT.go.csv, a gene-to-term "
        "table like Gene Ontology's, for graphs between targets.",
    )
    parser.add_argument("--output", required=True, help="h5ad file to write")
    parser.add_argument("--genes", type=int, default=200, help="measured genes (default: 200)")
    parser.add_argument("--singles", type=int, default=40, help="targets, each perturbed alone (default: 40)")
    parser.add_argument("--doubles", type=int, default=30, help="combinations of two targets (default: 30)")
    parser.add_argument("--cells_per_condition", type=int, default=100, help="cells of each condition (default: 100)")
    parser.add_argument("--controls", type=int, default=1000, help="control cells (default: 1000)")
    parser.add_argument(
        "--kind",
        default="interference",
        choices=["knockout", "interference", "activation", "overexpression"],
        help="what is done to the targets (default: interference)",
    )
    parser.add_argument("--unmeasured_targets", type=float, default=0.0, help="share of targets that are not measured genes")
    parser.add_argument("--contexts", type=int, default=1, help="cell lines (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same file (default: 0)")
    options = parser.parse_args(arguments)

    from perturbzoo.data.h5ad_writer import new_h5ad
    from perturbzoo.data.reading import expand_path
    from perturbzoo.simulate import simulate_linear, write_go_table

    output = expand_path(options.output)
    with new_h5ad(output) as writer:
        adata = simulate_linear(
            n_genes=options.genes,
            n_singles=options.singles,
            n_doubles=options.doubles,
            cells_per_condition=options.cells_per_condition,
            n_control=options.controls,
            kind=options.kind,
            unmeasured_targets=options.unmeasured_targets,
            contexts=options.contexts,
            seed=options.seed,
        )
        writer.start(adata)
    go = write_go_table(adata, output.with_suffix(".go.csv"))
    print(
        f"{output}: {adata.n_obs:,} cells x {adata.n_vars:,} genes, {adata.obs['perturbation'].nunique() - 1} conditions\n{go}"
    )
