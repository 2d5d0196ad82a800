"""How far the intervals and error estimates of an ensemble of GEARS can be trusted, on a simulated screen: figure and figures.

::

    python scripts/calibration_gears.py [--figure FILE.png] [--epochs 10]

The screen is one of those that ablate_gears.py looks at (1,000 genes, 100 singles, 60 doubles). Intervals are scaled on the
validation conditions and looked at on the test conditions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import matplotlib as mpl
import pandas as pd
from ablate_gears import SCREENS, simulated

from perturbzoo.models import Ensemble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablate_gears"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/gears_calibration.png"))
    options = parser.parse_args()
    pl.seed_everything(1, verbose=False)
    data = simulated(options.folder, SCREENS[0], {})
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=root,
        )
        model = Ensemble(model="GEARS", arguments={"uncertainty": True}, members=5)
        trainer.fit(model, datamodule=data)
        trainer.test(model, datamodule=data, ckpt_path="best", verbose=False)
        curve, uncertainty = (pd.read_csv(Path(root) / "test" / f"{name}.csv") for name in ("calibration", "uncertainty"))
    print(curve.to_string(index=False))
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from perturbzoo.plotting import plot_calibration, plot_error_ranks

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.6), layout="constrained", width_ratios=[3.4, 4])
    plot_calibration(curve, ax=left)
    plot_error_ranks(uncertainty, ax=right)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.figure, dpi=120, metadata={"Software": ""})
    print(f"figure: {options.figure}")


if __name__ == "__main__":
    main()
