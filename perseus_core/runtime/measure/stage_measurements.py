"""What one rank has measured of its stage, and how the ranks' measurements become one profile of the job."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseus_core.documents import Fields
from perseus_core.errors import InputError
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType, Kind
from perseus_core.planning.switching import NOTHING_SEEN, SeenChanges
from perseus_core.runtime.measure.energy import ChunkKind, PowerEstimate

# Blocking power of different GPUs of one model differs by so much, relative: how far a stage can speak for another.
_STAGE_SPREAD = 0.1
# Blocking power falls with the clock, by no more than about its own size over the whole range of clocks.
_SLOPE_PRIOR = 0.5


@dataclass(frozen=True)
class InstructionMeasurement:
    """Time and power of one instruction type of a stage at one clock, on one GPU.

    Attributes:
        type: chunk and kind.
        time_s: mean time of the executions that were not disturbed.
        time_std_s: standard deviation of one of them.
        samples: how many they are.
        power: mean power; times `time_s` it is the energy of one execution.
    """

    type: ChunkKind
    time_s: float
    time_std_s: float
    samples: int
    power: PowerEstimate

    @property
    def energy_j(self) -> float:
        """Energy of one execution."""
        return self.power.power_w * self.time_s

    @property
    def relative_error(self) -> float:
        """Relative standard error of the energy."""
        of_time = self.time_std_s / self.time_s / math.sqrt(self.samples)
        return math.hypot(of_time, self.power.standard_error_w / max(self.power.power_w, 1e-9))


@dataclass(frozen=True)
class ClockMeasurements:
    """Everything measured at one clock, on one GPU.

    Attributes:
        clock_mhz: the clock in force.
        instructions: one for each instruction type of the stage.
        waiting: power while waiting for a neighbour.
        outside: power after the last instruction of an iteration.
        outside_time_s: mean time from the last instruction of an iteration to its end.
        num_iterations: how many iterations these are means of.
    """

    clock_mhz: int
    instructions: tuple[InstructionMeasurement, ...]
    waiting: PowerEstimate
    outside: PowerEstimate
    outside_time_s: float
    num_iterations: int


@dataclass(frozen=True)
class StageMeasurements:
    """What one rank has measured.

    Attributes:
        stage: its stage.
        clocks: one for each clock, highest first.
    """

    stage: int
    clocks: tuple[ClockMeasurements, ...]


KINDS = tuple(Kind)
"""Kinds in the order in which arrays number them."""

CLOCK_ROW = np.dtype(
    [
        ("clock_mhz", "<u2"),
        ("waiting_w", "<f4"),
        ("waiting_error_w", "<f4"),
        ("outside_w", "<f4"),
        ("outside_time_s", "<f4"),
    ]
)
"""What counts for the job of a `ClockMeasurements`, beside its instructions."""

INSTRUCTION_ROW = np.dtype(
    [
        ("chunk", "<u2"),
        ("kind", "<u2"),
        ("samples", "<u4"),
        ("time_s", "<f4"),
        ("time_std_s", "<f4"),
        ("power_w", "<f4"),
        ("power_error_w", "<f4"),
    ]
)
"""What counts for the job of an `InstructionMeasurement`; `kind` is a place in `KINDS`."""


@dataclass(frozen=True, eq=False)
class SweepRows:
    """What the sweeps of any number of ranks have found, as arrays.

    Attributes:
        stages: of each rank, shape (ranks,).
        clocks: one row for each rank and clock, with the columns of `CLOCK_ROW`.
        rank_of_clock: whose row that is, as a place in `stages`.
        instructions: one row for each rank, clock and instruction type, with the columns of `INSTRUCTION_ROW`.
        clock_of_instruction: at which clock of which rank that is, as a place in `clocks`.
    """

    stages: NDArray[np.int64]
    clocks: NDArray[Any]
    rank_of_clock: NDArray[np.int64]
    instructions: NDArray[Any]
    clock_of_instruction: NDArray[np.int64]

    @classmethod
    def of(cls, ranks: Iterable[StageMeasurements]) -> SweepRows:
        """The rows of some ranks."""
        of_ranks = list(ranks)
        clocks = [(rank, c) for rank, measured in enumerate(of_ranks) for c in measured.clocks]
        instructions = [(place, i) for place, (_, c) in enumerate(clocks) for i in c.instructions]
        return cls(
            np.array([measured.stage for measured in of_ranks], np.int64),
            np.array(
                [
                    (c.clock_mhz, c.waiting.power_w, c.waiting.standard_error_w, c.outside.power_w, c.outside_time_s)
                    for _, c in clocks
                ],
                CLOCK_ROW,
            ),
            np.array([rank for rank, _ in clocks], np.int64),
            np.array(
                [
                    (
                        *(i.type.chunk, KINDS.index(i.type.kind), i.samples, i.time_s, i.time_std_s),
                        *(i.power.power_w, i.power.standard_error_w),
                    )
                    for _, i in instructions
                ],
                INSTRUCTION_ROW,
            ),
            np.array([place for place, _ in instructions], np.int64),
        )


@dataclass(frozen=True)
class BlockingPower:
    """Blocking power of one stage's GPU: a straight line over the clock.

    Attributes:
        power_w: at `clock_mhz`.
        clock_mhz: the middle of the measured clocks.
        slope_w_per_mhz: how it rises with the clock.
        standard_error_w: of `power_w`. Large where the stage hardly ever waited: then other stages speak for it.
    """

    power_w: float
    clock_mhz: float
    slope_w_per_mhz: float
    standard_error_w: float

    def at(self, clock_mhz: float) -> float:
        """Power [W] while waiting at a clock."""
        return max(0.0, self.power_w + self.slope_w_per_mhz * (clock_mhz - self.clock_mhz))


@dataclass(frozen=True)
class JobMeasurements:
    """What all ranks together have measured.

    Attributes:
        profile: as measured, for one GPU of each stage; `planning.fitting.fit_profile` smooths it.
        blocking: blocking power of each stage.
        outside_time_s: for each stage, from its last instruction to the end of the iteration, at the highest clock.
        outside_energy_j: energy of one GPU of each stage, summed, outside the pipeline beyond blocking power, at the
            highest clock: `planning.problem.Problem.outside_energy_j`.
        changes: what changes of clock were seen to take at most.
        gpu_kinds: of each stage, see `StageGpu`.
    """

    profile: Profile
    blocking: tuple[BlockingPower, ...]
    outside_time_s: tuple[float, ...]
    outside_energy_j: float
    changes: SeenChanges = NOTHING_SEEN
    gpu_kinds: tuple[int, ...] = ()

    @property
    def num_clocks(self) -> int:
        """How many clocks were measured, on the stage that has fewest."""
        clocks_of: dict[int, set[int]] = {}
        for measurement in self.profile.measurements:
            clocks_of.setdefault(measurement.type.stage, set()).add(measurement.clock_mhz)
        return min(map(len, clocks_of.values()))

    @property
    def blocking_power_w(self) -> tuple[float, ...]:
        """One blocking power for each stage, in the middle of the measured clocks."""
        return tuple(b.power_w for b in self.blocking)

    def to_document(self) -> dict[str, object]:
        """As a JSON object."""
        return {
            "measurements": [
                [
                    *(m.type.stage, m.type.chunk, m.type.kind.value, m.clock_mhz, m.time_s, m.energy_j, m.samples),
                    *(m.time_std_s, m.energy_std_j),
                ]
                for m in self.profile.measurements
            ],
            "blocking": [[b.power_w, b.clock_mhz, b.slope_w_per_mhz, b.standard_error_w] for b in self.blocking],
            "outside_time_s": list(self.outside_time_s),
            "outside_energy_j": self.outside_energy_j,
            "changes": asdict(self.changes),
            "gpu_kinds": list(self.gpu_kinds),
        }

    @classmethod
    def from_document(cls, fields: Fields) -> JobMeasurements:
        """Undoes `to_document`.

        Raises:
            InputError: if the object is not one that `to_document` makes.
        """
        try:
            return cls(
                Profile(
                    tuple(
                        Measurement(
                            InstructionType(int(stage), int(chunk), Kind(kind)), int(clock), float(time), float(energy),
                            int(samples), float(time_std), float(energy_std),
                        )
                        for stage, chunk, kind, clock, time, energy, samples, time_std, energy_std in fields.items(
                            "measurements"
                        )
                    )
                ),
                tuple(BlockingPower(*(float(value) for value in row)) for row in fields.items("blocking")),
                tuple(fields.numbers("outside_time_s")),
                fields.number("outside_energy_j"),
                SeenChanges(*(fields.section("changes").number(name) for name in ("up_s", "down_s", "call_s"))),
                tuple(int(kind) for kind in fields.items("gpu_kinds")),
            )  # fmt: skip
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{fields.where}: holds no measurements of a job ({error})") from None


def merge(sweeps: SweepRows, gpu_kinds: tuple[int, ...] = ()) -> JobMeasurements:
    """Puts the measurements of all ranks together: of a stage's ranks the slowest counts for time, the mean for energy.

    A clock counts for a stage where all its ranks have it, or, where there is no such clock, where any has it.

    Args:
        sweeps: of all ranks.
        gpu_kinds: of each stage; empty where all are alike.

    Raises:
        InputError: if a stage has measured nothing.
    """
    num_ranks = np.bincount(sweeps.stages)
    stage_of_clock = sweeps.stages[sweeps.rank_of_clock]
    num_rows = np.bincount(stage_of_clock, minlength=len(num_ranks))
    if not num_rows.all():
        raise InputError(f"stage {num_rows.argmin()} has measured nothing; give it more iterations to profile in")
    # A group is one stage at one clock.
    groups, group_of_clock, sizes = np.unique(
        stage_of_clock << 16 | sweeps.clocks["clock_mhz"], return_inverse=True, return_counts=True
    )
    stage_of_group = groups >> 16
    is_common = sizes == num_ranks[stage_of_group]
    has_common = np.bincount(stage_of_group, is_common) > 0
    counts = (is_common | ~has_common[stage_of_group])[group_of_clock]

    clocks, stages = sweeps.clocks[counts], stage_of_clock[counts]
    in_order = np.argsort(stages, kind="stable")
    by_stage = np.split(clocks[in_order], np.cumsum(np.bincount(stages))[:-1])
    highest = [of_stage[of_stage["clock_mhz"] == of_stage["clock_mhz"].max()] for of_stage in by_stage]
    blocking = _blocking_powers([_line(of_stage) for of_stage in by_stage], gpu_kinds or (0,) * len(by_stage))
    outside_j = [_outside_energy_j(at_highest, line) for at_highest, line in zip(highest, blocking, strict=True)]
    return JobMeasurements(
        _merged_profile(sweeps, stage_of_clock, counts),
        blocking,
        tuple(float(at_highest["outside_time_s"].max()) for at_highest in highest),
        max(0.0, sum(outside_j)),
        gpu_kinds=gpu_kinds,
    )


def by_type_and_clock(
    stage: NDArray[Any], chunk: NDArray[Any], kind: NDArray[Any], clock_mhz: NDArray[Any], values: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorts rows into groups of one instruction type at one clock, in each the row with the largest value first.

    Args:
        stage, chunk, clock_mhz: of each row, below 2**16, shape (rows,).
        kind: of each row, a place in `KINDS`.
        values: of each row.

    Returns:
        The places of the rows in that order, shape (rows,), and where in it each group begins, shape (groups,).
    """
    groups = ((stage.astype(np.int64) << 16 | chunk) << 3 | kind) << 16 | clock_mhz
    order = np.lexsort((-values, groups))
    return order, np.flatnonzero(np.diff(groups[order], prepend=-1))


