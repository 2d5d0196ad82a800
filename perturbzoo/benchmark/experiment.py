"""An experiment file (configs/experiment/NAME.yaml): read, checked, and made into the cells of a grid.

A cell is one model on one split with one seed, as the configuration that ``perturbzoo fit`` takes. Knows no results; called by
the command and by :mod:`.running`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from perturbzoo.benchmark.stand_ins import StandIn, stand_in
from perturbzoo.errors import PerturbZooError, near_matches
from perturbzoo.models import BASELINES

Config = dict[str, Any]
StandInUse = Literal["auto", "always", "never"]

RESULTS_VERSION = 1
"""Part of every run's digest, beside the package's version: raise it when scores change."""

_LABEL = re.compile(r"[A-Za-z0-9][\w.+() -]*")  # also the name of a folder
# an experiment's keys, and those of its section stand_in, which has one more
_REPLACED = ("models", "seeds", "splits", "overrides")
_KEYS = ("title", "description", "data", "metric", *_REPLACED, "stand_in")
_MODEL_KEYS = ("config", "overrides")


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes
    ----------
    model, split, seed
        Its place; names of the experiment file.
    config
        All that ``perturbzoo fit`` is told, but for where to write.
    identity
        What `config` says, with nothing in it that depends on where files lie on this machine.
    """

    model: str
    split: str
    seed: int
    config: Config = field(compare=False)
    identity: Config = field(compare=False)

    @property
    def folder(self) -> Path:
        """Its folder below the benchmark's."""
        return Path("runs", self.model, self.split, f"seed-{self.seed}")

    @property
    def name(self) -> str:
        return f"{self.model}, split {self.split}, seed {self.seed}"

    def digest(self) -> str:
        """Hash of the configuration of the version of this package, and of its results: another one makes another run."""
        from perturbzoo import __version__

        text = json.dumps([__version__, RESULTS_VERSION, self.identity], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Experiment:
    """What a benchmark compares, and on what.

    Attributes
    ----------
    name, title, description, metric
        For readers; `metric` is the one that ranks.
    data
        What the cells are read from, in words.
    is_stand_in, stand_in_note
        Whether another file stands for the one of the experiment, and what it is.
    models, seeds, splits
        Labels, in the order of the file.
    cells
        The grid: models x splits x seeds.
    """

    name: str
    title: str
    description: str
    metric: str
    data: str
    is_stand_in: bool
    stand_in_note: str
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    splits: tuple[str, ...]
    cells: tuple[Cell, ...]

    def only(
        self, models: Sequence[str] | None = None, seeds: Sequence[int] | None = None, splits: Sequence[str] | None = None
    ) -> Experiment:
        """A part of the grid.

        Raises
        ------
        PerturbZooError
            A name is not in the experiment.
        """
        chosen: dict[str, tuple[Any, ...]] = {}
        wanted: dict[str, Sequence[Any] | None] = {"models": models, "seeds": seeds, "splits": splits}
        for what, names in wanted.items():
            known = getattr(self, what)
            for name in names or ():
                if name not in known:
                    near = near_matches(str(name), map(str, known)) or ";"
                    raise PerturbZooError(
                        f"--{what}: the experiment '{self.name}' has no '{name}'{near} it has {_listed(known)}"
                    )
            chosen[what] = tuple(name for name in known if names is None or name in names)
        cells = tuple(
            cell
            for cell in self.cells
            if cell.model in chosen["models"] and cell.seed in chosen["seeds"] and cell.split in chosen["splits"]
        )
        return replace(self, models=chosen["models"], seeds=chosen["seeds"], splits=chosen["splits"], cells=cells)


def read_experiment(
    path: str | os.PathLike[str], use: StandInUse = "auto", overrides: Sequence[str | os.PathLike[str]] = ()
) -> Experiment:
    """Read an experiment and make its grid.

    Of what is said twice the later counts: the data's configuration, the experiment's ``overrides``, the model's configuration,
    its own ``overrides`` in the experiment, the files of `overrides`.

    Parameters
    ----------
    path
        The YAML file. Paths in it count from the folder above its own (``configs``), or else from its own.
    use
        Whether a stand-in is used: where the experiment's file is not on this machine, always, or never.
    overrides
        YAML files as ``perturbzoo fit --config`` takes them.

    Raises
    ------
    PerturbZooError
        A file is missing or no YAML; a key is unknown, missing, or holds what it cannot; there is no stand-in.
    """
    file = Path(path)
    plain = read_yaml(file)
    where = str(file)
    _check_keys(plain, _KEYS, where)
    used = _stand_in_of(plain, file, use)
    if used is not None:
        plain = _with_stand_in(plain)
    metric = plain.get("metric", "pearson_delta")
    _check_metric(metric, where)
    data = _config_file(_required(plain, "data", where), file)
    last = [(Path(name), read_yaml(Path(name))) for name in overrides]
    for source, config in (*last, (file, plain.get("overrides") or {})):
        if not isinstance(config, dict):
            raise PerturbZooError(f"{source}: overrides must be sections such as 'trainer: {{max_epochs: 5}}', not {config!r}")
    models = _models(_required(plain, "models", where), file)
    seeds = _seeds(plain.get("seeds", [0]), where)
    splits = _splits(plain.get("splits", {"default": None}), where)
    cells = []
    for label, (model_config, own) in models.items():
        for split, arguments in splits.items():
            for seed in seeds:
                config = merged(data, plain.get("overrides") or {}, model_config, own, *(part for _, part in last))
                config["seed_everything"] = seed
                if arguments is not None:
                    config["data"]["init_args"]["split"] = arguments
                cells.append(_cell(label, split, seed, config, used))
    return Experiment(
        name=file.stem,
        title=str(plain.get("title", file.stem)),
        description=" ".join(str(plain.get("description", "")).split()),
        metric=metric,
        data=_described(data["data"]["init_args"]["path"]) if used is None else used.note,
        is_stand_in=used is not None,
        stand_in_note="" if used is None else used.note,
        models=tuple(models),
        seeds=tuple(seeds),
        splits=tuple(splits),
        cells=tuple(cells),
    )


def merged(*configs: Config) -> Config:
    """One configuration of several: sections are united, of everything else the later counts. None of them is changed."""
    result: Config = {}
    for config in configs:
        for key, value in config.items():
            known = result.get(key)
            result[key] = merged(known if isinstance(known, dict) else {}, value) if isinstance(value, dict) else value
    return result


def is_here(path: str) -> bool:
    """Whether the cells of a data configuration are on this machine, or can be made without a network."""
    from perturbzoo.data.public import is_cached

    scheme, _, name = path.partition(":")
    if scheme == "public":
        return is_cached(name)
    return scheme == "embedded" or Path(os.path.expanduser(os.path.expandvars(path))).is_file()


def read_yaml(path: Path) -> Config:
    """Read a YAML file of sections.

    Raises
    ------
    PerturbZooError
        There is no such file, or it is none.
    """
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        siblings = [other.name for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise PerturbZooError(f"{path}: {error.strerror or error}{near_matches(path.name, siblings)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PerturbZooError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise PerturbZooError(f"{path}: must hold sections, such as 'data: ...'; it holds {type(plain).__name__}")
    return plain


# ---------------------------------------------------------------------- parts of the file


def _stand_in_of(plain: Config, file: Path, use: StandInUse) -> StandIn | None:
    section = plain.get("stand_in")
    if section is not None:
        if not isinstance(section, dict):
            raise PerturbZooError(f"{file}: stand_in must hold 'file' and what changes with it, not {section!r}")
        _check_keys(section, ("file", *_REPLACED), f"{file}, stand_in")
    data = _config_file(_required(plain, "data", str(file)), file)
    path = str(data.get("data", {}).get("init_args", {}).get("path"))
    if use == "never" or (use == "auto" and is_here(path)):
        return None
    if section is None:
        if use == "auto":
            return None  # the data module says what is missing
        raise PerturbZooError(f"{file}: no stand-in is named there: leave --stand_in always out")
    return stand_in(str(_required(section, "file", f"{file}, stand_in")))


def _with_stand_in(plain: Config) -> Config:
    """The experiment with what its section ``stand_in`` says instead; overrides are added to the experiment's."""
    section = plain["stand_in"]
    changed = {key: section[key] for key in _REPLACED if key in section}
    if "overrides" in changed:
        changed["overrides"] = merged(plain.get("overrides") or {}, changed["overrides"] or {})
    return {**plain, **changed}


def _cell(model: str, split: str, seed: int, config: Config, used: StandIn | None) -> Cell:
    identity = merged(config)
    if used is not None:
        arguments, known = config["data"]["init_args"], identity["data"]["init_args"]
        arguments["path"], known["path"] = str(used.path), used.path.name
        if used.graphs:
            arguments["perturbation_graph"] = used.graphs
            known["perturbation_graph"] = [{**graph, "path": Path(graph["path"]).name} for graph in used.graphs]
    return Cell(model, split, seed, config, identity)


def _models(given: Any, file: Path) -> dict[str, tuple[Config, Config]]:
    """Configuration and overrides of each model."""
    from perturbzoo.evaluation.rows import CEILINGS

    if not isinstance(given, dict) or not given:
        raise PerturbZooError(f"{file}: models must name configurations by label, such as 'GEARS: model/gears.yaml'")
    found = {}
    for label, entry in given.items():
        where = f"{file}, models, {label}"
        if not _LABEL.fullmatch(str(label)):
            raise PerturbZooError(f"{where}: a label is a folder's name too: letters, digits, spaces and .+-_() only")
        if str(label).partition(" (")[0] in BASELINES:
            raise PerturbZooError(f"{where}: every run scores this baseline beside its model: leave it out")
        if label in CEILINGS:
            raise PerturbZooError(f"{where}: every run scores this ceiling beside its model: give the model another label")
        entry = {"config": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise PerturbZooError(f"{where}: must be a file, or 'config' and 'overrides', not {entry!r}")
        _check_keys(entry, _MODEL_KEYS, where)
        config = _config_file(_required(entry, "config", where), file)
        if "class_path" not in (config.get("model") or {}):
            raise PerturbZooError(f"{where}: {entry['config']} has no section 'model' with a class_path")
        found[str(label)] = (config, entry.get("overrides") or {})
    return found


def _seeds(given: Any, where: str) -> list[int]:
    if not isinstance(given, list) or not given or not all(type(seed) is int and seed >= 0 for seed in given):
        raise PerturbZooError(f"{where}: seeds must be a list of whole numbers, such as [0, 1, 2], not {given!r}")
    return list(dict.fromkeys(given))


def _splits(given: Any, where: str) -> dict[str, Any]:
    """Arguments of each split by its name; None for the one of the data's configuration."""
    if not isinstance(given, dict) or not given:
        raise PerturbZooError(f"{where}: splits must be named, such as 'seed1: {{method: simulation, seed: 1}}'")
    for name, arguments in given.items():
        if not _LABEL.fullmatch(str(name)):
            raise PerturbZooError(f"{where}, splits, {name}: a name is a folder's too: letters, digits, spaces and .+-_() only")
        if arguments is not None and not (isinstance(arguments, dict) and "method" in arguments):
            raise PerturbZooError(
                f"{where}, splits, {name}: give the arguments of a split, such as {{method: simulation, seed: 1}}"
            )
        if isinstance(arguments, dict):
            _check_method(str(arguments["method"]), f"{where}, splits, {name}")
    return {str(name): arguments for name, arguments in given.items()}


def _check_method(method: str, where: str) -> None:
    from perturbzoo.data.splits import METHODS

    if method not in METHODS:
        near = near_matches(method, METHODS) or ";"
        raise PerturbZooError(f"{where}: no split method '{method}'{near} there are {', '.join(METHODS)}")


def _check_metric(metric: Any, where: str) -> None:
    from perturbzoo.evaluation.table import FILE_METRICS

    if metric not in FILE_METRICS:
        near = near_matches(str(metric), FILE_METRICS) or ";"
        raise PerturbZooError(f"{where}: no metric '{metric}'{near} there are {', '.join(FILE_METRICS)}")


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise PerturbZooError(
                f"{where}: unknown key '{key}'{near_matches(str(key), known) or ';'} there are {', '.join(known)}"
            )


def _required(given: Mapping[str, Any], key: str, where: str) -> Any:
    if given.get(key) is None:
        raise PerturbZooError(f"{where}: the key '{key}' is missing")
    return given[key]


def _config_file(name: Any, file: Path) -> Config:
    """Read a configuration that an experiment names."""
    folders = [file.resolve().parent.parent, file.resolve().parent]
    for folder in folders:
        if (folder / str(name)).is_file():
            return read_yaml(folder / str(name))
    around = [str(path.relative_to(folders[0])) for path in folders[0].glob("*/*.yaml")]
    raise PerturbZooError(f"{file}: there is no {name} in {folders[0]}{near_matches(str(name), around)}")


def _described(path: str | list[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path)


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names))
