"""The embedded default data set: a simulated screen with known truth, made on first use into the cache folder.

``embedded:screen.h5ad`` and ``embedded:go.csv`` stand for its two files wherever a path is asked for.
"""

from __future__ import annotations

from pathlib import Path

from perturbzoo.errors import PerturbZooError

FILES = ("screen.h5ad", "go.csv")


def embedded_file(name: str) -> Path:
    """Return one of :data:`FILES`, simulating it if it is not in the cache yet.

    Raises
    ------
    PerturbZooError
        There is no such embedded file.
    """
    if name not in FILES:
        raise PerturbZooError(f"embedded:{name}: there is no such file; the embedded data set has {' and '.join(FILES)}")
    from perturbzoo import __version__
    from perturbzoo.data.h5ad_writer import new_h5ad
    from perturbzoo.data.public import cache_folder
    from perturbzoo.simulate import random_network, simulate_screen, write_go_table

    # version and simulator are part of the name: another one makes another screen
    folder = cache_folder() / f"embedded-{__version__}-network"
    if all((folder / file).exists() for file in FILES):
        return folder / name
    folder.mkdir(parents=True, exist_ok=True)
    # what scripts/demo.py asks of `perturbzoo simulate`: regulators of one module share targets, so that something can be learned
    # about those nobody perturbed
    network = random_network(200, n_regulators=40, modules=4, sign_of="regulator", in_degree=4.0)
    adata = simulate_screen(network, n_singles=40, n_doubles=40, depth_spread=0.3)
    write_go_table(adata, folder / "go.csv")
    with new_h5ad(folder / "screen.h5ad") as writer:
        writer.start(adata)
    return folder / name
