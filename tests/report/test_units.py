"""Numbers as people read them."""

from __future__ import annotations

import pytest

from perseus_core.report.units import Scale, percent, quantity


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (11945.8, "J", "11.95 kJ"),
        (0.0512, "s", "51.20 ms"),
        (4321.0, "s", "4321 s"),
        (0.0, "J", "0.000 J"),
        (-0.5, "J", "−500.0 mJ"),
        (2.5e9, "J", "2.500 GJ"),
    ],
)
def test_four_significant_digits(value, unit, shown):
    """The prefix keeps a number short; seconds are never kiloseconds; a minus is a minus sign."""
    assert quantity(value, unit) == shown


def test_a_column_has_one_scale():
    """The largest value sets unit and decimals for all; None does not count."""
    scale = Scale.of([12.0, 3456.0, None], "J")
    assert [scale.number(v) for v in (12.0, 3456.0, None)] == ["0.012", "3.456", "—"]


def test_a_zero_has_no_sign():
    """A slowdown that rounds to nothing is not negative."""
    assert percent(-1e-7) == "0.00 %"
    assert percent(-0.0123) == "−1.23 %"
