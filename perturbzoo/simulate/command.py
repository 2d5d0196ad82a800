"""``perturbzoo simulate``: a screen with known truth, as an h5ad file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from perturbzoo.errors import PerturbZooError


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

    output = Path(os.path.expandvars(options.output))
    if output.suffix != ".h5ad":
        raise PerturbZooError(f"--output {output}: give a name that ends in .h5ad")
    if not output.absolute().parent.is_dir():
        raise PerturbZooError(f"--output {output}: the folder {output.absolute().parent} does not exist")
    from perturbzoo.simulate import simulate_linear, write_go_table

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
    temporary = output.with_name(f".{output.name}.part")
    try:
        adata.write_h5ad(temporary)
        os.replace(temporary, output)
    except OSError as error:
        raise PerturbZooError(f"{output}: could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    go = write_go_table(adata, output.with_suffix(".go.csv"))
    print(
        f"{output}: {adata.n_obs:,} cells x {adata.n_vars:,} genes, {adata.obs['perturbation'].nunique() - 1} conditions\n{go}"
    )
