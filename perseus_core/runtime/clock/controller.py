"""Makes a GPU's clock follow a plan. The training thread only hands over events; one side thread does the rest.

The side thread follows the GPU, not Python: it waits for the events that the training thread recorded, goes to the
newest one that was reached, and asks for the next instruction's clock so early that it is in force at the boundary. It
never asks for a clock that is already set. An error ends it, gives the clock back and is kept for others to read.
"""

from __future__ import annotations

import atexit
import math
import os
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import CallFailed, GpuError
from perseus_core.gpu.slices import Slices
from perseus_core.planning.switching import SeenChanges, Switching
from perseus_core.runtime.clock.cycle_counting import CycleCounting
from perseus_core.runtime.clock.give_back import ClockGivenBack, GuardedClock
from perseus_core.runtime.clock.lookahead import Lookahead
from perseus_core.runtime.clock.override import OverrideWatch
from perseus_core.runtime.clock.planned_clock import PlannedClock
from perseus_core.runtime.clock.settable_clock import Guard
from perseus_core.runtime.clock.switch_latency import LIMIT_S as COUNTING_LIMIT_S
from perseus_core.runtime.clock.switch_latency import LOOK_EVERY_S as LOOK_AT_CHANGE_EVERY_S
from perseus_core.runtime.clock.switch_latency import SwitchLatency
from perseus_core.runtime.measure.events import Event
from perseus_core.runtime.patience import Patience
from perseus_core.runtime.side_threads import SideThread, SideThreads

# How often it looks for the next event where it cannot wait for it: because it is not recorded yet (waking a thread
# for each one would cost the training thread some 10 us), or because a change is due before the next instruction: then
# at half the time until that, should it begin before it was expected to. Events carry their times, so one that is seen
# late is not acted upon late, as long as it lies more than a latency before the next change.
_LOOK_EVERY_S = 0.005
_LOOK_EVERY_S_IDLE = 0.25
_LOOK_EVERY_S_UNGUARDED = 0.02
# Instructions need not be followed one by one where no change is due, but the watchdog wants to see life.
_PASS_OVER_S = 1.0
_STOP_LIMIT_S = 1.0


class ClockControllerFailed(GpuError):  # noqa: N818 (named by what happened)
    """An error of ours."""


@dataclass(frozen=True)
class _IterationBegins:
    plan: Sequence[PlannedClock] | None
    switching: Switching | None


@dataclass
class _InstructionBegins:  # not frozen: that would double the cost of making one, on the training thread
    event: Event


@dataclass(slots=True)
class _InstructionEnds:
    event: Event


@dataclass(frozen=True)
class _IterationEnds:
    pass


@dataclass(frozen=True)
class _Hold:
    clock_mhz: int | None
    from_event: Event | None


_Order = _IterationBegins | _IterationEnds | _Hold
_Message = _InstructionBegins | _InstructionEnds | _Order


