"""What a user asks to be predicted: conditions as text, a list or a table, and where."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import pandas as pd

from perturbzoo.data.reading import expand_path
from perturbzoo.errors import PerturbZooError, shortened
from perturbzoo.perturbation import Condition, parse_condition, parse_condition_list

Conditions: TypeAlias = str | os.PathLike[str] | Condition | Sequence[str | Condition] | pd.DataFrame


def read_conditions(
    conditions: Conditions, separator: str | None = None, control_labels: Sequence[str] = ()
) -> list[tuple[Condition, dict[str, str]]]:
    """Read conditions from ``"A+B,C"``, a list, a table, or the path of a CSV or TSV file.

    A table has a column ``condition``, maybe ``dose``, and any covariates of the model; an empty dose is the usual one, an
    empty covariate any level.

    Parameters
    ----------
    conditions
        What to read.
    separator, control_labels
        As in :func:`perturbzoo.perturbation.parse_condition`.

    Returns
    -------
    Each condition and the covariates that say where to predict it.
    """

    def parse(text: str, dose: str | None = None) -> Condition:
        return parse_condition(text, dose=dose, separator=separator, control_labels=control_labels)

    if isinstance(conditions, Condition):
        return [(conditions, {})]
    if isinstance(conditions, os.PathLike) or (isinstance(conditions, str) and conditions.endswith((".csv", ".tsv"))):
        conditions = _read_table(expand_path(conditions))
    if isinstance(conditions, str):
        return [(c, {}) for c in parse_condition_list(conditions, separator=separator, control_labels=control_labels)]
    if not isinstance(conditions, pd.DataFrame):
        return [(item if isinstance(item, Condition) else parse(item), {}) for item in conditions]
    if "condition" not in conditions.columns:
        raise PerturbZooError(f"conditions: the table has no column 'condition'; it has {shortened(conditions.columns)}")
    table = conditions.astype(object).where(conditions.notna(), "").astype(str)
    rows: list[dict[str, str]] = [{str(name): value.strip() for name, value in row.items()} for row in table.to_dict("records")]
    return [
        (
            parse(row["condition"], row.get("dose") or None),
            {name: value for name, value in row.items() if name not in ("condition", "dose") and value},
        )
        for row in rows
    ]


def _read_table(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise PerturbZooError(f"conditions: {file}: no such file")
    try:
        # 'NA' and 'None' are text here: only what is empty is missing
        return pd.read_csv(file, sep="\t" if file.suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PerturbZooError(f"conditions: {file} is no table with a column 'condition': {reason}") from error
