"""Side threads that a test steps itself, in a time that the test sets."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from perseus_core.runtime.side_threads import Awaited, SideThread, Step

T = TypeVar("T")


class SteppedThread:
    """One of them: `perseus_core.runtime.side_threads.SideThread`.

    Attributes:
        has_ended: its last step returned None.
        is_woken: somebody wants it stepped soon.
    """

    def __init__(self, step: Step) -> None:
        """Takes no step by itself."""
        self.has_ended = False
        self.is_woken = False
        self._step = step

    def step(self) -> float | Awaited | None:
        """Takes a step, if it has not ended; returns what to wait for."""
        if self.has_ended:
            return None
        self.is_woken = False
        wait = self._step()
        self.has_ended = wait is None
        return wait

    def wake(self) -> None:
        """See `SideThread`."""
        self.is_woken = True

    def join(self, limit_s: float) -> bool:
        """See `SideThread`. Nothing happens while somebody waits."""
        return self.has_ended


class SteppedThreads:
    """`perseus_core.runtime.side_threads.SideThreads` of one rank.

    Attributes:
        time_s: what it is.
        threads: those that were started, by name.
        does_tasks: whether what `run` is given is done, at once; else it hangs.
    """

    def __init__(self) -> None:
        """At 0 s, no thread."""
        self.time_s = 0.0
        self.threads: dict[str, SteppedThread] = {}
        self.does_tasks = True

    def now_s(self) -> float:
        """See `SideThreads`."""
        return self.time_s

    def start(self, name: str, step: Step) -> SideThread:
        """See `SideThreads`."""
        thread = self.threads[name] = SteppedThread(step)
        return thread

    def run(self, task: Callable[[], T]) -> Future[T]:
        """See `SideThreads`."""
        future: Future[T] = Future()
        if self.does_tasks:
            try:
                future.set_result(task())
            except Exception as error:  # whoever asks for the result gets it
                future.set_exception(error)
        return future

    def close(self) -> None:
        """See `SideThreads`."""

    def step_all(self) -> None:
        """A step of every thread."""
        for thread in list(self.threads.values()):
            thread.step()
