"""Make the same splits with perturbzoo and with cell-gears' own splitter, and print both side by side.

cell-gears lives in an environment of its own, because of its pins::

    python -m venv gears_env
    gears_env/bin/pip install torch==2.13.0 && gears_env/bin/pip install cell-gears==0.1.2 torch_geometric
    python scripts/compare_splits.py --gears_python gears_env/bin/python [--output FILE.json] [--lists]

Each list of conditions goes to that interpreter as JSON, which runs `gears.data_utils.DataSplitter` on it. The lists:

- ``canonical``: 40 singles and 48 doubles made up here, with doubles whose singles are absent, in our canonical spelling
  and order;
- ``as in a file``: the same, shuffled, the targets of a double in either order, for the argument ``labels``;
- ``singles``: the singles of the first, for ``simulation_single``;
- ``norman2019_subset``: the labels of that file in its order, where the environment variable PERTURBZOO_DATA is set.

``--output`` writes what cell-gears printed: the expectation of tests/data/test_splits.py. Exit status 1 if any list
differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

SEEDS = (1, 2, 3, 4, 5)
METHODS = ("simulation", "combo_seen0", "combo_seen1", "combo_seen2", "single", "no_test")
Lists = dict[str, list[str]]


def run_gears() -> None:
    """Read [labels, method, seed] jobs from standard input and write the lists of cell-gears: runs under its Python."""
    import types

    import gears.data_utils
    import pandas as pd

    def split(labels: list[str], method: str, seed: int) -> Lists:
        table = types.SimpleNamespace(obs=pd.DataFrame({"condition": labels}))
        kind, seen = ("combo", int(method[-1])) if method.startswith("combo") else (method, 0)
        splitter = gears.data_utils.DataSplitter(table, split_type=kind, seen=seen)
        # prepare_split passes these defaults on, but for simulation_single, where it fails on the return value
        done = splitter.split_data(test_size=0.1, seed=seed, train_gene_set_size=0.75, combo_seen2_train_frac=0.75)
        subgroups = done[1] if isinstance(done, tuple) else {}
        rows = table.obs[table.obs["condition"] != "ctrl"]
        lists = {part: rows["condition"][rows["split"] == part].tolist() for part in ("train", "val", "test")}
        for part in ("val", "test"):
            for category, members in subgroups.get(f"{part}_subgroup", {}).items():
                lists[f"{part} {category}"] = [str(member) for member in members]
        return lists

    json.dump([split(*job) for job in json.load(sys.stdin)], sys.stdout)


def make_up_labels(seed: int = 0) -> list[str]:
    """40 singles and 48 doubles; eight of the targets of doubles are in no single."""
    rng = random.Random(seed)
    targets = [f"{family}{number}" for family in ("KLF", "HOXA", "MAP3K", "NKX2-", "ZNF") for number in range(1, 11)]
    singles = rng.sample(targets, 40)
    extra = sorted(set(targets) - set(singles))[:8]
    doubles: set[tuple[str, str]] = set()
    while len(doubles) < 48:
        first, second = sorted(rng.sample(singles[:30] + extra, 2))
        doubles.add((first, second))
    return [f"{target}+ctrl" for target in singles] + [f"{first}+{second}" for first, second in sorted(doubles)]


def as_in_a_file(labels: list[str], seed: int = 0) -> list[str]:
    """Shuffle the labels, and turn the targets round in half of the doubles."""
    rng = random.Random(seed)
    turned = ["+".join(reversed(label.split("+"))) if rng.random() < 0.5 else label for label in labels]
    return rng.sample(turned, len(turned))


def norman_labels(folder: str) -> list[str]:
    """The labels of norman2019_subset.h5ad in the file's order, spelled for cell-gears."""
    import anndata

    cells = anndata.read_h5ad(Path(folder) / "norman2019_subset.h5ad", backed="r")
    labels = [str(label) for label in cells.obs["perturbation"].unique()]
    return [label if "+" in label else f"{label}+ctrl" for label in labels if label != "control"]


def run_ours(labels: list[str], method: str, seed: int, given: bool) -> Lists | None:
    """Our lists, in canonical spelling; None where we refuse. The labels are handed on where `given`."""
    from perturbzoo.data.split_methods import PARTS
    from perturbzoo.data.splits import make_split
    from perturbzoo.errors import PerturbZooError
    from perturbzoo.perturbation import parse_condition

    arguments: dict[str, Any] = {"labels": labels} if given else {}
    try:
        split = make_split([(parse_condition(label), None) for label in labels], method, seed, **arguments)
    except PerturbZooError as error:
        print(f"  perturbzoo refuses: {error}")
        return None
    lists: Lists = {part: split.conditions(part) for part in PARTS}
    if method == "simulation":
        for record in split.records:
            if record.part != "train":
                lists.setdefault(f"{record.part} {record.category}", []).append(record.condition)
    return lists


