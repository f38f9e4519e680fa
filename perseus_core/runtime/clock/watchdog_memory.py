"""A few words of memory that a training process and the watchdog of its clock share."""

from __future__ import annotations

import ctypes
import mmap
import os

_TRAINING_BEAT_S, _WATCHDOG_BEAT_S, _WATCHDOG_PID, _MAY_BE_LOCKED, _TIMES_GIVEN_BACK, _MAY_LEAVE = range(6)
_BYTES = 4096


class WatchdogMemory:
    """Numbers, each written by one side only and read by the other without a lock.

    Each is one aligned store of eight bytes, so nobody sees half a number.
    """

    def __init__(self, descriptor: int) -> None:
        """Opens the memory behind a descriptor, which stays open."""
        self.descriptor = descriptor
        self._words = _map(descriptor)

    @classmethod
    def create(cls) -> WatchdogMemory:
        """New memory without a name in any file system: nothing is left behind whoever is killed."""
        descriptor = os.memfd_create("perseus-watchdog")
        os.ftruncate(descriptor, _BYTES)
        return cls(descriptor)

    @property
    def training_beat_s(self) -> float:
        """When training last showed a sign of life [s, `time.monotonic`]. Written by the training process."""
        return self._words[_TRAINING_BEAT_S]

    @training_beat_s.setter
    def training_beat_s(self, time_s: float) -> None:
        self._words[_TRAINING_BEAT_S] = time_s

    @property
    def watchdog_beat_s(self) -> float:
        """When the watchdog last looked [s, `time.monotonic`], 0 before it does. Written by the watchdog."""
        return self._words[_WATCHDOG_BEAT_S]

    @watchdog_beat_s.setter
    def watchdog_beat_s(self, time_s: float) -> None:
        self._words[_WATCHDOG_BEAT_S] = time_s

    @property
    def watchdog_pid(self) -> int:
        """The watchdog's process number, written by it; set to 0 by the training process before it starts one."""
        return int(self._words[_WATCHDOG_PID])

    @watchdog_pid.setter
    def watchdog_pid(self, pid: int) -> None:
        self._words[_WATCHDOG_PID] = pid

    @property
    def may_be_locked(self) -> bool:
        """Whether there is a clock to give back. Written by the training process: before it locks, after it resets."""
        return self._words[_MAY_BE_LOCKED] != 0

    @may_be_locked.setter
    def may_be_locked(self, value: bool) -> None:
        self._words[_MAY_BE_LOCKED] = value

    @property
    def times_given_back(self) -> int:
        """How often the watchdog has reset the clock, counted after each reset. Written by the watchdog."""
        return int(self._words[_TIMES_GIVEN_BACK])

    @times_given_back.setter
    def times_given_back(self, count: int) -> None:
        self._words[_TIMES_GIVEN_BACK] = count

    @property
    def may_leave(self) -> bool:
        """Whether the watchdog is no longer needed. Written by the training process."""
        return self._words[_MAY_LEAVE] != 0

    @may_leave.setter
    def may_leave(self, value: bool) -> None:
        self._words[_MAY_LEAVE] = value


def _map(descriptor: int) -> memoryview[float]:
    """The memory behind a descriptor, for as long as the process lives (`man 2 mmap`).

    Python's own `mmap` keeps a second descriptor open, which some jobs have none left for.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    address = libc.mmap(None, _BYTES, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "the watchdog's memory cannot be mapped")
    return memoryview((ctypes.c_char * _BYTES).from_address(address)).cast("B").cast("d")
