"""Did instructions run at the clocks that a plan gave them?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from perseus_core.gpu.simulated import ExecutedInstruction

# Noise must not let the power cap take the highest clock down by a step now and then.
NO_POWER_CAP = {"power_limit_w": 500.0, "max_power_limit_w": 500.0}


def late(executed: Sequence[ExecutedInstruction], clocks_mhz: Sequence[int]) -> list[tuple[int, ExecutedInstruction]]:
    """Places and instructions of one iteration of a stage that ran at other clocks for too long.

    Each must run at its clock for 80 % of its time at least, for 95 % where its neighbours have the same clock.
    """
    alike = [a == b for a, b in pairwise(clocks_mhz)]
    found = []
    for place, (clock_mhz, instruction) in enumerate(zip(clocks_mhz, executed, strict=True)):
        neighbours_alike = all(alike[max(0, place - 1) : place + 1])
        if instruction.share_at(clock_mhz) < (0.95 if neighbours_alike else 0.8):
            found.append((place, instruction))
    return found
