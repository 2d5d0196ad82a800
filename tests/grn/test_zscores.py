"""Z-scores by hand, direct effects against closed forms of linear chains, and both against simulated networks."""

from __future__ import annotations

import numpy as np
import pytest

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, ScreenEffects, score_network
from perturbzoo.grn.effects import TimeSeries
from perturbzoo.grn.inference_methods import METHODS
from perturbzoo.grn.zscores import direct_part


def pairs(count: int) -> np.ndarray:
    return ~np.eye(count, dtype=bool)


def test_zscore_by_hand():
    """Two ways of perturbing three genes. Changes of B under A, B, C knocked out: -3, -9, 0; knocked down: 1, -4, 0."""
    delta = np.zeros((6, 3))
    delta[:, 1] = [-3, -9, 0, 1, -4, 0]
    effects = ScreenEffects(("A", "B", "C"), ("A", "B", "C", "A:interference", "B:interference", "C:interference"), delta)
    # turned to gains and centred at their medians: 3, 9, 0 less 3; -1, 4, 0 less 0
    out, down = np.array([0.0, 6, -3]), np.array([-1.0, 4, 0])
    expected = np.abs(out) / out.std() + np.abs(down) / down.std()
    found = METHODS["zscore"](effects, pairs(3), 0)
    np.testing.assert_allclose(found[1, [0, 2]], [-expected[0], -expected[2]])
    assert not found[0].any()


def chain(weights: np.ndarray) -> np.ndarray:
    """Responses ``(G, P)`` to one unit less of each gene in turn, nothing else held."""
    return np.linalg.inv(np.eye(len(weights)) - weights)


def test_chain_and_feed_forward_are_taken_apart():
    """A -> B -> C with and without A -> C: what B passes on goes, what A does itself stays."""
    for direct in (0.0, 0.3):
        weights = np.zeros((3, 3))
        weights[1, 0], weights[2, 1], weights[2, 0] = 0.5, 0.8, direct
        found = direct_part(chain(weights), np.arange(3), np.zeros((3, 1)))
        np.testing.assert_allclose(found - np.eye(3), weights, atol=1e-5)


def test_direct_part_of_a_positive_network_without_cycles():
    rng = np.random.default_rng(0)
    weights = np.tril(rng.uniform(0.2, 0.8, (8, 8)) * (rng.random((8, 8)) < 0.4), -1)
    found = direct_part(chain(weights), np.arange(8), np.zeros((8, 1)))
    np.testing.assert_allclose(found - np.eye(8), weights, atol=1e-4)


def test_only_ever_less_and_nothing_through_what_is_not_significant():
    weights = np.zeros((3, 3))
    weights[1, 0], weights[2, 1] = 0.5, 0.8
    response = chain(weights)
    np.testing.assert_allclose(direct_part(response, np.arange(3), np.full((3, 1), 10.0)), response)
    rng = np.random.default_rng(1)
    noisy = rng.normal(size=(12, 12))
    found = direct_part(noisy, np.arange(12), np.full((12, 1), 0.2))
    assert (np.abs(found) <= np.abs(noisy) + 1e-12).all()
    assert (found * noisy >= 0).all()
    # a path that would lower C does not raise what A does to it
    weights[2, 0], weights[2, 1] = 0.9, -0.8
    opposed = chain(weights)
    np.testing.assert_allclose(direct_part(opposed, np.arange(3), np.zeros((3, 1))), opposed)


def test_perturbation_that_moved_nothing_is_no_division_by_zero():
    response = np.array([[0.0, 0.5], [0.0, 1.0], [0.0, 0.3]])
    for error in (0.0, 0.1):
        assert np.isfinite(direct_part(response, np.array([0, 1]), np.full((3, 1), error))).all()
    effects = ScreenEffects(("A", "B", "C"), ("A", "B"), -response.T)
    assert np.isfinite(METHODS["zscore_direct"](effects, pairs(3), 0)).all()


def test_time_series_show_a_regulator_that_nobody_perturbed():
    """B follows A in the undisturbed half; before it, C moves B, which is to be ignored."""
    rng = np.random.default_rng(0)
    delta = rng.normal(size=(4, 12, 3))
    delta[:, :6, 1] = delta[:, :6, 2]
    delta[:, 7:, 1] = (delta[:, 6:-1, 0] + delta[:, 7:, 0]) / 2
    series = TimeSeries(np.arange(12.0), delta, undisturbed_from=6.0)
    before, after = series.steps()
    assert before.shape == after.shape == (20, 3)
    np.testing.assert_array_equal(before[:5], delta[0, 6:11])
    still = np.zeros((3, 3))
    np.fill_diagonal(still, -1)
    effects = ScreenEffects(("A", "B", "C"), ("A", "B", "C"), still, series=series)
    found = METHODS["zscore_direct"](effects, pairs(3), 0)
    without = METHODS["zscore_direct"](ScreenEffects(("A", "B", "C"), ("A", "B", "C"), still), pairs(3), 0)
    assert found[1, 0] > without[1, 0] + 0.3
    assert abs(found[1, 2] - without[1, 2]) < 0.2
    # it survives what a bootstrap does to the effects
    assert effects.with_noise(rng).series is series
    assert effects.select(np.array([0, 2])).series is series


@pytest.mark.parametrize("seed", range(2))
def test_taking_off_indirect_effects_helps_on_simulated_screens(seed):
    from perturbzoo.data.reading import normalise
    from perturbzoo.simulate import simulate_screen

    adata = simulate_screen(n_genes=40, cells_per_condition=60, seed=seed)
    values = adata.X.astype(np.float32)
    total = np.asarray(values.sum(1)).ravel()
    normalise(values, total, float(np.median(total)))
    labels = adata.obs["perturbation"].cat
    effects = ScreenEffects.from_cells(
        values, list(adata.var_names), list(labels.categories), labels.codes.to_numpy(), default_kind="interference"
    )
    truth = GeneRegulatoryNetwork.from_edges(adata.uns["network"], list(adata.var_names))
    found = {}
    for method in ("zscore", "zscore_direct", "total_effect"):
        scores = METHODS[method](effects, pairs(40), 0)
        target, regulator = np.nonzero(scores)
        weight = scores[target, regulator]
        network = GeneRegulatoryNetwork(effects.genes, regulator, target, weight, np.sign(weight), np.ones(len(weight)))
        found[method] = score_network(network, truth)
    assert found["zscore_direct"].auprc > found["zscore"].auprc + 0.03
    assert found["zscore_direct"].auprc > found["total_effect"].auprc
    assert found["zscore_direct"].signed_precision > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 0], np.zeros((1, 2, 3))), "times must be one row of increasing numbers"),
        (([0, 1], np.zeros((1, 3, 3))), "delta has the shape (1, 3, 3), not courses x 2 times x genes"),
        (([0, 1], np.full((1, 2, 3), np.nan)), "delta must be finite"),
        (([0, 1], np.zeros((1, 2, 3)), 1.0), "no step lies after undisturbed_from=1"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(PerturbZooError) as caught:
        TimeSeries(*arguments)
    assert message in str(caught.value)


def test_series_of_other_genes():
    with pytest.raises(PerturbZooError, match="another number of genes than 2"):
        ScreenEffects(("A", "B"), ("A",), [[-1, 0]], series=TimeSeries([0, 1], np.zeros((1, 2, 3))))
