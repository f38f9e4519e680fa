"""How long a change of clock takes on this GPU, measured while it is done anyway."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from perseus_core.planning.switching import USUAL_JITTER_S, SeenChanges, Switching
from perseus_core.runtime.clock.cycle_counting import CycleCounting
from perseus_core.runtime.clock.settable_clock import SettableClock
from perseus_core.runtime.log import logger

LOOK_EVERY_S = 0.001
# Looking costs the driver or the GPU something, and while a change is watched others wait; so few are watched: the
# first, one in many.
_NUM_FIRST = 8
_ONE_IN = 200
_NEEDED, _KEPT = 3, 9
LIMIT_S = 0.5
# So many changes in a row that counting cycles did not show, and it is not believed to show any.
_MOST_UNSEEN = 3
# Between clocks that lie nearer to each other it shows no difference for certain.
_SMALLEST_COUNTED = 1.05


@dataclass
class _Change:
    """A change of clock that was asked for, by a call that has returned, and does not show yet."""

    before_mhz: int
    clock_mhz: int
    asked_s: float
    returned_s: float
    num_looks: int = 0

    @property
    def is_up(self) -> bool:
        return self.clock_mhz > self.before_mhz


class SwitchLatency:
    """Time from the lock call until the SM clock has changed, up and down each for itself.

    The GPU itself tells, where it can count cycles beside training. Elsewhere the driver's register has to do, which
    may lag behind.

    What is seen is never too short, but too long where a thread comes late. A clock that falls too early makes training
    slower, one that rises too early does not: so a rise counts as taking the median of what was seen, a fall as taking
    the least. A change that does not show within half a second, because power or heat holds the clock elsewhere, does
    not count.

    Attributes:
        switching: what changes take, as far as is known.
    """

    def __init__(self, assumed_s: float, now_s: Callable[[], float], counting: CycleCounting | None = None) -> None:
        """Has measured nothing yet.

        Args:
            assumed_s: the latency that is taken for true meanwhile.
            now_s: tells the time.
            counting: has the GPU count cycles; without it its register is asked.
        """
        self._assumed = Switching(assumed_s, assumed_s, USUAL_JITTER_S)
        self._now_s = now_s
        self._counting = counting
        self._num_unseen = 0
        self._watched: _Change | None = None
        self._up_s: deque[float] = deque(maxlen=_KEPT)
        self._down_s: deque[float] = deque(maxlen=_KEPT)
        self._calls_s: deque[float] = deque(maxlen=_KEPT)
        self._num_switches = 0
        self.switching = self._measured()

    @property
    def is_watching(self) -> bool:
        """Whether a change is being watched: `look` every `LOOK_EVERY_S`; another change waits meanwhile if it can."""
        return self._watched is not None

    def lock(self, clock: SettableClock, clock_mhz: int, locked_mhz: int | None = None) -> None:
        """Locks a clock, and begins to watch the change if it is one of the few to be watched.

        Args:
            clock: the GPU's.
            clock_mhz: to lock.
            locked_mhz: the clock that was locked before; none where the driver has chosen.

        Raises:
            GpuError: if it cannot be locked.
        """
        self._num_switches += 1
        if self._num_switches > _NUM_FIRST and self._num_switches % _ONE_IN != 0:
            self._call(clock, clock_mhz)
            return
        counting = self._counting
        if counting is None or locked_mhz is None:
            locked_mhz = max(1, clock.sm_clock_mhz())
        shows = locked_mhz != clock_mhz
        if counting is not None:
            shows = not 1 / _SMALLEST_COUNTED < clock_mhz / locked_mhz < _SMALLEST_COUNTED
        if counting is not None and shows:
            counting.begin()
        asked_s = self._now_s()
        try:
            self._call(clock, clock_mhz)
        except BaseException:
            self.look_no_longer()
            raise
        if shows:
            self._watched = _Change(locked_mhz, clock_mhz, asked_s, self._now_s())
            self.look(clock)

    def _call(self, clock: SettableClock, clock_mhz: int) -> None:
        asked_s = self._now_s()
        clock.lock(clock_mhz)
        self._calls_s.append(self._now_s() - asked_s)

    def look(self, clock: SettableClock) -> None:
        """Looks whether the change shows.

        Raises:
            GpuError: if the clock cannot be read.
        """
        change = self._watched
        if change is None:
            return
        took_s = self._counted(change) if self._counting is not None else self._registered(change, clock)
        if took_s is not None:
            self.look_no_longer()
            self._num_unseen = 0
            (self._up_s if change.is_up else self._down_s).append(took_s)
            self.switching = self._measured()
        elif self._now_s() - change.asked_s >= LIMIT_S:
            self.look_no_longer()
            self._num_unseen += 1
        if self._counting is not None and (self._counting.failure is not None or self._num_unseen >= _MOST_UNSEEN):
            logger.debug("the GPU shows no change by counting; its register is asked", exc_info=self._counting.failure)
            self.look_no_longer()
            self._counting = None

    def _counted(self, change: _Change) -> float | None:
        """How long it took, as the GPU shows it; None as long as it does not."""
        assert self._counting is not None, "asked only where the GPU counts"
        seen = self._counting.seen(change.asked_s, change.clock_mhz / change.before_mhz)
        return None if seen is None else seen.after_s

    def _registered(self, change: _Change, clock: SettableClock) -> float | None:
        """The same, as the register shows it."""
        seen_mhz, now_s = clock.sm_clock_mhz(), self._now_s()
        if abs(seen_mhz - change.clock_mhz) >= abs(seen_mhz - change.before_mhz):
            change.num_looks += 1
            return None
        if change.num_looks == 0 and not change.is_up:
            # It was in force at some time during the call: sooner rather than later, since a fall must not come early.
            return max(LOOK_EVERY_S, now_s - change.returned_s)
        return now_s - change.asked_s

    def assume(self, switching: Switching) -> None:
        """What a plan takes for true, until it has been measured here."""
        self._assumed = switching
        self.switching = self._measured()

    @property
    def seen(self) -> SeenChanges:
        """What changes were seen to take."""
        return SeenChanges(
            up_s=statistics.median(self._up_s) if len(self._up_s) >= _NEEDED else 0.0,
            down_s=min(self._down_s) if len(self._down_s) >= _NEEDED else 0.0,
            call_s=statistics.median(self._calls_s) if len(self._calls_s) >= _NEEDED else 0.0,
        )

    def look_no_longer(self) -> None:
        """Another change is due: how long this one takes will not be known."""
        self._watched = None
        if self._counting is not None:
            self._counting.end()

    def _measured(self) -> Switching:
        """As far as it is known: of the other direction, or as assumed, until enough changes were seen."""
        up_s, down_s = self.seen.up_s, self.seen.down_s
        return Switching(
            up_s=up_s or down_s or self._assumed.up_s,
            down_s=down_s or up_s or self._assumed.down_s,
            jitter_s=self._assumed.jitter_s,
        )
