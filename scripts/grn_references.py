"""Networks and data that this package did not make, as what inference takes: effects, a truth, and the pairs to be asked about.

Files are those of `$PERTURBZOO_DATA/benchmarks` (and `dixit2016_bmdc.h5ad` beside that folder). Only `bench_grn_external.py` uses it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from perturbzoo.grn import GeneRegulatoryNetwork, Interventions, RegulatoryDynamics, ScreenEffects, integrate
from perturbzoo.grn.effects import TimeSeries
from perturbzoo.grn.levels import Levels
from perturbzoo.perturbation import Condition, Intervention, parse_condition
from perturbzoo.simulate import simulate_screen
from perturbzoo.simulate.networks import random_network

DREAM4 = [f"G{number}" for number in range(1, 101)]


@dataclass
class Reference:
    """One benchmark.

    Attributes
    ----------
    effects
        What the methods get, time series included where there are any.
    truth
        The true network, or the best known.
    regulators
        Candidates; None: the truth's.
    cells
        The single cells behind the effects, with ``obs["perturbation"]``, for methods that want them; None for bulk data.
    response
        Shape ``(K, G)``: production of each gene in the conditions of `effects` as far as unspliced RNA shows it; or None.
    note
        What the reader should know.
    levels
        The same on the linear scale, for kinetics; None where nobody was perturbed.
    """

    name: str
    effects: ScreenEffects
    truth: GeneRegulatoryNetwork
    regulators: tuple[str, ...] | None = None
    cells: anndata.AnnData | None = None
    response: np.ndarray | None = None
    note: str = ""
    halves: list[ScreenEffects] = field(default_factory=list)
    levels: Levels | None = None

    @property
    def candidates(self) -> tuple[str, ...]:
        return self.truth.regulators if self.regulators is None else self.regulators


def folder() -> Path:
    return Path(os.environ["PERTURBZOO_DATA"])


def dream4(network: int, data: str = "interventions") -> Reference:
    """Return DREAM4, 100 genes, network 1 or 2.

    Parameters
    ----------
    data
        ``"interventions"``: knockouts, knockdowns and time series, changes against the median over all steady states and first
        times, because most perturbations leave most genes alone (the one measurement of the wildtype is as noisy as any); errors
        are the median absolute deviations over the same. The truth is without signs: those of the file are no better than a coin.
        ``"multifactorial"``: only the steady states under small changes of all genes at once.
    """
    path = folder() / "benchmarks"
    edges = pd.read_csv(path / "dream4_size100_edges.csv.gz").query("network == @network")
    signed = edges.assign(sign=edges["sign"].map({"+": 1, "-": -1}))[["regulator", "target", "sign"]]
    truth = GeneRegulatoryNetwork.from_edges(signed, DREAM4)
    unsigned = GeneRegulatoryNetwork.from_edges(signed[["regulator", "target"]], DREAM4)
    steady = pd.read_csv(path / "dream4_size100_steady_state.csv.gz").query("network == @network")
    by_kind = {kind: part.set_index("perturbation")[DREAM4] for kind, part in steady.groupby("kind")}
    if data == "multifactorial":
        levels = by_kind["multifactorial"].to_numpy()
        effects = ScreenEffects(tuple(DREAM4), tuple(f"all{row}" for row in range(len(levels))), levels - levels.mean(0))
        return Reference(f"DREAM4 net {network}, multifactorial only", effects, unsigned, tuple(DREAM4))
    courses = pd.read_csv(path / "dream4_size100_timeseries.csv.gz").query("network == @network")
    times = np.unique(courses["Time"])
    series = np.stack([part.sort_values("Time")[DREAM4].to_numpy() for _, part in courses.groupby("series")])  # (S, T, G)
    out, down = by_kind["knockouts"].loc[DREAM4].to_numpy(), by_kind["knockdowns"].loc[DREAM4].to_numpy()
    still = np.concatenate([out, down, by_kind["wildtype"].to_numpy(), series[:, 0]])
    control = np.median(still, axis=0)
    noise = 1.4826 * np.median(np.abs(still - control), axis=0)
    signs = truth.matrix("sign").toarray()
    agrees = (signs == np.sign(control - out).T)[(np.abs(out - control).T > 0.15) & (signs != 0)]
    effects = ScreenEffects(
        tuple(DREAM4),
        (*(f"{gene}:knockout" for gene in DREAM4), *(f"{gene}:interference" for gene in DREAM4)),
        np.concatenate([out, down]) - control,
        np.tile(noise, (2 * len(DREAM4), 1)),
        # the disturbance ends half way, and nobody says on which third of the genes it acted
        series=TimeSeries(times, series - control, undisturbed_from=times[len(times) // 2]),
    )
    note = f"no signs: those of the file agree with {agrees.sum()} of the {len(agrees)} edges whose knockout moves the target by .15"
    levels = _bulk_levels(tuple(DREAM4), np.concatenate([out, down]), control, noise)
    return Reference(f"DREAM4 net {network}", effects, unsigned, tuple(DREAM4), note=note, levels=levels)


def dream4_like(number: int, kinetics: Literal["hill", "multiplicative"] = "hill") -> Reference:
    """Return networks of this package measured as DREAM4's were: what the recipe of `zscore_direct` was chosen on (numbers 0, 1, 2).

    100 genes, 40 of which may regulate, levels from .02 to .8 and lifetimes from 17 to 67 minutes; knockouts, knockdowns by half, and
    ten courses of 21 times in which a third of the genes is disturbed for the first 500 of 1,000 minutes. The noise of a level
    x has the standard deviation .082 √x, that of DREAM4's own data.
    """
    count, rng = 100, np.random.default_rng(100 + number)
    strength = (1.0, 3.0) if kinetics == "hill" else (0.6, 1.8)
    truth = random_network(count, n_regulators=40, in_degree=2.0, scale_free=0.7, strength=strength, seed=100 + number)
    level = np.exp(rng.normal(np.log(0.3), 0.9, count)).clip(0.02, 0.8)
    decay = rng.uniform(0.015, 0.06, count)
    dynamics = RegulatoryDynamics(truth, kinetics=kinetics, reference=level, decay=decay).requires_grad_(False)

    def levels(conditions: list[Condition], times: list[float]) -> np.ndarray:
        acts = Interventions.from_conditions(conditions, truth.genes)
        context = torch.zeros(len(conditions), dtype=torch.long)
        return integrate(dynamics.bind(acts, context), dynamics.control_state[context], times, step=2.0).numpy()

    def measured(clean: np.ndarray) -> np.ndarray:
        return np.maximum(clean + 0.082 * np.sqrt(clean) * rng.standard_normal(clean.shape), 0)

    steady = [
        levels([Condition([Intervention(gene, kind="interference", dose=dose)]) for gene in truth.genes], [0.0, 1500.0])[-1]
        for dose in (1.0, 0.5)
    ]
    disturbed = [
        Condition(
            Intervention(
                gene,
                kind="interference" if rng.random() < 0.5 else "activation",
                dose=float(rng.uniform(0.1, 0.9)),
                onset=0.0,
                offset=500.0,
            )
            for gene, hit in zip(truth.genes, rng.random(count) < 1 / 3, strict=True)
            if hit
        )
        for _ in range(10)
    ]
    times = np.arange(21) * 50.0
    courses = measured(levels(disturbed, times.tolist()).transpose(1, 0, 2))
    out, down = map(measured, steady)
    still = np.concatenate([out, down, courses[:, 0]])
    control = np.median(still, axis=0)
    effects = ScreenEffects(
        truth.genes,
        (*(f"{gene}:knockout" for gene in truth.genes), *(f"{gene}:interference" for gene in truth.genes)),
        np.concatenate([out, down]) - control,
        np.tile(1.4826 * np.median(np.abs(still - control), axis=0), (2 * count, 1)),
        series=TimeSeries(times, courses - control, undisturbed_from=500.0),
    )
    noise = 1.4826 * np.median(np.abs(still - control), axis=0)
    levels_seen = _bulk_levels(truth.genes, np.concatenate([out, down]), control, noise)
    return Reference(f"as DREAM4, {kinetics} network {number}", effects, truth, truth.genes, levels=levels_seen)


def _bulk_levels(genes: tuple[str, ...], level: np.ndarray, control: np.ndarray, noise: np.ndarray) -> Levels:
    """Knockouts, then knockdowns by half, in these data both of production; noise adds to a level, whatever its size."""
    conditions = [Condition([Intervention(gene, kind="interference", dose=dose)]) for dose in (1.0, 0.5) for gene in genes]
    # where little is left the noise is as large as the level
    error = noise / np.maximum(level, noise)
    base = np.maximum(control, 1e-3)
    return Levels(
        genes,
        tuple(conditions),
        np.zeros(len(conditions), dtype=np.int64),
        np.maximum(level, 0.5 * noise),
        base[None],
        error.clip(0.02),
        (noise / base / 10)[None].clip(0.005),
        "interference",
    )


def own_screen(seed: int, cells_per_condition: int) -> Reference:
    """Return one of this package's default screens: 50 genes, each under CRISPRi, Hill kinetics, cycles."""
    cells = simulate_screen(n_genes=50, cells_per_condition=cells_per_condition, seed=seed)
    genes = tuple(cells.var_names)
    truth = GeneRegulatoryNetwork.from_edges(cells.uns["network"], genes)
    effects, halves, levels = _from_cells(cells, "interference", seed)
    name = f"own screen, seed {seed}, {cells_per_condition} cells for each condition"
    return Reference(name, effects, truth, genes, cells, halves=halves, levels=levels)


