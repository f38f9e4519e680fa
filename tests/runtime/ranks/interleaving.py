"""Side threads that stop before each call of the store, so that a test can have their calls in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from perseus_core.runtime.ranks.store import Store
from perseus_core.runtime.side_threads import Awaited


class Interleaved:
    """Calls a side thread's `step` again and again, from one call of the store to the next each time it is let on.

    Attributes:
        has_ended: `step` has returned None.
        error: what it raised instead.
        stands_before: name of the call of the store that it does next.
    """

    def __init__(self, store: Store) -> None:
        """Stands still until `advance`; its store is `self.store`."""
        self.has_ended = False
        self.error: BaseException | None = None
        self.stands_before = ""
        self.store: Any = _StoppingStore(store, self._stop_here)
        self._step: Callable[[], float | Awaited | None] | None = None
        self._may_go_on, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._is_over = False

    def begin(self, step: Callable[[], float | Awaited | None]) -> None:
        """From now on it can be let on."""
        self._step = step
        threading.Thread(target=self._run, daemon=True).start()

    def advance(self) -> None:
        """Lets it do the call of the store before which it stands, and all else up to the next one."""
        if self.has_ended or self.error is not None:
            return
        self._may_go_on.release()
        assert self._stands.acquire(timeout=60), "it does not come to its next call of the store"

    def stop(self) -> None:
        """It ends wherever it stands."""
        self._is_over = True
        self._may_go_on.release()

    def _run(self) -> None:
        assert self._step is not None
        try:
            self._wait_to_be_let_on()
            while self._step() is not None:
                pass
            self.has_ended = True
        except _Stopped:
            return
        except BaseException as error:
            self.error = error
        self._stands.release()

    def _stop_here(self, call: str) -> None:
        self.stands_before = call
        self._stands.release()
        self._wait_to_be_let_on()

    def _wait_to_be_let_on(self) -> None:
        self._may_go_on.acquire()
        if self._is_over:
            raise _Stopped


class _Stopped(BaseException):
    """No error of what runs: the test is over."""


class _StoppingStore:
    def __init__(self, store: Store, stop: Callable[[str], None]) -> None:
        self._store = store
        self._stop = stop

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)

        def stop_and_call(*arguments: Any) -> Any:
            self._stop(name)
            return call(*arguments)

        return stop_and_call
