"""Merging what the ranks have measured."""

from __future__ import annotations

import math

import pytest

from perseus_core.errors import InputError
from perseus_core.planning.schedule import InstructionType, Kind
from perseus_core.runtime.measure.energy import PowerEstimate
from perseus_core.runtime.measure.stage_measurements import (
    ClockMeasurements,
    InstructionMeasurement,
    StageMeasurements,
    merge,
)

from .synthetic_counter import BACKWARD, FORWARD

UNKNOWN = PowerEstimate(100.0, 100.0, 0.0)


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
    job = merge([StageMeasurements(0, (at_clock(1000),)), StageMeasurements(0, (at_clock(1000, time_s=0.055),))])
    (forward,) = job.profile.of(InstructionType(0, 0, Kind.FORWARD))
    assert forward.time_s == 0.055
    assert forward.energy_j == pytest.approx(300 * (0.05 + 0.055) / 2)


def test_standard_errors_survive_the_merge() -> None:
    """Deviation over root of samples is the error of the mean: 1 % of power, and of time its spread."""
    job = merge([StageMeasurements(0, (at_clock(1000),))])
    (forward,) = job.profile.of(InstructionType(0, 0, Kind.FORWARD))
    assert forward.energy_std_j is not None
    of_time = 0.001 / 0.05 / math.sqrt(16)
    assert forward.energy_std_j / math.sqrt(forward.samples) == pytest.approx(15 * math.hypot(0.01, of_time))


def test_clocks_that_not_all_replicas_have_are_left_out() -> None:
    """One replica was throttled at one clock."""
    whole = StageMeasurements(0, (at_clock(1000), at_clock(900)))
    job = merge([whole, StageMeasurements(0, (at_clock(900), at_clock(870)))])
    assert [m.clock_mhz for m in job.profile.of(InstructionType(0, 0, Kind.FORWARD))] == [900]


def test_blocking_power_is_a_line_over_the_clock() -> None:
    """The truth of this test is 40 W + 0.04 W / MHz."""
    job = merge([StageMeasurements(0, tuple(at_clock(c) for c in (1400, 1200, 1000, 800)))])
    assert job.blocking[0].at(1400) == pytest.approx(96, rel=0.02)
    assert job.blocking[0].at(800) == pytest.approx(72, rel=0.02)
    assert job.blocking_power_w == (pytest.approx(84, rel=0.02),)


def test_clocks_at_which_waiting_was_seen_speak_for_the_others() -> None:
    """An estimate that is no better than a guess has no say."""
    known, unknown = at_clock(1000), at_clock(600, waiting=UNKNOWN)
    job = merge([StageMeasurements(0, (known, unknown))])
    assert job.blocking[0].at(1000) == pytest.approx(80, rel=0.05)


def test_other_stages_speak_for_one_that_never_waited() -> None:
    """With a standard error that says so; the others stay as they were."""
    clocks = (1400, 1200, 1000)
    waited = [StageMeasurements(stage, tuple(at_clock(c) for c in clocks)) for stage in (0, 1)]
    never = StageMeasurements(2, tuple(at_clock(c, waiting=UNKNOWN) for c in clocks))
    job = merge([*waited, never])
    assert job.blocking_power_w[2] == pytest.approx(88, rel=0.05)
    assert job.blocking[2].standard_error_w > 5 * job.blocking[0].standard_error_w
    assert job.blocking_power_w[0] == pytest.approx(88, rel=0.02)


def test_outside_energy_is_what_exceeds_waiting() -> None:
    """150 W for 0.2 s, at a blocking power of 80 W, in two stages."""
    job = merge([StageMeasurements(stage, (at_clock(1000),)) for stage in (0, 1)])
    assert job.outside_energy_j == pytest.approx(2 * (150 - 80) * 0.2, rel=0.05)


def test_a_stage_without_measurements_is_named() -> None:
    """There is nothing to plan with."""
    with pytest.raises(InputError, match="stage 1 has measured nothing"):
        merge([StageMeasurements(0, (at_clock(1000),)), StageMeasurements(1, ())])


def test_numbers_go_to_other_ranks_and_come_back() -> None:
    """Nothing is lost."""
    measured = StageMeasurements(3, (at_clock(1000), at_clock(900, waiting=UNKNOWN)))
    assert StageMeasurements.from_numbers(3, measured.to_numbers()) == measured
