"""Files read in blocks: the same sums as from memory, whatever the layout and the size of a block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from perturbzoo.data import cell_blocks
from perturbzoo.data.cell_blocks import group_totals, open_cells, survey
from perturbzoo.data.screen import Columns
from perturbzoo.errors import PerturbZooError

LAYOUTS: dict[str, Callable[[Any], Any]] = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda x: x.toarray()}


@pytest.fixture(scope="module")
def adata(make_adata: Callable[..., Any]) -> Any:
    return make_adata(cells_per_condition=9, n_controls=20, contexts=("a", "b"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [40, 3000, 1 << 22])
def test_blocks_add_up(layout: str, block: int, adata: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_blocks, "_VALUES", block)
    stored = adata.copy()
    stored.X = LAYOUTS[layout](adata.X)
    stored.write_h5ad(tmp_path / "cells.h5ad")
    dense = adata.X.toarray().astype(np.float64)
    genes = ["G7", "G2", "G11"]
    columns = [adata.var_names.get_loc(gene) for gene in genes]
    generator = np.random.default_rng(0)
    group = generator.integers(-1, 4, adata.n_obs)
    scale = generator.random(adata.n_obs) + 0.5
    sampled = generator.permutation(adata.n_obs)[:7]
    expected = np.log1p(dense[:, columns] * scale[:, None])
    for source in (tmp_path / "cells.h5ad", stored):
        cells = open_cells(source, Columns(covariates=["context"]), name="cells").select(genes)
        assert cells.contexts == [("a",), ("b",)]
        found = survey(cells)
        np.testing.assert_allclose(found.totals, dense[:, columns].sum(axis=1))
        np.testing.assert_allclose(found.linear_totals, np.expm1(dense[:, columns]).sum(axis=1), rtol=1e-5)
        assert (found.found.whole, found.found.largest) == (True, dense[:, columns].max())
        totals = group_totals(cells, group, 5, scale, sampled)
        for number in range(5):
            mine = expected[group == number]
            assert totals.count[number] == len(mine)
            np.testing.assert_allclose(totals.total[number], mine.sum(axis=0), rtol=1e-5, atol=1e-9)
            np.testing.assert_allclose(totals.square[number], (mine**2).sum(axis=0), rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(totals.cells.rows(0, len(sampled)).toarray(), expected[sampled], rtol=1e-5)


def test_cells_that_are_not_finite_are_found(adata: Any) -> None:
    damaged = adata.copy()
    values = adata.X.toarray()
    values[3, 5], values[8, 0] = np.nan, np.inf
    for layout in LAYOUTS.values():
        damaged.X = layout(sparse.csr_matrix(values))
        found = survey(open_cells(damaged, Columns(), name="damaged"))
        assert np.flatnonzero(found.not_finite).tolist() == [3, 8]


def test_the_column_of_the_other_file_is_tried_first(adata: Any) -> None:
    predicted = adata[adata.obs["perturbation"] != "control"].copy()
    predicted.obs["condition"] = "something else"
    assert open_cells(predicted, Columns(), name="p", key_of_other="perturbation").condition_key == "perturbation"
    assert open_cells(predicted, Columns(condition_key="condition"), name="p").condition_key == "condition"
    with pytest.raises(PerturbZooError, match=r"p: no obs column that looks like a perturbation; it has context"):
        open_cells(AnnData(predicted.X, predicted.obs[["context"]]), Columns(), name="p")


def test_unreadable_values(adata: Any, tmp_path: Path) -> None:
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(PerturbZooError, match="no layer 'counts'"):
        open_cells(tmp_path / "cells.h5ad", Columns(layer="counts"), name="cells")
    (tmp_path / "half.h5ad").write_bytes((tmp_path / "cells.h5ad").read_bytes()[:3000])
    with pytest.raises(PerturbZooError, match=r"half\.h5ad: not a readable h5ad file"):
        open_cells(tmp_path / "half.h5ad", Columns(), name="cells")
    with pytest.raises(PerturbZooError, match="no such file"):
        open_cells(tmp_path / "gone.h5ad", Columns(), name="cells")
