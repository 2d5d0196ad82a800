"""The page says what the files say: numbers, names whatever is in them, gaps; and refuses what is no folder of ours in one line."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from folders import CEILING, CONDITIONS, FLOORS, STAND_IN, write_benchmark, write_run

from perturbzoo.cli import main
from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.summary import paired_difference
from perturbzoo.report import deltas as shown
from perturbzoo.report import write_report

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--",
    '"><img src=x onerror=alert(2)>',
    "a&b\u2028c",
    "Gène été",
    "[[script]]",
]


class _Page(HTMLParser):
    """Elements, and the text of the JSON and of the head."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: dict[str, str] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]
        self._inside = given.get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data

    @property
    def content(self) -> dict[str, Any]:
        return json.loads(self.texts["content"])


def _read(page: Path) -> _Page:
    return _Page(page.read_text(encoding="utf-8"))


def test_numbers_are_those_of_the_tables(tmp_path: Path) -> None:
    scores = write_run(tmp_path / "run")
    content = _read(write_report(tmp_path / "run")).content
    summary = pd.read_csv(tmp_path / "run" / "test" / "summary.csv")
    seen = 0
    for row in summary.itertuples():
        found = content["scores"][row.metric][row.category][row.model]
        assert found == [row.n, row.mean, row.low, row.high, None]
        seen += 1
    assert seen == 4 * 3 * (len(FLOORS) + 2)
    assert [row["kind"] for row in content["rows"]] == ["model", *["floor"] * len(FLOORS), "ceiling"]
    table = pd.read_csv(tmp_path / "run" / "test" / "conditions.csv").set_index(["model", "condition"])
    names = [metric["name"] for metric in content["deltas"]["metrics"]]
    for item in content["deltas"]["items"]:
        for source, values in zip(content["deltas"]["sources"], item["scores"], strict=True):
            given = table.loc[(source, item["condition"])]
            assert values == [given[name] if name in table else None for name in names]
    model, floor = scores["GEARS"], scores["Additive"]
    paired = paired_difference(model, floor).set_index(["category", "metric"]).loc[("all", "mse")]
    row = next(row for row in content["verdict"]["models"]["GEARS"] if row["metric"] == "mse")
    assert row["advantage"] == pytest.approx(-paired["difference"], abs=1e-15)


def test_changes_are_those_of_the_file(tmp_path: Path) -> None:
    import anndata

    write_run(tmp_path, contexts=("a", "b"))
    content = _read(write_report(tmp_path)).content["deltas"]
    file = anndata.read_h5ad(tmp_path / "test" / "deltas.h5ad")
    assert content["sources"] == ["GEARS", *FLOORS]
    assert [(item["condition"], item["context"]) for item in content["items"]] == list(
        zip(file.obs["condition"], file.obs["context"], strict=True)
    )
    for row, item in enumerate(content["items"]):
        genes = [content["genes"][index] for index in item["genes"]]
        assert genes == list(file.var_names)
        np.testing.assert_allclose(np.array(item["observed"]) / 1e4, file.X[row], atol=5.1e-5)
        np.testing.assert_allclose(np.array(item["predicted"][3]) / 1e4, file.layers["floor:Additive"][row], atol=5.1e-5)
        assert item["targets"] == item["condition"].split("+")


@pytest.mark.parametrize(("shift", "answer"), [(0.2, "Yes."), (0.0, "Not shown."), (-0.2, "No.")])
def test_the_first_sentence(tmp_path: Path, shift: float, answer: str) -> None:
    write_run(tmp_path, shift=shift)
    page = _read(write_report(tmp_path))
    assert page.texts["answer"] == answer
    assert "Additive" in page.texts["sentence"]
    if shift < 0:
        assert page.texts["sentence"].startswith("The floor Additive beats GEARS")
        assert (
            "behind on 3 (Pearson of delta, perturbed reference: Additive; Pearson of delta: Additive; "
            in page.texts["sentence"]
        )


