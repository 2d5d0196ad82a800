"""One screen from one or several h5ad files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pandas as pd

from perturbzoo.data.h5ad import read_cells
from perturbzoo.data.reading import check_unique, detect_value_space, name_of_values, values_as_csr
from perturbzoo.data.screen import Columns, Screen, gene_names, understand
from perturbzoo.errors import PerturbZooError

Join = Literal["intersection", "union"]


def read_files(paths: Sequence[str], join: Join, wanted: Columns) -> Screen:
    """Read h5ad files as one screen.

    Parameters
    ----------
    paths
        h5ad files; ``$VAR`` is expanded.
    join
        Genes to keep where there are several files: those common to all (intersection), or all (union; absent genes
        count as 0). obs columns likewise.
    wanted
        How to read the columns, the same for all files. Genes are named by ``gene_key`` and ``gene_table`` before they are
        joined.

    Returns
    -------
    Screen
        The cells of all files; with several, those of the second are called ``<name>-1``, and its report says how the
        genes were joined.

    Raises
    ------
    PerturbZooError
        A file cannot be read or used (see :func:`perturbzoo.data.screen.understand`); the files share no gene, or hold
        different kinds of values.
    """
    if len(paths) == 1:
        return understand(read_cells(paths[0], wanted.layer), wanted, paths[0], own=True)
    if join not in ("intersection", "union"):
        raise PerturbZooError(f"join is '{join}': give 'intersection' or 'union'")
    import anndata

    parts, spaces = [], []
    for path in paths:
        adata = read_cells(path, wanted.layer)
        check_unique(adata.obs_names, "cells", path)
        values = values_as_csr(adata, wanted.layer, path)
        # log1p values and small counts together would pass for log1p values
        spaces.append(detect_value_space(values, wanted.value_space, path, name_of_values(wanted.layer)))
        if spaces[-1] != spaces[0]:
            raise PerturbZooError(
                f"{path} holds {spaces[-1]} values, {paths[0]} {spaces[0]}: files that are read together must agree; "
                "'layer' can name raw counts where all of them have a layer for these"
            )
        parts.append(anndata.AnnData(values, obs=adata.obs, var=pd.DataFrame(index=gene_names(adata, wanted, path))))
    joined = anndata.concat(
        parts,
        join="inner" if join == "intersection" else "outer",
        fill_value=0,
        index_unique="-",
        keys=[str(number) for number in range(len(parts))],
    )
    if joined.n_vars == 0:
        raise PerturbZooError("the files share no gene: are the identifiers of the same kind? (gene_key names a var column)")
    sizes = ", ".join(str(part.n_vars) for part in parts)
    parts.clear()
    read = replace(wanted, layer=None, gene_key=None, gene_table=None, value_space=spaces[0])
    screen = understand(joined, read, f"{len(paths)} files", own=True)
    screen.report.insert(1, f"{len(paths)} files with {sizes} genes: the {join} of {joined.n_vars} genes is used")
    return screen
