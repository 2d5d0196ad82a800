"""The marks on DREAM4: plain z-scores as published elsewhere, and what has to lie above them. Needs the data of `scripts/grn_references.py`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from perturbzoo.grn import infer_network, score_network

FOLDER = Path(os.environ.get("PERTURBZOO_DATA", "/nonexistent")) / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="real data: set PERTURBZOO_DATA to their folder")


@pytest.fixture(scope="module")
def references() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / "grn_references.py"
    spec = importlib.util.spec_from_file_location("grn_references", path)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("network", "mark"), [(1, 0.587), (2, 0.408)])
def test_plain_zscores_reach_the_mark_and_direct_ones_exceed_it(references, network, mark):
    reference = references.dream4(network)
    found = {
        method: score_network(
            infer_network(reference.effects, method, bootstraps=0), reference.truth, regulators=reference.regulators
        )
        for method in ("zscore", "zscore_direct")
    }
    assert found["zscore"].pairs == 9900
    assert found["zscore"].auprc == pytest.approx(mark, abs=5e-4)
    assert found["zscore_direct"].auprc > mark


def test_what_is_read(references):
    reference = references.dream4(1)
    assert len(reference.truth) == 176
    assert reference.effects.delta.shape == (200, 100)
    out, down = reference.effects.delta[:100], reference.effects.delta[100:]
    # a knockout leaves nothing of its gene, a knockdown half of it, up to noise
    assert np.median(np.diag(down) / np.diag(out)) == pytest.approx(0.5, abs=0.05)
    before, after = reference.effects.series.steps()
    assert before.shape == after.shape == (10 * 10, 100)
    assert len(references.dream4(1, "multifactorial").effects.conditions) == 100


def test_other_references_are_consistent(references):
    gsd, sergio = references.gsd(), references.sergio()
    assert (len(gsd.effects.genes), len(sergio.truth), sergio.effects.delta.shape) == (19, 137, (900, 100))
    np.testing.assert_allclose(gsd.effects.delta.mean(0), 0, atol=1e-9)
    dixit = references.dixit()
    assert len(dixit.effects.conditions) == 8
    assert set(dixit.regulators) <= set(dixit.effects.genes)
    # each target is lower in its own knockout
    assert all(
        dixit.effects.delta[row, dixit.effects.genes.index(str(one))] < 0 for row, one in enumerate(dixit.effects.conditions)
    )
