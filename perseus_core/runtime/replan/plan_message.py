"""A plan as it travels from rank 0 to all others: for each number of microbatches and stage, clocks and durations."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from perseus_core.planning.plan import Plan
from perseus_core.planning.schedule import Kind
from perseus_core.runtime.clock.planned_clock import PlannedClock
from perseus_core.runtime.measure.recorder import Step


@dataclass(frozen=True)
class StagePlan:
    """What one stage does in one iteration.

    Attributes:
        steps: its instructions in order.
        clocks: the clock and duration planned for each.
        unlocked_durations_s: how long each takes at the clock the driver chooses by itself.
    """

    steps: tuple[Step, ...]
    clocks: tuple[PlannedClock, ...]
    unlocked_durations_s: tuple[float, ...]


@dataclass(frozen=True)
class PlanMessage:
    """All that the ranks need to run a plan and to judge it.

    Attributes:
        number: plans are numbered from 1.
        num_microbatches: of the iteration it is for.
        stages: for each stage what it does.
        limit_time_s: how long an iteration may take.
        promised_time_s: how long it should take.
        promised_energy_j: energy of an iteration, one GPU for each stage.
        baseline_time_s, baseline_energy_j: what the planner takes for the same at unlocked clocks.
        gap: how far the plan is from the best possible at most.
        solve_s: how long the planner took.
    """

    number: int
    num_microbatches: int
    stages: tuple[StagePlan, ...]
    limit_time_s: float
    promised_time_s: float
    promised_energy_j: float
    baseline_time_s: float
    baseline_energy_j: float
    gap: float
    solve_s: float

    @property
    def saving(self) -> float:
        """Share of the energy that is promised to be saved."""
        return 1 - self.promised_energy_j / self.baseline_energy_j

    @property
    def slowdown(self) -> float:
        """Share by which an iteration is promised to take longer."""
        return self.promised_time_s / self.baseline_time_s - 1

    @classmethod
    def of(
        cls,
        plan: Plan,
        unlocked_durations_s: Sequence[Sequence[float]],
        *,
        number: int,
        limit_time_s: float,
        solve_s: float,
    ) -> PlanMessage:
        """The message of a plan; `unlocked_durations_s` holds for each stage that of each instruction."""
        stages = tuple(
            StagePlan(
                tuple((p.instruction.chunk, p.instruction.microbatch, p.instruction.kind) for p in order),
                tuple(PlannedClock(p.clock_mhz, p.duration_s) for p in order),
                tuple(unlocked),
            )
            for order, unlocked in zip(plan.stages, unlocked_durations_s, strict=True)
        )
        return cls(
            number,
            plan.schedule.num_microbatches,
            stages,
            limit_time_s,
            plan.iteration_time_s,
            plan.energy_j,
            plan.baseline_time_s,
            plan.baseline_energy_j,
            plan.gap,
            solve_s,
        )

    def encode(self) -> bytes:
        """As bytes."""
        fields = asdict(self)
        fields["stages"] = [
            {
                "steps": [[chunk, microbatch, kind.value] for chunk, microbatch, kind in stage.steps],
                "clocks": [[planned.clock_mhz, planned.duration_s] for planned in stage.clocks],
                "unlocked": stage.unlocked_durations_s,
            }
            for stage in self.stages
        ]
        return zlib.compress(json.dumps(fields).encode())

    @classmethod
    def decode(cls, content: bytes) -> PlanMessage:
        """From the bytes that `encode` made."""
        fields = json.loads(zlib.decompress(content))
        fields["stages"] = tuple(
            StagePlan(
                tuple((chunk, microbatch, Kind(kind)) for chunk, microbatch, kind in stage["steps"]),
                tuple(PlannedClock(clock, duration_s) for clock, duration_s in stage["clocks"]),
                tuple(stage["unlocked"]),
            )
            for stage in fields["stages"]
        )
        return cls(**fields)
