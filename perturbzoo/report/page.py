"""Writing the page: its template, style and script, and what it says as JSON, in one file."""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from perturbzoo.errors import PerturbZooError
from perturbzoo.report.content import collect
from perturbzoo.report.results import read_results


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run or a benchmark as one HTML page, which loads nothing from anywhere.

    Parameters
    ----------
    folder
        What ``perturbzoo test`` (its ``trainer.default_root_dir``) or ``perturbzoo benchmark`` wrote.
    output
        The page; by default ``report.html`` in the folder.

    Returns
    -------
    Where the page is.

    Raises
    ------
    PerturbZooError
        The folder is neither, a file of it is missing or broken, or the page cannot be written.
    """
    page = Path(output) if output is not None else Path(folder) / "report.html"
    if page.is_dir():
        raise PerturbZooError(f"{page} is a folder; name a file in it, such as {page / 'report.html'}")
    if not page.parent.is_dir():
        raise PerturbZooError(f"{page}: there is no folder {page.parent}; make it first")
    text = render(collect(read_results(Path(folder))))
    unfinished = page.with_name(f".unfinished.{page.name}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(page)
    except OSError as error:
        raise PerturbZooError(f"{page}: cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return page


def render(content: dict[str, Any]) -> str:
    """The page of what :func:`perturbzoo.report.content.collect` put together."""
    room = files("perturbzoo.report")
    stand_in = html.escape(content["about"]["stand_in"])
    parts = {
        "title": html.escape(content["title"]),
        "stand_in": f'<p class="warning" id="stand-in">{stand_in}</p>' if stand_in else "",
        "question": "Do they beat the floors?" if len(content["verdict"]["models"]) > 1 else "Does it beat the floors?",
        "answer": html.escape(content["verdict"]["answer"]),
        "sentence": html.escape(content["verdict"]["sentence"]),
        "style": room.joinpath("page.css").read_text(encoding="utf-8"),
        "script": room.joinpath("page.js").read_text(encoding="utf-8"),
        "content": script_safe(content),
    }
    template = room.joinpath("page.html").read_text(encoding="utf-8")
    # in one pass: what a part says is never taken for a place of another
    return re.sub(r"\[\[(\w+)\]\]", lambda place: parts[place[1]], template)


def script_safe(content: Any) -> str:
    """JSON that can stand within a script element whatever the names in it are."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # a lone surrogate, as a broken file name may hold, has no UTF-8
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
