"""From durations to real clocks.

A point of the frontier asks for durations between real clocks. Rounding each to the next faster clock, then spending
the slack that frees, is nearly lossless at iteration times where nearly every instruction stands at a clock, and loses
up to several per cent where most stand midway. So a plan is made in three steps:

1. Rounding with slack reclamation: at the time asked for, and once for all along the frontier.
2. Time sharing: of the plans along the frontier the lower convex hull of energy over time is kept. Between two of its
   corners the first part of an iteration runs as one corner's plan says and the rest as the other's; time and energy
   then lie on the line between the two, but for the seam. That two neighbouring speeds in turn are the best stand-in
   for one between them is known of a single processor (Ishihara and Yasuura, ISLPED 1998); in a pipeline all stages
   have to change over together, or each waits for the other.
3. Iterated greedy search (Ruiz and Stützle, European Journal of Operational Research 177, 2007) on the best of these:
   make a few connected instructions faster, reclaim again, keep what is not worse. Its random numbers are always the
   same: equal input, equal plan.

The inner loops are in `native/rounding.c`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning import _native
from perseus_core.planning.dag import Dag
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import Problem

Choice = NDArray[np.int32]
"""int32 of shape (N,): for each instruction an index into the clocks of its tradeoff curve."""

Neighbours = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]]

# Trials of the search for each instruction: beyond, gaps shrink by less than a tenth when the trials double.
DEFAULT_EFFORT = 25
# However many instructions there are, so many trials at most: one or two seconds.
_MOST_TRIALS = 300_000
# Instructions of one window of the search: eight microbatches on eight stages, what changes together.
_WINDOW = 128
# However many instructions there are, so many are rounded along the frontier at most: about a second.
_MOST_ROUNDED = 2_000_000
# Durations come from integers 2**50 fine, positions are stored in 24 bits: this close to a knot is at the knot.
_AT_KNOT = 1e-6


@dataclass(frozen=True, eq=False)
class RoundedPlan:
    """A choice of real clocks with its time and energy.

    Attributes:
        choice: int32 of shape (N,), index into the clocks of each instruction's tradeoff curve.
        pipeline_time_s: length of the critical path.
        energy_j: energy of the iteration.
    """

    choice: Choice
    pipeline_time_s: float
    energy_j: float


@dataclass(frozen=True, eq=False)
class Rounder:
    """Finds real clocks for a point of the frontier. Made once for a problem, used for many points."""

    problem: Problem
    _corners: WeakKeyDictionary[Frontier[Problem], list[RoundedPlan]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    def choose(self, frontier: Frontier[Problem], iteration_time_s: float, *, effort: int = DEFAULT_EFFORT) -> Choice:
        """Clocks of little energy with which the iteration takes no longer than this.

        Args:
            frontier: the solved problem.
            iteration_time_s: the limit, time outside the pipeline included.
            effort: trials of the search for each instruction. None takes 1 to 3 ms (once for each frontier
                15 ms more), the default 10 ms at 192 instructions and 0.1 s at 1,536.

        Raises:
            InputError: if the iteration cannot be that fast.
        """
        # The fastest time of the frontier may differ from the sum of the shortest durations in the last bits.
        limit_s = max(iteration_time_s - self.problem.outside_time_s, self._fastest_pipeline_s)
        starts = [self.round_down(frontier.durations_s(iteration_time_s)), *self._time_shared(frontier, limit_s)]
        plans = [self._rounded(self.reclaim(start, limit_s)) for start in starts]
        best = min(plans, key=lambda plan: plan.energy_j)
        return self.search(best.choice, limit_s, effort) if effort else best.choice

    def round_down(self, durations_s: NDArray[np.float64]) -> Choice:
        """The slowest useful clock of each instruction that is not slower than its duration; of shape (..., N)."""
        sought_s = durations_s + (self._row_s + self._at_knot_s)[self.problem.curve_of]
        point = np.searchsorted(self._times_s + self._row_s[self._curve_of_point], sought_s, side="right") - 1
        choice: Choice = np.maximum(point - self._fastest_point, 0).astype(np.int32)
        return choice

    def reclaim(self, choice: Choice, limit_s: float) -> Choice:
        """Brings a choice within the limit if need be, then slows down what has slack, best saving per second first."""
        return self._improve(choice, limit_s, 0)

    def search(self, choice: Choice, limit_s: float, effort: int = DEFAULT_EFFORT) -> Choice:
        """Reclaims slack, then searches around the choice."""
        num_windows = max(1, 2 * self.problem.dag.num_instructions // _WINDOW)
        return self._improve(choice, limit_s, min(effort * _WINDOW // 2, _MOST_TRIALS // num_windows))

    def _improve(self, choice: Choice, limit_s: float, trials_per_window: int) -> Choice:
        start_s = self.problem.dag.start_times_s(self.durations_s(choice))
        points = _native.improve_plan(
            np.argsort(start_s, kind="stable").astype(np.int32),
            *self._predecessors,
            *self._successors,
            self.problem.curve_of,
            self._first_point,
            self._times_s,
            self._costs_j,
            self._fastest_point + choice,
            limit_s,
            _WINDOW,
            trials_per_window,
        )
        return np.frombuffer(points, np.int32) - self._fastest_point

    def durations_s(self, choice: Choice) -> NDArray[np.float64]:
        """Duration of each instruction."""
        times_s: NDArray[np.float64] = self._times_s[self._fastest_point + choice]
        return times_s

    def pipeline_time_s(self, choice: Choice) -> float:
        """Length of the critical path, without the time outside the pipeline."""
        return self.problem.dag.iteration_time_s(self.durations_s(choice))

    def energy_j(self, choice: Choice) -> float:
        """Energy of the iteration."""
        return self._rounded(choice).energy_j

    def _rounded(self, choice: Choice) -> RoundedPlan:
        pipeline_s = self.pipeline_time_s(choice)
        costs_j = self._costs_j[self._fastest_point + choice].sum()
        energy_j = self.problem.iteration_energy_j(costs_j, pipeline_s + self.problem.outside_time_s)
        return RoundedPlan(choice, pipeline_s, float(energy_j))

    def _time_shared(self, frontier: Frontier[Problem], limit_s: float) -> list[Choice]:
        """In time: the slower corner first and then the faster one, and the other way round."""
        corners = self._corners_of(frontier)
        after = int(np.searchsorted([corner.pipeline_time_s for corner in corners], limit_s, side="right"))
        if after == 0:
            return []
        if after == len(corners):
            return [corners[-1].choice]
        faster, slower = corners[after - 1], corners[after]
        middle = sum(
            (self.problem.dag.start_times_s(durations_s) + durations_s / 2) / plan.pipeline_time_s
            for plan, durations_s in ((p, self.durations_s(p.choice)) for p in (faster, slower))
        )
        order = np.argsort(middle, kind="stable")
        return [self._as_many_slower(faster, slower, o, limit_s) for o in (order, order[::-1])]

    def _as_many_slower(
        self, faster: RoundedPlan, slower: RoundedPlan, order: NDArray[np.int64], limit_s: float
    ) -> Choice:
        """Lets as many instructions, in this order, run as in the slower plan as the limit allows; by bisection."""

        def shared(num_slower: int) -> Choice:
            choice: Choice = faster.choice.copy()
            choice[order[:num_slower]] = slower.choice[order[:num_slower]]
            return choice

        in_time, late = 0, len(order)
        while late - in_time > 1:
            middle = (in_time + late) // 2
            if self.pipeline_time_s(shared(middle)) <= limit_s:
                in_time = middle
            else:
                late = middle
        return shared(in_time)

    def _corners_of(self, frontier: Frontier[Problem]) -> list[RoundedPlan]:
        """The lower convex hull, energy over time, of plans rounded along the frontier; fastest first."""
        if frontier not in self._corners:
            num_plans = max(2, _MOST_ROUNDED // self.problem.dag.num_instructions)
            vertices = range(0, len(frontier.stored), -(-len(frontier.stored) // num_plans))
            choices = self.round_down(self._stored_durations_s(frontier.positions[vertices]))
            plans = [self._rounded(self.reclaim(choice, self.pipeline_time_s(choice))) for choice in choices]
            self._corners[frontier] = _lower_hull(plans)
        return self._corners[frontier]

    def _stored_durations_s(self, positions: NDArray[np.float32]) -> NDArray[np.float64]:
        durations_s = np.empty(positions.shape)
        for i, curve in enumerate(self.problem.curves):
            members = self.problem.curve_of == i
            knots_s = np.asarray(curve.times_s)[curve.hull]
            durations_s[:, members] = np.interp(positions[:, members], np.arange(len(knots_s)), knots_s)
        return durations_s

    # The points of all curves stand in one row. These say where those of each curve are, and how far each curve's times
    # are shifted so that the row can be searched as one.

    @cached_property
    def _first_point(self) -> NDArray[np.int32]:
        return np.cumsum([0, *(len(c.times_s) for c in self.problem.curves)]).astype(np.int32)

    @cached_property
    def _fastest_point(self) -> NDArray[np.int32]:
        return self._first_point[self.problem.curve_of]

    @cached_property
    def _curve_of_point(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.problem.curves)), np.diff(self._first_point))

    @cached_property
    def _times_s(self) -> NDArray[np.float64]:
        return np.concatenate([c.times_s for c in self.problem.curves])

    @cached_property
    def _costs_j(self) -> NDArray[np.float64]:
        return np.concatenate([c.effective_energies_j for c in self.problem.curves])

    @cached_property
    def _row_s(self) -> NDArray[np.float64]:
        return np.linspace(0.0, 2.0 * float(self._times_s.max()) * len(self.problem.curves), len(self.problem.curves))

    @cached_property
    def _at_knot_s(self) -> NDArray[np.float64]:
        return np.array([_AT_KNOT * np.diff(c.times_s).min(initial=c.times_s[0]) for c in self.problem.curves])

    @cached_property
    def _fastest_pipeline_s(self) -> float:
        return self.problem.dag.iteration_time_s(self.problem.fastest_s)

    @cached_property
    def _predecessors(self) -> Neighbours:
        return neighbours(self.problem.dag.successor, self.problem.dag.predecessor, self.problem.dag)

    @cached_property
    def _successors(self) -> Neighbours:
        return neighbours(self.problem.dag.predecessor, self.problem.dag.successor, self.problem.dag)


def neighbours(of: NDArray[np.int32], others: NDArray[np.int32], dag: Dag) -> Neighbours:
    """Edges grouped by one of their ends: where each group begins, of shape (N + 1,); the other ends; latencies."""
    by_end = np.argsort(of, kind="stable")
    first = np.searchsorted(of[by_end], np.arange(dag.num_instructions + 1)).astype(np.int32)
    return first, others[by_end], dag.latency_s[by_end]


def _lower_hull(plans: list[RoundedPlan]) -> list[RoundedPlan]:
    """The corners of the falling lower convex hull, fastest first."""
    corners: list[RoundedPlan] = []
    for plan in sorted(plans, key=lambda p: (p.pipeline_time_s, p.energy_j)):
        if corners and plan.energy_j >= corners[-1].energy_j:
            continue
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            falls = (b.energy_j - a.energy_j) * (plan.pipeline_time_s - b.pipeline_time_s)
            if falls < (plan.energy_j - b.energy_j) * (b.pipeline_time_s - a.pipeline_time_s):
                break
            corners.pop()
        corners.append(plan)
    return corners
