"""How fast the GPU works while its clock is the driver's: before any was locked, and after all were given back."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from perseus_core.commands.measurement.bench import Bench
from perseus_core.commands.measurement.load import busy
from perseus_core.commands.measurement.results import NotMeasured, Verdict, ms, standing
from perseus_core.runtime.patience import patiently

_SHORTEST_S = 0.3
_SAME = 0.03


@dataclass(frozen=True)
class Unlocked:
    """The load without a lock.

    Attributes:
        pulse_s: what a pulse takes (median).
        clock_mhz: what the register tells meanwhile (median).
    """

    pulse_s: float
    clock_mhz: float

    @property
    def verdict(self) -> Verdict:
        """There is nothing to hold it against."""
        sentence = f"a pulse of load takes {ms(self.pulse_s)}, at {self.clock_mhz:.0f} MHz as the register tells"
        return Verdict(standing(as_assumed=True), f"{sentence}; assumed: the same when clocks are given back")


@dataclass(frozen=True)
class AsBefore:
    """The same after all steps.

    Attributes:
        pulse_s: what a pulse takes now (median).
        before_s: what it took before any clock was locked.
    """

    pulse_s: float
    before_s: float

    @property
    def verdict(self) -> Verdict:
        """Clocks that are given back are the driver's."""
        change = self.pulse_s / self.before_s - 1
        sentence = f"a pulse of load takes {ms(self.pulse_s)}, {100 * change:+.1f} % of what it took before any lock"
        remedy = "" if abs(change) <= _SAME else "; if no heat explains it, run `sudo nvidia-smi -rgc`"
        return Verdict(
            standing(as_assumed=abs(change) <= _SAME), f"{sentence}; assumed: within {100 * _SAME:g} %{remedy}"
        )


def measure_unlocked(bench: Bench) -> Unlocked:
    """Before any clock is locked."""
    clocks_mhz = []
    with busy(bench.load) as pulses:
        time.sleep(bench.settle_s)
        first = len(pulses)
        until_s = time.monotonic() + max(_SHORTEST_S, bench.step_s / 8)
        while time.monotonic() < until_s or len(pulses) < first + 4:
            clocks_mhz.append(patiently(bench.device.sm_clock_mhz))
            time.sleep(0.01)
    return Unlocked(statistics.median(pulse.time_s for pulse in pulses[first:]), statistics.median(clocks_mhz))


def measure_as_before(bench: Bench) -> AsBefore:
    """After all clocks were given back."""
    before = bench.known.get("unlocked")
    if not before:
        raise NotMeasured("it is not known how fast the GPU was before")
    return AsBefore(measure_unlocked(bench).pulse_s, before["pulse_s"])
