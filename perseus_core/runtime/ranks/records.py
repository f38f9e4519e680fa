"""What ranks tell rank 0: records of a fixed size, so that those of all ranks together are one array.

Ranks append their records to one key of the store; rank 0 reads it in one go and works on columns. Four kinds:

- `HELLO`, once: this rank takes part, and where it stands in the job;
- `STATE`, whenever it is another than before: what this rank can do and has done;
- `TIME`, once for each iteration: how long it took on this rank;
- `ENERGY`, once for each iteration, later: what this rank's GPU used in it.

Every record may arrive twice and then counts once.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseus_core import __version__

Records = NDArray[Any]
"""Shape (records,), of `RECORD`."""

RECORD = np.dtype(
    [
        ("rank", "<u4"),
        ("kind", "u1"),
        ("flags", "u1"),
        ("count", "<u2"),
        ("iteration", "<i4"),
        ("a", "<f4"),
        ("b", "<f4"),
        ("c", "<f4"),
    ]
)
_FORMAT = struct.Struct("<IBBHifff")
assert _FORMAT.size == RECORD.itemsize

VERSION = zlib.crc32(f"perseus {__version__} {RECORD.descr}".encode()) & 0xFFFFFF
"""Ranks whose versions differ do not understand each other. Below 2^24, so that a 32-bit float holds it."""


class RecordKind(IntEnum):
    """What a record tells."""

    HELLO = 1
    STATE = 2
    TIME = 3
    ENERGY = 4


class StateFlag(IntFlag):
    """What is true of a rank."""

    READY = 1
    """It has looked for its GPU, and found one or not."""
    CAN_LOCK = 2
    FAILED = 4
    LEFT = 8
    SWEPT = 16
    """It has measured all clocks it needs."""


@dataclass(frozen=True)
class RankState:
    """What rank 0 needs to know of a rank.

    Attributes:
        ready: it has looked for its GPU, and found one or not.
        can_lock: its clock can be set.
        failed: its session has given up.
        left: its session has been closed.
        swept: it has measured all clocks it needs.
        reported: number of the newest collection for which its measurements are in the store.
        received: number of the newest plan that has arrived there.
        straggler_slowdown: T'/T that it was told, 1 for none.
        unlocked_mhz: the clock that its GPU held at unlocked clocks; 0 while not known.
        gpu_kind: a number, below 2^31, that GPUs of one kind have in common; 0 while not known.
    """

    ready: bool = False
    can_lock: bool = False
    failed: bool = False
    left: bool = False
    swept: bool = False
    reported: int = 0
    received: int = 0
    straggler_slowdown: float = 1.0
    unlocked_mhz: int = 0
    gpu_kind: int = 0

    @property
    def flags(self) -> StateFlag:
        """The yes-or-no parts."""
        flags = StateFlag(0)
        for flag, holds in (
            (StateFlag.READY, self.ready),
            (StateFlag.CAN_LOCK, self.can_lock),
            (StateFlag.FAILED, self.failed),
            (StateFlag.LEFT, self.left),
            (StateFlag.SWEPT, self.swept),
        ):
            if holds:
                flags |= flag
        return flags


def hello(rank: int, stage: int, data_parallel_rank: int) -> bytes:
    """This rank takes part."""
    return _FORMAT.pack(rank, RecordKind.HELLO, 0, 0, stage, data_parallel_rank, VERSION, 0)


def state(rank: int, now: RankState) -> bytes:
    """What is true of this rank from now on."""
    return _FORMAT.pack(
        *(rank, RecordKind.STATE, now.flags, now.unlocked_mhz, now.gpu_kind),
        *(now.reported, now.received, min(now.straggler_slowdown, 1e30)),
    )


def iteration_time(
    rank: int, iteration: int, num_microbatches: int, span_s: float, seen_s: float, expected_s: float, throttled: bool
) -> bytes:
    """How long an iteration took on this rank.

    Args:
        rank: this one.
        iteration: which.
        num_microbatches: of the iteration; 0 if it was an evaluation or ran in an order of its own.
        span_s: from its begin to its end.
        seen_s: sum of its instructions' durations.
        expected_s: what that sum should be; 0 if nothing is expected.
        throttled: power or heat held the clock down.
    """
    return _FORMAT.pack(rank, RecordKind.TIME, throttled, num_microbatches, iteration, span_s, seen_s, expected_s)


def iteration_energy(rank: int, iteration: int, energy_j: float) -> bytes:
    """Energy of this rank's GPU in an iteration; 0 where it could not be read."""
    return _FORMAT.pack(rank, RecordKind.ENERGY, 0, 0, iteration, energy_j, 0, 0)


def as_records(content: bytes) -> Records:
    """The records in what was read from the store; what is left of a broken one at the end is passed over."""
    return np.frombuffer(content, RECORD, len(content) // RECORD.itemsize)
