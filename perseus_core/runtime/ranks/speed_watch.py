"""Sees from the measurements that a GPU has become slower (or fast again) than its profile says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# How many iterations in a row before anything but a log line follows; twice as many after each reaction. Where the GPU
# itself says that it is held down fewer will do than where anything may have disturbed it.
_REACTION_ITERATIONS = 3
_UNEXPLAINED_FACTOR = 3
# As a share; what is so much slower is no disturbance, or costs too much to wait and see.
_FAR_SLOWER = 0.15
_MOST_REACTION_ITERATIONS = 200
# Ranks of a stage that differ by less are as slow as each other, as a share.
_AS_SLOW = 0.02


@dataclass(frozen=True)
class SlowRank:
    """A GPU that is slower than its profile.

    Attributes:
        rank: which.
        stage: its stage.
        iteration: in which iteration it was seen.
        seen_s: sum of its instructions' durations.
        expected_s: what that sum should be.
        throttled: the GPU says that power or heat holds its clock down.
    """

    rank: int
    stage: int
    iteration: int
    seen_s: float
    expected_s: float
    throttled: bool

    @property
    def slowness(self) -> float:
        """By which share it is slower than expected."""
        return self.seen_s / self.expected_s - 1


class SpeedWatch:
    """Compares every rank's speed with what is expected of it, and, while nobody sets clocks, with what it was before.

    Attributes:
        has_changed: a stage has been slower, or faster, than expected for some iterations in a row.
        was_fine: in some iteration since `suspect` no rank was slower than expected.
    """

    def __init__(self, stages: NDArray[np.int32], threshold: float) -> None:
        """Nothing seen yet.

        Args:
            stages: the stage of each rank.
            threshold: share of deviation that counts. Kernels vary by a per cent or so; heat costs ten and more.
        """
        self._threshold = threshold
        self.has_changed = False
        self.was_fine = True
        self._stages = stages
        self._num_stages = int(stages.max()) + 1
        self._streaks = np.zeros(self._num_stages, np.int64)
        self._flagged = np.zeros(len(stages), bool)
        self._newest: SlowRank | None = None
        self._has_slowed = False
        self._patience = _REACTION_ITERATIONS
        self._unlocked: list[NDArray[np.float64]] = []
        self._unlocked_before: NDArray[np.float64] | None = None
        self._unlocked_ratio: NDArray[np.float64] | None = None

    @property
    def slow_ranks(self) -> tuple[int, ...]:
        """Ranks that were last seen slower than expected."""
        return tuple(np.flatnonzero(self._flagged).tolist())

    def note(self, iteration: int, seen_s: ArrayLike, expected_s: ArrayLike, throttled: ArrayLike) -> SlowRank | None:
        """Takes in one iteration; returns the slowest rank if it has not been called slow before.

        Args:
            iteration: which.
            seen_s: sum of each rank's instructions' durations.
            expected_s: what that sum should be, 0 if nothing is expected.
            throttled: the rank's GPU says that power or heat holds its clock down.
        """
        seen, expected, held = np.asarray(seen_s, float), np.asarray(expected_s, float), np.asarray(throttled, bool)
        is_expected = expected > 0
        slowness = np.divide(seen, expected, out=np.ones_like(seen), where=is_expected) - 1
        self._flagged &= ~(is_expected & (slowness <= self._threshold))
        # What is expected of a stage is the time of its slowest rank: others may always be faster.
        of_stage = np.full(self._num_stages, -1.0)
        np.maximum.at(of_stage, self._stages, slowness)
        explained = np.zeros(self._num_stages, bool)
        explained[self._stages[held]] = True
        self._streaks = np.where(np.abs(of_stage) > self._threshold, self._streaks + 1, 0)
        soon = explained | (of_stage > _FAR_SLOWER) | (not self.was_fine)
        patience = self._patience * np.where(soon, 1, _UNEXPLAINED_FACTOR)
        has_changed = self._streaks >= patience
        self.has_changed = bool(has_changed.any())
        self._has_slowed = bool((has_changed & (of_stage > 0)).any()) if self.has_changed else self._has_slowed
        slowest = int(slowness.argmax())
        # Tensor-parallel ranks end together with the slowest of them: the one whose GPU says why is meant.
        as_slow = (self._stages == self._stages[slowest]) & (slowness > slowness[slowest] - _AS_SLOW)
        as_slow &= slowness > self._threshold
        if (as_slow & held).any():
            slowest = int((as_slow & held).argmax())
        if slowness[slowest] <= self._threshold:
            self._newest = None
            self.was_fine = True
            return None
        self._newest = SlowRank(
            slowest,
            int(self._stages[slowest]),
            iteration,
            float(seen[slowest]),
            float(expected[slowest]),
            bool(held[slowest]),
        )
        if self._flagged[slowest]:
            return None
        self._flagged[slowest] = True
        return self._newest

    def skip(self) -> None:
        """An iteration that tells nothing."""
        self._streaks[:] = 0
        self.has_changed = False

    def react(self) -> None:
        """Something is done about it. Patience grows: a GPU that comes and goes should not keep all others busy."""
        self._patience = min(2 * self._patience, _MOST_REACTION_ITERATIONS)
        self.skip()

    def suspect(self) -> None:
        """If it goes on like this without a fine iteration between, something must be done about it at once."""
        self._patience = _REACTION_ITERATIONS
        self.was_fine = False

    def forget(self) -> None:
        """What is expected has changed."""
        self.skip()
        self._flagged[:] = False
        self._newest = None
        self.was_fine = True

    # While nobody sets clocks

    def note_unlocked(self, seen_s: ArrayLike) -> None:
        """Takes in the sums of durations of an iteration in which drivers chose the clocks."""
        self._unlocked.append(np.asarray(seen_s, float))

    def forget_unlocked(self) -> None:
        """These iterations cannot be compared with others."""
        self._unlocked.clear()

    def end_unlocked(self, *, is_comparable: bool = True) -> None:
        """A plan, or a sweep, follows: what was taken in is compared with what was taken in before the last one.

        Args:
            is_comparable: the iterations are as long as those were.
        """
        if not self._unlocked:
            self._unlocked_ratio = None
            return
        now, before = np.median(self._unlocked, axis=0), self._unlocked_before if is_comparable else None
        is_known = (now > 0) & (False if before is None else before > 0)
        self._unlocked_ratio = None if before is None or not is_known.all() else now / before
        self._unlocked_before = now
        self._unlocked.clear()

    @property
    def is_over(self) -> bool:
        """Whether what was slow for some iterations in a row was as fast as expected in the last one."""
        return self._has_slowed and self._newest is None

    def slow_at_set_clocks_only(self) -> SlowRank | None:
        """The slowest rank, where nothing holds its clock down and it was as fast as before when nobody set it."""
        slow, ratio = self._newest, self._unlocked_ratio
        if slow is None or slow.throttled or ratio is None:
            return None
        is_as_before = abs(ratio[slow.rank] - 1) <= min(self._threshold, slow.slowness / 2)
        return slow if is_as_before else None

    @property
    def may_be_faster_unlocked(self) -> bool:
        """Whether a rank was faster than before when nobody set clocks, or nobody knows."""
        return self._unlocked_ratio is None or bool((self._unlocked_ratio < 1 - self._threshold / 2).any())
