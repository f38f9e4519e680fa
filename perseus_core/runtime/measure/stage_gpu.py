"""Which GPUs the stages of a job have: stages may have others than each other, and plans know each stage's clocks."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageGpu:
    """The GPUs of one stage.

    Attributes:
        kind: see `kind_of`; 0 while it is not known.
        supported_clocks_mhz: that can be set on it; empty while they are not known.
    """

    kind: int = 0
    supported_clocks_mhz: tuple[int, ...] = ()


UNKNOWN_GPU = StageGpu()


def kind_of(name: str, power_limit_w: float) -> int:
    """A number, below 2^31 and above 0, that GPUs of one product at one power limit have in common."""
    return _number(f"{name} at {power_limit_w:.0f} W")


def kind_of_all(kinds: Iterable[int]) -> int:
    """The same for GPUs of these kinds together: their own where they are all alike."""
    different = sorted(set(kinds))
    return different[0] if len(different) == 1 else _number(f"all of {different}")


def _number(text: str) -> int:
    return zlib.crc32(text.encode()) & 0x7FFFFFFF or 1
