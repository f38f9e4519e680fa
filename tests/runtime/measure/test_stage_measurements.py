"""Merging what the ranks have measured."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pytest

from perseus_core.errors import InputError
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType, Kind
from perseus_core.runtime.measure.energy import ChunkKind, PowerEstimate
from perseus_core.runtime.measure.stage_measurements import (
    BlockingPower,
    ClockMeasurements,
    InstructionMeasurement,
    JobMeasurements,
    StageMeasurements,
    SweepRows,
    blocking_line,
    merge,
)

from .synthetic_counter import BACKWARD, FORWARD

UNKNOWN = PowerEstimate(100.0, 100.0, 0.0)
STAGE_SPREAD = 0.1


def at_clock(
    clock_mhz: int,
    *,
    time_s: float = 0.05,
    power_w: float = 300.0,
    waiting: PowerEstimate | None = None,
    outside_w: float = 150.0,
) -> ClockMeasurements:
    known = PowerEstimate(power_w, 3.0, 1.0)
    return ClockMeasurements(
        clock_mhz,
        (
            InstructionMeasurement(FORWARD, time_s, 0.001, 16, known),
            InstructionMeasurement(BACKWARD, 2 * time_s, 0.002, 16, known),
        ),
        waiting or PowerEstimate(40 + 0.04 * clock_mhz, 2.0, 0.5),
        PowerEstimate(outside_w, 10.0, 0.2),
        0.2,
        2,
    )


def test_the_slowest_rank_counts_for_time_and_the_mean_for_energy() -> None:
    """Two replicas of a stage, one 10 % slower at the same power."""
    job = merged([StageMeasurements(0, (at_clock(1000),)), StageMeasurements(0, (at_clock(1000, time_s=0.055),))])
    (forward,) = job.profile.of(InstructionType(0, 0, Kind.FORWARD))
    assert forward.time_s == pytest.approx(0.055)
    assert forward.energy_j == pytest.approx(300 * (0.05 + 0.055) / 2)


def test_standard_errors_survive_the_merge() -> None:
    """Deviation over root of samples is the error of the mean: 1 % of power, and of time its spread."""
    job = merged([StageMeasurements(0, (at_clock(1000),))])
    (forward,) = job.profile.of(InstructionType(0, 0, Kind.FORWARD))
    assert forward.energy_std_j is not None
    of_time = 0.001 / 0.05 / math.sqrt(16)
    assert forward.energy_std_j / math.sqrt(forward.samples) == pytest.approx(15 * math.hypot(0.01, of_time))


def test_clocks_that_not_all_replicas_have_are_left_out() -> None:
    """One replica was throttled at one clock."""
    whole = StageMeasurements(0, (at_clock(1000), at_clock(900)))
    job = merged([whole, StageMeasurements(0, (at_clock(900), at_clock(870)))])
    assert [m.clock_mhz for m in job.profile.of(InstructionType(0, 0, Kind.FORWARD))] == [900]


def test_blocking_power_is_a_line_over_the_clock() -> None:
    """The truth of this test is 40 W + 0.04 W / MHz."""
    job = merged([StageMeasurements(0, tuple(at_clock(c) for c in (1400, 1200, 1000, 800)))])
    assert job.blocking[0].at(1400) == pytest.approx(96, rel=0.02)
    assert job.blocking[0].at(800) == pytest.approx(72, rel=0.02)
    assert job.blocking_power_w == (pytest.approx(84, rel=0.02),)


def test_clocks_at_which_waiting_was_seen_speak_for_the_others() -> None:
    """An estimate that is no better than a guess has no say."""
    known, unknown = at_clock(1000), at_clock(600, waiting=UNKNOWN)
    job = merged([StageMeasurements(0, (known, unknown))])
    assert job.blocking[0].at(1000) == pytest.approx(80, rel=0.05)


def test_other_stages_speak_for_one_that_never_waited() -> None:
    """With a standard error that says so; the others stay as they were."""
    clocks = (1400, 1200, 1000)
    waited = [StageMeasurements(stage, tuple(at_clock(c) for c in clocks)) for stage in (0, 1)]
    never = StageMeasurements(2, tuple(at_clock(c, waiting=UNKNOWN) for c in clocks))
    job = merged([*waited, never])
    assert job.blocking_power_w[2] == pytest.approx(88, rel=0.05)
    assert job.blocking[2].standard_error_w > 5 * job.blocking[0].standard_error_w
    assert job.blocking_power_w[0] == pytest.approx(88, rel=0.02)


def test_outside_energy_is_what_exceeds_waiting() -> None:
    """150 W for 0.2 s, at a blocking power of 80 W, in two stages."""
    job = merged([StageMeasurements(stage, (at_clock(1000),)) for stage in (0, 1)])
    assert job.outside_energy_j == pytest.approx(2 * (150 - 80) * 0.2, rel=0.05)


def test_a_stage_without_measurements_is_named() -> None:
    """There is nothing to plan with."""
    with pytest.raises(InputError, match="stage 1 has measured nothing"):
        merged([StageMeasurements(0, (at_clock(1000),)), StageMeasurements(1, ())])


def test_many_ranks_are_merged_as_one_by_one() -> None:
    """Whatever clocks they have: sums over many ranks as arrays give what the same sums give rank by rank."""
    for seed in range(20):
        ranks = random_ranks(random.Random(seed))
        expected, found = merged_one_by_one(ranks), merged(ranks)
        assert [(m.type, m.clock_mhz, m.samples) for m in found.profile.measurements] == [
            (m.type, m.clock_mhz, m.samples) for m in expected.profile.measurements
        ]
        for field in ("time_s", "energy_j", "time_std_s", "energy_std_j"):
            assert [getattr(m, field) for m in found.profile.measurements] == pytest.approx(
                [getattr(m, field) for m in expected.profile.measurements], rel=1e-6
            )
        for field in ("power_w", "clock_mhz", "slope_w_per_mhz", "standard_error_w"):
            assert [getattr(b, field) for b in found.blocking] == pytest.approx(
                [getattr(b, field) for b in expected.blocking], rel=1e-4, abs=1e-6
            )
        assert found.outside_time_s == pytest.approx(expected.outside_time_s, rel=1e-6)
        assert found.outside_energy_j == pytest.approx(expected.outside_energy_j, rel=1e-4)


def test_as_many_ranks_as_there_are() -> None:
    """The slowest of 1024 on each stage is the only one that is 20 % slower."""
    usual, slow = (at_clock(1000), at_clock(900)), (at_clock(1000, time_s=0.06), at_clock(900))
    one = SweepRows.of([StageMeasurements(0, slow), *(StageMeasurements(0, usual) for _ in range(1023))])
    sixteen = SweepRows(
        np.repeat(np.arange(16), 1024),
        np.tile(one.clocks, 16),
        np.concatenate([one.rank_of_clock + 1024 * stage for stage in range(16)]),
        np.tile(one.instructions, 16),
        np.concatenate([one.clock_of_instruction + len(one.clocks) * stage for stage in range(16)]),
    )
    job = merge(sixteen)
    assert [job.profile.of(InstructionType(stage, 0, Kind.FORWARD))[0].time_s for stage in range(16)] == pytest.approx(
        [0.06] * 16
    )
    assert job.profile.of(InstructionType(3, 0, Kind.FORWARD))[0].energy_j == pytest.approx(
        300 * (1023 * 0.05 + 0.06) / 1024
    )
    assert job.outside_energy_j == pytest.approx(16 * (150 - 80) * 0.2, rel=0.05)


def merged(ranks: Sequence[StageMeasurements]) -> JobMeasurements:
    return merge(SweepRows.of(ranks))


def random_ranks(draw: random.Random) -> list[StageMeasurements]:
    """Of one to four stages; ranks of a stage mostly have the same clocks, some fewer, some none; in any order."""
    ranks = []
    types = [ChunkKind(chunk, kind) for chunk in range(draw.randint(1, 2)) for kind in (Kind.FORWARD, Kind.BACKWARD)]
    for stage in range(draw.randint(1, 4)):
        clocks = draw.sample(range(600, 1980, 15), draw.randint(1, 8))
        of_stage = []
        for _ in range(draw.randint(1, 9)):
            measured = [clock for clock in clocks if draw.random() < 0.95]
            of_stage.append(StageMeasurements(stage, tuple(random_clock(draw, c, types) for c in measured)))
        if not any(rank.clocks for rank in of_stage):
            of_stage.append(StageMeasurements(stage, (random_clock(draw, clocks[0], types),)))
        ranks += of_stage
    draw.shuffle(ranks)
    return ranks


def random_clock(draw: random.Random, clock_mhz: int, types: Sequence[ChunkKind]) -> ClockMeasurements:
    def power(mean_w: float) -> PowerEstimate:
        return PowerEstimate(mean_w * draw.uniform(0.8, 1.2), draw.uniform(0.1, 30.0), draw.uniform(0.1, 2.0))

    return ClockMeasurements(
        clock_mhz,
        tuple(
            InstructionMeasurement(
                each, 50 / clock_mhz * draw.uniform(1, 1.2), draw.uniform(0.0, 0.01), draw.randint(1, 99), power(300)
            )
            for each in types
        ),
        power(80),
        power(150),
        draw.uniform(0.01, 0.4),
        draw.randint(1, 8),
    )


def merged_one_by_one(ranks: Iterable[StageMeasurements]) -> JobMeasurements:
    """What `merge` is for, said rank by rank."""
    by_stage: dict[int, list[StageMeasurements]] = {}
    for rank in ranks:
        by_stage.setdefault(rank.stage, []).append(rank)
    stages = [by_stage[stage] for stage in sorted(by_stage)]
    clocks = [common_clocks(of_stage) for of_stage in stages]
    profile = Profile(
        tuple(
            measurement
            for of_stage, by_clock in zip(stages, clocks, strict=True)
            for at_clock in by_clock.values()
            for measurement in of_stage_at_clock(of_stage[0].stage, at_clock)
        )
    )
    blocking = blocking_powers([[c for at_clock in by_clock.values() for c in at_clock] for by_clock in clocks])
    highest = [by_clock[max(by_clock)] for by_clock in clocks]
    return JobMeasurements(
        profile,
        blocking,
        tuple(max(c.outside_time_s for c in at_highest) for at_highest in highest),
        max(0.0, sum(outside_energy_j(at_highest, line) for at_highest, line in zip(highest, blocking, strict=True))),
    )


def common_clocks(ranks: Sequence[StageMeasurements]) -> Mapping[int, list[ClockMeasurements]]:
    by_clock: dict[int, list[ClockMeasurements]] = {}
    for rank in ranks:
        for clock in rank.clocks:
            by_clock.setdefault(clock.clock_mhz, []).append(clock)
    common = {clock: found for clock, found in by_clock.items() if len(found) == len(ranks)}
    return common or by_clock


def of_stage_at_clock(stage: int, ranks: Sequence[ClockMeasurements]) -> list[Measurement]:
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


def outside_energy_j(ranks: Sequence[ClockMeasurements], blocking: BlockingPower) -> float:
    excess_j = [(c.outside.power_w - blocking.at(c.clock_mhz)) * c.outside_time_s for c in ranks]
    return sum(excess_j) / len(excess_j)


def blocking_powers(stages: Sequence[Sequence[ClockMeasurements]]) -> tuple[BlockingPower, ...]:
    own = [blocking_line(clocks) for clocks in stages]
    if len(own) == 1:
        return tuple(own)
    drawn = []
    for i, line in enumerate(own):
        others = own[:i] + own[i + 1 :]
        weights = np.array([other.standard_error_w**-2.0 for other in others])
        at_middle = np.array([other.at(line.clock_mhz) for other in others])
        mean = float(np.average(at_middle, weights=weights))
        variance_of_mean = 1 / float(weights.sum()) + (STAGE_SPREAD * mean) ** 2
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
