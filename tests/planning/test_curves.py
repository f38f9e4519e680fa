"""Tradeoff curves: only useful clocks, and their hull."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_core.errors import InputError
from perseus_core.planning.curves import TradeoffCurve, tradeoff_curve
from perseus_core.planning.profile import Measurement
from perseus_core.planning.schedule import InstructionType, Kind

TYPE = InstructionType(0, 0, Kind.FORWARD)
measured = st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(1.0, 100.0)), min_size=1, max_size=40)


def measurements(points: list[tuple[float, float]]) -> list[Measurement]:
    return [Measurement(TYPE, 1000 + i, time_s, energy_j) for i, (time_s, energy_j) in enumerate(points)]


@given(measured, st.floats(0, 300))
def test_what_is_left_out_is_no_loss(points: list[tuple[float, float]], power_w: float) -> None:
    """Every clock left out has one on the curve that is no slower and costs no more effective energy."""
    curve = tradeoff_curve(measurements(points), power_w)
    for time_s, energy_j in points:
        faster = np.asarray(curve.times_s) <= time_s * (1 + 1e-9)
        assert faster.any()
        assert curve.effective_energies_j[faster].min() <= energy_j - power_w * time_s


@given(measured, st.floats(0, 300))
def test_hull_is_convex_and_below_every_clock(points: list[tuple[float, float]], power_w: float) -> None:
    """Slopes of the hull rise, it starts and ends with the curve, and no clock lies below it."""
    curve = tradeoff_curve(measurements(points), power_w)
    times_s = np.asarray(curve.times_s)
    slopes = np.diff(curve.effective_energies_j[curve.hull]) / np.diff(times_s[curve.hull])
    assert (np.diff(slopes) > 0).all()
    assert curve.hull[0] == 0
    assert curve.hull[-1] == len(times_s) - 1
    scale = np.abs(curve.effective_energies_j).max()
    assert (curve.effective_energy_j(times_s) <= curve.effective_energies_j + 1e-9 * scale).all()


def test_times_that_differ_by_rounding_are_one() -> None:
    """Of two clocks with the same time the cheaper one stays, even if its time is an ulp longer."""
    curve = tradeoff_curve(measurements([(0.1, 20.0), (np.nextafter(0.1, 1), 15.0), (0.2, 14.0)]), 0.0)
    assert curve.energies_j == (15.0, 14.0)


def test_of_equal_clocks_the_lowest_is_taken() -> None:
    """A GPU at its power limit holds no higher one."""
    equal = [Measurement(InstructionType(0, 0, Kind.FORWARD), clock, 1.0, 300.0) for clock in (1740, 1500, 1440)]
    slower = Measurement(InstructionType(0, 0, Kind.FORWARD), 1410, 1.1, 290.0)
    assert tradeoff_curve([*equal, slower], 20.0).clocks_mhz == (1440, 1410)


def test_slower_than_the_slowest_costs_the_same() -> None:
    """Beyond the slowest clock the GPU waits, which is what effective energy counts from."""
    curve = TradeoffCurve((1410, 1200), (1.0, 1.2), (300.0, 250.0), 80.0)
    assert curve.effective_energy_j(np.array([1.2, 5.0])).tolist() == pytest.approx([154.0, 154.0])


@pytest.mark.parametrize(
    ("clocks", "times", "energies"),
    [
        ((1410,), (1.0, 2.0), (3.0, 2.0)),
        ((), (), ()),
        ((1410, 1200), (2.0, 1.0), (3.0, 2.0)),
        ((1410, 1200), (1.0, 2.0), (3.0, 400.0)),
        ((1410,), (float("nan"),), (1.0,)),
    ],
)
def test_what_is_no_curve_is_refused(
    clocks: tuple[int, ...], times: tuple[float, ...], energies: tuple[float, ...]
) -> None:
    """Unequal columns, none at all, wrong order, and NaN."""
    with pytest.raises(InputError, match="tradeoff curve"):
        TradeoffCurve(clocks, times, energies, 80.0)
