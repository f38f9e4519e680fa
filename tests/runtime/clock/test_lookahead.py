"""Which clock to ask for, and when."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType, Kind, gpipe
from perseus_core.planning.switched_pipeline import execute_with_switching
from perseus_core.planning.switching import Switching
from perseus_core.runtime.clock.lookahead import Lookahead
from perseus_core.runtime.clock.planned_clock import PlannedClock
from tests.planned_clocks import without_gaps

SWITCHING = Switching(0.015, 0.015, 0.001)


def following(*clocks_mhz: int, duration_s: float = 0.05) -> Lookahead:
    lookahead = Lookahead()
    lookahead.begin_iteration(without_gaps(*((clock, duration_s) for clock in clocks_mhz)))
    return lookahead


def wanted_mhz(lookahead: Lookahead, now_s: float, in_force_mhz: int | None) -> int | None:
    return lookahead.wanted(now_s, in_force_mhz, SWITCHING).clock_mhz


def test_the_next_clock_is_asked_for_one_latency_before_the_boundary() -> None:
    """Up a little earlier, down a little later than that, so that a wrong prediction slows nothing."""
    up, down = following(500, 900), following(900, 500)
    for lookahead in (up, down):
        lookahead.begin_instruction(10.0)
    assert up.wanted(10.0, 500, SWITCHING) == (500, pytest.approx(10.034))
    assert down.wanted(10.0, 900, SWITCHING) == (900, pytest.approx(10.036))
    assert [wanted_mhz(up, at, 500) for at in (10.0, 10.03, 10.035, 10.05)] == [500, 500, 900, 900]


def test_each_direction_is_asked_for_by_its_own_latency() -> None:
    """A rise that takes long is asked for long before, a fall that takes no time at the boundary."""
    switching = Switching(up_s=0.04, down_s=0.0)
    up, down = following(500, 900), following(900, 500)
    for lookahead in (up, down):
        lookahead.begin_instruction(10.0)
    assert up.wanted(10.0, 500, switching) == (500, pytest.approx(10.01))
    assert down.wanted(10.0, 900, switching) == (900, pytest.approx(10.05))


def test_nothing_is_due_where_the_next_clock_is_the_same() -> None:
    """The thread can sleep until the next event."""
    lookahead = following(700, 700)
    lookahead.begin_instruction(10.0)
    assert lookahead.wanted(10.0, 700, SWITCHING) == (700, math.inf)
    assert wanted_mhz(lookahead, 10.2, 700) == 700


def test_a_clock_is_asked_for_many_short_instructions_ahead() -> None:
    """Of 4 ms each: the rise is due while the second one runs, and what comes late or waits makes it later."""
    lookahead = following(500, 500, 500, 500, 500, 900, duration_s=0.004)
    lookahead.begin_instruction(10.0)
    assert lookahead.wanted(10.0, 500, SWITCHING) == (500, pytest.approx(10.004))
    lookahead.begin_instruction(10.005)
    assert wanted_mhz(lookahead, 10.005, 500) == 900
    waiting = Lookahead()
    waiting.begin_iteration(
        [PlannedClock(500, 0.0, 0.004), PlannedClock(500, 0.104, 0.004), PlannedClock(900, 0.11, 0.004)]
    )
    waiting.begin_instruction(10.0)
    assert waiting.wanted(10.0, 500, SWITCHING) == (500, pytest.approx(10.108 - 0.016))


def test_what_is_wanted_more_briefly_than_a_change_takes_is_passed_over() -> None:
    """The low clock is due when the high one that follows it is due, too."""
    lookahead = Lookahead()
    lookahead.begin_iteration(without_gaps((900, 0.05), (500, 0.001), (900, 0.05)))
    lookahead.begin_instruction(10.0)
    assert wanted_mhz(lookahead, 10.0361, 900) == 900


def test_an_instruction_that_takes_longer_than_planned_delays_all_that_follows() -> None:
    """It may hang for seconds: the clock after the next is not asked for as long as it runs."""
    lookahead = following(500, 900, 500)
    lookahead.begin_instruction(10.0)
    for now_s in (10.06, 11.0, 20.0):
        assert wanted_mhz(lookahead, now_s, 900) == 900
    lookahead.end_instruction()
    for now_s in (20.1, 30.0):  # it waits for another stage
        assert lookahead.wanted(now_s, 900, SWITCHING) == (900, pytest.approx(now_s + 0.05 - 0.014))


def test_an_instruction_that_ends_early_is_followed_at_once() -> None:
    """The prediction counts only as long as nothing better is known."""
    lookahead = following(500, 900)
    lookahead.begin_instruction(10.0)
    lookahead.end_instruction()
    assert wanted_mhz(lookahead, 10.01, 500) == 900


def test_after_the_last_instruction_the_first_of_the_next_iteration_is_expected() -> None:
    """With the plan there is; a new one counts from its iteration on."""
    lookahead = following(800, 600)
    for time_s in (10.0, 10.05):
        lookahead.begin_instruction(time_s)
        lookahead.end_instruction()
    assert lookahead.wanted(10.1, 600, SWITCHING) == (800, math.inf)
    lookahead.end_iteration()
    assert lookahead.wanted(10.2, 800, SWITCHING) == (800, math.inf)
    lookahead.begin_iteration(without_gaps((500, 0.05)))
    assert wanted_mhz(lookahead, 10.3, 800) == 500


def test_more_instructions_than_planned_are_left_to_the_driver() -> None:
    """What nobody has planned is not slowed."""
    lookahead = following(500)
    for time_s in (10.0, 10.05):
        lookahead.begin_instruction(time_s)
    assert wanted_mhz(lookahead, 10.06, 500) is None


def test_one_clock_can_be_held_and_a_plan_ends_that() -> None:
    """As the profiling sweep does; an iteration without a plan wants nothing at all."""
    lookahead = Lookahead()
    assert lookahead.is_idle
    lookahead.hold(700)
    lookahead.begin_instruction(10.0)
    assert (lookahead.is_idle, wanted_mhz(lookahead, 10.0, None)) == (False, 700)
    lookahead.begin_iteration(None)
    assert lookahead.is_idle
    lookahead.begin_iteration(without_gaps((600, 0.05)))
    assert (lookahead.is_idle, wanted_mhz(lookahead, 10.0, None)) == (False, 600)


def test_instructions_that_begin_before_a_change_is_due_are_passed_over() -> None:
    """All but the last of them; the first of an iteration is always looked at."""
    lookahead = following(500, 500, 500, 900, 900)
    assert lookahead.num_begins_to_pass_over(1.0) == 0
    lookahead.begin_instruction(10.0)
    assert lookahead.next_begin_s() == pytest.approx(10.05)
    assert [lookahead.num_begins_to_pass_over(at) for at in (10.04, 10.09, 10.11, 10.16, 11.0)] == [0, 0, 1, 2, 3]
    for time_s in (10.05, 10.1, 10.15, 10.2):
        lookahead.begin_instruction(time_s)
    assert lookahead.num_begins_to_pass_over(11.0) == 0
    assert lookahead.next_begin_s() == math.inf


FAST, SLOW, SLOWER = 1400, 1000, 700
TIMES_S = {FAST: 0.1, SLOW: 0.14, SLOWER: 0.2}


class ObedientGpu:
    """Runs a plan's instructions one after another, while a controller that is never late asks for clocks."""

    def __init__(self, clock_mhz: int, switching: Switching) -> None:
        self._lookahead = Lookahead()
        self._switching = switching
        self._now_s = 0.0
        self._in_force_mhz = self._asked_mhz = clock_mhz
        self._in_force_at_s = self._free_at_s = -math.inf

    def run_iteration(self, plan: list[PlannedClock], outside_s: float) -> list[float]:
        """How long each instruction takes."""
        durations_s = []
        self._lookahead.begin_iteration(plan)
        for _ in plan:
            begin_s, left = self._now_s, 1.0
            self._lookahead.begin_instruction(begin_s)
            while left > 1e-12:
                happens_s = self._look()
                time_s, before_s = TIMES_S[self._in_force_mhz], self._now_s
                self._now_s = min(happens_s, before_s + left * time_s)
                left -= (self._now_s - before_s) / time_s
            self._lookahead.end_instruction()
            durations_s.append(self._now_s - begin_s)
        self._lookahead.end_iteration()
        next_iteration_s = self._now_s + outside_s
        while self._now_s < next_iteration_s:
            self._now_s = min(self._look(), next_iteration_s)
        return durations_s

    def _look(self) -> float:
        """Asks for what is wanted, if it may; returns when to look again."""
        if self._now_s >= self._in_force_at_s:
            self._in_force_mhz = self._asked_mhz
        if self._now_s < self._free_at_s:
            return self._free_at_s if self._now_s >= self._in_force_at_s else self._in_force_at_s
        wanted_mhz, until_s = self._lookahead.wanted(self._now_s, self._asked_mhz, self._switching)
        assert wanted_mhz is not None
        if wanted_mhz == self._asked_mhz:
            return until_s
        latency_s = self._switching.latency_s(self._asked_mhz, wanted_mhz)
        self._in_force_at_s = self._now_s + latency_s
        self._free_at_s = self._now_s + max(latency_s, self._switching.call_s)
        self._asked_mhz = wanted_mhz
        return self._in_force_at_s