def gsd() -> Reference:
    """Return BEELINE's gonadal sex determination: 2,000 unperturbed cells of 19 genes from a Boolean model."""
    cells = anndata.read_h5ad(folder() / "benchmarks" / "beeline_GSD_curated.h5ad")
    table = pd.read_csv(folder() / "benchmarks" / "beeline_GSD_edges.csv.gz")
    table = table.rename(columns={"Gene1": "regulator", "Gene2": "target"}).assign(sign=table["Type"].map({"+": 1, "-": -1}))
    truth = GeneRegulatoryNetwork.from_edges(
        table[["regulator", "target", "sign"]],
        list(cells.var_names),
        self_loops="drop",
        duplicates="strongest",
        contradictory="unknown",
    )
    return Reference("BEELINE GSD", _each_cell(cells, _dense(cells.X)), truth, cells=cells, note="unperturbed cells")


def sergio() -> Reference:
    """Return SERGIO's DS4: 900 unperturbed cells of three types on the way, 100 genes; spliced and unspliced."""
    cells = anndata.read_h5ad(folder() / "benchmarks" / "sergio_DS4_100G_dynamics_rep0.h5ad")
    table = pd.read_csv(folder() / "benchmarks" / "sergio_DS4_edges.csv.gz").rename(columns={"tf": "regulator"})
    truth = GeneRegulatoryNetwork.from_edges(table[["regulator", "target"]], list(cells.var_names), self_loops="drop")
    values = np.log1p(_dense(cells.layers["spliced"]))
    unspliced = np.log1p(_dense(cells.layers["unspliced"]))
    return Reference(
        "SERGIO DS4",
        _each_cell(cells, values),
        truth,
        cells=cells,
        response=unspliced - unspliced.mean(0),
        note="unperturbed cells; the truth has no signs",
    )


