"""How long a change of clock takes on this GPU, measured while it is done anyway."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from perseus_core.runtime.clock.settable_clock import SettableClock

LOOK_EVERY_S = 0.001
# While a change is watched no other is made, for some 15 ms; so few are watched: the first ones, then one in many.
_NUM_FIRST = 5
_ONE_IN = 200
_KEPT = 9
_LIMIT_S = 0.1


@dataclass(frozen=True)
class _Change:
    """A change of clock that was asked for and does not show yet."""

    before_mhz: int
    clock_mhz: int
    asked_s: float


class SwitchLatency:
    """Median time from the lock call until the SM clock that the driver reports has changed.

    A change that does not show within a tenth of a second, because power or heat holds the clock elsewhere, does not
    count.

    Attributes:
        seconds: the latency; the given one until there are three measurements.
    """

    def __init__(self, assumed_s: float, now_s: Callable[[], float]) -> None:
        """Has measured nothing yet; `now_s` tells the time."""
        self.seconds = assumed_s
        self._now_s = now_s
        self._watched: _Change | None = None
        self._measured_s: deque[float] = deque(maxlen=_KEPT)
        self._num_switches = 0

    @property
    def is_watching(self) -> bool:
        """Whether a change is being watched: `look` every `LOOK_EVERY_S`, and make no other change meanwhile."""
        return self._watched is not None

    def lock(self, clock: SettableClock, clock_mhz: int) -> None:
        """Locks a clock, and begins to watch the change if it is one of the few to be watched.

        Raises:
            GpuError: if it cannot be locked.
        """
        self._num_switches += 1
        if self._num_switches > _NUM_FIRST and self._num_switches % _ONE_IN != 0:
            clock.lock(clock_mhz)
            return
        before_mhz = clock.sm_clock_mhz()
        asked_s = self._now_s()
        clock.lock(clock_mhz)
        if before_mhz != clock_mhz:
            self._watched = _Change(before_mhz, clock_mhz, asked_s)
            self.look(clock)

    def look(self, clock: SettableClock) -> None:
        """Looks whether the change shows.

        Raises:
            GpuError: if the clock cannot be read.
        """
        change = self._watched
        if change is None:
            return
        seen_mhz = clock.sm_clock_mhz()
        elapsed_s = self._now_s() - change.asked_s
        if abs(seen_mhz - change.clock_mhz) < abs(seen_mhz - change.before_mhz):
            self._watched = None
            self._measured_s.append(elapsed_s)
            if len(self._measured_s) >= 3:
                self.seconds = statistics.median(self._measured_s)
        elif elapsed_s >= _LIMIT_S:
            self._watched = None