def one_stage(outside_time_s: float) -> PipelineProblem:
    """Four forwards and four backwards that take `TIMES_S`."""
    profile = Profile(
        tuple(
            Measurement(InstructionType(0, 0, kind), clock, time_s, 40.0)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
            for clock, time_s in TIMES_S.items()
        )
    )
    return PipelineProblem.of(profile, gpipe(1, 4), 50.0, outside_time_s=outside_time_s)


@given(
    st.lists(st.sampled_from([FAST, SLOW, SLOWER]), min_size=8, max_size=8),
    st.sampled_from([0.0, 0.03, 0.13, 0.31]),
    st.sampled_from([0.0, 0.05, 0.17, 0.27]),
    st.sampled_from([0.0, 0.01, 0.07]),
    st.sampled_from([0.0, 0.11, 0.23]),
)
def test_what_it_asks_for_is_what_the_planner_executes(
    clocks_mhz: list[int], up_s: float, down_s: float, jitter_s: float, call_s: float
) -> None:
    """One GPU that obeys, in virtual time: its instructions take what the planner's model says, whatever the plan."""
    switching = Switching(up_s, down_s, jitter_s, call_s=call_s)
    # Time enough between two iterations that the first clock is in force when the next one begins.
    promised = execute_with_switching(one_stage(outside_time_s=1.0), np.array(clocks_mhz), switching)
    plan = without_gaps(*zip(clocks_mhz, promised.durations_s.tolist(), strict=True))
    gpu = ObedientGpu(clocks_mhz[0], switching)
    for _ in range(3):
        durations_s = gpu.run_iteration(plan, 1.0)
    assert durations_s == pytest.approx(promised.durations_s, abs=1e-6)


@pytest.mark.parametrize(
    ("clocks_mhz", "up_s", "outside_time_s"),
    [
        ([SLOW, SLOWER, FAST, SLOW, SLOWER, SLOW, SLOWER, SLOWER], 0.13, 0.0),
        ([SLOWER, FAST, FAST, SLOWER, FAST, FAST, SLOWER, FAST], 0.03, 0.05),
    ],
)
def test_where_iterations_differ_for_ever_the_longest_is_promised(
    clocks_mhz: list[int], up_s: float, outside_time_s: float
) -> None:
    """A change that comes in one iteration has no time to come in the next."""
    switching = Switching(up_s, 0.27)
    promised = execute_with_switching(one_stage(outside_time_s), np.array(clocks_mhz), switching)
    plan = without_gaps(*zip(clocks_mhz, promised.durations_s.tolist(), strict=True))
    gpu = ObedientGpu(clocks_mhz[0], switching)
    times_s = [sum(gpu.run_iteration(plan, outside_time_s)) for _ in range(40)][20:]
    assert min(times_s) < 0.95 * max(times_s)
    assert max(times_s) == pytest.approx(sum(promised.durations_s))
