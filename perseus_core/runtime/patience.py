"""How long a driver's calls may fail before it counts: some errors come and go, and shall not cost a job its saving."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from perseus_core.gpu.errors import CallFailed

T = TypeVar("T")

# A driver that is busy, or reset, is back by then.
LIMIT_S = 10.0
RETRY_S = 0.01


class Patience:
    """Bears calls that fail for a reason that may pass, until none has succeeded for some time. For one thread."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        """Nothing has failed yet."""
        self._limit_s = limit_s
        self._failing_since_s: float | None = None

    def bear(self, error: CallFailed, now_s: float) -> float:
        """A call has failed; returns how long to wait before the next one.

        Raises:
            CallFailed: this one, if calls have failed for too long.
        """
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        if now_s - self._failing_since_s >= self._limit_s:
            raise error
        return RETRY_S

    def succeeded(self) -> None:
        """A call has done what it should."""
        self._failing_since_s = None


def patiently(
    call: Callable[[], T],
    *,
    limit_s: float = LIMIT_S,
    now_s: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Calls until that does not fail for a reason that may pass. In a side thread: it may take as long as the limit.

    Raises:
        CallFailed: if it has failed for too long.
    """
    patience = Patience(limit_s)
    while True:
        try:
            return call()
        except CallFailed as error:
            sleep(patience.bear(error, now_s()))
