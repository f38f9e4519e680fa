"""The clocks of this rank's GPU, iteration by iteration: the plan's, one that is held, or the driver's own."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import GpuError
from perseus_core.gpu.slices import Slices
from perseus_core.planning.switching import NOTHING_SEEN, SeenChanges, Switching
from perseus_core.runtime.clock.controller import ClockController
from perseus_core.runtime.clock.give_back import GuardedClock
from perseus_core.runtime.clock.planned_clock import PlannedClock
from perseus_core.runtime.clock.settable_clock import Guard
from perseus_core.runtime.measure.events import Event
from perseus_core.runtime.side_threads import SideThreads


class _Mode(Enum):
    UNKNOWN = "unknown"
    PLAN = "plan"


class StageClocks:
    """A clock controller where clocks may be set, and nothing where not.

    Attributes:
        following: whether the plan's clocks are followed in this iteration.
    """

    def __init__(
        self,
        device: Device | None,
        switch_latency_s: float,
        *,
        threads: SideThreads,
        guard: Guard = GuardedClock,
        slices: Slices | None = None,
    ) -> None:
        """Without a device, no clock is ever set.

        Args:
            device: the GPU.
            switch_latency_s: how long a change takes, until it has been measured.
            threads: time, and the side thread that sets the clock.
            guard: makes the clock that is set, see `ClockController`.
            slices: has the GPU count cycles, to see how long changes take.
        """
        self.following = False
        self._now: int | _Mode | None = _Mode.UNKNOWN
        self._controller: ClockController | None = None
        if device is not None:
            self._controller = ClockController(device, switch_latency_s, threads=threads, guard=guard, slices=slices)

    @property
    def can_be_set(self) -> bool:
        """Whether clocks can be set, as far as is known."""
        return self._controller is not None and self._controller.failure is None

    @property
    def failure(self) -> GpuError | None:
        """Why not, if that was found out while setting them."""
        return None if self._controller is None else self._controller.failure

    def start(self) -> None:
        """Claims the clock, beside training."""
        if self._controller is not None:
            self._controller.start()

    def stop(self, limit_s: float = 1.0) -> None:
        """Gives the clock back for good, and waits no longer than `limit_s` for it (`ClockController.stop`)."""
        self.following = False
        if self._controller is not None:
            self._controller.stop(limit_s)

    @property
    def seen_changes(self) -> SeenChanges:
        """What changes of clock were seen to take."""
        return NOTHING_SEEN if self._controller is None else self._controller.seen_changes

    def follow(self, clocks: Sequence[PlannedClock], switching: Switching) -> None:
        """The iteration that begins runs at the plan's clocks; `switching` is what they were planned for."""
        if self._controller is not None:
            self._controller.begin_iteration(clocks, switching)
            self.following, self._now = True, _Mode.PLAN

    def hold(self, clock_mhz: int | None, from_event: Event | None = None) -> None:
        """One clock [MHz] from an event on, or none: the driver chooses."""
        self.following = False
        if self._controller is not None and self._now != clock_mhz:
            self._controller.hold(clock_mhz, from_event)
            self._now = clock_mhz

    def instruction_begins(self, event: Event) -> None:
        """An instruction begins. Told also while a clock is held: it is the sign of life that keeps the clock ours."""
        if self._controller is not None:
            self._controller.instruction_begins(event)

    def instruction_ends(self, event: Event) -> None:
        """It ends."""
        if self._controller is not None:
            self._controller.instruction_ends(event)

    def end_iteration(self) -> None:
        """The iteration ends."""
        if self.following and self._controller is not None:
            self._controller.end_iteration()
        self.following = False
