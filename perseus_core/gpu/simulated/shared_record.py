"""A small record in a memory-mapped file that several processes read and change, one at a time.

A process that is killed at any instruction leaves a whole record and a free lock behind: the lock is a `flock`, which
the kernel releases, and a new content becomes valid only by the last store, that of the version number.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perseus_core.errors import InputError

_VERSION = struct.Struct("<Q")  # the slot (version modulo 2) holds the valid content
_LENGTH = struct.Struct("<I")
_HEADER_BYTES = 16
_SLOT_BYTES = 16 * 1024
_FILE_BYTES = _HEADER_BYTES + 2 * _SLOT_BYTES

_open_records: weakref.WeakSet[SharedRecord] = weakref.WeakSet()


class SharedRecord:
    """One record of up to 16 KiB, shared by every process that opens the same file.

    Raises:
        InputError: if the file is not such a record.
    """

    def __init__(self, path: Path) -> None:
        """Opens a record that `create` made."""
        self._path = path
        self._thread_lock = threading.Lock()
        self._descriptor = self._open()
        if os.fstat(self._descriptor).st_size != _FILE_BYTES:
            os.close(self._descriptor)
            raise InputError(f"{path}: is not the state of a simulated GPU; create it again")
        self._memory = mmap.mmap(self._descriptor, _FILE_BYTES)
        _open_records.add(self)

    @classmethod
    def create(cls, path: Path, content: bytes) -> SharedRecord:
        """Makes the file with a first content."""
        path.write_bytes(bytes(_FILE_BYTES))
        record = cls(path)
        with record.locked():
            record.write(content)
        return record

    def version(self) -> int:
        """Changes with every write. Costs no lock: for cheap polling."""
        version: int = _VERSION.unpack_from(self._memory, 0)[0]
        return version

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other thread and process out."""
        # A flock belongs to the open file, which the threads of a process share; hence the second lock.
        with self._thread_lock:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def read(self) -> bytes:
        """The content. Call it inside `locked`."""
        start = self._slot_start(self.version())
        length = _LENGTH.unpack_from(self._memory, start)[0]
        return self._memory[start + _LENGTH.size : start + _LENGTH.size + length]

    def write(self, content: bytes) -> None:
        """Replaces the content as a whole or not at all. Call it inside `locked`."""
        if len(content) > _SLOT_BYTES - _LENGTH.size:
            raise InputError(f"{self._path}: {len(content)} bytes do not fit into the state of a simulated GPU")
        version = self.version() + 1
        start = self._slot_start(version)
        _LENGTH.pack_into(self._memory, start, len(content))
        self._memory[start + _LENGTH.size : start + _LENGTH.size + len(content)] = content
        _VERSION.pack_into(self._memory, 0, version)

    @staticmethod
    def _slot_start(version: int) -> int:
        return _HEADER_BYTES + (version % 2) * _SLOT_BYTES

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(
                f"{self._path}: cannot be opened ({error.strerror}); are the simulated GPUs gone?"
            ) from None

    def _reopen_in_child(self) -> None:
        """A forked child shares the parent's open file, and with it the lock; it needs its own."""
        os.close(self._descriptor)
        self._thread_lock = threading.Lock()
        self._descriptor = self._open()


def _reopen_all_in_child() -> None:
    for record in list(_open_records):
        record._reopen_in_child()


os.register_at_fork(after_in_child=_reopen_all_in_child)
