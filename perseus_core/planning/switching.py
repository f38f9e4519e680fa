"""Clocks for a point of the frontier, when changing a clock takes time.

Changing a clock takes 10 to 20 ms, during which the GPU runs on at the old one. A plan made as if changes were free is
late where it goes from a slow clock to a fast one, and changes clocks where that costs more than it saves. So what a
plan promises is what happens when changes take their time (`execute_with_switching`). It is made in three steps: round
the slowest point of the frontier that is then in time; where even the fastest is late, make instructions faster or
spare them their change, least cost per second first; then let instructions and runs of equal clocks take the clock
of their neighbours, or the next useful one, as long as that saves energy and stays in time.

The inner loops are in `native/switching.c`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning import _native
from perseus_core.planning.baselines import all_max
from perseus_core.planning.execution import Execution, execute, executed
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.rounding import DEFAULT_EFFORT, Neighbours, Rounder, neighbours

# However many instructions there are, so many are run in trials at most: one or two seconds.
_MOST_RUN = 50_000_000
_NUM_BISECTIONS = 8
_NONE = -1

ClocksMhz = NDArray[np.int64]


def choose_clocks(
    problem: PipelineProblem,
    frontier: Frontier[PipelineProblem],
    iteration_time_s: float,
    *,
    switch_latency_s: float = 0.0,
    effort: int = DEFAULT_EFFORT,
) -> Execution:
    """Clocks of little energy with which the iteration takes no longer than this.

    Args:
        problem: the pipeline.
        frontier: its frontier.
        iteration_time_s: the limit. When changes take time, one faster than all clocks at maximum may be out of reach;
            then the fastest found is returned, and its time says so.
        switch_latency_s: how long a change of clock takes. Without it, every clock is a useful one of its instruction's
            tradeoff curve; with it, any measured one, where that saves a change.
        effort: trials of the search for each instruction, see `Rounder.choose`.

    Returns:
        What really happens when the plan runs, iteration after iteration.

    Raises:
        InputError: if the iteration cannot be that fast even without latency.
    """
    rounder = Rounder(problem)
    if switch_latency_s == 0:
        return execute(problem, _clocks_mhz(problem, rounder.choose(frontier, iteration_time_s, effort=effort)))
    switching = _Switching(problem, switch_latency_s)
    start_mhz = _nearly_in_time(switching, rounder, frontier, iteration_time_s)
    chosen = switching.improve(start_mhz, iteration_time_s, effort)
    if chosen.iteration_time_s <= iteration_time_s:
        return chosen
    # One clock for all needs no change.
    steady = switching.improve(all_max(problem).clocks_mhz, iteration_time_s, effort)
    return min(chosen, steady, key=lambda e: e.iteration_time_s)


def execute_with_switching(problem: PipelineProblem, clocks_mhz: ClocksMhz, switch_latency_s: float) -> Execution:
    """What really happens when every instruction is asked to run at its clock and changes take time.

    The clock for an instruction is asked for when the one before it on its stage ends, and is in force a latency later;
    so idle time before an instruction hides a change. Until then the instruction progresses at the speed of the old
    clock and draws its power. Another change asked for in the meantime replaces the one under way. The first
    instruction of a stage follows the last one of the iteration before, with the time outside the pipeline in between.

    Args:
        problem: the pipeline.
        clocks_mhz: of shape (N,), any clocks of the profile. Time and energy of an instruction at a clock where it was
            not measured are interpolated between the clocks where it was.
        switch_latency_s: how long a change takes.
    """
    return _Switching(problem, switch_latency_s).execute(clocks_mhz)


def _nearly_in_time(
    switching: _Switching, rounder: Rounder, frontier: Frontier[PipelineProblem], limit_s: float
) -> ClocksMhz:
    """The slowest point of the frontier, by bisection, whose rounded plan keeps the limit in spite of its changes."""

    def rounded(planned_s: float) -> ClocksMhz:
        return _clocks_mhz(switching.problem, rounder.choose(frontier, planned_s, effort=0))

    def in_time(clocks_mhz: ClocksMhz) -> bool:
        return switching.execute(clocks_mhz).iteration_time_s <= limit_s

    early_s, late_s = frontier.fastest_time_s, min(limit_s, frontier.min_energy_time_s)
    slowest = rounded(late_s)
    if in_time(slowest):
        return slowest
    best = rounded(early_s)
    for _ in range(_NUM_BISECTIONS):
        middle_s = (early_s + late_s) / 2
        clocks_mhz = rounded(middle_s)
        if in_time(clocks_mhz):
            early_s, best = middle_s, clocks_mhz
        else:
            late_s = middle_s
    return best


def _clocks_mhz(problem: PipelineProblem, choice: NDArray[np.int32]) -> ClocksMhz:
    clocks_mhz = np.empty(len(choice), np.int64)
    for i, curve in enumerate(problem.curves):
        members = problem.curve_of == i
        clocks_mhz[members] = np.array(curve.clocks_mhz)[choice[members]]
    return clocks_mhz


@dataclass(frozen=True, eq=False)
class _Switching:
    """A pipeline whose clocks take time to change, as flat arrays; clocks by their number among all measured ones."""

    problem: PipelineProblem
    latency_s: float

    def execute(self, clocks_mhz: ClocksMhz) -> Execution:
        """Runs an iteration at these clocks."""
        return self._run(clocks_mhz, math.inf, 0)

    def improve(self, clocks_mhz: ClocksMhz, limit_s: float, effort: int) -> Execution:
        """Brings the iteration within the limit if that can be, searches for better clocks, and runs it."""
        n = self.problem.dag.num_instructions
        return self._run(clocks_mhz, limit_s, min(effort * n, _MOST_RUN // n))

    def _run(self, clocks_mhz: ClocksMhz, limit_s: float, trials: int) -> Execution:
        problem = self.problem
        predecessors, stages, tables = self._predecessors, self._stages, self._tables
        chosen, durations, costs = _native.run_with_switching(
            problem.dag.topological_order,
            *predecessors,
            *stages,
            problem.curve_of,
            tables.times_s,
            tables.costs_j,
            tables.faster,
            tables.slower,
            tables.measured,
            np.searchsorted(self._all_clocks_mhz, clocks_mhz).astype(np.int32),
            len(self._all_clocks_mhz),
            self.latency_s,
            problem.outside_time_s,
            problem.blocking_power_w,
            limit_s - problem.outside_time_s,
            trials,
        )
        durations_s = np.frombuffer(durations)
        energies_j = np.frombuffer(costs) + np.array(problem.stage_blocking_power_w)[problem.stage_of] * durations_s
        return executed(problem, self._all_clocks_mhz[np.frombuffer(chosen, np.int32)], durations_s, energies_j)

    @cached_property
    def _all_clocks_mhz(self) -> ClocksMhz:
        return np.unique([m.clock_mhz for of_type in self.problem.measurements for m in of_type])

    @cached_property
    def _predecessors(self) -> Neighbours:
        return neighbours(self.problem.dag.successor, self.problem.dag.predecessor, self.problem.dag)

    @cached_property
    def _stages(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The stage of each instruction, stages without any left out; where each stage begins and the last one ends."""
        _, first, stage_of = np.unique(self.problem.stage_of, return_index=True, return_inverse=True)
        return stage_of.astype(np.int32), np.append(first, len(stage_of)).astype(np.int32)

    @cached_property
    def _tables(self) -> _Tables:
        return _Tables.of(self.problem, self._all_clocks_mhz)


