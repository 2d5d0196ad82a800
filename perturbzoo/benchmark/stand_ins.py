"""Small files of the same layout as the public ones, for where there is no internet: real cells where there are any, else simulated.

A stand-in has the obs and var columns, the spelling of labels and the value space of the file that it stands for, so that one data
configuration reads both. It is made once, into the cache folder. Called by :mod:`.experiment`; knows no model and no split.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbzoo.errors import PerturbZooError, near_matches

if TYPE_CHECKING:
    from anndata import AnnData

# compounds of Open Problems' screen, for names that are as awkward as its own
COMPOUNDS = (
    "Belinostat",
    "Dabrafenib",
    "Idelalisib",
    "Crizotinib",
    "Linagliptin",
    "Palbociclib",
    "Alvocidib",
    "LDN 193189",
    "R428",
    "Porcn Inhibitor III",
    "Nilotinib",
    "CEP-18770 (Delanzomib)",
    "ABT-199 (GDC-0199)",
    "Oprozomib (ONX 0912)",
    "YK 4-279",
    "MLN 2238",
    "FK 866",
    "TGX 221",
    "Vorinostat",
    "Scriptaid",
)
CELL_TYPES = ("B cells", "Myeloid cells", "NK cells", "T cells CD4+", "T cells CD8+", "T regulatory cells")
KANG_CELL_TYPES = {
    "B": "B cells",
    "CD4T": "CD4 T cells",
    "CD8T": "CD8 T cells",
    "CD14+Mono": "CD14+ Monocytes",
    "Dendritic": "Dendritic cells",
    "FCGR3A+Mono": "FCGR3A+ Monocytes",
    "NK": "NK cells",
}
NETWORKS = ("dorothea_human_ABC.tsv.gz", "trrust_human_from_dorothea.tsv.gz")


@dataclass(frozen=True)
class StandIn:
    """A file in the place of another.

    Attributes
    ----------
    path
        The h5ad file.
    note
        What is in it, for readers of the leaderboard.
    real
        Whether its cells were measured.
    graphs
        Sources of a graph between targets, as the data module takes them; none: the data configuration's own.
    """

    path: Path
    note: str
    real: bool
    graphs: list[dict[str, str]] = field(default_factory=list)


def stand_in(name: str) -> StandIn:
    """Return a stand-in, making its file if it is not in the cache yet.

    Parameters
    ----------
    name
        A key of :data:`STAND_INS`.

    Raises
    ------
    PerturbZooError
        There is no such stand-in, or the cache folder cannot be written.
    """
    if name not in STAND_INS:
        near = near_matches(name, STAND_INS) or ";"
        raise PerturbZooError(f"no stand-in '{name}'{near} there are {', '.join(STAND_INS)}")
    return STAND_INS[name]()


# ---------------------------------------------------------------------- one function for each layout


def norman() -> StandIn:
    """GEARS' layout of Norman et al. 2019: the subset of it, or simulated activation of singles and doubles."""
    if source := _real_file("norman2019_subset.h5ad"):
        path = _made("norman-real", lambda: _gears_layout(_read(source), "perturbation", "K562"))
        note = "real: 3,375 cells x 500 genes of Norman et al. 2019, 18 singles and 15 doubles; too few to rank models"
        return StandIn(path, note, True, _regulons())
    return _simulated_gears("norman", "activation", "K562", seed=1, n_singles=24, n_doubles=24)


def adamson() -> StandIn:
    """GEARS' layout of Adamson et al. 2016: simulated interference, singles."""
    return _simulated_gears("adamson", "interference", "K562", seed=2, n_singles=30)


def dixit() -> StandIn:
    """GEARS' layout of Dixit et al. 2016: the dendritic cells of the same paper, or simulated knockouts."""
    if source := _real_file("dixit2016_bmdc.h5ad"):
        path = _made("dixit-real", lambda: _gears_layout(_read(source, 3000), "perturbation", "BMDC"))
        note = "real: 3,000 mouse dendritic cells x 24 genes of Dixit et al. 2016, 8 knockouts; a layout, not a comparison"
        return StandIn(path, note, True)
    return _simulated_gears("dixit", "knockout", "K562", seed=3, n_singles=20)


def replogle_k562() -> StandIn:
    """GEARS' layout of Replogle et al. 2022, K562: simulated interference, singles."""
    return _simulated_gears("replogle_k562", "interference", "K562", seed=4, n_singles=40)


def replogle_rpe1() -> StandIn:
    """GEARS' layout of Replogle et al. 2022, RPE1: simulated interference, singles."""
    return _simulated_gears("replogle_rpe1", "interference", "RPE1", seed=5, n_singles=40)


def vcc2025() -> StandIn:
    """Training file of the Virtual Cell Challenge 2025: simulated interference in one line, counts."""

    def make() -> AnnData:
        return _challenge_layout(_simulate("interference", seed=6, n_singles=36), [])

    path = _made("vcc2025", make)
    return StandIn(path, _simulated_note(path), False, _terms(path))


