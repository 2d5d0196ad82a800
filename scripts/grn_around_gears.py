"""The network head around GEARS on the two small real screens: held-out error with and without it, and what it explains.

::

    PERTURBZOO_DATA=FOLDER python scripts/grn_around_gears.py [papalexi] [norman] [--seeds 1] [--epochs 20] [--figure FILE.png]

Folds over conditions as in bench_gears_real.py, so that each condition is predicted by models that never saw it. ``GEARS`` is the
backbone alone, ``GEARS in network`` its predictions projected with the weight tau that is best on the fold's validation conditions
(0 among the choices), ``network alone`` the fixed point without a backbone. The prior is TRRUST and DoRothEA (A to C) together. On
the subset of Norman's screen the targets are not measured: they are regulators with no level of their own, and only the held-out
error is looked at.

For Papalexi a head is then fitted to all conditions, without a fold, and its paths from three knockouts are drawn: IFNGR2, JAK2
and STAT1. IFNGR2 and JAK2 act on STAT1 by phosphorylation, which a network of transcripts cannot know: what it shows are the shortest
explanations that the transcripts allow.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from bench_gears_accuracy import observed
from bench_gears_real import FOLDS, METRICS, SCREENS, data_module

import perturbzoo
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.evaluation.comparison import Candidate
from perturbzoo.evaluation.summary import format_table, paired_difference, summarise
from perturbzoo.models import GRNODE
from perturbzoo.models.testing import CEILING, baseline_predictions, score_predictions

PRIOR = [f"$PERTURBZOO_DATA/networks/{name}.tsv.gz" for name in ("trrust_human_from_dorothea", "dorothea_human_ABC")]
KNOCKOUTS = ("IFNGR2", "JAK2", "STAT1")
WITH, WITHOUT, ALONE = "GEARS in network", "GEARS", "network alone"


def fit_head(data: PerturbSeqDataModule, seed: int, **arguments: Any) -> GRNODE:
    """The head, fitted; one epoch is all that it needs."""
    pl.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            max_epochs=1,
            limit_train_batches=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=root,
        )
        trainer.fit(GRNODE(prior=PRIOR, **arguments), datamodule=data)
        return perturbzoo.load(Path(root) / "checkpoints" / "best.ckpt")


def predictions_of(model: GRNODE, data: PerturbSeqDataModule) -> tuple[dict[str, np.ndarray], float]:
    """Predicted changes of the test pairs, with the head, without it, and by the network alone; and tau."""
    table = data.table.select(torch.from_numpy(data.pairs_of("test")))
    control = torch.as_tensor(data.control_mean, dtype=torch.float32)[table.context]
    tau = float(model.tau)
    with torch.no_grad():
        wrapped = model.delta(table, control)[0]
        model.tau.fill_(0.0)
        bare = model.delta(table, control)[0]
        model.tau.fill_(tau)
        alone = model.expected(model.network_change(table)[0], table.context)
    return {WITH: wrapped.numpy(), WITHOUT: bare.numpy(), ALONE: alone.numpy()}, tau


def compare(screen: str, seeds: int, epochs: int) -> None:
    """Print the table over all folds, and the differences that the head makes."""
    collected: dict[str, list[pd.DataFrame]] = {}
    chosen = []
    for seed in range(1, seeds + 1):
        for fold in range(FOLDS):
            with contextlib.redirect_stdout(io.StringIO()):
                data = data_module(screen, {**SCREENS[screen][1], "fold": fold}, seed)
                bulks, _ = observed(data, "test")
                model = fit_head(data, seed, backbone={"class_path": "GEARS", "init_args": {}}, backbone_epochs=epochs)
                changes, tau = predictions_of(model, data)
                predictions = {name: Candidate(bulks.control + change) for name, change in changes.items()}
                baselines = baseline_predictions(data, bulks, model)
                predictions |= {name: Candidate(found.predicted) for name, found in baselines.items()}
                scored = score_predictions(data, bulks, predictions)
            chosen.append(tau)
            for label in (*predictions, CEILING):
                collected.setdefault(label, []).append(scored[label])
    keys = ["condition", "context", "category"]
    tables = {
        label: pd.concat(parts).groupby(keys, as_index=False, sort=False).mean(numeric_only=True)
        for label, parts in collected.items()
    }
    summary = summarise(tables)
    print(f"\n{screen}: {FOLDS} folds, seeds 1 to {seeds}; tau of each fit: {', '.join(f'{tau:g}' for tau in chosen)}")
    print(format_table(summary[summary["metric"].isin(METRICS)]))
    for label in (WITH, ALONE):
        difference = paired_difference(tables[label], tables[WITHOUT])
        for row in difference[
            difference["metric"].isin(("pearson_delta", "mse")) & (difference["category"] == "all")
        ].itertuples():
            print(
                f"  {label} less GEARS, {row.metric}: {row.difference:+.5f} [{row.low:+.5f}, {row.high:+.5f}], {row.n} conditions"
            )
    print(flush=True)


def explain(figure: Path, epochs: int) -> None:
    """The network of all conditions, and the paths of three knockouts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from perturbzoo.plotting import plot_paths

    with contextlib.redirect_stdout(io.StringIO()):
        data = data_module("papalexi", {"method": "no_test", "seed": 1, "val_fraction": 0.1}, 1)
        model = fit_head(data, 1, backbone={"class_path": "GEARS", "init_args": {}}, backbone_epochs=epochs)
    network = model.network()
    edges = network.edges
    sure = edges[edges["probability"] > 0.5].sort_values("probability", ascending=False)
    print(f"papalexi, all conditions: {len(sure)} edges more probable than not, of {len(edges)} candidates")
    print(sure.head(15).round(3).to_string(index=False))
    canvas, axes = pyplot.subplots(1, len(KNOCKOUTS), figsize=(6 * len(KNOCKOUTS), 5))
    for axis, knockout in zip(np.atleast_1d(axes), KNOCKOUTS, strict=True):
        found = model.explain(knockout, n_genes=12, top=2)
        paths = found.paths[found.paths["path"].str.contains("->", regex=False)]
        strongest = paths.reindex(paths["contribution"].abs().sort_values(ascending=False).index).head(8)
        print(f"\n{knockout} knockout: strongest paths (natural log of levels)\n{strongest.round(4).to_string(index=False)}")
        if len(paths):
            plot_paths(found.paths, found.edges, changes=found.genes, ax=axis)
        axis.set_title(f"{knockout} knockout")
    canvas.tight_layout()
    canvas.savefig(figure, dpi=110)
    link = model.link(model.backbone)
    print(f"\nGEARS' predictions and the network of the data\n{link}\nfigure: {figure}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screens", nargs="*", default=["papalexi", "norman"], metavar="papalexi | norman")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20, help="of GEARS (default: 20)")
    parser.add_argument("--figure", type=Path, default=Path("papalexi_paths.png"))
    options = parser.parse_args()
    if wrong := set(options.screens) - {"papalexi", "norman"}:
        parser.error(f"no screen {', '.join(sorted(wrong))}: there are papalexi and norman")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for screen in options.screens:
        compare(screen, options.seeds, options.epochs)
    if "papalexi" in options.screens:
        explain(options.figure, options.epochs)


if __name__ == "__main__":
    main()
