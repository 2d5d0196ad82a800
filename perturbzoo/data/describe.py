"""``perturbzoo data FILE``: what is in an h5ad file, everything that is wrong with it, and a data section to start from.

The same functions judge a file here and in the data module; here a refusal is written down and the reading goes on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from perturbzoo.data import columns
from perturbzoo.data.h5ad import Matrix, open_h5ad, read_tables, scan_matrix, value_elements
from perturbzoo.data.reading import LOG1P_MAXIMUM, check_unique, h5ad_file, value_problems
from perturbzoo.data.screen import Columns, read_labels
from perturbzoo.data.splits import make_split
from perturbzoo.errors import PerturbZooError, near_matches, shortened
from perturbzoo.perturbation import CONTROL_SPELLINGS, Condition, parse_condition, parse_conditions

Result = TypeVar("Result")

_MOST_LEVELS = 50  # a column with more is no covariate
_LIKE_CONTROL = re.compile(
    r"control|ctrl|non.?target|scramble|dmso|vehicle|untreated|unperturbed|unstim"
    r"|(?<![a-z])(nt|nc|neg|pbs|mock|wt|none|gfp|lacz|safe|aavs1|empty|luciferase)(?![a-z])",
    re.IGNORECASE,
)
_SEPARATORS = ("_", "|", "&", ",", "/", "-")
_DEPTH_COLUMN = re.compile(r"n_?counts?|ncount_.*|total_counts|.*n_umis?|umi_counts?|library_size", re.IGNORECASE)


@dataclass
class Report:
    """What is found, piece by piece.

    Attributes
    ----------
    where
        The file, as messages name it.
    lines
        Facts.
    stops, notes
        Problems: those with which a fit stops, and those it survives.
    settings, hints
        Arguments of the data module that this file needs, and commented lines on those it may want.
    """

    where: str
    lines: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)

    def say(self, topic: str, text: str) -> None:
        self.lines.append(f"{topic:<14}{text}")

    def attempt(self, function: Callable[..., Result], *arguments: Any, also: str = "", **options: Any) -> Result | None:
        """Call a function that may refuse; write down the refusal, and what `also` to say about it."""
        try:
            return function(*arguments, **options)
        except PerturbZooError as error:
            self.stops.append(str(error).removeprefix(self.where).lstrip(":, ") + also)
            return None

    def text(self) -> str:
        import yaml

        problems = [*(f"  ! {text}" for text in self.stops), *(f"  - {text}" for text in self.notes)]
        title = "problems (a fit stops at those with '!')" if problems else "problems      none found"
        section = {"data": {"class_path": "PerturbSeqDataModule", "init_args": self.settings}}
        dumped = yaml.safe_dump(section, sort_keys=False, allow_unicode=True, width=1000).rstrip()
        hints = [f"    # {hint}" for hint in self.hints]
        parts = [*self.lines, "", title, *problems, "", "data section to start from", dumped, *hints]
        return "\n".join(parts)


def describe(file: str) -> str:
    """Say what is in an h5ad file: cells, genes, conditions, covariates, values, every problem that is found, its fix.

    Parameters
    ----------
    file
        A path (``$VAR`` is expanded), or the name of a public data set of :data:`perturbzoo.data.public.DATASETS`, which
        is downloaded first.

    Returns
    -------
    Text of several lines, which ends with a data section for ``perturbzoo fit``.

    Raises
    ------
    PerturbZooError
        Nothing can be said: there is no such file, or it is no readable h5ad file.
    """
    from perturbzoo.data.public import DATASETS

    if file in DATASETS and not Path(file).exists():
        file = f"public:{file}"
    try:
        path = h5ad_file(file)
    except PerturbZooError as error:
        known = near_matches(file, DATASETS) if Path(file).name == file else ""
        raise PerturbZooError(f"{error}{known}") from error
    report = Report(where=str(path), settings={"path": file})
    with open_h5ad(path) as opened:
        obs, var = read_tables(opened)
        obs.index, var.index = obs.index.astype(str), var.index.astype(str)
        report.lines.append(f"{path}: {len(obs):,} cells x {len(var):,} genes")
        if not len(obs) or not len(var):
            report.stops.append("there is nothing to read")
        report.attempt(check_unique, obs.index, "cells", report.where)
        values = _values(report, opened, len(obs), len(var))
    genes = _genes(report, var)
    if values is not None:
        _size_factors(report, values, obs)
    labels = _conditions(report, obs, genes)
    if labels is not None:
        conditions, codes = labels
        counts = np.bincount(codes[codes >= 0], minlength=len(conditions))
        _sizes(report, conditions, counts)
        _targets(report, conditions, genes, var)
        usable = _covariates(report, obs, conditions, codes)
        _split(report, obs, conditions, usable)
    return report.text()


# ---------------------------------------------------------------------- values


def _values(report: Report, opened: Any, n_cells: int, n_genes: int) -> Matrix | None:
    """Look at X and the layers; return the one that a fit can use."""
    good: dict[str | None, Matrix] = {}
    problems: dict[str | None, list[str]] = {}
    for layer, element in value_elements(opened).items():
        name = "X" if layer is None else f"layer '{layer}'"
        try:
            matrix = scan_matrix(element, name)
        except PerturbZooError as error:
            report.say(name if layer is None else "layer", str(error))
            problems[layer] = [str(error)]
            continue
        problems[layer] = value_problems(matrix.found, None, name)
        if matrix.shape != (n_cells, n_genes):
            problems[layer].append(f"{name} has the shape {matrix.shape}, not that of obs and var ({n_cells}, {n_genes})")
        if not problems[layer]:
            good[layer] = matrix
        report.say("X" if layer is None else "layer", _evidence(matrix, layer, not problems[layer]))
    if "raw" in opened:
        report.say("raw", "there is one; adata.raw.to_adata() makes its values X")
    if None in good:
        if good[None].found.space == "log1p" and (counts := [n for n in good if n and good[n].found.space == "counts"]):
            report.hints.append(f"layer: {counts[0]}  # raw counts, for models of counts")
        return good[None]
    layers = [layer for layer in sorted(good, key=lambda layer: good[layer].found.space != "counts") if layer is not None]
    remedy = f"; layer: {layers[0]} can be used" if layers else ("; adata.raw may hold counts" if "raw" in opened else "")
    report.stops += [text + remedy for text in problems.get(None, ["X is missing"])]
    if not layers:
        return None
    report.settings["layer"] = layers[0]
    return good[layers[0]]


def _evidence(matrix: Matrix, layer: str | None, good: bool) -> str:
    """Storage, range and value space of a matrix, with what tells it."""
    found = matrix.found
    name = "" if layer is None else f"'{layer}': "
    text = f"{name}{matrix.storage}, {matrix.filled:.1%} filled, {found.smallest:g} to {found.largest:g}; "
    if not good:
        return text + "neither raw counts nor log1p-normalised"
    if found.space == "counts":
        return text + "raw counts (all are whole numbers)"
    return text + f"log1p-normalised (fractions, none reaches {LOG1P_MAXIMUM:g})"


def _size_factors(report: Report, values: Matrix, obs: pd.DataFrame) -> None:
    if values.found.space != "counts" or not len(values.totals):
        return
    low, median, high = np.quantile(values.totals, [0.05, 0.5, 0.95])
    report.say("size factors", f"total counts: median {median:,.0f}, 90 % of cells between {low:,.0f} and {high:,.0f}")
    if empty := int((values.totals <= 0).sum()):
        report.notes.append(f"{empty} cells have no count at all: they are left out, with a warning")
    for name in obs.columns:
        if _DEPTH_COLUMN.fullmatch(str(name)) and pd.api.types.is_numeric_dtype(obs[name]):
            depth = obs[name].median()
            if depth > 1.5 * median > 0:
                report.say("", f"obs['{name}']: median {depth:,.0f}, so it counted more genes than these")
                report.hints.append(f"size_factor_key: {name}  # median {depth:,.0f}")


# ---------------------------------------------------------------------- genes and conditions


def _genes(report: Report, var: pd.DataFrame) -> list[str]:
    """Gene names, from a column that names each gene once where the index does not."""
    if var.index.is_unique:
        return var.index.tolist()
    unique = [name for name in var.columns if _is_text(var[name]) and var[name].is_unique and not var[name].isna().any()]
    also = f"; gene_key: {unique[0]} names each gene once" if unique else ""
    report.attempt(check_unique, var.index, "genes", report.where, also=also)
    if not unique:
        return var.index.tolist()
    report.settings["gene_key"] = unique[0]
    return var[unique[0]].astype(str).tolist()


def _is_text(column: pd.Series) -> bool:
    return not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)


def _names_control(column: pd.Series) -> bool:
    return _is_text(column) and any(columns.is_control_label(column.astype(str).unique().tolist(), ()))


def _condition_column(report: Report, obs: pd.DataFrame) -> str | None:
    """The column that a fit would take, or else the one that comes nearest to naming conditions and controls."""
    key = report.attempt(columns.find_condition_column, obs, (), report.where)
    if key is not None:
        return key
    for name in obs.columns:
        if _names_control(obs[name]):
            report.stops[-1] += f"; condition_key: {name} names control cells"
            return str(name)
    usual = [name for name in columns.CONDITION_COLUMNS if name in obs.columns]
    for name in usual:
        if like := [label for label in obs[name].dropna().astype(str).unique().tolist() if _LIKE_CONTROL.search(label)]:
            report.stops[-1] += f"; obs['{name}'] holds {shortened(like)}: control_labels can name them if they are controls"
            report.settings["control_labels"] = like
            return name
    return usual[0] if usual else None


def _conditions(report: Report, obs: pd.DataFrame, genes: Sequence[str]) -> tuple[list[Condition], np.ndarray] | None:
    """Read the labels that can be read: distinct conditions, and each cell's index among them, -1 where there is none."""
    key = _condition_column(report, obs)
    if key is None:
        return None
    found = columns.find_kind(obs)
    kind = found or columns.DEFAULT_KIND
    report.settings.update(condition_key=key, kind=kind)
    controls = report.settings.get("control_labels", ())
    wanted = Columns(condition_key=key, control_labels=controls, separator=_separator(report, obs[key], set(genes)))
    labels = report.attempt(read_labels, obs, wanted, report.where, kind)
    if labels is not None:
        conditions, codes, _ = labels
    else:
        conditions, codes = _readable_labels(obs[key], wanted)
    is_control = np.array([condition.is_control for condition in conditions], dtype=bool)
    n_controls = int(is_control[codes[codes >= 0]].sum())
    single, combined = (sum(map(test, conditions)) for test in (lambda c: len(c) == 1, lambda c: len(c) > 1))
    report.say("conditions", f"obs['{key}']: {single} single, {combined} combined, {n_controls:,} control cells")
    others = [name for name in columns.CONDITION_COLUMNS if name != key and name in obs.columns and _names_control(obs[name])]
    if others:
        report.say("", f"control is also named in {shortened(others)}: condition_key decides")
    report.say("kind", f"{kind}, " + ("as obs says" if found else "assumed: no obs column says it"))
    if is_control.any() and is_control.all():
        report.stops.append(f"only control cells in obs['{key}']: nothing was perturbed")
    doses = [name for name in columns.DOSE_COLUMNS if name in obs.columns]
    if doses and kind in ("compound", "cytokine"):
        report.say("dose", f"obs['{doses[0]}']")
    elif doses:
        report.say("dose", f"obs['{doses[0]}'] is read only if it is named")
        report.hints.append(f"dose_key: {doses[0]}")
    return conditions, codes