def _merged_profile(sweeps: SweepRows, stage_of_clock: NDArray[np.int64], counts: NDArray[np.bool_]) -> Profile:
    """One measurement for each stage, instruction type and clock, of the rows whose clock counts."""
    counting = counts[sweeps.clock_of_instruction]
    rows, clock = sweeps.instructions[counting], sweeps.clock_of_instruction[counting]
    time_s, power_w = rows["time_s"].astype(float), rows["power_w"].astype(float)
    energy_j = time_s * power_w
    with np.errstate(divide="ignore", invalid="ignore"):  # a `Measurement` refuses what comes of a time of 0
        time_error = rows["time_std_s"] / time_s / np.sqrt(rows["samples"])
    error_j = energy_j * np.hypot(time_error, rows["power_error_w"] / np.maximum(power_w, 1e-9))
    stage, clock_mhz = stage_of_clock[clock], sweeps.clocks["clock_mhz"][clock]
    order, begins = by_type_and_clock(stage, rows["chunk"], rows["kind"], clock_mhz, time_s)
    sizes = np.diff(begins, append=len(order))
    mean_j = np.add.reduceat(energy_j[order], begins) / sizes
    mean_error_j = np.sqrt(np.add.reduceat(error_j[order] ** 2, begins)) / sizes
    slowest = order[begins]
    samples = rows["samples"][slowest]
    columns = (
        *(stage[slowest], rows["chunk"][slowest], rows["kind"][slowest], clock_mhz[slowest]),
        *(time_s[slowest], mean_j, samples),
        rows["time_std_s"][slowest].astype(float),
        # So that deviation / sqrt(samples) is the standard error, as for independent executions.
        mean_error_j * np.sqrt(samples),
    )
    return Profile(
        tuple(
            Measurement(InstructionType(stage, chunk, KINDS[kind]), *numbers)
            for stage, chunk, kind, *numbers in zip(*(column.tolist() for column in columns), strict=True)
        )
    )


