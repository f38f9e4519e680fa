"""How long a change of clock takes on this GPU, measured while it is done anyway."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from perseus_core.planning.switching import USUAL_JITTER_S, Switching
from perseus_core.runtime.clock.settable_clock import SettableClock

LOOK_EVERY_S = 0.001
# Looking costs driver calls, and while a change is watched others wait; so few are watched: the first, one in many.
_NUM_FIRST = 8
_ONE_IN = 200
_NEEDED, _KEPT = 3, 9
_LIMIT_S = 0.5


@dataclass(frozen=True)
class _Change:
    """A change of clock that was asked for and does not show yet."""

    before_mhz: int
    clock_mhz: int
    asked_s: float

    @property
    def is_up(self) -> bool:
        return self.clock_mhz > self.before_mhz


class SwitchLatency:
    """Time from the lock call until the SM clock that the driver reports has changed, up and down each for itself.

    What is seen is never too short, but too long where the thread that looks comes late. A clock that falls too early
    makes training slower, one that rises too early does not: so a rise counts as taking the median of what was seen, a
    fall as taking the least. A change that does not show within half a second, because power or heat holds the clock
    elsewhere, does not count.

    Attributes:
        switching: what changes take, as far as is known.
    """

    def __init__(self, assumed_s: float, now_s: Callable[[], float]) -> None:
        """Has measured nothing yet, and takes the assumed latency for true; `now_s` tells the time."""
        self._assumed = Switching(assumed_s, assumed_s, USUAL_JITTER_S)
        self._now_s = now_s
        self._watched: _Change | None = None
        self._up_s: deque[float] = deque(maxlen=_KEPT)
        self._down_s: deque[float] = deque(maxlen=_KEPT)
        self._num_switches = 0
        self.switching = self._measured()

    @property
    def is_watching(self) -> bool:
        """Whether a change is being watched: `look` every `LOOK_EVERY_S`; another change waits meanwhile if it can."""
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
            (self._up_s if change.is_up else self._down_s).append(elapsed_s)
            self.switching = self._measured()
        elif elapsed_s >= _LIMIT_S:
            self._watched = None

    def assume(self, switching: Switching) -> None:
        """What a plan takes for true, until it has been measured here."""
        self._assumed = switching
        self.switching = self._measured()

    @property
    def up_s(self) -> float:
        """As measured; 0 if it was not yet."""
        return statistics.median(self._up_s) if len(self._up_s) >= _NEEDED else 0.0

    @property
    def down_s(self) -> float:
        """As measured; 0 if it was not yet."""
        return min(self._down_s) if len(self._down_s) >= _NEEDED else 0.0

    def look_no_longer(self) -> None:
        """Another change is due: how long this one takes will not be known."""
        self._watched = None

    def _measured(self) -> Switching:
        """As far as it is known: of the other direction, or as assumed, until enough changes were seen."""
        up_s, down_s = self.up_s, self.down_s
        return Switching(
            up_s=up_s or down_s or self._assumed.up_s,
            down_s=down_s or up_s or self._assumed.down_s,
            jitter_s=self._assumed.jitter_s,
        )
