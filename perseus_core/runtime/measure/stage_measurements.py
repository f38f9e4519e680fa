"""What one rank has measured of its stage, and how the ranks' measurements become one profile of the job."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from perseus_core.documents import Fields
from perseus_core.errors import InputError
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType, Kind
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

    def to_numbers(self) -> list[list[float]]:
        """As plain numbers, one row for each clock and instruction type, for the exchange between ranks."""
        return [
            [
                c.clock_mhz, c.num_iterations, c.outside_time_s, *_estimate_to_numbers(c.waiting),
                *_estimate_to_numbers(c.outside), i.type.chunk, _KINDS.index(i.type.kind), i.time_s, i.time_std_s,
                i.samples, *_estimate_to_numbers(i.power),
            ]
            for c in self.clocks
            for i in c.instructions
        ]  # fmt: skip

    @classmethod
    def from_numbers(cls, stage: int, rows: Iterable[Sequence[float]]) -> StageMeasurements:
        """Undoes `to_numbers`."""
        clocks: dict[int, ClockMeasurements] = {}
        for row in rows:
            chunk, kind, time_s, time_std_s, samples = row[9:14]
            instruction = InstructionMeasurement(
                ChunkKind(int(chunk), _KINDS[int(kind)]), time_s, time_std_s, int(samples), PowerEstimate(*row[14:17])
            )
            clock_mhz = int(row[0])
            others = clocks[clock_mhz].instructions if clock_mhz in clocks else ()
            clocks[clock_mhz] = ClockMeasurements(
                clock_mhz,
                (*others, instruction),
                PowerEstimate(*row[3:6]),
                PowerEstimate(*row[6:9]),
                row[2],
                int(row[1]),
            )
        return cls(stage, tuple(clocks.values()))


_KINDS = tuple(Kind)


def _estimate_to_numbers(estimate: PowerEstimate) -> tuple[float, float, float]:
    return (estimate.power_w, estimate.standard_error_w, estimate.observed_s)


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
    """

    profile: Profile
    blocking: tuple[BlockingPower, ...]
    outside_time_s: tuple[float, ...]
    outside_energy_j: float

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
            )  # fmt: skip
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{fields.where}: holds no measurements of a job ({error})") from None


def merge(ranks: Iterable[StageMeasurements]) -> JobMeasurements:
    """Puts the measurements of all ranks together: of a stage's ranks the slowest counts for time, the mean for energy.

    A clock counts for a stage where all its ranks have it, or, where there is no such clock, where any has it.

    Raises:
        InputError: if a stage has measured nothing.
    """
    by_stage: dict[int, list[StageMeasurements]] = {}
    for rank in ranks:
        by_stage.setdefault(rank.stage, []).append(rank)
    stages = [by_stage[stage] for stage in sorted(by_stage)]
    for of_stage in stages:
        if not any(rank.clocks for rank in of_stage):
            raise InputError(f"stage {of_stage[0].stage} has measured nothing; give it more iterations to profile in")
    clocks = [_common_clocks(of_stage) for of_stage in stages]
    profile = Profile(
        tuple(
            measurement
            for of_stage, by_clock in zip(stages, clocks, strict=True)
            for at_clock in by_clock.values()
            for measurement in _of_stage_at_clock(of_stage[0].stage, at_clock)
        )
    )
    blocking = _blocking_powers([[c for at_clock in by_clock.values() for c in at_clock] for by_clock in clocks])
    highest = [by_clock[max(by_clock)] for by_clock in clocks]
    return JobMeasurements(
        profile,
        blocking,
        tuple(max(c.outside_time_s for c in at_highest) for at_highest in highest),
        max(0.0, sum(_outside_energy_j(at_highest, line) for at_highest, line in zip(highest, blocking, strict=True))),
    )


def _common_clocks(ranks: Sequence[StageMeasurements]) -> Mapping[int, list[ClockMeasurements]]:
    by_clock: dict[int, list[ClockMeasurements]] = {}
    for rank in ranks:
        for clock in rank.clocks:
            by_clock.setdefault(clock.clock_mhz, []).append(clock)
    common = {clock: found for clock, found in by_clock.items() if len(found) == len(ranks)}
    return common or by_clock


def _of_stage_at_clock(stage: int, ranks: Sequence[ClockMeasurements]) -> list[Measurement]:
    by_type: dict[ChunkKind, list[InstructionMeasurement]] = {}
    for rank in ranks:
        for instruction in rank.instructions:
            by_type.setdefault(instruction.type, []).append(instruction)
    merged = []
    for (chunk, kind), found in by_type.items():
        slowest = max(found, key=lambda i: i.time_s)
        energy_j = sum(i.energy_j for i in found) / len(found)
        error_j = math.sqrt(sum((i.relative_error * i.energy_j) ** 2 for i in found)) / len(found)
        merged.append(
            Measurement(
                InstructionType(stage, chunk, kind),
                ranks[0].clock_mhz,
                slowest.time_s,
                energy_j,
                slowest.samples,
                slowest.time_std_s,
                # So that deviation / sqrt(samples) is the standard error, as for independent executions.
                error_j * math.sqrt(slowest.samples),
            )
        )
    return merged


def _outside_energy_j(ranks: Sequence[ClockMeasurements], blocking: BlockingPower) -> float:
    excess_j = [(c.outside.power_w - blocking.at(c.clock_mhz)) * c.outside_time_s for c in ranks]
    return sum(excess_j) / len(excess_j)


def blocking_line(clocks: Sequence[ClockMeasurements]) -> BlockingPower:
    """Blocking power over the clock, from the estimates at each clock by their standard errors."""
    clock = np.array([c.clock_mhz for c in clocks], float)
    power = np.array([c.waiting.power_w for c in clocks])
    error = np.array([c.waiting.standard_error_w for c in clocks]) + 1e-6
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


def _blocking_powers(stages: Sequence[Sequence[ClockMeasurements]]) -> tuple[BlockingPower, ...]:
    """A line for each stage; one that is known worse than the others differ among themselves is drawn towards them."""
    own = [blocking_line(clocks) for clocks in stages]
    if len(own) == 1:
        return tuple(own)
    drawn = []
    for i, line in enumerate(own):
        others = own[:i] + own[i + 1 :]
        weights = np.array([other.standard_error_w**-2.0 for other in others])
        at_middle = np.array([other.at(line.clock_mhz) for other in others])
        mean = float(np.average(at_middle, weights=weights))
        variance_of_mean = 1 / float(weights.sum()) + (_STAGE_SPREAD * mean) ** 2
        variance = line.standard_error_w**2
        trust = variance_of_mean / (variance + variance_of_mean)
        slope = float(np.average([other.slope_w_per_mhz for other in others], weights=weights))
        drawn.append(
            BlockingPower(
                trust * line.power_w + (1 - trust) * mean,
                line.clock_mhz,
                trust * line.slope_w_per_mhz + (1 - trust) * slope,
                math.sqrt(trust * variance),
            )
        )
    return tuple(drawn)
