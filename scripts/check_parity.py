"""Native metrics beside the same metrics of the packages that own them, on the same pair of files.

    python scripts/check_parity.py                       # simulated, and the Norman subset where PERTURBZOO_DATA has it
    python scripts/check_parity.py --csv parity.csv

One line for each metric and package: the largest absolute difference over conditions, and over how many conditions (where one side has
no number, the other has none). The prediction is the other half of a screen's cells, or another
draw of a simulation with weaker effects. Both sides get the same log1p values, so that nobody's normalisation takes part. Needs cell-eval2, scperteval,
scikit-learn and scipy. The V-statistic of pertpy's E-distance is scikit-learn's pairwise distances put together, since pertpy is not
needed for anything else.

Where a number differs on purpose:

- cell-eval2 knows one target of a label at most, here all of a combination's are left out of the PDS, of `de_jaccard` and of
  `de_lfc_nmae`: combinations are compared with ``pds="cell_eval"``, which leaves them in; then there is no gene called A+B.
- scperteval's centred protocols take the mean of the *other* perturbed cells, each condition with its own: it is given our reference
  (``center_on``), or its functions are. Its weights have a t of 0 where a gene varies on neither side, ours the clearest one.
- scperteval's MMD takes a bandwidth from each pair of samples, ours is the same for the whole table; its Sinkhorn distance is a root of
  another scale. Neither can be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse, stats
from sklearn.metrics import mean_absolute_error, mean_squared_error, pairwise_distances, r2_score
from sklearn.metrics.pairwise import cosine_similarity

from perturbzoo.data.screen import Columns
from perturbzoo.evaluate import Evaluation, evaluate
from perturbzoo.perturbation import parse_condition

CELL_EVAL = {
    "expr_mae": "mae",
    "expr_mse": "mse",
    "delta_mse": "mse",
    "delta_mae": "mae",
    "delta_pearson": "pearson_delta",
    "pds_l1": "pds_l1",
    "pds_l2": "pds_l2",
    "pds_cosine": "pds_cosine",
    **{
        f"de_wilcoxon_{metric}{k}": f"de_{metric}{k}"
        for metric in ("overlap", "precision")
        for k in ("", "_top50", "_top100", "_top200", "_top500")
    },
    "de_wilcoxon_nsig_counts_real": "de_n_significant_observed",
    "de_wilcoxon_nsig_counts_pred": "de_n_significant_predicted",
    "de_wilcoxon_sig_recall": "de_recall",
    "de_wilcoxon_sig_jaccard": "de_jaccard",
    "de_wilcoxon_direction_match": "de_direction_match",
    "de_wilcoxon_model_direction_match": "de_model_direction_match",
    "de_wilcoxon_lfc_spearman": "de_lfc_spearman",
    "de_wilcoxon_lfc_nmae": "de_lfc_nmae",
}
"""cell-eval2's names and ours."""

SCPERTEVAL = {
    "mse": "mse",
    "pearson": "pearson",
    "pearson_ctrl": "pearson_delta",
    "r2_ctrl": "r2_delta",
    "l2_heg_k": "l2_top1000",
    "nir": "centroid_accuracy",
    "wmse_exp2": "weighted_mse",
}
"""scperteval's protocols and ours."""


def parity(predicted: ad.AnnData, observed: ad.AnnData) -> pd.DataFrame:
    """Compare all packages on one pair: log1p values, ``obs["condition"]`` with ``control``.

    Returns
    -------
    Columns native, package, other, difference (largest absolute), conditions, agree (both have a number in the same conditions).
    """
    native = _native(predicted, observed)
    table = native.table.set_index("condition")
    lines = [
        *_cell_eval(table, predicted, observed, list(CELL_EVAL), "cell-eval2"),
        *_scperteval(table, predicted, observed),
        *_scipy(table, predicted, observed),
    ]
    for rule, scope in (("vcc2026", "panel"), ("cell_eval", "v1")):
        other = _native(predicted, observed, pds=rule, max_cells=0).table.set_index("condition")
        wanted = [name for name in CELL_EVAL if name.startswith("pds_")]
        lines += _cell_eval(other, predicted, observed, wanted, f"cell-eval2 ({scope})", scope)
    own = _native(predicted, observed, reference="own", max_cells=0).table.set_index("condition")
    lines += _cell_eval(own, predicted, observed, ["delta_pearson"], "cell-eval2 (own controls)", control_source="pred")
    return pd.DataFrame(lines, columns=["native", "package", "other", "difference", "conditions", "agree"])


