"""Rows gathered into buffers that are used again only when nobody holds them; batches and tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from perturbzoo.data.batch import PerturbationBatch, encode_conditions
from perturbzoo.data.source import BufferPool, CSRSource, gather_pairs
from perturbzoo.errors import PerturbZooError
from perturbzoo.perturbation import KINDS, parse_condition


@pytest.mark.parametrize(("n_cells", "n_genes", "n_rows"), [(40, 7, 25), (300, 2000, 700), (5, 1, 0)])
def test_gather_equals_slicing(n_cells: int, n_genes: int, n_rows: int) -> None:
    matrix = sparse.random(n_cells, n_genes, density=0.3, format="csr", dtype=np.float32, random_state=0)
    rows = np.random.default_rng(0).integers(0, n_cells, n_rows)
    out = np.full((n_rows, n_genes), np.nan, dtype=np.float32)
    CSRSource(matrix).gather(rows, out)
    np.testing.assert_array_equal(out, matrix.toarray()[rows])


def test_64_bit_indices_are_gathered_alike() -> None:
    matrix = sparse.random(40, 7, density=0.3, format="csr", dtype=np.float32, random_state=0)
    expected = matrix.toarray()[[3, 3, 39]]
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    out = np.full((3, 7), np.nan, dtype=np.float32)
    CSRSource(matrix).gather(np.array([3, 3, 39]), out)
    np.testing.assert_array_equal(out, expected)


def test_entries_stored_twice_are_added() -> None:
    matrix = sparse.csr_matrix((np.ones(3, dtype=np.float32), np.array([0, 0, 1]), np.array([0, 2, 3])), shape=(2, 2))
    out = np.empty((2, 2), dtype=np.float32)
    CSRSource(matrix).gather(np.array([0, 1]), out)
    np.testing.assert_array_equal(out, [[2, 0], [0, 1]])


def test_a_row_that_does_not_exist_is_refused() -> None:
    source = CSRSource(sparse.csr_matrix(np.eye(3, dtype=np.float32)))
    for row in (-1, 3):
        with pytest.raises(IndexError):
            source.gather(np.array([row]), np.empty((1, 3), dtype=np.float32))


def test_a_buffer_is_used_again_only_when_nobody_holds_it() -> None:
    source, pool = CSRSource(sparse.csr_matrix(np.diag(np.arange(1.0, 5.0)).astype(np.float32))), BufferPool(4)
    kept = [gather_pairs(source, pool, np.array([row, row]), 1) for row in range(4)]
    for row, (cells, _) in enumerate(kept):
        assert cells[0, row] == row + 1
    # a view of a view is enough to hold the memory
    view = kept[0][0][0, :1]
    kept.clear()
    addresses = set()
    for row in range(1, 4):
        cells, controls = gather_pairs(source, pool, np.array([row, row]), 1)
        addresses.add(cells.data_ptr())
        del cells, controls
    assert len(addresses) == 1
    assert view.data_ptr() not in addresses
    assert view[0] == 1.0


def _batch(counts: np.ndarray, size_factor: np.ndarray, depth: float) -> PerturbationBatch:
    expression = torch.from_numpy(np.log1p(counts / size_factor[:, None] * depth).astype(np.float32))
    table = encode_conditions([parse_condition("A"), parse_condition("B+A")], [0, 0], ["A", "B"], "knockout")
    factors = torch.from_numpy(size_factor.astype(np.float32))
    rows = torch.arange(len(counts))
    return PerturbationBatch(
        expression=expression,
        control=expression.clone(),
        row=rows % 2,
        table=table,
        context_control=torch.zeros(2, counts.shape[1]),
        size_factor=factors,
        control_size_factor=factors,
        covariates=torch.zeros(len(counts), 0, dtype=torch.int64),
        cell=rows,
        control_cell=rows,
        depth=depth,
    )


def test_counts_are_recovered_exactly() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (30, 20)) * rng.integers(0, 20000, (30, 20))
    batch = _batch(counts, rng.uniform(500, 40000, 30), 8000.0)
    np.testing.assert_array_equal(batch.counts.numpy(), counts)
    np.testing.assert_array_equal(batch.control_counts.numpy(), counts)


def test_counts_of_log_values_are_refused() -> None:
    with pytest.raises(PerturbZooError, match="raw counts"):
        _ = _batch(np.ones((2, 2)), np.ones(2), 0.0).counts


def test_condition_means_are_those_of_numpy() -> None:
    batch = _batch(np.arange(15.0).reshape(5, 3), np.ones(5), 1.0)
    values = torch.arange(15.0).reshape(5, 3)
    expected = np.stack([values.numpy()[0::2].mean(axis=0), values.numpy()[1::2].mean(axis=0)])
    np.testing.assert_allclose(batch.condition_means(values).numpy(), expected)
    assert batch.cells_per_pair().tolist() == [3, 2]


def test_conditions_are_encoded_with_padding() -> None:
    conditions = [parse_condition("B:activation@0.5[2,6]+A"), parse_condition("control"), parse_condition("A")]
    table = encode_conditions(conditions, [1, 0, -1], ["A", "B"], "knockout")
    assert table.targets.tolist() == [[0, 1], [-1, -1], [0, -1]]
    knockout, activation = KINDS.index("knockout"), KINDS.index("activation")
    assert table.kind.tolist() == [[knockout, activation], [-1, -1], [knockout, -1]]
    assert table.dose.tolist() == [[1.0, 0.5], [0.0, 0.0], [1.0, 0.0]]
    assert table.onset.tolist() == [[0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert table.offset[0].tolist() == [float("inf"), 6.0]
    assert table.context.tolist() == [1, 0, -1]
    assert table.present.tolist() == [[True, True], [False, False], [True, False]]
    with pytest.raises(PerturbZooError, match="'C' was never named"):
        encode_conditions([parse_condition("C")], [0], ["A", "B"], "knockout")
