"""Slices of cycles that a simulated GPU counts: at the clock that it really runs at, whatever its register tells."""

from __future__ import annotations

import math
import time

from perseus_core.gpu.simulated import model as physics
from perseus_core.gpu.simulated.model import GpuModel, GpuState
from perseus_core.gpu.simulated.node import SimulatedGpu
from perseus_core.gpu.slices import Slice

_CYCLES = 100_000


class SimulatedSlices:
    """Counts on one simulated GPU; see `perseus_core.gpu.slices.Slices`. Its work is not slower for it."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        """Counts nothing yet."""
        self._gpu = gpu
        self._slices: list[Slice] = []

    def begin(self) -> None:
        """See `Slices`. As on one stream, it begins when the one before has ended."""
        state = self._gpu.state()
        if self._slices:
            physics.advance(self._gpu.model, state, self._slices[-1].end_s)
        self._slices.append(Slice(state.time_s, counted_at_s(self._gpu.model, state, _CYCLES)))

    def finished(self) -> list[Slice]:
        """See `Slices`."""
        now_s = time.monotonic()
        return [one for one in self._slices if one.end_s <= now_s]

    def forget(self) -> None:
        """See `Slices`."""
        self._slices = []


def counted_at_s(model: GpuModel, state: GpuState, cycles: float) -> float:
    """When so many cycles will have been counted, if nobody asks for another clock until then.

    Args:
        model: what GPUs have in common.
        state: where this one is; it is brought forward.
        cycles: to count from `state.time_s` on.
    """
    while True:
        clock_hz = model.clocks_mhz[physics.effective_clock_index(model, state)] * 1e6
        until_s = state.pending[0][0] if state.pending else math.inf
        counted_s = state.time_s + cycles / clock_hz
        if counted_s <= until_s:
            return counted_s
        cycles -= (until_s - state.time_s) * clock_hz
        physics.advance(model, state, until_s)
