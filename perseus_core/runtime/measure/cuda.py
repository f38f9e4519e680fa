"""As much of CUDA as marks, anchors and slices need: a thin layer over torch, and what stands in for it in tests."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from perseus_core.runtime.cuda_driver import loaded_driver
from perseus_core.runtime.log import logger

# The GPU is given something to do while it is given the rest, so that the first event and what follows it have no gap.
_LEAD_CYCLES = 40_000


class Cuda:
    """One CUDA device, through torch."""

    def __init__(self, device: Any = None) -> None:
        """Initialises CUDA if nobody has.

        Args:
            device: a `torch.device` or CUDA index; by default the current one.
        """
        torch: Any = importlib.import_module("torch")
        torch.cuda.init()
        self._torch = torch
        self.device = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)

    def new_event(self) -> Any:
        """An event that is not recorded yet. Waiting for it sleeps, without the GIL."""
        return self._torch.cuda.Event(enable_timing=True, blocking=True)

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured on the current stream.

        Raises:
            RuntimeError: if that cannot be told, as of the legacy stream while another one is captured.
        """
        return bool(self._torch.cuda.is_current_stream_capturing())

    def own_stream(self) -> OwnStream:
        """A new stream that nobody else has."""
        driver = loaded_driver()
        with self._torch.cuda.device(self.device):
            handle = None if driver is None else driver.create_stream()
            if driver is None or handle is None:
                # One of 32 that torch hands out in turn: others may have it, too, and put work or a capture on it.
                logger.debug("no stream of our own is to be had, torch's are shared")
                return OwnStream(self._torch, self.device, self._torch.cuda.Stream(self.device))
            stream = self._torch.cuda.ExternalStream(handle, device=self.device)
        return OwnStream(self._torch, self.device, stream, lambda: driver.destroy_stream(handle))


class OwnStream:
    """A stream for our own events and slices, until it is closed. For any thread.

    Attributes:
        is_shared: whether others may use it as well.
    """

    def __init__(self, torch: Any, device: Any, stream: Any, destroy: Callable[[], None] | None = None) -> None:
        """Made by `Cuda.own_stream`; one that is not to be destroyed is one of torch's."""
        self._torch, self._device, self._stream, self._destroy = torch, device, stream, destroy
        self._closed = False
        self._lock = threading.Lock()  # a stream that is gone must not be used: that is a crash, and no error
        self.is_shared = destroy is None

    def record(self, event: Any) -> None:
        """Puts an event on it.

        Raises:
            RuntimeError: if that is not possible, or it is closed.
        """
        with self._in_use():
            if self.is_shared and self._torch.cuda.is_current_stream_capturing():
                raise RuntimeError("the stream is being captured by somebody else")
            event.record(self._stream)

    def spin(self, begin: Any, cycles: int, end: Any) -> None:
        """Has one thread of one SM count so many cycles, between two events that are reached without a gap.

        Raises:
            RuntimeError: if that is not possible, or it is closed.
        """
        with self._in_use():
            self._torch.cuda._sleep(_LEAD_CYCLES)
            begin.record(self._stream)
            self._torch.cuda._sleep(cycles)
            end.record(self._stream)

    def close(self) -> None:
        """Gives it up; what is on it is still done. Any number of times."""
        with self._lock:
            if not self._closed and self._destroy is not None:
                self._destroy()
            self._closed = True

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Makes it this thread's current stream.

        And its GPU this thread's current one first: leaving the stream would otherwise go back to the first GPU, where
        a thread begins, and leave a context of half a gigabyte there.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the stream is closed")
            with self._torch.cuda.device(self._device), self._torch.cuda.stream(self._stream):
                yield
