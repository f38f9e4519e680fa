"""Setting a GPU's clock only while it is certain to be given back.

How the clock comes back, case by case:

- normal end, exception, `sys.exit`, SIGINT: the interpreter runs `atexit`, and the controller stops (`controller`);
- SIGTERM, SIGKILL, `os._exit`, crash: the watchdog sees the process gone and resets the clock within a second;
- stopped by a debugger or SIGSTOP, or without a sign of life for longer than a limit: the watchdog resets the clock and
  counts it; when the process goes on it notices, and locks the clock again with its next instruction;
- a call of the driver that does not return: the clock is reset from another thread and no more calls are made;
- the watchdog itself killed: another is started within a second; when that goes on, the clock is given back;
- everything killed at one stroke: the next job that claims the GPU resets its clock first.

No signal handler is installed. A Python handler would run only when the main thread is back in Python: a rank that
waits in a collective for a rank that has died would then no longer end at a scheduler's SIGTERM, as it does today. So
exit codes and other people's handlers are as without this package.

Given back means reset: NVML does not tell which clocks were locked before, so a lock set by hand before the job
(`nvidia-smi -lgc`) is gone after it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import perseus_core
from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import GpuError, NoPermission, NotSupported
from perseus_core.runtime.clock.clock_owner import ClockClaim, claim_clock
from perseus_core.runtime.clock.watchdog import ProcessState, process_start_ticks, process_state
from perseus_core.runtime.clock.watchdog_memory import WatchdogMemory
from perseus_core.runtime.patience import patiently

T = TypeVar("T")

_CHECK_EVERY_S = 0.25
_CLAIM_PATIENCE_S = 3.0
_WATCHDOG_START_LIMIT_S = 60.0
_WATCHDOG_SILENCE_LIMIT_S = 2.0
_MAX_WATCHDOGS = 4


class ClockCallHung(GpuError):  # noqa: N818 (named by what happened)
    """A call of the driver has not returned in time."""


class WatchdogFailed(GpuError):  # noqa: N818 (named by what happened)
    """There is no watchdog, so no clock is locked."""


class ClockGivenBack(GpuError):  # noqa: N818 (named by what happened)
    """The clock has been given back; it is not set any more."""


class GuardedClock:
    """One GPU's clock: owned by this process, watched by a watchdog, given back whatever happens.

    `lock`, `reset` and `sm_clock_mhz` are for one thread, the controller's. Nothing here makes another thread wait
    longer than it says.

    Attributes:
        failure: the error for which the clock was given up, if it was.
        num_lock_calls: how many calls of `lock` have succeeded.
    """

    def __init__(
        self,
        device: Device,
        on_failure: Callable[[GpuError], None],
        *,
        hang_limit_s: float = 30.0,
        call_limit_s: float = 2.0,
    ) -> None:
        """Does nothing yet.

        Args:
            device: the GPU.
            on_failure: told, from another thread, when this clock can be set no longer.
            hang_limit_s: time without `beat` after which the watchdog gives the clock back.
            call_limit_s: time after which a call of the driver counts as hung.
        """
        self.failure: GpuError | None = None
        self.num_lock_calls = 0
        self._device = device
        self._on_failure = on_failure
        self._hang_limit_s = hang_limit_s
        self._call_limit_s = call_limit_s
        self._memory = WatchdogMemory.create()
        self._claim: ClockClaim | None = None
        self._is_guarded = threading.Event()
        self._leaving = threading.Event()
        self._left = threading.Event()
        self._release_turn = threading.Lock()
        self._call_since_s: float | None = None
        self._num_watchdogs = 0
        _guarded_clocks.add(self)

    @property
    def times_given_back(self) -> int:
        """How often the watchdog has reset the clock because this process was stopped or hung."""
        return self._memory.times_given_back

    @property
    def is_guarded(self) -> bool:
        """Whether the clock is ours and the watchdog is there."""
        return self._is_guarded.is_set() and not self._leaving.is_set()

    def acquire(self) -> None:
        """Claims the clock and starts the watchdog, in a thread of its own; returns at once."""
        self.beat(time.monotonic())
        threading.Thread(target=self._guard, name="perseus-clock-guard", daemon=True).start()

    def beat(self, now_s: float) -> None:
        """Training shows a sign of life."""
        self._memory.training_beat_s = now_s

    def lock(self, clock_mhz: int) -> None:
        """Asks for one clock, as soon as that is guarded.

        Raises:
            GpuError: if it cannot be set.
        """
        self._is_guarded.wait()
        self.beat(time.monotonic())  # from here on the watchdog waits once more for the limit
        was_clean = not self._memory.may_be_locked
        self._memory.may_be_locked = True
        try:
            self._call(lambda: self._device.lock_clock(clock_mhz))
        except (NoPermission, NotSupported):
            if was_clean:
                self._memory.may_be_locked = False
            raise
        self.num_lock_calls += 1

    def reset(self) -> None:
        """Gives the clock back to the driver, but keeps the right to lock it.

        Raises:
            GpuError: if that fails.
        """
        if self._memory.may_be_locked:
            self._call(self._device.reset_clock)
            self._memory.may_be_locked = False

    def sm_clock_mhz(self) -> int:
        """The clock it runs at now."""
        return self._call(self._device.sm_clock_mhz)

    def release(self, limit_s: float = 0.5) -> None:
        """Gives the clock back and dismisses the watchdog; for good.

        Any thread, any number of times. Where the driver does not answer within `limit_s`, the watchdog stays on guard
        and resets the clock when this process has ended.
        """
        self._leaving.set()
        self._is_guarded.set()  # whoever waits to lock goes on, and is refused
        if not self._release_turn.acquire(blocking=False):
            self._left.wait(limit_s)
            return
        if not self._memory.may_be_locked and self._call_since_s is None:
            self._leave()
            return
        # A thread of its own, because a driver that hangs must not hold up the end of training.
        resetting = threading.Thread(target=self._reset_and_leave, name="perseus-clock-reset", daemon=True)
        resetting.start()
        resetting.join(limit_s)

    def leave_in_child(self) -> None:
        """In a forked child: all of this is the parent's."""
        # New ones: the parent's threads, which are not here, may have held a lock inside the old ones.
        self._leaving, self._left, self._release_turn = threading.Event(), threading.Event(), threading.Lock()
        self._leaving.set()
        self._left.set()
        self._release_turn.acquire()
        if self._claim is not None:
            self._claim.close_in_child()
        self._claim = None

    def _reset_and_leave(self) -> None:
        in_flight = self._call_since_s is not None
        try:
            patiently(self._device.reset_clock)
        except GpuError:
            return  # the watchdog will try again
        if not in_flight:
            self._leave()

    def _leave(self) -> None:
        """The clock is given back: nothing is left to guard."""
        self._memory.may_be_locked = False
        self._memory.may_leave = True
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.release()
        self._left.set()

    def _call(self, call: Callable[[], T]) -> T:
        """Calls the driver, such that `_check_call` sees how long it takes."""
        # In this order: either `release` sees a call in flight, or this sees that `release` has begun.
        self._call_since_s = time.monotonic()
        try:
            if self._leaving.is_set():
                raise self.failure or ClockGivenBack(f"the clock of {self._device.uuid} has been given back")
            return call()
        finally:
            self._call_since_s = None
            if self._leaving.is_set() and self._claim is not None:
                # It came back too late: the clock was given back meanwhile, and may now be locked again.
                self._reset_and_leave()

    # The guard's thread

    def _guard(self) -> None:
        try:
            self._claim = claim_clock(self._device.uuid, patience_s=_CLAIM_PATIENCE_S)
            if self._claim.was_left_behind:
                patiently(self._device.reset_clock)
            self._start_watchdog()
            self._is_guarded.set()
            while not self._leaving.wait(_CHECK_EVERY_S):
                self._check_call()
                self._check_watchdog()
        except GpuError as error:
            self._give_up(error)
        except Exception as error:
            self._give_up(WatchdogFailed(f"the clock of {self._device.uuid} cannot be guarded: {error!r}"))

    def _give_up(self, error: GpuError) -> None:
        if self._leaving.is_set():
            return
        self.failure = error
        self.release()
        self._on_failure(error)

    def _check_call(self) -> None:
        since_s = self._call_since_s
        if since_s is not None and time.monotonic() - since_s > self._call_limit_s:
            raise ClockCallHung(
                f"setting the clock of {self._device.uuid}: the driver has not answered for {self._call_limit_s:g} s; "
                "the clock is given back as soon as it does; see `dmesg` for Xid errors"
            )

    def _check_watchdog(self) -> None:
        is_gone = process_state(self._memory.watchdog_pid) is ProcessState.GONE
        if is_gone or time.monotonic() - self._memory.watchdog_beat_s > _WATCHDOG_SILENCE_LIMIT_S:
            self._start_watchdog()

    def _start_watchdog(self) -> None:
        self._num_watchdogs += 1
        if self._num_watchdogs > _MAX_WATCHDOGS:
            raise WatchdogFailed(
                f"the watchdog of {self._device.uuid} was killed {_MAX_WATCHDOGS} times; without it no clock is "
                "locked; find out what kills `python -m perseus_core.runtime.clock.watchdog`"
            )
        start_s = time.monotonic()
        assert self._claim is not None, "the clock is claimed before it is guarded"
        self._memory.watchdog_pid = 0
        try:
            launcher = _launch_watchdog(self._device.uuid, self._memory, self._claim, self._hang_limit_s)
            status = launcher.wait(_WATCHDOG_START_LIMIT_S)
        except (OSError, subprocess.SubprocessError) as error:
            raise WatchdogFailed(
                f"the watchdog of {self._device.uuid} cannot be started ({error}); without it no clock is locked"
            ) from None
        while self._memory.watchdog_beat_s < start_s:
            if self._leaving.wait(0.02):
                return
            pid = self._memory.watchdog_pid
            has_ended = status != 0 or (pid and process_state(pid) is ProcessState.GONE)
            if not has_ended and time.monotonic() - start_s < _WATCHDOG_START_LIMIT_S:
                continue
            raise WatchdogFailed(
                f"the watchdog of {self._device.uuid} does not start; without it no clock is locked; try "
                "`python -m perseus_core.runtime.clock.watchdog --help`"
            )


def _launch_watchdog(
    uuid: str, memory: WatchdogMemory, claim: ClockClaim, hang_limit_s: float
) -> subprocess.Popen[bytes]:
    pid = os.getpid()
    arguments = {
        "--gpu": uuid,
        "--pid": pid,
        "--start-ticks": process_start_ticks(pid),
        "--memory": memory.descriptor,
        "--hang-limit-s": hang_limit_s,
    }
    root = str(Path(perseus_core.__file__).parents[1])
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "perseus_core.runtime.clock.watchdog",
            *(str(part) for argument in arguments.items() for part in argument),
        ],
        # It keeps the claim open, and so keeps others out until it has given the clock back.
        pass_fds=(memory.descriptor, claim.descriptor),
        # Not the training's output, which others read to its end; not its folder, which may hold modules named as ours.
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))},
        start_new_session=True,
    )


_guarded_clocks: weakref.WeakSet[GuardedClock] = weakref.WeakSet()


def _leave_all_in_child() -> None:
    for clock in list(_guarded_clocks):
        clock.leave_in_child()


os.register_at_fork(after_in_child=_leave_all_in_child)
