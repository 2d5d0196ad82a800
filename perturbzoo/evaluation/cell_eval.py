"""cell-eval2's profiles ``vcc2026`` and ``full``: predicted and observed cells in, its numbers per condition and over all out.

The definitions are that package's; here are what it needs to be told (which genes a condition targets, which engine tests genes)
and the rows that its scores must be read beside: two floors and a ceiling. Called by :mod:`perturbzoo.protocols`; no files.
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened
from perturbzoo.evaluation.native import NO_CHANGE, PERTURBED_MEAN, PREDICTION
from perturbzoo.evaluation.pseudobulk import assign_halves

if TYPE_CHECKING:
    from anndata import AnnData
    from cell_eval2 import EvalConfig

Profile = Literal["vcc2026", "full"]

CONDITION = "condition"
"""The obs column of conditions."""
CONTROL = "control"
"""Its label of control cells."""
DUPLICATE, CEILING, REPLICATE = "technical duplicate", "split-half ceiling", "replicate"
"""One half of the observed cells for the other; the same, taken to the size of the experiment by the package (`full`, where it has a
law for it) or the mean of five halvings (`vcc2026`)."""
N_SPLITS = 5
"""Halvings behind the replicate of ``vcc2026``, as the competition's rule has it."""

# of the metrics of genes tested one by one, these leave a condition's targets out
_WITHOUT_TARGETS = re.compile(r"de_wilcoxon_(direction_(fidelity|coverage|yield|reach)\w*|sig_jaccard|lfc_nmae)")
_OVER_CONDITIONS = "de_wilcoxon_nsig_spearman"  # one number, written beside every condition
_CHATTER = ("de.backend", "allow_fractional", "not scored", "omitted", "baseline:", "Ceiling", "scanpy DE", "build_constant")


@dataclass
class CellEvalScores:
    """What came out.

    Attributes
    ----------
    scores
        By who predicts (the prediction first, then floors and ceiling): one row per condition, in the index, one column per metric.
    totals
        By who predicts: metrics that are one number over all conditions; of ``split-half ceiling``, all that it has.
    rescaled
        ``vcc2026`` only: one row per scored metric with the columns metric, prediction, baseline (the mean response), replicate, and
        score, 0 at the one and 1 at the other; score is NaN where they are not apart. None: no replicate could be made.
    said
        What the user should know, one line each.
    """

    scores: dict[str, pd.DataFrame]
    totals: dict[str, dict[str, float]]
    rescaled: pd.DataFrame | None = None
    said: list[str] = field(default_factory=list)


def directions(profile: Profile) -> dict[str, bool]:
    """Whether higher is better, by name, of the metrics of a profile that are scores and not by-products of some."""
    from cell_eval2.catalog import CATALOG, PROFILES

    policies = {name: CATALOG[name].scoring for name in PROFILES[profile]}
    return {name: policy.direction == "higher" for name, policy in policies.items() if policy.scored}


def target_gene_map(targets: Mapping[str, Sequence[str]], genes: Sequence[str]) -> dict[str, str | None]:
    """The gene that cell-eval2 leaves out for each condition: it takes one name for a label.

    A single condition has its target, or none if it is not measured. Since the retrieval metrics leave out the genes of all
    conditions together, a combination has a target that no other condition brings in, where there is one.

    Parameters
    ----------
    targets
        Names of the targets of each condition.
    genes
        The measured genes.
    """
    from scipy.sparse.csgraph import maximum_bipartite_matching

    measured = set(genes)
    found = {condition: [name for name in names if name in measured] for condition, names in targets.items()}
    chosen: dict[str, str | None] = {condition: (names[0] if names else None) for condition, names in found.items()}
    several = [condition for condition, names in found.items() if len(names) > 1]
    there = {names[0] for names in found.values() if len(names) == 1}
    missing = sorted({name for condition in several for name in found[condition]} - there)
    if missing:
        could = np.array([[name in found[condition] for name in missing] for condition in several])
        match = maximum_bipartite_matching(sparse.csr_matrix(could), perm_type="column")
        chosen |= {condition: missing[at] for condition, at in zip(several, match.tolist(), strict=True) if at >= 0}
    return chosen


