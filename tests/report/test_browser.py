"""The page in a real Chromium: it draws without a complaint, the picker works, light and dark and phone are fit to be read.

Screenshots are kept in the folder that ``PERTURBZOO_SCREENSHOTS`` names, else in pytest's own.
"""

from __future__ import annotations

import base64
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from folders import write_benchmark, write_run

from perturbzoo.report import write_report

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        started = webdriver.Chrome(options=options, service=Service(driver))
    except WebDriverException as error:
        pytest.skip(f"chromium does not start here: {str(error).splitlines()[0]}")
    yield started
    started.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with hostile names and errors, and a benchmark."""
    root = tmp_path_factory.mktemp("pages")
    names = ["G0", "G1", HOSTILE, "G2+G3", "G0+G1", "G1+G2"]
    write_run(root / "run", conditions=names, genes=[f"G{number}" for number in range(30)] + [HOSTILE], errors=True)
    write_benchmark(root / "benchmark", {"Winner": 0.2, "Loser": -0.2})
    return {name: write_report(root / name) for name in ("run", "benchmark")}


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("PERTURBZOO_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _open(browser: Any, page: Path, *, width: int = 1280, scheme: str = "light") -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.dataset.ready") == "yes"


def _choose(browser: Any, control: str, value: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element(By.ID, control)).select_by_value(value)


def _text(browser: Any, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def _number(text: str) -> float:
    return float(text.replace("\u2212", "-"))


@pytest.mark.parametrize("name", ["run", "benchmark"])
@pytest.mark.parametrize(
    ("look", "width", "scheme"), [("light", 1280, "light"), ("dark", 1280, "dark"), ("phone", 360, "light")]
)
def test_it_is_drawn_and_fits(
    browser: Any, pages: dict[str, Path], screenshots: Path, name: str, look: str, width: int, scheme: str
) -> None:
    browser.get_log("browser")
    _open(browser, pages[name], width=width, scheme=scheme)
    assert browser.execute_script("return document.scrollingElement.scrollWidth <= innerWidth")
    # every part of the page has been drawn
    empty = browser.execute_script(
        "return [...document.querySelectorAll('section')].filter(s => s.children.length < 2).map(s => s.id)"
    )
    assert empty == []
    paper, ink = browser.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    brightness = [sum(int(part) for part in colour[4:-1].split(",")[:3]) / 3 for colour in (paper, ink)]
    assert (brightness[0] > 200 > 100 > brightness[1]) if scheme == "light" else (brightness[0] < 50 < 200 < brightness[1])
    assert browser.get_log("browser") == []
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": False})
    (screenshots / f"report-{name}-{look}.png").write_bytes(base64.b64decode(shot["data"]))


CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((part) => {
  const value = part / 255; return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4; });
const light = (text) => { const [r, g, b] = parse(text); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const paper = light(getComputedStyle(document.body).backgroundColor);
const found = [];
for (const node of document.querySelectorAll('main *')) {
  if (![...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())) continue;
  const style = getComputedStyle(node), ink = light(node.closest('svg') ? style.fill : style.color);
  found.push([(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), node.className.baseVal ?? node.className, node.textContent]);
}
return found.sort((a, b) => a[0] - b[0])[0];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_and_controls_are_labelled(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    for page in pages.values():
        _open(browser, page, scheme=scheme)
        least = browser.execute_script(CONTRAST)
        assert least[0] >= 4.5, least
        unnamed = browser.execute_script(
            "return [...document.querySelectorAll('select, button')].filter(c => !c.closest('label') && !c.ariaLabel).length"
        )
        assert unnamed == 0


def test_the_picker(browser: Any, pages: dict[str, Path]) -> None:
    page = pages["run"]
    browser.get_log("browser")
    _open(browser, page)
    table = pd.read_csv(page.parent / "test" / "conditions.csv").set_index(["model", "condition"])
    marks = "return [...document.querySelectorAll('.scatter circle')].map(c => c.getAttribute('cy')).join()"
    before = browser.execute_script(marks)
    _choose(browser, "condition", "3")
    assert browser.execute_script(marks) != before
    assert _text(browser, "#shown").startswith("G2+G3: combo seen2")
    shown = _number(_text(browser, "#facts [data-metric=pearson_delta]"))
    assert shown == pytest.approx(table.loc[("GEARS", "G2+G3"), "pearson_delta"], abs=5.1e-5)
    # its two targets are diamonds
    assert browser.execute_script("return document.querySelectorAll('.figures path.target').length") - 1 == 2
    before = browser.execute_script(marks)
    _choose(browser, "source", "3")
    assert browser.execute_script(marks) != before
    shown = _number(_text(browser, "#facts [data-metric=rmse]"))
    assert shown == pytest.approx(table.loc[("Additive", "G2+G3"), "rmse"], abs=5.1e-5)
    # a name that would be markup is text
    _choose(browser, "condition", "2")
    assert _text(browser, "#shown").startswith(HOSTILE)
    assert browser.execute_script("return document.images.length") == 0
    # by keyboard: the button is reached and pressed
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.find_element(By.CSS_SELECTOR, "[aria-label='Next condition']").send_keys(Keys.ENTER)
    assert _text(browser, "#shown").startswith("G2+G3")
    assert browser.get_log("browser") == []


def test_the_leaderboard_follows_its_controls(browser: Any, pages: dict[str, Path]) -> None:
    page = pages["run"]
    _open(browser, page)
    summary = pd.read_csv(page.parent / "test" / "summary.csv").set_index(["model", "category", "metric"])
    _choose(browser, "metric", "mse")
    _choose(browser, "category", "combo_seen2")
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#board tbody tr')].map(r => [r.dataset.row, r.querySelector('b').textContent])"
    )
    assert rows[0][0] == "split-half ceiling"
    for model, text in rows:
        assert _number(text) == pytest.approx(summary.loc[(model, "combo_seen2", "mse"), "mean"], abs=5.1e-4)
    errors = [_number(text) for _, text in rows[1:]]
    assert errors == sorted(errors)
    assert len(rows) == 5
    # bars of every category, floors and models
    bars = browser.execute_script(
        "return [...document.querySelectorAll('#panels [data-category]')].map(p => p.querySelectorAll('rect').length)"
    )
    assert bars == [4, 4]


def test_hovering_names_a_gene(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    _open(browser, pages["run"])
    target = browser.find_element(By.CSS_SELECTOR, ".figures div > svg path.target")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", target)
    ActionChains(browser).move_to_element(target).perform()
    assert _text(browser, "#tip").startswith("G0 (target)")


def test_several_models(browser: Any, pages: dict[str, Path]) -> None:
    _open(browser, pages["benchmark"])
    assert "not the public file" in _text(browser, "#stand-in")
    states = browser.execute_script(
        "return [...document.querySelectorAll('#matrix tbody tr')].map(r => r.children[1].textContent)"
    )
    assert [state.split()[-1] for state in states] == ["ahead", "behind"]
    assert "over seeds" in _text(browser, "#board [data-row=Winner]")
    _choose(browser, "model-of-floors", "Loser")
    assert "behind" in _text(browser, "#differences tr.chosen")


RANK_LABELS = """
return [...document.querySelectorAll('.bump g.row')].map((row) => {
  const marks = [...row.querySelectorAll('.mark')].map((mark) => mark.getBoundingClientRect()), texts = [...row.querySelectorAll('text')];
  const box = texts.at(-1).getBoundingClientRect(), mark = marks.at(-1);
  const line = row.querySelector('.line');
  return [row.dataset.row, texts.length, box.top + box.height / 2 - mark.top - mark.height / 2,
    row.querySelector('.mark').tagName + getComputedStyle(line).strokeDasharray + getComputedStyle(line).stroke];
});
"""


def test_ranks_are_told_apart_without_hovering(browser: Any, pages: dict[str, Path]) -> None:
    _open(browser, pages["benchmark"])
    rows = browser.execute_script(RANK_LABELS)
    assert len(rows) == 5
    assert all(count == 2 for _, count, _, _ in rows)
    # a name at the right end is beside its point, also where a rank is shared
    assert max(abs(off) for _, _, off, _ in rows) < 4
    looks = {name: look for name, _, _, look in rows}
    assert looks["Winner"] != looks["Loser"]


TICKS = """
return [...document.querySelectorAll('.scores tfoot svg')].map((svg) =>
  [...svg.querySelectorAll('text')].map((text) => { const box = text.getBoundingClientRect(); return [box.left, box.right]; }));
"""


def test_the_phone(browser: Any, pages: dict[str, Path]) -> None:
    for page in pages.values():
        _open(browser, page, width=360)
        for axis in browser.execute_script(TICKS):
            assert len(axis) <= 2
            assert all(first[1] < second[0] for first, second in itertools.pairwise(axis))
    # a table that goes on says so until its end is reached, and its first column stays
    box = "document.querySelector('#matrix').parentNode"
    place = f"return [{box}.classList.contains('more'), {box}.querySelector('tbody th').getBoundingClientRect().left]"
    before = browser.execute_script(place)
    end = f"const done = arguments[0]; {box}.scrollLeft = 9999; requestAnimationFrame(() => requestAnimationFrame(done))"
    browser.execute_async_script(end)
    assert browser.execute_script(f"return {box}.scrollLeft") > 50
    assert (before[0], browser.execute_script(place)[0]) == (True, False)
    assert browser.execute_script(place)[1] == pytest.approx(before[1], abs=1)


def test_the_line_has_a_name(browser: Any, pages: dict[str, Path]) -> None:
    _open(browser, pages["run"])
    assert "The dashed line is the split-half ceiling." in _text(browser, "#leaderboard")
    assert "the dashed line is the split-half ceiling" in _text(browser, "#categories")
