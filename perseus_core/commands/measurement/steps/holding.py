"""Whether a clock that is locked is the clock that the GPU works at, and what its register tells meanwhile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from perseus_core.commands.measurement.bench import Bench, hold, own_clocks
from perseus_core.commands.measurement.load import busy
from perseus_core.commands.measurement.results import NotMeasured, Verdict, standing
from perseus_core.gpu.device import ThrottleReason
from perseus_core.gpu.slices import Slices
from perseus_core.runtime.patience import patiently

_NUM_CLOCKS = 7
_COUNT_EVERY_S = 0.01
_NEEDED = 5
# A clock is held if the GPU counts within this of it; so many MHz the register may tell otherwise.
_HELD, _REGISTER_MHZ = 0.03, 15


@dataclass(frozen=True)
class HeldClock:
    """One clock that was locked under load.

    Attributes:
        asked_mhz: it.
        counted_mhz: what the GPU counted (median).
        told_mhz: what the register told (median).
        share_held: of the slices that were counted at it, within 3 %.
        reasons: what the driver named as holding the clock down.
    """

    asked_mhz: int
    counted_mhz: float
    told_mhz: float
    share_held: float
    reasons: tuple[str, ...]

    @property
    def is_held(self) -> bool:
        """Nearly all the time."""
        return self.share_held >= 0.9


@dataclass(frozen=True)
class Holding:
    """Clocks from low to high, each locked for a while under load.

    Attributes:
        clocks: them.
    """

    clocks: tuple[HeldClock, ...]

    @property
    def verdict(self) -> Verdict:
        """A locked clock is taken for the clock in force, but for power and heat."""
        lost = [one for one in self.clocks if not one.is_held]
        lying = [
            one for one in self.clocks if abs(one.told_mhz - one.counted_mhz) > _REGISTER_MHZ + 0.01 * one.asked_mhz
        ]
        parts = [f"{len(self.clocks) - len(lost)} of {len(self.clocks)} clocks are held under load"]
        parts += [
            f"{one.asked_mhz} MHz is not: the GPU counts at {one.counted_mhz:.0f} MHz"
            + (f" ({', '.join(one.reasons)})" if one.reasons else "")
            for one in lost
        ]
        if lying:
            worst = max(lying, key=lambda one: abs(one.told_mhz - one.counted_mhz))
            parts.append(f"the register tells {worst.told_mhz:.0f} MHz where the GPU counts at {worst.counted_mhz:.0f}")
        parts.append("assumed: a lock holds, but for power and heat, and the register tells the clock")
        return Verdict(standing(as_assumed=not lost and not lying), "; ".join(parts))


def measure_holding(bench: Bench) -> Holding:
    """Locks clocks in turn while the GPU works, not in order, and has it count."""
    slices = bench.counting()
    clocks = bench.spread_clocks_mhz(_NUM_CLOCKS)
    # Neighbours in time are far from each other: a clock that is not obeyed leaves the one before, and shows.
    order = clocks[::2] + clocks[1::2][::-1]
    each_s = bench.step_s / len(clocks)
    counted: dict[int, list[float]] = {}
    told: dict[int, list[int]] = {}
    reasons: dict[int, ThrottleReason] = {}
    with own_clocks([bench.device]) as (clock,), busy(bench.load):
        for clock_mhz in order:
            hold(clock, clock_mhz)
            time.sleep(bench.settle_s)
            counted[clock_mhz], told[clock_mhz], reasons[clock_mhz] = _watch(bench, slices, each_s)
    cycles = _cycles(counted)
    return Holding(tuple(_held(one, counted[one], told[one], reasons[one], cycles) for one in clocks))


def _watch(bench: Bench, slices: Slices, duration_s: float) -> tuple[list[float], list[int], ThrottleReason]:
    """Durations of slices [s], the clocks that the register told [MHz], and all reasons."""
    bench.counting()
    told: list[int] = []
    reasons = ThrottleReason.NONE
    until_s = time.monotonic() + duration_s
    num_begun = 0
    while time.monotonic() < until_s or num_begun < _NEEDED:
        slices.begin()
        num_begun += 1
        told.append(patiently(bench.device.sm_clock_mhz))
        reasons |= patiently(bench.device.throttle_reasons)
        time.sleep(_COUNT_EVERY_S)
    time.sleep(_COUNT_EVERY_S)
    return [one.end_s - one.begin_s for one in slices.finished()], told, reasons


def _cycles(counted: dict[int, list[float]]) -> float:
    """How many cycles a slice counts: most clocks are obeyed, so the median over the clocks tells."""
    of_clocks = [clock_mhz * 1e6 * statistics.median(times_s) for clock_mhz, times_s in counted.items() if times_s]
    if len(of_clocks) < len(counted):
        raise NotMeasured("the GPU's counting could not be placed in time")
    return statistics.median(of_clocks)


def _held(
    asked_mhz: int, times_s: Sequence[float], told: Sequence[int], reasons: ThrottleReason, cycles: float
) -> HeldClock:
    counted_mhz = [cycles / time_s / 1e6 for time_s in times_s]
    names = (ThrottleReason.POWER_CAP, ThrottleReason.THERMAL, ThrottleReason.POWER_BRAKE, ThrottleReason.OTHER)
    return HeldClock(
        asked_mhz,
        statistics.median(counted_mhz),
        statistics.median(told),
        sum(abs(one / asked_mhz - 1) <= _HELD for one in counted_mhz) / len(counted_mhz),
        tuple(str(one.name).lower().replace("_", " ") for one in names if one in reasons),
    )
