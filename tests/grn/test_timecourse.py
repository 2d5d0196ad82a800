"""Time courses: flows against closed forms, gradients of onsets, delays and turnovers recovered, and what is no course."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork, integrate
from perturbzoo.grn.course_fitting import CourseOptions, Snapshots, fit_time_course
from perturbzoo.grn.fitted import FittedNetwork
from perturbzoo.grn.levels import Levels
from perturbzoo.grn.timecourse import Course, TimeCourse, fit_onset, inverse_softplus
from perturbzoo.perturbation import Condition, Intervention, parse_condition

CONTROL = np.array([[1.0, 2.0]])
TIMES = [0.5, 1.0, 2.0, 3.0, 4.0, 6.0]
SHARE = 0.8  # of production that a guide takes


def two_genes(decay: float = 1.0) -> FittedNetwork:
    """A activates B; both can be interfered with."""
    edges = pd.DataFrame({"regulator": ["A"], "target": ["B"], "weight": [2.0]})
    acts = [("A", "interference"), ("B", "interference")]
    candidates = GeneRegulatoryNetwork.from_edges(edges, ["A", "B"])
    fitted = FittedNetwork(candidates, 2, CONTROL, acts, "interference").double().requires_grad_(False)
    fitted.strength.fill_(math.log(SHARE / (1 - SHARE)))
    fitted.dynamics.raw_decay.copy_(inverse_softplus(torch.full((2,), decay, dtype=torch.float64)))
    return fitted


def as_course(change: np.ndarray, conditions: list[str], times: list[float], error: float = 0.02) -> TimeCourse:
    """Log changes ``(T, S, 2)`` as a course without noise."""
    steps, series, _ = change.shape
    read = [parse_condition(label) for label in conditions]
    levels = Levels(
        ("A", "B"),
        tuple(read[number] for _ in range(steps) for number in range(series)),
        np.zeros(steps * series, dtype=np.int64),
        (CONTROL * np.exp(change)).reshape(-1, 2),
        CONTROL,
        np.full((steps * series, 2), error),
        np.full((1, 2), error / 100),
        "interference",
    )
    return TimeCourse(levels, np.repeat(times, series))


def simulated(conditions: list[str], times: list[float], onsets: list[list[float]], decay: float = 1.0) -> TimeCourse:
    """The course of acts with other onsets than their names say, by steps so fine that they play no part."""
    truth = two_genes(decay)
    late = [
        Condition(replace(act, onset=onset) for act, onset in zip(parse_condition(label), shifts, strict=True))
        for label, shifts in zip(conditions, onsets, strict=True)
    ]
    encoded = truth.encode(late)
    acts = replace(truth.interventions(encoded), ramp=0.1 / decay)
    context = torch.zeros(len(late), dtype=torch.int64)
    reference = truth.dynamics.control_level[context]
    states = integrate(truth.dynamics.bind(acts, context), reference, [0.0, *times], step=0.01 / decay)
    return as_course(torch.log(states[1:] / reference).numpy(), conditions, times)


def followed(fitted: FittedNetwork, delay: float) -> tuple[Course, torch.Tensor]:
    """A course that is the flow's own, and its delays."""
    dummy = as_course(np.zeros((len(TIMES), 2, 2)), ["A", "B"], TIMES)
    empty = Course(dummy, fitted, "condition")
    delays = torch.full((2, 1), delay, dtype=torch.float64)
    own = empty.rollout(delays).numpy()
    return Course(as_course(own, ["A", "B"], TIMES), fitted, "condition"), delays


def test_a_gene_that_nothing_regulates_follows_its_closed_form():
    """x(t) = 1 - e (1 - K exp(-(t - τ))) once the gate is open; K = E exp(u) = π r / sin(π r) of the logistic gate of width r."""
    late = 1.5
    empty = Course(as_course(np.zeros((len(TIMES), 1, 2)), ["B"], TIMES), two_genes(), "condition")
    found = empty.rollout(torch.full((1, 1), late, dtype=torch.float64))[:, 0].numpy()
    factor = 0.1 * math.pi / math.sin(0.1 * math.pi)
    after = np.array(TIMES)[3:]
    np.testing.assert_allclose(np.exp(found[3:, 1]), 1 - SHARE * (1 - factor * np.exp(-(after - late))), rtol=3e-3)
    np.testing.assert_allclose(found[:, 0], 0, atol=1e-9)  # B regulates nobody
    np.testing.assert_allclose(found[:2, 1], 0, atol=2e-2)  # before the onset nothing but the gate's tail