def vcc2026() -> StandIn:
    """The task of the Virtual Cell Challenge 2026: four simulated lines of one network, all targets in each, counts."""

    def make() -> AnnData:
        lines = [f"context_{number + 1}" for number in range(4)]
        return _challenge_layout(_simulate("interference", seed=7, n_singles=24, contexts=4, cells_per_condition=30), lines)

    path = _made("vcc2026", make)
    return StandIn(path, f"{_simulated_note(path)}, four lines of one network", False, _terms(path))


def open_problems() -> StandIn:
    """Open Problems' layout: compounds, each of which represses one or two regulators, in six cell types, counts."""

    def make() -> AnnData:
        regulators = sorted(_network(seed=8).edges["regulator"].unique())
        # a second target for every third, so that some compounds do what two others do
        conditions = [
            regulators[k] if k % 3 else f"{regulators[k]}+{regulators[(k + 7) % len(COMPOUNDS)]}" for k in range(len(COMPOUNDS))
        ]
        adata = _simulate("interference", seed=8, conditions=conditions, contexts=len(CELL_TYPES), cells_per_condition=25)
        labels = dict(zip(_canonical(conditions), COMPOUNDS, strict=True))
        compound = adata.obs["perturbation"].astype(str).map({**labels, "control": "Dimethyl Sulfoxide"})
        position = adata.obs["cell_type"].astype(str).str.removeprefix("type").astype(int) - 1
        adata.obs = _columns(
            adata,
            sm_name=compound,
            cell_type=[CELL_TYPES[number] for number in position],
            donor_id=[f"Donor {number % 3 + 1}" for number in range(adata.n_obs)],
            dose_uM=[14.1 if name == "Dimethyl Sulfoxide" else 1.0 for name in compound],
            timepoint_hr=[24.0] * adata.n_obs,
            control=(compound == "Dimethyl Sulfoxide").tolist(),
        )
        return adata

    path = _made("open_problems", make)
    return StandIn(path, f"{_simulated_note(path)}, six cell types of one network", False)


def kang() -> StandIn:
    """pertpy's layout of Kang et al. 2018: 1,975 of its cells, or a simulated cytokine in seven cell types."""
    if source := _real_file("kang2018_pbmc_ifnb.h5ad"):

        def rename() -> AnnData:
            adata = _read(source)
            label = adata.obs["perturbation"].astype(str).map({"control": "ctrl", "IFN-beta": "stim"})
            adata.obs = _columns(adata, label=label, cell_type=adata.obs["cell_type"].astype(str).map(KANG_CELL_TYPES))
            return adata

        path = _made("kang-real", rename)
        return StandIn(path, "real: 1,975 cells x 6,998 genes of Kang et al. 2018, seven cell types", True)

    def make() -> AnnData:
        # a cytokine acts on several regulators at once
        regulators = sorted(_network(seed=9).edges["regulator"].unique())[:4]
        options = {"contexts": len(KANG_CELL_TYPES), "cells_per_condition": 80, "n_control": 80}
        adata = _simulate("activation", seed=9, conditions=["+".join(regulators)], **options)
        position = adata.obs["cell_type"].astype(str).str.removeprefix("type").astype(int) - 1
        names = list(KANG_CELL_TYPES.values())
        label = ["ctrl" if name == "control" else "stim" for name in adata.obs["perturbation"]]
        adata.obs = _columns(adata, label=label, cell_type=[names[number] for number in position])
        return adata

    path = _made("kang", make)
    return StandIn(path, f"{_simulated_note(path)}, seven cell types of one network", False)


STAND_INS: dict[str, Callable[[], StandIn]] = {
    maker.__name__: maker
    for maker in (norman, adamson, dixit, replogle_k562, replogle_rpe1, vcc2025, vcc2026, open_problems, kang)
}
"""Each by its name in configs/experiment."""


# ---------------------------------------------------------------------- layouts


def _gears_layout(adata: AnnData, column: str, line: str) -> AnnData:
    """As GEARS distributes screens: log1p values of 10,000 counts in X, counts in a layer, conditions such as ``A+ctrl``."""
    import numpy as np
    import scanpy as sc

    labels = adata.obs[column].astype(str)
    singles = sorted(label for label in set(labels) if label != "control" and "+" not in label)
    # the control on either side, as in Norman's
    spelling = {label: f"ctrl+{label}" if number % 2 else f"{label}+ctrl" for number, label in enumerate(singles)}
    condition = labels.map({"control": "ctrl", **spelling}).fillna(labels)
    laid = adata.copy()
    laid.layers.clear()
    laid.layers["counts"] = laid.X.copy()
    sc.pp.normalize_total(laid, target_sum=1e4)
    sc.pp.log1p(laid)
    laid.obs = _columns(
        laid,
        condition=condition,
        cell_type=[line] * laid.n_obs,
        dose_val=["1" if name == "ctrl" else "1+1" for name in condition],
        control=np.asarray(condition == "ctrl", dtype=int),
        condition_name=[f"{line}_{name}_{'1' if name == 'ctrl' else '1+1'}" for name in condition],
    )
    names = laid.var_names.astype(str)
    laid.var = laid.var.iloc[:, :0].assign(gene_name=names)
    # identifiers in the index, symbols in a column, as there
    laid.var_names = [f"ENSG{number:011d}" for number in range(laid.n_vars)]
    laid.uns = {}
    return laid


