"""Iterations under a plan beside iterations without one of the same minutes: what a plan really costs and saves.

A job drifts: heat, data, a busy machine. So what ran before and after a short interlude without a plan is compared with
the interlude, one interlude at a time, and the comparisons are put together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Beyond this many times the usual an iteration was disturbed, as when its process was stopped for a minute.
_DISTURBED = 1.5
_Z = 1.959964  # of 95 %
# Of fewer degrees of freedom nothing is said.
_LEAST_FREEDOM = 3


@dataclass(frozen=True)
class Interval:
    """What a number is, and between what it lies with a confidence of 95 %."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        """As percent of change, beside a share of 1."""
        low, middle, high = (100 * (each - 1) for each in (self.low, self.middle, self.high))
        return f"{middle:+.2f} % ({low:+.2f} to {high:+.2f})"


Pair = tuple[Sequence[float], Sequence[float]]
"""Something measured of some iterations, all above 0: under a plan, and without one next to them."""


def ratio(pairs: Sequence[Pair]) -> Interval | None:
    """How much is under a plan of what it is without; None while too little is known.

    The mean of the differences of logarithms of each pair; its error from how much iterations of the same kind differ
    within each pair, or from how much pairs differ if that is more. Student's t (Welch's correction is not made: both
    kinds of iterations are executed by the same GPUs).
    """
    kept = [(_undisturbed(p), _undisturbed(u)) for p, u in pairs if p and u]
    freedom = sum(len(p) + len(u) - 2 for p, u in kept)
    if freedom < _LEAST_FREEDOM:
        return None
    logs = [([math.log(x) for x in p], [math.log(x) for x in u]) for p, u in kept]
    differences = [statistics.fmean(p) - statistics.fmean(u) for p, u in logs]
    squares = sum((x - statistics.fmean(part)) ** 2 for pair in logs for part in pair for x in part)
    error = math.sqrt(squares / freedom * sum(1 / len(p) + 1 / len(u) for p, u in kept)) / len(kept)
    margin = _student_t(freedom) * error
    if len(kept) > _LEAST_FREEDOM:
        between = statistics.stdev(differences) / math.sqrt(len(kept))
        margin = max(margin, _student_t(len(kept) - 1) * between)
    middle = statistics.fmean(differences)
    return Interval(math.exp(middle - margin), math.exp(middle), math.exp(middle + margin))


def _undisturbed(values: Sequence[float]) -> list[float]:
    """Of one kind: what a plan saves, or costs, is no disturbance."""
    most = _DISTURBED * statistics.median_low(values)
    return [x for x in values if x <= most]


def _student_t(freedom: int) -> float:
    """The two-sided 95 % quantile (Abramowitz and Stegun 26.7.5), right to a per cent from 3 on."""
    z, n = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
