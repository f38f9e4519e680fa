"""The work emulator against the profile it follows."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perseus_core.errors import InputError
from perseus_core.gpu.simulated import SimulatedNode, WorkEmulator, create_node, read_clock_requests, read_executed
from perseus_core.gpu.simulated.execution_log import ExecutionLog
from perseus_core.planning.schedule import Kind

from .conftest import FORWARD_S, POWER_W


def lock_and_wait(node: SimulatedNode, gpu: int, clock_mhz: int) -> None:
    node.gpus[gpu].lock_clocks(clock_mhz, clock_mhz)
    deadline_s = time.monotonic() + 60
    while node.gpus[gpu].effective_clock_mhz() != clock_mhz:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.mark.parametrize("clock_mhz", [1000, 800, 500])
def test_work_takes_what_the_profile_says_at_the_clock(node: SimulatedNode, clock_mhz: int) -> None:
    """Time, energy and clock, for the stage that belongs to the GPU."""
    lock_and_wait(node, 1, clock_mhz)
    called_s = time.monotonic()
    executed = WorkEmulator(node, 1).work(Kind.BACKWARD)
    returned_s = time.monotonic()
    assert executed.time_s == pytest.approx(FORWARD_S[clock_mhz] * 4)
    assert executed.energy_j == pytest.approx(FORWARD_S[clock_mhz] * 4 * POWER_W[clock_mhz])
    assert executed.share_at(clock_mhz) == pytest.approx(1.0)
    assert called_s <= executed.start_s
    assert executed.end_s <= returned_s


def test_fused_passes_take_what_both_take(node: SimulatedNode) -> None:
    """A profile need not know of a `forward_backward`: it is a forward, and a backward of twice its length."""
    executed = WorkEmulator(node, 0).work(Kind.FORWARD_BACKWARD)
    assert executed.time_s == pytest.approx(FORWARD_S[1000] * 3)
    assert executed.energy_j == pytest.approx(FORWARD_S[1000] * 3 * POWER_W[1000])


def test_another_process_changes_the_clock_in_the_middle(
    make_node: Callable[..., SimulatedNode], start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    """What was done stays done; the rest takes its share of the time and energy at the new clock."""
    node = make_node(time_scale=40, log=True)
    other = start_python(
        """
from perseus_core.gpu import simulated
gpu = simulated.open_node(folder).gpus[1]
print("ready", flush=True)
while not gpu.state().is_working:
    pass
gpu.lock_clocks(500, 500)
"""
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    executed = WorkEmulator(node, 1).work("backward")
    assert other.wait(timeout=60) == 0
    (fast, fast_s), (slow, slow_s) = executed.clocks
    assert (fast, slow) == (1000, 500)
    assert fast_s / 1.6 + slow_s / 2.88 == pytest.approx(1.0)
    assert executed.energy_j == pytest.approx(fast_s * 300 + slow_s * 200)
    (request,) = read_clock_requests(node.folder)
    assert executed.start_s + fast_s == pytest.approx(request.time_s + 0.004)


def test_energy_of_work_and_waiting_adds_up_to_the_true_total(node: SimulatedNode) -> None:
    """Whatever the moments of measurement: works, plus blocking power for all the rest."""
    gpu = node.gpus[0]
    before = gpu.state()
    emulator = WorkEmulator(node, 0)
    executed = [emulator.work(kind) for kind in ("forward", "backward", "forward")]
    after = gpu.state()
    working_s = sum(e.time_s for e in executed)
    waiting_j = 50.0 * (after.time_s - before.time_s - working_s)
    assert after.energy_j - before.energy_j == pytest.approx(sum(e.energy_j for e in executed) + waiting_j)


def test_a_busy_gpu_is_waited_for(node: SimulatedNode) -> None:
    """Two threads on one GPU run one after the other, as on one stream."""
    emulator = WorkEmulator(node, 0)
    threads = [threading.Thread(target=emulator.work, args=("forward",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second, third = read_executed(node.folder)
    assert first.end_s <= second.start_s
    assert second.end_s <= third.start_s


def test_noise_differs_from_one_execution_to_the_next_and_repeats_with_the_seed(
    make_node: Callable[..., SimulatedNode], tmp_path: Path
) -> None:
    """About one percent, in time and in energy, around the profile."""
    node = make_node(noise={"time": 0.01, "energy": 0.01}, seed=3, time_scale=0.1)
    emulator = WorkEmulator(node, 0)
    executed = [emulator.work("forward") for _ in range(100)]
    times = [e.time_s / 0.001 for e in executed]
    assert len(set(times)) == 100
    assert sum(times) / 100 == pytest.approx(1.0, abs=0.005)
    spread = (sum((t - 1) ** 2 for t in times) / 100) ** 0.5
    assert 0.007 < spread < 0.013
    again = tmp_path / "again"
    again.mkdir()
    repeated = WorkEmulator(create_node(tmp_path / "gpus.json", again), 0).work("forward")
    assert repeated.time_s == pytest.approx(executed[0].time_s, rel=1e-6)
    assert repeated.energy_j == pytest.approx(executed[0].energy_j, rel=1e-6)


def test_a_process_killed_at_work_leaves_a_gpu_that_finishes_it(
    node: SimulatedNode, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    """The work ends by itself, and the next process can use the GPU."""
    worker = start_python(
        """
from perseus_core.gpu import simulated
emulator = simulated.WorkEmulator(simulated.open_node(folder), 0)
print("ready", flush=True)
while True:
    emulator.work("backward")
"""
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    deadline_s = time.monotonic() + 60
    while not node.gpus[0].state().is_working:
        assert time.monotonic() < deadline_s
    worker.kill()
    worker.wait()
    executed = WorkEmulator(node, 0).work("forward")
    assert executed.time_s == pytest.approx(0.010)


def test_the_log_tells_what_ran_and_who_changed_the_clock(
    node: SimulatedNode, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    """Of all processes, with the caller's label."""
    node.gpus[0].lock_clocks(800, 800)
    WorkEmulator(node, 0).work("forward", label={"iteration": 3, "microbatch": 1})
    other = start_python(
        """
from perseus_core.gpu import simulated
node = simulated.open_node(folder)
simulated.WorkEmulator(node, 1).work("backward")
node.gpus[0].reset_clocks()
"""
    )
    assert other.wait(timeout=60) == 0
    first, second = read_executed(node.folder)
    assert (first.gpu, first.kind, first.label) == (0, "forward", {"iteration": 3, "microbatch": 1})
    assert (second.gpu, second.stage, second.pid) == (1, 1, other.pid)
    assert [(r.gpu, r.clock_mhz) for r in read_clock_requests(node.folder)] == [(0, 800), (0, None)]


def test_an_instruction_the_profile_lacks_is_refused(node: SimulatedNode) -> None:
    """With what is missing."""
    with pytest.raises(InputError, match="no backward_weight of stage 0, chunk 0"):
        WorkEmulator(node, 0).work(Kind.BACKWARD_WEIGHT)


def test_many_threads_write_the_first_lines_of_the_log_at_once(tmp_path: Path) -> None:
    """None of them before the file is open, and no line is lost."""
    for trial in range(50):
        folder = tmp_path / str(trial)
        folder.mkdir()
        log, begin = ExecutionLog(folder, enabled=True), threading.Barrier(4)

        def write(gpu: int, log: ExecutionLog = log, begin: threading.Barrier = begin) -> None:
            begin.wait()
            log.clock_request(gpu, 0.0, None)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(write, range(4)))
        assert len((folder / f"{os.getpid()}.jsonl").read_text().splitlines()) == 4