def phoenix(cells_per_condition: int = 50, seed: int = 0) -> Reference:
    """Return PHOENIX's G350, its edges, signs and Hill coefficients, under CRISPRi of each regulator in this package's simulator.

    The simulator has one half-activation for each regulator, its reference level, and a Hill coefficient of 2; an edge's own
    coefficient n becomes its weight.
    """
    table = pd.read_csv(folder() / "benchmarks" / "phoenix_G350_edge_properties.csv.gz")
    activates = table["activation"].astype(str) == "True"
    edges = pd.DataFrame(
        {"regulator": table["from"], "target": table["to"], "weight": np.where(activates, 1.0, -1.0) * table["n"]}
    )
    genes = pd.read_csv(folder() / "benchmarks" / "phoenix_G350_ode_functions.csv.gz")["node"].astype(str)
    truth = GeneRegulatoryNetwork.from_edges(
        edges, sorted(genes), self_loops="drop", duplicates="strongest", contradictory="drop"
    )
    cells = simulate_screen(truth, conditions=truth.regulators, cells_per_condition=cells_per_condition, seed=seed)
    effects, halves, levels = _from_cells(cells, "interference", seed)
    return Reference("PHOENIX G350, re-simulated", effects, truth, cells=cells, halves=halves, levels=levels)


