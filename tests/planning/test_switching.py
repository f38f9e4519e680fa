"""Changes of clock that take time: what they do to an iteration, and plans that reckon with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_core.planning.baselines import all_max
from perseus_core.planning.execution import execute
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.rounding import Rounder
from perseus_core.planning.schedule import InstructionType, Kind, gpipe, interleaved, one_f_one_b
from perseus_core.planning.solver import solve
from perseus_core.planning.switching import choose_clocks, execute_with_switching

AnyFrontier = Frontier[PipelineProblem]
FAST, SLOW = 1400, 700
LATENCY_S = 0.02


def two_clocks(num_stages: int) -> Profile:
    """Forward and backward of 0.1 s and 40 J at the fast clock, 0.2 s and 30 J at the slow one."""
    return Profile(
        tuple(
            Measurement(InstructionType(stage, 0, kind), clock, time_s, energy_j)
            for stage in range(num_stages)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
            for clock, time_s, energy_j in ((FAST, 0.1, 40.0), (SLOW, 0.2, 30.0))
        )
    )


def one_stage(num_microbatches: int, outside_time_s: float = 1.0) -> PipelineProblem:
    """GPipe on one stage: all forwards, then all backwards, nothing to wait for."""
    return PipelineProblem.of(two_clocks(1), gpipe(1, num_microbatches), 50.0, outside_time_s=outside_time_s)


def test_without_latency_nothing_differs(problem: PipelineProblem) -> None:
    """Switching at once is switching for free, whatever the clocks."""
    clocks_mhz = np.random.default_rng(0).choice(
        [m.clock_mhz for m in problem.measurements[0]], problem.dag.num_instructions
    )
    at_once, free = execute_with_switching(problem, clocks_mhz, 0.0), execute(problem, clocks_mhz)
    assert (at_once.durations_s == free.durations_s).all()
    assert at_once.energies_j == pytest.approx(free.energies_j)
    assert at_once.iteration_time_s == free.iteration_time_s


@pytest.mark.parametrize("latency_s", [0.0, 0.015, 10.0])
def test_one_clock_never_changes(problem: PipelineProblem, latency_s: float) -> None:
    """All clocks equal: the latency does not matter."""
    free = all_max(problem)
    steady = execute_with_switching(problem, free.clocks_mhz, latency_s)
    assert steady.iteration_time_s == free.iteration_time_s
    assert steady.energy_j == pytest.approx(free.energy_j)


def test_the_first_part_runs_at_the_old_clock() -> None:
    """From slow to fast 20 ms do a tenth of the work; from fast to slow they do a fifth."""
    up = execute_with_switching(one_stage(1), np.array([SLOW, FAST]), LATENCY_S)
    assert up.durations_s == pytest.approx([0.2, 0.02 + 0.9 * 0.1])
    assert up.energies_j == pytest.approx([30.0, 0.1 * 30.0 + 0.9 * 40.0])
    down = execute_with_switching(one_stage(1), np.array([FAST, SLOW]), LATENCY_S)
    assert down.durations_s == pytest.approx([0.1, 0.02 + 0.8 * 0.2])
    assert down.energies_j == pytest.approx([40.0, 0.2 * 40.0 + 0.8 * 30.0])
    assert down.iteration_time_s == pytest.approx(1.0 + 0.28)


def test_the_iteration_before_left_its_clock() -> None:
    """Without time outside the pipeline the first instruction starts at the last one's clock."""
    tight = execute_with_switching(one_stage(1, outside_time_s=0.0), np.array([SLOW, FAST]), LATENCY_S)
    assert tight.durations_s == pytest.approx([0.02 + 0.8 * 0.2, 0.02 + 0.9 * 0.1])
    half_hidden = execute_with_switching(one_stage(1, outside_time_s=0.01), np.array([SLOW, FAST]), LATENCY_S)
    assert half_hidden.durations_s == pytest.approx([0.01 + 0.9 * 0.2, 0.02 + 0.9 * 0.1])


def test_idle_time_hides_a_change() -> None:
    """The first stage waits for its gradient while the second works; its change is done by then."""
    problem = PipelineProblem.of(two_clocks(2), one_f_one_b(2, 1), 50.0, outside_time_s=1.0)
    ran = execute_with_switching(problem, np.array([SLOW, FAST, FAST, FAST]), LATENCY_S)
    assert ran.durations_s == pytest.approx([0.2, 0.1, 0.1, 0.1])


