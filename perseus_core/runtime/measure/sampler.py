"""Reads a GPU's energy counter from a side thread, and remembers when it moved."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from types import TracebackType

from perseus_core.gpu.device import Device, ThrottleReason
from perseus_core.gpu.errors import NotSupported

# A counter that moves every 100 ms fills this in more than half an hour.
_MAX_READINGS = 20_000
# From so long before to so long after a move is expected, the counter is looked at so often.
_LEAD_S = 0.004
_CLOSE_LOOK_S = 0.001


@dataclass(frozen=True)
class CounterReading:
    """One move of the energy counter.

    Attributes:
        time_s: when it moved (time.monotonic()): the middle between the look before and the look that saw it.
        uncertainty_s: the time between these two looks.
        energy_j: the counter's new value.
        clock_mhz: the SM clock then; None where the GPU does not tell.
        throttle: what held the clock down then.
    """

    time_s: float
    uncertainty_s: float
    energy_j: float
    clock_mhz: int | None = None
    throttle: ThrottleReason = ThrottleReason.NONE


class EnergySampler:
    """Follows the energy counter of one GPU while it is started. Its methods may be called from any thread.

    A GPU that does not count has its power integrated (`Device.counts_energy`): every look is then a reading.
    """

    def __init__(self, device: Device, period_s: float = 0.005) -> None:
        """Looks at `device.total_energy_j()` every `period_s`; once it is known when it moves, only about then."""
        self._device = device
        self._period_s = period_s
        self._lock = threading.Lock()
        self._readings: list[CounterReading] = []
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> EnergySampler:
        self.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def failure(self) -> Exception | None:
        """Why sampling ended by itself; what was read until then stays."""
        return self._failure

    def start(self) -> None:
        """Starts to look; nothing if it already does."""
        if self._thread is None:
            self._failure = None
            # A new one each time: a thread that hung in the driver must still find its own set when it comes back.
            self._stopping = threading.Event()
            self._thread = threading.Thread(
                target=self._sample, args=(self._stopping,), name="perseus-sampler", daemon=True
            )
            self._thread.start()

    def stop(self, timeout_s: float = 1.0) -> None:
        """Stops to look. A call of the driver that hangs is waited for no longer than `timeout_s`."""
        if self._thread is not None:
            self._stopping.set()
            self._thread.join(timeout_s)
            self._thread = None

    def between(self, begin_s: float, end_s: float) -> tuple[CounterReading, ...]:
        """Readings of a span of time, in order."""
        with self._lock:
            first = bisect_left(self._readings, begin_s, key=_time_s)
            return tuple(self._readings[first : bisect_right(self._readings, end_s, key=_time_s)])

    def forget_before(self, time_s: float) -> None:
        """Drops the readings up to a time."""
        with self._lock:
            del self._readings[: bisect_left(self._readings, time_s, key=_time_s)]

    def counter_period_s(self) -> float | None:
        """How often the counter moves, as measured; None before it has moved three times."""
        with self._lock:
            times_s = [reading.time_s for reading in self._readings[-200:]]
        if len(times_s) < 3:
            return None
        return median(after - before for before, after in pairwise(times_s))

    def _sample(self, stopping: threading.Event) -> None:
        try:
            self._follow_counter(stopping)
        except Exception as error:  # whatever it is, it is not training's business
            self._failure = error

    def _follow_counter(self, stopping: threading.Event) -> None:
        counts_energy = self._device.counts_energy
        last_energy_j = self._device.total_energy_j()
        last_look_s = time.monotonic()
        expected_s: float | None = None
        while not stopping.wait(self._wait_s(expected_s)):
            called_s = time.monotonic()
            energy_j = self._device.total_energy_j()
            returned_s = time.monotonic()
            if energy_j != last_energy_j:
                # An integrated power is up to date at each call; a counter moved at some time since the last look.
                earliest_s = last_look_s if counts_energy else called_s
                self._keep(energy_j, earliest_s, returned_s)
                last_energy_j = energy_j
                period_s = self.counter_period_s() if counts_energy else None
                was_seen_moving = returned_s - earliest_s <= 2 * self._period_s
                expected_s = (earliest_s + returned_s) / 2 + period_s if period_s and was_seen_moving else None
            last_look_s = called_s

    def _wait_s(self, expected_s: float | None) -> float:
        """Until the next look: shortly before the counter should move, and then often until it has."""
        if expected_s is None:
            return self._period_s
        until_s = expected_s - _LEAD_S - time.monotonic()
        if until_s < -2 * _LEAD_S:
            return self._period_s
        return max(_CLOSE_LOOK_S, until_s)

    def _keep(self, energy_j: float, earliest_s: float, latest_s: float) -> None:
        clock_mhz, throttle = self._read_clock()
        middle_s, uncertainty_s = (earliest_s + latest_s) / 2, latest_s - earliest_s
        with self._lock:
            self._readings.append(CounterReading(middle_s, uncertainty_s, energy_j, clock_mhz, throttle))
            if len(self._readings) > _MAX_READINGS:
                del self._readings[: _MAX_READINGS // 2]

    def _read_clock(self) -> tuple[int | None, ThrottleReason]:
        try:
            clock_mhz = self._device.sm_clock_mhz()
        except NotSupported:
            return None, ThrottleReason.NONE
        try:
            return clock_mhz, self._device.throttle_reasons()
        except NotSupported:
            return clock_mhz, ThrottleReason.NONE


def _time_s(reading: CounterReading) -> float:
    return reading.time_s