def _outside_energy_j(at_clock: NDArray[Any], blocking: BlockingPower) -> float:
    """Mean energy of a stage's ranks outside the pipeline beyond blocking power, at one clock (rows as `CLOCK_ROW`)."""
    excess_w = at_clock["outside_w"].astype(float) - blocking.at(int(at_clock["clock_mhz"][0]))
    return float(np.mean(excess_w * at_clock["outside_time_s"]))


def blocking_line(clocks: Sequence[ClockMeasurements]) -> BlockingPower:
    """Blocking power over the clock, from the estimates at each clock by their standard errors."""
    return _line(SweepRows.of([StageMeasurements(0, tuple(clocks))]).clocks)


def _line(clocks: NDArray[Any]) -> BlockingPower:
    """The same from rows as `CLOCK_ROW`."""
    clock, power = clocks["clock_mhz"].astype(float), clocks["waiting_w"].astype(float)
    error = clocks["waiting_error_w"].astype(float) + 1e-6
    middle = float((clock.max() + clock.min()) / 2)
    offset = (clock - middle) / max(1.0, clock.max())
    # One more equation keeps the slope near half of the power where the clocks do not tell.
    typical = float(np.average(power, weights=error**-2.0))
    slope_std = _SLOPE_PRIOR * typical + 1e-6
    matrix = np.vstack([np.column_stack([np.ones_like(offset), offset]) / error[:, None], [0.0, 1 / slope_std]])
    target = np.append(power / error, _SLOPE_PRIOR * typical / slope_std)
    precision = matrix.T @ matrix
    solution = np.linalg.solve(precision, matrix.T @ target)
    standard_error_w = float(np.sqrt(np.linalg.inv(precision)[0, 0]))
    return BlockingPower(float(solution[0]), middle, float(solution[1]) / max(1.0, clock.max()), standard_error_w)


