"""``perturbzoo evaluate``: a file of predictions and a file of measured cells in, a table of scores out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perturbzoo.errors import PerturbZooError

if TYPE_CHECKING:
    import pandas as pd


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perturbzoo evaluate",
        description="Score any tool's predictions (State, GEARS, scGPT, CPA, ...) against measured cells: one row for each "
        "condition, and a printed summary beside two floors and a ceiling. docs/evaluation.md defines every metric.",
    )
    parser.add_argument("--predicted", required=True, help="h5ad file of predicted cells, or of one profile per condition")
    parser.add_argument("--observed", required=True, help="h5ad file of measured cells, control cells among them")
    parser.add_argument("--output", required=True, help="table to write: .csv, .csv.gz or .parquet")
    parser.add_argument("--summary", help="table to write of what is printed: .csv, .csv.gz or .parquet")
    parser.add_argument(
        "--protocol",
        default="native",
        choices=["native"],
        help="default and only one: native; vcc2026, full and calibrated (by cell-eval2 and scperteval) are not there yet",
    )
    parser.add_argument(
        "--reference",
        default="shared",
        choices=["shared", "own"],
        help="changes are from the observed controls on both sides, or each side's from its own, as in cell-eval 0.x "
        "(default: shared)",
    )
    parser.add_argument(
        "--training",
        help="h5ad file the model was trained on: for the perturbed mean and the categories (default: the mean of all "
        "perturbations in --observed)",
    )
    parser.add_argument("--condition_key", help="obs column of perturbations (default: found)")
    parser.add_argument("--predicted_condition_key", help="the same in --predicted, where it differs")
    parser.add_argument("--control_labels", nargs="+", default=[], help="spellings of control beyond the usual ones")
    parser.add_argument("--separator", help="what joins the targets of a combination beyond + and ;")
    parser.add_argument("--dose_key", help="obs column of doses")
    parser.add_argument(
        "--match_on", nargs="+", default=[], help="obs columns: conditions are scored within each of their levels"
    )
    parser.add_argument("--layer", help="layer of the observed values (default: X)")
    parser.add_argument("--predicted_layer", help="layer of the predicted values (default: X)")
    parser.add_argument("--gene_key", help="var column of gene names, in both files (default: the index)")
    parser.add_argument("--gene_table", help="table of symbols and Ensembl identifiers to translate gene names with")
    for side in ("predicted", "observed"):
        parser.add_argument(
            f"--{side}_space", choices=["counts", "log1p"], help=f"what the {side} values are (default: detected)"
        )
    parser.add_argument(
        "--depth", type=float, help="counts per cell to normalise to (default: as a file says, else the observed median)"
    )
    parser.add_argument(
        "--min_cells", type=int, default=2, help="conditions with fewer observed cells are left out (default: 2)"
    )
    parser.add_argument(
        "--max_cells",
        type=int,
        default=200,
        help="cells of each condition for distances between cells; 0: leave those metrics out (default: 200)",
    )
    parser.add_argument(
        "--pds",
        default="own_targets",
        choices=["own_targets", "vcc2026", "cell_eval"],
        help="rank over n - 1 without any target of a condition; without the targets of all conditions, as cell-eval2's preset "
        "vcc2026; or as cell-eval 0.x: over n, combinations keep their targets (default: own_targets)",
    )
    parser.add_argument(
        "--e_distance",
        default="u",
        choices=["u", "v"],
        help="unbiased, or the V-statistic of pertpy and cell-eval (default: u)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws of cells and halves (default: 0)")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Score, write the table and print the summary."""
    options = _parser().parse_args(arguments)
    for name in ("min_cells", "max_cells", "seed"):
        if getattr(options, name) < (1 if name == "min_cells" else 0):
            raise PerturbZooError(f"--{name} is {getattr(options, name)}: give {1 if name == 'min_cells' else 0} or more")
    if options.depth is not None and not options.depth > 0:
        raise PerturbZooError(f"--depth is {options.depth}: give a positive number of counts per cell")
    outputs = {name: _output(name, getattr(options, name)) for name in ("output", "summary") if getattr(options, name)}

    from dataclasses import replace

    from perturbzoo.data.screen import Columns
    from perturbzoo.evaluate import evaluate
    from perturbzoo.evaluation.summary import ALL, format_table
    from perturbzoo.evaluation.table import PRINTED

    columns = Columns(
        layer=options.layer,
        condition_key=options.condition_key,
        control_labels=options.control_labels,
        separator=options.separator,
        dose_key=options.dose_key,
        covariates=options.match_on,
        value_space=options.observed_space,
        gene_key=options.gene_key,
        gene_table=options.gene_table,
    )
    found = evaluate(
        options.predicted,
        options.observed,
        training=options.training,
        reference=options.reference,
        columns=columns,
        predicted_columns=replace(
            columns,
            layer=options.predicted_layer,
            condition_key=options.predicted_condition_key or options.condition_key,
            value_space=options.predicted_space,
        ),
        depth=options.depth,
        min_cells=options.min_cells,
        max_cells=options.max_cells,
        pds=options.pds,
        estimator=options.e_distance,
        seed=options.seed,
    )
    # before anything is printed: '| head' must not cost the table
    written = []
    for name, table in (("output", found.table), ("summary", found.summary)):
        if name in outputs:
            _write(table, outputs[name])
            written.append(f"{'per condition' if name == 'output' else name}: {outputs[name]}")
    shown = found.summary[found.summary["metric"].isin(PRINTED)]
    if shown["category"].nunique() == 2:
        shown = shown[shown["category"] == ALL]  # the one category says the same again
    print("\n".join([*found.said, "", format_table(shown), "", *written]))


def _output(name: str, given: str) -> Path:
    """Refuse before the work what could not be written after it."""
    from perturbzoo.data.reading import expand_path

    path = expand_path(given)
    if path.is_dir():
        raise PerturbZooError(f"--{name} {path} is a folder; name a file in it, such as {path / 'metrics.csv'}")
    if not path.parent.is_dir():
        raise PerturbZooError(f"--{name} {path}: there is no folder {path.parent}; make it first")
    if not path.name.endswith((".csv", ".csv.gz", ".parquet")):
        raise PerturbZooError(f"--{name} {path}: the name must end in .csv, .csv.gz or .parquet")
    return path


def _write(table: pd.DataFrame, path: Path) -> None:
    """Write the whole table or nothing."""
    unfinished = path.with_name(f".unfinished.{path.name}")
    try:
        if path.suffix == ".parquet":
            table.to_parquet(unfinished, index=False)
        else:
            table.to_csv(unfinished, index=False)
        unfinished.replace(path)
    except OSError as error:
        raise PerturbZooError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
