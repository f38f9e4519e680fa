"""What rank 0 knows of all ranks: columns with a place for each rank. Nothing here loops over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseus_core.runtime.ranks.records import VERSION, RecordKind, Records, StateFlag

# Iterations of which not all ranks have told are kept so long; one that died tells no more.
_MOST_PENDING = 64

TIME_COLUMNS = np.dtype(
    [("microbatches", "<u2"), ("throttled", "?"), ("span_s", "<f4"), ("seen_s", "<f4"), ("expected_s", "<f4")]
)


class IterationTable:
    """Puts together what the ranks tell of the same iteration, though some tell it later than others.

    Every rank tells of every iteration once, in order, and leaves out what it could not measure.
    """

    def __init__(self, num_ranks: int, dtype: Any) -> None:
        """Nothing told yet; `dtype` is that of one rank's values."""
        self._num_ranks = num_ranks
        self._dtype = np.dtype(dtype)
        self._pending: dict[int, tuple[NDArray[Any], NDArray[np.bool_]]] = {}
        self._newest_complete = -1

    def add(self, iterations: NDArray[np.int32], ranks: NDArray[np.uint32], values: NDArray[Any]) -> None:
        """Takes in what some ranks tell, each array of shape (n,)."""
        for iteration in np.unique(iterations).tolist():
            if iteration <= self._newest_complete:
                continue
            if iteration not in self._pending:
                self._pending[iteration] = np.zeros(self._num_ranks, self._dtype), np.zeros(self._num_ranks, bool)
            of_iteration = iterations == iteration
            told, has_told = self._pending[iteration]
            told[ranks[of_iteration]] = values[of_iteration]
            has_told[ranks[of_iteration]] = True
        for old in sorted(self._pending)[:-_MOST_PENDING]:
            del self._pending[old]

    def complete(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """The iterations of which all ranks have told since the last call, in order; values of shape (ranks,)."""
        for iteration in sorted(self._pending):
            told, has_told = self._pending[iteration]
            if has_told.all():
                self._newest_complete = iteration
                yield iteration, told
        for old in [i for i in self._pending if i <= self._newest_complete]:
            del self._pending[old]


class JobTable:
    """The newest word of every rank. Each attribute has shape (ranks,).

    Attributes:
        present: it takes part.
        same_version: and understands us.
        stage: its pipeline stage.
        ready, can_lock, failed, left, swept, reported, received, straggler_slowdown, unlocked_mhz, gpu_kind: see
            `RankState`.
        newest_iteration: the newest of which it has told the time, -1 for none.
        heard_s: when it was heard of last.
        times: iterations' times, `TIME_COLUMNS`.
        energies_j: iterations' energies.
    """

    def __init__(self, num_ranks: int) -> None:
        """Nobody was heard of yet."""
        self.present = np.zeros(num_ranks, bool)
        self.same_version = np.ones(num_ranks, bool)
        self.stage = np.zeros(num_ranks, np.int32)
        self.flags = np.zeros(num_ranks, np.uint8)
        self.reported = np.zeros(num_ranks, np.int64)
        self.received = np.zeros(num_ranks, np.int64)
        self.straggler_slowdown = np.ones(num_ranks, np.float64)
        self.unlocked_mhz = np.zeros(num_ranks, np.int64)
        self.gpu_kind = np.zeros(num_ranks, np.int64)
        self.newest_iteration = np.full(num_ranks, -1, np.int64)
        self.heard_s = np.zeros(num_ranks, np.float64)
        self.times = IterationTable(num_ranks, TIME_COLUMNS)
        self.energies_j = IterationTable(num_ranks, np.float32)

    def take_in(self, records: Records, now_s: float) -> None:
        """Takes in what came with one round, of any ranks, in the order in which it was told."""
        records = records[records["rank"] < len(self.present)]
        self.heard_s[records["rank"]] = now_s
        kinds = records["kind"]
        hellos = records[kinds == RecordKind.HELLO]
        self.present[hellos["rank"]] = True
        self.same_version[hellos["rank"]] = hellos["b"] == VERSION
        self.stage[hellos["rank"]] = hellos["iteration"]
        states = _last_of_each_rank(records[kinds == RecordKind.STATE])
        self.flags[states["rank"]] = states["flags"]
        self.reported[states["rank"]] = states["a"]
        self.received[states["rank"]] = states["b"]
        self.straggler_slowdown[states["rank"]] = states["c"]
        self.unlocked_mhz[states["rank"]] = states["count"]
        self.gpu_kind[states["rank"]] = states["iteration"]
        times = records[kinds == RecordKind.TIME]
        if len(times):
            np.maximum.at(self.newest_iteration, times["rank"], times["iteration"])
            told = np.zeros(len(times), TIME_COLUMNS)
            told["microbatches"], told["throttled"] = times["count"], times["flags"] > 0
            told["span_s"], told["seen_s"], told["expected_s"] = times["a"], times["b"], times["c"]
            self.times.add(times["iteration"], times["rank"], told)
        energies = records[kinds == RecordKind.ENERGY]
        self.energies_j.add(energies["iteration"], energies["rank"], energies["a"])

    def which(self, flag: StateFlag) -> NDArray[np.bool_]:
        """Of which ranks something is true, shape (ranks,)."""
        holds: NDArray[np.bool_] = (self.flags & int(flag)) != 0
        return holds

    def ranks_with(self, flag: StateFlag) -> tuple[int, ...]:
        """The ranks of which something is true."""
        return _places(self.which(flag))

    def ranks_without(self, flag: StateFlag) -> tuple[int, ...]:
        """The ranks of which something is not true."""
        return _places(~self.which(flag))

    def absent_ranks(self) -> tuple[int, ...]:
        """The ranks that do not take part, or do not understand us."""
        return _places(~(self.present & self.same_version))


def _places(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())


def _last_of_each_rank(records: Records) -> Records:
    """Where a rank has told more than once, its last word."""
    _, first_from_the_end = np.unique(records["rank"][::-1], return_index=True)
    last: Records = records[::-1][first_from_the_end]
    return last
