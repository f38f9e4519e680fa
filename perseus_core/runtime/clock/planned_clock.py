"""What a plan says of one instruction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedClock:
    """What a plan says of one instruction of this stage.

    Attributes:
        clock_mhz: at which clock it shall run.
        start_s: when it is expected to begin, counted from the first instruction of the iteration on any stage.
        duration_s: how long it is expected to take, changes of clock included.
    """

    clock_mhz: int
    start_s: float
    duration_s: float

    @property
    def end_s(self) -> float:
        """When it is expected to end."""
        return self.start_s + self.duration_s
