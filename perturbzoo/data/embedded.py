"""The embedded default data set: a simulated screen with known truth, made on first use into the cache folder.

``embedded:screen.h5ad`` and ``embedded:go.csv`` stand for its two files wherever a path is asked for.
"""

from __future__ import annotations

import os
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
    import pooch

    from perturbzoo import __version__
    from perturbzoo.data.h5ad_writer import new_h5ad
    from perturbzoo.simulate import simulate_linear, write_go_table

    # the version is part of the name: another simulator makes another screen
    folder = Path(os.environ.get("PERTURBZOO_CACHE") or pooch.os_cache("perturbzoo")) / f"embedded-{__version__}"
    if all((folder / file).exists() for file in FILES):
        return folder / name
    folder.mkdir(parents=True, exist_ok=True)
    adata = simulate_linear()
    write_go_table(adata, folder / "go.csv")
    with new_h5ad(folder / "screen.h5ad") as writer:
        writer.start(adata)
    return folder / name
