"""When a GPU changed its clock, from how long it took to count the same number of cycles again and again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from perseus_core.gpu.slices import Slice

# So many slices tell the clock before the change, and as many that it lasts.
NUM_BEFORE = NUM_LASTING = 5
# A change must be this much, relative, and so many times what slices at one clock differ by.
_SMALLEST = 0.03
_SCATTERS = 4.0
_STD_PER_MAD = 1.48
# Of what was asked for, the change must be this much at least and at most: power may hold a clock below, and work
# beside may lengthen slices.
_OBEYED = (0.4, 1.6)
# So many slices in ten may be on the wrong side of the change.
_ONE_WRONG_IN = 10
# A slice whose length lies further than this between the two, as a share of their difference, saw the change itself.
_MIXED = 0.15


@dataclass(frozen=True)
class SeenChange:
    """A change of clock that a GPU has shown.

    Attributes:
        after_s: from asking for it. Never too short; too long by as much as no slice was counted before.
        is_up: the clock is higher.
    """

    after_s: float
    is_up: bool


def change_seen(slices: Sequence[Slice], asked_s: float, asked_ratio: float | None = None) -> SeenChange | None:
    """The change that the slices show, if they show one that lasts and only one.

    Slices may lie back to back or apart, from before the change on: the first `NUM_BEFORE` must have been counted at
    the clock before, though they may end after asking. Work beside may make single slices too long, never too short.

    Args:
        slices: in order.
        asked_s: when the change was asked for, on the slices' clock.
        asked_ratio: of the clock that was asked for to the one before; none if that is not known.

    Returns:
        None where no change shows, not yet or not clearly.
    """
    if len(slices) < NUM_BEFORE + NUM_LASTING:
        return None
    durations_s = [one.end_s - one.begin_s for one in slices]
    first, last = durations_s[:NUM_BEFORE], durations_s[-NUM_LASTING:]
    before_s, after_s = median(first), median(last)
    if min(before_s, after_s) <= 0 or not _is_a_change(before_s, after_s, first, last, asked_ratio):
        return None
    is_up = after_s < before_s
    limit_s = math.sqrt(before_s * after_s)
    is_new = [(duration_s < limit_s) == is_up for duration_s in durations_s]
    place = _split(is_new, is_up)
    if place is None:
        return None
    moment_s = slices[place].begin_s
    for one in (place - 1, place):
        # Of its cycles, this share was counted before the change.
        share = (durations_s[one] - after_s) / (before_s - after_s)
        if _MIXED < share < 1 - _MIXED:
            moment_s = slices[one].begin_s + share * before_s
            break
    return SeenChange(moment_s - asked_s, is_up) if moment_s > asked_s else None


def _is_a_change(
    before_s: float, after_s: float, first: Sequence[float], last: Sequence[float], asked_ratio: float | None
) -> bool:
    change = math.log(before_s / after_s)
    scatter = _STD_PER_MAD * max(
        median(abs(one - before_s) for one in first) / before_s, median(abs(one - after_s) for one in last) / after_s
    )
    if abs(change) < max(_SMALLEST, _SCATTERS * scatter):
        return False
    if asked_ratio is None or asked_ratio == 1:
        return True
    return _OBEYED[0] <= change / math.log(asked_ratio) <= _OBEYED[1]


def _split(is_new: Sequence[bool], is_up: bool) -> int | None:
    """The place of the first slice after the change; None where too many would be on the wrong side of it.

    Of equally good places the one that takes long slices for the disturbed ones.
    """
    num_wrong = sum(not new for new in is_new)  # if all were after the change
    best, places = num_wrong, [0]
    for place, new in enumerate(is_new, start=1):
        num_wrong += 1 if new else -1
        if num_wrong < best:
            best, places = num_wrong, [place]
        elif num_wrong == best:
            places.append(place)
    place = places[0] if is_up else places[-1]
    if best > len(is_new) // _ONE_WRONG_IN or not NUM_BEFORE // 2 < place <= len(is_new) - NUM_LASTING:
        return None
    return place
