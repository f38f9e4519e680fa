"""What the controller needs of a clock that it sets: a right to it, and that it is given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import GpuError


class SettableClock(Protocol):
    """One GPU's clock. `lock`, `reset` and `sm_clock_mhz` are for one thread, the controller's."""

    @property
    def failure(self) -> GpuError | None:
        """The error for which the clock was given up, if it was."""

    @property
    def num_lock_calls(self) -> int:
        """How many calls of `lock` have succeeded."""

    @property
    def times_given_back(self) -> int:
        """How often somebody else has reset the clock because this process was stopped or hung."""

    @property
    def is_guarded(self) -> bool:
        """Whether the clock is ours to set, and sure to be given back whatever happens."""

    def acquire(self) -> None:
        """Begins to claim the clock; returns at once. From some time on it `is_guarded`."""

    def beat(self, now_s: float) -> None:
        """Training shows a sign of life."""

    def lock(self, clock_mhz: int) -> None:
        """Asks for one clock.

        Raises:
            GpuError: if it cannot be set.
        """

    def reset(self) -> None:
        """Gives the clock back to the driver, but keeps the right to lock it.

        Raises:
            GpuError: if that fails.
        """

    def sm_clock_mhz(self) -> int:
        """The clock it runs at now.

        Raises:
            GpuError: if it does not tell.
        """

    def release(self, limit_s: float) -> None:
        """Gives the clock back, for good, and waits no longer than this for it. Any thread, any number of times."""


Guard = Callable[[Device, Callable[[GpuError], None]], SettableClock]
"""Makes the clock of a device; the second argument is told when the clock can be set no longer."""
