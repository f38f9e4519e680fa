"""Something for a GPU to do while it is measured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

from perseus_core.commands.measurement.results import NotMeasured

MATRIX_PRODUCTS = "matrix products"
LAUNCHES = "launches"
ALL_REDUCE = "all-reduce"


class Pulse(NamedTuple):
    """From begin to end [s, `time.monotonic`] a GPU was busy."""

    begin_s: float
    end_s: float

    @property
    def time_s(self) -> float:
        """How long."""
        return self.end_s - self.begin_s


class Load(Protocol):
    """Work for one GPU, or for all, in pulses of some 5 to 60 ms."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it can have the GPU do; matrix products always, and first."""

    def pulse(self, kind: str = MATRIX_PRODUCTS) -> Pulse:
        """Has the GPU do the same work as every time, and returns when it is done. One thread at a time."""

    def waiting(self) -> AbstractContextManager[None]:
        """Inside, for two seconds at most, the GPU waits as it does in a receive."""


@contextmanager
def busy(load: Load) -> Iterator[list[Pulse]]:
    """Inside, the GPU has one pulse after another to do; gives those that are done.

    Raises:
        NotMeasured: at the end, if the load has failed.
    """
    pulses: list[Pulse] = []
    failures: list[Exception] = []
    ending = threading.Event()

    def work() -> None:
        try:
            while not ending.is_set():
                pulses.append(load.pulse())
        except Exception as error:  # told below, by the thread that measures
            failures.append(error)

    thread = threading.Thread(target=work, name="perseus-load", daemon=True)
    thread.start()
    try:
        yield pulses
    finally:
        ending.set()
        thread.join()
    if failures:
        raise NotMeasured(f"the load has failed ({failures[0]!r})")
