"""Which clock to ask for now, so that the plan's clocks are in force when they shall. Plain arithmetic on a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from perseus_core.planning.switching import Switching
from perseus_core.runtime.clock.planned_clock import PlannedClock


class Wanted(NamedTuple):
    """What to ask for.

    Attributes:
        clock_mhz: now; none to leave the clock to the driver.
        until_s: when another one has to be asked for; infinity where only the next event will tell.
    """

    clock_mhz: int | None
    until_s: float = math.inf


class Lookahead:
    """Follows one stage through its iterations and says which clock is wanted, and until when.

    It expects that what the plan says comes as long after the instruction that runs as the plan says. So a clock can be
    asked for many short instructions ahead; what is wanted more briefly than a change takes is passed over. It executes
    the model that the plan was made with (`perseus_core.planning.switched_pipeline`).

    Until the first `begin_iteration` or `hold`, and after `begin_iteration(None)`, nothing is wanted.

    Attributes:
        is_idle: whether nothing is wanted.
    """

    def __init__(self) -> None:
        self.is_idle = True
        self._plan: Sequence[PlannedClock] = ()
        self._last_alike: Sequence[int] = ()
        self._held_mhz: int | None = None
        self._position = -1  # of the instruction that began last
        self._began_s = math.inf
        self._has_ended = False
        self._asked_for = -1  # the last instruction of those that the clock asked for last is for

    @property
    def follows_plan(self) -> bool:
        """Whether what is wanted depends on the instruction that runs."""
        return bool(self._plan)

    def hold(self, clock_mhz: int | None) -> None:
        """Wants one clock for everything; none to leave it to the driver."""
        self.is_idle = False
        self._plan = ()
        self._held_mhz = clock_mhz

    def begin_iteration(self, plan: Sequence[PlannedClock] | None) -> None:
        """Wants what the plan says, from its first instruction on."""
        self.is_idle = plan is None
        self._held_mhz = None
        if plan is not self._plan:
            self._plan = plan or ()
            self._last_alike = _last_alike(self._plan)
        self.end_iteration()

    def begin_instruction(self, time_s: float) -> None:
        """The next instruction has begun."""
        self._position += 1
        self._began_s = time_s
        self._has_ended = False

    def end_instruction(self) -> None:
        """The instruction has ended: what follows is the next one, however long the GPU waits for it."""
        self._has_ended = True

    def end_iteration(self) -> None:
        """What follows is the first instruction of the next iteration."""
        self._position = self._asked_for = -1

    def wanted(self, now_s: float, in_force_mhz: int | None, switching: Switching) -> Wanted:
        """What to ask for now: only to be called when it may be, and is. Not to be asked while `is_idle`.

        A clock that has been left ahead of time is not asked for again.

        Args:
            now_s: now [s], on the clock of the events.
            in_force_mhz: the clock that was asked for last; none for the driver's.
            switching: what changes of clock take.
        """
        plan = self._plan
        if not plan:
            return Wanted(self._held_mhz)
        if self._position >= len(plan):
            return Wanted(None)  # more instructions than planned: nobody knows, so nothing is slowed
        place = self._position + self._has_ended if self._position >= 0 else 0
        if self._position < 0 or place == len(plan):
            return Wanted(plan[0].clock_mhz)
        begin_s = self._iteration_begin_s(now_s)
        place = max(place, self._asked_for)
        while place < len(plan):
            clock_mhz, last = plan[place].clock_mhz, self._last_alike[place]
            next_mhz = plan[(last + 1) % len(plan)].clock_mhz
            if next_mhz == clock_mhz:
                self._asked_for = last
                return Wanted(clock_mhz)
            end_s = begin_s + plan[last].end_s
            until_s = end_s - switching.lead_s(clock_mhz, next_mhz)
            if now_s < until_s or now_s + _latency_s(switching, in_force_mhz, clock_mhz) < end_s:
                self._asked_for = last
                return Wanted(clock_mhz, until_s)
            place = last + 1
        self._asked_for = len(plan)
        return Wanted(plan[0].clock_mhz)

    def num_begins_to_pass_over(self, until_s: float) -> int:
        """How many of the instructions that come next may begin unseen: they and the one after begin before this."""
        if not 0 <= self._position < len(self._plan):
            return 0
        first = place = self._position + 1
        begin_s = self._iteration_begin_s(self._began_s)
        while place + 1 < len(self._plan) and begin_s + self._plan[place + 1].start_s < until_s:
            place += 1
        return place - first

    def next_begin_s(self) -> float:
        """When the next instruction is expected to begin; infinity if nobody knows."""
        if not 0 <= self._position < len(self._plan) - 1:
            return math.inf
        return self._iteration_begin_s(self._began_s) + self._plan[self._position + 1].start_s

    def _iteration_begin_s(self, now_s: float) -> float:
        """When the plan's time was 0. What takes longer than planned makes all that follows later."""
        runs = self._plan[self._position]
        no_sooner_s = runs.end_s
        if self._has_ended:
            no_sooner_s = self._plan[self._position + 1].start_s if self._position + 1 < len(self._plan) else math.inf
        return max(self._began_s - runs.start_s, now_s - no_sooner_s)


def _latency_s(switching: Switching, before_mhz: int | None, clock_mhz: int) -> float:
    """From asking for a clock until it is in force; infinity if it is, so that it can be left at once."""
    if before_mhz == clock_mhz:
        return math.inf
    return switching.down_s if before_mhz is None else switching.latency_s(before_mhz, clock_mhz)


def _last_alike(plan: Sequence[PlannedClock]) -> list[int]:
    """For each instruction the last one of those that follow it at its clock."""
    last = list(range(len(plan)))
    for place in reversed(range(len(plan) - 1)):
        if plan[place].clock_mhz == plan[place + 1].clock_mhz:
            last[place] = last[place + 1]
    return last
