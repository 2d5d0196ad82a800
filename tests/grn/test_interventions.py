"""Every intervention's closed form on two genes, A -> B; combinations, timing, subsets, bad input."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import quad

from perturbzoo.data.batch import encode_conditions
from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, Interventions, RegulatoryDynamics, integrate, steady_state
from perturbzoo.perturbation import KINDS, Condition, Intervention, parse_condition

GENES = ("A", "B")
REFERENCE = np.array([2.0, 3.0])
DECAY = np.array([0.7, 1.3])
WEIGHT, FOLD, GAIN, FLOOR = 1.7, 6.0, 4.0, 0.1
CONTROL = torch.tensor(REFERENCE)


def make(**options) -> RegulatoryDynamics:
    table = pd.DataFrame({"regulator": ["A"], "target": ["B"], "weight": [WEIGHT]})
    settings = {"reference": REFERENCE, "decay": DECAY, "floor": FLOOR, "activation_fold": FOLD, "gain": GAIN}
    network = GeneRegulatoryNetwork.from_edges(table, GENES)
    return RegulatoryDynamics(network, dtype=torch.float64, **(settings | options))


def acts(*texts: str, ramp: float = 0.05) -> Interventions:
    return Interventions.from_conditions([parse_condition(text) for text in texts], GENES, ramp=ramp, dtype=torch.float64)


def level_of_b(level_of_a: float) -> float:
    """v / γ = 2 m_B, f = σ(W φ), φ = log of (level + ε) over (m + ε), ε = floor x m."""
    epsilon = FLOOR * REFERENCE[0]
    drive = WEIGHT * math.log((level_of_a + epsilon) / (REFERENCE[0] + epsilon))
    return 2 * REFERENCE[1] / (1 + math.exp(-drive))


# set on long ago ([-99,]), so that the gate is 1 throughout: level of A, level of A that B sees
CLOSED_FORMS = {
    "A:interference@0.8[-99,]": (0.2, 0.2),
    "A:interference@0.8[-99,]~0.5": (0.6, 0.6),
    "A:activation@0.5[-99,]": (1 + 0.5 * (FOLD - 1), 1 + 0.5 * (FOLD - 1)),
    "A:activation@2[-99,]": (1 + 2 * (FOLD - 1), 1 + 2 * (FOLD - 1)),
    "A:overexpression@1.5[-99,]": (1 + 1.5 * GAIN, 1 + 1.5 * GAIN),
    "A:knockout[-99,]": (1.0, 0.0),
    "A:knockout@0.9[-99,]~0.5": (1.0, 0.55),
    "A:clamp@0[-99,]": (0.0, 0.0),
    "A:clamp@3[-99,]": (3.0, 3.0),
    "A:clamp@3[-99,]~0.5": (2.0, 2.0),
    # any number at once: factors multiply, sources add, a knockout removes function of whatever level there is
    "A:interference@0.5[-99,]+A:activation@1[-99,]": (0.5 * FOLD, 0.5 * FOLD),
    "A:interference@0.5[-99,]+A:overexpression@1[-99,]": (0.5 + GAIN, 0.5 + GAIN),
    "A:overexpression@1[-99,]+A:knockout@0.5[-99,]": (1 + GAIN, 0.5 * (1 + GAIN)),
    "A:interference@0.5[-99,]+A:interference@0.5[-98,]": (0.25, 0.25),
    "A:interference@0.5[-99,]+A:overexpression@1[-99,]+A:knockout@0.5[-99,]": (0.5 + GAIN, 0.25 + GAIN / 2),
    "A:activation@1[-99,]+A:clamp@2[-99,]": (2.0, 2.0),
    "control": (1.0, 1.0),
}


@pytest.mark.parametrize("text", CLOSED_FORMS)
def test_steady_levels_of_both_genes(text):
    own, seen = CLOSED_FORMS[text]
    state = steady_state(make().bind(acts(text)), CONTROL[None])[0]
    assert state[0].item() == pytest.approx(own * REFERENCE[0], rel=1e-8, abs=1e-8)
    assert state[1].item() == pytest.approx(level_of_b(seen * REFERENCE[0]), rel=1e-8)


def test_all_conditions_at_once_are_each_alone():
    texts = list(CLOSED_FORMS)
    together = steady_state(make().bind(acts(*texts)), CONTROL.expand(len(texts), 2))
    for row, text in enumerate(texts):
        torch.testing.assert_close(together[row], steady_state(make().bind(acts(text)), CONTROL[None])[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "last"), [("A:interference@0.8[-99,]", 0.2), ("A:activation[-99,]", FOLD), ("A:overexpression[-99,]", 1 + GAIN)]
)
def test_time_course_of_the_target_is_exponential(text, last):
    """A has no regulator, so it relaxes with its own decay: exactly, at any step."""
    times = [0.0, 0.4, 1.9, 5.0]
    states = integrate(make().bind(acts(text)), CONTROL[None], times, step=5.0)
    expected = [REFERENCE[0] * (last + (1 - last) * math.exp(-DECAY[0] * time)) for time in times]
    np.testing.assert_allclose(states[:, 0, 0].detach(), expected, rtol=1e-10)


@pytest.mark.parametrize("text", ["A:interference@0.9[1,3]", "A:overexpression@0.7[1,3]"])
def test_window_is_the_convolution_with_the_gate(text):
    ramp = 0.05
    (act,) = parse_condition(text)

    def made(time: float) -> float:
        gate = 1 / (1 + math.exp(-(time - 1) / ramp)) / (1 + math.exp(-(3 - time) / ramp))
        return 1 - act.dose * gate if act.kind == "interference" else 1 + GAIN * act.dose * gate

    times = [0.0, 1.5, 2.9, 3.2, 6.0]
    states = integrate(make().bind(acts(text, ramp=ramp)), CONTROL[None], times, step=0.01)
    for state, time in zip(states[1:, 0, 0].tolist(), times[1:], strict=True):
        integral = quad(lambda s, t=time: DECAY[0] * made(s) * math.exp(DECAY[0] * (s - t)), 0, time, points=[1, 3], limit=200)[
            0
        ]
        assert state == pytest.approx(REFERENCE[0] * (math.exp(-DECAY[0] * time) + integral), rel=1e-4)


def test_clamp_takes_the_gene_out_of_its_loop():
    """B represses A; with A held, B follows A and A does not follow B."""
    table = pd.DataFrame({"regulator": ["A", "B"], "target": ["B", "A"], "weight": [WEIGHT, -3.0]})
    network = GeneRegulatoryNetwork.from_edges(table, GENES)
    dynamics = RegulatoryDynamics(network, reference=REFERENCE, decay=DECAY, floor=FLOOR, dtype=torch.float64)
    state = steady_state(dynamics.bind(acts("A:clamp@2.5[-99,]")), CONTROL[None])[0]
    assert state[0].item() == pytest.approx(2.5 * REFERENCE[0], rel=1e-9)
    assert state[1].item() == pytest.approx(level_of_b(2.5 * REFERENCE[0]), rel=1e-8)
    course = integrate(dynamics.bind(acts("A:clamp@2.5[-99,]")), CONTROL[None], [0.0, 0.5, 4.0])
    # 50 times faster than its own turnover: there after a few hundredths of a lifetime
    np.testing.assert_allclose(course[1:, 0, 0].detach(), 2.5 * REFERENCE[0], rtol=1e-6)


def test_clamp_windows_follow_each_other():
    course = integrate(make().bind(acts("A:clamp@3[-99,4]+A:clamp@0.5[4,8]", ramp=0.02)), CONTROL[None], [0.0, 3.0, 7.0, 30.0])
    np.testing.assert_allclose(course[1:, 0, 0].detach() / REFERENCE[0], [3.0, 0.5, 1.0], rtol=1e-4)


def test_overexpression_comes_without_introns():
    """Foreign cDNA raises the spliced RNA and leaves the unspliced alone; interference lowers both."""
    dynamics = make(splicing=True)
    control = dynamics.control_state
    rows = acts("A:overexpression[-99,]", "A:interference@0.5[-99,]")
    state = dynamics.split(steady_state(dynamics.bind(rows), control.expand(2, -1)) / control)
    assert state["unspliced"][:, 0].tolist() == pytest.approx([1.0, 0.5], rel=1e-8)
    assert state["spliced"][:, 0].tolist() == pytest.approx([1 + GAIN, 0.5], rel=1e-8)


def test_acts_on_a_subset_of_cells():
    cells = acts("A:interference@0.8[-99,]+B:clamp@2[-99,]").select(torch.zeros(4, dtype=torch.int64))
    cut = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    state = steady_state(make().bind(cells.restrict(cut)), CONTROL.expand(4, 2)) / CONTROL
    assert state[:, 0].tolist() == pytest.approx([0.2, 1.0, 0.2, 1.0], rel=1e-8)
    assert state[[0, 1], 1].tolist() == pytest.approx([2.0, 2.0], rel=1e-8)
    assert state[3, 1].item() == pytest.approx(1.0, rel=1e-8)
    whole = steady_state(make().bind(cells.restrict(torch.tensor([1.0, 1.0, 0.5, 0.0]))), CONTROL.expand(4, 2)) / CONTROL
    assert whole[:, 0].tolist() == pytest.approx([0.2, 0.2, 0.6, 1.0], rel=1e-8)


def test_far_future_has_only_what_lasts():
    state = steady_state(make().bind(acts("A:interference@0.5[2,9]", "A:interference@0.5[2,]")), CONTROL.expand(2, 2))
    assert (state[:, 0] / CONTROL[0]).tolist() == pytest.approx([1.0, 0.5], rel=1e-8)


def test_table_of_a_batch_gives_the_same():
    """The batch counts targets in its own order, some of which this condition does not use."""
    conditions = [parse_condition("B:knockout@0.4[1,5]~0.7+A:clamp@2"), Condition(), parse_condition("A@0.3")]
    table = encode_conditions(conditions, [0, 0, 0], ["Z", "B", "A"], "interference")
    mine = Interventions.from_table(table, ["Z", "B", "A"], GENES)
    other = Interventions.from_conditions(conditions, GENES, default_kind="interference")
    for name in ("targets", "kind"):
        assert torch.equal(getattr(mine, name), getattr(other, name))
    for name in ("dose", "onset", "offset", "efficacy"):
        torch.testing.assert_close(getattr(mine, name)[mine.targets >= 0], getattr(other, name)[other.targets >= 0])


def test_gradients_of_dose_efficacy_onset_and_offset_match_finite_differences():
    base = acts(
        "A:interference@0.6[0.5,1.4]~0.8+B:overexpression@0.3[0.2,9]~0.9",
        "B:clamp@2[0.3,1.1]~0.7+A:knockout@0.5[0.4,9]~0.9",
        ramp=0.2,
    )
    dynamics = make()

    def course(dose, efficacy, onset, offset):
        rows = Interventions(base.targets, base.kind, dose, onset, offset, efficacy, ramp=0.2)
        # knots are not differentiated: a fixed grid keeps finite differences clean
        return integrate(dynamics.bind(rows), CONTROL.expand(2, 2), [0.0, 1.0, 2.0], step=0.1, knots=())[1:]

    inputs = tuple(value.clone().requires_grad_() for value in (base.dose, base.efficacy, base.onset, base.offset))
    assert torch.autograd.gradcheck(course, inputs, atol=1e-6, rtol=1e-5)


def test_onset_shift_is_a_shift_in_time():
    """d x(t) / d onset = -d x(t) / dt for an act that lasts, since control rests before it."""
    onset = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 1, dtype=torch.float64)
    rows = Interventions(
        torch.zeros(1, 1).long(), torch.full((1, 1), KINDS.index("interference")), ones * 0.9, onset, ones * math.inf, ones
    )
    dynamics = make()
    states = integrate(dynamics.bind(rows), CONTROL[None], [-1.0, 1.4, 2.2], step=0.01)
    for time, state in zip((1.4, 2.2), states[1:], strict=True):
        slope = dynamics(torch.tensor(time, dtype=torch.float64), state, rows)
        for gene in range(2):
            shift = torch.autograd.grad(state[0, gene], onset, retain_graph=True)[0].item()
            assert shift == pytest.approx(-slope[0, gene].item(), rel=5e-3)


def test_infinite_offsets_do_not_spoil_gradients():
    rows = acts("A:interference@0.5")
    rows.offset.requires_grad_()
    integrate(make().bind(rows), CONTROL[None], [0.0, 1.0])[-1].sum().backward()
    assert rows.offset.grad.tolist() == [[0.0]]


def fields(**changed):
    values = {"dose": 1.0, "onset": 0.0, "offset": math.inf, "efficacy": 1.0} | {
        k: v for k, v in changed.items() if k not in ("kind", "ramp")
    }
    kind = torch.full((1, 1), KINDS.index(changed.get("kind", "knockout")))
    tensors = {name: torch.full((1, 1), value) for name, value in values.items()}
    return Interventions(torch.zeros(1, 1).long(), kind, **tensors, ramp=changed.get("ramp", 0.1), labels=("mine",))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: acts("C:knockout"), "condition 'C:knockout': target 'C' is not a gene of the network"),
        (lambda: acts("A:knockout+aa:knockout", "Q:clamp"), "target 'Q' is not a gene.*2 such targets: Q, aa"),
        (lambda: acts("A"), "no kind; write A:knockout"),
        (lambda: acts("A:compound@3"), "compound of gene number 0 .* has no mechanism in a network"),
        (lambda: acts("control", "A:knockout@1.5"), "condition 'A:knockout@1.5': knockout .*dose must lie between 0 and 1"),
        (lambda: acts("A:interference@1.01"), "dose must lie between 0 and 1"),
        (lambda: fields(dose=-0.1, kind="activation"), "condition 'mine': activation .*finite dose of at least 0"),
        (lambda: fields(dose=math.nan), "finite dose"),
        (lambda: fields(efficacy=1.2), "efficacy between 0 and 1"),
        (lambda: fields(onset=3.0, offset=2.0), "onset 3, offset 2.* an offset later than that"),
        (lambda: fields(onset=math.inf), "finite onset"),
        (lambda: fields(ramp=0.0), "ramp 0.0 must be positive"),
        (lambda: Intervention("A", onset=3, offset=2), "offset 2.0 must be later"),
        (
            lambda: Interventions.from_table(encode_conditions([parse_condition("Z")], [0], ["Z"], "knockout"), ["Z"], GENES),
            "1 targets of the batch are not genes of the network: Z",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
