"""Makes a GPU's clock follow a plan. The training thread only hands over events; one side thread does the rest.

The side thread follows the GPU, not Python: it waits for the events that the training thread recorded, goes to the
newest one that was reached, and asks for the next instruction's clock so early that it is in force at the boundary. It
never asks for a clock that is already set. An error ends it, gives the clock back and is kept for others to read.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import GpuError
from perseus_core.runtime.clock.give_back import ClockGivenBack, GuardedClock
from perseus_core.runtime.clock.lookahead import Lookahead
from perseus_core.runtime.clock.override import ClockOverridden, OverrideWatch
from perseus_core.runtime.clock.planned_clock import PlannedClock
from perseus_core.runtime.clock.switch_latency import SwitchLatency
from perseus_core.runtime.measure.events import Event

# How often it looks for the next event where it cannot wait for it: because it is not recorded yet (waking a thread
# for each one would cost the training thread some 10 us), or because a change is due before it. Events carry their
# times, so one that is seen late is not acted upon late, as long as it lies more than a latency before the next change.
_LOOK_EVERY_S = 0.005
_LOOK_EVERY_S_IDLE = 0.1
_STOP_PATIENCE_S = 0.5


class ClockControllerFailed(GpuError):  # noqa: N818 (named by what happened)
    """An error of ours."""


@dataclass(frozen=True)
class _IterationBegins:
    plan: Sequence[PlannedClock] | None


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


_Message = _IterationBegins | _InstructionBegins | _InstructionEnds | _IterationEnds | _Hold


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
        hang_limit_s: float = 30.0,
        call_limit_s: float = 2.0,
    ) -> None:
        """Touches nothing yet.

        Args:
            device: the GPU.
            switch_latency_s: time from a lock call until the clock is in force, until it has been measured.
            hang_limit_s: time without any message after which the watchdog gives the clock back; it is locked again
                with the next instruction.
            call_limit_s: time after which a call of the driver counts as hung.
        """
        self._device = device
        self._failure: GpuError | None = None
        self._is_following = False
        self._messages: deque[_Message] = deque()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._lookahead = Lookahead()
        self._latency = SwitchLatency(switch_latency_s)
        self._override_watch = OverrideWatch(device.uuid)
        self._clock = GuardedClock(device, self._give_up, hang_limit_s=hang_limit_s, call_limit_s=call_limit_s)
        self._in_force_mhz: int | None = None
        self._times_given_back = 0
        self._thread = threading.Thread(target=self._run, name="perseus-clock-controller", daemon=True)
        _controllers.add(self)

    # What the training thread calls

    def start(self) -> None:
        """Claims the clock and begins to follow, both in side threads. Once only."""
        self._is_following = True
        atexit.register(self.stop)
        self._clock.acquire()
        self._thread.start()

    def stop(self) -> None:
        """Gives the clock back, for good. Takes a second at most, even where the driver hangs."""
        atexit.unregister(self.stop)
        self._is_following = False
        self._wake.put(None)
        if self._thread.is_alive():
            self._thread.join(_STOP_PATIENCE_S)
        self._clock.release(_STOP_PATIENCE_S)

    def begin_iteration(self, plan: Sequence[PlannedClock] | None) -> None:
        """The iteration begins. `plan`: this stage's instructions in order, or none to leave the clock alone."""
        if self._is_following:
            self._messages.append(_IterationBegins(plan))
            self._wake.put(None)

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
            self._messages.append(_IterationEnds())

    def hold(self, clock_mhz: int | None) -> None:
        """One clock [MHz] for everything until the next `begin_iteration` with a plan; none: leave it to the driver."""
        if self._is_following:
            self._messages.append(_Hold(clock_mhz))
            self._wake.put(None)

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
    def switch_latency_s(self) -> float:
        """Time from a lock call until the clock is in force, as measured on this GPU (`SwitchLatency`)."""
        return self._latency.seconds

    # The controller's thread

    def _run(self) -> None:
        try:
            while self._take_what_was_reached():
                self._set_wanted_clock()
                self._look_for_other_programs()
                self._wait()
        except ClockGivenBack:
            pass  # by another thread, which has said why
        except ClockOverridden as error:
            self._clock.leave_to_others()
            self._give_up(error)
        except GpuError as error:
            self._give_up(error)
        except Exception as error:
            self._give_up(ClockControllerFailed(f"following the plan on {self._device.uuid}: {error!r}; please report"))
        finally:
            self._clock.release(_STOP_PATIENCE_S)
            self._in_force_mhz = None
            self._messages.clear()

    def _give_up(self, error: GpuError) -> None:
        """Keeps the first error and ends the following. From this thread, or from the guard's."""
        if self._failure is None:
            self._failure = error
        self._is_following = False
        self._wake.put(None)

    def _take_what_was_reached(self) -> bool:
        """Brings the lookahead to the newest event that was reached; returns whether to go on."""
        while self._is_following:
            if not self._messages or not _is_reached(self._messages[0]):
                return True
            message = self._messages.popleft()
            self._clock.beat(time.monotonic())
            if self._clock.times_given_back != self._times_given_back:
                # We were stopped or hung. Only now does training go on, and only now may the clock be locked again.
                self._times_given_back = self._clock.times_given_back
                self._in_force_mhz = None
            match message:
                case _InstructionBegins(event):
                    self._lookahead.begin_instruction(event.time_s())
                case _InstructionEnds():
                    self._lookahead.end_instruction()
                case _IterationBegins(plan):
                    self._lookahead.begin_iteration(plan, self._latency.seconds)
                case _IterationEnds():
                    self._lookahead.end_iteration()
                case _Hold(clock_mhz):
                    self._lookahead.hold(clock_mhz)
        return False

    def _set_wanted_clock(self) -> None:
        if self._lookahead.is_idle:
            return
        wanted_mhz = self._lookahead.wanted_mhz(time.monotonic(), self._latency.seconds)
        if wanted_mhz == self._in_force_mhz:
            return
        if wanted_mhz is None:
            self._clock.reset()
        else:
            self._latency.lock(self._clock, wanted_mhz)
        self._in_force_mhz = wanted_mhz
        self._override_watch.asked(wanted_mhz, time.monotonic())

    def _look_for_other_programs(self) -> None:
        if self._in_force_mhz is None or self._clock.times_given_back != self._times_given_back:
            return
        if self._override_watch.has_overridden(time.monotonic(), self._clock.sm_clock_mhz):
            self._in_force_mhz = None  # and so asked for again

    def _wait(self) -> None:
        """Until the next change is due or the next event is reached, or nearly so."""
        now_s, due_in_s = time.monotonic(), math.inf
        if not self._lookahead.is_idle:
            if self._lookahead.wanted_mhz(now_s, self._latency.seconds) != self._in_force_mhz:
                return  # it has just become due
            due_s = self._lookahead.next_change_s(self._latency.seconds)
            due_in_s = due_s - now_s if due_s > now_s else math.inf
        if self._messages and due_in_s == math.inf:
            _wait_for(self._messages[0])
        else:
            look_in_s = _LOOK_EVERY_S if self._lookahead.follows_plan else _LOOK_EVERY_S_IDLE
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=min(due_in_s, look_in_s))

    def _leave_in_child(self) -> None:
        """In a forked child: the parent follows, and the parent's clock is not ours."""
        self._is_following = False
        atexit.unregister(self.stop)


def _is_reached(message: _Message) -> bool:
    return message.event.reached() if isinstance(message, (_InstructionBegins, _InstructionEnds)) else True


def _wait_for(message: _Message) -> None:
    if isinstance(message, (_InstructionBegins, _InstructionEnds)):
        message.event.wait()


_controllers: weakref.WeakSet[ClockController] = weakref.WeakSet()


def _leave_all_in_child() -> None:
    for controller in list(_controllers):
        controller._leave_in_child()


os.register_at_fork(after_in_child=_leave_all_in_child)
