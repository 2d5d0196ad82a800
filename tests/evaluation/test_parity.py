"""Every native metric that another package also has equals that package's number on the same pair of files."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from perturbzoo.evaluation.table import COUNTS, FILE_METRICS

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_parity.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    for package in ("cell_eval2", "scperteval"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("check_parity", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check(table: pd.DataFrame) -> None:
    assert set(table["native"]) <= {*FILE_METRICS, *COUNTS}
    apart = table[~(table["difference"] <= 1e-6) & (table["conditions"] > 0)]
    assert apart.empty, apart.to_string()
    assert table["agree"].all(), table[~table["agree"]].to_string()


def test_simulated(script: ModuleType) -> None:
    table = script.parity(*script.simulated())
    _check(table)
    # a metric without a number in any condition would agree with anything
    assert (table["conditions"] > 0).all(), table[table["conditions"] == 0].to_string()
    assert set(script.CELL_EVAL.values()) | set(script.SCPERTEVAL.values()) <= set(table["native"])


@pytest.mark.slow
def test_norman(script: ModuleType) -> None:
    folder = os.environ.get("PERTURBZOO_DATA")
    file = Path(folder or "", "norman2019_subset.h5ad")
    if not folder or not file.is_file():
        pytest.skip("PERTURBZOO_DATA does not name a folder with norman2019_subset.h5ad")
    _check(script.parity(*script.norman(file)))
