"""What an iteration costs when every instruction runs at a given clock: the common measure of plans and baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perseus_core.errors import InputError
from perseus_core.planning.problem import PipelineProblem


@dataclass(frozen=True, eq=False)
class Execution:
    """One iteration at given clocks. Arrays have shape (N,), in the order of the problem's instructions.

    Attributes:
        clocks_mhz: int64, clock of each instruction.
        durations_s, energies_j: float64, of one GPU of its stage.
        iteration_time_s: critical path and the time outside the pipeline.
        energy_j: of the iteration, one GPU for each stage, waiting included.
    """

    clocks_mhz: NDArray[np.int64]
    durations_s: NDArray[np.float64]
    energies_j: NDArray[np.float64]
    iteration_time_s: float
    energy_j: float


def execute(problem: PipelineProblem, clocks_mhz: NDArray[np.int64] | Sequence[int]) -> Execution:
    """Times and energies of an iteration, from the measurements at these clocks; switching takes no time.

    Raises:
        InputError: if an instruction was not measured at its clock.
    """
    clocks = np.asarray(clocks_mhz, np.int64)
    durations_s, energies_j = np.empty(clocks.shape), np.empty(clocks.shape)
    for i, (instruction_type, measurements) in enumerate(zip(problem.types, problem.measurements, strict=True)):
        members = np.flatnonzero(problem.curve_of == i)
        ascending = measurements[::-1]
        measured = np.array([m.clock_mhz for m in ascending])
        place = np.minimum(np.searchsorted(measured, clocks[members]), len(measured) - 1)
        unknown = np.flatnonzero(measured[place] != clocks[members])
        if unknown.size:
            raise InputError(
                f"{instruction_type} was not measured at {clocks[members[unknown[0]]]} MHz; measure it there"
            )
        durations_s[members] = np.array([m.time_s for m in ascending])[place]
        energies_j[members] = np.array([m.energy_j for m in ascending])[place]
    return executed(problem, clocks, durations_s, energies_j)


def executed(
    problem: PipelineProblem,
    clocks_mhz: NDArray[np.int64],
    durations_s: NDArray[np.float64],
    energies_j: NDArray[np.float64],
) -> Execution:
    """The iteration that these durations and energies make."""
    waiting_w = np.array(problem.stage_blocking_power_w)[problem.stage_of]
    iteration_s = problem.dag.iteration_time_s(durations_s) + problem.outside_time_s
    energy_j = problem.iteration_energy_j((energies_j - waiting_w * durations_s).sum(), iteration_s)
    return Execution(clocks_mhz, durations_s, energies_j, iteration_s, float(energy_j))