def _readable_labels(labels: pd.Series, wanted: Columns) -> tuple[list[Condition], np.ndarray]:
    """Conditions and codes of the labels that can be read, without doses."""

    def reads(label: str) -> bool:
        try:
            parse_condition(label, separator=wanted.separator, control_labels=wanted.control_labels)
        except PerturbZooError:
            return False
        return True

    text = labels.astype(object).where(labels.notna(), None)
    good = {label for label in text.dropna().unique() if reads(label)}
    rows = np.flatnonzero(text.isin(good))
    codes = np.full(len(labels), -1, dtype=np.int64)
    conditions, codes[rows] = parse_conditions(
        text.iloc[rows].tolist(), separator=wanted.separator, control_labels=wanted.control_labels
    )
    return conditions, codes


def _separator(report: Report, labels: pd.Series, genes: set[str]) -> str | None:
    """What joins targets where it is not ``+`` or ``;``: it cuts a label into parts that are all labels or genes themselves."""
    distinct = labels.dropna().astype(str).unique().tolist()
    known = genes.union(distinct, CONTROL_SPELLINGS)
    for separator in _SEPARATORS:
        joined = [label for label in distinct if separator in label and known.issuperset(label.split(separator))]
        if joined:
            report.settings["separator"] = separator
            report.notes.append(
                f"{len(joined)} labels such as '{joined[0]}' look like combinations: unless separator is '{separator}', each is "
                "one target"
            )
            return separator
    return None


