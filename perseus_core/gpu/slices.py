"""What a GPU itself tells of its clock: how long it takes to count a fixed number of SM cycles.

The driver's register may lag or hold what was asked for. A count is what the clock really was.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Slice(NamedTuple):
    """From begin to end [s, `time.monotonic`] a GPU has counted a number of cycles that is always the same."""

    begin_s: float
    end_s: float


class Slices(Protocol):
    """Has one GPU count, beside whatever else it does. For one thread."""

    def begin(self) -> None:
        """Gives the GPU a slice to count, and waits for nothing."""

    def finished(self) -> list[Slice]:
        """All that were counted since `forget`, in order; empty while their time on the host's clock is not known."""

    def forget(self) -> None:
        """What was begun until now is of no interest any more."""
