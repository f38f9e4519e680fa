"""When a clock that is not the one asked for tells of another program."""

from __future__ import annotations

import pytest

from perseus_core.gpu.errors import NotSupported
from perseus_core.runtime.clock.override import ClockOverridden, OverrideWatch


def watch(clock_mhz: int | None = 700) -> OverrideWatch:
    made = OverrideWatch("GPU-0")
    made.asked(clock_mhz, 10.0)
    return made


def test_clocks_asked_for_a_moment_ago_may_still_be_seen() -> None:
    """Also where several changes follow each other more quickly than the GPU."""
    made = watch(1400)
    made.asked(900, 20.00)
    made.asked(800, 20.01)
    assert not made.has_overridden(20.02, lambda: 1400)
    assert made.has_overridden(21.5, lambda: 1400)


def test_a_clock_left_to_the_driver_is_nobodys() -> None:
    """Neither now nor while the change to the first lock is under way."""
    assert not watch(None).has_overridden(20.0, lambda: 1400)
    assert not watch().has_overridden(10.1, lambda: 1400)


def test_only_looks_in_a_row_end_it() -> None:
    """Somebody who resets the clock now and then is no reason to give up."""
    made = watch()
    for second in range(20, 60, 2):
        assert made.has_overridden(second, lambda: 1400)
        assert not made.has_overridden(second + 1, lambda: 700)
    for second in range(60, 65):
        assert made.has_overridden(second, lambda: 1400)
    with pytest.raises(ClockOverridden, match="again and again"):
        made.has_overridden(65, lambda: 1400)


def test_a_gpu_that_does_not_tell_its_clock_is_not_asked_again() -> None:
    """And its clock is set all the same."""
    asked = []

    def refuse() -> int:
        asked.append(1)
        raise NotSupported("no clock")

    made = watch()
    assert not made.has_overridden(20.0, refuse)
    assert not made.has_overridden(30.0, refuse)
    assert len(asked) == 1
