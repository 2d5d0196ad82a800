"""``perturbzoo network``: from a screen's file to a table of edges, and what the screen can say about them at all."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbzoo.errors import PerturbZooError

if TYPE_CHECKING:
    from perturbzoo.grn.effects import ScreenEffects
    from perturbzoo.grn.levels import Levels

# as in perturbzoo.grn.inference, which is not imported for --help
METHOD_NAMES = (
    "grn_ode",
    "lasso",
    "mra",
    "total_effect",
    "pearson",
    "spearman",
    "trees",
    "partial_correlation",
    "zscore",
    "zscore_direct",
    "interventional",
    "dag",
)


def main(arguments: Sequence[str]) -> None:
    """Infer a network from a screen, write it, and print what it rests on."""
    parser = argparse.ArgumentParser(
        prog="perturbzoo network",
        description="Infer a gene regulatory network from a screen. Writes a table with the columns regulator, target, weight, "
        "sign and probability, strongest edges first, and prints what the screen can say about them.",
    )
    parser.add_argument("--data", required=True, help="h5ad file of a screen")
    parser.add_argument("--method", default="lasso", choices=METHOD_NAMES, help="default: lasso")
    parser.add_argument("--output", required=True, help="table to write: .csv, .csv.gz or .parquet")
    parser.add_argument("--prior", help="network believed before, in any layout that perturbzoo reads")
    parser.add_argument(
        "--prior_use",
        default="weight",
        choices=["weight", "restrict"],
        help="weigh scores by the prior, or allow its edges only (default: weight)",
    )
    parser.add_argument(
        "--prior_strength", type=float, default=0.9, help="0: the prior does nothing; 1: as restrict (default: 0.9)"
    )
    parser.add_argument("--regulators", help="text file of genes that may regulate, one in each line (default: all)")
    parser.add_argument("--max_edges", type=int, help="write the strongest only")
    parser.add_argument(
        "--bootstraps",
        type=int,
        help="repetitions behind the probabilities (default: 20; 4 for grn_ode; none for trees, interventional and dag)",
    )
    parser.add_argument(
        "--resample",
        choices=["errors", "conditions"],
        help="what a repetition redraws: effects within their errors, or conditions (default: errors)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same table (default: 0)")
    parser.add_argument("--condition_key", help="obs column of perturbations (default: found)")
    parser.add_argument("--control_labels", nargs="+", default=[], help="spellings of control beyond the usual ones")
    parser.add_argument("--match_on", nargs="+", default=[], help="obs columns within whose levels controls are matched")
    parser.add_argument("--kind", help="kind of perturbation, such as interference (default: as obs says, else knockout)")
    parser.add_argument("--layer", help="layer of the values (default: X)")
    parser.add_argument("--min_cells", type=int, default=10, help="conditions with fewer cells are left out (default: 10)")
    options = parser.parse_args(arguments)

    from perturbzoo.data.reading import expand_path
    from perturbzoo.data.screen import Columns
    from perturbzoo.data.tables import read_text
    from perturbzoo.grn.inference import identifiability_report, infer_network, ranked_edges
    from perturbzoo.grn.network_tables import read_network_table, write_network_table

    output = expand_path(options.output)
    _check_output(output)
    prior = read_network_table(options.prior) if options.prior else None
    regulators = [line.strip() for line in read_text(options.regulators).splitlines()] if options.regulators else None
    effects, levels, said = read_effects(
        options.data,
        Columns(
            layer=options.layer,
            condition_key=options.condition_key,
            control_labels=options.control_labels,
            kind=options.kind,
            covariates=options.match_on,
            min_cells=options.min_cells,
        ),
    )
    network = infer_network(
        effects,
        options.method,
        levels=levels,
        prior=prior,
        prior_use=options.prior_use,
        prior_strength=options.prior_strength,
        regulators=regulators,
        max_edges=options.max_edges,
        bootstraps=options.bootstraps,
        resample=options.resample,
        seed=options.seed,
    )
    write_network_table(ranked_edges(network, options.method), output)
    print("\n".join([*said, "", str(identifiability_report(effects, network, prior)), "", f"network: {output}"]))


def read_effects(path: str | os.PathLike[str], wanted: Any = None) -> tuple[ScreenEffects, Levels, list[str]]:
    """Read a screen and average it.

    Parameters
    ----------
    path
        The h5ad file, counts or log1p-normalised. Counts are normalised to the median size factor first.
    wanted
        A :class:`perturbzoo.data.screen.Columns`; None: what can be detected is.

    Returns
    -------
    effects
        Changes against the controls of the same context, for each condition and context.
    levels
        The same on the linear scale.
    said
        Lines on what was understood.

    Raises
    ------
    PerturbZooError
        The file is no screen; see :func:`perturbzoo.data.screen.understand`.
    """
    import numpy as np

    from perturbzoo.data.h5ad import read_cells
    from perturbzoo.data.reading import normalise
    from perturbzoo.data.screen import Columns, understand
    from perturbzoo.grn.effects import ScreenEffects
    from perturbzoo.grn.levels import Levels

    columns = wanted or Columns()
    screen = understand(read_cells(path, columns.layer), columns, str(path), own=True)
    unit = None
    if screen.value_space == "counts":
        depth = float(np.median(screen.size_factor))
        normalise(screen.values, screen.size_factor, depth)
        unit = float((depth / screen.size_factor).mean())
    effects = ScreenEffects.from_cells(
        screen.values, screen.genes, screen.conditions, screen.condition, screen.context, default_kind=screen.kind
    )
    pairs, pair = screen.pairs()
    order = np.argsort(pair, kind="stable")
    members = np.split(order, np.searchsorted(pair[order], np.arange(len(pairs))))[1:]
    levels = Levels.from_cells(
        screen.values,
        screen.genes,
        [screen.conditions[condition] for condition, _ in pairs],
        np.array([context for _, context in pairs]),
        members,
        [np.flatnonzero(screen.is_control & (screen.context == context)) for context in range(len(screen.contexts))],
        unit=unit,
        default_kind=screen.kind,
    )
    return effects, levels, screen.report


def _check_output(output: Path) -> None:
    """Refuse before the work what could not be written after it."""
    if output.is_dir():
        raise PerturbZooError(f"--output {output} is a folder; name a file in it, such as {output / 'edges.csv'}")
    if not output.parent.is_dir():
        raise PerturbZooError(f"--output {output}: there is no folder {output.parent}; make it first")
    if not output.name.endswith((".csv", ".csv.gz", ".parquet")):
        raise PerturbZooError(f"--output {output}: the name must end in .csv, .csv.gz or .parquet")
