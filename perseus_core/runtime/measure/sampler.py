"""Reads a GPU's energy counter beside training, and remembers when it moved."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from perseus_core.gpu.device import Device, ThrottleReason
from perseus_core.gpu.errors import CallFailed, NotSupported
from perseus_core.runtime.patience import Patience
from perseus_core.runtime.side_threads import SideThread, SideThreads

# A counter that moves every 100 ms fills this in more than half an hour.
_MAX_READINGS = 20_000
# The counter's period is the median of so many.
_REMEMBERED_PERIODS = 199
# From some time before to some time after a move is expected, the counter is looked at so often. That time is twice the
# error of what was expected lately, within these limits: each look costs training a little of the interpreter.
_CLOSE_LOOK_S = 0.001
_SHORTEST_LEAD_S = 0.0015
_LONGEST_LEAD_S = 0.004
_LEAD_DECAY = 0.97


@dataclass(frozen=True)
class CounterReading:
    """One move of the energy counter.

    Attributes:
        time_s: when it moved (`SideThreads.now_s`): the middle between the look before and the look that saw it.
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

    def __init__(self, device: Device, period_s: float = 0.005, *, threads: SideThreads) -> None:
        """Looks at nothing yet.

        Args:
            device: the GPU.
            period_s: how often to look at `device.total_energy_j()`; once it is known when it moves, only about then.
            threads: time, and the side thread that looks.
        """
        self._device = device
        self._period_s = period_s
        self._threads = threads
        self._lock = threading.Lock()
        self._readings: list[CounterReading] = []
        self._periods = _Periods()
        self._follower: _CounterFollower | None = None
        self._thread: SideThread | None = None

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
        return None if self._follower is None else self._follower.failure

    def start(self) -> None:
        """Starts to look; nothing if it already does."""
        if self._follower is None or self._follower.is_stopping:
            # A new one each time: one that hung in the driver must still find its own end when it comes back.
            self._follower = _CounterFollower(
                self._device, self._period_s, self._threads.now_s, self._keep, self.counter_period_s
            )
            self._thread = self._threads.start("perseus-sampler", self._follower.step)

    def stop(self, limit_s: float = 1.0) -> None:
        """Stops to look, and waits for the thread's end no longer than `limit_s`: a call of the driver may hang."""
        if self._follower is not None and self._thread is not None:
            self._follower.is_stopping = True
            self._thread.wake()
            self._thread.join(limit_s)

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
            return self._periods.median_s()

    def _keep(self, energy_j: float, earliest_s: float, latest_s: float) -> None:
        clock_mhz, throttle = self._read_clock()
        middle_s, uncertainty_s = (earliest_s + latest_s) / 2, latest_s - earliest_s
        with self._lock:
            self._readings.append(CounterReading(middle_s, uncertainty_s, energy_j, clock_mhz, throttle))
            self._periods.add_move(middle_s)
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


class _CounterFollower:
    """Looks at the counter until it is to stop, or until that fails.

    Attributes:
        is_stopping: set by others when it is to end.
        failure: why it ended by itself.
    """

    def __init__(
        self,
        device: Device,
        period_s: float,
        now_s: Callable[[], float],
        keep: Callable[[float, float, float], None],
        counter_period_s: Callable[[], float | None],
    ) -> None:
        """Each move is handed to `keep`, as (new value [J], earliest and latest time [s])."""
        self.is_stopping = False
        self.failure: Exception | None = None
        self._device = device
        self._period_s = period_s
        self._now_s = now_s
        self._keep = keep
        self._counter_period_s = counter_period_s
        self._counts_energy = True
        self._patience = Patience()
        self._last_energy_j: float | None = None
        self._last_look_s = 0.0
        self._expected_s: float | None = None
        self._lead_s = _LONGEST_LEAD_S

    def step(self) -> float | None:
        """Looks once; returns how long to wait until the next look, None at the end."""
        if self.is_stopping:
            return None
        try:
            called_s = self._now_s()
            energy_j = self._device.total_energy_j()
            if energy_j != self._last_energy_j:
                self._has_moved(energy_j, called_s)
        except CallFailed as error:
            return self._bear(error)
        except Exception as error:  # whatever it is, it is not training's business
            self.failure = error
            return None
        self._patience.succeeded()
        self._last_look_s = called_s
        if self._expected_s is None:
            return self._period_s
        # Shortly before the counter should move, and then often until it has.
        until_s = self._expected_s - self._lead_s - self._now_s()
        if until_s < -2 * _LONGEST_LEAD_S:
            return self._period_s
        return until_s if until_s > _CLOSE_LOOK_S else _CLOSE_LOOK_S

    def _bear(self, error: CallFailed) -> float | None:
        try:
            return self._patience.bear(error, self._now_s())
        except CallFailed as lasting:
            self.failure = lasting
            return None

    def _has_moved(self, energy_j: float, called_s: float) -> None:
        returned_s = self._now_s()
        if self._last_energy_j is None:
            self._counts_energy = self._device.counts_energy
        else:
            # An integrated power is up to date at each call; a counter moved at some time since the last look.
            earliest_s = self._last_look_s if self._counts_energy else called_s
            self._keep(energy_j, earliest_s, returned_s)
            if self._counts_energy:
                self._expect_next(earliest_s, returned_s)
        self._last_energy_j = energy_j

    def _expect_next(self, earliest_s: float, latest_s: float) -> None:
        period_s = self._counter_period_s()
        was_seen_moving = latest_s - earliest_s <= 2 * self._period_s
        if period_s is None or not was_seen_moving:
            self._expected_s, self._lead_s = None, _LONGEST_LEAD_S
            return
        moved_s = (earliest_s + latest_s) / 2
        if self._expected_s is not None:
            error_s = abs(moved_s - self._expected_s)
            lead_s = max(2 * error_s, _LEAD_DECAY * self._lead_s, _SHORTEST_LEAD_S)
            self._lead_s = min(lead_s, _LONGEST_LEAD_S)
        self._expected_s = moved_s + period_s


class _Periods:
    """The times between the last moves of a counter, and their median."""

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._in_order_of_time: deque[float] = deque()
        self._in_order_of_length: list[float] = []

    def add_move(self, time_s: float) -> None:
        if self._last_s is not None:
            period_s = time_s - self._last_s
            self._in_order_of_time.append(period_s)
            insort(self._in_order_of_length, period_s)
            if len(self._in_order_of_time) > _REMEMBERED_PERIODS:
                oldest = bisect_left(self._in_order_of_length, self._in_order_of_time.popleft())
                del self._in_order_of_length[oldest]
        self._last_s = time_s

    def median_s(self) -> float | None:
        periods = self._in_order_of_length
        if len(periods) < 2:
            return None
        return (periods[len(periods) // 2] + periods[(len(periods) - 1) // 2]) / 2


def _time_s(reading: CounterReading) -> float:
    return reading.time_s
