"""Which clock to ask for now, so that it is in force when the next instruction begins. Plain arithmetic on a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from perseus_core.planning.switching import Switching
from perseus_core.runtime.clock.planned_clock import PlannedClock


def without_short_slow_parts(plan: Sequence[PlannedClock], latency_s: float) -> tuple[PlannedClock, ...]:
    """A plan whose slow parts are worth a change of clock.

    A part at one clock that is shorter than a change takes, and is followed by a higher clock, gets the higher clock at
    once: else the change up would come too late. So nothing runs slower than planned.
    """
    parts = [list(part) for _, part in groupby(plan, key=lambda planned: planned.clock_mhz)]
    adapted: list[PlannedClock] = []
    following_mhz, following_s = 0, math.inf
    for part in reversed(parts):
        clock_mhz, length_s = part[0].clock_mhz, sum(planned.duration_s for planned in part)
        if following_mhz == clock_mhz:
            length_s += following_s
        elif length_s < latency_s and clock_mhz < following_mhz:
            clock_mhz, length_s = following_mhz, length_s + following_s
        adapted.extend(replace(planned, clock_mhz=clock_mhz) for planned in reversed(part))
        following_mhz, following_s = clock_mhz, length_s
    return tuple(reversed(adapted))


class Lookahead:
    """Follows one stage through its iterations and says which clock is wanted, and when that will change.

    Until the first `begin_iteration` or `hold`, and after `begin_iteration(None)`, nothing is wanted.

    Attributes:
        is_idle: whether nothing is wanted.
    """

    def __init__(self) -> None:
        self.is_idle = True
        self._plan: tuple[PlannedClock, ...] = ()
        self._asked: tuple[Sequence[PlannedClock] | None, float] = (None, 0.0)
        self._adapted: tuple[PlannedClock, ...] = ()
        self._held_mhz: int | None = None
        self._position = -1
        self._end_s = math.inf

    @property
    def follows_plan(self) -> bool:
        """Whether what is wanted depends on the instruction that runs."""
        return bool(self._plan)

    def hold(self, clock_mhz: int | None) -> None:
        """Wants one clock for everything; none to leave it to the driver."""
        self.is_idle = False
        self._plan = ()
        self._held_mhz = clock_mhz

    def begin_iteration(self, plan: Sequence[PlannedClock] | None, latency_s: float) -> None:
        """Wants what the plan says, from its first instruction on."""
        self.is_idle = plan is None
        self._held_mhz = None
        if plan is not self._asked[0] or latency_s != self._asked[1]:
            self._asked = (plan, latency_s)
            self._adapted = without_short_slow_parts(plan or (), latency_s)
        self._plan = self._adapted
        self._position, self._end_s = -1, math.inf

    def begin_instruction(self, time_s: float) -> None:
        """The next instruction has begun."""
        self._position += 1
        if self._position < len(self._plan):
            self._end_s = time_s + self._plan[self._position].duration_s

    def end_instruction(self) -> None:
        """The instruction has ended: what follows is the next one, however long the GPU waits for it."""
        self._end_s = -math.inf

    def end_iteration(self) -> None:
        """What follows is the first instruction of the next iteration."""
        self._position, self._end_s = -1, math.inf

    def wanted_mhz(self, now_s: float, switching: Switching) -> int | None:
        """The clock to ask for now; none to leave it to the driver. Not to be asked while `is_idle`.

        Args:
            now_s: now [s], on the clock of the events.
            switching: what changes of clock take.
        """
        if not self._plan:
            return self._held_mhz
        if self._position >= len(self._plan):
            return None  # more instructions than planned: nobody knows, so nothing is slowed
        if now_s >= self.next_change_s(switching):
            return self._next_mhz
        return self._present_mhz

    def next_change_s(self, switching: Switching) -> float:
        """When another clock has to be asked for [s]; infinity where only the next event will tell."""
        if not 0 <= self._position < len(self._plan) or self._next_mhz == self._present_mhz:
            return math.inf
        # Where the end is predicted wrong by no more than the jitter, nothing runs slower than planned.
        if self._next_mhz > self._present_mhz:
            return self._end_s - switching.up_s - switching.jitter_s
        return self._end_s - switching.down_s + switching.jitter_s

    def num_begins_to_pass_over(self, limit_s: float) -> int:
        """How many of the instructions that come next may begin unseen: they and the one that follows have one clock.

        Not to be asked while a change is due that was not asked for yet.

        Args:
            limit_s: how long what is passed over may take, as planned.
        """
        position, passed_s = self._position + 1, 0.0
        while position + 1 < len(self._plan) and self._plan[position].clock_mhz == self._plan[position + 1].clock_mhz:
            passed_s += self._plan[position].duration_s
            if passed_s > limit_s:
                break
            position += 1
        return position - self._position - 1

    @property
    def _present_mhz(self) -> int:
        return self._plan[max(self._position, 0)].clock_mhz

    @property
    def _next_mhz(self) -> int:
        return self._plan[(self._position + 1) % len(self._plan)].clock_mhz