@dataclass(frozen=True, eq=False)
class _Tables:
    """What is known of every instruction type at every clock; arrays of shape (types, clocks).

    Attributes:
        times_s, costs_j: duration and effective energy, interpolated where not measured.
        faster, slower: number of the next useful clock, or -1.
        measured: whether the type was measured there.
    """

    times_s: NDArray[np.float64]
    costs_j: NDArray[np.float64]
    faster: NDArray[np.int32]
    slower: NDArray[np.int32]
    measured: NDArray[np.uint8]

    @classmethod
    def of(cls, problem: PipelineProblem, clocks_mhz: ClocksMhz) -> _Tables:
        shape = len(problem.types), len(clocks_mhz)
        tables = cls(
            np.empty(shape),
            np.empty(shape),
            np.empty(shape, np.int32),
            np.empty(shape, np.int32),
            np.empty(shape, np.uint8),
        )
        for i, (curve, measurements) in enumerate(zip(problem.curves, problem.measurements, strict=True)):
            ascending = measurements[::-1]
            own_mhz = [m.clock_mhz for m in ascending]
            times_s = np.interp(clocks_mhz, own_mhz, [m.time_s for m in ascending])
            energies_j = np.interp(clocks_mhz, own_mhz, [m.energy_j for m in ascending])
            useful = np.searchsorted(clocks_mhz, curve.clocks_mhz)  # fastest first
            next_faster = np.searchsorted(curve.times_s, times_s, side="left") - 1
            next_slower = np.searchsorted(curve.times_s, times_s, side="right")
            tables.times_s[i] = times_s
            tables.costs_j[i] = energies_j - curve.blocking_power_w * times_s
            tables.faster[i] = np.where(next_faster < 0, _NONE, useful[next_faster])
            tables.slower[i] = np.append(useful, _NONE)[next_slower]
            tables.measured[i] = np.isin(clocks_mhz, own_mhz)
        return tables
