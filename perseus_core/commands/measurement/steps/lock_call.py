"""How long a call that locks a clock takes, and how long it holds up others."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from perseus_core.commands.measurement.bench import Bench, own_clocks
from perseus_core.commands.measurement.load import busy
from perseus_core.commands.measurement.results import Spread, Verdict, ms, standing
from perseus_core.gpu.errors import CallFailed
from perseus_core.planning.switching import MOST_CALLING
from perseus_core.runtime.clock.settable_clock import SettableClock
from perseus_core.runtime.settings import USUAL_CHANGES_PER_S

_BETWEEN_CALLS_S = 0.03


@dataclass(frozen=True)
class LockCalls:
    """Calls between two of the highest clocks.

    Attributes:
        idle: calls while the GPU waits.
        loaded: calls while it works.
        reads_beside: reads of the clock by another thread meanwhile.
        num_failed: calls that failed, for a reason that passed.
    """

    idle: Spread
    loaded: Spread
    reads_beside: Spread
    num_failed: int

    @property
    def verdict(self) -> Verdict:
        """Plans have ten changes a second as a rule, and calls may take a quarter of the time."""
        call_s = max(self.idle.median_s, self.loaded.median_s)
        most_s = MOST_CALLING / USUAL_CHANGES_PER_S
        failed = f"; {self.num_failed} calls failed and passed" if self.num_failed else ""
        sentence = (
            f"a lock call takes {ms(self.idle.median_s)} idle, {ms(self.loaded.median_s)} loaded "
            f"(longest {ms(max(self.idle.longest_s, self.loaded.longest_s))}), and another thread's read meanwhile up "
            f"to {ms(self.reads_beside.longest_s)}{failed}; assumed: {ms(most_s)} at most, for "
            f"{USUAL_CHANGES_PER_S:g} changes a second"
        )
        return Verdict(standing(as_assumed=call_s <= most_s and not self.num_failed), sentence)


def measure_lock_calls(bench: Bench) -> LockCalls:
    """Locks two of the highest clocks in turn."""
    highest, next_mhz = bench.device.supported_clocks_mhz()[:2]
    failed: list[CallFailed] = []
    reads_s: list[float] = []
    with own_clocks([bench.device]) as (clock,):
        idle_s = _call_for(bench.step_s / 2, clock, (highest, next_mhz), failed)
        with busy(bench.load), _reading(bench, reads_s):
            loaded_s = _call_for(bench.step_s / 2, clock, (highest, next_mhz), failed)
    return LockCalls(Spread.of(idle_s), Spread.of(loaded_s), Spread.of(reads_s), len(failed))


def _call_for(
    duration_s: float, clock: SettableClock, clocks_mhz: tuple[int, int], failed: list[CallFailed]
) -> list[float]:
    times_s: list[float] = []
    until_s = time.monotonic() + duration_s
    number = 0
    while time.monotonic() < until_s or number < 3:
        begin_s = time.monotonic()
        try:
            clock.lock(clocks_mhz[number % 2])
            times_s.append(time.monotonic() - begin_s)
        except CallFailed as error:
            failed.append(error)
        number += 1
        time.sleep(_BETWEEN_CALLS_S)
    return times_s


class _reading:  # noqa: N801 (a context manager, as it is used)
    """Inside, another thread reads the clock again and again."""

    def __init__(self, bench: Bench, times_s: list[float]) -> None:
        self._bench, self._times_s, self._ending = bench, times_s, threading.Event()
        self._thread = threading.Thread(target=self._read, name="perseus-reads", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._ending.wait(0.001):
            begin_s = time.monotonic()
            try:
                self._bench.device.sm_clock_mhz()
            except CallFailed:
                continue
            self._times_s.append(time.monotonic() - begin_s)
