"""Choosing and ordering the genes of a screen, in place: from training cells, or as a trained model has them."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from perturbzoo.data.screen import Screen, match_levels
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooError


def match_spec(screen: Screen, spec: DataSpec) -> None:
    """Bring genes and covariate levels into a model's order; genes the file lacks get the model's mean control expression.

    Parameters
    ----------
    screen
        Changed in place; its values must be log1p-normalised already.
    spec
        The model's.

    Raises
    ------
    PerturbZooError
        No gene in common, or another value space.
    """
    position = {gene: column for column, gene in enumerate(screen.genes)}
    present = [position[gene] for gene in spec.genes if gene in position]
    missing = [gene for gene in spec.genes if gene not in position]
    if not present:
        raise PerturbZooError(
            f"{screen.where}: none of its genes is among the model's {spec.n_genes}: are the identifiers of the same kind? "
            "(gene_key names a var column)"
        )
    if screen.value_space != spec.value_space:
        raise PerturbZooError(f"{screen.where} holds {screen.value_space} values, the model was trained on {spec.value_space}")
    values = screen.values[:, present]
    if missing:
        absent = np.array([gene not in position for gene in spec.genes])
        fill = np.tile(spec.control_mean.mean(axis=0)[absent], (values.shape[0], 1))
        values = sparse.hstack([values, sparse.csr_matrix(fill)], format="csr")
        back = np.argsort(np.concatenate([np.flatnonzero(~absent), np.flatnonzero(absent)]))
        values = values[:, back]
        screen.report.append(f"{len(missing)} of the model's {spec.n_genes} genes are missing: filled with its mean control")
    screen.values, screen.genes = sparse.csr_matrix(values, dtype=np.float32), list(spec.genes)
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
