"""Colours, the same in figures and on pages.

Ramps are cut from ColorBrewer's YlGnBu and YlOrRd (Harrower and Brewer, 2003): lightness falls steadily from low to
high, so they survive colour-blind eyes and grey printers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Colour = Literal["clock", "power"]
"""What the colours of a timeline show."""


@dataclass(frozen=True)
class Ramp:
    """How a quantity is coloured.

    Attributes:
        label: the quantity, with its unit.
        stops: colours from the lowest to the highest value, evenly spaced.
        critical_path: a line colour that stands out from all of them.
    """

    label: str
    stops: tuple[str, ...]
    critical_path: str


RAMPS: dict[Colour, Ramp] = {
    "clock": Ramp(
        "SM clock [MHz]",
        ("#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494"),
        "#d9480f",
    ),
    "power": Ramp(
        "Power of one GPU [W]",
        ("#ffeda0", "#fed976", "#feb24c", "#fd8d3c", "#fc4e2a", "#e31a1c", "#a50026"),
        "#1c3f95",
    ),
}

INK = "#1f2328"
FAINT_INK = "#59636e"
WAITING = "#eceef1"
GRID = "#dfe2e6"

FRONTIER = "#225ea8"
CHOSEN = "#d9480f"
# Lines and markers of baselines, in turn (Okabe and Ito, 2008): markers differ too, colour is never alone.
BASELINES = (("#009e73", "s"), ("#cc79a7", "D"), ("#b07d00", "^"), ("#56b4e9", "v"), ("#7f7f7f", "P"))
