"""The power of a GPU that waits in a receive, beside that of one that works."""

from __future__ import annotations

import statistics
import time
from contextlib import suppress
from dataclasses import dataclass

from perseus_core.commands.measurement.bench import Bench
from perseus_core.commands.measurement.load import busy
from perseus_core.commands.measurement.results import NotMeasured, Verdict, standing
from perseus_core.gpu.errors import CallFailed

_READ_EVERY_S = 0.01
# Readings may be averages over a second.
_SETTLE_S, _LONGEST_S = 1.1, 0.8
# Where little is known of a job, waiting is taken to draw this share of what instructions draw (measure/energy.py).
_SHARE, _SHARE_STD = 0.3, 0.3


@dataclass(frozen=True)
class WaitingPower:
    """Powers at the clock that the driver chooses.

    Attributes:
        waiting_w: in a receive.
        loaded_w: under load.
    """

    waiting_w: float
    loaded_w: float

    @property
    def verdict(self) -> Verdict:
        """Waiting is cheap, or nothing could be saved by less of it."""
        share = self.waiting_w / self.loaded_w
        sentence = (
            f"{self.waiting_w:.0f} W waiting, {self.loaded_w:.0f} W under load, a share of {share:.2f}; assumed until "
            f"measured: {_SHARE:g} +- {_SHARE_STD:g}"
        )
        return Verdict(standing(as_assumed=abs(share - _SHARE) <= _SHARE_STD), sentence)


def measure_waiting_power(bench: Bench) -> WaitingPower:
    """Reads the power while the GPU waits, and while it works."""
    each_s = min(_LONGEST_S, bench.step_s / 4)
    with bench.load.waiting():
        waiting_w = _power_w(bench, each_s)
    with busy(bench.load):
        loaded_w = _power_w(bench, each_s)
    return WaitingPower(waiting_w, loaded_w)


def _power_w(bench: Bench, duration_s: float) -> float:
    time.sleep(min(_SETTLE_S, 2 * duration_s))
    readings_w: list[float] = []
    until_s = time.monotonic() + duration_s
    while time.monotonic() < until_s:
        with suppress(CallFailed):
            readings_w.append(bench.device.power_w())
        time.sleep(_READ_EVERY_S)
    if not readings_w:
        raise NotMeasured("the power could not be read")
    return statistics.mean(readings_w)
