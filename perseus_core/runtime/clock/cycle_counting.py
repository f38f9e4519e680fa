"""Has a GPU count cycles while its clock changes, also while the call that asks for the change has not returned yet."""

from __future__ import annotations

from perseus_core.gpu.slices import Slices
from perseus_core.runtime.clock.seen_change import NUM_BEFORE, SeenChange, change_seen
from perseus_core.runtime.side_threads import SideThreads

# 50 us of counting in so many: one thread on one SM, and hardly anything to share with training.
_COUNT_EVERY_S = 0.001


class CycleCounting:
    """Watches one change of clock after the other. For one thread; another one gives the GPU what to count.

    Attributes:
        failure: why the GPU counts no more.
    """

    def __init__(self, slices: Slices, threads: SideThreads, limit_s: float) -> None:
        """Counts nothing yet.

        Args:
            slices: has the GPU count.
            threads: time, and the side thread for as long as a change is watched.
            limit_s: no change is watched for longer.
        """
        self.failure: Exception | None = None
        self._slices, self._threads, self._limit_s = slices, threads, limit_s
        self._number = 0  # of the change that is watched

    def begin(self) -> None:
        """A change will be asked for now."""
        try:
            self._slices.forget()
            for _ in range(NUM_BEFORE):
                self._slices.begin()
        except Exception as error:  # whatever it is, it is not training's business
            self.failure = error
            return
        self._number += 1
        number, until_s = self._number, self._threads.now_s() + self._limit_s

        def step() -> float | None:
            if number != self._number or self._threads.now_s() > until_s:
                return None
            try:
                self._slices.begin()
            except Exception as error:
                self.failure = error
                return None
            return _COUNT_EVERY_S

        self._threads.start("perseus-cycle-counting", step)

    def seen(self, asked_s: float, asked_ratio: float) -> SeenChange | None:
        """The change, if it shows: see `change_seen`."""
        try:
            return change_seen(self._slices.finished(), asked_s, asked_ratio)
        except Exception as error:
            self.failure = error
            return None

    def end(self) -> None:
        """The change is watched no longer."""
        self._number += 1