def _challenge_layout(adata: AnnData, contexts: Sequence[str]) -> AnnData:
    """As the Virtual Cell Challenge distributes screens: counts in X, ``target_gene`` and ``guide_id``."""
    target = adata.obs["perturbation"].astype(str).replace("control", "non-targeting")
    columns: dict[str, Any] = {"target_gene": target, "guide_id": adata.obs["guide"].astype(str)}
    if contexts:
        number = adata.obs["cell_type"].astype(str).str.removeprefix("type").astype(int) - 1
        columns["context"] = [contexts[position] for position in number]
    adata.obs = _columns(adata, **columns, batch=adata.obs["batch"].astype(str))
    adata.var = adata.var.assign(gene_id=[f"ENSG{number:011d}" for number in range(adata.n_vars)])
    return adata


def _columns(adata: AnnData, **columns: Any) -> Any:
    import pandas as pd

    return pd.DataFrame({name: list(values) for name, values in columns.items()}, index=adata.obs_names)


# ---------------------------------------------------------------------- simulation

_GENES = 120


def _network(seed: int) -> Any:
    from perturbzoo.simulate import random_network

    # as the embedded screen's: regulators of one module share targets, so that something can be learned about those nobody perturbed
    return random_network(_GENES, n_regulators=40, modules=4, sign_of="regulator", in_degree=4.0, seed=seed)


def _simulate(kind: Any, seed: int, **options: Any) -> AnnData:
    from perturbzoo.simulate import simulate_screen

    settings = {"depth_spread": 0.3, "cells_per_condition": 50, **options}
    settings.setdefault("n_control", 4 * settings["cells_per_condition"])
    adata = simulate_screen(_network(seed), kind=kind, seed=seed, **settings)
    # the same in the file of the terms alone: readers of the public layout know nothing of it
    adata.uns = {"go": adata.uns["go"]}
    adata.varp.clear()
    return adata


def _simulated_gears(name: str, kind: str, line: str, seed: int, **options: Any) -> StandIn:
    def make() -> AnnData:
        screen = _simulate(kind, seed, **options)
        laid = _gears_layout(screen, "perturbation", line)
        laid.uns["go"] = screen.uns["go"]
        return laid

    path = _made(name, make)
    return StandIn(path, _simulated_note(path), False, _terms(path))


def _canonical(conditions: Sequence[str]) -> list[str]:
    from perturbzoo.perturbation import parse_condition

    return [str(parse_condition(condition)) for condition in conditions]


def _simulated_note(path: Path) -> str:
    import h5py

    with h5py.File(path, "r") as file:
        cells, genes = (len(file[part][file[part].attrs["_index"]]) for part in ("obs", "var"))
    return f"simulated: {cells:,} cells x {genes} genes"


# ---------------------------------------------------------------------- files


def _real_file(name: str) -> Path | None:
    folder = os.environ.get("PERTURBZOO_DATA")
    path = Path(folder, name) if folder else None
    return path if path is not None and path.is_file() else None


def _read(path: Path, most: int | None = None) -> AnnData:
    """Read a screen of counts, or `most` of its cells, drawn at random."""
    import anndata
    import numpy as np

    adata = anndata.read_h5ad(path)
    if most is not None and adata.n_obs > most:
        adata = adata[np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:most])].copy()
    adata.layers.clear()
    return adata


def _regulons() -> list[dict[str, str]]:
    return [{"kind": "regulators", "path": f"$PERTURBZOO_DATA/networks/{name}"} for name in NETWORKS]


def _terms(path: Path) -> list[dict[str, str]]:
    return [{"kind": "go", "path": str(path.with_suffix(".go.csv"))}]


def _made(name: str, make: Callable[[], AnnData]) -> Path:
    """Path of the file of that name in the cache; it is made if it is not there, and whole where it is."""
    from perturbzoo import __version__
    from perturbzoo.data.h5ad_writer import new_h5ad
    from perturbzoo.data.public import cache_folder
    from perturbzoo.simulate import write_go_table

    # version and simulator are part of the name: another one makes another screen
    path = cache_folder() / f"stand_ins-{__version__}" / f"{name}.h5ad"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PerturbZooError(
            f"stand-in '{name}': cannot write to {path.parent}: {error.strerror or error}; name another folder with PERTURBZOO_CACHE"
        ) from error
    adata = make()
    if "go" in adata.uns:
        write_go_table(adata, path.with_suffix(".go.csv"))
        del adata.uns["go"]
    with new_h5ad(path) as writer:
        writer.start(adata)
    return path
