"""Marks on a CUDA stream, and slices of GPU cycles beside it.

Not confirmed on a GPU yet: how sharp anchors are beside a busy training thread, and that slices of one thread on one SM
cost training nothing that shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from perseus_core.gpu.slices import Slice, Slices
from perseus_core.runtime.cuda_driver import relaxed
from perseus_core.runtime.log import logger
from perseus_core.runtime.measure.anchors import Anchor, AnchorFinder
from perseus_core.runtime.measure.cuda import Cuda
from perseus_core.runtime.measure.events import EventSource, NotRecorded
from perseus_core.runtime.side_threads import OwnThreads, SideThread, SideThreads

# 50 us at 2 GHz: long enough to be timed to a hundredth (events tell half a microsecond), and short enough to hold up
# nothing, also where it shares a hardware queue with training (CUDA_DEVICE_MAX_CONNECTIONS=1).
SLICE_CYCLES = 100_000


class CudaEvent:
    """A mark on a CUDA stream."""

    __slots__ = ("_anchor", "_event", "_source")

    def __init__(self, source: CudaEvents, event: Any, anchor: Anchor) -> None:
        """Made by `CudaEvents`."""
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
        elapsed_ms: float = self._anchor.event.elapsed_time(self._event)
        return self._anchor.time_s + elapsed_ms / 1000


class CudaEvents(EventSource):
    """Marks on the current stream of one CUDA device. Their CUDA events are pooled."""

    def __init__(self, device: Any = None, *, cuda: Cuda | None = None, threads: SideThreads | None = None) -> None:
        """Waits for nothing; the host's time is found beside training, from the first marks on.

        Args:
            device: a `torch.device` or CUDA index; by default the current one.
            cuda: the device's CUDA.
            threads: time, and the side thread that looks for anchors.
        """
        self._cuda = Cuda(device) if cuda is None else cuda
        self._threads = OwnThreads() if threads is None else threads
        self._pool: list[Any] = []
        with relaxed():
            self._stream = self._cuda.own_stream()
            self._can_spin = self._load_spinning()
            recorded_s = self._threads.now_s()
            self._anchor = Anchor(self._record_anchor(), recorded_s)
        self._finder = AnchorFinder(self._anchor, self._record_anchor, self._threads.now_s)
        self._thread: SideThread | None = None

    def record(self) -> CudaEvent:
        """A mark on the current stream (cudaEventRecord). On one that is captured it would become part of the graph."""
        if self._thread is None:
            self._thread = self._threads.start("perseus-anchors", self._finder.step)
        try:
            if not self._cuda.is_capturing():
                event = self._new_event()
                event.record()
                return CudaEvent(self, event, self._anchor)
        except Exception as error:
            raise NotRecorded(f"{type(error).__name__}: {error}") from error
        raise NotRecorded("a CUDA graph is captured there")

    @property
    def knows_host_time(self) -> bool:
        """Whether there is a sharp anchor that is not too old."""
        return self._anchor.is_usable_at(self._threads.now_s())

    @contextmanager
    def between_iterations(self) -> Iterator[None]:
        """See `EventSource`. All marks of an iteration are timed against one anchor."""
        with relaxed():
            yield
        self._anchor = self._finder.anchor

    def slices(self, gpu_uuid: str) -> Slices | None:
        """On our own stream; none where that is not really our own."""
        return CudaSlices(self) if self._can_spin else None

    def close(self) -> None:
        """The side thread ends, and our own stream is no more."""
        self._finder.is_stopping = True
        if self._thread is not None:
            self._thread.wake()
        with relaxed():
            self._stream.close()

    def take_back(self, event: Any) -> None:
        """Puts a CUDA event that nobody refers to any more back into the pool."""
        self._pool.append(event)

    def record_slice(self, cycles: int) -> tuple[CudaEvent, CudaEvent]:
        """Marks before and after so many cycles, on our own stream."""
        begin, end = self._new_event(), self._new_event()
        self._stream.spin(begin, cycles, end)
        return CudaEvent(self, begin, self._anchor), CudaEvent(self, end, self._anchor)

    def _new_event(self) -> Any:
        try:
            return self._pool.pop()
        except IndexError:
            return self._cuda.new_event()

    def _record_anchor(self) -> Any:
        event = self._cuda.new_event()
        self._stream.record(event)
        return event

    def _load_spinning(self) -> bool:
        """Has the GPU count one cycle, between two iterations of training.

        CUDA loads a kernel when it is first used, and may wait for the whole GPU then. In the middle of an iteration
        the GPU may wait in turn for something that training has not given it yet.
        """
        if self._stream.is_shared:
            return False
        try:
            self._stream.spin(self._cuda.new_event(), 1, self._cuda.new_event())
        except Exception as error:  # torch.cuda._sleep is not part of its interface
            logger.debug("the GPU cannot count cycles", exc_info=error)
            return False
        return True


class CudaSlices:
    """Slices that a GPU counts on our own stream."""

    def __init__(self, source: CudaEvents) -> None:
        """Made by `CudaEvents.slices`."""
        self._source = source
        self._begun: list[tuple[CudaEvent, CudaEvent]] = []
        self._finished: list[Slice] = []

    def begin(self) -> None:
        """`torch.cuda._sleep` between two events."""
        self._begun.append(self._source.record_slice(SLICE_CYCLES))

    def finished(self) -> list[Slice]:
        """See `Slices`."""
        if not self._source.knows_host_time:
            return []
        num_reached = 0
        for begin, end in self._begun:
            if not end.reached():
                break
            self._finished.append(Slice(begin.time_s(), end.time_s()))
            num_reached += 1
        del self._begun[:num_reached]
        return self._finished

    def forget(self) -> None:
        """See `Slices`."""
        self._begun, self._finished = [], []
