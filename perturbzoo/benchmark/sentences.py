"""What a leaderboard says, in text: the printed table, sentences on who beats what, and a page of several benchmarks.

Takes the tables of :mod:`.leaderboard`; called by the command.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from perturbzoo.benchmark.leaderboard import MAIN_METRICS, better
from perturbzoo.errors import PerturbZooError
from perturbzoo.evaluation.rows import CEILING, FLOOR, MODEL
from perturbzoo.evaluation.summary import ALL, format_table
from perturbzoo.evaluation.table import FILE_METRICS
from perturbzoo.evaluation.verdicts import BEATS, LOSES, TIES

BEGIN = "<!-- made by 'perturbzoo benchmark --table': what stands between these lines is written anew -->"
END = "<!-- end of what was made -->"
_ARROWS = {True: "↑", False: "↓", None: "→1"}


def main_metrics(board: pd.DataFrame, metric: str) -> list[str]:
    """The metric that ranks, then the others that are shown, as far as the table has them."""
    present = set(board["metric"])
    return [name for name in dict.fromkeys([metric, *MAIN_METRICS]) if name in present]


def printed(board: pd.DataFrame, metric: str) -> str:
    """The main metrics over all conditions, and what they say."""
    shown = main_metrics(board, metric)
    rows = board[(board["category"] == ALL) & board["metric"].isin(shown)]
    rows = rows.sort_values("metric", key=lambda names: names.map(shown.index), kind="stable")
    return "\n".join([format_table(rows), "", *sentences(board, metric)])


def sentences(board: pd.DataFrame, metric: str) -> list[str]:
    """One line for each main metric: who is best, whether that is a baseline, and which models beat the best baseline."""
    rows = board[board["category"] == ALL]
    return [line for name in main_metrics(board, metric) if (line := _sentence(rows[rows["metric"] == name], name))]


def _sentence(rows: pd.DataFrame, metric: str) -> str:
    scored = rows[rows["mean"].notna() & (rows["kind"] != CEILING)]
    models = scored[scored["kind"] == MODEL]
    if FILE_METRICS[metric] is None or models.empty:
        return ""
    ranked = scored[scored["rank"].notna()]
    floors = scored[scored["kind"] == FLOOR]
    said = f"{metric}:"
    if len(ranked):
        # equal but for rounding share the first rank
        best = ranked[ranked["rank"] == ranked["rank"].min()]
        names, mean = " and ".join(best["model"]), f"{best['mean'].iloc[0]:.3g}"
        if set(best["kind"]) == {FLOOR}:
            said += f" the best mean is a baseline's, {best['model'].iloc[0]} ({mean})."
        elif len(best) > 1:
            said += f" {names} share the best mean ({mean})."
        else:
            said += f" best is {names} ({mean})" + (f", {_best_floor(floors, metric)}." if len(floors) else ".")
    if floors.empty:
        return f"{said} There is no baseline beside it."
    for verdict, words in ((BEATS, "Better than every baseline"), (TIES, "Not to be told from one"), (LOSES, "Worse than one")):
        group = models[models["verdict"] == verdict].to_dict("records")
        if group or (verdict == BEATS and (models["verdict"] != "").any()):
            said += f" {words}: {', '.join(map(_with_difference, group)) or 'none'}."
    if not (models["verdict"] != "").any():
        said += " There are too few conditions for a verdict."
    return said + _saturation(rows, floors.loc[_turned(floors, metric).idxmax()], metric)


def _turned(rows: pd.DataFrame, metric: str) -> pd.Series:
    return better(metric, rows["mean"].map(lambda value: float(f"{value:.9g}")))


def _best_floor(floors: pd.DataFrame, metric: str) -> str:
    floor = floors.loc[_turned(floors, metric).idxmax()]
    return f"the best baseline {floor['model']} ({floor['mean']:.3g})"


def _with_difference(row: dict[Any, Any]) -> str:
    interval = f"[{row['difference_low']:.3g}, {row['difference_high']:.3g}]"
    return f"{row['model']} ({row['difference']:+.3g} {interval} from {row['decisive_floor']}, p {row['p']:.2g})"


def _saturation(rows: pd.DataFrame, floor: pd.Series, metric: str) -> str:
    """Say if a floor is as good as a repeat of the experiment: the metric cannot rank models then."""
    ceiling = rows[(rows["model"] == "split-half ceiling") & rows["mean"].notna()]
    if ceiling.empty:
        return ""
    ends = better(metric, pd.Series([float(floor["mean"]), float(ceiling["mean"].iloc[0])]))
    if ends.iloc[0] < ends.iloc[1]:
        return ""
    return (
        f" {floor['model']} is as good as a repeat of the experiment (split-half ceiling, {ceiling['mean'].iloc[0]:.3g}): "
        "here this metric leaves nothing to tell models apart by."
    )


# ---------------------------------------------------------------------- a page of several benchmarks


def page(folders: Sequence[Path]) -> str:
    """Markdown tables of several benchmarks' folders: every model, floor and ceiling on the main metrics, with intervals.

    Raises
    ------
    PerturbZooError
        A folder is no benchmark's, or has no finished run.
    """
    return "\n".join([BEGIN, *(line for folder in folders for line in _section(folder)), END]) + "\n"


def write_page(path: Path, text: str) -> None:
    """Write a page; what a person wrote before and after the part that :func:`page` made stays."""
    before, after = "", ""
    if path.is_file():
        whole = path.read_text(encoding="utf-8")
        if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
            raise PerturbZooError(
                f"{path}: there already, and without the two lines between which the table stands: '{BEGIN}' and '{END}'"
            )
        before, after = whole.split(BEGIN)[0], whole.split(END)[1].removeprefix("\n")
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_text(before + text + after, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise PerturbZooError(f"{path}: cannot be written: {error.strerror or error}") from error


def _section(folder: Path) -> list[str]:
    try:
        about = json.loads((folder / "benchmark.json").read_text())
        board = pd.read_csv(folder / "leaderboard.csv")
    except (OSError, ValueError) as error:
        raise PerturbZooError(f"{folder}: no folder of 'perturbzoo benchmark': {' '.join(str(error).split())}") from error
    if board.empty:
        raise PerturbZooError(f"{folder}: no run of this benchmark is finished")
    board["verdict"] = board["verdict"].fillna("")
    rows = board[board["category"] == ALL]
    metrics = main_metrics(board, about["metric"])
    lines = [f"## {about['title']}", "", about["description"], ""]
    grid = (
        f"{len(about['models'])} models x {len(about['splits'])} splits x {len(about['seeds'])} seeds, {about['finished']} runs"
    )
    stands = " (a stand-in for the public file)" if about["stand_in"] else ""
    lines += [
        f"Data: {about['data']}{stands}. {grid}; {int(rows['n'].max())} conditions or contexts scored; perturbzoo {about['version']}.",
        "",
    ]
    lines += [
        f"| | {' | '.join(f'{name} {_ARROWS[FILE_METRICS[name]]}' for name in metrics)} |",
        "|---" * (len(metrics) + 1) + "|",
    ]
    best = {name: _best_of(rows[rows["metric"] == name]) for name in metrics}
    for model, block in rows.groupby("model", sort=False):
        kind = block["kind"].iloc[0]
        values = block.set_index("metric")
        count, most = int(block["n"].max()), int(rows["n"].max())
        part = f" ({count} of {most})" if count < most else ""
        label = f"**{model}**{part}" if kind == MODEL else f"{model}{part}" if kind == FLOOR else f"*{model}*{part}"
        cells = [_number(values.loc[name], model in best[name]) if name in values.index else "" for name in metrics]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", *(f"- {line}" for line in sentences(board, about["metric"]))]
    for failure in about["failed"]:
        lines.append(f"- failed: {failure['model']}, split {failure['split']}, seed {failure['seed']}: {failure['reason']}")
    return [*lines, ""]


def _best_of(rows: pd.DataFrame) -> set[str]:
    return set(rows.loc[rows["rank"].notna() & (rows["rank"] == rows["rank"].min()), "model"])


def _number(row: pd.Series, best: bool) -> str:
    if pd.isna(row["mean"]):
        return "-"
    value = f"**{row['mean']:.3g}**" if best else f"{row['mean']:.3g}"
    return value if pd.isna(row["low"]) else f"{value} [{row['low']:.3g}, {row['high']:.3g}]"
