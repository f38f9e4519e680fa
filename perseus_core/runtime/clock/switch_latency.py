"""How long a change of clock takes on this GPU, measured while it is done anyway."""

from __future__ import annotations

import statistics
import time
from collections import deque

from perseus_core.runtime.clock.give_back import GuardedClock

# Watching a change costs the controller's thread some 15 ms, so few are watched: the first ones, then one in many.
_NUM_FIRST = 5
_ONE_IN = 200
_KEPT = 9
_LOOK_EVERY_S = 0.001
_LIMIT_S = 0.1


class SwitchLatency:
    """Median time from the lock call until the SM clock that the driver reports has changed.

    Attributes:
        seconds: the latency; the given one until there are three measurements.
    """

    def __init__(self, assumed_s: float) -> None:
        self.seconds = assumed_s
        self._measured_s: deque[float] = deque(maxlen=_KEPT)
        self._num_switches = 0

    def lock(self, clock: GuardedClock, clock_mhz: int) -> None:
        """Locks a clock, and watches the change if it is one of the few to be watched.

        Raises:
            GpuError: if it cannot be locked.
        """
        self._num_switches += 1
        if self._num_switches <= _NUM_FIRST or self._num_switches % _ONE_IN == 0:
            self._lock_and_watch(clock, clock_mhz)
        else:
            clock.lock(clock_mhz)

    def _lock_and_watch(self, clock: GuardedClock, clock_mhz: int) -> None:
        """A change that does not show, because power or heat holds the clock elsewhere, is not counted."""
        before_mhz = clock.sm_clock_mhz()
        asked_s = time.monotonic()
        clock.lock(clock_mhz)
        if before_mhz == clock_mhz:
            return
        while time.monotonic() - asked_s < _LIMIT_S:
            now_mhz = clock.sm_clock_mhz()
            if abs(now_mhz - clock_mhz) < abs(now_mhz - before_mhz):
                self._measured_s.append(time.monotonic() - asked_s)
                break
            time.sleep(_LOOK_EVERY_S)
        if len(self._measured_s) >= 3:
            self.seconds = statistics.median(self._measured_s)
