"""Scores of networks, worked out by hand on four genes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, compare_networks, score_network
from perturbzoo.grn.scoring import edge_agreement

# A -> B -> C, A -| D: 3 edges; C and D regulate nothing
TRUTH = GeneRegulatoryNetwork.from_edges(
    pd.DataFrame({"regulator": ["A", "B", "A"], "target": ["B", "C", "D"], "weight": [1.0, 1.0, -1.0]}), ["A", "B", "C", "D"]
)


def frame(values: dict[tuple[str, str], float]) -> pd.DataFrame:
    table = pd.DataFrame(0.0, index=list("ABCD"), columns=list("AB"))
    for (regulator, target), value in values.items():
        table.loc[target, regulator] = value
    return table


# six candidates (A, B to the other three); in order: edge, no edge (indirect), edge, no edge, edge, no edge
RANKED = frame({("A", "B"): 6, ("A", "C"): 5, ("A", "D"): 4, ("B", "A"): -3, ("B", "C"): -2, ("B", "D"): 1})


def test_hand_worked_ranking():
    score = score_network(RANKED, TRUTH)
    assert score.universe == "2 regulators x 4 targets without self loops: 6 pairs, 3 of them edges"
    assert (score.pairs, score.edges, score.chance) == (6, 3, 0.5)
    # precision at each edge: 1/1, 2/3, 3/5
    assert score.auprc == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert score.auprc_ratio == pytest.approx(2 * (1 + 2 / 3 + 3 / 5) / 3)
    # pairs (edge, no edge) in the right order: 3 + 2 + 1 of 9
    assert score.auroc == pytest.approx(6 / 9)
    # first three: two edges
    assert score.early_precision == pytest.approx(2 / 3)
    assert score.epr == pytest.approx(4 / 3)
    # of those two A -> D is called activating but represses
    assert score.signed_precision == pytest.approx(1 / 3)
    assert score.sign_accuracy == pytest.approx(1 / 3)
    # reachable: A -> B, A -> C (by way of B), A -> D, B -> C; ranks 1, 2, 3, 4, of which 1, 3, 4 are direct
    assert score.direct_auprc == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert score.direct_chance == pytest.approx(3 / 4)


def test_ties_are_expectations():
    """One certain edge, then all others alike: two of the five remaining pairs fill the first three places."""
    score = score_network(frame({("A", "B"): 1.0}), TRUTH)
    assert score.early_precision == pytest.approx((1 + 2 * 2 / 5) / 3)


def test_nothing_listed_is_chance():
    score = score_network(frame({}), TRUTH)
    assert score.auprc_ratio == pytest.approx(1.0)
    assert score.auroc == pytest.approx(0.5)
    assert score.epr == pytest.approx(1.0)
    assert np.isnan(score.sign_accuracy)


def test_truth_scores_one_in_every_figure():
    score = score_network(TRUTH, TRUTH)
    for value in (
        score.auprc,
        score.auroc,
        score.early_precision,
        score.signed_precision,
        score.sign_accuracy,
        score.direct_auprc,
    ):
        assert value == pytest.approx(1.0)


def test_candidates_change_the_universe():
    score = score_network(RANKED, TRUTH, regulators=["A"], targets=["C", "D"])
    assert (score.pairs, score.edges) == (2, 1)
    assert score.auprc == pytest.approx(0.5)
    wide = score_network(RANKED, TRUTH, regulators=["A", "B", "C", "D"])
    assert (wide.pairs, wide.chance) == (12, 0.25)


def test_genes_the_prediction_does_not_know_score_zero():
    partial = frame({("A", "B"): 6, ("A", "C"): 5, ("A", "D"): 4, ("B", "A"): -3}).loc[["D", "B", "A", "C"], ["A"]]
    full = score_network(frame({("A", "B"): 6, ("A", "C"): 5, ("A", "D"): 4}), TRUTH)
    assert score_network(partial, TRUTH) == full


def test_order_of_genes_does_not_matter():
    shuffled = RANKED.loc[["C", "A", "D", "B"], ["B", "A"]]
    assert score_network(shuffled, TRUTH) == score_network(RANKED, TRUTH)


def test_unknown_signs_are_left_out_of_signed_figures():
    table = TRUTH.edges.assign(
        weight=1.0,
        sign=[0 if pair == ("A", "D") else 1 for pair in zip(TRUTH.edges.regulator, TRUTH.edges.target, strict=True)],
    )
    score = score_network(RANKED, GeneRegulatoryNetwork.from_edges(table, TRUTH.genes))
    # without A -> D: A -> B right, A -> C no edge, then B -| A, B -| C (sign wrong), B -> D; two known edges, two places
    assert score.signed_precision == pytest.approx(1 / 2)
    assert score.sign_accuracy == pytest.approx(1 / 2)


def test_probabilities_rank_where_asked():
    table = pd.DataFrame(
        {"regulator": ["A", "A", "B"], "target": ["B", "C", "C"], "weight": [1.0, 9.0, 2.0], "probability": [0.9, 0.1, 0.8]}
    )
    network = GeneRegulatoryNetwork.from_edges(table, TRUTH.genes)
    assert score_network(network, TRUTH, by="probability").direct_auprc > score_network(network, TRUTH).direct_auprc


def test_everyone_gets_the_same_prior():
    prior = GeneRegulatoryNetwork.from_edges(TRUTH.edges.iloc[[0, 1]].assign(probability=1.0), TRUTH.genes)
    result = compare_networks({"head": TRUTH, "baseline": RANKED}, TRUTH, prior=prior, informed=["head"])
    assert list(result.index) == ["head", "baseline", "baseline + prior", "prior"]
    assert result["universe"].nunique() == 1
    # TRUTH's edges sorted by target: A -> B, B -> C; prior + RANKED: these two first, then A -> C, A -> D
    assert result.loc["baseline + prior", "auprc"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert result.loc["baseline", "auprc"] == pytest.approx(score_network(RANKED, TRUTH).auprc)
    nothing = compare_networks({"baseline": RANKED}, TRUTH, prior=prior, prior_strength=0.0)
    assert nothing.loc["baseline + prior", "auprc"] == pytest.approx(nothing.loc["baseline", "auprc"])


def test_agreement_of_inferences():
    one = GeneRegulatoryNetwork.from_edges(
        pd.DataFrame({"regulator": ["A", "B", "A"], "target": ["B", "C", "C"], "weight": [3, 2, 1]})
    )
    other = GeneRegulatoryNetwork.from_edges(
        pd.DataFrame({"regulator": ["A", "B", "A"], "target": ["B", "C", "C"], "weight": [3, 1, -2]})
    )
    assert edge_agreement([one, other], 1) == 1.0
    assert edge_agreement([one, other], 2) == pytest.approx(1 / 3)
    with pytest.raises(PerturbZooError, match="two networks at least"):
        edge_agreement([one], 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_network(RANKED, TRUTH, targets=["B", "Z"]), "1 candidates are not in the reference: Z"),
        (lambda: score_network(RANKED, TRUTH, regulators=["C"]), "0 of 3 candidate pairs are edges"),
        (lambda: score_network(RANKED, TRUTH, regulators=["A"], targets=["B"]), "1 of 1 candidate pairs"),
        (lambda: score_network(RANKED.rename(index=str.lower), TRUTH), "knows none of the candidates, such as A -> A"),
        (lambda: score_network(RANKED.replace(6.0, np.nan), TRUTH), "1 scores are NaN or infinite"),
        (lambda: score_network(pd.concat([RANKED, RANKED]), TRUTH), "name a gene twice"),
        (lambda: compare_networks({"x": RANKED}, TRUTH, informed=["head"]), "informed names head"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(PerturbZooError, match=message):
        call()
