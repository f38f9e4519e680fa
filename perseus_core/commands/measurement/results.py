"""What a step of the measurement returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np


class Standing(Enum):
    """How what was measured bears on what this package assumes."""

    AS_ASSUMED = "as assumed"
    DIFFERS = "differs"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Verdict:
    """What a step has found, for people.

    Attributes:
        standing: against what is assumed.
        sentence: the figures that matter, and what this package assumes of them.
    """

    standing: Standing
    sentence: str


class Result(Protocol):
    """Figures of one step: a frozen dataclass of numbers, texts, and lists of them."""

    @property
    def verdict(self) -> Verdict:
        """What they mean."""


class NotMeasured(Exception):  # noqa: N818 (named by what happened)
    """A step that cannot be done here; the message says why."""


@dataclass(frozen=True)
class Spread:
    """How long something took, many times over.

    Attributes:
        median_s, p05_s, p95_s, longest_s: of the times [s].
        count: how many there were.
    """

    median_s: float
    p05_s: float
    p95_s: float
    longest_s: float
    count: int

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Spread:
        """Of times [s].

        Raises:
            NotMeasured: if there are none.
        """
        if not times_s:
            raise NotMeasured("nothing was seen in the time there was; give it more --seconds-per-step")
        low, median, high = (float(value) for value in np.quantile(times_s, (0.05, 0.5, 0.95)))
        return cls(median, low, high, max(times_s), len(times_s))


def standing(*, as_assumed: bool) -> Standing:
    """Whether it is."""
    return Standing.AS_ASSUMED if as_assumed else Standing.DIFFERS


def ms(seconds: float) -> str:
    """Seconds as people read them."""
    return f"{1000 * seconds:.3g} ms"
