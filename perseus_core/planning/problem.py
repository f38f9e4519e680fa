"""What is to be planned: a DAG, the tradeoff curve of every instruction, and what waiting costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perseus_core.errors import InputError
from perseus_core.planning.curves import TradeoffCurve, tradeoff_curve
from perseus_core.planning.dag import ComputationDag, Dag
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType, Schedule


@dataclass(frozen=True, eq=False)
class Problem:
    """A DAG whose instructions each have a tradeoff curve. Any DAG: pipelines are `PipelineProblem`.

    Attributes:
        dag: the instructions and their order.
        curves: the tradeoff curves.
        curve_of: int32 of shape (N,), the curve of each instruction.
        blocking_power_w: power of all GPUs together while all wait: the marginal power at which lengthening the
            iteration stops to pay.
        outside_time_s: time of an iteration outside the DAG (data loading, gradient all-reduce, optimizer), a constant.
        outside_energy_j: energy of all GPUs in that time beyond blocking power, a constant.

    Raises:
        InputError: if an instruction has no curve, or a constant is negative or not finite.
    """

    dag: Dag
    curves: tuple[TradeoffCurve, ...]
    curve_of: NDArray[np.int32]
    blocking_power_w: float
    outside_time_s: float = 0.0
    outside_energy_j: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "curve_of", np.ascontiguousarray(self.curve_of, np.int32))
        if self.curve_of.shape != (self.dag.num_instructions,):
            raise InputError(
                f"curve_of has shape {self.curve_of.shape}; the DAG has {self.dag.num_instructions} instructions"
            )
        if not (self.curve_of.min() >= 0 and self.curve_of.max() < len(self.curves)):
            raise InputError(f"curve_of names a curve outside 0 .. {len(self.curves) - 1}")
        for name in ("blocking_power_w", "outside_time_s", "outside_energy_j"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}; it must be a finite number, 0 or more")

    @cached_property
    def fastest_s(self) -> NDArray[np.float64]:
        """Shortest duration of every instruction."""
        return np.array([curve.times_s[0] for curve in self.curves])[self.curve_of]

    @cached_property
    def slowest_s(self) -> NDArray[np.float64]:
        """Duration of every instruction at its least effective energy."""
        return np.array([curve.times_s[-1] for curve in self.curves])[self.curve_of]

    def effective_energy_j(self, durations_s: NDArray[np.float64]) -> float:
        """Least effective energy of all instructions at these durations, clocks interpolated."""
        return math.fsum(
            curve.effective_energy_j(durations_s[self.curve_of == i]).sum() for i, curve in enumerate(self.curves)
        )

    def iteration_energy_j(self, effective_energy_j: ArrayLike, iteration_time_s: ArrayLike) -> NDArray[np.float64]:
        """Energy of an iteration: what instructions cost beyond waiting, and waiting all the time."""
        waiting = self.blocking_power_w * np.asarray(iteration_time_s)
        return np.asarray(effective_energy_j) + waiting + self.outside_energy_j


@dataclass(frozen=True, eq=False)
class PipelineProblem(Problem):
    """The problem of one training pipeline: energies count one GPU for each stage.

    Attributes:
        types: the instruction type each curve belongs to.
        measurements: for each type everything measured (or fitted), useful or not, from the highest clock down.
        stage_blocking_power_w: blocking power of each stage's GPU.
        transfer_latency_s: latency of every transfer between stages.
        gap_s: time between an instruction and the next of its stage.
    """

    dag: ComputationDag
    types: tuple[InstructionType, ...] = ()
    measurements: tuple[tuple[Measurement, ...], ...] = ()
    stage_blocking_power_w: tuple[float, ...] = ()
    transfer_latency_s: float = 0.0
    gap_s: float = 0.0

    @cached_property
    def stage_of(self) -> NDArray[np.int64]:
        """int64 of shape (N,): the stage of every instruction."""
        return np.array([i.stage for i in self.schedule.instructions])

    @cached_property
    def max_power_w(self) -> float:
        """Highest power of all GPUs together: each stage at its most power-hungry instruction and clock."""
        power_w = dict.fromkeys(range(self.schedule.num_stages), 0.0)
        for t, measurements in zip(self.types, self.measurements, strict=True):
            power_w[t.stage] = max(power_w[t.stage], *(m.energy_j / m.time_s for m in measurements))
        return math.fsum(power_w.values())

    @property
    def schedule(self) -> Schedule:
        """The schedule."""
        return self.dag.schedule

    @classmethod
    def of(
        cls,
        profile: Profile,
        schedule: Schedule,
        blocking_power_w: float | Sequence[float],
        *,
        transfer_latency_s: float = 0.0,
        gap_s: float = 0.0,
        outside_time_s: float = 0.0,
        outside_energy_j: float = 0.0,
    ) -> PipelineProblem:
        """Puts profile, schedule and blocking power (one, or one per stage) together.

        Raises:
            InputError: if the profile lacks something that the schedule runs, or a blocking power cannot be.
        """
        stages = schedule.num_stages
        per_stage = (
            (blocking_power_w,) * stages if isinstance(blocking_power_w, (int, float)) else tuple(blocking_power_w)
        )
        if len(per_stage) != stages:
            raise InputError(f"blocking power is given for {len(per_stage)} stages; the schedule has {stages}")
        for power in per_stage:
            if not (math.isfinite(power) and power >= 0):
                raise InputError(f"blocking power {power} W must be a finite number, 0 or more")
        if profile.num_stages != stages:
            raise InputError(f"profile has {profile.num_stages} stages, the schedule {stages}; they must be the same")
        instructions = schedule.instructions
        types = tuple(sorted({i.type for i in instructions}))
        measurements = tuple(profile.of(t) for t in types)
        place = {t: i for i, t in enumerate(types)}
        return cls(
            dag=ComputationDag.of(schedule, transfer_latency_s, gap_s),
            curves=tuple(tradeoff_curve(m, per_stage[t.stage]) for t, m in zip(types, measurements, strict=True)),
            curve_of=np.array([place[i.type] for i in instructions], np.int32),
            blocking_power_w=math.fsum(per_stage),
            outside_time_s=outside_time_s,
            outside_energy_j=outside_energy_j,
            types=types,
            measurements=measurements,
            stage_blocking_power_w=per_stage,
            transfer_latency_s=transfer_latency_s,
            gap_s=gap_s,
        )
