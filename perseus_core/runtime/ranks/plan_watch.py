"""Judges a plan by what is measured under it: the promise is kept by measurement, not by hope."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from perseus_core.runtime.ranks.comparison import Interval, ratio
from perseus_core.runtime.ranks.plan_summary import PlanSummary

# So many interludes are remembered: what was long ago says nothing of now.
_REMEMBERED = 8


@dataclass(frozen=True)
class Verdict:
    """What some iterations in a row have shown.

    Attributes:
        iterations: which.
        time_s: median time of one.
    """

    iterations: tuple[int, ...]
    time_s: float


@dataclass(frozen=True)
class Interlude:
    """A few iterations without the plan, and those under it next to them.

    Attributes:
        planned: iterations right before it, and, once they are known, right after it.
        unplanned: its iterations.
    """

    planned: tuple[int, ...]
    unplanned: tuple[int, ...]


@dataclass
class PlanWatch:
    """Collects the times of iterations under one plan and beside it.

    Attributes:
        plan: which plan.
        window: iterations for a verdict.
        from_iteration: the first iteration that counts.
        num_verdicts: how many verdicts there were.
        newest_planned: the last so many iterations under the plan.
        interludes: the last ones.
    """

    plan: PlanSummary
    window: int
    from_iteration: int
    num_verdicts: int = 0
    newest_planned: deque[int] = field(init=False)
    interludes: deque[Interlude] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _times_s: dict[int, float] = field(default_factory=dict)
    _since_interlude: list[int] | None = None

    def __post_init__(self) -> None:
        self.newest_planned = deque(maxlen=self.window)

    @property
    def allowed(self) -> float:
        """How long an iteration may take, as a share of one without a plan."""
        return self.plan.limit_time_s / self.plan.baseline_time_s

    @property
    def compared(self) -> frozenset[int]:
        """The iterations of its interludes, and those next to them."""
        return frozenset(i for each in self.interludes for part in (each.planned, each.unplanned) for i in part)

    def note(self, iteration: int, time_s: float) -> Verdict | None:
        """Takes in one iteration under the plan."""
        if iteration < self.from_iteration:
            return None
        self.newest_planned.append(iteration)
        self._complete_interlude(iteration)
        self._times_s[iteration] = time_s
        if len(self._times_s) < self.window:
            return None
        verdict = Verdict(tuple(self._times_s), statistics.median(self._times_s.values()))
        self._times_s.clear()
        self.num_verdicts += 1
        return verdict

    def end_interlude(self, unplanned: Sequence[int], next_iteration: int) -> None:
        """An interlude was measured; the plan runs again, and counts from this iteration on."""
        self.interludes.append(Interlude(tuple(self.newest_planned), tuple(unplanned)))
        self._since_interlude = []
        self._times_s.clear()
        self.from_iteration = next_iteration

    def pass_over_interlude(self, next_iteration: int) -> None:
        """Nothing in it can be compared; the next one comes after as many iterations under the plan as the first."""
        self.newest_planned.clear()
        self.from_iteration = next_iteration

    def compare(self, values: Mapping[int, float]) -> Interval | None:
        """How much of something iterations take under the plan, as a share of what they take without.

        Args:
            values: by iteration, as far as known; above 0.
        """

        return self._compared(self.interludes, values)

    def _compared(self, interludes: Iterable[Interlude], values: Mapping[int, float]) -> Interval | None:
        def known(iterations: Sequence[int]) -> list[float]:
            return [values[i] for i in iterations if i in values]

        return ratio([(known(each.planned), known(each.unplanned)) for each in interludes])

    def forget_what_is_over(self, times_s: Mapping[int, float]) -> None:
        """Keeps only the newest interlude where it shows that the plan costs another time than it did before.

        Args:
            times_s: of iterations.
        """
        *older, newest = self.interludes
        now, before = self._compared([newest], times_s), self._compared(older, times_s)
        if now is not None and before is not None and (now.low > before.high or now.high < before.low):
            self.interludes = deque([newest], self.interludes.maxlen)

    def _complete_interlude(self, iteration: int) -> None:
        if self._since_interlude is None:
            return
        self._since_interlude.append(iteration)
        if len(self._since_interlude) == self.window:
            last = self.interludes.pop()
            self.interludes.append(Interlude((*last.planned, *self._since_interlude), last.unplanned))
            self._since_interlude = None
