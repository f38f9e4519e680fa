"""One side thread for everything slow, so that training never waits for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """Runs tasks one after another. A task that hangs holds up only other tasks."""

    def __init__(self) -> None:
        """Starts its thread with the first task."""
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, task: Callable[[], T]) -> Future[T]:
        """Starts a task; ask the future whether it is `done()`."""
        future: Future[T] = Future()
        self._tasks.put((future, task))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="perseus-background", daemon=True)
            self._thread.start()
        return future

    def close(self) -> None:
        """Lets the thread end after what it is doing."""
        self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function = task
            try:
                future.set_result(function())
            except Exception as error:  # whoever asks for the result gets it
                future.set_exception(error)


def within(seconds: float, task: Callable[[], T], *, otherwise: Callable[[], Exception]) -> T:
    """Runs a task in a thread of its own and gives up waiting after some time.

    Raises:
        Exception: what the task raised, or `otherwise()` if it has not ended.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(task())
        except Exception as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="perseus-start", daemon=True)
    thread.start()
    thread.join(seconds)
    if not future.done():
        raise otherwise()
    return future.result()
