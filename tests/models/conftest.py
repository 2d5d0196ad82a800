"""A spec and training pseudobulks made by hand: what models need of their data, without any cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from perturbzoo.data.datamodule import TrainingPseudobulks
from perturbzoo.data.spec import DataSpec
from perturbzoo.perturbation import parse_condition

Screen = tuple[DataSpec, TrainingPseudobulks]


def _make_screen(
    training: Sequence[str | tuple[str, int]],
    *,
    genes: Sequence[str] = ("A", "B", "C", "D", "E", "F"),
    other_targets: Sequence[str] = (),
    n_contexts: int = 1,
    seed: int = 0,
) -> Screen:
    """Make a spec and its training pseudobulks with random means.

    Parameters
    ----------
    training
        The training pairs, ``"A+B"`` or ``("A+B", context)``.
    genes
        Names of the genes.
    other_targets
        Targets that are named without being trained.
    n_contexts
        Contexts ``("context0",)``, ``("context1",)``, ...
    seed
        Of the means: control about 1, changes about 0.5, log1p-normalised.
    """
    generator = np.random.default_rng(seed)
    pairs = [(pair, 0) if isinstance(pair, str) else pair for pair in training]
    conditions = [parse_condition(text) for text, _ in pairs]
    contexts = np.array([context for _, context in pairs])
    control = generator.uniform(0.5, 1.5, (n_contexts, len(genes))).astype(np.float32)
    bulks = TrainingPseudobulks(
        conditions=conditions,
        contexts=contexts,
        mean=control[contexts] + generator.normal(0, 0.5, (len(pairs), len(genes))),
        count=np.full(len(pairs), 30),
        control_mean=control.astype(np.float64),
    )
    spec = DataSpec(
        genes=tuple(genes),
        targets=tuple(sorted({target for condition in conditions for target in condition.targets} | set(other_targets))),
        default_kind="knockout",
        covariates={},
        match_on=("cell_type",) if n_contexts > 1 else (),
        contexts=tuple((f"context{number}",) for number in range(n_contexts)) if n_contexts > 1 else ((),),
        control_mean=control,
        value_space="counts",
        depth=1000.0,
        size_factor_key=None,
        split="",
        training_pairs=tuple((str(condition), int(context)) for condition, (_, context) in zip(conditions, pairs, strict=True)),
    )
    return spec, bulks


@pytest.fixture(scope="session")
def make_screen() -> Callable[..., Screen]:
    """The factory of hand-made screens; see :func:`_make_screen` for the arguments."""
    return _make_screen
