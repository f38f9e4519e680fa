"""Side threads of a real process."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from perseus_core.runtime.side_threads import Awaited, OwnThreads

LIMIT_S = 20.0


class Mark:
    """Something to wait for that the test lets come."""

    def __init__(self) -> None:
        self.comes = threading.Event()

    def wait(self) -> None:
        self.comes.wait(LIMIT_S)


@pytest.fixture
def threads() -> Iterator[OwnThreads]:
    made = OwnThreads()
    yield made
    made.close()


def following(*waits: float | Awaited | None) -> tuple[Callable[[], float | Awaited | None], list[float]]:
    """A step that wants these waits one after another, and when it was called."""
    called_s: list[float] = []

    def step() -> float | Awaited | None:
        called_s.append(time.monotonic())
        return waits[len(called_s) - 1]

    return step, called_s


def test_a_step_is_called_again_after_the_seconds_it_asks_for_and_no_more_after_none(threads: OwnThreads) -> None:
    """None ends the thread, and `join` tells."""
    step, called_s = following(0.0, 0.05, None)
    thread = threads.start("test", step)
    assert thread.join(LIMIT_S)
    assert len(called_s) == 3
    assert called_s[2] - called_s[1] >= 0.05


def test_waking_ends_any_wait_for_time(threads: OwnThreads) -> None:
    """Also one for ever; asking twice is asking once."""
    step, called_s = following(math.inf, math.inf, None)
    thread = threads.start("test", step)
    for num_called in (1, 2):
        while len(called_s) < num_called:
            time.sleep(0.001)
        assert not thread.join(0.05)
        thread.wake()
        thread.wake()
    assert thread.join(LIMIT_S)


def test_a_step_waits_for_what_it_returns(threads: OwnThreads) -> None:
    """As for a mark on the stream, which waking does not hurry."""
    mark = Mark()
    step, called_s = following(mark, None)
    thread = threads.start("test", step)
    thread.wake()
    assert not thread.join(0.05)
    assert len(called_s) == 1
    mark.comes.set()
    assert thread.join(LIMIT_S)


def test_a_step_that_raises_has_ended(threads: OwnThreads) -> None:
    """Nothing is printed and nobody else is hurt."""

    def step() -> float:
        raise ValueError("broken")

    assert threads.start("test", step).join(LIMIT_S)


def test_tasks_run_one_after_another_and_their_errors_are_kept(threads: OwnThreads) -> None:
    """Until no more are taken."""
    order: list[int] = []
    futures = [threads.run(lambda number=number: order.append(number) or number) for number in range(5)]  # type: ignore[misc]
    broken = threads.run(lambda: 1 / 0)
    assert [future.result(LIMIT_S) for future in futures] == order == [0, 1, 2, 3, 4]
    assert isinstance(broken.exception(LIMIT_S), ZeroDivisionError)