def canonical(lists: Lists) -> Lists:
    """Canonical strings, sorted; lists without a member are left out."""
    from perturbzoo.perturbation import parse_condition

    return {key: sorted(str(parse_condition(label)) for label in members) for key, members in lists.items() if members}


def shortest(lists: Lists, labels: list[str]) -> dict[str, Any]:
    """The same lists with the training one, the longest, replaced by those in no part, and its length."""
    placed = {label for members in lists.values() for label in members}
    rest = {key: members for key, members in lists.items() if key != "train"}
    none = sorted(set(canonical({"": labels})[""]) - placed)
    return {"train": len(lists.get("train", ())), "in no part": none, "lists": rest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gears_python", help="interpreter of an environment that has cell-gears")
    parser.add_argument("--output", type=Path, help="write the lists of cell-gears to this JSON file")
    parser.add_argument("--lists", action="store_true", help="print the lists themselves, not only their lengths")
    parser.add_argument("--as_gears", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.as_gears:
        run_gears()
        return 0
    if not wanted.gears_python:
        parser.error("--gears_python is needed: the interpreter of an environment that has cell-gears")

    from perturbzoo.perturbation import parse_condition

    made_up = sorted(make_up_labels(), key=lambda label: str(parse_condition(label)))
    singles = [label for label in made_up if label.endswith("+ctrl")]
    # name -> (labels, whether we are told the file's spelling and order, methods)
    inputs: dict[str, tuple[list[str], bool, tuple[str, ...]]] = {
        "canonical": (made_up, False, METHODS),
        "as in a file": (as_in_a_file(made_up), True, METHODS),
        "singles": (singles, False, ("simulation_single",)),
    }
    if folder := os.environ.get("PERTURBZOO_DATA"):
        inputs["norman2019_subset"] = (norman_labels(folder), True, METHODS)

    jobs = [(name, method, seed) for name, (_, _, methods) in inputs.items() for method in methods for seed in SEEDS]
    command = [wanted.gears_python, str(Path(__file__).resolve()), "--as_gears"]
    request = json.dumps([(inputs[name][0], method, seed) for name, method, seed in jobs])
    answers: list[Lists] = json.loads(
        subprocess.run(command, input=request, stdout=subprocess.PIPE, text=True, check=True).stdout
    )

    differing = 0
    cases = []
    for (name, method, seed), answer in zip(jobs, answers, strict=True):
        labels, given, _ = inputs[name]
        theirs, made = canonical(answer), run_ours(labels, method, seed, given)
        ours = None if made is None else canonical(made)
        # a split without train or test, which cell-gears makes without a word, is an error of ours
        same = theirs == ours if ours is not None else not {"train", "test"} <= theirs.keys()
        differing += not same
        counts = ", ".join(f"{key} {len(members)}" for key, members in theirs.items())
        print(f"{name} | {method} | seed {seed} | {'same' if same else 'DIFFERENT'} | {counts}")
        if wanted.lists or not same:
            print(f"  cell-gears {json.dumps(theirs)}\n  perturbzoo {json.dumps(ours)}")
        cases.append({"input": name, "method": method, "seed": seed, **shortest(theirs, labels)})
    print(f"{len(jobs) - differing} of {len(jobs)} splits are the same")

    if wanted.output:
        version = "import importlib.metadata as m; print(*(f'{n}=={m.version(n)}' for n in ('cell-gears', 'numpy')))"
        run = subprocess.run([wanted.gears_python, "-c", version], stdout=subprocess.PIPE, text=True, check=True)
        arguments = ["--gears_python", "gears_env/bin/python", "--output", wanted.output.name]
        fixture = {
            "what": "What the DataSplitter of cell-gears made of each list of labels, in canonical spelling and sorted; "
            "the training conditions, given by their number, are all that no list names",
            "command": shlex.join(["python", "scripts/compare_splits.py", *arguments]) + ", with PERTURBZOO_DATA set",
            "made_with": run.stdout.split(),
            "inputs": {name: {"labels": labels, "labels_given": given} for name, (labels, given, _) in inputs.items()},
            "cases": cases,
        }
        wanted.output.write_text(
            json.dumps(fixture, indent=None, separators=(",", ":")).replace('{"input"', '\n{"input"') + "\n"
        )
        print(f"wrote {wanted.output}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
