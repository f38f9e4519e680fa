"""What really happens when every instruction is asked to run at its clock and changes of clock take their time.

The controller does what is calculated here. The inner loops are in `native/switching.c`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning import _native
from perseus_core.planning.execution import Execution, executed
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.rounding import neighbours
from perseus_core.planning.switching import Switching, changes_per_iteration

ClocksMhz = NDArray[np.int64]
_A = NDArray[Any]
_Arrays = tuple[_A, _A, _A, _A, _A, _A, _A, _A, _A, _A, _A, _A, _A]


def execute_with_switching(problem: PipelineProblem, clocks_mhz: ClocksMhz, switching: Switching) -> Execution:
    """What really happens when every instruction is asked to run at its clock and changes take their time.

    The clock of an instruction is asked for so early that it is in force when the one before it on its stage ends
    (earlier or later by the jitter), so idle time in between hides a change that comes late. It is not asked for before
    the last change is in force and its call has returned, nor before its stage has begun the iteration: until then
    nobody knows when its instructions will end. What is wanted for less time than that never comes. An instruction
    progresses at the speed of the clock in force, and draws its power. An iteration follows another like it, with the
    time outside the pipeline in between; where iterations differ for ever, this is the longest.

    Args:
        problem: the pipeline.
        clocks_mhz: of shape (N,), any clocks of the profile. Time and energy of an instruction at a clock where it was
            not measured are interpolated between the clocks where it was.
        switching: what changes take.
    """
    return SwitchedPipeline(problem, switching).execute(clocks_mhz)


@dataclass(frozen=True, eq=False)
class SwitchedPipeline:
    """A pipeline whose clocks take time to change, as flat arrays.

    Instructions are numbered in the order in which they begin; clocks by their place among all that were measured.

    Attributes:
        problem: the pipeline.
        switching: what changes take.
    """

    problem: PipelineProblem
    switching: Switching

    def execute(self, clocks_mhz: ClocksMhz) -> Execution:
        """Runs an iteration at these clocks."""
        return self._run(clocks_mhz, math.inf, num_moves=0, warmth=0.0)

    def search(self, clocks_mhz: ClocksMhz, limit_s: float, *, num_moves: int, warmth: float) -> Execution:
        """Searches for better clocks, from these on, and runs the best that keep the limits, if any were found.

        Args:
            clocks_mhz: where to begin.
            limit_s: how long an iteration may take.
            num_moves: how many changes to try.
            warmth: by how many energies of an instruction, on average, a plan on the way to a better one may be worse
                than the last one, at first.
        """
        return self._run(clocks_mhz, limit_s, num_moves=num_moves, warmth=warmth)

    def keeps(self, execution: Execution, limit_s: float) -> bool:
        """Whether it is in time and changes clocks no more often than allowed."""
        return execution.iteration_time_s <= limit_s and all(
            self.switching.allows(
                changes_per_iteration(execution.clocks_mhz[self.problem.stage_of == stage].tolist()),
                execution.iteration_time_s,
            )
            for stage in range(self.problem.schedule.num_stages)
        )

    def _run(self, clocks_mhz: ClocksMhz, limit_s: float, *, num_moves: int, warmth: float) -> Execution:
        problem, switching, order = self.problem, self.switching, self._order
        chosen, durations, costs = _native.run_with_switching(
            *self._arrays,
            np.searchsorted(self._all_clocks_mhz, clocks_mhz[order]).astype(np.int32),
            len(self._all_clocks_mhz),
            switching.up_s,
            switching.down_s,
            switching.call_s,
            switching.jitter_s,
            problem.outside_time_s,
            problem.blocking_power_w,
            limit_s - problem.outside_time_s,
            math.inf if switching.max_changes_per_s is None else switching.max_changes_per_s,
            num_moves,
            warmth,
        )
        durations_s, energies_j = np.empty(len(order)), np.empty(len(order))
        chosen_mhz = np.empty(len(order), np.int64)
        durations_s[order], energies_j[order] = np.frombuffer(durations), np.frombuffer(costs)
        chosen_mhz[order] = self._all_clocks_mhz[np.frombuffer(chosen, np.int32)]
        energies_j += np.array(problem.stage_blocking_power_w)[problem.stage_of] * durations_s
        return executed(problem, chosen_mhz, durations_s, energies_j)

    @cached_property
    def _all_clocks_mhz(self) -> ClocksMhz:
        return np.unique([m.clock_mhz for of_type in self.problem.measurements for m in of_type])

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        """Instructions as they begin when all run at their fastest: a topological order."""
        return np.argsort(self.problem.dag.start_times_s(self.problem.fastest_s), kind="stable")

    @cached_property
    def _arrays(self) -> _Arrays:
        """What `_native.run_with_switching` wants to know of the pipeline."""
        dag, order = self.problem.dag, self._order
        number = np.empty(len(order), np.int32)
        number[order] = np.arange(len(order))
        first, others, latency_s = neighbours(number[dag.successor], number[dag.predecessor], dag)
        # The instructions of a stage stand together, in its order.
        _, begin, stage_of = np.unique(self.problem.stage_of, return_index=True, return_inverse=True)
        begin_of_stage = np.append(begin, len(order)).astype(np.int32)
        before, behind = np.empty(len(order), np.int32), np.empty(len(order), np.int32)
        for of_stage in np.split(number, begin[1:]):
            before[of_stage], behind[of_stage] = np.roll(of_stage, 1), np.roll(of_stage, -1)
        return (
            first,
            others,
            latency_s,
            stage_of[order].astype(np.int32),
            self.problem.curve_of[order],
            before,
            behind,
            number[begin],
            number,
            begin_of_stage,
            *self._tables,
        )

    @cached_property
    def _tables(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.uint8]]:
        """Per type and clock, of shape (types, clocks): time and effective energy, interpolated; whether measured."""
        clocks_mhz = self._all_clocks_mhz
        shape = len(self.problem.types), len(clocks_mhz)
        times_s, costs_j, measured = np.empty(shape), np.empty(shape), np.empty(shape, np.uint8)
        for i, (curve, measurements) in enumerate(zip(self.problem.curves, self.problem.measurements, strict=True)):
            ascending = measurements[::-1]
            own_mhz = [m.clock_mhz for m in ascending]
            times_s[i] = np.interp(clocks_mhz, own_mhz, [m.time_s for m in ascending])
            energies_j = np.interp(clocks_mhz, own_mhz, [m.energy_j for m in ascending])
            costs_j[i] = energies_j - curve.blocking_power_w * times_s[i]
            measured[i] = np.isin(clocks_mhz, own_mhz)
        return times_s, costs_j, measured
