"""Runs what should not take long, and does not wait for ever if it does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, task: Callable[[], T]) -> T:
    """What a task returns, or raises, in a thread of its own; an `AssertionError` if it has not ended by then."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(task())
        except Exception as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert future.done(), f"it was held up for more than {seconds:g} s"
    return future.result()