def config(profile: Profile, *, input_type: Literal["counts", "lognorm"], own_controls: bool = False) -> EvalConfig:
    """The competition's preset with a profile of metrics, our column and label, and a CPU engine if no GPU engine is there.

    Without that, cell-eval2 stops on a machine that has a GPU and no engine for it.
    """
    from cell_eval2 import EvalConfig

    preset = EvalConfig.from_preset("vcc2026" if profile == "vcc2026" else "v2")
    backend: Any = "auto" if find_spec("gpudge") else "pdex" if find_spec("pdex") else "scanpy"
    threads = preset.num_threads
    if backend == "pdex":
        from numba import config as numba_config

        # where it is set, pdex refuses the number of cores
        threads = numba_config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    return replace(
        preset,
        metrics=profile,
        pert_col=CONDITION,
        control=CONTROL,
        input_type=input_type,
        control_source="pred" if own_controls else "real",
        allow_fractional_counts=profile == "full",
        cache_strict=False,  # nothing is cached
        num_threads=threads,
        de=replace(preset.de, backend=backend),
    )


def score(
    predicted: AnnData,
    observed: AnnData,
    *,
    profile: Profile,
    targets: Mapping[str, Sequence[str]],
    input_type: Literal["counts", "lognorm"] = "counts",
    own_controls: bool = False,
    seed: int = 0,
) -> CellEvalScores:
    """Score the prediction, no change, the mean response and one half of the observed cells for the other.

    Parameters
    ----------
    predicted, observed
        Cells x the same genes, CSR; ``obs['condition']`` with the same labels on both sides, ``control`` among them.
    profile
        Which metrics.
    targets
        Names of the targets of each condition. Every metric that leaves out a condition's target leaves out all that are measured,
        save the errors of expression (``expr_*_unbiased*``, ``expr_distance_unbiased``), where the package has room for one.
    input_type
        ``"counts"``: whole counts, which `vcc2026` needs. ``"lognorm"``: log1p-normalised values.
    own_controls
        Changes are from each side's own controls.
    seed
        Of the floors' cells and of the halves. The five halvings of the replicate are those of the competition.

    Raises
    ------
    PerturbZooError
        Fewer than two conditions, a group of one cell, values that cell-eval2 refuses.
    """
    names = sorted(targets)
    _check(predicted, observed, names, profile, input_type)
    settings = config(profile, input_type=input_type, own_controls=own_controls)
    mapped = target_gene_map(targets, list(observed.var_names))
    if set(mapped.values()) >= set(observed.var_names):
        raise PerturbZooError(
            f"every measured gene is a target here, and the retrieval of {profile} leaves the targets of all conditions out: no gene is "
            "left; use native, which leaves out a condition's own"
        )
    settings = replace(settings, target_gene_map=mapped)
    genes = set(observed.var_names)
    further = {name: [target for target in targets[name] if target in genes and target != mapped[name]] for name in names}
    run = _Run(settings, {name: rest for name, rest in further.items() if rest})
    found = CellEvalScores({}, {})
    engine = settings.de.backend if settings.de.backend != "auto" else "gpudge"
    found.said.append(
        f"cell-eval2 {_version()}: profile {profile}, {input_type}, genes tested by Wilcoxon's rank sums of {engine}"
    )
    if input_type == "counts" and _has_fractions(predicted):
        found.said.append(
            "predicted counts have fractions: expected counts lack the noise of cells, which the tests of genes look at"
        )
    unmatched = {target for rest in further.values() for target in rest} - set(mapped.values())
    if unmatched:
        found.said.append(
            f"retrieval keeps {shortened(sorted(unmatched))}: cell-eval2 leaves out one target of a combination, and no other "
            "condition brings them in"
        )
    with _quiet() as messages:
        table, real = run(predicted, observed)
    found.said += [f"cell-eval2: {message}" for message in messages]
    _add(found, PREDICTION, table, settings, names)
    lost = {name: int(column.isna().sum()) for name, column in found.scores[PREDICTION].items()}
    lost |= {name: len(names) for name, value in found.totals[PREDICTION].items() if np.isnan(value)}
    if any(lost.values()):
        parts = [f"{name} ({n} of {len(names)})" for name, n in lost.items() if n]
        found.said.append(f"undefined for some conditions, such as those with too few genes that respond: {shortened(parts)}")
    with _quiet():
        for floor in (NO_CHANGE, PERTURBED_MEAN):
            emitted = _floor(floor, observed, settings, seed)
            table, _ = _Run(replace(settings, allow_fractional_counts=True), run.further)(emitted, observed, real)
            _add(found, floor, table, settings, names)
        halves = _halves(observed, seed)
        if halves is not None:
            # each half has controls of its own: shared ones would make the halves agree
            kept = {name: rest for name, rest in run.further.items() if name in set(halves[0].obs[CONDITION])}
            table, _ = _Run(replace(settings, control_source="pred"), kept)(*halves)
            _add(found, DUPLICATE, table, settings, names)
            if profile == "full":
                found.totals[CEILING] = _ceiling(observed, settings, seed)
    if halves is None:
        found.said.append("no ceilings: they need 4 observed cells of two conditions and of control")
    if profile == "vcc2026":
        found.rescaled = _rescaled(found, observed, settings)
    return found