def dixit(known: str = "trrust", seed: int = 0) -> Reference:
    """Return 8 knockouts in mouse dendritic cells, 24 transcription factors; `known` edges of TRRUST or DoRothEA, human names.

    Counts are not divided by the cell's total: of 24 genes alone it would make every gene move all others.
    """
    cells = anndata.read_h5ad(folder() / "dixit2016_bmdc.h5ad")
    names = {"trrust": "trrust_human_from_dorothea.tsv.gz", "dorothea": "dorothea_human_ABC.tsv.gz"}
    table = pd.read_csv(folder() / "networks" / names[known], sep="\t").rename(columns={"tf": "regulator"})
    mouse = {gene.upper(): gene for gene in cells.var_names}
    table = table.assign(regulator=table["regulator"].map(mouse), target=table["target"].map(mouse), sign=np.sign(table["mor"]))
    truth = GeneRegulatoryNetwork.from_edges(
        table.dropna(subset=["regulator", "target"])[["regulator", "target", "sign"]],
        list(cells.var_names),
        self_loops="drop",
        duplicates="strongest",
        contradictory="unknown",
    )
    effects, halves, levels = _from_cells(cells, "knockout", seed, normalised=False)
    perturbed = tuple(sorted({str(condition) for condition in effects.conditions}))
    return Reference(
        f"Dixit, edges of {known}", effects, truth, perturbed, cells, note="no truth: literature", halves=halves, levels=levels
    )


def _each_cell(cells: anndata.AnnData, values: np.ndarray) -> ScreenEffects:
    """Return unperturbed cells as if each were a condition of unknown cause, as changes from their mean."""
    return ScreenEffects(tuple(cells.var_names), tuple(f"cell{row}" for row in range(len(values))), values - values.mean(0))


def _from_cells(
    cells: anndata.AnnData, kind: str, seed: int, normalised: bool = True
) -> tuple[ScreenEffects, list[ScreenEffects], Levels]:
    """Effects of all cells, and of two random halves of them; levels of all."""
    values = _dense(cells.X)
    unit = 1.0
    if normalised:
        total = values.sum(1, keepdims=True)
        values = values / total * np.median(total)
        unit = float((np.median(total) / total).mean())
    values = np.log1p(values)
    labels = cells.obs["perturbation"].astype("category").cat
    codes, conditions = labels.codes.to_numpy(), list(map(str, labels.categories))
    half = np.zeros(len(codes), dtype=bool)
    rng = np.random.default_rng(seed)
    for code in np.unique(codes):
        members = rng.permutation(np.flatnonzero(codes == code))
        half[members[::2]] = True
    parts = [
        ScreenEffects.from_cells(values[rows], list(cells.var_names), conditions, codes[rows], default_kind=kind)
        for rows in (np.ones(len(codes), dtype=bool), half, ~half)
    ]
    named = [parse_condition(name) for name in conditions]
    used = [code for code, condition in enumerate(named) if not condition.is_control]
    (control,) = (code for code, condition in enumerate(named) if condition.is_control)
    levels = Levels.from_cells(
        sparse.csr_matrix(values),
        list(cells.var_names),
        [named[code] for code in used],
        np.zeros(len(used), dtype=np.int64),
        [np.flatnonzero(codes == code) for code in used],
        [np.flatnonzero(codes == control)],
        unit=unit,
        default_kind=kind,
    )
    return parts[0], parts[1:], levels


def _dense(values: object) -> np.ndarray:
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64)
