"""Tradeoff curves: what an instruction costs beyond waiting, over how long it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from perseus_core.errors import InputError
from perseus_core.planning.profile import Measurement

# Times that differ by no more than this share are rounding errors of the same time.
_SAME_TIME = 1e-12


@dataclass(frozen=True)
class TradeoffCurve:
    """The useful clocks of one instruction type, fastest first.

    Effective energy is energy - blocking power * time: what is spent beyond what waiting that long would have cost. A
    clock that is no faster than another and costs no less effective energy is not useful and not here.

    Attributes:
        clocks_mhz: real clocks.
        times_s: strictly ascending.
        energies_j: energy of one GPU of the stage.
        blocking_power_w: power of that GPU while it waits.

    Raises:
        InputError: if the columns differ in length, are empty, or do not trade time for effective energy.
    """

    clocks_mhz: tuple[int, ...]
    times_s: tuple[float, ...]
    energies_j: tuple[float, ...]
    blocking_power_w: float

    def __post_init__(self) -> None:
        if not len(self.clocks_mhz) == len(self.times_s) == len(self.energies_j) > 0:
            raise InputError(
                f"tradeoff curve has {len(self.clocks_mhz)} clocks, {len(self.times_s)} times and "
                f"{len(self.energies_j)} energies; it needs as many of each, one at least"
            )
        if not (np.isfinite(self.times_s).all() and np.isfinite(self.energies_j).all() and min(self.times_s) > 0):
            raise InputError("tradeoff curve holds a time or energy that is not a finite number, or a time not above 0")
        if not ((np.diff(self.times_s) > 0).all() and (np.diff(self.effective_energies_j) < 0).all()):
            raise InputError("tradeoff curve is not sorted: times must rise and effective energies must fall")

    @cached_property
    def effective_energies_j(self) -> NDArray[np.float64]:
        """Energy beyond waiting, strictly falling."""
        return np.asarray(self.energies_j) - self.blocking_power_w * np.asarray(self.times_s)

    @cached_property
    def hull(self) -> NDArray[np.int64]:
        """Indices of the clocks on the lower convex hull: the knots that the solver sees."""
        times, costs = self.times_s, self.effective_energies_j
        knots: list[int] = []
        for i in range(len(times)):
            while len(knots) > 1:
                a, b = knots[-2], knots[-1]
                if (costs[b] - costs[a]) * (times[i] - times[b]) < (costs[i] - costs[b]) * (times[b] - times[a]):
                    break
                knots.pop()
            knots.append(i)
        return np.array(knots)

    def effective_energy_j(self, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Effective energy on the convex hull; beyond the slowest clock it stays, as waiting costs nothing more."""
        return np.interp(times_s, np.asarray(self.times_s)[self.hull], self.effective_energies_j[self.hull])


def tradeoff_curve(measurements: Iterable[Measurement], blocking_power_w: float) -> TradeoffCurve:
    """The tradeoff curve of one instruction type: its measurements without the clocks that are not useful."""
    # On the plateau of a power cap clocks are equal: the lowest is the one that the GPU holds.
    points = sorted(measurements, key=lambda m: (m.time_s, m.energy_j, m.clock_mhz))
    useful: list[Measurement] = []
    least = float("inf")
    for m in points:
        cost = m.energy_j - blocking_power_w * m.time_s
        if cost < least:
            if useful and m.time_s <= useful[-1].time_s * (1 + _SAME_TIME):
                useful.pop()
            useful.append(m)
            least = cost
    return TradeoffCurve(
        tuple(m.clock_mhz for m in useful),
        tuple(m.time_s for m in useful),
        tuple(m.energy_j for m in useful),
        blocking_power_w,
    )
