"""Whatever happens while it is measured, the page comes to its end and clocks are given back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perseus_core.commands.measurement.results import Standing
from perseus_core.commands.measurement.step_list import STEPS_BY_NAME
from perseus_core.commands.measurement.supervisor import GIVEN_BACK, Measured, TimeLimits, measure
from perseus_core.gpu import simulated
from perseus_core.gpu.discovery import visible_devices
from perseus_core.gpu.simulated import SimulatedNode, WorkEmulator
from perseus_core.runtime.gpu_measurements import GpuMeasurements
from tests.runtime.simulated_machine import locked_range, wait_until

Machine = Callable[..., SimulatedNode]

QUICK = TimeLimits(step_s=0.2, deadline_s=30.0)


def measured(*names: str, limits: TimeLimits = QUICK, lock: bool = True) -> dict[str, Measured]:
    steps = [STEPS_BY_NAME[name] for name in names]
    return {one.name: one for one in measure(visible_devices(), limits, lock=lock, steps=steps)}


def workers_of(pid: int) -> list[int]:
    """Processes that measure, started by this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and "measurement.worker" in (path / "cmdline").read_text():
                found.append(int(path.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


@pytest.fixture
def doctor(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `perseus doctor --measure` with more arguments."""
    processes = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "perseus_core.cli", "doctor", "--measure", "--seconds-per-step", "0.3"]
        process = subprocess.Popen(
            [*command, "-o", str(tmp_path / "gpu.json"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_driver_that_hangs_ends_its_step_only(machine: Machine) -> None:
    """The step is named with its deadline, the next ones are measured, and clocks are reset."""
    node = machine()
    simulated.faults.hang(node.gpus[0], "nvmlDeviceSetGpuLockedClocks", 600.0)
    done = measured("lock_call", "reads", limits=TimeLimits(step_s=0.2, deadline_s=5.0))
    assert done["lock_call"].standing is Standing.NOT_MEASURED
    assert "had hung" in done["lock_call"].sentence or "not answered" in done["lock_call"].sentence
    assert done["reads"].figures["kinds"]["clock"]["idle"]["median_s"] > 0
    assert done[GIVEN_BACK].standing is Standing.AS_ASSUMED
    assert locked_range(node) == []


def test_a_clock_that_cannot_be_given_back_is_said(machine: Machine) -> None:
    """With what to do; and it waits for the driver no longer than some seconds."""
    node = machine()
    simulated.faults.hang(node.gpus[0], "nvmlDeviceResetGpuLockedClocks", 600.0)
    done = measured("lock_call")
    assert done[GIVEN_BACK].standing is Standing.DIFFERS
    assert node.gpus[0].identity.uuid in done[GIVEN_BACK].sentence
    assert "nvidia-smi -rgc" in done[GIVEN_BACK].sentence
    simulated.faults.clear(node.gpus[0])
    wait_until(lambda: locked_range(node) == [])


def test_a_worker_that_dies_ends_its_step_only(machine: Machine) -> None:
    """While a clock is locked: its watchdog gives it back, and the next worker goes on."""
    node = machine()
    done: dict[str, Measured] = {}
    thread = threading.Thread(target=lambda: done.update(measured("plateau", "lock_call")))
    thread.start()
    wait_until(lambda: locked_range(node) != [])
    (worker,) = workers_of(os.getpid())
    os.kill(worker, signal.SIGKILL)
    thread.join(60)
    assert "had died" in done["plateau"].sentence
    assert done["lock_call"].standing is not Standing.NOT_MEASURED
    assert locked_range(node) == []


def test_all_steps_together_have_an_end(machine: Machine) -> None:
    """What could not be begun says so."""
    machine()
    done = measured("reads", "counter", limits=TimeLimits(step_s=0.3, deadline_s=30.0, total_s=0.0), lock=False)
    assert ["for all steps were over" in one.sentence for one in done.values()] == [True, True]


def test_without_lock_nothing_is_locked(machine: Machine) -> None:
    """Steps that lock are left out, and no clock is reset either."""
    node = machine()
    node.gpus[0].lock_clocks(700, 700)
    done = measured("lock_call", "waiting_power", "latency", lock=False)
    assert list(done) == ["waiting_power"]
    assert locked_range(node) == [700, 700]


def test_ctrl_c_gives_clocks_back(
    machine: Machine, doctor: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """At once, and nothing goes on behind its back."""
    node = machine()
    process = doctor("--lock")
    wait_until(lambda: workers_of(process.pid) and locked_range(node) != [])
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert locked_range(node) == []
    assert workers_of(process.pid) == []
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_doctor_gives_clocks_back(
    machine: Machine, doctor: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    """Its worker dies with it, and the watchdog does the rest."""
    node = machine()
    process = doctor("--lock")
    (worker,) = wait_until(lambda: workers_of(process.pid) if locked_range(node) else None)
    process.send_signal(number)
    process.wait(30)
    wait_until(lambda: not Path(f"/proc/{worker}").exists())
    wait_until(lambda: locked_range(node) == [])


def test_it_does_not_lock_where_others_compute(machine: Machine, doctor: Callable[..., subprocess.Popen[str]]) -> None:
    """It names them, and touches nothing."""
    node = machine()
    WorkEmulator(node, 1).work("forward")
    process = doctor("--lock")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"process(es) {os.getpid()} compute on {node.gpus[1].identity.uuid}" in errors
    assert simulated.read_clock_requests(node.folder) == []


def test_it_does_not_lock_without_the_right_to(machine: Machine, doctor: Callable[..., subprocess.Popen[str]]) -> None:
    """In the words that are used elsewhere, before anything is measured."""
    node = machine()
    simulated.faults.deny_permission(node.gpus[0])
    process = doctor("--lock")
    answer, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "no permission; run as root" in errors
    assert answer == ""


def test_lock_alone_means_nothing() -> None:
    """One sentence."""
    command = [sys.executable, "-m", "perseus_core.cli", "doctor", "--lock"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 2
    assert answer.stderr.splitlines() == ["perseus: --lock is for --measure; give both, or none"]


def test_page_and_file(machine: Machine, doctor: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """Reads only: a line for each step, and a file that a session can read."""
    machine(energy_counter_period_s=0.02, energy_counter_window_s=0.005)
    process = doctor()
    answer, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    lines = answer.splitlines()
    assert lines[0].startswith("2 x Test GPU (simulated), driver ")
    assert [line.split("  ")[-1].partition(":")[0] for line in lines[1:]] == [
        step.title for step in STEPS_BY_NAME.values() if not step.locks
    ]
    found = GpuMeasurements.load(tmp_path / "gpu.json")
    assert found.gpu_name == "Test GPU"
    assert found.counter_period_s == pytest.approx(0.02, rel=0.2)
    assert found.counter_window_s < 0.012
    assert (found.up_s, found.harmless_calls_per_s) == (0.0, None)
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert {step["name"]: step["standing"] for step in document["steps"]}["captures"] == "not measured"