def _sizes(report: Report, conditions: list[Condition], counts: np.ndarray) -> None:
    """Largest and smallest conditions, and those that a fit leaves out."""
    sizes = sorted(
        ((int(n), str(condition)) for condition, n in zip(conditions, counts, strict=True) if not condition.is_control),
        key=lambda item: (-item[0], item[1]),
    )
    if not sizes:
        return
    report.say("most cells", ", ".join(f"{name} {n:,}" for n, name in sizes[:3]))
    report.say("fewest cells", ", ".join(f"{name} {n:,}" for n, name in sizes[-1:-4:-1]))
    least = Columns.min_cells
    small = [f"{name} {n}" for n, name in sizes if n < least]
    if len(small) == len(sizes):
        report.stops.append(f"no condition has {least} cells (the largest has {sizes[0][0]}): lower min_cells")
        report.settings["min_cells"] = sizes[-1][0]
    elif small:
        report.notes.append(
            f"{len(small)} conditions have fewer than {least} cells ({shortened(small)}): they are left out unless min_cells "
            "is lower"
        )


def _targets(report: Report, conditions: list[Condition], genes: Sequence[str], var: pd.DataFrame) -> None:
    """How many targets are measured, by which gene names."""
    targets = sorted({target for condition in conditions for target in condition.targets})
    if not targets:
        return
    measured = set(genes).intersection(targets)
    missing = [target for target in targets if target not in measured]
    text = f"{len(measured)} of {len(targets)} are among the genes"
    report.say("targets", f"{text}; not: {shortened(missing)}" if missing else text)
    better = {name: len(set(var[name].astype(str)).intersection(targets)) for name in var.columns if _is_text(var[name])}
    best = max(better, key=better.__getitem__, default=None)
    if best is None or better[best] <= len(measured):
        return
    report.notes.append(f"var['{best}'] names {better[best]} of the {len(targets)} targets, more than the gene names do")
    if var[best].is_unique:
        report.settings["gene_key"] = best


