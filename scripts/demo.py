"""From nothing to a trained model, an honest table, predictions and figures, on a simulated screen with known truth.

Runs the same commands a user would type, prints each, and leaves everything in demo/. ``make demo`` calls it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path


def run(*arguments: str) -> None:
    """Run one perturbzoo command, showing it; stop with its last lines where it fails."""
    print(f"\n$ perturbzoo {' '.join(arguments)}", flush=True)
    finished = subprocess.run([sys.executable, "-m", "perturbzoo", *arguments])
    if finished.returncode:
        sys.exit(f"demo: 'perturbzoo {arguments[0]}' failed; its message is above")


def unseen_combinations(checkpoint: Path, count: int) -> list[str]:
    """The first combinations of the test split: conditions the model was never shown."""
    import perturbzoo
    from perturbzoo.data.splits import Split

    split = Split.from_json(perturbzoo.load(checkpoint).get_spec().split)
    return [condition for condition in split.conditions("test") if "+" in condition][:count]


def draw(folder: Path, screen: Path, predictions: Path) -> list[Path]:
    """Draw training curves, the table of scores, and predicted against observed changes."""
    import anndata
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd

    import perturbzoo
    from perturbzoo.plotting import plot_delta_scatter, plot_score_bars, plot_training_curves
    from perturbzoo.simulate import truth_frame

    figures = []

    def save(figure: plt.Figure, name: str) -> None:
        path = folder / name
        figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close(figure)
        figures.append(path)

    save(plot_training_curves(next((folder / "run" / "logs").rglob("metrics.csv")))[0].figure, "training.png")
    summary = pd.read_csv(folder / "run" / "test" / "summary.csv")
    save(plot_score_bars(summary, metric="pearson_delta").figure, "scores.png")
    predicted, truth = anndata.read_h5ad(predictions), truth_frame(anndata.read_h5ad(screen), "delta")
    truth.index = [str(perturbzoo.parse_condition(name)) for name in truth.index]
    conditions = list(predicted.obs["condition"].unique())
    figure, axes = plt.subplots(1, len(conditions), figsize=(5 * len(conditions), 4.5), squeeze=False)
    for ax, condition in zip(axes[0], conditions, strict=True):
        rows = (predicted.obs["condition"] == condition).to_numpy()
        change = np.asarray(predicted.layers["delta"][rows]).mean(axis=0)
        true = truth.loc[condition, predicted.var_names].to_numpy()
        plot_delta_scatter(true, change, list(predicted.var_names), condition=condition, targets=condition.split("+"), ax=ax)
    save(figure, "unseen_combinations.png")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where to leave everything (default: demo)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of training (default: 40)")
    options = parser.parse_args()
    started = time.perf_counter()
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    screen, checkpoint = folder / "screen.h5ad", folder / "run" / "checkpoints" / "best.ckpt"
    predictions = folder / "predictions.h5ad"

    # modules, so that regulators share targets and the GO-like table says something about those nobody perturbed
    network = ("--genes", "200", "--regulators", "40", "--modules", "4", "--in_degree", "4")
    run("simulate", *network, "--singles", "40", "--doubles", "40", "--depth_spread", "0.3", "--output", str(screen))
    run(
        "fit",
        *("--config", "configs/data/simulated.yaml", "--config", "configs/model/gears.yaml"),
        *("--data.path", str(screen), "--data.perturbation_graph", f"[{{kind: go, path: {screen.with_suffix('.go.csv')}}}]"),
        *("--trainer.max_epochs", str(options.epochs), "--trainer.default_root_dir", str(folder / "run")),
    )
    run("test", "--ckpt_path", str(checkpoint), "--trainer.default_root_dir", str(folder / "run"))
    combinations = unseen_combinations(checkpoint, 2)
    run(
        "predict",
        *("--ckpt_path", str(checkpoint), "--controls", str(screen), "--conditions", ",".join(combinations)),
        *("--n_cells", "300", "--output", str(predictions)),
    )
    figures = draw(folder, screen, predictions)
    print(f"\nmodel        {checkpoint}")
    print(f"table        {folder / 'run' / 'test' / 'summary.csv'}")
    print(f"predictions  {predictions}: {', '.join(combinations)}")
    for figure in figures:
        print(f"figure       {figure}")
    print(f"\ndemo: done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
