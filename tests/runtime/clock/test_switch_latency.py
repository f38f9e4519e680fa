"""How long a change takes, on a clock and in a time that the test moves."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from perseus_core.gpu.errors import GpuLost
from perseus_core.gpu.slices import Slice
from perseus_core.runtime.clock.cycle_counting import CycleCounting
from perseus_core.runtime.clock.switch_latency import LOOK_EVERY_S, SwitchLatency
from perseus_core.runtime.side_threads import Step


class SlowClock:
    """A clock whose changes show after some time. Only what `SwitchLatency` uses of a `SettableClock`."""

    def __init__(self, latency_s: float) -> None:
        self.now_s = 100.0
        self.latency_s = latency_s
        self._changes: list[tuple[float, int]] = [(0.0, 1410)]

    def lock(self, clock_mhz: int) -> None:
        self._changes.append((self.now_s + self.latency_s, clock_mhz))

    def sm_clock_mhz(self) -> int:
        return [clock_mhz for in_force_s, clock_mhz in self._changes if in_force_s <= self.now_s][-1]


def watched(clock: SlowClock, latency: SwitchLatency, clock_mhz: int) -> int:
    """Changes the clock and looks as often as is asked for; returns how often."""
    latency.lock(clock, clock_mhz)  # type: ignore[arg-type]
    looks = 0
    while latency.is_watching:
        clock.now_s += LOOK_EVERY_S
        latency.look(clock)  # type: ignore[arg-type]
        looks += 1
    clock.now_s += 1.0
    return looks


def test_three_changes_each_way_give_the_latency() -> None:
    """Until then it is the assumed one, or that of the other direction."""
    clock = SlowClock(0.03)
    latency = SwitchLatency(0.015, lambda: clock.now_s)
    for clock_mhz in (900, 1200, 900, 1200):
        watched(clock, latency, clock_mhz)
        assert (latency.switching.up_s, latency.switching.down_s) == (0.015, 0.015)
    watched(clock, latency, 900)  # the third down
    assert latency.switching.up_s == latency.switching.down_s == pytest.approx(0.03, abs=2 * LOOK_EVERY_S)
    clock.latency_s = 0.05
    watched(clock, latency, 1200)
    assert latency.switching.up_s == pytest.approx(0.03, abs=2 * LOOK_EVERY_S)  # the median of three
    assert latency.switching.down_s == pytest.approx(0.03, abs=2 * LOOK_EVERY_S)


def test_a_thread_that_looks_late_lets_no_clock_fall_too_early() -> None:
    """What was seen too late is too long; a fall that is expected to take long is asked for too early."""
    clock = SlowClock(0.03)
    latency = SwitchLatency(0.015, lambda: clock.now_s)
    for clock_mhz in (900, 1200, 900, 1200, 900, 1200):
        latency.lock(clock, clock_mhz)  # type: ignore[arg-type]
        clock.now_s += 0.03 if clock_mhz == 900 and clock.now_s > 101 else 0.045
        latency.look(clock)  # type: ignore[arg-type]
        clock.now_s += 1.0
    assert latency.switching.up_s == pytest.approx(0.045)
    assert latency.switching.down_s == pytest.approx(0.03)


def test_a_change_that_does_not_show_does_not_count() -> None:
    """Power or heat holds the clock elsewhere; after half a second nobody waits for it any more."""
    clock = SlowClock(3600.0)
    latency = SwitchLatency(0.015, lambda: clock.now_s)
    for clock_mhz in (900, 1200, 900):
        assert watched(clock, latency, clock_mhz) == pytest.approx(0.5 / LOOK_EVERY_S, abs=2)
    assert latency.switching.up_s == latency.switching.down_s == 0.015


def test_few_changes_are_watched() -> None:
    """The first ones, and one in two hundred; a change to the clock that is in force shows nothing."""
    clock = SlowClock(0.01)
    latency = SwitchLatency(0.015, lambda: clock.now_s)
    assert watched(clock, latency, 1410) == 0
    num_watched = sum(watched(clock, latency, (900, 1200)[i % 2]) > 0 for i in range(399))
    assert num_watched == 7 + 2


class CountingGpu(SlowClock):
    """A GPU that counts cycles, and a register that never tells the truth; with the side thread that has it count."""

    def __init__(self, latency_s: float, call_s: float = 0.0) -> None:
        super().__init__(latency_s)
        self._call_s = call_s
        self._slices: list[Slice] = []
        self._side: list[tuple[float, Step]] = []  # when each side thread goes on, and with what
        self.fails = False
        threads: Any = SimpleNamespace(now_s=lambda: self.now_s, start=self.start)
        self.latency = SwitchLatency(0.015, threads.now_s, CycleCounting(self, threads, 0.5))

    def lock(self, clock_mhz: int) -> None:
        super().lock(clock_mhz)
        self.pass_s(self._call_s)

    def sm_clock_mhz(self) -> int:
        return 1410

    def change(self, locked_mhz: int, clock_mhz: int) -> None:
        """Changes the clock, and watches that as the controller does."""
        self.latency.lock(self, clock_mhz, locked_mhz)  # type: ignore[arg-type]
        while self.latency.is_watching:
            self.pass_s(LOOK_EVERY_S)
            self.latency.look(self)  # type: ignore[arg-type]
        self.pass_s(1.0)

    # Its slices

    def begin(self) -> None:
        if self.fails:
            raise RuntimeError("an illegal memory access was encountered")
        begin_s = max([self.now_s, *(one.end_s for one in self._slices[-1:])])
        left, at_s = 100_000.0, begin_s
        for (_, clock_mhz), (until_s, _) in pairwise([*self._changes, (math.inf, 0)]):
            if until_s > at_s:
                counted = min(left, (until_s - at_s) * clock_mhz * 1e6)
                left, at_s = left - counted, at_s + counted / (clock_mhz * 1e6)
        self._slices.append(Slice(begin_s, at_s))

    def finished(self) -> list[Slice]:
        return [one for one in self._slices if one.end_s <= self.now_s]

    def forget(self) -> None:
        self._slices = []

    # Its side threads

    def start(self, name: str, step: Step) -> None:
        self._side.append((self.now_s, step))

    @property
    def num_side_threads(self) -> int:
        return len(self._side)

    def pass_s(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self._side and min(self._side, key=lambda one: one[0])[0] <= until_s:
            due_s, step = self._side.pop(self._side.index(min(self._side, key=lambda one: one[0])))
            self.now_s = max(self.now_s, due_s)
            wait = step()
            if wait is not None:
                assert isinstance(wait, float)
                self._side.append((self.now_s + wait, step))
        self.now_s = max(self.now_s, until_s)


@pytest.mark.parametrize("call_s", [0.0, 0.02])
@pytest.mark.parametrize("latency_s", [0.002, 0.015, 0.1, 0.3])
def test_the_gpu_tells_how_long_its_changes_take(latency_s: float, call_s: float) -> None:
    """Whatever its register tells, how slow the driver's call is, and beyond a tenth of a second; never too short."""
    gpu = CountingGpu(latency_s, call_s)
    for _ in range(3):
        gpu.latency_s = 0.7 * latency_s
        gpu.change(1200, 900)
        gpu.latency_s = latency_s
        gpu.change(900, 1200)
    assert 0 <= gpu.latency.seen.up_s - latency_s + 1e-9 < 1.1 * LOOK_EVERY_S
    assert 0 <= gpu.latency.seen.down_s - 0.7 * latency_s + 1e-9 < 1.1 * LOOK_EVERY_S
    assert gpu.num_side_threads == 0


