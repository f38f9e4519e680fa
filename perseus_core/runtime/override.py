"""Notices when another program sets the clock that we have locked: a lock is only a request, and the last one wins."""

from __future__ import annotations

from collections.abc import Callable

from perseus_core.gpu.errors import GpuError, NotSupported
from perseus_core.runtime.log import logger

_LOOK_EVERY_S = 1.0
# A change is in force well within this time; until then the clock before it may still be seen.
_SETTLED_S = 0.25
_TOLERANCE = 0.02
_MOST_OVERRIDES = 5


class ClockOverridden(GpuError):  # noqa: N818 (named by what happened)
    """Another program sets the clock again and again."""


class OverrideWatch:
    """Compares the clock that a GPU runs at with the clock that was asked for, about once a second.

    Only a higher clock tells of another program: a lower one may be the work of power or heat.
    """

    def __init__(self, uuid: str) -> None:
        """Watches the GPU with this UUID."""
        self._uuid = uuid
        self._asked_mhz: int | None = None
        self._before_mhz: int | None = None
        self._asked_at_s = 0.0
        self._next_look_s = 0.0
        self._num_overrides = 0

    def asked(self, clock_mhz: int | None, now_s: float) -> None:
        """A clock was asked for, or, with None, left to the driver."""
        self._before_mhz, self._asked_mhz, self._asked_at_s = self._asked_mhz, clock_mhz, now_s

    def has_overridden(self, now_s: float, sm_clock_mhz: Callable[[], int]) -> bool:
        """Whether somebody has set another clock since ours was asked for; says so the first time.

        Args:
            now_s: time.monotonic().
            sm_clock_mhz: reads the clock in force.

        Raises:
            ClockOverridden: if that happens again and again.
            GpuError: if the clock cannot be read.
        """
        if self._asked_mhz is None or now_s < self._next_look_s:
            return False
        self._next_look_s = now_s + _LOOK_EVERY_S
        highest_mhz = self._asked_mhz
        if now_s - self._asked_at_s < _SETTLED_S:
            if self._before_mhz is None:
                return False
            highest_mhz = max(highest_mhz, self._before_mhz)
        try:
            seen_mhz = sm_clock_mhz()
        except NotSupported:
            self._next_look_s = float("inf")
            return False
        if seen_mhz <= highest_mhz * (1 + _TOLERANCE):
            return False
        self._num_overrides += 1
        what = f"the clock of {self._uuid} was set by another program ({seen_mhz} MHz instead of {self._asked_mhz} MHz)"
        if self._num_overrides > _MOST_OVERRIDES:
            raise ClockOverridden(f"{what}, again and again; it is left alone; keep that program off the job's GPUs")
        if self._num_overrides == 1:
            logger.warning("%s; it is locked again", what)
        return True
