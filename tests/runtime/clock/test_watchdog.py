"""The watchdog gives the clock back while the process lives but does not train, and is itself watched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perseus_core.gpu.simulated import SimulatedNode
from perseus_core.runtime.clock import give_back
from perseus_core.runtime.clock.controller import ClockController
from perseus_core.runtime.clock.give_back import WatchdogFailed
from perseus_core.runtime.clock.watchdog import ProcessState, Watchdog, process_start_ticks, process_state
from perseus_core.runtime.clock.watchdog_memory import WatchdogMemory
from perseus_core.runtime.side_threads import OwnThreads
from tests.runtime.simulated_machine import (
    device_of,
    first_line,
    locked_range,
    simulated_machine,
    training,
    wait_until,
    watchdogs_of,
)

REPORT_RELOCK = """
train_until(controller, lambda: controller.times_given_back > 0)
train_until(controller, lambda: controller.num_lock_calls >= 2)
print("locked again", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SimulatedNode]:
    with simulated_machine(tmp_path) as machine:
        yield machine


@pytest.fixture
def controller(node: SimulatedNode) -> Iterator[ClockController]:
    """One of this process, guarded."""
    made = ClockController(device_of(node), threads=OwnThreads())
    made.start()
    wait_until(lambda: made.is_guarded)
    yield made
    made.stop()


def test_a_stopped_process_loses_the_clock_and_gets_it_again_when_it_goes_on(node: SimulatedNode) -> None:
    """As under a debugger. It notices, and locks the clock with its next instruction."""
    with training(REPORT_RELOCK) as process:
        assert first_line(process) == "locked"
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: locked_range(node) == [])
        process.send_signal(signal.SIGCONT)
        assert first_line(process) == "locked again"
        assert locked_range(node) == [500, 500]


def test_a_process_that_hangs_loses_the_clock_and_gets_it_again_when_it_goes_on(node: SimulatedNode) -> None:
    """No instruction begins or ends for longer than the limit."""
    with training("sys.stdin.readline()\n" + REPORT_RELOCK, hang_limit_s=2.0) as process:
        assert first_line(process) == "locked"
        wait_until(lambda: locked_range(node) == [])
        time.sleep(0.2)
        assert locked_range(node) == []
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert first_line(process) == "locked again"


def test_another_watchdog_is_started_when_it_is_killed(node: SimulatedNode) -> None:
    """And does its work."""
    with training("train_until(controller, lambda: False)") as process:
        assert first_line(process) == "locked"
        first = {*watchdogs_of(process.pid)}
        assert first
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: {*watchdogs_of(process.pid)} - first)
        time.sleep(0.5)  # from now on there is always one: it has only to begin to look
        process.kill()
        wait_until(lambda: locked_range(node) == [])


