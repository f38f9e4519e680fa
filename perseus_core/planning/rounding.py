"""From durations to real clocks: round, then spend the slack that rounding freed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning import _native
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import Problem

# Durations come from integers 2**50 fine, positions are stored in 24 bits: this close to a knot is at the knot.
_AT_KNOT = 1e-6
# Sums in another order may differ by some ulps; the limit is held with this much to spare.
_TIME_MARGIN = 1e-12


@dataclass(frozen=True, eq=False)
class Rounder:
    """Finds real clocks for a point of the frontier. Made once for a problem, used for many points.

    Choices are int32 arrays of shape (N,): for each instruction an index into the clocks of its tradeoff curve.
    """

    problem: Problem

    def choose(self, frontier: Frontier[Problem], iteration_time_s: float, num_candidates: int = 32) -> NDArray[np.int32]:
        """Clocks of little energy with which the iteration takes no longer than this.

        Rounding to the next faster clock shortens the iteration, so the best start is a point of the frontier that is a little
        slower than allowed. Several are tried: each is rounded, and if it is in time, its slack is spent.
        """
        limit_s = iteration_time_s - self.problem.outside_time_s
        first_s = min(iteration_time_s, frontier.min_energy_time_s)
        last_s = self._slowest_start_s(frontier, first_s, limit_s)
        starts = [self.round_down(frontier.durations_s(t)) for t in np.linspace(first_s, last_s, num_candidates)]
        choices = [self.reclaim(choice, limit_s) for choice in starts]
        return min(choices, key=self.energy_j)

    def _slowest_start_s(self, frontier: Frontier[Problem], first_s: float, limit_s: float) -> float:
        """By bisection: how slow a point of the frontier may be and still be in time once it is rounded."""
        low_s, high_s = first_s, frontier.min_energy_time_s
        for _ in range(12):
            middle_s = (low_s + high_s) / 2
            if self.pipeline_time_s(self.round_down(frontier.durations_s(middle_s))) <= limit_s * (1 - _TIME_MARGIN):
                low_s = middle_s
            else:
                high_s = middle_s
        return low_s

    def round_down(self, durations_s: NDArray[np.float64]) -> NDArray[np.int32]:
        """The slowest useful clock of each instruction that is not slower than its duration."""
        choice = np.empty(len(durations_s), np.int32)
        for i, curve in enumerate(self.problem.curves):
            members = self.problem.curve_of == i
            times_s = np.asarray(curve.times_s)
            tolerance_s = _AT_KNOT * np.diff(times_s).min(initial=times_s[0])
            choice[members] = np.searchsorted(times_s, durations_s[members] + tolerance_s, side="right") - 1
        return np.maximum(choice, 0)

    def reclaim(self, choice: NDArray[np.int32], limit_s: float) -> NDArray[np.int32]:
        """Slows instructions down while the longest path stays within the limit, best saving per second first."""
        dag, durations_s = self.problem.dag, self.durations_s(choice)
        start_s = dag.start_times_s(durations_s)
        tail_s = -dag.latest_start_times_s(durations_s, 0.0) - durations_s
        point = (self._first_point[self.problem.curve_of] + choice).astype(np.int32)
        new_point = np.frombuffer(
            _native.reclaim_slack(
                *self._neighbours(dag.successor, dag.predecessor),
                *self._neighbours(dag.predecessor, dag.successor),
                self.problem.curve_of,
                self._first_point,
                self._times_s,
                self._costs_j,
                point,
                start_s,
                tail_s,
                limit_s * (1 - _TIME_MARGIN),
            ),
            np.int32,
        )
        return new_point - self._first_point[self.problem.curve_of]

    def durations_s(self, choice: NDArray[np.int32]) -> NDArray[np.float64]:
        """Duration of each instruction."""
        return self._times_s[self._first_point[self.problem.curve_of] + choice]

    def pipeline_time_s(self, choice: NDArray[np.int32]) -> float:
        """Length of the critical path, without the time outside the pipeline."""
        return self.problem.dag.iteration_time_s(self.durations_s(choice))

    def energy_j(self, choice: NDArray[np.int32]) -> float:
        """Energy of the iteration."""
        costs_j = self._costs_j[self._first_point[self.problem.curve_of] + choice].sum()
        iteration_s = self.pipeline_time_s(choice) + self.problem.outside_time_s
        return float(self.problem.iteration_energy_j(costs_j, iteration_s))

    @cached_property
    def _first_point(self) -> NDArray[np.int32]:
        return np.cumsum([0, *(len(c.times_s) for c in self.problem.curves)]).astype(np.int32)

    @cached_property
    def _times_s(self) -> NDArray[np.float64]:
        return np.concatenate([c.times_s for c in self.problem.curves])

    @cached_property
    def _costs_j(self) -> NDArray[np.float64]:
        return np.concatenate([c.effective_energies_j for c in self.problem.curves])

    def _neighbours(
        self, of: NDArray[np.int32], neighbour: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]]:
        """Edges grouped by one of their ends: where each group begins, the other ends, the latencies."""
        by_end = np.argsort(of, kind="stable")
        first = np.searchsorted(of[by_end], np.arange(self.problem.dag.num_instructions + 1)).astype(np.int32)
        return first, neighbour[by_end], self.problem.dag.latency_s[by_end]
