"""Judges a plan by what is measured under it: the promise is kept by measurement, not by hope."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from perseus_core.runtime.ranks.plan_summary import PlanSummary


@dataclass(frozen=True)
class Verdict:
    """What some iterations in a row have shown.

    Attributes:
        iterations: which.
        time_s: median time of one.
        is_slow: it took longer than allowed by more than the tolerance, and so did the iterations judged before.
    """

    iterations: tuple[int, ...]
    time_s: float
    is_slow: bool


@dataclass
class PlanWatch:
    """Collects the times of iterations under one plan and judges every `window` of them.

    Attributes:
        plan: which plan.
        window: iterations for a verdict.
        tolerance: share by which the median may be above the limit.
        from_iteration: the first iteration that counts.
        num_verdicts: how many verdicts there were.
    """

    plan: PlanSummary
    window: int
    tolerance: float
    from_iteration: int
    num_verdicts: int = 0
    _was_over: bool = False
    _times_s: dict[int, float] = field(default_factory=dict)

    def note(self, iteration: int, time_s: float) -> Verdict | None:
        """Takes in one iteration."""
        if iteration < self.from_iteration:
            return None
        self._times_s[iteration] = time_s
        if len(self._times_s) < self.window:
            return None
        median_s = statistics.median(self._times_s.values())
        is_over = median_s > self.plan.limit_time_s * (1 + self.tolerance)
        # Once may be a disturbance from outside, which no other plan would help against.
        verdict = Verdict(tuple(self._times_s), median_s, is_over and self._was_over)
        self._was_over = is_over
        self._times_s.clear()
        self.num_verdicts += 1
        return verdict
