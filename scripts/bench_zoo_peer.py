"""Run a reference model, its own code, on what bench_zoo_references.py prepared: passed to the interpreter that has it.

::

    python bench_zoo_peer.py cpa FOLDER SEED OUTPUT.json BATCH_SIZE STEPS
    python bench_zoo_peer.py cellot FOLDER CONDITION OUTPUT.json SOURCE ITERATIONS

``cpa``: cpa-tools 0.8.8, installed. FOLDER holds ``cpa.npz``, counts and labels. Its own ``setup_anndata``, ``CPA`` and
``train`` with all defaults, but for the batch size; STEPS batches are timed, from asking for a batch to asking for the next.

``cellot``: the public source of CellOT in the folder SOURCE. FOLDER holds ``ot_CONDITION.npz``, positions of cells. Its own
networks, optimisers, losses, loaders and ``train_cellot``, with the settings of its ``configs/models/cellot.yaml``. Where
it evaluates itself the clock stops, and its transport of the held-out controls is kept in ``OUTPUT.npz``, to be scored by
the same code as ours.

Only what stops them on a machine like this one is worked around: CPA imports a name of tkinter that it does not use;
CellOT takes a class from ``collections`` that Python moved, and its logger, which needs PyTables, is left out.
Knows nothing of this package, which the interpreter need not have.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

WARM_UP = 6  # batches, two rounds of CPA's three


def clock() -> list[float]:
    """Seconds on the wall, and of processor time."""
    return [time.perf_counter(), time.process_time()]


def since(start: list[float]) -> list[float]:
    return [now - then for now, then in zip(clock(), start, strict=True)]


def peak() -> float:
    """Largest resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def cpa(folder: Path, batch_size: int, steps: int) -> dict[str, Any]:
    """Time the reference's training; the adversaries get two batches of three, the autoencoder the third."""
    try:
        import tkinter  # noqa: F401
    except ImportError:
        sys.modules["tkinter"] = ModuleType("tkinter")
    sys.modules["tkinter"].N = "n"  # type: ignore[attr-defined]

    import anndata
    import pandas as pd
    import scipy.sparse
    from cpa import CPA
    from pytorch_lightning import Callback

    stored = np.load(folder / "cpa.npz", allow_pickle=False)
    counts = scipy.sparse.csr_matrix((stored["data"], stored["indices"], stored["indptr"]), shape=stored["shape"])
    adata = anndata.AnnData(counts, obs=pd.DataFrame({"condition": pd.Categorical(stored["condition"])}))
    adata.obs_names = adata.obs_names.astype(str)
    seconds: list[list[float]] = []

    class Watch(Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, *_: Any) -> None:
            self.start = clock()

        def on_train_batch_end(self, *_: Any) -> None:
            seconds.append(since(self.start))
            self.start = clock()

    CPA.setup_anndata(adata, perturbation_key="condition", control_group="ctrl", max_comb_len=2)
    model = CPA(adata)
    model.train(
        max_epochs=1, use_gpu=False, batch_size=batch_size, callbacks=[Watch()], limit_train_batches=WARM_UP + steps,
        save_path=False, logger=False, enable_checkpointing=False,
    )  # fmt: skip
    networks = [model.module, model.training_plan.perturbation_classifier]
    return {
        "seconds": seconds[WARM_UP:],
        "steps": int(model.training_plan.adv_steps),
        "parameters": sum(parameter.numel() for network in networks for parameter in network.parameters()),
    }


def cellot(folder: Path, condition: str, output: Path, source: Path, iterations: int) -> dict[str, Any]:
    """Train the reference's model of one condition."""
    import collections.abc

    collections.MutableMapping = collections.abc.MutableMapping  # type: ignore[attr-defined]
    sys.path.insert(0, str(source))
    from cellot.data.utils import cast_dataset_to_loader
    from cellot.models.cellot import load_cellot_model
    from cellot.train import train
    from cellot.utils.helpers import load_config, nest_dict

    class Quiet:
        def __init__(self, *_: Any) -> None: ...

        def log(self, *_: Any, **__: Any) -> None: ...

        def flush(self) -> None: ...

    config = load_config(source / "configs" / "models" / "cellot.yaml")
    config.training.n_iters = iterations
    stored = {name: torch.from_numpy(array) for name, array in np.load(folder / f"ot_{condition}.npz").items()}
    networks, optimizers = load_cellot_model(config, input_dim=stored["train_source"].shape[1])
    g = networks[1]
    parts = {"train.source": "train_source", "train.target": "train_target"}
    parts |= {"test.source": "held_source", "test.target": "held_target"}
    cells = {name: list(stored[key]) for name, key in parts.items()}
    loader = cast_dataset_to_loader(nest_dict(cells, as_dot_dict=True), batch_size=256, shuffle=True)
    kept: list[np.ndarray] = []
    seconds: list[list[float]] = []
    paused = [0.0, 0.0]
    own_distance = train.losses.compute_scalar_mmd

    def look(*samples: np.ndarray) -> float:
        """Its own distance, by which it chooses; before that, with the clock stopped, where the held-out controls go now."""
        seconds.append([now - aside for now, aside in zip(since(start), paused, strict=True)])
        aside = clock()
        with torch.enable_grad():
            kept.append(g.transport(stored["held_source"].clone().requires_grad_()).detach().numpy())
        paused[:] = [before + more for before, more in zip(paused, since(aside), strict=True)]
        return float(own_distance(*samples))

    train.load = lambda *_, **__: (networks, optimizers, loader)
    train.Logger = Quiet
    train.losses.compute_scalar_mmd = look
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "cache").mkdir()
        start = clock()
        train.train_cellot(Path(place), config)
    np.savez_compressed(output.with_suffix(".npz"), moved=np.stack(kept).astype(np.float32))
    return {
        "seconds": seconds,
        "every": int(config.training.eval_freq),
        "batch": int(loader.train.target.batch_size),
        "inner": int(config.training.n_inner_iters),
        "parameters": sum(parameter.numel() for network in networks for parameter in network.parameters()),
    }


def main() -> None:
    task, folder, name, output = sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3], Path(sys.argv[4]).resolve()
    torch.manual_seed(0)
    if task == "cpa":
        result = cpa(folder, int(sys.argv[5]), int(sys.argv[6]))
    else:
        result = cellot(folder, name, output, Path(sys.argv[5]).expanduser().resolve(), int(sys.argv[6]))
    result |= {"peak_mib": peak(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    part = output.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(output)


if __name__ == "__main__":
    main()
