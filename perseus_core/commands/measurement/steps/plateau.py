"""Where higher clocks are no faster, and whether a clock is the same from above as from below."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from perseus_core.commands.measurement.bench import Bench, hold, own_clocks
from perseus_core.commands.measurement.load import busy
from perseus_core.commands.measurement.results import Verdict, standing
from perseus_core.gpu.device import ThrottleReason
from perseus_core.gpu.errors import CallFailed
from perseus_core.runtime.clock.settable_clock import SettableClock

_NUM_CLOCKS = 8
_SHORTEST_S = 0.15
_LOOK_EVERY_S = 0.01
# Times within this are the same.
_SAME = 0.01


@dataclass(frozen=True)
class Plateau:
    """The same work at clocks from low to high, and back.

    Attributes:
        clocks_mhz: from low to high.
        rising_s, falling_s: what a pulse takes at each (median), on the way up and on the way down.
        plateau_from_mhz: at this clock it takes as long as at the highest, within 1 %.
        hysteresis: the largest difference between up and down, as a share.
        capped_from_mhz: from this clock on the driver names the power limit; 0 for nowhere.
    """

    clocks_mhz: tuple[int, ...]
    rising_s: tuple[float, ...]
    falling_s: tuple[float, ...]
    plateau_from_mhz: int
    hysteresis: float
    capped_from_mhz: int

    @property
    def verdict(self) -> Verdict:
        """A higher clock is taken to be faster, until the sweep has shown that it is not."""
        highest = self.clocks_mhz[-1]
        is_plateau = self.plateau_from_mhz < highest
        words = f"no clock below {highest} MHz is as fast"
        if is_plateau:
            words = f"{self.plateau_from_mhz} MHz are as fast as {highest}"
        capped = ""
        if self.capped_from_mhz:
            capped = f"; the power limit is named from {self.capped_from_mhz} MHz on"
        sentence = (
            f"{words}; from above and from below a clock differs by up to {100 * self.hysteresis:.1f} %{capped}; "
            f"assumed: higher clocks are faster, and the way to them does not matter ({100 * _SAME:g} %)"
        )
        return Verdict(standing(as_assumed=not is_plateau and self.hysteresis <= _SAME), sentence)


def measure_plateau(bench: Bench) -> Plateau:
    """Locks clocks from low to high and back while the GPU works."""
    clocks = bench.spread_clocks_mhz(_NUM_CLOCKS)
    each_s = max(_SHORTEST_S, bench.step_s / (2 * len(clocks)))
    capped: set[int] = set()
    with own_clocks([bench.device]) as (clock,):
        rising = [_time_at(bench, clock, one, each_s, capped) for one in clocks]
        falling = [_time_at(bench, clock, one, each_s, capped) for one in reversed(clocks)][::-1]
    fastest_s = min(rising[-1], falling[-1])
    both = list(zip(clocks, rising, falling, strict=True))
    return Plateau(
        tuple(clocks),
        tuple(rising),
        tuple(falling),
        min(one for one, up_s, down_s in both if (up_s + down_s) / 2 <= (1 + _SAME) * fastest_s or one == clocks[-1]),
        max(abs(down_s / up_s - 1) for _, up_s, down_s in both),
        min(capped, default=0),
    )


def _time_at(bench: Bench, clock: SettableClock, clock_mhz: int, duration_s: float, capped: set[int]) -> float:
    """The median time of a pulse [s], once the clock is in force."""
    hold(clock, clock_mhz)
    settled_s = time.monotonic() + bench.settle_s
    while time.monotonic() < settled_s:
        bench.load.pulse()
    with busy(bench.load) as pulses:
        while time.monotonic() < settled_s + duration_s or len(pulses) < 4:
            time.sleep(_LOOK_EVERY_S)
            try:
                if ThrottleReason.POWER_CAP in bench.device.throttle_reasons():
                    capped.add(clock_mhz)
            except CallFailed:
                continue
    return statistics.median(pulse.time_s for pulse in pulses)
