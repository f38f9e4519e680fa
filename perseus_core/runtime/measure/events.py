"""Marks on the compute stream: when did the GPU get there? Recorded without ever waiting for the GPU."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from perseus_core.gpu.slices import Slices


class NotRecorded(RuntimeError):  # noqa: N818 (named by what happened)
    """No mark can be put on the compute stream now, as while a CUDA graph is captured there."""


class Event(Protocol):
    """One mark. Any thread may ask."""

    def reached(self) -> bool:
        """Whether the stream has got there."""

    def wait(self) -> None:
        """Returns when the stream has got there; lets other threads run meanwhile."""

    def time_s(self) -> float:
        """When the stream got there [s, `time.monotonic`]. Only for a mark that is reached."""


class EventSource(Protocol):
    """Makes marks."""

    def record(self) -> Event:
        """Puts a mark on the current compute stream; costs a few microseconds and never synchronises.

        Raises:
            NotRecorded: if that is not possible now. Nothing has happened then.
        """

    @property
    def knows_host_time(self) -> bool:
        """Whether marks that are recorded now tell the host's time. Times between marks of one iteration are right
        in any case."""
        return True

    def between_iterations(self) -> AbstractContextManager[None]:
        """Inside, the training thread may ask marks for anything, whoever captures a CUDA graph meanwhile.

        Marks that are recorded afterwards may refer to a newer measurement of the host's time.
        """
        return nullcontext()

    def slices(self, gpu_uuid: str) -> Slices | None:
        """Has the GPU count cycles, on a stream of our own; None where that is not possible."""
        return None

    def close(self) -> None:
        """No more marks. Waits for nothing."""
        return


class HostEvent:
    """A mark in a program that computes on the CPU: reached as soon as it is made."""

    __slots__ = ("_time_s",)

    def __init__(self) -> None:
        self._time_s = time.monotonic()

    def reached(self) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    def time_s(self) -> float:
        """When it was made."""
        return self._time_s


class HostEvents(EventSource):
    """Marks for programs that compute on the CPU."""

    def record(self) -> HostEvent:
        """A mark of this moment."""
        return HostEvent()