def test_a_change_longer_than_an_instruction_goes_on() -> None:
    """Asked for at 0.2 s, the fast clock is there at 0.45 s: one backward is wholly slow, the next for 50 ms."""
    ran = execute_with_switching(one_stage(2), np.array([SLOW, SLOW, FAST, FAST]), 0.25)
    assert ran.durations_s == pytest.approx([0.2, 0.2, 0.2, 0.05 + 0.75 * 0.1])


def test_another_change_replaces_the_one_under_way() -> None:
    """Asked back to the old clock before the new one is there, the GPU never leaves it."""
    ran = execute_with_switching(one_stage(2), np.array([SLOW, FAST, SLOW, SLOW]), 0.25)
    assert ran.durations_s == pytest.approx([0.2, 0.2, 0.2, 0.2])


def test_a_clock_that_was_not_measured_is_interpolated() -> None:
    """The forward was measured at three clocks, the backward at two of them."""
    middle = Measurement(InstructionType(0, 0, Kind.FORWARD), 1050, 0.14, 33.0)
    problem = PipelineProblem.of(Profile((*two_clocks(1).measurements, middle)), gpipe(1, 1), 50.0, outside_time_s=1.0)
    ran = execute_with_switching(problem, np.array([1050, FAST]), LATENCY_S)
    share = 0.02 / 0.15
    assert ran.durations_s[1] == pytest.approx(0.02 + (1 - share) * 0.1)
    assert ran.energies_j[1] == pytest.approx(share * 35.0 + (1 - share) * 40.0)


@settings(max_examples=60)
@given(st.lists(st.sampled_from([FAST, SLOW]), min_size=32, max_size=32), st.floats(0, 0.5))
def test_durations_lie_between_those_of_both_clocks(clocks: list[int], latency_s: float) -> None:
    """Whatever happens, an instruction takes no less than at the fast clock and no more than at the slow one."""
    problem = PipelineProblem.of(two_clocks(4), one_f_one_b(4, 4), 50.0)
    ran = execute_with_switching(problem, np.array(clocks), latency_s)
    assert ((ran.durations_s >= 0.1 - 1e-12) & (ran.durations_s <= 0.2 + 1e-12)).all()
    assert ((ran.energies_j >= 30.0 - 1e-9) & (ran.energies_j <= 40.0 + 1e-9)).all()
    assert ran.iteration_time_s == problem.dag.iteration_time_s(ran.durations_s)


def test_without_latency_the_plan_is_the_rounded_one(problem: PipelineProblem, frontier: AnyFrontier) -> None:
    """Same clocks, same promise as running them for free."""
    limit_s = all_max(problem).iteration_time_s
    choice = Rounder(problem).choose(frontier, limit_s)
    clocks_mhz = [problem.curves[curve].clocks_mhz[k] for curve, k in zip(problem.curve_of, choice, strict=True)]
    chosen = choose_clocks(problem, frontier, limit_s)
    assert chosen.clocks_mhz.tolist() == clocks_mhz
    assert chosen.energy_j == execute(problem, clocks_mhz).energy_j


