"""Virtual time: one queue of events, and the side threads of a rank that live on it. Nothing sleeps, no thread runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from heapq import heappop, heappush
from typing import Any, TypeVar

from perseus_core.runtime.side_threads import SideThread, Step

T = TypeVar("T")

NOBODY = -1
NEVER = 0


class EventQueue:
    """What will happen, in order of time, and of asking where it is due at the same moment.

    Attributes:
        now_s: virtual time [s].
        number: which event is happening: the one that `call_at` returned.
        rank: whose code is running, `NOBODY` where it is no rank's.
    """

    def __init__(self) -> None:
        """Nothing will happen, at 0 s."""
        self.now_s = 0.0
        self.number = 0
        self.rank = NOBODY
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_asked_for = 0
        self._is_stopped = False

    def call_at(self, time_s: float, action: Callable[[], None]) -> int:
        """Has a function called at some time, now at the earliest; returns the event's number.

        An event is not taken back: whoever wants something else by then compares the number and does nothing.
        """
        self._num_asked_for += 1
        heappush(self._events, (max(time_s, self.now_s), self._num_asked_for, action))
        return self._num_asked_for

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Lets things happen until a condition holds, which is looked at after each event."""
        self.run_until_stopped(lambda: self.stop() if is_over() else None)

    def run_until_stopped(self, after_each: Callable[[], None] | None = None) -> None:
        """Lets things happen until `stop` is called.

        Raises:
            AssertionError: if nothing is left to happen before.
        """
        events = self._events
        self._is_stopped = False
        while not self._is_stopped:
            assert events, "nothing is left to happen"
            self.now_s, self.number, action = heappop(events)
            action()
            if after_each is not None:
                self.rank = NOBODY
                after_each()
        self.rank = NOBODY

    def stop(self) -> None:
        """Nothing more happens after the present event."""
        self._is_stopped = True


class Mark:
    """A mark on a compute stream: `perseus_core.runtime.measure.events.Event` in virtual time."""

    __slots__ = ("_at_s", "_waiting")

    def __init__(self) -> None:
        """The stream has not got there."""
        self._at_s: float | None = None
        self._waiting: list[_VirtualThread] | None = None

    def reached(self) -> bool:
        """Whether the stream has got there."""
        return self._at_s is not None

    def wait(self) -> None:
        """Nobody waits in virtual time; a step returns the mark instead."""
        raise AssertionError("nobody waits in virtual time")

    def time_s(self) -> float:
        """When the stream got there."""
        assert self._at_s is not None, "only for a mark that is reached"
        return self._at_s

    def reach(self, time_s: float) -> None:
        """The stream gets there now."""
        self._at_s = time_s
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            for thread in waiting:
                thread.go_on()

    def wake_when_reached(self, thread: _VirtualThread) -> None:
        """Lets a thread go on then."""
        if self._at_s is not None:
            thread.go_on()
        elif self._waiting is None:
            self._waiting = [thread]
        else:
            self._waiting.append(thread)


class VirtualThreads:
    """The side threads of one rank: `perseus_core.runtime.side_threads.SideThreads` in virtual time.

    Attributes:
        queue: what they live on.
        rank: whose they are.
        is_in_step: whether a side thread is doing something at this moment.
        spent_s: what it has spent of virtual time with that.
        stopped_until_s: until then none of them runs.
    """

    def __init__(self, queue: EventQueue, rank: int, *, task_s: Callable[[], float] = lambda: 0.0) -> None:
        """No thread yet.

        Args:
            queue: what they live on.
            rank: whose they are.
            task_s: says how long the next task of `run` takes.
        """
        self.queue = queue
        self.rank = rank
        self.spent_s = 0.0
        self.is_in_step = False
        self.stopped_until_s = -math.inf
        self._task_s = task_s
        self._busy_until_s = 0.0
        self._is_closed = False

    def now_s(self) -> float:
        """Virtual time, and what the step that runs has spent of it."""
        return self.queue.now_s + self.spent_s

    def start(self, name: str, step: Step) -> SideThread:
        """See `SideThreads`. The first step comes with the next event."""
        return _VirtualThread(self, name, step)

    def run(self, task: Callable[[], T]) -> Future[T]:
        """See `SideThreads`. Its effect is seen when its time is over."""
        future: Future[T] = Future()
        if not self._is_closed:
            self._busy_until_s = max(self._busy_until_s, self.now_s()) + self._task_s()
            self.queue.call_at(self._busy_until_s, lambda: self._do(task, future))
        return future

    def close(self) -> None:
        """See `SideThreads`."""
        self._is_closed = True

    def spend(self, seconds: float) -> None:
        """What a side thread is doing takes so long; called by what it calls. The training thread's calls take none."""
        if self.is_in_step:
            self.spent_s += seconds

    def stop_for(self, seconds: float) -> None:
        """A fault: no step of this rank is taken for some time, as if the process got no processor."""
        self.stopped_until_s = self.queue.now_s + seconds

    def _do(self, task: Callable[[], Any], future: Future[Any]) -> None:
        self.queue.rank = self.rank
        try:
            future.set_result(task())
        except Exception as error:  # whoever asks for the result gets it
            future.set_exception(error)


class _VirtualThread:
    """One of them. Errors are not caught: they end the test."""

    __slots__ = ("_can_be_woken", "_due_s", "_has_ended", "_is_woken", "_name", "_next", "_step", "_threads")

    def __init__(self, threads: VirtualThreads, name: str, step: Step) -> None:
        self._threads = threads
        self._name = name
        self._step = step
        self._has_ended = False
        self._is_woken = False
        self._go_on_at(threads.queue.now_s)

    def wake(self) -> None:
        """See `SideThread`."""
        if not self._can_be_woken:
            self._is_woken = True  # it runs, or waits for a mark
        elif self._due_s > self._threads.queue.now_s:
            self._go_on_at(self._threads.queue.now_s)

    def join(self, limit_s: float) -> bool:
        """See `SideThread`. Virtual time does not pass while somebody waits."""
        return self._has_ended

    def go_on(self) -> None:
        """The mark that it waited for is reached."""
        self._go_on_at(self._threads.queue.now_s)

    def _go_on_at(self, time_s: float) -> None:
        self._can_be_woken = True
        self._due_s = time_s
        self._next = self._threads.queue.call_at(time_s, self._run) if time_s < math.inf else NEVER

    def _run(self) -> None:
        threads = self._threads
        queue = threads.queue
        if queue.number != self._next or self._has_ended:
            return  # it was woken before
        if queue.now_s < threads.stopped_until_s:
            self._go_on_at(threads.stopped_until_s)
            return
        queue.rank = threads.rank
        self._can_be_woken = self._is_woken = False
        threads.is_in_step = True
        wait = self._step()
        threads.is_in_step = False
        from_s = queue.now_s
        if threads.spent_s:
            from_s += threads.spent_s
            threads.spent_s = 0.0
        if type(wait) is float and wait < math.inf:  # what `_go_on_at` does, without a call: this is most of all steps
            self._can_be_woken = True
            self._due_s = from_s if self._is_woken else from_s + wait
            self._next = queue.call_at(self._due_s, self._run)
        elif type(wait) is float:
            self._go_on_at(from_s if self._is_woken else wait)
        elif wait is None:
            self._has_ended = True
        elif isinstance(wait, Mark):
            wait.wake_when_reached(self)
        else:
            raise AssertionError(f"in virtual time one waits for seconds or marks, not for {wait!r}")
