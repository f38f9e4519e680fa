"""The clock of a virtual GPU as its controller sets it, without a watchdog's process."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import CallFailed, GpuError
from perseus_core.runtime.clock.give_back import ClockGivenBack
from perseus_core.runtime.patience import patiently
from tests.cluster.virtual_threads import VirtualThreads

# The watchdog of a real clock is a process, which has to start.
_GUARDED_AFTER_S = 0.4


class VirtualClock:
    """`perseus_core.runtime.clock.settable_clock.SettableClock` in virtual time.

    Attributes:
        failure: always none; what goes wrong is raised.
        num_lock_calls: how many have succeeded.
        times_given_back: how often `take_away` was called.
    """

    failure: GpuError | None = None

    def __init__(self, device: Device, threads: VirtualThreads) -> None:
        """Touches nothing yet."""
        self.num_lock_calls = 0
        self.times_given_back = 0
        self._device = device
        self._threads = threads
        self._guarded_from_s = math.inf
        self._is_released = False
        self._may_be_locked = False

    @classmethod
    def guard_for(cls, threads: VirtualThreads) -> Callable[[Device, Callable[[GpuError], None]], VirtualClock]:
        """What makes the clocks of one rank: a `settable_clock.Guard`."""
        return lambda device, _on_failure: cls(device, threads)

    @property
    def is_guarded(self) -> bool:
        """See `SettableClock`."""
        return self._threads.now_s() >= self._guarded_from_s and not self._is_released

    def acquire(self) -> None:
        """See `SettableClock`."""
        self._guarded_from_s = self._threads.now_s() + _GUARDED_AFTER_S

    def beat(self, now_s: float) -> None:
        """See `SettableClock`. Nobody waits for it."""

    def lock(self, clock_mhz: int) -> None:
        """See `SettableClock`."""
        self._raise_if_released()
        self._device.lock_clock(clock_mhz)
        self._may_be_locked = True
        self.num_lock_calls += 1

    def reset(self) -> None:
        """See `SettableClock`."""
        self._raise_if_released()
        if self._may_be_locked:
            self._device.reset_clock()
            self._may_be_locked = False

    def sm_clock_mhz(self) -> int:
        """See `SettableClock`."""
        return self._device.sm_clock_mhz()

    def release(self, limit_s: float) -> None:
        """See `SettableClock`."""
        if not self._is_released:
            self._is_released = True
            if self._may_be_locked:
                self._may_be_locked = False
                # Where that fails for good, a watchdog would try when the process has ended.
                with suppress(CallFailed):
                    patiently(self._device.reset_clock, now_s=self._threads.now_s, sleep=self._threads.spend)

    def take_away(self) -> None:
        """As the watchdog does with a process that hangs: the clock is reset, and may be locked again later."""
        if self._may_be_locked:
            self._may_be_locked = False
            self._device.reset_clock()
            self.times_given_back += 1

    def _raise_if_released(self) -> None:
        if self._is_released:
            raise ClockGivenBack("the clock has been given back")
