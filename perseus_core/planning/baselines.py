"""What others do with the same profile, for honest comparison. None of it is used to plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perseus_core.errors import InputError
from perseus_core.planning.execution import Execution, execute
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Measurement
from perseus_core.planning.schedule import Kind


@dataclass(frozen=True, eq=False)
class Baseline:
    """The operating points one method offers.

    Attributes:
        name: how it is called in tables and figures.
        points: its executions, fastest first.
    """

    name: str
    points: tuple[Execution, ...]

    def within(self, iteration_time_s: float) -> Execution | None:
        """The point of least energy that takes no longer, or None if all do."""
        in_time = [p for p in self.points if p.iteration_time_s <= iteration_time_s * (1 + 1e-12)]
        return min(in_time, key=lambda p: p.energy_j, default=None)


def all_max(problem: PipelineProblem) -> Execution:
    """Every instruction at the highest clock of its own GPU: what a job does on its own.

    Raises:
        InputError: if one was not measured there.
    """
    tops_mhz = [of_type[0].clock_mhz for of_type in problem.measurements]
    for t, top_mhz in zip(problem.types, tops_mhz, strict=True):
        highest_mhz = max(mhz for other, mhz in zip(problem.types, tops_mhz, strict=True) if other.stage == t.stage)
        if top_mhz < highest_mhz:
            raise InputError(
                f"{t} was not measured at {highest_mhz} MHz, the highest clock of its stage, which is what it runs at "
                "without a plan; measure it there, or estimate it with --fill-top"
            )
    return execute(problem, np.array(tops_mhz)[problem.curve_of])


def zeus_global(problem: PipelineProblem) -> Baseline:
    """One clock for the whole pipeline (Zeus, You et al., NSDI 2023, for many GPUs as in the Perseus paper).

    Stages of different GPUs may have no clock in common: then it has no point.
    """
    n = problem.dag.num_instructions
    points = [execute(problem, np.full(n, clock)) for clock in _common_clocks_mhz(problem.measurements)]
    return _baseline("Zeus, global", points)


def zeus_per_stage(problem: PipelineProblem) -> Baseline:
    """One clock per stage, so that forward times balance (the Perseus paper's ZeusPerStage).

    For every forward time that some stage can have, each stage takes its lowest clock that is not slower.
    """
    forward = {
        t.stage: {m.clock_mhz: m.time_s for m in ms}
        for t, ms in zip(problem.types, problem.measurements, strict=True)
        if t.kind is Kind.FORWARD and t.chunk == 0
    }
    stages = range(problem.schedule.num_stages)
    clocks = [
        _common_clocks_mhz([ms for t, ms in zip(problem.types, problem.measurements, strict=True) if t.stage == stage])
        for stage in stages
    ]
    slowest_stage_s = max(min(forward[stage][c] for c in clocks[stage]) for stage in stages)
    targets_s = sorted({t for stage in stages for c in clocks[stage] if (t := forward[stage][c]) >= slowest_stage_s})
    points = []
    for target_s in targets_s:
        per_stage = [min(c for c in clocks[stage] if forward[stage][c] <= target_s) for stage in stages]
        points.append(execute(problem, np.array(per_stage)[problem.stage_of]))
    return _baseline("Zeus, per stage", points)


def envpipe(problem: PipelineProblem) -> Baseline:
    """EnvPipe (Choi et al., USENIX ATC 2023): slows what lies inside the pipeline's envelope, for one iteration time.

    It takes the last stage for the bottleneck. The envelope (the first microbatch's forwards, all of the last stage,
    the last microbatch's backwards) stays at the highest clock. All other instructions step down together, clock by
    clock; those that make the iteration longer step back and stay. Every round an instruction steps down for good or
    stays for good, so the search ends.
    """
    last_stage, last_microbatch = problem.schedule.num_stages - 1, problem.schedule.num_microbatches - 1
    moving = np.array(
        [
            i.stage != last_stage and i.microbatch != (0 if i.kind is Kind.FORWARD else last_microbatch)
            for i in problem.schedule.instructions
        ]
    )
    steps = [_efficient_clocks_mhz(measurements) for measurements in problem.measurements]
    num_steps = np.array([len(of_type) for of_type in steps])[problem.curve_of]
    step = np.zeros(problem.dag.num_instructions, np.int64)

    def run() -> Execution:
        return execute(problem, [steps[c][k] for c, k in zip(problem.curve_of, step, strict=True)])

    limit_s = run().iteration_time_s * (1 + 1e-9)
    while (moving & (step + 1 < num_steps)).any():
        lowered = moving & (step + 1 < num_steps)
        step[lowered] += 1
        while (trial := run()).iteration_time_s > limit_s:
            back = lowered & problem.dag.critical(trial.durations_s)
            step[back] -= 1
            lowered &= ~back
            moving &= ~back
    return _baseline("EnvPipe", [run()])


def _efficient_clocks_mhz(measurements: tuple[Measurement, ...]) -> list[int]:
    """From the highest clock down to the one of least energy, leaving out what costs no less than a faster one."""
    kept = [measurements[0]]
    for m in sorted(measurements[1:], key=lambda m: m.time_s):
        if m.time_s >= kept[0].time_s and m.energy_j < kept[-1].energy_j:
            kept.append(m)
    return [m.clock_mhz for m in kept]


def _common_clocks_mhz(of_types: Sequence[Sequence[Measurement]]) -> list[int]:
    """The clocks at which all of these types were measured, highest first."""
    return sorted(set.intersection(*({m.clock_mhz for m in of_type} for of_type in of_types)), reverse=True)


def _baseline(name: str, points: list[Execution]) -> Baseline:
    return Baseline(name, tuple(sorted(points, key=lambda p: p.iteration_time_s)))