def _native(predicted: ad.AnnData, observed: ad.AnnData, **options: str | int) -> Evaluation:
    everything = max(observed.n_obs, predicted.n_obs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate(
            predicted,
            observed,
            columns=Columns(condition_key="condition", value_space="log1p"),
            **{"max_cells": everything, "estimator": "v", **options},  # type: ignore[arg-type]
        )


def _line(native: str, package: str, other: str, mine: pd.Series, theirs: pd.Series) -> tuple[object, ...]:
    theirs = theirs.reindex(mine.index)
    both = mine.notna() & theirs.notna()
    difference = float((mine - theirs)[both].abs().max()) if both.any() else np.nan
    return native, package, other, difference, int(both.sum()), bool((mine.isna() == theirs.isna()).all())


def _cell_eval(
    table: pd.DataFrame,
    predicted: ad.AnnData,
    observed: ad.AnnData,
    names: list[str],
    label: str,
    scope: str = "row",
    control_source: str = "real",
) -> list[tuple[object, ...]]:
    """cell-eval2 on log1p values, tests by its backend scanpy, the numbers in float64."""
    import cell_eval2

    settings = cell_eval2.EvalConfig.v2()
    ranks = cell_eval2.DiscriminationParams(exclusion_scope="panel" if scope == "panel" else "row")
    if scope == "v1":
        ranks = cell_eval2.DiscriminationParams(exclusion_scope="row", rank_denominator="n")
    settings = dataclasses.replace(
        settings,
        metrics=names,
        pert_col="condition",
        control="control",
        control_source=control_source,
        input_type="lognorm",
        target_sum=None,
        max_counts_per_cell=1e9,
        num_threads=1,
        device="cpu",
        discrimination=ranks,
        filter=cell_eval2.FilterParams(filter_gene_min_cpm_cell=None),
        de=dataclasses.replace(settings.de, backend="scanpy"),
    )
    logging.getLogger("cell_eval2").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cell_eval2.compute_metrics(_double(predicted), _double(observed), config=settings).to_pandas()
    values = found.pivot(index="perturbation", columns="metric", values="value")
    lines, nothing = [], pd.Series(dtype=float)
    for name in names:
        kept = table.index
        if scope in ("row", "panel") and name.startswith(("pds_", "de_wilcoxon_sig_jaccard", "de_wilcoxon_lfc_nmae")):
            # a combination's targets: left out here, unknown there; other rows are compared with it as with any other
            kept = [label for label in kept if "+" not in label]
        lines.append(_line(CELL_EVAL[name], label, name, table.loc[kept, CELL_EVAL[name]], values.get(name, nothing)))
    return lines


def _scperteval(table: pd.DataFrame, predicted: ad.AnnData, observed: ad.AnnData) -> list[tuple[object, ...]]:
    """scperteval's protocols from end to end; where they are centred otherwise, or on principal components, its functions."""
    import scperteval
    from scperteval.blocks.de import de_ttest, mejia_weights
    from scperteval.protocols.metrics import energy_distance

    real, guess = (_double(side) for side in (observed, predicted))
    real.X, guess.X = real.X.toarray(), guess.X.toarray()
    p, o = ({name: side.X[(side.obs["condition"] == name).to_numpy()] for name in table.index} for side in (guess, real))
    reference = np.mean([cells.mean(axis=0) for cells in o.values()], axis=0)
    lines = []
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = scperteval.prepare(
            real,
            list(SCPERTEVAL),
            min_cells=2,
            subsample=real.n_obs,
            perturbation_key="condition",
            sources={"reference": reference},
        )
        pairs = [(other, native, None) for other, native in SCPERTEVAL.items()]
        for other, native, centre in [*pairs, ("pearson", "pearson_delta_perturbed_reference", "reference")]:
            found = scperteval.score(prepared, other, guess, center_on=centre).per_perturbation.set_index("perturbation")
            label = "scperteval" + (" (our reference)" if centre else "")
            lines.append(_line(native, label, other, table[native], found["score"].astype(float)))
        others = {name: np.concatenate([cells for other, cells in o.items() if other != name]) for name in o}
        weights = {name: mejia_weights(de_ttest(o[name], others[name]).statistic) for name in o}
    delta = {name: (o[name].mean(axis=0) - reference, p[name].mean(axis=0) - reference) for name in table.index}
    r2 = {name: r2_score(*delta[name]) for name in table.index}
    weighted = {name: r2_score(*delta[name], sample_weight=weights[name]) for name in table.index}
    energy = {name: energy_distance(o[name], p[name], None) for name in table.index}
    unbiased = _native(predicted, observed, estimator="u").table.set_index("condition")["e_distance"]
    return [
        *lines,
        _line("r2_delta_perturbed_reference", "scikit-learn", "r2_score", table["r2_delta_perturbed_reference"], pd.Series(r2)),
        _line(
            "weighted_r2_delta",
            "scperteval",
            "de_ttest, mejia_weights; r2_score",
            table["weighted_r2_delta"],
            pd.Series(weighted),
        ),
        _line("e_distance", "scperteval", "energy_distance", unbiased, pd.Series(energy)),
    ]


def _scipy(table: pd.DataFrame, predicted: ad.AnnData, observed: ad.AnnData) -> list[tuple[object, ...]]:
    """scipy's and scikit-learn's functions on the pseudobulks and cells."""
    cells = [
        {name: _double(side).X[(side.obs["condition"] == name).to_numpy()].toarray() for name in (*table.index, "control")}
        for side in (predicted, observed)
    ]
    p, o = ({name: block.mean(axis=0) for name, block in side.items()} for side in cells)
    c = o["control"]
    formulas = {
        ("mse", "scikit-learn", "mean_squared_error"): lambda n: mean_squared_error(o[n], p[n]),
        ("mae", "scikit-learn", "mean_absolute_error"): lambda n: mean_absolute_error(o[n], p[n]),
        ("r2_delta", "scikit-learn", "r2_score"): lambda n: r2_score(o[n] - c, p[n] - c),
        ("cosine_delta", "scikit-learn", "cosine_similarity"): lambda n: cosine_similarity([p[n] - c], [o[n] - c])[0, 0],
        ("pearson", "scipy", "pearsonr"): lambda n: stats.pearsonr(p[n], o[n])[0],
        ("pearson_delta", "scipy", "pearsonr"): lambda n: stats.pearsonr(p[n] - c, o[n] - c)[0],
        ("spearman_delta", "scipy", "spearmanr"): lambda n: stats.spearmanr(p[n] - c, o[n] - c)[0],
        ("e_distance", "scikit-learn (pertpy's formula)", "pairwise_distances"): lambda n: (
            2 * pairwise_distances(cells[0][n], cells[1][n]).mean()
            - pairwise_distances(cells[0][n]).mean()
            - pairwise_distances(cells[1][n]).mean()
        ),
        **{
            (f"log_p_{metric}", "scipy", function): (lambda n, score=score: score(*_log_p(cells, n)))
            for metric, function, score in (
                ("rmse", "mannwhitneyu", lambda x, y: np.sqrt(np.mean((x - y) ** 2))),
                ("mae", "mannwhitneyu", lambda x, y: np.abs(x - y).mean()),
                ("pearson", "mannwhitneyu, pearsonr", lambda x, y: stats.pearsonr(x, y)[0]),
                ("spearman", "mannwhitneyu, spearmanr", lambda x, y: stats.spearmanr(x, y)[0]),
            )
        },
    }
    return [
        _line(*names, table[names[0]], pd.Series({condition: formula(condition) for condition in table.index}))
        for names, formula in formulas.items()
    ]


def _log_p(cells: list[dict[str, np.ndarray]], name: str) -> list[np.ndarray]:
    """Open Problems' signed log p-values, gene by gene from scipy's test."""
    control = cells[1]["control"]
    logs = []
    for side in cells:
        p = stats.mannwhitneyu(side[name], control, axis=0, method="asymptotic", use_continuity=False).pvalue
        up = np.sign(np.expm1(side[name]).mean(axis=0) - np.expm1(control).mean(axis=0))
        logs.append(np.clip(-np.log10(np.where(np.isnan(p), 1.0, p)), 0, 4) * up)
    return logs


def _double(adata: ad.AnnData) -> ad.AnnData:
    copy = adata.copy()
    copy.X = sparse.csr_matrix(adata.X, dtype=np.float64)
    return copy


def simulated(n_conditions: int = 10, n_combinations: int = 4, n_genes: int = 300, n_cells: int = 40) -> list[ad.AnnData]:
    """A screen and another draw of it with weaker effects, log1p-normalised: targets are genes, some conditions are combinations."""
    generator = np.random.default_rng(0)
    base = generator.gamma(0.4, 3.0, n_genes)
    effects = {
        f"G{one}": np.where(generator.random(n_genes) < 0.2, generator.normal(0, 1.2, n_genes), 0)
        for one in range(n_conditions)
    }
    effects |= {f"G{one}+G{one + 1}": effects[f"G{one}"] + effects[f"G{one + 1}"] for one in range(n_combinations)}
    sides = []
    for strength in (0.6, 1.0):
        labels = np.repeat(["control", *effects], [4 * n_cells, *[n_cells] * len(effects)])
        change = np.array([strength * effects[name] if name in effects else np.zeros(n_genes) for name in labels])
        counts = generator.poisson(base * np.exp(change) * generator.gamma(8, 1 / 8, (len(labels), 1)))
        total = counts.sum(axis=1, keepdims=True)
        values = np.log1p(counts / total * np.median(total)).astype(np.float32)
        sides.append(_screen(sparse.csr_matrix(values), labels, [f"G{gene}" for gene in range(n_genes)]))
    return sides


def norman(file: Path) -> list[ad.AnnData]:
    """Two halves of the cells of each condition of the Norman subset, controls too."""
    whole = ad.read_h5ad(file)
    values, labels = sparse.csr_matrix(whole.layers["lognorm"], dtype=np.float32), whole.obs["condition"].astype(str)
    labels = np.array([name if name == "control" else str(parse_condition(name)) for name in labels])  # A+B, as we write them
    half = np.zeros(len(labels), dtype=int)
    order = np.lexsort((np.random.default_rng(0).random(len(labels)), labels))
    half[order] = np.arange(len(labels)) % 2
    return [_screen(values[half == one], labels[half == one], list(whole.var_names)) for one in (0, 1)]


def _screen(values: sparse.csr_matrix, labels: np.ndarray, genes: list[str]) -> ad.AnnData:
    obs = pd.DataFrame({"condition": labels}, index=[f"c{row}" for row in range(len(labels))])
    return ad.AnnData(values, obs, pd.DataFrame(index=genes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    pairs = {"simulated": simulated()}
    if folder := os.environ.get("PERTURBZOO_DATA"):
        pairs["Norman (subset)"] = norman(Path(folder) / "norman2019_subset.h5ad")
    tables = []
    for name, (predicted, observed) in pairs.items():
        table = parity(predicted, observed)
        tables.append(table.assign(data=name))
        print(
            f"\n{name}: {observed.n_obs} cells, {observed.n_vars} genes, {observed.obs['condition'].nunique() - 1} conditions"
        )
        print(table.to_string(index=False, formatters={"difference": "{:.1e}".format}))
        print(f"largest difference: {table['difference'].max():.1e}; numbers in the same conditions: {table['agree'].all()}")
    if arguments.csv is not None:
        pd.concat(tables).to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()