# ---------------------------------------------------------------------- covariates and splits


def _covariates(report: Report, obs: pd.DataFrame, conditions: list[Condition], codes: np.ndarray) -> list[str]:
    """Columns whose levels cut across conditions; returns those in whose every level controls can be matched."""
    is_control = np.array([*(condition.is_control for condition in conditions), False])[codes]
    usual = [name for name in columns.COVARIATE_COLUMNS if name in obs.columns]
    skipped = {report.settings.get("condition_key"), *columns.CONDITION_COLUMNS, *columns.DOSE_COLUMNS}
    usable = []
    for name in dict.fromkeys([*usual, *(str(name) for name in obs.columns if _is_text(obs[name]))]):
        if name in skipped or not 2 <= obs[name].nunique() <= _MOST_LEVELS:
            continue
        levels = obs[name].astype(str).to_numpy()
        table = pd.crosstab(levels, is_control).reindex(columns=[False, True], fill_value=0)
        if not ((table[False] > 0) & (table[True] > 0)).any():
            continue  # a property of the perturbation, such as its guide
        shown = [f"{level} {row[False] + row[True]:,} ({row[True]:,} controls)" for level, row in table.iterrows()]
        report.say("covariate", f"obs['{name}'], {len(table)} levels: {shortened(shown, 4)}")
        if n := int(obs[name].isna().sum()):
            report.notes.append(f"obs['{name}'] is missing in {n:,} cells, which would form a level 'nan'")
        bare = [str(level) for level, row in table.iterrows() if row[False] and not row[True]]
        if bare:
            report.notes.append(
                f"obs['{name}']: {len(bare)} of {len(table)} levels have no control cells ({shortened(bare)}): controls cannot be "
                f"matched on it; as a covariate it needs match_on without it, or a cell_filter such as {name} != {bare[0]}"
            )
        else:
            usable.append(name)
    report.hints += [f"covariates: [{name}]  # every level has control cells" for name in usable[:3]]
    return usable


def _split(report: Report, obs: pd.DataFrame, conditions: list[Condition], usable: Sequence[str]) -> None:
    """Whether the default split leaves conditions to train on and to test on, and one that does if not."""
    perturbed = [condition for condition in conditions if not condition.is_control]
    if not perturbed or len(perturbed) == len(conditions):
        return
    plain: list[tuple[Condition, str | None]] = [(condition, None) for condition in perturbed]
    if report.attempt(make_split, plain) is not None:
        return
    try:
        make_split(plain, method="random", seed=1)
        report.settings["split"] = {"method": "random", "seed": 1}
    except PerturbZooError:
        # one condition: what can be new is where it is applied
        for name in usable:
            level = str(obs[name].astype(str).value_counts().index[-1])
            report.settings.update(covariates=[name], split={"method": "unseen_context", "held_out": level})
            report.stops[-1] += f"; 'unseen_context' can hold out a level of {name}"
            return
