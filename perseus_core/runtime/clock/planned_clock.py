"""What a plan says of one instruction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedClock:
    """What a plan says of one instruction of this stage.

    Attributes:
        clock_mhz: at which clock it shall run.
        duration_s: how long it is expected to take at it.
    """

    clock_mhz: int
    duration_s: float
