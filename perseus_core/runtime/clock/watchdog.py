"""The watchdog: a small process that gives a GPU's clock back when the training process cannot.

    python -m perseus_core.runtime.clock.watchdog --gpu UUID --pid PID ...

`perseus_core.runtime.clock.give_back` starts it. It watches one process and one GPU, and resets the clock when the
process is gone (however it died: SIGKILL, SIGTERM, a crash), is stopped (by a debugger or SIGSTOP), or has shown no
sign of life for a while. It leaves when the process has given the clock back, or is gone. It ignores the signals by
which schedulers and terminals end jobs: they reach it together with the process it watches, and it has to be the last.

It knows no torch and no numpy. Nothing can be done where everything is killed at one stroke, as when process 1 of a
container dies: there the clock is given back by the next job that uses this GPU (`clock_owner`).
"""

from __future__ import annotations

import argparse
import os
import signal
import syslog
import time
from enum import Enum
from pathlib import Path

from perseus_core.gpu.device import Device
from perseus_core.gpu.discovery import device_by_uuid
from perseus_core.gpu.errors import GpuError
from perseus_core.runtime.clock.watchdog_memory import WatchdogMemory

LOOK_EVERY_S = 0.2
# A profiler that looks into a process stops it for some milliseconds; that is no reason to reset a clock.
_STOPPED_LOOKS = 2
_RESET_ATTEMPTS = 5
# A driver that does not come back from a call must not keep this process for ever.
_LAST_RESET_LIMIT_S = 60


class ProcessState(Enum):
    """What the kernel says of a process."""

    RUNNING = "running"
    STOPPED = "stopped"
    GONE = "gone"


def process_state(pid: int, start_ticks: int | None = None) -> ProcessState:
    """What has become of a process (`man 5 proc_pid_stat`).

    Args:
        pid: its number.
        start_ticks: when it was started: another process that got its number later does not count.
    """
    stat = _read_stat(pid)
    if stat is None or stat[0] in ("Z", "X") or start_ticks not in (None, int(stat[19])):
        return ProcessState.GONE
    return ProcessState.STOPPED if stat[0] in ("T", "t") else ProcessState.RUNNING


def process_start_ticks(pid: int) -> int:
    """When a living process was started, in the kernel's ticks: with its number it names a process for good."""
    stat = _read_stat(pid)
    assert stat is not None, "the process lives"
    return int(stat[19])


def _read_stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third one on, which is the state."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return content.rpartition(")")[2].split()


class Watchdog:
    """Decides, at each look, whether the clock has to be given back."""

    def __init__(
        self, device: Device, memory: WatchdogMemory, *, pid: int, start_ticks: int, hang_limit_s: float
    ) -> None:
        """Watches one process and the GPU whose clock it sets."""
        self._device = device
        self._memory = memory
        self._pid = pid
        self._start_ticks = start_ticks
        self._hang_limit_s = hang_limit_s
        self._looks_stopped = 0
        self._beat_given_back_for_s = 0.0

    def run(self) -> None:
        """Looks until it is no longer needed."""
        while self.look():
            time.sleep(LOOK_EVERY_S)

    def look(self) -> bool:
        """Looks once; returns whether to go on."""
        now_s = time.monotonic()
        self._memory.watchdog_beat_s = now_s
        if self._memory.may_leave:
            return False
        state = process_state(self._pid, self._start_ticks)
        if state is ProcessState.GONE:
            signal.alarm(_LAST_RESET_LIMIT_S)
            self._give_back("has ended without giving it back")
            return False
        self._looks_stopped = self._looks_stopped + 1 if state is ProcessState.STOPPED else 0
        if self._looks_stopped == _STOPPED_LOOKS:
            self._give_back("is stopped")
        beat_s = self._memory.training_beat_s
        if now_s - beat_s > self._hang_limit_s and beat_s != self._beat_given_back_for_s:
            self._beat_given_back_for_s = beat_s
            self._give_back(f"has shown no sign of life for {self._hang_limit_s:g} s")
        return True

    def _give_back(self, reason: str) -> None:
        if not self._memory.may_be_locked:
            return
        for _ in range(_RESET_ATTEMPTS):
            try:
                self._device.reset_clock()
            except GpuError as error:
                outcome = f"could not be reset: {error}"
                time.sleep(LOOK_EVERY_S)
            else:
                outcome = "was reset"
                # Afterwards, so that a process which wakes up meanwhile and locks the clock learns of this reset.
                self._memory.times_given_back += 1
                break
        syslog.syslog(f"perseus: process {self._pid} {reason}; the clock of {self._device.uuid} {outcome}")


def main() -> None:
    """Reads the arguments, leaves the training process's family, and watches."""
    parser = argparse.ArgumentParser(prog="python -m perseus_core.runtime.clock.watchdog")
    parser.add_argument("--gpu", required=True, help="UUID of the GPU")
    parser.add_argument("--pid", type=int, required=True, help="process to watch")
    parser.add_argument("--start-ticks", type=int, required=True, help="when the kernel started it")
    parser.add_argument("--memory", type=int, required=True, help="descriptor of the shared memory")
    parser.add_argument("--hang-limit-s", type=float, required=True, help="silence after which it counts as hung")
    arguments = parser.parse_args()
    # Nobody's child: a program that waits for all its children, or ends them, does not find this one.
    if os.fork():
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    memory = WatchdogMemory(arguments.memory)
    memory.watchdog_pid = os.getpid()
    Watchdog(
        device_by_uuid(arguments.gpu),
        memory,
        pid=arguments.pid,
        start_ticks=arguments.start_ticks,
        hang_limit_s=arguments.hang_limit_s,
    ).run()


if __name__ == "__main__":
    main()
