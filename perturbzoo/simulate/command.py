"""``perturbzoo simulate``: a screen with known truth, as an h5ad file."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from perturbzoo.errors import PerturbZooError

if TYPE_CHECKING:
    from perturbzoo.grn import GeneRegulatoryNetwork

KINDS = ("knockout", "interference", "activation", "overexpression", "clamp")


def main(arguments: Sequence[str]) -> None:
    """Simulate a screen and write it, with its gene-to-term table beside it."""
    options = _parser().parse_args(arguments)
    if len(options.efficacy) > 2:
        raise PerturbZooError(f"--efficacy takes one number or a range of two, not {len(options.efficacy)}")
    _check_numbers(options)

    from perturbzoo.data.h5ad_writer import new_h5ad
    from perturbzoo.data.reading import expand_path
    from perturbzoo.simulate import simulate_screen, write_go_table

    output = expand_path(options.output)
    with new_h5ad(output) as writer:
        adata = simulate_screen(
            _network(options),
            conditions=options.conditions,
            n_singles=options.singles,
            n_doubles=options.doubles,
            doses=options.doses,
            window=tuple(options.window),
            kind=options.kind,
            guides=options.guides,
            efficacy=(min(options.efficacy), max(options.efficacy)),
            non_cutting=options.non_cutting,
            cells_per_condition=options.cells_per_condition,
            n_control=options.controls,
            contexts=options.contexts,
            context_shift=options.context_shift,
            kinetics=options.kinetics,
            splicing=options.splicing,
            times=options.times,
            noise=options.noise,
            depth=options.depth,
            depth_spread=options.depth_spread,
            dispersion=options.dispersion,
            dropout=options.dropout,
            batches=options.batches,
            batch_shift=options.batch_shift,
            seed=options.seed,
            progress=not options.quiet,
        )
        writer.start(adata)
    go = write_go_table(adata, output.with_suffix(".go.csv"))
    if not options.quiet:
        conditions, edges = len(adata.uns["truth"]["condition"]) - 1, len(adata.uns["network"])
        print(f"{output}: {adata.n_obs:,} cells x {adata.n_vars:,} genes, {conditions:,} conditions, {edges:,} edges\n{go}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perturbzoo simulate",
        description="Simulate a Perturb-seq screen on a known regulatory network. Writes OUTPUT.h5ad, the truth in its uns, "
        "and OUTPUT.go.csv, a gene-to-term table like Gene Ontology's, for graphs between targets.",
    )
    parser.add_argument("--output", required=True, help="h5ad file to write")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same file (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")

    network = parser.add_argument_group("network")
    network.add_argument("--genes", type=int, help="genes (default: 50; with --network, its largest connected part)")
    network.add_argument("--network", help="edge list to take the network from, or a connected piece of --genes genes of it")
    network.add_argument("--topology", choices=["random", "scale_free"], help="out-degrees (default: random)")
    network.add_argument("--in_degree", type=float, help="mean number of regulators of a gene (default: 2)")
    network.add_argument("--regulators", type=int, help="how many genes regulate (default: all may)")
    network.add_argument("--modules", type=int, help="groups of genes that regulate each other most (default: 1)")
    network.add_argument(
        "--motifs",
        nargs="+",
        metavar="MOTIF",
        help="motifs to plant, each as often as it is named: toggle, repressilator, feed_forward, incoherent_feed_forward, "
        "negative_feedback",
    )
    network.add_argument(
        "--kinetics", default="hill", choices=["hill", "additive", "multiplicative"], help="form of regulation (default: hill)"
    )

    acts = parser.add_argument_group("perturbations")
    acts.add_argument("--kind", default="interference", choices=KINDS, help="what is done to targets (default: interference)")
    acts.add_argument("--singles", type=int, help="how many genes are perturbed alone (default: every gene)")
    acts.add_argument("--doubles", type=int, default=0, help="combinations of two of them (default: 0)")
    acts.add_argument(
        "--conditions",
        nargs="+",
        metavar="CONDITION",
        help="what to do instead, such as GENE0001 GENE0001+GENE0002 'GENE0003:knockout@0.5[2,6]'",
    )
    acts.add_argument("--doses", type=float, nargs="+", default=[1.0], help="doses of the singles (default: 1)")
    acts.add_argument(
        "--window", type=float, nargs=2, default=[0.0, math.inf], metavar=("ONSET", "OFFSET"), help="when perturbations act"
    )
    acts.add_argument("--guides", type=int, default=1, help="guides for each target (default: 1)")
    acts.add_argument("--efficacy", type=float, nargs="+", default=[0.8], help="of guides: one, or a range (default: 0.8)")
    acts.add_argument("--non_cutting", type=float, default=0.0, help="share of perturbed cells that are not (default: 0)")

    cells = parser.add_argument_group("cells")
    cells.add_argument("--cells_per_condition", type=int, default=100, help="cells of each condition (default: 100)")
    cells.add_argument("--controls", type=int, help="control cells (default: ten times as many as of a condition)")
    cells.add_argument("--contexts", type=int, default=1, help="cell types, with other basal rates (default: 1)")
    cells.add_argument("--context_shift", type=float, default=0.5, help="how far these are apart, natural log (default: 0.5)")
    cells.add_argument(
        "--times", type=float, nargs="+", default=[10.0], help="when cells are taken, in mRNA lifetimes (default: 10)"
    )
    cells.add_argument("--noise", type=float, default=0.1, help="intrinsic noise (default: 0.1)")
    cells.add_argument(
        "--splicing", type=_truth, nargs="?", const=True, default=False, help="layers spliced and unspliced (default: false)"
    )

    counts = parser.add_argument_group("measurement")
    counts.add_argument("--depth", type=float, default=4.0, help="counts of a gene of median level (default: 4)")
    counts.add_argument("--depth_spread", type=float, default=0.0, help="spread of library sizes, natural log (default: 0)")
    counts.add_argument("--dispersion", type=float, default=0.1, help="excess variance of the counts (default: 0.1)")
    counts.add_argument("--dropout", type=float, help="expected count at which half are lost (default: none are)")
    counts.add_argument("--batches", type=int, default=1, help="batches (default: 1)")
    counts.add_argument("--batch_shift", type=float, default=0.1, help="how far they are apart, natural log (default: 0.1)")
    return parser


def _check_numbers(options: argparse.Namespace) -> None:
    """Refuse what passes for a number with argparse and is none that can be simulated."""
    if options.seed < 0:
        raise PerturbZooError(f"--seed is {options.seed}: give 0 or more")
    for name, given in vars(options).items():
        values = given if isinstance(given, list) else [given]
        # a window may be open at its end
        bad = [v for v in values if isinstance(v, float) and (math.isnan(v) or (math.isinf(v) and name != "window"))]
        if bad:
            raise PerturbZooError(f"--{name} is {bad[0]}: give a finite number")


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def _network(options: argparse.Namespace) -> GeneRegulatoryNetwork:
    from perturbzoo.simulate import network_from_file, random_network

    drawn = ("topology", "in_degree", "regulators", "modules", "motifs")
    if options.network is not None:
        clash = [name for name in drawn if getattr(options, name) is not None]
        if clash:
            raise PerturbZooError(f"--{clash[0]} shapes a random network: leave it out, or leave --network out")
        return network_from_file(options.network, options.genes, seed=options.seed)
    return random_network(
        50 if options.genes is None else options.genes,
        n_regulators=options.regulators,
        in_degree=2.0 if options.in_degree is None else options.in_degree,
        scale_free=1.0 if options.topology == "scale_free" else 0.0,
        modules=1 if options.modules is None else options.modules,
        sign_of="edge" if options.modules is None else "regulator",
        motifs=Counter(options.motifs or ()),
        seed=options.seed,
    )
