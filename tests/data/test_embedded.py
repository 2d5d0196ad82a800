"""The embedded data set: made once, read by the data module, and worth learning from."""

from __future__ import annotations

from pathlib import Path

import pytest

from perturbzoo import PerturbSeqDataModule
from perturbzoo.data.embedded import embedded_file
from perturbzoo.errors import PerturbZooError


def test_made_once_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERTURBZOO_CACHE", str(tmp_path))
    screen = embedded_file("screen.h5ad")
    written = screen.stat().st_mtime_ns
    assert embedded_file("go.csv").parent == screen.parent
    assert screen.stat().st_mtime_ns == written
    data = PerturbSeqDataModule(
        path="embedded:screen.h5ad",
        split={"method": "simulation", "seed": 1},
        perturbation_graph=[{"kind": "go", "path": "embedded:go.csv"}],
    )
    data.setup("fit")
    assert data.spec is not None
    assert data.spec.default_kind == "interference"
    assert len(data.spec.genes) == 200
    assert len(data.spec.targets) == 40
    # every category that a split can have
    summary = data.split.summary()
    assert all(category in summary for category in ("unseen_single", "combo_seen0", "combo_seen1", "combo_seen2"))


def test_unknown_file() -> None:
    with pytest.raises(
        PerturbZooError, match=r"embedded:x\.h5ad: there is no such file; the embedded data set has screen\.h5ad and"
    ):
        embedded_file("x.h5ad")