@dataclass
class _Run:
    """One call of cell-eval2, and a second for combinations: the genes of their further targets left out of the tests."""

    settings: EvalConfig
    further: dict[str, list[str]]

    def __call__(self, predicted: AnnData, observed: AnnData, real: Any = None) -> tuple[Any, Any]:
        import polars as pl
        from cell_eval2 import compute_metrics

        # the tables of tests are handed over in files alone
        with tempfile.TemporaryDirectory() as folder:
            try:
                table = compute_metrics(
                    predicted, observed, config=replace(self.settings, outdir=folder), de_real=real, write_de=True
                )
            except ValueError as error:
                raise PerturbZooError(f"cell-eval2: {_first_sentence(error)}") from error
            tests = {side: pl.read_parquet(Path(folder) / f"de_{side}.parquet") for side in ("real", "pred")}
        if self.further:
            left_out = pl.DataFrame(
                [(name, target) for name, rest in self.further.items() for target in rest],
                schema=["target", "feature"],
                orient="row",
            )
            fewer = {side: frame.join(left_out, on=["target", "feature"], how="anti") for side, frame in tests.items()}
            again = [name for name in table["metric"].unique().to_list() if _WITHOUT_TARGETS.fullmatch(name)]
            settings = replace(self.settings, metrics=again)
            try:
                second = compute_metrics(predicted, observed, config=settings, de_real=fewer["real"], de_pred=fewer["pred"])
            except ValueError as error:
                raise PerturbZooError(f"cell-eval2: {_first_sentence(error)}") from error
            table = pl.concat([table.filter(~pl.col("metric").is_in(again)), second])
        return table, tests["real"]


