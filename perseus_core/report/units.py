"""Numbers as people read them: three or four significant digits, with a prefix that keeps them short."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

NONE = "—"

_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


@dataclass(frozen=True)
class Scale:
    """One unit and one number of decimals for all values of a column or an axis.

    Attributes:
        factor: how many base units one of `unit` is.
        unit: with its prefix, for example `kJ`.
        decimals: digits after the point.
    """

    factor: float
    unit: str
    decimals: int

    @classmethod
    def of(cls, values: Iterable[float | None], base_unit: str, digits: int = 4) -> Scale:
        """The scale that shows the largest of these values with so many significant digits; None counts for nothing."""
        largest = max((abs(value) for value in values if value is not None), default=0.0)
        # Seconds are not counted in thousands of seconds.
        prefixes = [(factor, prefix) for factor, prefix in _PREFIXES if base_unit != "s" or factor <= 1]
        factor, prefix = next((p for p in prefixes if largest >= p[0]), (1.0, ""))
        shown = largest / factor
        whole_digits = math.floor(math.log10(shown)) + 1 if shown > 0 else 1
        return cls(factor, prefix + base_unit, max(0, digits - max(1, whole_digits)))

    def number(self, value: float | None) -> str:
        """The value in this unit, without the unit."""
        return NONE if value is None else _signed(value / self.factor, self.decimals)

    def text(self, value: float | None) -> str:
        """The value with its unit."""
        return NONE if value is None else f"{self.number(value)} {self.unit}"


def quantity(value: float, base_unit: str, digits: int = 4) -> str:
    """One value with its unit: `quantity(11945.8, "J")` is `11.95 kJ`."""
    return Scale.of([value], base_unit, digits).text(value)


def percent(share: float | None, decimals: int = 2) -> str:
    """A share in percent: `percent(0.147)` is `14.70 %`."""
    return NONE if share is None else f"{_signed(100 * share, decimals)} %"


def _signed(value: float, decimals: int) -> str:
    """Fixed decimals with a real minus sign, and no minus before a zero."""
    text = f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")
