"""How the ranks of a job tell each other what they measured, without any of them ever waiting for another for good.

Two things travel. A *row* is a few numbers, sent by every rank at the end of every iteration and read one or two
iterations later. A *parcel* is anything larger, such as measurements or a plan; all ranks start its journey after
reading the same row, so none waits for a journey that another never starts.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from perseus_core.errors import PerseusError

Row = NDArray[np.float64]

# A peer may sit in a checkpoint or an evaluation for minutes: that is not a fault.
_GROUP_TIMEOUT = timedelta(minutes=30)
# At the start all ranks are at the same place, or will never be.
_INTRODUCTION_LIMIT_S = 120.0
_POLL_S = 0.0005
_GONE = "another rank cannot be reached any more; it has probably ended"


class ExchangeError(PerseusError):
    """The other ranks cannot be reached any more."""


class Parcel(Protocol):
    """Something larger that is on its way."""

    def content(self) -> list[bytes] | None:
        """What arrived, or None while it is on its way.

        Raises:
            ExchangeError: if it cannot arrive any more.
        """


class Exchange(Protocol):
    """The connection to the other ranks. One thread uses it: the one that trains."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def world_size(self) -> int:
        """How many ranks there are."""

    def introduce(self, row: Row) -> Row:
        """Collects one row of every rank, shape (world_size, K). Waits for all: only for the start.

        Raises:
            ExchangeError: if they cannot be reached.
        """

    def send_row(self, row: Row) -> None:
        """Starts the journey of this rank's next row; every rank sends the same number of rows, all of one length."""

    def arrived_rows(self, wait_for: int, limit_s: float) -> list[Row]:
        """Rows of all ranks that were not handed out yet, oldest first, each of shape (world_size, K).

        Args:
            wait_for: up to which row (counted from the start); if it has not arrived, waits a little. Later rows are
                kept back even if they are here: they may not be elsewhere, and all ranks must act on the same rows.
            limit_s: how long to wait at most.

        Raises:
            ExchangeError: if they cannot arrive any more.
        """

    def collect(self, content: bytes, sizes: Sequence[int]) -> Parcel:
        """Sends a parcel to rank 0, which gets those of all ranks in their order; the others get an empty list.

        Args:
            content: of this rank.
            sizes: bytes that each rank sends, known to all from their rows.
        """

    def distribute(self, content: bytes | None, size: int) -> Parcel:
        """Sends rank 0's parcel to all ranks; each gets a list of one.

        Args:
            content: on rank 0.
            size: its bytes, known to all from its row.
        """

    def close(self, limit_s: float) -> None:
        """Leaves. Waits at most so long for what is still on its way."""


class InProcessExchange:
    """Ranks that are threads of one process, or take turns in one thread."""

    def __init__(self, rank: int, hub: _Hub) -> None:
        """Made by `in_process_exchanges`."""
        self.rank = rank
        self.world_size = hub.world_size
        self._hub = hub
        self._num_sent = self._num_read = self._num_parcels = 0

    def introduce(self, row: Row) -> Row:
        """See `Exchange`."""
        return self._hub.meet(("introduction", 0), self.rank, row.tobytes(), row)

    def send_row(self, row: Row) -> None:
        """See `Exchange`."""
        self._hub.put(("row", self._num_sent), self.rank, row.copy())
        self._num_sent += 1

    def arrived_rows(self, wait_for: int, limit_s: float) -> list[Row]:
        """See `Exchange`."""
        arrived = []
        deadline_s = time.monotonic() + limit_s
        while self._num_read < min(wait_for, self._num_sent):
            rows = self._hub.get(("row", self._num_read))
            if rows is not None:
                arrived.append(np.stack(rows))
                self._num_read += 1
            elif time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
            else:
                break
        return arrived

    def collect(self, content: bytes, sizes: Sequence[int]) -> Parcel:
        """See `Exchange`."""
        assert len(content) == sizes[self.rank], "the announced size is the real one"
        key = self._next_parcel()
        self._hub.put(key, self.rank, content)
        return _InProcessParcel(self._hub, key, everything=self.rank == 0)

    def distribute(self, content: bytes | None, size: int) -> Parcel:
        """See `Exchange`."""
        key = self._next_parcel()
        if content is not None:
            assert len(content) == size, "the announced size is the real one"
            self._hub.fill(key, content)
        return _InProcessParcel(self._hub, key, everything=False, first=True)

    def close(self, limit_s: float) -> None:
        """See `Exchange`."""

    def _next_parcel(self) -> tuple[str, int]:
        self._num_parcels += 1
        return "parcel", self._num_parcels


def in_process_exchanges(world_size: int) -> list[InProcessExchange]:
    """Connected exchanges of ranks 0 .. world_size - 1 in this process."""
    hub = _Hub(world_size)
    return [InProcessExchange(rank, hub) for rank in range(world_size)]


class LocalExchange(InProcessExchange):
    """A job of one rank."""

    def __init__(self) -> None:
        """Needs no torch."""
        super().__init__(0, _Hub(1))


