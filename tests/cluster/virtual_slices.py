"""Slices of cycles that a virtual GPU counts, at the clock that it really runs at."""

from __future__ import annotations

from perseus_core.gpu.slices import Slice
from tests.cluster.virtual_gpu import VirtualGpu

_CYCLES = 100_000


class VirtualSlices:
    """`perseus_core.gpu.slices.Slices` in virtual time."""

    def __init__(self, gpu: VirtualGpu) -> None:
        """Counts nothing yet."""
        self._gpu = gpu
        self._begins_s: list[float] = []

    def begin(self) -> None:
        """See `Slices`."""
        self._begins_s.append(self._gpu.threads.now_s())

    def finished(self) -> list[Slice]:
        """See `Slices`. As on one stream, one begins when the one before has ended."""
        now_s, slices = self._gpu.threads.queue.now_s, list[Slice]()
        for asked_s in self._begins_s:
            begin_s = max(asked_s, slices[-1].end_s) if slices else asked_s
            end_s = self._end_s(begin_s)
            if end_s > now_s:
                break
            slices.append(Slice(begin_s, end_s))
        return slices

    def forget(self) -> None:
        """See `Slices`."""
        self._begins_s = []

    def _end_s(self, begin_s: float) -> float:
        left, time_s = float(_CYCLES), begin_s
        for until_s, clock_mhz in self._gpu.clocks_until():
            if until_s <= time_s:
                continue
            counted_s = time_s + left / (clock_mhz * 1e6)
            if counted_s <= until_s:
                return counted_s
            left -= (until_s - time_s) * clock_mhz * 1e6
            time_s = until_s
        raise AssertionError("the clock in force lasts for ever")
