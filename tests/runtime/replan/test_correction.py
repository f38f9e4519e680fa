from __future__ import annotations

import pytest

from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import InstructionType, Kind
from perseus_core.runtime.measure.stretch import Stretch
from perseus_core.runtime.replan.correction import Stretches, corrected

FORWARD = InstructionType(2, 0, Kind.FORWARD)


def _time_s(profile: Profile, clock_mhz: int) -> float:
    return next(m.time_s for m in profile.of(FORWARD) if m.clock_mhz == clock_mhz)


def _energy_j(profile: Profile, clock_mhz: int) -> float:
    return next(m.energy_j for m in profile.of(FORWARD) if m.clock_mhz == clock_mhz)


def seen(*stretches: Stretch) -> Stretches:
    return {(stretch.type, stretch.clock_mhz): stretch for stretch in stretches}


def test_times_follow_what_was_seen(own_profile: Profile) -> None:
    """Also at clocks that did not run; energies and other types stay as they are."""
    clocks = [m.clock_mhz for m in own_profile.of(FORWARD)]
    middle = clocks[len(clocks) // 2]
    new = corrected(own_profile, seen(Stretch(FORWARD, middle, 1.02, 8)))
    for clock in clocks:
        assert _time_s(new, clock) == pytest.approx(1.02 * _time_s(own_profile, clock))
        assert _energy_j(new, clock) == _energy_j(own_profile, clock)
    other = FORWARD._replace(stage=1)
    assert new.of(other) == own_profile.of(other)


def test_a_gpu_held_down_by_heat_is_as_before_below_that_clock(own_profile: Profile) -> None:
    """And takes the time and energy of the clock it is held at above it."""
    clocks = [m.clock_mhz for m in own_profile.of(FORWARD)]
    held = clocks[len(clocks) // 2]
    factor = _time_s(own_profile, held) / _time_s(own_profile, clocks[0])
    new = corrected(own_profile, seen(Stretch(FORWARD, clocks[0], factor, 8, held_down=True)))
    assert _time_s(new, clocks[0]) == pytest.approx(_time_s(own_profile, held))
    assert _energy_j(new, clocks[0]) == pytest.approx(_energy_j(own_profile, held))
    assert new.of(FORWARD)[-1] == own_profile.of(FORWARD)[-1]


def test_what_was_not_seen_stays(own_profile: Profile) -> None:
    """To the last digit."""
    assert corrected(own_profile, {}) == own_profile