def test_benchmark_with_several_splits_and_seeds(tmp_path: Path) -> None:
    rows = write_benchmark(tmp_path, {"Winner": 0.2, "Loser": -0.2})
    page = _read(write_report(tmp_path))
    content = page.content
    assert page.texts["answer"] == "Some do."
    said = page.texts["sentence"]
    assert said.startswith("1 of 2 models beat every floor on Pearson of delta: Winner.")
    assert "1 loses to one: Loser to Additive." in said
    assert "1 of 2 models beat every floor on Pearson of delta, perturbed reference: Winner." in said
    note = f"A stand-in, not the public file of this experiment: {STAND_IN}"
    assert content["about"]["stand_in"] == page.texts["stand-in"] == note
    assert ["data", note] in content["about"]["entries"]
    assert content["description"] == "The experiment: Nothing real."
    # sizes of the data, from the first run
    assert ["cells", "1,234"] in content["about"]["entries"]
    assert ["conditions", "10 train, 2 val, 8 test (split one)"] in content["about"]["entries"]
    # verdict, difference, n, rank and spread are those of the leaderboard, turned in favour of the model
    board = pd.read_csv(tmp_path / "leaderboard.csv").query("category == 'all'").set_index(["model", "metric"])
    states = {"Winner": "ahead", "Loser": "behind"}
    for model, state in states.items():
        for row in content["verdict"]["models"][model]:
            written = board.loc[(model, row["metric"])]
            sign = 1 if row["metric"].startswith("pearson") else -1
            assert (row["state"], row["rival"], row["n"]) == (state, "Additive", written["n"])
            assert row["advantage"] == pytest.approx(sign * written["difference"])
            assert row["low"] == pytest.approx(row["advantage"] - 0.01)
            assert content["ranks"][row["metric"]][model] == written["rank"]
            assert content["scores"][row["metric"]]["all"][model][4] == 0.014
    keys = ["split", "condition"]
    own = rows[rows["model"] == "Winner"].groupby(keys)["pearson_delta"].mean()
    # the picker has all splits, each with its own scores
    items = content["deltas"]["items"]
    assert content["deltas"]["sources"] == ["Winner", "Loser", *FLOORS]
    assert [(item["split"], item["condition"]) for item in items] == [(s, c) for s in ("one", "two") for c in CONDITIONS]
    for item in items:
        assert item["scores"][0][0] == pytest.approx(own[item["split"], item["condition"]], abs=1e-12)
    board = pd.read_csv(tmp_path / "leaderboard.csv").set_index(["model", "category", "metric"])
    assert content["scores"]["mse"]["all"][CEILING][1] == board.loc[(CEILING, "all", "mse"), "mean"]


def test_a_model_without_the_first_split_stays(tmp_path: Path) -> None:
    write_benchmark(tmp_path, {"Winner": 0.2, "Loser": -0.2})
    for done in (tmp_path / "runs" / "Loser" / "one").glob("*/done.json"):
        done.unlink()
    deltas = _read(write_report(tmp_path)).content["deltas"]
    assert deltas["sources"][:2] == ["Winner", "Loser"]
    for item in deltas["items"]:
        known = [value is not None for value in item["predicted"][1]]
        assert all(known) if item["split"] == "two" else not any(known)


def test_the_leaderboard_has_the_last_word(tmp_path: Path) -> None:
    # it says "no difference" and "too few" though the scores of the conditions are far apart
    write_benchmark(tmp_path, {"Best": 0.3, "Other": 0.2})
    board = pd.read_csv(tmp_path / "leaderboard.csv")
    board.loc[board["model"] == "Best", "verdict"] = "no difference"
    board.loc[board["model"] == "Other", ["verdict", "decisive_floor"]] = ""
    board.to_csv(tmp_path / "leaderboard.csv", index=False)
    page = _read(write_report(tmp_path))
    assert page.texts["answer"] == "Not shown."
    assert "1 cannot be told from the floors. 1 has too few conditions to say." in page.texts["sentence"]
    # the best mean, but no better than a floor: its name is not given as the winner's
    assert "best mean" not in page.texts["sentence"]


def test_contexts_are_counted_where_there_is_one_condition(tmp_path: Path) -> None:
    write_benchmark(tmp_path, {"M": 0.2}, conditions=["stim"], splits=["B", "T"], contexts=[f"c{row}" for row in range(7)])
    page = _read(write_report(tmp_path))
    assert page.content["unit"] == "contexts"
    board = pd.read_csv(tmp_path / "leaderboard.csv").query("category == 'all' and metric == 'pearson_delta' and model == 'M'")
    assert f"({board['n'].item()} contexts, paired" in page.texts["sentence"]


def test_a_failed_and_an_unfinished_cell(tmp_path: Path) -> None:
    failed = [{"model": "Loser", "split": "two", "seed": 1, "reason": "out of <memory>"}]
    write_benchmark(tmp_path, {"Winner": 0.2, "Loser": -0.2}, about={"failed": failed})
    for done in (tmp_path / "runs" / "Loser").glob("*/*/done.json"):
        done.unlink()
    content = _read(write_report(tmp_path)).content
    assert content["deltas"]["sources"] == ["Winner", *FLOORS]
    assert ["failed", "Loser, split two, seed 1: out of <memory>"] in content["about"]["entries"]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    write_run(tmp_path, conditions=HOSTILE, genes=[*HOSTILE, *(f"G{number}" for number in range(20))], model="<b>M</b>")
    page = write_report(tmp_path)
    read = _read(page)
    assert read.tags.count("script") == 2
    assert "img" not in read.tags
    assert "b" not in read.tags
    assert [item["condition"] for item in read.content["deltas"]["items"]] == HOSTILE
    assert set(HOSTILE) <= set(read.content["deltas"]["genes"])
    assert read.texts["title"].startswith("<b>M</b> on screen.h5ad")


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = write_report(tmp_path)
    assert [link for link in _read(page).links if not link.startswith(("data:", "#"))] == []
    code = page.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", code)


