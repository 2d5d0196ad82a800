"""What the files of both simulators say beside the cells: the noise-free answer, and a gene-to-term table like Gene Ontology's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from perturbzoo.errors import PerturbZooError, near_matches

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbzoo.grn import GeneRegulatoryNetwork


def truth_frame(
    adata: AnnData,
    what: Literal["delta", "expression", "latent", "level", "fixed_point"] = "delta",
    cell_type: str | None = None,
) -> pd.DataFrame:
    """The simulated screen's noise-free answer, conditions x genes.

    Parameters
    ----------
    adata
        What :func:`perturbzoo.simulate.simulate_screen` or :func:`perturbzoo.simulate.simulate_linear` returned; may have lost
        genes and cells since.
    what
        ``"delta"``: expression less that of control, log1p-normalised; ``"expression"``, log1p-normalised; ``"latent"``: change
        of the log rate (linear) or log level (network) against control, natural log. Of networks only: ``"level"``, at the
        last harvest, and ``"fixed_point"``, the stable steady state (NaN where there is none), 1 being the reference of a typical
        gene.
    cell_type
        The context; needed where there are several. Latent effects of linear screens are the same in all.

    Raises
    ------
    PerturbZooError
        The file was not simulated here, or not so; the context is missing or unknown.
    """
    truth = _simulated(adata, "truth")
    cell_types = [str(name) for name in truth["cell_type"]]
    stored = {"delta": "expression", "latent": "latent" if "latent" in truth else "effect"}.get(what, what)
    if stored not in truth:
        raise PerturbZooError(f"uns['truth'] has no '{stored}': only screens of simulate_screen have it")
    values = np.asarray(truth[stored])
    if values.ndim == 3:
        if cell_type is None and len(cell_types) > 1:
            raise PerturbZooError(f"cell_type is missing: the screen has {', '.join(cell_types)}; name one")
        name = cell_types[0] if cell_type is None else cell_type
        if name not in cell_types:
            raise PerturbZooError(
                f"cell_type '{name}' was not simulated{near_matches(name, cell_types)}; there are {', '.join(cell_types)}"
            )
        values = values[cell_types.index(name)]
    frame = pd.DataFrame(values, index=truth["condition"], columns=truth["gene"])
    return frame - frame.iloc[0] if what == "delta" else frame


def write_go_table(adata: AnnData, path: str | os.PathLike[str]) -> Path:
    """Write the simulated gene-to-term table as CSV with the columns ``gene,term``, and return its path.

    Raises
    ------
    PerturbZooError
        The file was not simulated here, or the folder cannot be written.
    """
    destination = Path(path)
    unfinished = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    table = _simulated(adata, "go")
    try:
        table.to_csv(unfinished, index=False)
        unfinished.replace(destination)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise PerturbZooError(f"cannot write the GO table to '{destination}': {error.strerror}") from error
    return destination


def annotate_network(network: GeneRegulatoryNetwork, rng: np.random.Generator) -> pd.DataFrame:
    """Make a gene-to-term table from which something can be learned about genes nobody perturbed.

    Genes with a common regulator share the term ``under_REGULATOR``; regulators that act on one gene in the same direction share
    ``activates_GENE`` or ``represses_GENE``. A tenth of these is missing, a tenth of the genes has somebody else's term instead, and
    every gene has one term or more that mean nothing, of about eight genes each.

    Returns
    -------
    pandas.DataFrame
        Columns ``gene``, ``term``.
    """
    names = np.array(network.genes)
    acts = np.where(network.weight > 0, "activates_", "represses_")
    true = pd.DataFrame(
        {
            "gene": np.r_[names[network.target], names[network.regulator]],
            "term": np.r_[np.char.add("under_", names[network.regulator]), np.char.add(acts, names[network.target])],
        }
    )
    wrong = names[(rng.random(len(names)) < 0.1) & (len(true) > 0)]
    borrowed = pd.DataFrame({"gene": wrong, "term": true["term"].to_numpy()[rng.integers(max(1, len(true)), size=len(wrong))]})
    true = true[rng.random(len(true)) >= 0.1]
    noted = np.repeat(names, 1 + rng.poisson(1, len(names)))
    number = rng.integers(max(1, len(noted) // 8), size=len(noted))
    unrelated = pd.DataFrame({"gene": noted, "term": [f"unrelated{one + 1:04d}" for one in number]})
    table = pd.concat([true, borrowed, unrelated])
    return table.drop_duplicates().sort_values(["gene", "term"], ignore_index=True)


def _simulated(adata: AnnData, key: str) -> Any:
    if key not in adata.uns:
        raise PerturbZooError(f"uns['{key}'] is missing: only simulated files have it")
    return adata.uns[key]