class _Hub:
    """What ranks of one process have sent each other."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._lock = threading.Lock()
        self._sent: dict[tuple[str, int], list[Any]] = {}

    def put(self, key: tuple[str, int], rank: int, value: Any) -> None:
        with self._lock:
            self._sent.setdefault(key, [None] * self.world_size)[rank] = value

    def fill(self, key: tuple[str, int], value: Any) -> None:
        with self._lock:
            self._sent[key] = [value] * self.world_size

    def get(self, key: tuple[str, int]) -> list[Any] | None:
        with self._lock:
            values = self._sent.get(key)
            return None if values is None or any(value is None for value in values) else values

    def meet(self, key: tuple[str, int], rank: int, value: bytes, like: Row) -> Row:
        self.put(key, rank, value)
        while (values := self.get(key)) is None:
            time.sleep(_POLL_S)
        return np.stack([np.frombuffer(each, like.dtype) for each in values])


class _InProcessParcel:
    def __init__(self, hub: _Hub, key: tuple[str, int], *, everything: bool, first: bool = False) -> None:
        self._hub, self._key = hub, key
        self._everything, self._first = everything, first

    def content(self) -> list[bytes] | None:
        values = self._hub.get(self._key)
        if values is None:
            return None
        if self._everything:
            return values
        return values[:1] if self._first else []


class TorchExchange:
    """Ranks of a `torch.distributed` job, over gloo groups of our own. All ranks must make it, at the same place."""

    def __init__(self) -> None:
        """Needs an initialised `torch.distributed`.

        Raises:
            ExchangeError: if the groups cannot be made.
        """
        import torch
        import torch.distributed as dist

        self._torch, self._dist = torch, dist
        try:
            self._rows_group = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
            # Parcels may start in another order relative to rows on another rank: they need a group of their own.
            self._parcels_group = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise ExchangeError(f"torch.distributed has no gloo group for us: {error}") from error
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._rows: deque[tuple[Any, Any]] = deque()
        self._num_read = 0
        self._parcels: list[_TorchParcel] = []

    def introduce(self, row: Row) -> Row:
        """See `Exchange`."""
        work, received = self._start_gather(row)
        deadline_s = time.monotonic() + _INTRODUCTION_LIMIT_S
        while not work.is_completed():
            if time.monotonic() > deadline_s:
                raise ExchangeError(f"the other ranks have not opened their session within {_INTRODUCTION_LIMIT_S:g} s")
            time.sleep(_POLL_S)
        _finish(work)
        return np.asarray(received.numpy())

    def send_row(self, row: Row) -> None:
        """See `Exchange`."""
        self._rows.append(self._start_gather(row))

    def arrived_rows(self, wait_for: int, limit_s: float) -> list[Row]:
        """See `Exchange`."""
        arrived = []
        deadline_s = time.monotonic() + limit_s
        while self._rows and self._num_read < wait_for:
            work, received = self._rows[0]
            if work.is_completed():
                _finish(work)
                self._rows.popleft()
                self._num_read += 1
                arrived.append(np.asarray(received.numpy()))
            elif time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
            else:
                break
        return arrived

    def collect(self, content: bytes, sizes: Sequence[int]) -> Parcel:
        """See `Exchange`."""
        assert len(content) == sizes[self.rank], "the announced size is the real one"
        torch = self._torch
        sent = torch.zeros(max(sizes), dtype=torch.uint8)
        sent[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in sizes] if self.rank == 0 else None
        work = self._dist.gather(sent, received, dst=0, group=self._parcels_group, async_op=True)
        return self._remember(_TorchParcel(work, list(zip(received or (), sizes, strict=False)), sent))

    def distribute(self, content: bytes | None, size: int) -> Parcel:
        """See `Exchange`."""
        torch = self._torch
        if content is None:
            tensor = torch.empty(size, dtype=torch.uint8)
        else:
            assert len(content) == size, "the announced size is the real one"
            tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        work = self._dist.broadcast(tensor, src=0, group=self._parcels_group, async_op=True)
        return self._remember(_TorchParcel(work, [(tensor, size)], tensor))

    def close(self, limit_s: float) -> None:
        """See `Exchange`."""
        deadline_s = time.monotonic() + limit_s
        pending = [work for work, _ in self._rows] + [parcel.work for parcel in self._parcels]
        while not all(work.is_completed() for work in pending) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        if all(work.is_completed() for work in pending):
            self._rows.clear()
            for group in (self._rows_group, self._parcels_group):
                # The program may have destroyed all groups already.
                with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                    self._dist.destroy_process_group(group)
        else:
            _keep_for_ever(self._rows_group, self._parcels_group, *pending)

    def _start_gather(self, row: Row) -> tuple[Any, Any]:
        torch = self._torch
        sent = torch.from_numpy(row.copy())
        received = torch.empty((self.world_size, len(row)), dtype=torch.float64)
        try:
            work = self._dist.all_gather(list(received.unbind(0)), sent, group=self._rows_group, async_op=True)
        except (RuntimeError, ValueError) as error:
            raise ExchangeError(_GONE) from error
        return work, received

    def _remember(self, parcel: _TorchParcel) -> _TorchParcel:
        self._parcels = [known for known in self._parcels if not known.work.is_completed()] + [parcel]
        return parcel


class _TorchParcel:
    def __init__(self, work: Any, received: list[tuple[Any, int]], sent: Any) -> None:
        self.work = work
        self._received = received
        self._sent = sent  # must live until the journey ends

    def content(self) -> list[bytes] | None:
        if not self.work.is_completed():
            return None
        _finish(self.work)
        return [tensor[:size].numpy().tobytes() for tensor, size in self._received]


def _finish(work: Any) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise ExchangeError(_GONE) from error


def _keep_for_ever(*groups_and_operations: Any) -> None:
    """Never lets go of groups with an open operation: that would wait for a peer that hangs, up to the timeout.

    Nor of the operation. It ends when the peer does, and gloo's thread would then free its tensors: a thread that asks
    for Python's lock while Python is ending takes the process with it.
    """
    import ctypes

    for each in groups_and_operations:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
