"""Sees from the measurements that a GPU has become slower (or fast again) than its profile says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# How many iterations in a row before anything but a log line follows; twice as many after each reaction. Where the GPU
# itself says that it is held down fewer will do than where anything may have disturbed it.
_REACTION_ITERATIONS = 3
_UNEXPLAINED_FACTOR = 3
_MOST_REACTION_ITERATIONS = 200


@dataclass(frozen=True)
class RankSpeed:
    """One rank in one iteration.

    Attributes:
        seen_s: sum of its instructions' durations.
        expected_s: what that sum should be, 0 if nothing is expected.
        throttled: the GPU says that power or heat holds its clock down.
    """

    seen_s: float
    expected_s: float
    throttled: bool

    @property
    def slowness(self) -> float:
        """By which share it is slower than expected; negative when faster."""
        return self.seen_s / self.expected_s - 1 if self.expected_s else 0.0


@dataclass(frozen=True)
class SlowRank:
    """A GPU that is slower than its profile.

    Attributes:
        rank: which.
        iteration: in which iteration it was seen.
        speed: what was seen.
    """

    rank: int
    iteration: int
    speed: RankSpeed


class SpeedWatch:
    """Compares every rank's speed with what is expected of it, iteration by iteration.

    Attributes:
        has_changed: a stage has been slower, or faster, than expected for some iterations in a row.
    """

    def __init__(self, stages: Sequence[int], threshold: float) -> None:
        """Nothing seen yet.

        Args:
            stages: the stage of each rank.
            threshold: share of deviation that counts. Kernels vary by a per cent or so; heat costs ten and more.
        """
        self._threshold = threshold
        self.has_changed = False
        self._stages = stages
        self._streaks: dict[int, int] = {}
        self._flagged: set[int] = set()
        self._patience = _REACTION_ITERATIONS

    @property
    def slow_ranks(self) -> tuple[int, ...]:
        """Ranks that were last seen slower than expected."""
        return tuple(sorted(self._flagged))

    def note(self, speeds: Sequence[RankSpeed], iteration: int) -> SlowRank | None:
        """Takes in one iteration; returns the slowest rank if it has not been called slow before."""
        # What is expected of a stage is the time of its slowest rank: others may always be faster.
        of_stage: dict[int, float] = {}
        explained: set[int] = set()
        for rank, (stage, speed) in enumerate(zip(self._stages, speeds, strict=True)):
            of_stage[stage] = max(of_stage.get(stage, -1.0), speed.slowness)
            if speed.throttled:
                explained.add(stage)
            if speed.expected_s and speed.slowness <= self._threshold:
                self._flagged.discard(rank)
        for stage, slowness in of_stage.items():
            self._streaks[stage] = self._streaks.get(stage, 0) + 1 if abs(slowness) > self._threshold else 0
        self.has_changed = any(
            streak >= self._patience * (1 if stage in explained else _UNEXPLAINED_FACTOR)
            for stage, streak in self._streaks.items()
        )
        slowest = max(range(len(speeds)), key=lambda rank: speeds[rank].slowness)
        if speeds[slowest].slowness <= self._threshold or slowest in self._flagged:
            return None
        self._flagged.add(slowest)
        return SlowRank(slowest, iteration, speeds[slowest])

    def skip(self) -> None:
        """An iteration that tells nothing."""
        self._streaks.clear()
        self.has_changed = False

    def react(self) -> None:
        """Something is done about it. Patience grows: a GPU that comes and goes should not keep all others busy."""
        self._patience = min(2 * self._patience, _MOST_REACTION_ITERATIONS)
        self.skip()

    def forget(self) -> None:
        """What is expected has changed."""
        self.skip()
        self._flagged.clear()