def test_errors_of_the_model(tmp_path: Path) -> None:
    write_run(tmp_path / "with", errors=True)
    write_run(tmp_path / "without")
    (model,) = _read(write_report(tmp_path / "with")).content["uncertainty"]
    assert model["curve"] == [[0.5, 0.4], [0.9, 0.8]]
    assert model["spearman"] == pytest.approx(1.0)
    assert len(model["points"]) == model["n"] == len(CONDITIONS)
    assert _read(write_report(tmp_path / "without")).content["uncertainty"] == []


def test_older_and_odd_runs(tmp_path: Path) -> None:
    # no deltas and no data.json; the tested model is a baseline; a condition and a context are called NA
    write_run(tmp_path, model="KNN", conditions=["NA", "1", "G2", "G3", "G4", "G5"], contexts=("NA", "2"))
    (tmp_path / "test" / "deltas.h5ad").unlink()
    (tmp_path / "test" / "data.json").unlink()
    content = _read(write_report(tmp_path / "test", tmp_path / "other.html")).content
    assert content["rows"][0] == {"name": "KNN", "kind": "model"}
    assert content["deltas"] is None
    assert content["heat"] is None
    assert "data.json" in content["about"]["missing"]
    assert content["verdict"]["models"]["KNN"][0]["n"] == 6


def test_large_runs_are_cut_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "N_GENES", 12)
    monkeypatch.setattr(shown, "N_CONDITIONS", 20)
    monkeypatch.setattr("perturbzoo.report.content.N_GENES", 12)
    names = [f"G{number}" for number in range(60)]
    scores = write_run(tmp_path, conditions=names, genes=names)
    content = _read(write_report(tmp_path)).content["deltas"]
    assert len(content["items"]) == 20
    assert content["notes"][0].startswith("20 of 60 conditions")
    kept = [item["condition"] for item in content["items"]]
    values = scores["GEARS"].set_index("condition")["pearson_delta"].sort_values()
    assert {values.index[0], values.index[-1]} <= set(kept)
    for item in content["items"]:
        genes = [content["genes"][index] for index in item["genes"]]
        assert len(genes) == len(set(genes)) == 12
        assert item["condition"] in genes  # its target
        largest = scores["GEARS"]["condition"].tolist().index(item["condition"])
        import anndata

        change = np.abs(anndata.read_h5ad(tmp_path / "test" / "deltas.h5ad").X[largest])
        assert set(np.array(names)[np.argsort(-change)[:4]]) <= set(genes)


def _broken(tmp_path: Path, what: str) -> Path:
    folder = tmp_path / what.replace(" ", "_")
    if what == "no folder":
        return folder
    if what == "empty":
        folder.mkdir()
        return folder
    if what.startswith("benchmark"):
        write_benchmark(folder, {"M": 0.1}, splits=["one"], seeds=[0])
    else:
        write_run(folder)
    if what == "no summary":
        (folder / "test" / "summary.csv").unlink()
    elif what == "no rows":
        (folder / "test" / "conditions.csv").write_text("model,condition,context,category\n")
    elif what == "no columns":
        (folder / "test" / "summary.csv").write_text("model,metric\nM,mse\n")
    elif what == "not a table":
        (folder / "test" / "conditions.csv").write_bytes(b"\x00\xff\xfe,\x00\n1,2,3,4\n")
    elif what == "half an h5ad":
        file = folder / "test" / "deltas.h5ad"
        file.write_bytes(file.read_bytes()[:1000])
    elif what == "broken JSON":
        (folder / "test" / "data.json").write_text("{")
    elif what == "benchmark without leaderboard":
        (folder / "leaderboard.csv").unlink()
    elif what == "benchmark of an older version":
        board = pd.read_csv(folder / "leaderboard.csv").drop(columns=["verdict", "decisive_floor"])
        board.to_csv(folder / "leaderboard.csv", index=False)
    elif what == "benchmark JSON a list":
        (folder / "benchmark.json").write_text("[]")
    return folder


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no folder", "is no folder"),
        ("empty", "has neither test/conditions.csv"),
        ("no summary", "summary.csv is missing"),
        ("no rows", "has no rows"),
        ("no columns", "lacks the columns category, n, mean, low, high"),
        ("not a table", "conditions.csv"),
        ("half an h5ad", "deltas.h5ad: cannot be read as h5ad"),
        ("broken JSON", "data.json: cannot be read as JSON"),
        ("benchmark without leaderboard", "leaderboard.csv is missing"),
        ("benchmark JSON a list", "expected an object"),
        ("benchmark of an older version", "verdict, decisive_floor; run 'perturbzoo benchmark' on this folder again"),
    ],
)
def test_broken_folders_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, words: str) -> None:
    folder = _broken(tmp_path, what)
    with pytest.raises(SystemExit) as left:
        main(["report", str(folder)])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.startswith(f"report: {tmp_path / 'page.html'} (")
    with pytest.raises(PerturbZooError, match="there is no folder"):
        write_report(tmp_path, tmp_path / "nowhere" / "page.html")
    with pytest.raises(PerturbZooError, match="is a folder"):
        write_report(tmp_path, tmp_path)
    # twice the same
    first = (tmp_path / "page.html").read_bytes()
    assert write_report(tmp_path, tmp_path / "page.html").read_bytes() == first