@pytest.mark.parametrize("latency_s", [0.001, 0.01, 0.02, 0.1])
@pytest.mark.parametrize("slowdown", [1.0, 1.02, 1.05, 1.2])
@pytest.mark.parametrize("effort", [0, 25])
def test_a_plan_keeps_its_promise(
    problem: PipelineProblem, frontier: AnyFrontier, latency_s: float, slowdown: float, effort: int
) -> None:
    """In no more than the limit, at the time and energy that its clocks really take, and not below the bound."""
    limit_s = min(slowdown * all_max(problem).iteration_time_s, frontier.min_energy_time_s)
    chosen = choose_clocks(problem, frontier, limit_s, switch_latency_s=latency_s, effort=effort)
    really = execute_with_switching(problem, chosen.clocks_mhz, latency_s)
    assert chosen.iteration_time_s == really.iteration_time_s <= limit_s
    assert chosen.energy_j == pytest.approx(really.energy_j)
    assert chosen.energy_j < all_max(problem).energy_j


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Two stages with two chunks; three clocks, anything between a tenth and a whole second, useful or not."""
    thousandths = st.integers(100, 1000)
    return Profile(
        tuple(
            Measurement(InstructionType(stage, chunk, kind), clock, draw(thousandths) / 1000, draw(thousandths) / 10)
            for stage in range(2)
            for chunk in range(2)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
            for clock in (1400, 1050, 700)
        )
    )


@settings(max_examples=100)
@given(profiles(), st.floats(0, 0.5), st.floats(1, 2), st.sampled_from([0.0, 0.05]))
def test_any_plan_is_in_time(profile: Profile, latency_s: float, slowdown: float, outside_time_s: float) -> None:
    """Whatever the profile: never longer than promised, at measured clocks, if all clocks at maximum are in time."""
    problem = PipelineProblem.of(profile, interleaved(2, 4, 2), 20.0, outside_time_s=outside_time_s)
    limit_s = slowdown * all_max(problem).iteration_time_s
    chosen = choose_clocks(problem, solve(problem), limit_s, switch_latency_s=latency_s)
    really = execute_with_switching(problem, chosen.clocks_mhz, latency_s)
    assert chosen.iteration_time_s == really.iteration_time_s <= limit_s * (1 + 1e-12)
    assert chosen.energy_j == pytest.approx(really.energy_j)
    execute(problem, chosen.clocks_mhz)  # refuses what was not measured


@pytest.mark.parametrize("latency_s", [0.01, 0.02])
@pytest.mark.parametrize("slowdown", [1.0, 1.05])
def test_reckoning_with_changes_beats_planning_ahead_of_time(
    problem: PipelineProblem, frontier: AnyFrontier, latency_s: float, slowdown: float
) -> None:
    """A plan made as if changes were free is late; made for so early a time that it is not, it costs more."""
    limit_s = slowdown * all_max(problem).iteration_time_s
    naive = choose_clocks(problem, frontier, limit_s)
    assert execute_with_switching(problem, naive.clocks_mhz, latency_s).iteration_time_s > limit_s
    chosen = choose_clocks(problem, frontier, limit_s, switch_latency_s=latency_s)
    early_s = np.linspace(frontier.fastest_time_s, limit_s, 20)
    early = [choose_clocks(problem, frontier, time_s, effort=0) for time_s in early_s]
    judged = [execute_with_switching(problem, e.clocks_mhz, latency_s) for e in early]
    assert chosen.energy_j < min((j.energy_j for j in judged if j.iteration_time_s <= limit_s), default=np.inf)


def test_changes_that_take_longer_than_instructions_are_avoided(
    problem: PipelineProblem, frontier: AnyFrontier
) -> None:
    """With a latency of a second few changes are left."""

    def num_changes(clocks_mhz: np.ndarray) -> int:
        same_stage = problem.stage_of[1:] == problem.stage_of[:-1]
        return int((np.diff(clocks_mhz)[same_stage] != 0).sum())

    limit_s = 1.05 * all_max(problem).iteration_time_s
    free = choose_clocks(problem, frontier, limit_s)
    slow = choose_clocks(problem, frontier, limit_s, switch_latency_s=1.0)
    assert num_changes(slow.clocks_mhz) < num_changes(free.clocks_mhz) / 2


def test_out_of_reach_the_fastest_is_found_and_said(problem: PipelineProblem, frontier: AnyFrontier) -> None:
    """At the fastest time itself no plan with changes need exist; the promise is what its clocks take."""
    chosen = choose_clocks(problem, frontier, frontier.fastest_time_s, switch_latency_s=0.05)
    really = execute_with_switching(problem, chosen.clocks_mhz, 0.05)
    assert chosen.iteration_time_s == really.iteration_time_s
    assert chosen.iteration_time_s <= all_max(problem).iteration_time_s


def test_equal_input_gives_the_equal_plan(problem: PipelineProblem, frontier: AnyFrontier) -> None:
    """Nothing is left to chance."""
    limit_s = 1.03 * all_max(problem).iteration_time_s
    first, again = (choose_clocks(problem, frontier, limit_s, switch_latency_s=0.015) for _ in range(2))
    assert (first.clocks_mhz == again.clocks_mhz).all()


def test_published_profiles_keep_most_of_their_saving(published: Path) -> None:
    """GPT-3 175B on A100, 24 microbatches, 10 ms: in time, and at most 1.5 of 14.7 points of saving lost."""
    profile = Profile.load(published / "stage_profile" / "gpt3-175b+a100_sxm_bf16.csv")
    problem = PipelineProblem.of(profile, one_f_one_b(8, 24), 83.64)
    frontier, baseline = solve(problem), all_max(problem)
    free = choose_clocks(problem, frontier, baseline.iteration_time_s)
    real = choose_clocks(problem, frontier, baseline.iteration_time_s, switch_latency_s=0.01)
    assert real.iteration_time_s <= baseline.iteration_time_s
    assert real.energy_j < free.energy_j + 0.015 * baseline.energy_j
