"""The store through which the ranks talk: the rendezvous store that every torch job already has.

Nothing of ours is opened for it: no group, no listener, no connection. The job's own connection to its store takes
calls of any thread, one after another, and so does without a descriptor a rank, of which the store's host would need as
many as there are ranks. That asks for care: whatever holds the connection up holds up the job's own calls, and what
breaks it breaks theirs. So no call of ours waits for a key, and none sends more than the store takes at once.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

from perseus_core.errors import PerseusError

# TCPStore closes the connection of a client that sends more than 8 MiB at once.
MAX_BYTES = 4 * 2**20
# A value that no key of ours ever has.
_ABSENT = b"\0absent"


class StoreError(PerseusError):
    """The store cannot be reached any more."""


class Store(Protocol):
    """Keys and values that all ranks see. No call waits for another rank.

    Calls of one rank take effect in their order; those of different ranks need not, since `set` and `append` are not
    answered.
    """

    @property
    def is_hosted_here(self) -> bool:
        """Whether it ends with this process."""

    def append(self, key: str, value: bytes) -> None:
        """Adds to the end of a key's value."""

    def set(self, key: str, value: bytes) -> None:
        """Gives a key a value."""

    def read(self, key: str) -> bytes | None:
        """A key's value; None where it has none."""

    def delete(self, key: str) -> None:
        """Takes a key's value away."""

    def is_first(self, key: str) -> bool:
        """Whether nobody has asked this of the key before. For what only one rank shall do, whichever comes first."""


class TorchStore:
    """The store of a `torch.distributed` job, under a prefix of ours."""

    def __init__(self, store: Any, prefix: str) -> None:
        """Sends nothing yet.

        Args:
            store: a `torch.distributed.Store`, usually a `PrefixStore` of a `TCPStore`.
            prefix: begins all our keys; the same on all ranks.

        Raises:
            StoreError: if the store cannot append, as a FileStore cannot.
        """
        from torch.distributed import distributed_c10d

        if not getattr(store, "has_extended_api", lambda: False)():
            kind = type(_innermost(store)).__name__
            raise StoreError(
                f"the job's rendezvous store ({kind}) cannot append to a key; start the job with torchrun or env:// (a "
                "TCPStore)"
            )
        self._store: Any = distributed_c10d.PrefixStore(prefix, store)
        self._gone: StoreError | None = None
        # A TCPStore tells only in words whether it has a server beside its client.
        self.is_hosted_here = "server=TCPServer" in repr(_innermost(store))

    def append(self, key: str, value: bytes) -> None:
        """See `Store`."""
        self._call(self._store.append, key, value)

    def set(self, key: str, value: bytes) -> None:
        """See `Store`."""
        self._call(self._store.set, key, value)

    def read(self, key: str) -> bytes | None:
        """See `Store`. `get` would wait for a key without a value, up to the store's time limit."""
        value: bytes = self._call(self._store.compare_set, key, _ABSENT, _ABSENT)
        return None if value == _ABSENT else value

    def delete(self, key: str) -> None:
        """See `Store`."""
        self._call(self._store.delete_key, key)

    def is_first(self, key: str) -> bool:
        """See `Store`."""
        return bool(self._call(self._store.add, key, 1) == 1)

    def _call(self, call: Any, key: str, *values: Any) -> Any:
        if self._gone is not None:  # torch prints its own stack at each call on a connection that is gone
            raise self._gone
        if any(isinstance(value, bytes) and len(value) > MAX_BYTES for value in values):
            raise StoreError(f"{key}: more than the rendezvous store takes at once; please report")
        try:
            return call(key, *values)
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._gone = StoreError(f"the job's rendezvous store cannot be reached any more ({reason})")
            raise self._gone from error


class LocalStore:
    """A store for ranks of one process: a job of one rank, or a cluster in virtual time."""

    def __init__(self) -> None:
        """Empty."""
        self.is_hosted_here = True
        self._values: dict[str, bytearray] = {}
        self._lock = threading.Lock()

    def append(self, key: str, value: bytes) -> None:
        """See `Store`."""
        with self._lock:
            self._values.setdefault(key, bytearray()).extend(value)

    def set(self, key: str, value: bytes) -> None:
        """See `Store`."""
        with self._lock:
            self._values[key] = bytearray(value)

    def read(self, key: str) -> bytes | None:
        """See `Store`."""
        with self._lock:
            value = self._values.get(key)
            return None if value is None else bytes(value)

    def delete(self, key: str) -> None:
        """See `Store`."""
        with self._lock:
            self._values.pop(key, None)

    def is_first(self, key: str) -> bool:
        """See `Store`."""
        with self._lock:
            is_first = key not in self._values
            self._values.setdefault(key, bytearray(b"1"))
            return is_first


def job_store(prefix: str) -> TorchStore:
    """The store of this process's `torch.distributed` job.

    Raises:
        StoreError: if there is none that can be used.
    """
    try:
        import torch.distributed as dist
        from torch.distributed import distributed_c10d

        # A job launched by MPI has no store.
        store = distributed_c10d._get_default_store() if dist.is_initialized() else None
    except (ImportError, AttributeError, ValueError, KeyError) as error:
        raise StoreError(f"torch.distributed has no rendezvous store ({type(error).__name__}: {error})") from error
    if store is None:
        raise StoreError("torch.distributed has no rendezvous store; start the job with torchrun or env://")
    return TorchStore(store, prefix)


def _innermost(store: Any) -> Any:
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store
