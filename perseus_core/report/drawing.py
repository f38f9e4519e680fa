"""The plotting library, found when it is needed, and the style all figures share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from perseus_core.errors import InputError
from perseus_core.report.palette import FAINT_INK, GRID, INK, Ramp

if TYPE_CHECKING:
    from matplotlib.colors import LinearSegmentedColormap

# Any: matplotlib's own types know every setting by name, each release its own.
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT_INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT_INK,
    "ytick.color": FAINT_INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    # The same figure gives the same file, so that files can be compared.
    "svg.hashsalt": "perseus",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Our style while a figure is drawn or saved, whatever the user's own settings.

    Raises:
        InputError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            'figures need matplotlib, which is not installed; install it with pip install "perseus-train[report]"'
        ) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def colour_map(ramp: Ramp) -> LinearSegmentedColormap:
    """The ramp as matplotlib wants it."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(ramp.label, ramp.stops)
