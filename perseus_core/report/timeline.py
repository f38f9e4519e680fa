"""One iteration as it runs: what every picture of a pipeline draws."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning.dag import ComputationDag
from perseus_core.planning.execution import Execution
from perseus_core.planning.plan import Plan
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.schedule import Schedule
from perseus_core.report.critical_path import critical_path
from perseus_core.report.palette import Colour


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each instruction runs, how long and at which clock. Arrays have shape (N,), in the schedule's order.

    Attributes:
        dag: instructions and their order.
        start_s, duration_s: float64.
        clock_mhz: int64.
        energy_j: float64, of one GPU of the instruction's stage.
        iteration_time_s: time outside the pipeline included.
        iteration_energy_j: one GPU for each stage, waiting included.
    """

    dag: ComputationDag
    start_s: NDArray[np.float64]
    duration_s: NDArray[np.float64]
    clock_mhz: NDArray[np.int64]
    energy_j: NDArray[np.float64]
    iteration_time_s: float
    iteration_energy_j: float

    @classmethod
    def of_plan(cls, plan: Plan) -> Timeline:
        """What a plan promises."""
        planned = [p for order in plan.stages for p in order]
        return cls(
            ComputationDag.of(plan.schedule),
            np.array([p.start_s for p in planned]),
            np.array([p.duration_s for p in planned]),
            np.array([p.clock_mhz for p in planned]),
            np.array([p.energy_j for p in planned]),
            plan.iteration_time_s,
            plan.energy_j,
        )

    @classmethod
    def of_execution(cls, problem: PipelineProblem, execution: Execution) -> Timeline:
        """An iteration at given clocks."""
        return cls(
            problem.dag,
            problem.dag.start_times_s(execution.durations_s),
            execution.durations_s,
            execution.clocks_mhz,
            execution.energies_j,
            execution.iteration_time_s,
            execution.energy_j,
        )

    @property
    def schedule(self) -> Schedule:
        """Stages and their instructions."""
        return self.dag.schedule

    @property
    def pipeline_time_s(self) -> float:
        """When the last instruction ends."""
        return float((self.start_s + self.duration_s).max())

    @property
    def has_outside(self) -> bool:
        """Whether the iteration goes on after its last instruction (gradient all-reduce, optimizer, data loading)."""
        return self.iteration_time_s - self.pipeline_time_s > 1e-6 * self.iteration_time_s

    @cached_property
    def critical_path(self) -> NDArray[np.int64]:
        """Places of the instructions of one critical path, first to last."""
        return critical_path(self.dag, self.start_s, self.duration_s)

    def coloured_by(self, colour: Colour) -> NDArray[np.float64]:
        """The quantity that the colours show: clock in MHz or power in W."""
        return self.clock_mhz.astype(np.float64) if colour == "clock" else self.energy_j / self.duration_s
