"""Whether a steady state is stable: the eigenvalues of the system's Jacobian there.

Dynamics of :mod:`perturbzoo.grn.dynamics` are bounded, so an unstable network does not blow up: it oscillates, or leaves
for another steady state.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs
from torch import Tensor

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn.solvers import Rates

DENSE_STATES = 400  # entries of the state up to which all eigenvalues are computed


def leading_eigenvalue(rates: Rates, state: Tensor, time: float = float("inf")) -> tuple[complex, np.ndarray]:
    """Find the eigenvalue of largest real part of the Jacobian, and its vector.

    Parameters
    ----------
    rates
        The system ``(time, state) -> (production, decay)``.
    state
        Shape ``(S,)`` or ``(1, S)``: one row.
    time
        When; infinity is the far future.

    Returns
    -------
    value, vector
        Per time unit: a real part below 0 means stable, an imaginary part that it oscillates on the way. And the direction,
        shape ``(S,)``, complex, in which that happens.
    """
    point = state.detach().double().requires_grad_()
    size = point.numel()
    moment = torch.as_tensor(time, dtype=torch.float64)

    def derivative(value: Tensor) -> Tensor:
        production, decay = rates(moment, value.to(state.dtype))
        return (production - decay * value.to(state.dtype)).double()

    def pushed(vector: np.ndarray) -> np.ndarray:
        direction = torch.as_tensor(np.asarray(vector, dtype=float).ravel(), dtype=torch.float64).reshape(point.shape)
        return torch.autograd.functional.jvp(derivative, point, direction)[1].detach().numpy().ravel()

    if size > DENSE_STATES:
        try:
            values, vectors = eigs(LinearOperator((size, size), matvec=pushed, dtype=float), k=1, which="LR", v0=np.ones(size))
            return complex(values[0]), vectors[:, 0]
        except ArpackNoConvergence:
            pass  # eigenvalues lie too close: take them all
    jacobian = torch.autograd.functional.jacobian(derivative, point).reshape(size, size).detach().numpy()
    values, vectors = np.linalg.eig(jacobian)
    first = int(values.real.argmax())
    return complex(values[first]), vectors[:, first]


def require_stable(rates: Rates, state: Tensor, margin: float = 0.0) -> complex:
    """Return the leading eigenvalue, or raise where its real part is above ``-margin``.

    Raises
    ------
    PerturbZooError
        The state is unstable; names the entry (gene) that moves most.
    """
    value, vector = leading_eigenvalue(rates, state)
    if value.real > -margin:
        entry = int(np.abs(vector).argmax())
        entries = getattr(rates, "entries", ())
        name = entries[entry] if len(entries) > entry else f"entry {entry}"
        how = f"oscillates with period {2 * np.pi / abs(value.imag):.3g}" if abs(value.imag) > 1e-9 else "switches"
        raise PerturbZooError(
            f"unstable dynamics: {name} {how} around this steady state (growth {value.real:.3g} per time unit); lower the "
            "weights of its feedback loop, or integrate in time"
        )
    return value
