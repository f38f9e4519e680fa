"""Puts together what the ranks tell of the same iteration, though some tell it one heartbeat later than others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from perseus_core.runtime.ranks.heartbeat import NONE, Heartbeat


class IterationStream:
    """Every rank tells of every iteration once, in order."""

    def __init__(self, num_ranks: int) -> None:
        """Nothing told yet."""
        self._told: list[deque[tuple[int, Heartbeat]]] = [deque() for _ in range(num_ranks)]

    def add(self, iterations: Sequence[float], beats: Sequence[Heartbeat]) -> Iterator[tuple[int, Sequence[Heartbeat]]]:
        """Takes in one heartbeat of each rank; yields the iterations that all ranks have now told of, in order.

        Args:
            iterations: for each rank the iteration that its heartbeat tells of, or `NONE`.
            beats: the heartbeats.
        """
        for told, iteration, beat in zip(self._told, iterations, beats, strict=True):
            if iteration != NONE:
                told.append((int(iteration), beat))
        while all(self._told):
            # A rank that could not measure an iteration leaves it out.
            newest_first = max(told[0][0] for told in self._told)
            for told in self._told:
                while told and told[0][0] < newest_first:
                    told.popleft()
            if all(told and told[0][0] == newest_first for told in self._told):
                yield newest_first, [told.popleft()[1] for told in self._told]
