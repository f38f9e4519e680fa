"""What a step of the measurement gets: a GPU, a load for it, threads and time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from perseus_core.commands.measurement.load import Load
from perseus_core.commands.measurement.results import NotMeasured
from perseus_core.gpu.device import Device
from perseus_core.gpu.discovery import visible_devices
from perseus_core.gpu.errors import GpuError
from perseus_core.gpu.simulated import ENVIRONMENT_VARIABLE
from perseus_core.gpu.slices import Slices
from perseus_core.runtime.clock.give_back import GuardedClock
from perseus_core.runtime.clock.settable_clock import SettableClock
from perseus_core.runtime.measure.events import EventSource
from perseus_core.runtime.patience import patiently
from perseus_core.runtime.side_threads import OwnThreads, SideThreads

_GUARD_LIMIT_S = 30.0
_GIVE_BACK_LIMIT_S = 3.0
# No clock is held longer than this without a call.
_HANG_LIMIT_S = 60.0
# Of the highest clock. Lower ones no plan uses: they cost time and save nothing.
_LOWEST_USEFUL = 0.55
# When a change of clock has settled, and the soonest that is believed of any.
_SETTLED_S, _SOONEST_S = 0.4, 0.08


@dataclass(frozen=True)
class Bench:
    """One GPU to measure on.

    Attributes:
        devices: all visible GPUs; the first one is measured, the others only where all are meant.
        load: of the first one.
        events: marks on the load's stream, and the host's time of them.
        slices: has the first GPU count cycles; none where it cannot.
        step_s: about how long a step measures [s].
        known: figures of the steps before, by their names.
        threads: time, and side threads as the runtime has them.
        is_simulated: whether the GPUs are.
    """

    devices: tuple[Device, ...]
    load: Load
    events: EventSource
    slices: Slices | None
    step_s: float
    known: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    threads: SideThreads = field(default_factory=OwnThreads)
    is_simulated: bool = False

    @property
    def device(self) -> Device:
        """The GPU that is measured."""
        return self.devices[0]

    @property
    def settle_s(self) -> float:
        """How long a clock that was asked for is given until the GPU is measured at it, power capping included."""
        latency = self.known.get("latency")
        longest_s = max(latency["up"]["longest_s"], latency["down"]["longest_s"]) if latency else 0.0
        return max(min(_SETTLED_S, self.step_s / 20), _SOONEST_S, 2 * longest_s)

    def counting(self) -> Slices:
        """Has the GPU count cycles.

        Raises:
            NotMeasured: if it cannot.
        """
        if self.slices is None:
            raise NotMeasured("the GPU cannot be made to count its cycles here (torch.cuda._sleep)")
        with self.events.between_iterations():
            self.slices.forget()
        return self.slices

    def spread_clocks_mhz(self, count: int) -> list[int]:
        """So many useful clocks, evenly from low to high; fewer where there are not so many."""
        clocks = self.device.supported_clocks_mhz()
        useful = sorted(clock for clock in clocks if clock >= _LOWEST_USEFUL * clocks[0])
        if len(useful) < 2:
            raise NotMeasured(f"the GPU has {len(useful)} useful clock(s): there is nothing to change")
        places = {round(i * (len(useful) - 1) / (count - 1)) for i in range(count)}
        return [useful[place] for place in sorted(places)]


@contextmanager
def own_clocks(devices: Sequence[Device]) -> Iterator[list[GuardedClock]]:
    """Inside, the clocks of these GPUs are ours to lock; afterwards they are given back, whatever happened.

    Raises:
        GpuError: if one of them cannot be had.
    """
    failures: list[GpuError] = []
    clocks = [GuardedClock(device, failures.append, hang_limit_s=_HANG_LIMIT_S) for device in devices]
    try:
        for clock in clocks:
            clock.acquire()
        limit_s = time.monotonic() + _GUARD_LIMIT_S
        while not all(clock.is_guarded for clock in clocks):
            if failures:
                raise failures[0]
            if time.monotonic() > limit_s:
                raise NotMeasured(f"the watchdog of the clock has not begun within {_GUARD_LIMIT_S:g} s")
            time.sleep(0.005)
        yield clocks
    finally:
        for clock in clocks:
            clock.release(_GIVE_BACK_LIMIT_S)


def hold(clock: SettableClock, clock_mhz: int) -> None:
    """Locks a clock, also where the driver's calls fail now and then.

    Raises:
        GpuError: if they fail for good.
    """
    patiently(lambda: clock.lock(clock_mhz))


def open_bench(step_s: float, known: Mapping[str, Mapping[str, Any]]) -> Bench:
    """The visible GPUs of this process, simulated or real.

    Raises:
        PerseusError: if there is none, or torch cannot use it.
    """
    devices = tuple(visible_devices())
    if not devices:
        raise GpuError("no GPU is visible to this process; look at CUDA_VISIBLE_DEVICES")
    if ENVIRONMENT_VARIABLE in os.environ:
        from perseus_core.commands.measurement.simulated_bench import simulated_load_and_slices
        from perseus_core.runtime.measure.events import HostEvents

        load, slices = simulated_load_and_slices(devices[0].uuid)
        return Bench(devices, load, HostEvents(), slices, step_s, known, is_simulated=True)
    from perseus_core.commands.measurement.cuda_load import cuda_load_and_events

    cuda_load, events = cuda_load_and_events(devices)
    return Bench(devices, cuda_load, events, events.slices(devices[0].uuid), step_s, known)
