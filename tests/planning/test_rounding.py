"""Rounding: real clocks, in time, hardly dearer than the bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_core.errors import InputError
from perseus_core.planning.baselines import all_max
from perseus_core.planning.curves import TradeoffCurve
from perseus_core.planning.dag import Dag
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import PipelineProblem, Problem
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.rounding import Choice, Rounder
from perseus_core.planning.schedule import InstructionType, Kind, interleaved, one_f_one_b
from perseus_core.planning.solver import solve

AnyFrontier = Frontier[PipelineProblem]


@st.composite
def tradeoff_curves(draw: st.DrawFn) -> TradeoffCurve:
    """One to six clocks; times rise, energies fall, not always convex."""
    steps = draw(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=5))
    times_s = np.cumsum([draw(st.integers(10, 100)), *(step for step, _ in steps)]) / 100
    energies_j = 500.0 - np.cumsum([0, *(step for _, step in steps)])
    return TradeoffCurve(tuple(range(1400, 1400 - 15 * len(times_s), -15)), tuple(times_s), tuple(energies_j), 0.0)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any DAG of up to 12 instructions, edges leading from lower to higher numbers."""
    n = draw(st.integers(1, 12))
    pairs = [(a, b) for b in range(n) for a in range(b)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    before, after = np.array(edges, np.int32).reshape(-1, 2).T
    latency_s = draw(st.sampled_from([0.0, 0.01]))
    dag = Dag(n, before, after, np.full(len(edges), latency_s))
    curves = tuple(draw(st.lists(tradeoff_curves(), min_size=1, max_size=3)))
    curve_of = np.array(draw(st.lists(st.integers(0, len(curves) - 1), min_size=n, max_size=n)), np.int32)
    return Problem(dag, curves, curve_of, blocking_power_w=draw(st.sampled_from([0.0, 5.0])), outside_time_s=0.25)


def single_steps(problem: Problem, choice: Choice) -> list[Choice]:
    """Every choice that differs in one instruction, which is slower."""
    slower = []
    for i, curve in enumerate(problem.curve_of):
        for point in range(choice[i] + 1, len(problem.curves[curve].times_s)):
            slower.append(choice.copy())
            slower[-1][i] = point
    return slower


@settings(max_examples=150)
@given(problems(), st.floats(0, 1.2), st.sampled_from([0, 25]))
def test_any_plan_is_in_time_and_not_below_the_bound(problem: Problem, share: float, effort: int) -> None:
    """On any DAG, at any time, also beyond T*: useful clocks, the limit kept, no single slower clock left that fits."""
    frontier, rounder = solve(problem), Rounder(problem)
    limit_s = frontier.fastest_time_s + share * (frontier.min_energy_time_s - frontier.fastest_time_s)
    choice = rounder.choose(frontier, limit_s, effort=effort)
    sizes = np.array([len(curve.times_s) for curve in problem.curves])[problem.curve_of]
    assert ((choice >= 0) & (choice < sizes)).all()
    time_s = rounder.pipeline_time_s(choice) + problem.outside_time_s
    assert time_s <= limit_s * (1 + 1e-12)
    bound_j = frontier.energy_j(min(max(time_s, frontier.fastest_time_s), frontier.min_energy_time_s))
    assert rounder.energy_j(choice) >= bound_j - 1e-9 * abs(bound_j)
    for slower in single_steps(problem, choice):
        assert rounder.pipeline_time_s(slower) + problem.outside_time_s > limit_s * (1 - 1e-9)


@settings(max_examples=100)
@given(problems(), st.floats(0, 1))
def test_more_effort_never_costs_more(problem: Problem, share: float) -> None:
    """The search starts from what is found without it and keeps only what is not worse."""
    frontier, rounder = solve(problem), Rounder(problem)
    limit_s = frontier.fastest_time_s + share * (frontier.min_energy_time_s - frontier.fastest_time_s)
    quick, thorough = (rounder.choose(frontier, limit_s, effort=effort) for effort in (0, 25))
    at_the_limit_j = problem.blocking_power_w * limit_s
    quick_j, thorough_j = (
        rounder.energy_j(c) - problem.blocking_power_w * rounder.pipeline_time_s(c) for c in (quick, thorough)
    )
    assert thorough_j + at_the_limit_j <= (quick_j + at_the_limit_j) * (1 + 1e-9)


@settings(max_examples=100)
@given(problems(), st.data())
def test_reclaiming_brings_any_choice_in_time(problem: Problem, data: st.DataObject) -> None:
    """Late choices become faster until they are in time, down to the fastest iteration there is."""
    rounder = Rounder(problem)
    choice = np.array(
        [data.draw(st.integers(0, len(problem.curves[curve].times_s) - 1)) for curve in problem.curve_of], np.int32
    )
    fastest_s = problem.dag.iteration_time_s(problem.fastest_s)
    limit_s = data.draw(st.floats(1, 2)) * fastest_s
    assert rounder.pipeline_time_s(rounder.reclaim(choice, limit_s)) <= limit_s


def test_equal_input_gives_the_equal_plan(problem: PipelineProblem, frontier: AnyFrontier) -> None:
    """The search's random numbers are always the same, and no plan depends on those asked for before."""
    times_s = np.linspace(frontier.fastest_time_s, frontier.min_energy_time_s, 5)
    first = [Rounder(problem).choose(frontier, t) for t in times_s]
    again = Rounder(problem)
    for time_s, choice in reversed(list(zip(times_s, first, strict=True))):
        assert (again.choose(frontier, time_s) == choice).all()


def test_two_clocks_share_the_time_of_one_between_them() -> None:
    """A chain of equal instructions whose clocks are far apart: as many run at the slower one as fit in the time."""
    curve = TradeoffCurve((1400, 700), (1.0, 2.0), (100.0, 40.0), 0.0)
    n = 10
    dag = Dag(n, np.arange(n - 1, dtype=np.int32), np.arange(1, n, dtype=np.int32), np.zeros(n - 1))
    problem = Problem(dag, (curve,), np.zeros(n, np.int32), blocking_power_w=1.0)
    for num_slow in range(n + 1):
        choice = Rounder(problem).choose(solve(problem), n + num_slow + 0.5, effort=0)
        assert choice.sum() == num_slow


def test_stages_change_clocks_together() -> None:
    """Where each stage's best clock is between two, a mixture in step costs a tenth of what rounding each down does."""
    # Forward and backward on three stages whose clocks leave a gap just where the iteration time asks for.
    curve = TradeoffCurve((1400, 700), (0.10, 0.12), (40.0, 30.0), 50.0)
    schedule = one_f_one_b(3, 40)
    full = PipelineProblem.of(_equal_profile(curve, 3), schedule, 50.0)
    frontier, rounder = solve(full), Rounder(full)
    middle_s = (frontier.fastest_time_s + frontier.min_energy_time_s) / 2
    bound_j = frontier.energy_j(middle_s)
    each_down = rounder.reclaim(rounder.round_down(frontier.durations_s(middle_s)), middle_s)
    lost_alone_j = rounder.energy_j(each_down) - bound_j
    lost_together_j = rounder.energy_j(rounder.choose(frontier, middle_s, effort=0)) - bound_j
    assert lost_together_j < 0.1 * lost_alone_j


def test_a_time_that_cannot_be_is_refused(frontier: AnyFrontier) -> None:
    """The message says what the fastest is."""
    with pytest.raises(InputError, match="cannot be reached; the fastest is"):
        Rounder(frontier.problem).choose(frontier, 0.9 * frontier.fastest_time_s)


@pytest.mark.parametrize(
    ("name", "blocking_power_w", "gap"),
    [("gpt3-175b+a100_sxm_bf16", 83.64, 0.0015), ("bloom+a40_bf16", 70.38, 0.003)],
)
@pytest.mark.parametrize("num_microbatches", [12, 24, 48, 96])
def test_the_gap_to_the_bound_is_small(
    published: str, name: str, blocking_power_w: float, gap: float, num_microbatches: int
) -> None:
    """On published profiles, in no more than the all-maximum-clock time and under straggler slowdowns."""
    profile = Profile.load(f"{published}/stage_profile/{name}.csv")
    problem = PipelineProblem.of(profile, one_f_one_b(8, num_microbatches), blocking_power_w)
    frontier, rounder = solve(problem), Rounder(problem)
    baseline_s = all_max(problem).iteration_time_s
    for slowdown in (1.0, 1.03, 1.05, 1.1):
        limit_s = min(slowdown * baseline_s, frontier.min_energy_time_s)
        choice = rounder.choose(frontier, limit_s)
        assert rounder.pipeline_time_s(choice) <= limit_s
        assert rounder.energy_j(choice) <= (1 + gap) * frontier.energy_j(limit_s)


def test_interleaved_schedules_come_as_near(own_profile: Profile) -> None:
    """Two chunks a stage, transfers that take time: below half a per cent all along the frontier."""
    problem = PipelineProblem.of(
        own_profile.divided_into_chunks(2), interleaved(4, 8, 2), 83.5, transfer_latency_s=0.001
    )
    frontier, rounder = solve(problem), Rounder(problem)
    for share in np.linspace(0, 1, 9):
        limit_s = (1 - share) * frontier.fastest_time_s + share * frontier.min_energy_time_s
        assert rounder.energy_j(rounder.choose(frontier, limit_s)) <= 1.005 * frontier.energy_j(limit_s)


def _equal_profile(curve: TradeoffCurve, num_stages: int) -> Profile:
    return Profile(
        tuple(
            Measurement(InstructionType(stage, 0, kind), clock, time_s, energy_j)
            for stage in range(num_stages)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
            for clock, time_s, energy_j in zip(curve.clocks_mhz, curve.times_s, curve.energies_j, strict=True)
        )
    )
