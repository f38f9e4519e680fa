"""What changes of a GPU's clock take: the one model of it, which plans are made for and the controller follows.

A change takes a latency (10 to 300 ms, up and down not the same) and comes a little too early or too late. It is asked
for ahead of the boundary between two instructions, so it costs something only where the one before it has not come yet,
or where it may come at the wrong moment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from perseus_core.errors import InputError

# A GPU's calls for changes take this share of the time at most: they hold up each other, and calls of others.
MOST_CALLING = 0.25


@dataclass(frozen=True)
class Switching:
    """What changes of a GPU's clock take, and how many there may be. The default: nothing, and any number.

    Attributes:
        up_s, down_s: from asking for a higher, or a lower, clock until it is in force.
        jitter_s: how much sooner or later it may come. A rise is asked for so much earlier and a fall so much later, so
            that nothing runs slower than planned.
        max_changes_per_s: of one GPU; none for any number.
        call_s: from asking until another change may be asked for, though the first be in force before.

    Raises:
        InputError: if one of them is negative or not a number, or a time is not finite.
    """

    up_s: float = 0.0
    down_s: float = 0.0
    jitter_s: float = 0.0
    max_changes_per_s: float | None = None
    call_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("up_s", "down_s", "jitter_s", "call_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"switching has {name} {getattr(self, name)}; it must be seconds, 0 or more")
        if self.max_changes_per_s is not None and not 0 <= self.max_changes_per_s < math.inf:
            raise InputError(f"switching has max_changes_per_s {self.max_changes_per_s}; it must be 0 or more")

    @property
    def is_free(self) -> bool:
        """Whether clocks change at once and as often as one likes."""
        return self == Switching()

    def as_seen(self, seen: SeenChanges) -> Switching:
        """With what was seen in the place of what was assumed, and no more changes than the calls for them allow."""
        most, call_s = self.max_changes_per_s, seen.call_s or self.call_s
        if most is not None and call_s:
            most = min(most, MOST_CALLING / call_s)
        return replace(
            self, up_s=seen.up_s or self.up_s, down_s=seen.down_s or self.down_s, call_s=call_s, max_changes_per_s=most
        )

    def lead_s(self, before_mhz: int, clock_mhz: int) -> float:
        """How long before a boundary between two clocks the second one is asked for."""
        return self.up_s + self.jitter_s if clock_mhz > before_mhz else max(0.0, self.down_s - self.jitter_s)

    def latency_s(self, before_mhz: int, clock_mhz: int) -> float:
        """From asking until the second clock is in force."""
        return self.up_s if clock_mhz > before_mhz else self.down_s

    def allows(self, num_changes: int, iteration_time_s: float) -> bool:
        """Whether one GPU may make so many changes in an iteration."""
        # What is meant by 10 changes in 0.3 s is 3.
        return self.max_changes_per_s is None or num_changes <= self.max_changes_per_s * iteration_time_s * (1 + 1e-9)


@dataclass(frozen=True)
class SeenChanges:
    """What changes of clock were seen to take; 0 where that was not seen yet.

    Attributes:
        up_s, down_s, call_s: as in `Switching`.
    """

    up_s: float = 0.0
    down_s: float = 0.0
    call_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("up_s", "down_s", "call_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"changes of clock were seen to have {name} {getattr(self, name)}; it must be 0 or more"
                )


NOTHING_SEEN = SeenChanges()
AT_ONCE = Switching()
# By so much a thread beside training predicts the end of an instruction wrong.
USUAL_JITTER_S = 0.001
# What seems to be more is a busy machine: plans that reckon with it save nothing.
MOST_JITTER_S = 0.02


def changes_per_iteration(clocks_of_stage: Sequence[int]) -> int:
    """Changes of clock that one stage makes in an iteration, the one back to its first clock included."""
    return sum(a != b for a, b in pairwise([*clocks_of_stage, clocks_of_stage[0]]))