class ClockController:
    """Sets one GPU's clock, instruction by instruction.

    From `begin_iteration` to `hold`, everything is a message to the controller's thread: it costs a few microseconds,
    raises nothing, and is acted upon when the GPU has reached what was recorded before. After a failure all of them do
    nothing. Each is a sign of life too: report instructions also while one clock is held, or the watchdog takes the
    silence for a hang and gives the clock back.
    """

    def __init__(
        self,
        device: Device,
        switch_latency_s: float = 0.015,
        *,
        threads: SideThreads,
        guard: Guard = GuardedClock,
        slices: Slices | None = None,
    ) -> None:
        """Touches nothing yet.

        Args:
            device: the GPU.
            switch_latency_s: time from a lock call until the clock is in force, until it has been measured.
            threads: time, and the side thread that does the work.
            guard: makes the clock that is set. A `GuardedClock` is given back by the watchdog after a time without any
                message, and locked again with the next instruction.
            slices: has the GPU count cycles, to see how long changes take.
        """
        self._device = device
        self._threads = threads
        self._failure: GpuError | None = None
        self._is_following = False
        self._messages: deque[_Message] = deque()
        self._num_orders_given = self._num_orders_taken = 0
        self._lookahead = Lookahead()
        counting = None if slices is None else CycleCounting(slices, threads, COUNTING_LIMIT_S)
        self._latency = SwitchLatency(switch_latency_s, threads.now_s, counting)
        self._override_watch = OverrideWatch(device.uuid)
        self._patience = Patience()
        self._clock = guard(device, self._give_up)
        self._in_force_mhz: int | None = None
        self._settles_at_s = -math.inf  # when the last change that was asked for is in force
        self._times_given_back = 0
        self._thread: SideThread | None = None
        _controllers.add(self)

    # What the training thread calls

    def start(self) -> None:
        """Claims the clock and begins to follow, both beside training. Once only."""
        self._is_following = True
        atexit.register(self.stop)
        self._clock.acquire()
        self._thread = self._threads.start("perseus-clock-controller", self._step)

    def stop(self, limit_s: float = _STOP_LIMIT_S) -> None:
        """Gives the clock back, for good. Takes no longer than `limit_s`, even where the driver or the GPU hangs.

        Any number of times: with 0 it only sets everything going, and a later call waits for it.
        """
        atexit.unregister(self.stop)
        self._is_following = False
        if self._thread is None:
            return
        deadline_s = self._threads.now_s() + limit_s
        self._thread.wake()
        # It gives the clock back itself, unless it waits for a GPU or a driver that does not come.
        if not self._thread.join(limit_s / 2):
            self._clock.release(max(0.0, deadline_s - self._threads.now_s()))
            self._thread.join(max(0.0, deadline_s - self._threads.now_s()))

    def begin_iteration(self, plan: Sequence[PlannedClock] | None, switching: Switching | None = None) -> None:
        """The iteration begins.

        Args:
            plan: this stage's instructions in order, or none to leave the clock alone.
            switching: what the plan was made for, counts as long as it has not been measured here.
        """
        if self._is_following:
            self._give(_IterationBegins(plan, switching))
            self._wake()

    def instruction_begins(self, event: Event) -> None:
        """The next instruction begins at this event."""
        if self._is_following:
            self._messages.append(_InstructionBegins(event))

    def instruction_ends(self, event: Event) -> None:
        """The instruction ends at this event."""
        if self._is_following:
            self._messages.append(_InstructionEnds(event))

    def end_iteration(self) -> None:
        """The iteration ends: the next instruction is the first of an iteration."""
        if self._is_following:
            self._give(_IterationEnds())

    def hold(self, clock_mhz: int | None, from_event: Event | None = None) -> None:
        """One clock [MHz] for everything until the next `begin_iteration` with a plan; none: leave it to the driver.

        Asked for when the event is reached, without one when all that was recorded before is.
        """
        if self._is_following:
            self._give(_Hold(clock_mhz, from_event))
            self._wake()

    def _give(self, order: _Order) -> None:
        self._messages.append(order)
        self._num_orders_given += 1

    # What anybody may read

    @property
    def failure(self) -> GpuError | None:
        """Why the clock was given up, if it was. Its text is one sentence for the user."""
        return self._failure

    @property
    def is_guarded(self) -> bool:
        """Whether the clock is ours to set and the watchdog is there: some tenths of a second after `start`."""
        return self._clock.is_guarded

    @property
    def num_lock_calls(self) -> int:
        """How often the clock was locked."""
        return self._clock.num_lock_calls

    @property
    def times_given_back(self) -> int:
        """How often the watchdog gave the clock back while this process was stopped or hung, and went on later."""
        return self._clock.times_given_back

    @property
    def clock_in_force_mhz(self) -> int | None:
        """The clock that was locked last [MHz]; none while it is left to the driver."""
        return self._in_force_mhz

    @property
    def switching(self) -> Switching:
        """What changes of clock take, as far as is known."""
        return self._latency.switching

    @property
    def seen_changes(self) -> SeenChanges:
        """What changes were seen to take on this GPU."""
        return self._latency.seen

    # The controller's thread

    def _step(self) -> float | Event | None:
        """Does what is due; returns for how long or for what to wait, None at the end."""
        try:
            if self._take_what_was_reached():
                try:
                    self._set_wanted_clock()
                    self._look_for_other_programs()
                except CallFailed as error:
                    self._in_force_mhz = None  # nobody knows, so what is wanted is asked for again
                    return self._patience.bear(error, self._threads.now_s())
                return self._what_to_wait_for()
        except ClockGivenBack:
            pass  # by another thread, which has said why
        except GpuError as error:
            self._give_up(error)
        except Exception as error:
            self._give_up(ClockControllerFailed(f"following the plan on {self._device.uuid}: {error!r}; please report"))
        self._is_following = False
        self._in_force_mhz = None
        self._messages.clear()
        self._clock.release(_STOP_LIMIT_S / 2)
        return None

    def _give_up(self, error: GpuError) -> None:
        """Keeps the first error and ends the following. From this thread, or from the guard's."""
        if self._failure is None:
            self._failure = error
        self._is_following = False
        self._wake()

    def _wake(self) -> None:
        if self._thread is not None:
            self._thread.wake()

    def _take_what_was_reached(self) -> bool:
        """Brings the lookahead to the newest event that was reached; returns whether to go on."""
        messages, lookahead = self._messages, self._lookahead
        has_taken = False
        while self._is_following and messages:
            message = messages[0]
            if type(message) is _InstructionBegins:
                if not message.event.reached():
                    break
                lookahead.begin_instruction(message.event.time_s())
            elif type(message) is _InstructionEnds:
                if not message.event.reached():
                    break
                lookahead.end_instruction()
            elif type(message) is _IterationBegins:
                self._num_orders_taken += 1
                lookahead.begin_iteration(message.plan)
                if message.switching is not None:
                    self._latency.assume(message.switching)
            elif type(message) is _IterationEnds:
                self._num_orders_taken += 1
                lookahead.end_iteration()
            elif type(message) is _Hold:
                if message.from_event is not None and not message.from_event.reached():
                    break
                self._num_orders_taken += 1
                lookahead.hold(message.clock_mhz)
            messages.popleft()
            has_taken = True
        if has_taken:
            self._clock.beat(self._threads.now_s())
            if self._clock.times_given_back != self._times_given_back:
                # We were stopped or hung. Only now does training go on, and only now may the clock be locked again.
                self._times_given_back = self._clock.times_given_back
                self._in_force_mhz = None
                self._override_watch.asked(None, self._threads.now_s())  # the driver has chosen since, nobody else
        return self._is_following

    def _set_wanted_clock(self) -> None:
        if self._latency.is_watching:
            self._latency.look(self._clock)
            if not self._latency.is_watching:
                self._settles_at_s = -math.inf
        now_s = self._threads.now_s()
        if self._lookahead.is_idle or self._must_wait_s(now_s):
            return
        wanted_mhz = self._lookahead.wanted(now_s, self._in_force_mhz, self._latency.switching).clock_mhz
        if wanted_mhz == self._in_force_mhz:
            return
        if self._latency.is_watching:
            if self._lookahead.follows_plan and (wanted_mhz or math.inf) < (self._in_force_mhz or math.inf):
                return  # what falls later slows nothing
            self._latency.look_no_longer()
        if wanted_mhz is None:
            self._clock.reset()
        elif not self._clock.is_guarded:
            return
        else:
            before_mhz = self._in_force_mhz or wanted_mhz
            self._settles_at_s = now_s + self._latency.switching.latency_s(before_mhz, wanted_mhz)
            self._latency.lock(self._clock, wanted_mhz, self._in_force_mhz)
        self._patience.succeeded()
        self._in_force_mhz = wanted_mhz
        self._override_watch.asked(wanted_mhz, self._threads.now_s())

    def _must_wait_s(self, now_s: float) -> float:
        """A plan counts on it that a change is asked for when the last one is in force; what is held need not wait."""
        return max(0.0, self._settles_at_s - now_s) if self._lookahead.follows_plan else 0.0

    def _look_for_other_programs(self) -> None:
        if self._in_force_mhz is None or self._clock.times_given_back != self._times_given_back:
            return
        if self._override_watch.has_overridden(self._threads.now_s(), self._clock.sm_clock_mhz):
            self._in_force_mhz = None  # and so asked for again

    def _what_to_wait_for(self) -> float | Event:
        """Until the next change is due or the next event that matters is reached, or nearly so."""
        if self._latency.is_watching:
            return LOOK_AT_CHANGE_EVERY_S
        now_s, due_s, lookahead = self._threads.now_s(), math.inf, self._lookahead
        if not lookahead.is_idle:
            wanted_mhz, due_s = lookahead.wanted(now_s, self._in_force_mhz, self._latency.switching)
            if wanted_mhz != self._in_force_mhz:
                # It has just become due, or may not be set yet.
                return self._must_wait_s(now_s) if self._clock.is_guarded else _LOOK_EVERY_S_UNGUARDED
        if not lookahead.follows_plan and self._num_orders_given == self._num_orders_taken:
            return _LOOK_EVERY_S_IDLE  # instructions come and go, and change nothing; an order wakes us
        if due_s < math.inf and lookahead.next_begin_s() >= due_s:
            return min(due_s - now_s, max(_LOOK_EVERY_S, (due_s - now_s) / 2))
        return self._next_that_matters(min(due_s, now_s + _PASS_OVER_S)) if self._messages else _LOOK_EVERY_S

    def _next_that_matters(self, until_s: float) -> float | Event:
        """Of what is recorded and not reached, what to look at next: the last instruction to begin before this."""
        first = self._messages[0]
        if isinstance(first, _Hold) and first.from_event is not None:
            return first.from_event
        if not isinstance(first, (_InstructionBegins, _InstructionEnds)):
            return 0.0
        # Begins and ends take turns.
        place = 2 * self._lookahead.num_begins_to_pass_over(until_s) + isinstance(first, _InstructionEnds)
        if place < len(self._messages):
            message = self._messages[place]
            if isinstance(message, _InstructionBegins):
                return message.event
        return first.event

    def _leave_in_child(self) -> None:
        """In a forked child: the parent follows, and the parent's clock is not ours."""
        self._is_following = False
        self._thread = None
        atexit.unregister(self.stop)


_controllers: weakref.WeakSet[ClockController] = weakref.WeakSet()


def _leave_all_in_child() -> None:
    for controller in list(_controllers):
        controller._leave_in_child()


os.register_at_fork(after_in_child=_leave_all_in_child)