def _blocking_powers(own: Sequence[BlockingPower], gpu_kinds: Sequence[int]) -> tuple[BlockingPower, ...]:
    """Draws the line of a stage that is known worse than the others differ among themselves towards theirs.

    Only stages with GPUs of one kind speak for each other.
    """
    drawn: dict[int, BlockingPower] = {}
    for kind in set(gpu_kinds):
        alike = [stage for stage, its_kind in enumerate(gpu_kinds) if its_kind == kind]
        drawn.update(zip(alike, _drawn_together([own[stage] for stage in alike]), strict=True))
    return tuple(drawn[stage] for stage in range(len(own)))


def _drawn_together(own: Sequence[BlockingPower]) -> Sequence[BlockingPower]:
    if len(own) == 1:
        return own
    power_w, clock_mhz, slope, error_w = np.array(
        [(line.power_w, line.clock_mhz, line.slope_w_per_mhz, line.standard_error_w) for line in own]
    ).T
    drawn = []
    for i, line in enumerate(own):
        weights = error_w**-2.0
        weights[i] = 0.0
        at_middle = np.maximum(0.0, power_w + slope * (line.clock_mhz - clock_mhz))
        mean_w = float(np.average(at_middle, weights=weights))
        variance_of_mean = 1 / float(weights.sum()) + (_STAGE_SPREAD * mean_w) ** 2
        variance = line.standard_error_w**2
        trust = variance_of_mean / (variance + variance_of_mean)
        mean_slope = float(np.average(slope, weights=weights))
        drawn.append(
            BlockingPower(
                trust * line.power_w + (1 - trust) * mean_w,
                line.clock_mhz,
                float(trust * line.slope_w_per_mhz + (1 - trust) * mean_slope),
                math.sqrt(trust * variance),
            )
        )
    return drawn
