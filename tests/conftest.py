"""Fixtures that several rooms share: a small screen with known effects."""

from __future__ import annotations

import os

# before anything imports torch: tests run beside each other, and threads that wait for a busy core cost more than they bring
os.environ.setdefault("OMP_NUM_THREADS", "1")
# numba, behind scanpy's choice of variable genes, would set the other back to all cores
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

if TYPE_CHECKING:
    from anndata import AnnData

# five singles, three doubles of them: every category of a split can be made from these
CONDITIONS = ("G0", "G1", "G2", "G3", "G4", "G0+G1", "G1+G2", "G3+G4")


def _make_adata(
    *,
    conditions: Sequence[str] = CONDITIONS,
    cells_per_condition: int = 40,
    n_controls: int = 80,
    n_genes: int = 30,
    contexts: Sequence[str] = (),
    seed: int = 0,
) -> AnnData:
    """Make a small Perturb-seq screen of raw counts.

    Counts are Poisson around ``library x exp(baseline of the context + sum of the effects of the targets)``: doubles are
    additive in log space, and each measured target's own gene falls by a factor of four.

    Parameters
    ----------
    conditions
        Labels such as ``"G0"`` and ``"G0+G1"``; a target that is no gene (``"X"``) is one that was not measured.
    cells_per_condition, n_controls
        Cells of each condition, and of control, in each context.
    n_genes
        Genes are called ``G0``, ``G1``, ...
    contexts
        Levels of the obs column ``context``, such as ``("a", "b")``, each with a baseline of its own; none: no column.
    seed
        Same seed, same screen.

    Returns
    -------
    AnnData
        ``X``: CSR float32 of whole numbers, about 150 counts per cell, no empty cell. ``obs['perturbation']``: the labels
        and ``control``. Cells ``cell0``, ``cell1``, ... in a shuffled order.
    """
    from anndata import AnnData

    generator = np.random.default_rng(seed)
    genes = [f"G{number}" for number in range(n_genes)]
    targets = sorted({target for label in conditions for target in label.split("+")})
    # effects first, so that they are the same whatever the numbers of cells and contexts
    effects = {target: generator.normal(0.0, 0.4, n_genes) for target in targets}
    for target in set(targets).intersection(genes):
        effects[target][genes.index(target)] = -np.log(4.0)
    rates, labels, levels = [], [], []
    for level in contexts or ("",):
        baseline = generator.normal(0.0, 0.5, n_genes)
        for label, cells in [("control", n_controls), *((label, cells_per_condition) for label in conditions)]:
            shift = sum((effects[target] for target in label.split("+") if target in effects), np.zeros(n_genes))
            library = 5.0 * generator.lognormal(0.0, 0.2, (cells, 1))
            rates.append(library * np.exp(baseline + shift))
            labels += [label] * cells
            levels += [level] * cells
    counts = generator.poisson(np.concatenate(rates)).astype(np.float32)
    order = generator.permutation(len(labels))
    obs = pd.DataFrame({"perturbation": np.array(labels)[order]}, index=[f"cell{number}" for number in range(len(labels))])
    if contexts:
        obs["context"] = np.array(levels)[order]
    return AnnData(sparse.csr_matrix(counts[order]), obs=obs, var=pd.DataFrame(index=genes))


@pytest.fixture(scope="session")
def make_adata() -> Callable[..., AnnData]:
    """The factory of small screens: ``make_adata(contexts=("a", "b"), seed=1)``; see :func:`_make_adata` for the arguments.

    A fixture of the session, so that fixtures of modules can use it too; each call makes a new AnnData.
    """
    return _make_adata
