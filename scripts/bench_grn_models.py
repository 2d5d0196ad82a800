"""The parts of bench_grn.py that train models: what other models' predictions imply, and how well intervals cover."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch

import perturbzoo
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.evaluation.calibration import coverage
from perturbzoo.grn.scoring import score_network
from perturbzoo.models import find_model
from perturbzoo.perturbation import parse_condition

if TYPE_CHECKING:
    from bench_gears_data import Bars
    from bench_grn import Case

ENRICHED = 5.0


def fit_model(
    data: PerturbSeqDataModule, name: str, epochs: int = 1, seed: int = 0, test: bool = False, **arguments: Any
) -> Any:
    """Train; the best checkpoint by the validation conditions, or the last where there are none."""
    pl.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            max_epochs=epochs,
            limit_train_batches=1 if epochs == 1 else 1.0,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=root,
        )
        model = find_model(name)(**arguments)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(model, datamodule=data)
        if test:
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.test(model, datamodule=data, verbose=False)
            return model
        return perturbzoo.load(Path(root) / "checkpoints" / "best.ckpt")


def read_data(case: Case, split: dict[str, Any]) -> PerturbSeqDataModule:
    return PerturbSeqDataModule(path=str(case.path), condition_key="perturbation", kind="interference", split=split)


def check_links(cases: list[Case], bars: Bars) -> None:
    """Three "models": the simulator, the training mean, and GEARS trained on the cells that the network was fitted to."""
    rows, verdicts = [], []
    for number, case in enumerate(cases):
        data = read_data(case, {"method": "no_test", "seed": number, "val_fraction": 0.1})
        head = fit_model(data, "GRNODE")
        truth = case.truth.matrix().toarray() != 0
        exact = torch.tensor(
            np.array([case.true_change[parse_condition(name)] for name in case.perturbed]), dtype=torch.float32
        )
        delta = head.expected(exact, torch.zeros(len(exact), dtype=torch.int64)).numpy()
        table = pd.DataFrame(delta, index=case.perturbed, columns=list(case.truth.genes))
        simulator = head.link(table)
        score = score_network(simulator.model, case.truth, by="probability")
        own = score_network(simulator.data, case.truth, by="probability")
        mean = head.link(fit_model(data, "TrainingMean"))
        gears = fit_model(data, "GEARS", epochs=20, seed=number)
        linked = head.link(gears)
        verdicts.append((simulator.signal.present, score.auprc, own.auprc, mean.signal.present, linked.signal.present))
        rows.append({"screen": number, **enrichment(linked, truth, case.truth.genes)})
        print(f"\nlink, GEARS, screen {number}\n{linked}", flush=True)
    print("\nlink: AUPRC of the network that the simulator's own effects imply, beside that of the data")
    for present, implied, own_auprc, *_ in verdicts:
        print(f"  {implied:.3f} (data {own_auprc:.3f}), signal: {present}")
    found = pd.DataFrame(rows)
    print(
        "\nlink, GEARS trained on the same cells: edges that only its predictions imply (hallucinated) and that only the data "
        "have (missed).\nA hit is a listed pair that the truth confirms: hallucinated, an edge of GEARS' network that is no edge of the "
        "truth;\nmissed, an edge of the truth that GEARS' network lacks. Chance is the share of hits among all pairs.\nA listed hallucination is in "
        "GEARS' network by construction; against the share of false edges there (false_of_implied) its enrichment is at most 1 / that."
    )
    print(found.round(3).to_string(index=False), flush=True)
    bars.add(
        all(v[0] and v[1] >= max(v[2], 0.95) for v in verdicts),
        "link: the simulator's own effects imply the true network (AUPRC .95, and no less than the data's)",
    )
    bars.add(not any(v[3] for v in verdicts), "link: the training mean has no network signal")
    for kind in ("hallucinated", "missed"):
        listed, hits, chance = (found[f"{kind}_{what}"] for what in ("listed", "hits", "chance"))
        ratio = hits.sum() / (chance * listed).sum() if listed.sum() else float("nan")
        bars.add(
            ratio >= ENRICHED,
            f"link: {kind} edges {ratio:.1f} x chance ({hits.sum()} of {listed.sum()} listed are hits), bar 5 x",
        )


def enrichment(link: Any, truth: np.ndarray, genes: tuple[str, ...]) -> dict[str, float]:
    """How many of the listed edges the truth confirms, and how many of all pairs it would."""
    place = {gene: number for number, gene in enumerate(genes)}
    # the model's network as it was compared: as many edges as the data's has that are more probable than not
    chance = link.model.matrix("probability").toarray()
    size = int((link.data.probability > 0.5).sum())
    has = np.zeros(chance.shape, dtype=bool)
    has.ravel()[np.argsort(-chance.ravel(), kind="stable")[:size]] = True
    pairs = ~np.eye(len(genes), dtype=bool)
    answer: dict[str, float] = {}
    for kind, hit in (("hallucinated", has & ~truth), ("missed", truth & ~has)):
        rows = link.edges[link.edges["status"] == kind]
        target, regulator = rows["target"].map(place).to_numpy(dtype=int), rows["regulator"].map(place).to_numpy(dtype=int)
        hits = int(hit[target, regulator].sum())
        if kind == "hallucinated":
            # the stricter chance: what share of all edges that the model implies is false
            answer["false_of_implied"] = float((~truth)[has].mean())
        answer |= {f"{kind}_listed": len(rows), f"{kind}_hits": hits, f"{kind}_chance": float(hit[pairs].mean())}
    return answer


def check_intervals(cases: list[Case], bars: Bars) -> None:
    """Coverage of 90 % intervals for held-out single knockdowns, five members, scaled on the validation conditions."""
    reached = []
    for number, case in enumerate(cases):
        data = read_data(case, {"method": "random", "seed": number, "test_fraction": 0.2, "val_fraction": 0.2})
        model = fit_model(data, "GRNODE", members=5, test=True)
        bulks = model.test_bulks
        reached.append(coverage(bulks, 0.9))
        print(
            f"intervals, screen {number}: {len(bulks)} held-out conditions, coverage {reached[-1].mean():.3f}, variances scaled by "
            f"{float(model.variance_scale):.2f}",
            flush=True,
        )
    mean = float(np.concatenate(reached).mean())
    bars.add(
        0.85 <= mean <= 0.95,
        f"intervals: 90 % intervals cover {100 * mean:.1f} % of held-out conditions' changes, bar 85 to 95 %",
    )
