"""The map of steady states and its derivative: against the kinetics themselves, and against differentiation by machine."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, Interventions, RegulatoryDynamics, steady_state
from perturbzoo.grn.responses import RestMap, context_rows, levels_at_rest
from perturbzoo.perturbation import parse_condition

EDGES = pd.DataFrame({"regulator": ["A", "C", "B", "A"], "target": ["B", "B", "A", "C"], "weight": [1.5, -2.0, -0.8, 0.7]})
NETWORK = GeneRegulatoryNetwork.from_edges(EDGES, ["A", "B", "C", "D"])
REFERENCE = np.array([[1.0, 2.0, 0.5, 3.0], [2.0, 1.0, 1.5, 0.2]])
TEXTS = [
    "A:knockout~0.7",
    "B:interference@0.6",
    "C:overexpression+A:activation",
    "A:clamp@0.3~0.8+C:knockout",
    "D:interference",
]
ACTS = Interventions.from_conditions([parse_condition(text) for text in TEXTS], NETWORK.genes, dtype=torch.float64)
CONTEXT = torch.tensor([0, 1, 1, 0, 1])
FORMS = [
    {"kinetics": "additive"},
    {"kinetics": "additive", "dense": True},
    {"kinetics": "hill"},
    {"kinetics": "hill", "rank": 2},
    {"kinetics": "multiplicative"},
]


def make(**options) -> RegulatoryDynamics:
    given = {"reference": REFERENCE, "decay": np.array([1.0, 0.3, 2.0, 0.7]), "dtype": torch.float64}
    return RegulatoryDynamics(NETWORK, **given, **options)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_map_and_slopes_are_those_of_the_kinetics(form):
    dynamics = make(**form)
    rest = RestMap(dynamics, ACTS, CONTEXT)
    level = torch.from_numpy(np.random.default_rng(0).lognormal(0, 0.5, (5, 4)))
    production, decay = dynamics.terms(torch.tensor(torch.inf), level, ACTS, CONTEXT)
    torch.testing.assert_close(rest(level), production / decay)

    def mapped(state: torch.Tensor) -> torch.Tensor:
        made, gone = dynamics.terms(torch.tensor(torch.inf), state, ACTS, CONTEXT)
        return (made / gone).sum(0)

    jacobian = torch.autograd.functional.jacobian(mapped, level)  # (target, row, regulator)
    found = torch.zeros(4, 5, 4, dtype=torch.float64)
    by_level = rest.slopes(level) * rest.function.T[rest.regulator]
    found[rest.target, :, rest.regulator] = by_level
    torch.testing.assert_close(found, jacobian)
    change = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 5)))
    torch.testing.assert_close(rest.push(by_level, change), torch.einsum("tnr,rn->tn", jacobian, change))
    torch.testing.assert_close(rest.pull(by_level, change), torch.einsum("tnr,tn->rn", jacobian, change))


@pytest.mark.parametrize("layers", [{}, {"splicing": True}, {"protein": True}, {"splicing": True, "protein": True}], ids=str)
def test_steady_states_are_fixed_points_whatever_the_layers(layers):
    dynamics = make(kinetics="hill", **layers)
    level = levels_at_rest(dynamics, ACTS, CONTEXT)
    torch.testing.assert_close(RestMap(dynamics, ACTS, CONTEXT)(level), level, rtol=1e-7, atol=1e-8)
    solved = steady_state(dynamics.bind(ACTS, CONTEXT), dynamics.control_state[CONTEXT])
    mature = dynamics.split(solved)["spliced" if "splicing" in layers else "mrna"]
    torch.testing.assert_close(level, mature.detach(), rtol=1e-7, atol=1e-8)


def test_contexts():
    dynamics = make()
    assert context_rows(dynamics, None, 3).tolist() == [0, 0, 0]
    assert context_rows(dynamics, 1, 2).tolist() == [1, 1]
    assert context_rows(dynamics, torch.tensor([1, 0]), 2).tolist() == [1, 0]
    with pytest.raises(PerturbZooError, match="contexts 2 to 2, but there are 2"):
        context_rows(dynamics, 2, 1)
    with pytest.raises(PerturbZooError, match=r"shape \(3,\)"):
        context_rows(dynamics, torch.tensor([0, 0, 0]), 2)