def _add(found: CellEvalScores, who: str, table: Any, settings: EvalConfig, names: Sequence[str]) -> None:
    """From the package's long table to one row per condition, and what is over all conditions."""
    import polars as pl
    from cell_eval2 import aggregate_metrics
    from cell_eval2.run import metric_output_names

    order = metric_output_names(settings)
    frame = table.filter(pl.col("metric") != _OVER_CONDITIONS).to_pandas()
    wide = frame.pivot(index="perturbation", columns="metric", values="value").reindex(names)
    found.scores[who] = wide.reindex(columns=[name for name in order if name in wide]).rename_axis(index=None, columns=None)
    total = {}
    if _OVER_CONDITIONS in order:
        total[_OVER_CONDITIONS] = float(table.filter(pl.col("metric") == _OVER_CONDITIONS)["value"].mean())
    for name in order:
        if name not in wide and name not in total and name != _OVER_CONDITIONS:
            try:
                row = aggregate_metrics(table, metrics=[name]).filter(pl.col("metric") == name)
                total[name] = float(row["mean"][0]) if row.height else float("nan")
            except ValueError as error:
                # a ratio whose denominator, the effects that were observed, is none
                total[name] = float("nan")
                if who == PREDICTION:
                    found.said.append(f"cell-eval2: {_first_sentence(error).split(', so ')[0]}")
    found.totals[who] = total


def _floor(name: str, observed: AnnData, settings: EvalConfig, seed: int) -> AnnData:
    """Control cells for every condition: as they are, or with each gene scaled to its mean over conditions (the package's floor)."""
    import anndata
    from cell_eval2.baseline import GenericProfile, build_baseline_prediction, generic_response_profile

    linear = observed
    if settings.input_type == "lognorm":
        values = observed.X.copy()
        values.data = np.expm1(values.data)
        linear = anndata.AnnData(values, obs=observed.obs, var=observed.var)
    labels: dict[str, Any] = {"pert_col": CONDITION, "control": CONTROL}
    if name == NO_CHANGE:
        control = (observed.obs[CONDITION] == CONTROL).to_numpy()
        mean = np.asarray(linear.X[np.flatnonzero(control)].mean(axis=0)).ravel()
        profile = GenericProfile(mean, np.asarray(linear.var_names), len(set(observed.obs[CONDITION])) - 1, False, 0)
    else:
        mapped = settings.target_gene_map
        try:
            profile = generic_response_profile(linear, **labels, target_gene_map=mapped)
        except ValueError:  # every condition targets one gene: its mean is that of all of them
            profile = generic_response_profile(linear, **labels, exclude_target_gene=False)
    emitted = build_baseline_prediction(profile, linear, **labels, seed=seed)
    if settings.input_type == "lognorm":
        emitted.X.data = np.log1p(emitted.X.data)
    return emitted


def _halves(observed: AnnData, seed: int) -> tuple[AnnData, AnnData] | None:
    """Two halves of the cells of every condition that has 4, the first to predict the second."""
    label = observed.obs[CONDITION].astype(str).to_numpy()
    names, code, size = np.unique(label, return_inverse=True, return_counts=True)
    large = size >= 4
    if large.sum() < 3 or CONTROL not in names[large]:
        return None
    half = assign_halves(code, seed)
    first, second = (observed[large[code] & (half == side)].copy() for side in (0, 1))
    return first, second


def _ceiling(observed: AnnData, settings: EvalConfig, seed: int) -> dict[str, float]:
    """The package's ceiling, of those metrics that follow Spearman and Brown's law."""
    from cell_eval2 import compute_ceiling

    _, ceiling = compute_ceiling(observed, config=settings, seed=seed)
    values = zip(ceiling["metric"].to_list(), ceiling["ceiling"].to_list(), strict=True)
    return {name: float(value) for name, value in values if value is not None and np.isfinite(value)}


