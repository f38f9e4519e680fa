"""How long a change of clock takes on this GPU, measured while it is done anyway."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from perseus_core.gpu.slices import Slices
from perseus_core.planning.switching import USUAL_JITTER_S, Switching
from perseus_core.runtime.clock.seen_change import NUM_BEFORE, change_seen
from perseus_core.runtime.clock.settable_clock import SettableClock
from perseus_core.runtime.log import logger

LOOK_EVERY_S = 0.001
# Looking costs the driver or the GPU something, and while a change is watched others wait; so few are watched: the
# first, one in many.
_NUM_FIRST = 8
_ONE_IN = 200
_NEEDED, _KEPT = 3, 9
_LIMIT_S = 0.5
# So many changes in a row that slices did not show, and they are not believed to show any.
_MOST_UNSEEN = 3
# Between clocks that lie nearer to each other, counting cycles shows no difference for certain.
_SMALLEST_COUNTED = 1.05


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
    """Time from the lock call until the SM clock has changed, up and down each for itself.

    The GPU itself tells where it can count cycles beside training (`Slices`): about one slice of 50 us in a
    millisecond, only while one of the few changes is watched. Elsewhere the driver's register has to do, which may lag.

    What is seen is never too short, but too long where the thread that looks comes late. A clock that falls too early
    makes training slower, one that rises too early does not: so a rise counts as taking the median of what was seen, a
    fall as taking the least. A change that does not show within half a second, because power or heat holds the clock
    elsewhere, does not count.

    Attributes:
        switching: what changes take, as far as is known.
    """

    def __init__(self, assumed_s: float, now_s: Callable[[], float], slices: Slices | None = None) -> None:
        """Has measured nothing yet.

        Args:
            assumed_s: the latency that is taken for true meanwhile.
            now_s: tells the time.
            slices: has the GPU count cycles; without them its register is asked.
        """
        self._assumed = Switching(assumed_s, assumed_s, USUAL_JITTER_S)
        self._now_s = now_s
        self._slices = slices
        self._num_unseen = 0
        self._watched: _Change | None = None
        self._up_s: deque[float] = deque(maxlen=_KEPT)
        self._down_s: deque[float] = deque(maxlen=_KEPT)
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
            clock.lock(clock_mhz)
            return
        before_mhz = locked_mhz if self._slices is not None and locked_mhz is not None else clock.sm_clock_mhz()
        shows = before_mhz != clock_mhz
        if self._slices is not None:
            shows = not 1 / _SMALLEST_COUNTED < clock_mhz / before_mhz < _SMALLEST_COUNTED
        if shows:
            self._begin_counting()
        asked_s = self._now_s()
        clock.lock(clock_mhz)
        if shows:
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
        took_s = self._took_s(change, clock)
        if took_s is not None:
            self._watched = None
            self._num_unseen = 0
            (self._up_s if change.is_up else self._down_s).append(took_s)
            self.switching = self._measured()
        elif self._now_s() - change.asked_s >= _LIMIT_S:
            self._watched = None
            self._num_unseen += 1
            if self._num_unseen >= _MOST_UNSEEN and self._slices is not None:
                self._count_no_more(None)

    def _took_s(self, change: _Change, clock: SettableClock) -> float | None:
        """How long it took; None as long as it does not show."""
        if self._slices is not None:
            try:
                self._slices.begin()
                seen = change_seen(self._slices.finished(), change.asked_s, change.clock_mhz / change.before_mhz)
            except Exception as error:  # whatever it is, it is not training's business
                self._count_no_more(error)
                return None
            return None if seen is None else seen.after_s
        seen_mhz = clock.sm_clock_mhz()
        elapsed_s = self._now_s() - change.asked_s
        return elapsed_s if abs(seen_mhz - change.clock_mhz) < abs(seen_mhz - change.before_mhz) else None

    def _begin_counting(self) -> None:
        if self._slices is None:
            return
        try:
            self._slices.forget()
            for _ in range(NUM_BEFORE):
                self._slices.begin()
        except Exception as error:
            self._count_no_more(error)

    def _count_no_more(self, error: Exception | None) -> None:
        logger.debug("counting cycles shows no change of clock on this GPU; its register is asked", exc_info=error)
        self._slices = None

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
