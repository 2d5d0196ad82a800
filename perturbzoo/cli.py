"""The command line: one table from command to function.

Nothing heavy is imported here, so that ``perturbzoo --help`` answers at once.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from perturbzoo.errors import PerturbZooError, PerturbZooWarning


def _train(command: str) -> Callable[[Sequence[str]], None]:
    def run(arguments: Sequence[str]) -> None:
        # nothing that an import makes is garbage: looking for some, meanwhile and later, takes two seconds
        gc.disable()
        try:
            from perturbzoo.training import main as train
        finally:
            gc.freeze()
            gc.enable()

        train([command, *arguments])

    return run


def _predict(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="perturbzoo predict", description="Predict conditions nobody measured, from a checkpoint and control cells."
    )
    parser.add_argument("--ckpt_path", required=True, help="checkpoint that 'perturbzoo fit' left: checkpoints/best.ckpt")
    parser.add_argument(
        "--controls", required=True, help="h5ad file of control cells, or a screen, whose control cells are used"
    )
    parser.add_argument("--conditions", required=True, help="'KLF1+CEBPA,SET', or a CSV file: condition, dose, covariates")
    parser.add_argument("--output", required=True, help="h5ad file to write")
    parser.add_argument(
        "--as",
        dest="space",
        choices=("log1p", "counts"),
        default="log1p",
        help="expected log1p-normalised expression, or cells of whole counts; an interrupted run of counts goes on (default: log1p)",
    )
    parser.add_argument(
        "--cells", "--n_cells", dest="n_cells", type=int, help="cells per condition and context (default: every control cell)"
    )
    parser.add_argument("--pseudobulk", action="store_true", help="one mean profile per condition and context instead of cells")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw of cells (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    options = parser.parse_args(arguments)

    from perturbzoo.checkpoint import load
    from perturbzoo.prediction import write_predictions

    model = load(options.ckpt_path, options.device)
    file = write_predictions(
        model,
        options.controls,
        options.conditions,
        options.output,
        n_cells=options.n_cells,
        pseudobulk=options.pseudobulk,
        as_counts=options.space == "counts",
        seed=options.seed,
    )
    print(f"predictions: {file}")


def _data(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="perturbzoo data", description="Say what is in an h5ad file: cells, conditions, problems and their fixes."
    )
    parser.add_argument("file", help="h5ad file, or the name of a public data set to download")
    options = parser.parse_args(arguments)

    from perturbzoo.data.describe import describe

    print(describe(options.file))


def _simulate(arguments: Sequence[str]) -> None:
    from perturbzoo.simulate.command import main as simulate

    simulate(arguments)


def _network(arguments: Sequence[str]) -> None:
    from perturbzoo.network_command import main as network

    network(arguments)


def _evaluate(arguments: Sequence[str]) -> None:
    from perturbzoo.evaluate_command import main as evaluate

    evaluate(arguments)


def _report(arguments: Sequence[str]) -> None:
    from perturbzoo.report_command import main as report

    report(arguments)


def _benchmark(arguments: Sequence[str]) -> None:
    from perturbzoo.benchmark_command import main as benchmark

    benchmark(arguments)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "fit": (_train("fit"), "train a model: --config DATA.yaml --config MODEL.yaml"),
    "validate": (_train("validate"), "score a checkpoint on the validation conditions: --ckpt_path"),
    "test": (_train("test"), "score a checkpoint beside all baselines on the test conditions: --ckpt_path"),
    "predict": (_predict, "predict conditions nobody measured: --ckpt_path --controls --conditions --output"),
    "evaluate": (_evaluate, "score any tool's predictions: --predicted --observed --output"),
    "report": (_report, "write one HTML page about a tested run or a benchmark: RUN_DIR --output"),
    "benchmark": (_benchmark, "compare models x seeds x splits of an experiment: --config EXPERIMENT.yaml"),
    "data": (_data, "say what is in an h5ad file"),
    "simulate": (_simulate, "simulate a Perturb-seq screen with known truth"),
    "network": (_network, "infer a gene regulatory network from a screen: --data --method --output"),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: perturbzoo COMMAND [options]\n\nA zoo of perturbation-response models for single-cell biology.\n\n"
        f"commands:\n{listed}\n\n'perturbzoo COMMAND --help' lists a command's options; 'perturbzoo --version' the version."
    )


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None, line: object = None
) -> None:
    """Print our own warnings as one line; they are addressed to the user, not to the developer of a line."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # the first of several processes says the same
    where = "" if issubclass(category, PerturbZooWarning) else f"{filename}:{lineno}: "
    print(f"warning: {where}{message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends in one line and status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = _show_warning
    try:
        if not given or given[0] in ("-h", "--help", "help"):
            print(_help(), flush=True)
            return
        if given[0] in ("-V", "--version"):
            from perturbzoo import __version__

            print(f"perturbzoo {__version__}")
            return
        if given[0] not in COMMANDS:
            from perturbzoo.errors import near_matches

            near = near_matches(given[0], COMMANDS) or ";"
            raise PerturbZooError(f"no command '{given[0]}'{near} 'perturbzoo --help' lists them")
        COMMANDS[given[0]][0](given[1:])
    except PerturbZooError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # '| head' has read enough; Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
