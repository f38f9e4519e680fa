"""Marks on the compute stream: when did the GPU get there? Recorded without ever waiting for the GPU."""

from __future__ import annotations

import importlib
import time
from typing import Any, NamedTuple, Protocol


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
        """Puts a mark on the current compute stream; costs a few microseconds and never synchronises."""


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


class HostEvents:
    """Marks for programs that compute on the CPU."""

    def record(self) -> HostEvent:
        """A mark of this moment."""
        return HostEvent()


class _Anchor(NamedTuple):
    """A CUDA event whose host time is known."""

    event: Any
    time_s: float


# CUDA gives the time between two events as a 32-bit float in milliseconds (good to 1 us for 10 s, to 1 ms for hours),
# and the GPU's clock drifts against the host's; so events are timed against a young anchor.
_ANCHOR_AGE_S = 10.0
_ANCHOR_ATTEMPTS = 5
_ANCHOR_GOOD_ENOUGH_S = 50e-6


class CudaEvent:
    """A mark on a CUDA stream."""

    __slots__ = ("_anchor", "_event", "_source")

    def __init__(self, source: CudaEvents, event: Any, anchor: _Anchor) -> None:
        """Made by `CudaEvents.record`."""
        self._source = source
        self._event = event
        self._anchor = anchor

    def __del__(self) -> None:
        """Nobody asks any more: the CUDA event can be recorded again."""
        self._source.take_back(self._event)

    def reached(self) -> bool:
        """cudaEventQuery."""
        return bool(self._event.query())

    def wait(self) -> None:
        """cudaEventSynchronize, sleeping and without the GIL; it waits for this event and for nothing behind it."""
        self._event.synchronize()

    def time_s(self) -> float:
        """The anchor's time plus cudaEventElapsedTime."""
        since_anchor_s: float = self._anchor.event.elapsed_time(self._event) / 1000
        time_s = self._anchor.time_s + since_anchor_s
        if since_anchor_s > _ANCHOR_AGE_S:
            self._source.renew_anchor(time_s)
        return time_s


class CudaEvents:
    """Marks on the current stream of one CUDA device. Their CUDA events are pooled."""

    def __init__(self, device: Any = None) -> None:
        """Takes some milliseconds for the first anchor.

        Args:
            device: a `torch.device` or CUDA index; by default the current one.
        """
        torch: Any = importlib.import_module("torch")
        self._torch = torch
        self._device = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
        # A stream of its own, always empty: the anchor is reached at once, whatever the compute stream is doing.
        self._anchor_stream = torch.cuda.Stream(self._device)
        self._pool: list[Any] = []
        self._anchor = self._make_anchor()

    def record(self) -> CudaEvent:
        """A mark on the current stream (cudaEventRecord)."""
        try:
            event = self._pool.pop()
        except IndexError:
            event = self._torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return CudaEvent(self, event, self._anchor)

    def take_back(self, event: Any) -> None:
        """Puts a CUDA event that nobody refers to any more back into the pool."""
        self._pool.append(event)

    def renew_anchor(self, now_s: float) -> None:
        """Makes marks recorded from now on refer to a new anchor, unless the present one is still young."""
        if now_s - self._anchor.time_s > _ANCHOR_AGE_S:
            self._anchor = self._make_anchor()

    def _make_anchor(self) -> _Anchor:
        """Records an event on the empty stream and times it on the host, to within half the time that this took."""
        best: tuple[float, _Anchor] | None = None
        with self._torch.cuda.device(self._device):
            for _ in range(_ANCHOR_ATTEMPTS):
                event = self._torch.cuda.Event(enable_timing=True)
                before_s = time.monotonic()
                event.record(self._anchor_stream)
                event.synchronize()
                after_s = time.monotonic()
                if best is None or after_s - before_s < best[0]:
                    best = (after_s - before_s, _Anchor(event, (before_s + after_s) / 2))
                if best[0] < _ANCHOR_GOOD_ENOUGH_S:
                    break
        assert best is not None
        return best[1]
