"""Notices when another program sets the clock that we have locked: a lock is only a request, and the last one wins."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from perseus_core.gpu.errors import GpuError, NotSupported
from perseus_core.runtime.log import logger

_LOOK_EVERY_S = 1.0
# A change is in force well within this time; until then the clocks before it may still be seen.
_SETTLED_S = 0.25
_TOLERANCE = 0.02
_MOST_IN_A_ROW = 5


class ClockOverridden(GpuError):  # noqa: N818 (named by what happened)
    """Another program sets the clock again and again, or the GPU does not obey."""


class OverrideWatch:
    """Compares the clock that a GPU runs at with the clock that was asked for, about once a second.

    Only a higher clock tells of another program: a lower one may be the work of power or heat.
    """

    def __init__(self, uuid: str) -> None:
        """Watches the GPU with this UUID."""
        self._uuid = uuid
        self._asked: deque[tuple[float, int | None]] = deque([(0.0, None)])
        self._next_look_s = 0.0
        self._num_in_a_row = 0
        self._has_said_so = False

    def asked(self, clock_mhz: int | None, now_s: float) -> None:
        """A clock was asked for, or, with None, left to the driver."""
        self._asked.append((now_s, clock_mhz))
        self._forget_what_is_over(now_s)

    def has_overridden(self, now_s: float, sm_clock_mhz: Callable[[], int]) -> bool:
        """Whether somebody has set another clock since ours was asked for; says so the first time.

        Args:
            now_s: the time.
            sm_clock_mhz: reads the clock in force.

        Raises:
            ClockOverridden: if one look after the other finds another clock.
            GpuError: if the clock cannot be read.
        """
        if now_s < self._next_look_s:
            return False
        self._forget_what_is_over(now_s)
        expected = [clock_mhz for _, clock_mhz in self._asked if clock_mhz is not None]
        if len(expected) < len(self._asked):
            return False
        self._next_look_s = now_s + _LOOK_EVERY_S
        try:
            seen_mhz = sm_clock_mhz()
        except NotSupported:
            self._next_look_s = math.inf
            return False
        if seen_mhz <= max(expected) * (1 + _TOLERANCE):
            self._num_in_a_row = 0
            return False
        self._num_in_a_row += 1
        what = f"{self._uuid} runs at {seen_mhz} MHz instead of {expected[-1]} MHz"
        if self._num_in_a_row > _MOST_IN_A_ROW:
            raise ClockOverridden(f"{what}, again and again; its clock is given back: keep other programs off it")
        if not self._has_said_so:
            self._has_said_so = True
            logger.warning("%s: another program sets its clock, or it does not obey; it is locked again", what)
        return True

    def _forget_what_is_over(self, now_s: float) -> None:
        """Keeps what may still be seen: all that was asked for lately, and the clock before."""
        while len(self._asked) > 1 and self._asked[1][0] <= now_s - _SETTLED_S:
            self._asked.popleft()
