"""Policies: the rules that pick a point of the frontier. Each is one small function.

A job compares itself with its baseline: all clocks at maximum, what it would do without us.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseus_core.errors import InputError
from perseus_core.planning.frontier import Frontier

AnyFrontier = Frontier[Any]
Policy = Callable[[AnyFrontier, float], float]
"""From a frontier and the baseline's iteration time [s] to the iteration time [s] that a plan must keep."""


def no_slowdown(frontier: AnyFrontier, baseline_time_s: float) -> float:
    """Least energy in no more time than the baseline takes. The default.

    On power-capped GPUs the baseline is not the fastest point: their highest clocks are not the fastest.
    """
    return at_most(frontier, baseline_time_s)


def fastest(frontier: AnyFrontier, baseline_time_s: float) -> float:
    """The shortest iteration there is, at the least energy it can have."""
    del baseline_time_s
    return frontier.fastest_time_s


def max_slowdown(slowdown: float) -> Policy:
    """Least energy in at most `slowdown` more time than the baseline, as a share: 0.05 means 5 %.

    Raises:
        InputError: if slowdown is not in [0, 1).
    """
    if not 0 <= slowdown < 1:
        raise InputError(f"max_slowdown {slowdown} is not in [0, 1); 0.05 means 5 %")
    return lambda frontier, baseline_time_s: at_most(frontier, baseline_time_s * (1 + slowdown))


def straggler(slowdown: float) -> Policy:
    """The point at min(T', T*) when another pipeline takes T' = slowdown * baseline (paper, section 3.2).

    Raises:
        InputError: if slowdown is below 1.
    """
    if not (math.isfinite(slowdown) and slowdown >= 1):
        raise InputError(
            f"straggler slowdown {slowdown} is below 1; 1.2 means that the slowest pipeline takes 20 % longer"
        )
    return lambda frontier, baseline_time_s: at_most(frontier, baseline_time_s * slowdown)


def iteration_time(time_s: float) -> Policy:
    """Least energy in at most this time.

    Raises:
        InputError: if the time is not positive, or (when applied) faster than the fastest point.
    """
    if not (math.isfinite(time_s) and time_s > 0):
        raise InputError(f"iteration time {time_s} s must be a finite number above 0")
    return lambda frontier, baseline_time_s: at_most(frontier, time_s)


def zeus_cost(eta: float, max_power_w: float) -> Policy:
    """Least eta * E + (1 - eta) * P_max * T (Zeus, You et al., NSDI 2023, equation 2).

    Args:
        eta: weight of energy against time, 0 (fastest) to 1 (least energy).
        max_power_w: P_max, highest power of all GPUs of the pipeline together.

    Raises:
        InputError: if eta is not in [0, 1] or the power not positive.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta {eta} is not in [0, 1]; 1 counts only energy, 0 only time")
    _require_positive_power(max_power_w)

    def pick(frontier: AnyFrontier, baseline_time_s: float) -> float:
        del baseline_time_s
        return _argmin(frontier, eta * frontier.energies_j + (1 - eta) * max_power_w * frontier.times_s)

    return pick


def carbon_cost(
    eta: float, max_power_w: float, intensity_g_per_kwh: float, reference_intensity_g_per_kwh: float
) -> Policy:
    """Zeus's cost with energy weighed by the grid's carbon intensity (Chase, Yang et al., 2023).

    Dirtier electricity than the reference makes energy count for more, cleaner for less.

    Args:
        eta: weight of energy against time at the reference intensity, 0 to 1.
        max_power_w: P_max, highest power of all GPUs of the pipeline together.
        intensity_g_per_kwh: carbon intensity now.
        reference_intensity_g_per_kwh: the intensity at which the cost is Zeus's own.

    Raises:
        InputError: if eta is not in [0, 1], a power or the reference is not positive, or the intensity negative.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta {eta} is not in [0, 1]; 1 counts only energy, 0 only time")
    _require_positive_power(max_power_w)
    if not (math.isfinite(intensity_g_per_kwh) and intensity_g_per_kwh >= 0):
        raise InputError(f"carbon intensity {intensity_g_per_kwh} g/kWh must be a finite number, 0 or more")
    if not (math.isfinite(reference_intensity_g_per_kwh) and reference_intensity_g_per_kwh > 0):
        raise InputError(f"reference intensity {reference_intensity_g_per_kwh} g/kWh must be a finite number above 0")
    weight = eta * intensity_g_per_kwh / reference_intensity_g_per_kwh

    def pick(frontier: AnyFrontier, baseline_time_s: float) -> float:
        del baseline_time_s
        return _argmin(frontier, weight * frontier.energies_j + (1 - eta) * max_power_w * frontier.times_s)

    return pick


def power_cap(power_w: float) -> Policy:
    """The fastest point whose average power stays within the cap, all GPUs of the pipeline together.

    Raises:
        InputError: if the cap is not positive, or (when applied) below what even the minimum-energy point draws.
    """
    _require_positive_power(power_w)

    def pick(frontier: AnyFrontier, baseline_time_s: float) -> float:
        del baseline_time_s
        return _fastest_within(frontier, power_w)

    return pick


def at_most(frontier: AnyFrontier, time_s: float) -> float:
    """The point of least energy within a time: min(time, T*).

    Raises:
        InputError: if the time is faster than the fastest point by more than rounding.
    """
    if time_s < frontier.fastest_time_s * (1 - 1e-9):
        raise InputError(
            f"iteration time {time_s:.6g} s cannot be reached; the fastest is {frontier.fastest_time_s:.6g} s"
        )
    return min(time_s, frontier.min_energy_time_s)


def _argmin(frontier: AnyFrontier, cost: NDArray[np.float64]) -> float:
    # A linear cost over a convex polyline is least at a vertex.
    return float(frontier.times_s[int(np.argmin(cost))])


def _fastest_within(frontier: AnyFrontier, power_w: float) -> float:
    times_s, energies_j = frontier.times_s, frontier.energies_j
    within = energies_j <= power_w * times_s
    if not within.any():
        least_w = energies_j[-1] / times_s[-1]
        raise InputError(
            f"power cap {power_w} W is below the {least_w:.1f} W of the minimum-energy point; allow that much"
        )
    v = int(np.argmax(within))
    if v == 0:
        return float(times_s[0])
    # On the segment before, energy and power_w * time are lines that cross.
    over_before = energies_j[v - 1] - power_w * times_s[v - 1]
    over_after = energies_j[v] - power_w * times_s[v]
    share = over_before / (over_before - over_after)
    return float(times_s[v - 1] + share * (times_s[v] - times_s[v - 1]))


def _require_positive_power(power_w: float) -> None:
    if not (math.isfinite(power_w) and power_w > 0):
        raise InputError(f"power {power_w} W must be a finite number above 0")
