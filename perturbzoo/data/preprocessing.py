"""Choosing and ordering the genes of a screen, in place: from training cells, or as a trained model has them."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from perturbzoo.data.matching import fill_of, match_genes, matched_sizes
from perturbzoo.data.reading import normalise
from perturbzoo.data.screen import Screen, match_levels
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooError


def match_spec(screen: Screen, spec: DataSpec) -> None:
    """Read a screen as a trained model's: its genes, depth and covariate levels.

    Genes are matched and cells scaled as those of :func:`perturbzoo.data.query.read_query`; genes that the file lacks get the
    model's mean control expression.

    Parameters
    ----------
    screen
        Changed in place; raw counts become log1p-normalised.
    spec
        The model's.

    Raises
    ------
    PerturbZooError
        No gene in common, another value space, no size factors where the model had some.
    """
    if screen.value_space != spec.value_space:
        raise PerturbZooError(f"{screen.where} holds {screen.value_space} values, the model was trained on {spec.value_space}")
    matched, present = match_genes(screen.values, screen.genes, spec, screen.where, stacklevel=4)
    if spec.value_space == "counts":
        factors = matched_sizes(screen.values, matched, present, screen.obs, spec, screen.where)
        # a cell with counts of other genes only has none of these, whatever it is divided by
        screen.size_factor = np.where(factors > 0, factors, 1.0)
        normalise(matched, screen.size_factor, spec.depth)
    if not present.all():
        filled = sparse.csr_matrix(np.tile(fill_of(spec, present), (matched.shape[0], 1)))
        matched = sparse.csr_matrix(matched + filled)
    screen.values, screen.genes = sparse.csr_matrix(matched, dtype=np.float32), list(spec.genes)
    # the model's numbers of the levels, not those of this file; -1 for a level it never saw
    _, screen.covariate = match_levels(screen.obs, list(spec.covariates), screen.where, spec.covariates)


def keep_variable_genes(screen: Screen, training: np.ndarray, wanted: int) -> None:
    """Keep the most variable genes of the training cells, and every measured target.

    Parameters
    ----------
    screen
        Changed in place; its values must be log1p-normalised already.
    training
        Shape ``(cells,)``, bool: training and control cells.
    wanted
        Number of variable genes (scanpy's ``seurat`` flavour).
    """
    if wanted >= len(screen.genes):
        return
    import anndata
    import scanpy

    cells = anndata.AnnData(screen.values[training])
    scanpy.pp.highly_variable_genes(cells, n_top_genes=wanted, flavor="seurat")
    targets = {target for condition in screen.conditions for target in condition.targets}
    keep = cells.var["highly_variable"].to_numpy() | np.isin(screen.genes, list(targets))
    screen.report.append(f"genes: {wanted} most variable among training cells, {int(keep.sum())} with the measured targets")
    screen.values = screen.values[:, np.flatnonzero(keep)]
    screen.genes = [gene for gene, kept in zip(screen.genes, keep, strict=True) if kept]