def test_shooting_and_rollout_lose_nothing_at_the_truth():
    fitted = two_genes()
    course, delays = followed(fitted, 1.0)
    course.shrunk = course.observed
    assert float(course.shooting(delays)) < 1e-6
    assert float(course.residual(delays).abs().max()) < 1e-3
    fitted.dynamics.weight.fill_(1.0)
    assert float(course.shooting(delays)) > 1
    assert float(course.residual(delays).square().sum()) > 1


def test_series_without_cells_at_a_time_are_followed_through():
    """Left out in the middle, at the truth still nothing is lost, as the interval is one of twice the length."""
    whole, delays = followed(two_genes(), 1.0)
    levels = as_course(whole.observed.numpy(), ["A", "B"], TIMES).levels
    kept = np.array([row for row in range(2 * len(TIMES)) if row not in (4, 7)])
    course = Course(TimeCourse(levels.select(kept), np.repeat(TIMES, 2)[kept]), two_genes(), "condition")
    assert (~course.measured[..., 0]).nonzero().tolist() == [[2, 0], [3, 1]]
    course.shrunk = course.observed
    assert float(course.shooting(delays)) < 1e-6


def test_gradient_of_an_onset_is_that_of_finite_differences():
    fitted = two_genes()
    course, _ = followed(fitted, 1.0)

    def loss(delay: torch.Tensor) -> torch.Tensor:
        return 0.5 * course.residual(delay).square().sum() + course.shooting(delay)

    delay = torch.tensor([[1.3], [0.6]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(delay), delay)
    for row in range(2):
        step = torch.zeros(2, 1, dtype=torch.float64)
        step[row] = 1e-5
        slope = (loss(delay.detach() + step) - loss(delay.detach() - step)) / 2e-5
        assert float(gradient[row]) == pytest.approx(float(slope), rel=1e-4)


def test_delays_of_two_genes_are_recovered():
    course = simulated(["A", "B"], TIMES, [[1.5], [0.7]])
    found = fit_onset(two_genes(), course)
    assert found.name == ("A", "B")
    np.testing.assert_allclose(found.delay, [1.5, 0.7], rtol=0.01)


def test_a_target_has_one_delay_in_all_its_conditions():
    course = simulated(["A", "B", "A+B"], TIMES, [[0.8], [2.0], [0.8, 2.0]])
    found = fit_onset(two_genes(), course, of="target")
    assert found.name == ("A", "B")
    np.testing.assert_allclose(found.delay, [0.8, 2.0], rtol=0.01)


def test_standard_error_is_that_of_the_closed_form():
    """Of x = 1 - e + e K exp(-(t - τ)): the error of τ is that of a regression of log x on its slope e K exp(-(t - τ)) / x."""
    late, times, noise = 0.8, [2.0, 2.5, 3.0, 4.0, 6.0], 0.05
    factor = 0.1 * math.pi / math.sin(0.1 * math.pi)
    fall = SHARE * factor * np.exp(-(np.array(times) - late))
    level = 1 - SHARE + fall
    change = np.stack([np.zeros(len(times)), np.log(level)], axis=1)[:, None]
    course = as_course(change, ["B"], times, error=noise)
    found = fit_onset(two_genes(), course, strengths_known=True, unit_known=True)
    expected = noise * math.sqrt(1.0001) / math.sqrt(((fall / level) ** 2).sum())
    assert found.delay[0] == pytest.approx(late, rel=0.01)
    assert found.error[0] == pytest.approx(expected, rel=0.03)
    # strength and log γ beside the delay: d log x / d logit e = e (1 - e) (K exp(-(t - τ)) - 1) / x; γ scales the time since τ
    since = np.array(times) - late
    slopes = np.stack([fall / level, SHARE * (1 - SHARE) * (fall / SHARE - 1) / level, -fall * since / level])
    marginal = noise * math.sqrt(np.linalg.inv(slopes @ slopes.T)[0, 0])
    assert fit_onset(two_genes(), course).error[0] == pytest.approx(marginal, rel=0.1)


def test_turnover_is_recovered_when_times_are_in_other_units():
    """Times in hours of genes that live ten of them; the network starts at one per hour."""
    hours = [5.0, 10.0, 20.0, 35.0, 50.0]
    course = simulated(["A", "B"], hours, [[0.0], [0.0]], decay=0.1)
    fitted = two_genes(1.0)
    assert fit_time_course(course, fitted, CourseOptions(penalty=0.0, shooting_steps=5, rollout_steps=50)) is None
    np.testing.assert_allclose(fitted.dynamics.decay.numpy(), 0.1, rtol=0.02)
    assert not any(parameter.requires_grad for parameter in fitted.parameters())


def test_snapshots_join_the_fit_and_are_at_their_least_at_the_truth():
    """Cells are control cells times the flow's ratio: at the truth the divergence is small, at no change it is not."""
    from perturbzoo.grn.course_fitting import _CourseFit

    rng = np.random.default_rng(0)
    times = [1.0, 3.0]
    course = simulated(["A", "B"], times, [[0.0], [0.0]])
    control = rng.lognormal(1.0, 0.2, (400, 2))
    ratio = np.exp(course.levels.change)[course.row]  # (T, S, G)
    cells: list[list[np.ndarray | None]] = [
        [np.log1p(control[rng.integers(400, size=300)] * ratio[t, s]) for s in range(2)] for t in range(2)
    ]
    torch.manual_seed(0)
    snapshots = Snapshots(cells, [np.log1p(control)])
    fit = _CourseFit(course, two_genes(), CourseOptions(turnover="fixed", snapshots="sinkhorn"), snapshots, None)
    right = float(fit._divergence(torch.log(torch.as_tensor(ratio))))
    wrong = float(fit._divergence(torch.zeros(2, 2, 2, dtype=torch.float64)))
    assert right < 0.1 * wrong


def test_cells_are_averaged_by_condition_and_time_and_controls_over_all_times():
    counts = np.array([[1.0, 2], [3, 2], [0, 4], [2, 4], [5, 0], [5, 2], [1, 1]])
    time = np.array([np.nan, np.nan, 1.0, 1.0, 2.0, 2.0, 1.0])
    cells, conditions = sparse.csr_matrix(np.log1p(counts)), [Condition(), parse_condition("A")]
    where = np.array([0, 0, 1, 1, 1, 1, 0]), np.zeros(7, dtype=int), time
    course = TimeCourse.from_cells(cells, ["A", "B"], conditions, *where, unit=None, default_kind="knockout")
    snapshots = Snapshots.from_cells(course, cells, conditions, *where)
    np.testing.assert_allclose(course.levels.level, [[1, 4], [5, 1]], rtol=1e-6)
    np.testing.assert_allclose(course.levels.control, [[5 / 3, 5 / 3]], rtol=1e-6)
    assert course.times.tolist() == [1.0, 2.0]
    assert course.row.tolist() == [[0], [1]]
    np.testing.assert_allclose(course.last().level, [[5, 1]], rtol=1e-6)
    second = snapshots.cells[1][0]
    assert second is not None
    np.testing.assert_allclose(np.expm1(second), counts[4:6], atol=1e-9)
    np.testing.assert_allclose(np.expm1(snapshots.controls[0]), counts[[0, 1, 6]])


@pytest.mark.parametrize(
    ("labels", "times", "message"),
    [
        (["A", "A"], [2.0, 1.0], "must increase"),
        (["A", "A"], [1.0, 1.0], "must increase"),
        (["A", "A", "B"], [1.0, 2.0, 1.0], "condition 'B' was measured at one time"),
        (["A", "A"], [-1.0, 1.0], "count from 0"),
        (["A", "A"], [1.0, math.nan], "count from 0"),
        (["A", "A"], [1.0], "2 rows, but times of shape"),
    ],
)
def test_what_is_no_course_is_refused(labels, times, message):
    ones = np.ones((len(labels), 2))
    context = np.zeros(len(labels), dtype=np.int64)
    levels = Levels(("A", "B"), tuple(map(parse_condition, labels)), context, ones, ones[:1], ones, ones[:1])
    with pytest.raises(PerturbZooError, match=message):
        TimeCourse(levels, np.array(times))


def test_wrong_genes_options_and_snapshots_are_refused():
    course = as_course(np.zeros((2, 1, 2)), ["A"], [1.0, 2.0])
    other = TimeCourse(replace(course.levels, genes=("B", "A")), course.time)
    with pytest.raises(PerturbZooError, match="genes are not those"):
        fit_onset(two_genes(), other)
    with pytest.raises(PerturbZooError, match="both or neither"):
        fit_time_course(course, two_genes(), CourseOptions(snapshots="sinkhorn"))
    for wrong in ({"turnover": "gene"}, {"delays": "cell"}, {"penalty": -1.0}, {"lr": 0.0}, {"prior_strength": 2.0}):
        with pytest.raises(PerturbZooError, match="time course fit"):
            CourseOptions(**wrong)
    cells = sparse.csr_matrix(np.ones((2, 2)))
    with pytest.raises(PerturbZooError, match="no time"):
        TimeCourse.from_cells(
            cells, ["A", "B"], [Condition(), Condition([Intervention("A")])], np.array([0, 1]), np.zeros(2, dtype=int),
            np.array([0.0, np.nan]), unit=None, default_kind="knockout",
        )  # fmt: skip
