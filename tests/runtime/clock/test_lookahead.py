"""Which clock to ask for, and when."""

from __future__ import annotations

import math

import pytest

from perseus_core.planning.switching import Switching
from perseus_core.runtime.clock.lookahead import Lookahead, without_short_slow_parts
from perseus_core.runtime.clock.planned_clock import PlannedClock

LATENCY_S = 0.015
SWITCHING = Switching(LATENCY_S, LATENCY_S, 0.001)


def following(*clocks_mhz: int, duration_s: float = 0.05) -> Lookahead:
    lookahead = Lookahead()
    lookahead.begin_iteration([PlannedClock(clock, duration_s) for clock in clocks_mhz], LATENCY_S)
    return lookahead


def test_the_next_clock_is_asked_for_one_latency_before_the_boundary() -> None:
    """Up a little earlier, down a little later than that, so that a wrong prediction slows nothing."""
    up, down = following(500, 900), following(900, 500)
    for lookahead in (up, down):
        lookahead.begin_instruction(10.0)
    assert 10.033 < up.next_change_s(SWITCHING) < 10.035 < down.next_change_s(SWITCHING) < 10.037
    assert [up.wanted_mhz(at, SWITCHING) for at in (10.0, 10.03, 10.04, 11.0)] == [500, 500, 900, 900]


def test_nothing_is_due_where_the_next_clock_is_the_same() -> None:
    """The thread can sleep until the next event."""
    lookahead = following(700, 700)
    lookahead.begin_instruction(10.0)
    assert lookahead.next_change_s(SWITCHING) == math.inf
    assert lookahead.wanted_mhz(10.2, SWITCHING) == 700


def test_an_instruction_that_ends_early_is_followed_at_once() -> None:
    """The prediction counts only as long as nothing better is known."""
    lookahead = following(500, 900)
    lookahead.begin_instruction(10.0)
    lookahead.end_instruction()
    assert lookahead.wanted_mhz(10.01, SWITCHING) == 900


def test_after_the_last_instruction_the_first_of_the_next_iteration_is_expected() -> None:
    """With the plan there is; a new one counts from its iteration on."""
    lookahead = following(800, 600)
    for time_s in (10.0, 10.05):
        lookahead.begin_instruction(time_s)
        lookahead.end_instruction()
    assert lookahead.wanted_mhz(10.1, SWITCHING) == 800
    lookahead.end_iteration()
    assert lookahead.wanted_mhz(10.2, SWITCHING) == 800
    lookahead.begin_iteration([PlannedClock(500, 0.05)], LATENCY_S)
    assert lookahead.wanted_mhz(10.3, SWITCHING) == 500


def test_more_instructions_than_planned_are_left_to_the_driver() -> None:
    """What nobody has planned is not slowed."""
    lookahead = following(500)
    for time_s in (10.0, 10.05):
        lookahead.begin_instruction(time_s)
    assert lookahead.wanted_mhz(10.06, SWITCHING) is None


def test_one_clock_can_be_held_and_a_plan_ends_that() -> None:
    """As the profiling sweep does; an iteration without a plan wants nothing at all."""
    lookahead = Lookahead()
    assert lookahead.is_idle
    lookahead.hold(700)
    lookahead.begin_instruction(10.0)
    assert (lookahead.is_idle, lookahead.wanted_mhz(10.0, SWITCHING)) == (False, 700)
    lookahead.begin_iteration(None, LATENCY_S)
    assert lookahead.is_idle
    lookahead.begin_iteration([PlannedClock(600, 0.05)], LATENCY_S)
    assert (lookahead.is_idle, lookahead.wanted_mhz(10.0, SWITCHING)) == (False, 600)


@pytest.mark.parametrize(
    ("planned", "adapted"),
    [
        ([(900, 50), (500, 5), (900, 50)], [900, 900, 900]),  # a dip
        ([(500, 50), (600, 5), (900, 50)], [500, 900, 900]),  # a step on the way up
        ([(900, 50), (600, 5), (500, 50)], [900, 600, 500]),  # a step on the way down may come late
        ([(500, 50), (900, 5), (500, 50)], [500, 900, 500]),  # what is fast is needed
        ([(900, 5), (500, 5)] * 3, [900, 900, 900, 900, 900, 500]),  # too quick to follow
        ([(500, 8), (500, 8), (900, 50)], [500, 500, 900]),  # together long enough
        ([(500, 8), (600, 8), (900, 50)], [900, 900, 900]),
        ([], []),
    ],
)
def test_slow_parts_shorter_than_a_change_are_not_slowed(planned: list[tuple[int, int]], adapted: list[int]) -> None:
    """No instruction ever gets a lower clock than planned, and durations stay."""
    plan = [PlannedClock(clock, milliseconds / 1000) for clock, milliseconds in planned]
    result = without_short_slow_parts(plan, LATENCY_S)
    assert [p.clock_mhz for p in result] == adapted
    assert [p.duration_s for p in result] == [p.duration_s for p in plan]


def test_instructions_at_one_clock_are_passed_over() -> None:
    """Up to the one after which another clock follows, or to the last; so much time at most, as planned."""
    lookahead = following(500, 500, 500, 900, 900)
    assert lookahead.num_begins_to_pass_over(1.0) == 2
    lookahead.begin_instruction(10.0)
    assert lookahead.num_begins_to_pass_over(1.0) == 1
    assert lookahead.num_begins_to_pass_over(0.04) == 0
    for _ in range(2):
        lookahead.begin_instruction(10.0)
    assert lookahead.num_begins_to_pass_over(1.0) == 1
    for _ in range(2):
        lookahead.begin_instruction(10.0)
    assert lookahead.num_begins_to_pass_over(1.0) == 0
