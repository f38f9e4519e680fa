"""Plans for one stage, and whether instructions ran at their clocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from perseus_core.gpu.simulated import ExecutedInstruction
from perseus_core.runtime.clock.planned_clock import PlannedClock

# Noise must not let the power cap take the highest clock down by a step now and then.
NO_POWER_CAP = {"power_limit_w": 500.0, "max_power_limit_w": 500.0}


def without_gaps(*clocks_and_durations: tuple[int, float]) -> list[PlannedClock]:
    """A stage's plan of instructions that follow each other at once."""
    plan: list[PlannedClock] = []
    for clock_mhz, duration_s in clocks_and_durations:
        plan.append(PlannedClock(clock_mhz, plan[-1].end_s if plan else 0.0, duration_s))
    return plan


def not_at_their_clocks(
    iterations: Sequence[Sequence[ExecutedInstruction]], clocks_mhz: Sequence[int]
) -> dict[int, list[ExecutedInstruction]]:
    """Places in a stage's order whose instruction ran at other clocks for too long in half of the iterations or more.

    A busy machine makes any instruction late now and then; a controller that is wrong, always the same ones. One is at
    its clock that runs at it for 80 % of its time at least, for 95 % where its neighbours have the same clock.
    """
    alike = [a == b for a, b in pairwise(clocks_mhz)]
    found = {}
    for place, clock_mhz in enumerate(clocks_mhz):
        neighbours_alike = all(alike[max(0, place - 1) : place + 1])
        enough = 0.95 if neighbours_alike else 0.8
        late = [each[place] for each in iterations if each[place].share_at(clock_mhz) < enough]
        if 2 * len(late) >= len(iterations):
            found[place] = late
    return found
