"""However a training process ends, the clock is given back and nobody else's is touched. Real processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perseus_core.gpu.errors import GpuError
from perseus_core.gpu.simulated import SimulatedNode, read_clock_requests
from perseus_core.runtime.clock.clock_owner import ClockTaken, claim_clock, clock_left_behind, clock_owner
from perseus_core.runtime.clock.controller import ClockController
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


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SimulatedNode]:
    with simulated_machine(tmp_path) as machine:
        yield machine


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("", 0),
        ("raise RuntimeError('loss is NaN')", 1),
        ("sys.exit(7)", 7),
        ("os._exit(3)", 3),
        ("os.abort()", -signal.SIGABRT),
    ],
)
def test_the_clock_is_given_back_when_training_ends(node: SimulatedNode, ending: str, status: int) -> None:
    """And the exit status is what it would have been."""
    with training(ending) as process:
        assert first_line(process) == "locked"
        assert process.wait(60) == status
        wait_until(lambda: locked_range(node) == [])
        wait_until(lambda: watchdogs_of(process.pid) == [])


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, -signal.SIGTERM),
        (signal.SIGINT, -signal.SIGINT),  # by way of KeyboardInterrupt
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_the_clock_is_given_back_when_training_is_killed(
    node: SimulatedNode, number: signal.Signals, status: int
) -> None:
    """While the process is in the middle of something."""
    with training("train_until(controller, lambda: False)") as process:
        assert first_line(process) == "locked"
        assert locked_range(node) == [500, 500]
        process.send_signal(number)
        assert process.wait(60) == status
        wait_until(lambda: locked_range(node) == [])
        wait_until(lambda: watchdogs_of(process.pid) == [])


def test_a_program_that_is_killed_inside_a_long_call_ends_as_it_would_without_us(node: SimulatedNode) -> None:
    """A Python signal handler would run only after the call, and the scheduler would wait for it."""
    inside_a_long_call = "import ctypes; libc = ctypes.PyDLL(None); libc.sleep(3600)"  # keeps the GIL
    with training(f"print('calling', flush=True)\n{inside_a_long_call}") as process:
        assert [first_line(process), first_line(process)] == ["locked", "calling"]
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM
        wait_until(lambda: locked_range(node) == [])


def test_earlier_signal_handlers_are_still_called(node: SimulatedNode) -> None:
    """Such as one that writes a checkpoint and ends in its own way."""
    handler = "signal.signal(signal.SIGTERM, lambda *_: (print('checkpoint', flush=True), sys.exit(5)))"
    with training("train_until(controller, lambda: False)", before=handler) as process:
        assert first_line(process) == "locked"
        process.terminate()
        assert first_line(process) == "checkpoint"
        assert process.wait(60) == 5
        wait_until(lambda: locked_range(node) == [])


def test_the_end_of_a_forked_child_leaves_the_parents_clock_alone(node: SimulatedNode) -> None:
    """Worker processes of a data loader come and go; they run `atexit` too when they end in the ordinary way."""
    fork = """
child = os.fork()
if child == 0:
    controller.hold(900)
    controller.stop()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
print("child has ended", flush=True)
sys.stdin.read()
"""
    with training(fork) as process:
        assert [first_line(process), first_line(process)] == ["locked", "child has ended"]
        assert locked_range(node) == [500, 500]
        assert {request.pid for request in read_clock_requests(node.folder)} == {process.pid}
        process.kill()
        wait_until(lambda: locked_range(node) == [])


def test_a_worker_that_outlives_its_parent_does_not_keep_the_clock(node: SimulatedNode) -> None:
    """It has inherited nothing by which it would still own it."""
    fork = """
import time
if os.fork() == 0:
    os.close(1); os.close(2)
    time.sleep(60)
    os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
"""
    with training(fork) as process:
        first_line(process)
        first_line(process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
        claim_clock(node.gpus[0].identity.uuid, patience_s=60).release()


def test_the_watchdog_is_nobodys_child(node: SimulatedNode) -> None:
    """A program may wait for all its children; ours must not keep it waiting."""
    wait_for_all = """
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("no child", flush=True)
"""
    with training(wait_for_all) as process:
        assert [first_line(process), first_line(process)] == ["locked", "no child"]
        assert process.wait(60) == 0
        wait_until(lambda: locked_range(node) == [])


def test_a_second_job_is_refused_the_clock_and_does_no_harm(node: SimulatedNode) -> None:
    """It is told by whom; when the first job has ended it gets the clock."""
    with training("sys.stdin.read()") as first:
        assert first_line(first) == "locked"
        with training("") as second:
            refusal = first_line(second)
            assert f"belongs to process {first.pid}" in refusal
            assert second.wait(60) == 0
        owner = clock_owner(node.gpus[0].identity.uuid)
        assert owner is not None
        assert owner.pid == first.pid
        assert locked_range(node) == [500, 500]
        first.kill()
        wait_until(lambda: clock_owner(node.gpus[0].identity.uuid) is None)
        with training("sys.stdin.read()") as third:
            assert first_line(third) == "locked"
            assert locked_range(node) == [500, 500]


def test_two_jobs_on_different_gpus_do_not_know_of_each_other(node: SimulatedNode) -> None:
    """One ends, the other's clock stays."""
    with training("sys.stdin.read()") as first:
        assert first_line(first) == "locked"
        second = ClockController(device_of(node, 1), threads=OwnThreads())
        second.start()
        second.hold(600)
        wait_until(lambda: locked_range(node, 1) == [600, 600])
        first.kill()
        wait_until(lambda: locked_range(node, 0) == [])
        assert locked_range(node, 1) == [600, 600]
        second.stop()
        wait_until(lambda: locked_range(node, 1) == [])


def test_a_clock_that_nobody_could_give_back_is_reset_by_the_next_owner(node: SimulatedNode) -> None:
    """As when a container is killed at one stroke, watchdog and all."""
    with training("sys.stdin.read()") as process:
        assert first_line(process) == "locked"
        # Stopped first, so that none sees the other end, however long this process is kept from its next line.
        watchdogs = watchdogs_of(process.pid)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (*watchdogs, process.pid):
                os.kill(pid, number)
        process.wait(60)
    assert locked_range(node) == [500, 500]
    left_by = wait_until(lambda: clock_left_behind(node.gpus[0].identity.uuid))
    assert left_by.pid == process.pid
    controller = ClockController(device_of(node), threads=OwnThreads())
    controller.start()
    wait_until(lambda: controller.is_guarded)
    assert locked_range(node) == []
    controller.stop()


def test_an_owner_is_entered_while_it_is_one(node: SimulatedNode) -> None:
    """With what helps to find it."""
    uuid = node.gpus[0].identity.uuid
    assert clock_owner(uuid) is None
    claim = claim_clock(uuid)
    owner = clock_owner(uuid)
    assert owner is not None
    assert owner.pid == os.getpid()
    assert owner.command == " ".join(sys.orig_argv)[:200]
    with pytest.raises(ClockTaken, match="measures only"):
        claim_clock(uuid)
    claim.release()
    assert clock_owner(uuid) is None


def test_a_folder_that_cannot_be_used_is_named(node: SimulatedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variable that chooses another."""
    monkeypatch.setenv("PERSEUS_CLOCK_OWNERS", "/proc/nowhere")
    with pytest.raises(GpuError, match="set PERSEUS_CLOCK_OWNERS"):
        claim_clock(node.gpus[0].identity.uuid)