def test_without_a_watchdog_no_clock_stays_locked(
    node: SimulatedNode, controller: ClockController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something kills it again and again: better no savings than a clock that is never given back."""
    monkeypatch.setattr(give_back, "_MAX_WATCHDOGS", 1)
    controller.hold(600)
    wait_until(lambda: locked_range(node) == [600, 600])
    for pid in watchdogs_of(os.getpid()):
        os.kill(pid, signal.SIGKILL)
    failure = wait_until(lambda: controller.failure)
    assert isinstance(failure, WatchdogFailed)
    wait_until(lambda: locked_range(node) == [])


@pytest.mark.parametrize("trouble", ["python cannot be run", "the driver is not to be had"])
def test_no_clock_is_locked_where_no_watchdog_starts(
    node: SimulatedNode, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """The failure says what to try."""
    if trouble == "python cannot be run":
        monkeypatch.setattr(sys, "executable", "/bin/false")
    else:
        monkeypatch.setenv("ZEUSD_SOCK_PATH", "/nowhere")  # of the watchdog; this process has its device already
    controller = ClockController(device_of(node), threads=OwnThreads())
    controller.start()
    controller.hold(600)
    assert not controller.is_guarded
    failure = wait_until(lambda: controller.failure)
    assert isinstance(failure, WatchdogFailed)
    assert "perseus_core.runtime.clock.watchdog --help" in str(failure)
    controller.stop()
    assert controller.num_lock_calls == 0


def test_the_signals_that_end_a_job_do_not_end_the_watchdog(node: SimulatedNode) -> None:
    """A scheduler sends them to all processes of a job: the watchdog has to be the last."""
    with training("sys.stdin.read()") as process:
        assert first_line(process) == "locked"
        watchdogs = watchdogs_of(process.pid)
        assert watchdogs
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            for watchdog in watchdogs:
                os.kill(watchdog, number)
        process.terminate()
        wait_until(lambda: locked_range(node) == [])
        wait_until(lambda: watchdogs_of(process.pid) == [])


def test_it_leaves_when_the_clock_was_given_back(controller: ClockController) -> None:
    """And does not wait for the process to end."""
    assert watchdogs_of(os.getpid())
    controller.stop()
    wait_until(lambda: watchdogs_of(os.getpid()) == [])


def test_it_loads_nothing_heavy() -> None:
    """One is running for each rank."""
    heavy = "{'torch', 'numpy', 'networkx', 'rich'}"
    code = f"import sys, perseus_core.runtime.clock.watchdog; print({heavy} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


class CountingDevice:
    uuid = "GPU-0"

    def __init__(self) -> None:
        self.num_resets = 0

    def reset_clock(self) -> None:
        self.num_resets += 1


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def watch(sleeper: subprocess.Popen[bytes]) -> Callable[..., tuple[Watchdog, WatchdogMemory, CountingDevice]]:
    """A watchdog in this process, of a process that locked its clock a moment ago."""

    def make(hang_limit_s: float = 60.0) -> tuple[Watchdog, WatchdogMemory, CountingDevice]:
        device, memory = CountingDevice(), WatchdogMemory.create()
        memory.training_beat_s = time.monotonic()
        memory.may_be_locked = True
        watchdog = Watchdog(
            device,  # type: ignore[arg-type]
            memory,
            pid=sleeper.pid,
            start_ticks=process_start_ticks(sleeper.pid),
            hang_limit_s=hang_limit_s,
        )
        return watchdog, memory, device

    return make


def test_a_profiler_that_stops_the_process_for_a_moment_is_no_reason(
    watch: Callable[..., tuple[Watchdog, WatchdogMemory, CountingDevice]], sleeper: subprocess.Popen[bytes]
) -> None:
    """Only the second look in a row counts, and then once for each stop."""
    watchdog, memory, device = watch()
    resets = []
    for number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGSTOP):
        sleeper.send_signal(number)
        wanted = ProcessState.STOPPED if number == signal.SIGSTOP else ProcessState.RUNNING
        wait_until(lambda w=wanted: process_state(sleeper.pid, process_start_ticks(sleeper.pid)) is w)
        assert watchdog.look()
        resets.append(device.num_resets)
    for _ in range(3):
        watchdog.look()
        resets.append(device.num_resets)
    assert resets == [0, 0, 0, 1, 1, 1]
    assert memory.times_given_back == 1


def test_one_silence_is_one_reset(watch: Callable[..., tuple[Watchdog, WatchdogMemory, CountingDevice]]) -> None:
    """The next one counts again; where nothing was locked there is nothing to do."""
    watchdog, memory, device = watch(hang_limit_s=1000)
    memory.training_beat_s = time.monotonic() - 1002
    for _ in range(2):
        watchdog.look()
        assert device.num_resets == 1
    memory.training_beat_s = time.monotonic()
    watchdog.look()
    assert device.num_resets == 1
    memory.training_beat_s = time.monotonic() - 1001
    watchdog.look()
    assert device.num_resets == 2
    memory.training_beat_s = time.monotonic() - 1003
    memory.may_be_locked = False
    watchdog.look()
    assert device.num_resets == 2


def test_another_process_with_the_same_number_is_not_the_one_that_was_watched(
    sleeper: subprocess.Popen[bytes],
) -> None:
    """Numbers are used again."""
    ticks = process_start_ticks(sleeper.pid)
    assert process_state(sleeper.pid, ticks) is ProcessState.RUNNING
    assert process_state(sleeper.pid, ticks + 1) is ProcessState.GONE
    sleeper.kill()
    wait_until(lambda: process_state(sleeper.pid, ticks) is ProcessState.GONE)  # a zombie until it is waited for
