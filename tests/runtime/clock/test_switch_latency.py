"""How long a change takes, on a clock and in a time that the test moves."""

from __future__ import annotations

import pytest

from perseus_core.runtime.clock.switch_latency import LOOK_EVERY_S, SwitchLatency


class SlowClock:
    """A clock whose changes show after some time. Only what `SwitchLatency` uses of a `SettableClock`."""

    def __init__(self, latency_s: float) -> None:
        self.now_s = 100.0
        self.latency_s = latency_s
        self._changes = [(0.0, 1410)]

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
