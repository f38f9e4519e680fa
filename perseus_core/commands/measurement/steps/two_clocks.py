"""A plan of two clocks, through the real controller: do instructions run at the clocks that it says?"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass

from perseus_core.commands.measurement.bench import Bench, hold, own_clocks
from perseus_core.commands.measurement.results import NotMeasured, Verdict, standing
from perseus_core.planning.switching import USUAL_JITTER_S, Switching
from perseus_core.runtime.clock.controller import ClockController
from perseus_core.runtime.clock.planned_clock import PlannedClock
from perseus_core.runtime.settings import USUAL_LATENCY_S

_LOWER_CLOCK = 0.75  # of the highest
_SHORTEST_PART_S, _LATENCIES = 0.15, 4.0
# Each clock is held so often for as long as this, in turns, and for so many pulses at least.
_ROUNDS, _NUM_HELD, _SHORTEST_HELD_S = 3, 6, 0.05
# At the lower clock the load must take so many times as long, or it is not the clock.
_LONGER = 1.06
_GUARD_LIMIT_S = 30.0
_NUM_DISCARDED = 2
# An iteration may be so much slower than planned, and so much of its lower half may run at the higher clock.
_SLOWER, _MISSED = 0.01, 0.15


@dataclass(frozen=True)
class TwoClocks:
    """Iterations of two parts, one at a higher and one at a lower clock.

    Attributes:
        clocks_mhz: higher and lower.
        planned_s: an iteration, from what its instructions took at clocks that were held.
        executed_s: the same under the plan (median).
        share_at_lower: of the part that is planned for the lower clock, what ran at it, by how long it took.
        share_at_higher: the same of the other part.
        changes_per_s: calls that locked a clock.
        num_iterations: how many were counted.
    """

    clocks_mhz: tuple[int, int]
    planned_s: float
    executed_s: float
    share_at_lower: float
    share_at_higher: float
    changes_per_s: float
    num_iterations: int

    @property
    def verdict(self) -> Verdict:
        """What a plan promises is what the model of switching executes."""
        slower = self.executed_s / self.planned_s - 1
        higher_mhz, lower_mhz = self.clocks_mhz
        sentence = (
            f"a plan of {higher_mhz} and {lower_mhz} MHz, {self.changes_per_s:.1f} calls a second: iterations take "
            f"{100 * slower:+.1f} % of what was planned; {100 * self.share_at_lower:.0f} % of the part at {lower_mhz} "
            f"MHz and {100 * self.share_at_higher:.0f} % of that at {higher_mhz} MHz ran at it; assumed: time within "
            f"{100 * _SLOWER:g} %, and {100 * (1 - _MISSED):.0f} % or more of each"
        )
        as_assumed = abs(slower) <= _SLOWER and min(self.share_at_lower, self.share_at_higher) >= 1 - _MISSED
        return Verdict(standing(as_assumed=as_assumed), sentence)


def measure_two_clocks(bench: Bench) -> TwoClocks:
    """Times pulses at two clocks, makes a plan of them, and has the controller follow it."""
    higher_mhz = bench.device.supported_clocks_mhz()[0]
    lower_mhz = min(bench.device.supported_clocks_mhz(), key=lambda clock: abs(clock - _LOWER_CLOCK * higher_mhz))
    switching = _switching(bench)
    times_s: dict[int, list[float]] = {higher_mhz: [], lower_mhz: []}
    with own_clocks([bench.device]) as (clock,):
        for _ in range(_ROUNDS):
            for clock_mhz, of_clock_s in times_s.items():
                hold(clock, clock_mhz)
                time.sleep(bench.settle_s)
                of_clock_s += _times_of_pulses_s(bench)
    # A busy machine makes pulses longer, none shorter.
    if min(times_s[lower_mhz]) < _LONGER * min(times_s[higher_mhz]):
        raise NotMeasured(f"the load takes as long at {lower_mhz} MHz as at {higher_mhz} MHz: the clock is not obeyed")
    each_s = {clock_mhz: statistics.median(of_clock_s) for clock_mhz, of_clock_s in times_s.items()}
    part_s = max(_SHORTEST_PART_S, _LATENCIES * max(switching.up_s, switching.down_s))
    clocks = [clock_mhz for clock_mhz in (higher_mhz, lower_mhz) for _ in range(math.ceil(part_s / each_s[clock_mhz]))]
    plan = []
    start_s = 0.0
    for clock_mhz in clocks:
        plan.append(PlannedClock(clock_mhz, start_s, each_s[clock_mhz]))
        start_s += each_s[clock_mhz]
    iterations, changes_per_s = _follow(bench, plan, switching)
    shares = {
        clock_mhz: statistics.mean(
            (took_s - each_s[higher_mhz]) / (each_s[lower_mhz] - each_s[higher_mhz])
            for taken in iterations
            for took_s, planned in zip(taken, plan, strict=True)
            if planned.clock_mhz == clock_mhz
        )
        for clock_mhz in (higher_mhz, lower_mhz)
    }
    executed_s = statistics.median(sum(taken) for taken in iterations)
    return TwoClocks(
        (higher_mhz, lower_mhz),
        start_s,
        executed_s,
        min(1.0, shares[lower_mhz]),
        min(1.0, 1 - shares[higher_mhz]),
        changes_per_s,
        len(iterations),
    )


def _switching(bench: Bench) -> Switching:
    """As it was measured in a step before."""
    latency = bench.known.get("latency")
    if not latency:
        return Switching(USUAL_LATENCY_S, USUAL_LATENCY_S, USUAL_JITTER_S)
    jitter_s = max(USUAL_JITTER_S, latency["jitter_s"])
    return Switching(latency["up"]["median_s"], latency["down"]["median_s"], jitter_s)


def _times_of_pulses_s(bench: Bench) -> list[float]:
    """From the begin of one to the begin of the next."""
    begins_s: list[float] = []
    until_s = time.monotonic() + max(_SHORTEST_HELD_S, bench.step_s / 30)
    while time.monotonic() < until_s or len(begins_s) < _NUM_HELD:
        begins_s.append(time.monotonic())
        bench.load.pulse()
    return [after_s - before_s for before_s, after_s in itertools.pairwise(begins_s)]


def _follow(bench: Bench, plan: list[PlannedClock], switching: Switching) -> tuple[list[list[float]], float]:
    """What each instruction of each iteration took [s], and how often a clock was locked a second."""
    with bench.events.between_iterations():
        slices = bench.slices
    controller = ClockController(bench.device, switching.up_s, threads=bench.threads, slices=slices)
    controller.start()
    try:
        _wait_until_guarded(controller)
        iterations: list[list[float]] = []
        begin_s = time.monotonic()
        while time.monotonic() < begin_s + bench.step_s or len(iterations) < _NUM_DISCARDED + 2:
            iterations.append(_iterate(bench, controller, plan, switching))
        took_s = time.monotonic() - begin_s
        if controller.failure is not None:
            raise controller.failure
        return iterations[_NUM_DISCARDED:], controller.num_lock_calls / took_s
    finally:
        controller.stop(3.0)


def _wait_until_guarded(controller: ClockController) -> None:
    limit_s = time.monotonic() + _GUARD_LIMIT_S
    while not controller.is_guarded:
        if controller.failure is not None:
            raise controller.failure
        if time.monotonic() > limit_s:
            raise NotMeasured(f"the watchdog of the clock has not begun within {_GUARD_LIMIT_S:g} s")
        time.sleep(0.01)


def _iterate(bench: Bench, controller: ClockController, plan: list[PlannedClock], switching: Switching) -> list[float]:
    taken = []
    with bench.events.between_iterations():
        controller.begin_iteration(plan, switching)
    begin_s = time.monotonic()
    for _ in plan:
        controller.instruction_begins(bench.events.record())
        bench.load.pulse()
        controller.instruction_ends(bench.events.record())
        end_s = time.monotonic()
        taken.append(end_s - begin_s)
        begin_s = end_s
    controller.end_iteration()
    return taken
