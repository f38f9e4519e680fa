"""Time and threads, as the runtime uses them. They are handed in, so that a whole cluster can run in virtual time.

Everything that goes on beside training is a *side thread*: a function `step()` that does what is due, without waiting
for anybody, and returns what to wait for until it is called again. `OwnThreads` gives each a thread of its own.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from perseus_core.runtime.cuda_driver import relax_this_thread
from perseus_core.runtime.log import logger

T = TypeVar("T")


class Awaited(Protocol):
    """Something that a side thread can wait for, as a mark on the compute stream."""

    def wait(self) -> None:
        """Returns when it has come; lets other threads run meanwhile."""


Step = Callable[[], "float | Awaited | None"]
"""Does what is due. Returns seconds (`math.inf`: until woken), what to wait for, or None when it has ended."""


class SideThread(Protocol):
    """One that runs."""

    def wake(self) -> None:
        """Has `step` called soon, also while it waits for seconds to pass. Any thread may ask, at no cost."""

    def join(self, limit_s: float) -> bool:
        """Waits at most so long for its end; returns whether it has ended. It ends when `step` returns None."""


class SideThreads(Protocol):
    """What the runtime needs of time and threads."""

    def now_s(self) -> float:
        """The time of all measurements [s]; it only grows."""

    def start(self, name: str, step: Step) -> SideThread:
        """Calls `step` again and again, beside training, until it returns None.

        One that has something to say of its own errors catches them; what it raises ends it, and only debugging tells.
        """

    def run(self, task: Callable[[], T]) -> Future[T]:
        """Does something slow beside training, one task after another; ask the future whether it is `done()`."""

    def close(self) -> None:
        """No more tasks; whatever is at work may end by itself."""


class OwnThreads:
    """Threads of this process, and its monotonic time. Nothing they do makes a CUDA graph's capture invalid."""

    def __init__(self) -> None:
        """Starts no thread yet."""
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    def now_s(self) -> float:
        """`time.monotonic`."""
        return time.monotonic()

    def start(self, name: str, step: Step) -> SideThread:
        """See `SideThreads`."""
        return _OwnThread(name, step)

    def run(self, task: Callable[[], T]) -> Future[T]:
        """See `SideThreads`. A task that hangs holds up only other tasks."""
        future: Future[T] = Future()
        self._tasks.put((future, task))
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="perseus-background", daemon=True)
            self._worker.start()
        return future

    def close(self) -> None:
        """See `SideThreads`."""
        self._tasks.put(None)

    def _work(self) -> None:
        relax_this_thread()
        while (task := self._tasks.get()) is not None:
            future, function = task
            try:
                future.set_result(function())
            except Exception as error:  # whoever asks for the result gets it
                future.set_exception(error)


class _OwnThread:
    def __init__(self, name: str, step: Step) -> None:
        self._step = step
        # No `threading.Event`: waking costs the training thread less, and a forked child finds no lock held.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        if self._wakes.empty():
            self._wakes.put(None)

    def join(self, limit_s: float) -> bool:
        self._thread.join(max(0.0, limit_s))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            relax_this_thread()
            while (wait := self._step()) is not None:
                if not isinstance(wait, (int, float)):
                    wait.wait()
                else:
                    with contextlib.suppress(queue.Empty):
                        self._wakes.get(timeout=None if wait == math.inf else max(0.0, wait))
        except Exception as error:
            logger.debug("%s has ended", self._thread.name, exc_info=error)