def _rescaled(found: CellEvalScores, observed: AnnData, settings: EvalConfig) -> pd.DataFrame | None:
    """Each scored metric between the mean response and a replicate, as the competition rescales it."""
    from cell_eval2.anchor import compute_replicate_anchor
    from cell_eval2.catalog import CATALOG
    from cell_eval2.scoring import is_degenerate, score_one

    members = [name for name in directions("vcc2026") if not np.isnan(_mean(found, PREDICTION, name))]
    replicate: dict[str, float] = {}
    while members and not replicate:
        try:
            with _quiet():
                _, anchor = compute_replicate_anchor(observed, config=replace(settings, metrics=members), n_splits=N_SPLITS)
            replicate = dict(zip(anchor["metric"].to_list(), anchor["replicate"].to_list(), strict=True))
        except ValueError as error:
            # one metric that is undefined in a half stops all of them: without it, the others have their replicate
            failed = [name for name in members if name.removeprefix("de_wilcoxon_") in str(error)]
            members = [name for name in members if name not in failed] if failed else []
    if not replicate:
        found.said.append("no rescaled scores: halves of the observed cells give no replicate of any metric")
        return None
    rows = []
    for name in directions("vcc2026"):
        mine, base = (_mean(found, who, name) for who in (PREDICTION, PERTURBED_MEAN))
        top = replicate.get(name, float("nan"))
        value = float("nan")
        try:
            policy = replace(CATALOG[name].scoring, anchor=top, allow_negative_baseline=False)
            if np.isfinite([mine, base]).all() and not is_degenerate(base, policy):
                value = score_one(mine, base, policy)
        except ValueError:
            pass  # a replicate that is no anchor for this metric: said below
        rows.append({"metric": name, "prediction": mine, "baseline": base, "replicate": top, "score": value})
    table = pd.DataFrame(rows)
    lost = table.loc[table["score"].isna(), "metric"].tolist()
    if lost:
        found.said.append(
            f"no rescaled score where a replicate is undefined or no better than the mean response: {shortened(lost)}"
        )
    return table


def _mean(found: CellEvalScores, who: str, metric: str) -> float:
    """What a metric is over all conditions."""
    return found.totals[who][metric] if metric in found.totals[who] else float(found.scores[who][metric].mean())


def _check(predicted: AnnData, observed: AnnData, names: Sequence[str], profile: str, input_type: str) -> None:
    """Refuse what cell-eval2 would stop at later, or answer with a number that means nothing."""
    if len(names) < 2:
        raise PerturbZooError(
            f"{profile} ranks conditions against each other and there is one alone ({shortened(names)}): use native"
        )
    for side, cells in (("predicted", predicted), ("observed", observed)):
        size = cells.obs[CONDITION].astype(str).value_counts()
        if CONTROL not in size:
            raise PerturbZooError(f"no {side} control cells: {profile} tests every gene against control")
        few = [name for name in (*names, CONTROL) if size.get(name, 0) < 2]
        if few:
            raise PerturbZooError(
                f"{side} as fewer than 2 cells: {shortened(few)}; {profile} tests genes between cells: predict cells, or use native"
            )
    if profile == "vcc2026":
        if input_type != "counts":
            raise PerturbZooError("vcc2026 scores raw counts, and these are log1p values: give counts, or use full")
        if _has_fractions(predicted):
            raise PerturbZooError(
                "vcc2026 scores whole counts, and predicted ones have fractions: draw whole ones cell by cell, or use full"
            )


def _has_fractions(cells: AnnData) -> bool:
    values = cells.X.data
    return bool((values != np.rint(values)).any())


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep the packages' progress and performance notes off the screen; yield what concerns the user, a line each."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = _first_sentence(record.getMessage())
            if record.levelno >= logging.WARNING and not any(part in record.getMessage() for part in _CHATTER):
                messages.extend([message] if message not in messages else [])

    logger, listener = logging.getLogger("cell_eval2"), Listener()
    propagate = logger.propagate
    logger.addHandler(listener)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", PerturbZooWarning)
            yield messages
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate


def _first_sentence(error: object) -> str:
    """What a long message says first, in one line."""
    text = " ".join(str(error).split())
    return re.split(r"(?<=[a-z)])[.;] (?=[A-Z(])", text, maxsplit=1)[0].rstrip(".")


def _version() -> str:
    from importlib.metadata import version

    return version("cell-eval2")
