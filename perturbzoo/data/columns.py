"""Finding out what the columns of ``adata.obs`` mean, for files of the usual makers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from perturbzoo.errors import PerturbZooError, near_matches, shortened
from perturbzoo.perturbation import parse_condition

# In order of preference. GEARS: condition; scPerturb, pertpy: perturbation; Virtual Cell Challenge and State: target_gene.
CONDITION_COLUMNS = (
    "condition",
    "perturbation",
    "perturbation_name",
    "target_gene",
    "gene_target",
    "target",
    "gene",
    "guide_identity",
    "treatment",
    "drug",
    "cytokine",
)
DOSE_COLUMNS = ("dose_value", "dose_val", "dose", "concentration")
TYPE_COLUMNS = ("perturbation_type", "perturbation_method", "modality", "kind")
COVARIATE_COLUMNS = ("cell_type", "cell_line", "celltype", "context", "batch", "gem_group", "stimulation", "replicate")

DEFAULT_KIND = "knockout"
KIND_OF_TYPE = {
    "crispr-ko": "knockout",
    "crispr": "knockout",
    "crispr-cas9": "knockout",
    "crispr knockout": "knockout",
    "knockout": "knockout",
    "ko": "knockout",
    "crispri": "interference",
    "interference": "interference",
    "rnai": "interference",
    "sirna": "interference",
    "shrna": "interference",
    "crispra": "activation",
    "activation": "activation",
    "overexpression": "overexpression",
    "orf": "overexpression",
    "clamp": "clamp",
    "drug": "compound",
    "drugs": "compound",
    "compound": "compound",
    "chemical": "compound",
    "cytokine": "cytokine",
    "cytokines": "cytokine",
}


def require_column(frame: pd.DataFrame, name: str, role: str, where: str, table: str = "obs") -> pd.Series:
    """Return ``frame[name]`` or say which columns there are instead.

    Parameters
    ----------
    role
        What the column was wanted for, and the argument that names it, for the message.
    where
        The file's name, for the message.
    table
        ``"obs"`` or ``"var"``, for the message.
    """
    if name not in frame.columns:
        near = near_matches(name, frame.columns) or ";"
        raise PerturbZooError(
            f"{where}: {table} has no column '{name}' ({role}){near} it has {shortened(frame.columns, 12) or 'none'}"
        )
    return frame[name]


def is_control_label(labels: Sequence[str], control_labels: Sequence[str]) -> list[bool]:
    """Say for each label whether it spells control."""

    def spells_control(label: str) -> bool:
        try:
            return parse_condition(label, control_labels=control_labels).is_control
        except PerturbZooError:
            return False

    return [spells_control(str(label)) for label in labels]


def find_condition_column(obs: pd.DataFrame, control_labels: Sequence[str], where: str) -> str:
    """Return the first usual column that holds a spelling of control.

    Raises
    ------
    PerturbZooError
        No usual column exists, or none of them names control cells.
    """
    present = [name for name in CONDITION_COLUMNS if name in obs.columns]
    for name in present:
        if any(is_control_label(obs[name].astype(str).unique().tolist(), control_labels)):
            return name
    if present:
        raise PerturbZooError(
            f"{where}: no control cells: none of the obs columns {shortened(present)} holds 'control', 'ctrl', 'NT' or "
            "'non-targeting'; name the column with condition_key and its control label with control_labels"
        )
    raise PerturbZooError(
        f"{where}: no obs column that looks like a perturbation; it has {shortened(obs.columns, 12) or 'none'}; name one with "
        "condition_key"
    )


def find_kind(obs: pd.DataFrame) -> str | None:
    """Read the kind of perturbation from a column such as ``perturbation_type``; None where nothing says it."""
    for name in TYPE_COLUMNS:
        if name in obs.columns:
            for value in obs[name].astype(str).str.lower().unique():
                if value.split("(")[0].strip() in KIND_OF_TYPE:
                    return KIND_OF_TYPE[value.split("(")[0].strip()]
    return None


def covariate_candidates(obs: pd.DataFrame) -> list[str]:
    """Usual covariate columns with two to fifty levels: what a user may want to match controls on."""
    return [name for name in COVARIATE_COLUMNS if name in obs.columns and 2 <= obs[name].nunique() <= 50]