def test_counting_ends_when_another_change_is_due() -> None:
    """And a change that never shows is not counted for ever."""
    gpu = CountingGpu(3600.0)
    gpu.latency.lock(gpu, 900, 1200)  # type: ignore[arg-type]
    assert gpu.latency.is_watching
    gpu.pass_s(0.1)
    assert gpu.num_side_threads == 1
    gpu.latency.look_no_longer()
    gpu.pass_s(0.01)
    assert gpu.num_side_threads == 0
    gpu.latency.lock(gpu, 1200, 900)  # type: ignore[arg-type]
    gpu.pass_s(1.0)  # and nobody looks
    assert gpu.num_side_threads == 0


def test_clocks_that_lie_near_each_other_are_not_watched() -> None:
    """Counting cannot tell them apart for certain."""
    gpu = CountingGpu(0.01)
    gpu.latency.lock(gpu, 1185, 1200)  # type: ignore[arg-type]
    assert not gpu.latency.is_watching
    assert gpu.num_side_threads == 0


@pytest.mark.parametrize("fault", ["counting fails", "counting fails later", "nothing shows"])
def test_where_counting_shows_nothing_the_register_is_asked(fault: str) -> None:
    """An error in counting is no error of the clock's."""
    gpu = CountingGpu(0.02)
    gpu.sm_clock_mhz = lambda: SlowClock.sm_clock_mhz(gpu)  # type: ignore[method-assign]
    if fault == "nothing shows":
        gpu.finished = list  # type: ignore[assignment,method-assign]
    elif fault == "counting fails":
        gpu.fails = True
    else:
        gpu.change(1410, 900)
        gpu.latency.lock(gpu, 1200, 900)  # type: ignore[arg-type]
        gpu.fails = True
        gpu.pass_s(0.003)
        gpu.latency.look(gpu)  # type: ignore[arg-type]
        assert not gpu.latency.is_watching
        gpu.pass_s(1.0)
    for _ in range(5):
        gpu.change(1200, 900)
        gpu.change(900, 1200)
    assert gpu.latency.switching.up_s == pytest.approx(0.02, abs=2 * LOOK_EVERY_S)
    assert gpu.latency.switching.down_s == pytest.approx(0.02, abs=2 * LOOK_EVERY_S)


def test_a_call_that_fails_is_not_watched() -> None:
    """The error is the controller's business."""
    gpu = CountingGpu(0.02)

    def fail(clock_mhz: int) -> None:
        raise GpuLost("it is lost")

    gpu.lock = fail  # type: ignore[method-assign]
    with pytest.raises(GpuLost):
        gpu.latency.lock(gpu, 900, 1200)  # type: ignore[arg-type]
    gpu.pass_s(0.1)
    assert not gpu.latency.is_watching
    assert gpu.num_side_threads == 0
