"""Simulated GPUs as unpleasant as real ones, seen through the real `pynvml`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from perseus_core.errors import InputError
from perseus_core.gpu import simulated
from perseus_core.gpu.simulated.activation import uninstall
from perseus_core.gpu.simulated.description import Description
from perseus_core.gpu.simulated.nvml_codes import Code
from perseus_core.gpu.simulated.shortcomings import Shortcomings
from tests.conftest import REPOSITORY

A100 = REPOSITORY / "configs" / "gpus" / "a100.json"

Gpu = tuple[ModuleType, Any, simulated.SimulatedNode]
"""The `pynvml` that speaks to a node, the handle of its first GPU, and the node."""
MakeGpu = Callable[..., Gpu]


@pytest.fixture
def make_gpu(tmp_path: Path) -> Iterator[MakeGpu]:
    """Makes four A100s with shortcomings."""

    def make(*, latency_s: float = 0.001, **shortcomings: Any) -> Gpu:
        description = replace(
            Description.load(A100),
            clock_latency_s=latency_s,
            noise=simulated.Noise(),
            shortcomings=Shortcomings.from_document(shortcomings),
        )
        (tmp_path / "node").mkdir()
        node = simulated.create_node(description, tmp_path / "node")
        simulated.install(tmp_path / "node")
        import pynvml

        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0), node

    yield make
    uninstall()


def sm_clock(pynvml: Any, handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))


def seconds_until(holds: Callable[[], bool]) -> float:
    """How long it takes until something holds."""
    begin_s = time.monotonic()
    while not holds():
        assert time.monotonic() - begin_s < 20
        time.sleep(0.001)
    return time.monotonic() - begin_s


def test_the_register_lags_behind_the_clock(make_gpu: MakeGpu) -> None:
    """What runs has its clock at once; NVML tells it half a second later."""
    pynvml, handle, node = make_gpu(clock_register={"lag_s": 0.5})
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 1200, 1200)
    took_s = seconds_until(lambda: node.gpus[0].effective_clock_mhz() == 1200)
    lag_s = seconds_until(lambda: sm_clock(pynvml, handle) == 1200)
    assert took_s + lag_s > 0.5
    assert lag_s > 0.3 or took_s > 0.2


def test_the_register_tells_what_was_asked_for(make_gpu: MakeGpu) -> None:
    """Long before it is in force."""
    pynvml, handle, node = make_gpu(latency_s=10.0, clock_register={"reports": "clock asked for"})
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 1200, 1200)
    assert (sm_clock(pynvml, handle), node.gpus[0].effective_clock_mhz()) == (1200, 1410)
    pynvml.nvmlDeviceResetGpuLockedClocks(handle)
    assert sm_clock(pynvml, handle) == 1410


def test_the_register_is_off(make_gpu: MakeGpu) -> None:
    """Always by as much."""
    pynvml, handle, node = make_gpu(clock_register={"offset_mhz": -60})
    assert (sm_clock(pynvml, handle), node.gpus[0].effective_clock_mhz()) == (1350, 1410)


def test_a_lock_call_takes_time_and_holds_up_all_others(make_gpu: MakeGpu) -> None:
    """Also those on other GPUs, but not the change itself."""
    pynvml, handle, node = make_gpu(lock_call_s=0.3)
    other = pynvml.nvmlDeviceGetHandleByIndex(1)
    took_s: list[float] = []

    def lock() -> None:
        begin_s = time.monotonic()
        pynvml.nvmlDeviceSetGpuLockedClocks(handle, 1200, 1200)
        took_s.append(time.monotonic() - begin_s)

    thread = threading.Thread(target=lock)
    thread.start()
    seconds_until(lambda: node.gpus[0].effective_clock_mhz() == 1200)
    begin_s = time.monotonic()
    pynvml.nvmlDeviceGetPowerUsage(other)
    held_up_s = time.monotonic() - begin_s
    thread.join()
    assert took_s[0] >= 0.3
    assert held_up_s > 0.05


def test_a_clock_is_accepted_and_not_obeyed(make_gpu: MakeGpu) -> None:
    """The GPU keeps the one it has."""
    pynvml, handle, node = make_gpu(disobeyed_clocks_mhz=[1200])
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 1305, 1305)
    seconds_until(lambda: node.gpus[0].effective_clock_mhz() == 1305)
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 1200, 1200)
    time.sleep(0.05)
    assert sm_clock(pynvml, handle) == node.gpus[0].effective_clock_mhz() == 1305


def test_the_energy_counter_measures_the_end_of_each_period(make_gpu: MakeGpu) -> None:
    """And takes it for all: work that ends before is as if it had not been, work that lasts counts in full."""
    _, _, node = make_gpu(energy_counter_window_s=0.005)
    gpu = node.gpus[0]
    period_s = gpu.model.counter_period_s
    emulator = simulated.WorkEmulator(node, 0)
    counted_j = gpu.state().counter_j
    true_j = gpu.true_energy_j()
    for _ in range(12):
        emulator.work("backward")
    seconds_until(lambda: gpu.state().counter_j > counted_j)
    ratio = (gpu.state().counter_j - counted_j) / (gpu.true_energy_j() - true_j)
    assert ratio == pytest.approx(1, abs=0.25)
    waiting_w, begin_j = gpu.true_power_w(), gpu.state().counter_j
    idle_from_s = time.monotonic()
    seconds_until(lambda: gpu.state().counter_j > begin_j)
    # Begin with a period, and work in its first half only.
    begin_j = gpu.state().counter_j
    for _ in range(3):
        time.sleep(max(0.0, period_s - time.monotonic() % period_s + 0.001))
        with gpu.changing() as state:
            state.energy_j += 100.0  # a short burst
    seconds_until(lambda: gpu.state().counter_j > begin_j)
    assert gpu.state().counter_j - begin_j < 1.3 * waiting_w * (time.monotonic() - idle_from_s + period_s)


def test_a_gpu_at_full_load_says_that_it_is_at_its_power_limit(make_gpu: MakeGpu) -> None:
    """And runs at its clock all the same; one that waits says nothing."""
    pynvml, handle, node = make_gpu(power_cap_reported_from_mhz=1300)

    def is_capped() -> bool:
        reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return bool(reasons & pynvml.nvmlClocksThrottleReasonSwPowerCap)

    assert not is_capped()
    work = threading.Thread(target=lambda: simulated.WorkEmulator(node, 0).work("backward"))
    work.start()
    seconds_until(is_capped)
    assert node.gpus[0].effective_clock_mhz() == 1410
    work.join()
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 1200, 1200)
    seconds_until(lambda: node.gpus[0].effective_clock_mhz() == 1200)
    work = threading.Thread(target=lambda: simulated.WorkEmulator(node, 0).work("backward"))
    work.start()
    seconds_until(lambda: node.gpus[0].state().is_working)
    assert not is_capped()
    work.join()


@pytest.mark.parametrize("code", [code for code in Code if code], ids=lambda code: code.name)
def test_every_error_of_the_driver_comes_and_goes(make_gpu: MakeGpu, code: Code) -> None:
    """The second call fails and each third from then on, twice in all, with what `pynvml` makes of the code."""
    errors = {"function": "nvmlDeviceGetPowerUsage", "error": code.name, "first": 2, "every": 3, "times": 2}
    pynvml, handle, _ = make_gpu(driver_errors=[errors])
    failed = []
    for call in range(1, 12):
        try:
            pynvml.nvmlDeviceGetPowerUsage(handle)
        except pynvml.NVMLError as error:
            failed.append(call)
            assert error.value == code
            told_by_driver = pynvml.nvmlErrorString(code)
            assert str(error) == pynvml.NVMLError._errcode_to_string.get(code, told_by_driver)
    assert failed == [2, 5]
    pynvml.nvmlDeviceGetPowerUsage(pynvml.nvmlDeviceGetHandleByIndex(1))


def test_the_driver_says_what_its_errors_mean(make_gpu: MakeGpu) -> None:
    """As a real one does; of what is no code, too."""
    pynvml, _, _ = make_gpu()
    told = {code: pynvml.nvmlErrorString(code) for code in (10, 15, 16, 18, 999, 12345)}
    assert told == {
        10: "Timeout",
        15: "GPU is lost",
        16: "GPU requires reset",
        18: "Driver/library version mismatch",
        999: "Unknown Error",
        12345: "Unknown Error",
    }


def test_a_tensor_parallel_group_ends_an_instruction_together(make_gpu: MakeGpu) -> None:
    """With the slowest: here one that runs at a lower clock."""
    pynvml, _, node = make_gpu(tensor_parallel=2)
    assert [gpu.identity.default_stage for gpu in node.gpus] == [0, 0, 1, 1]
    pynvml.nvmlDeviceSetGpuLockedClocks(pynvml.nvmlDeviceGetHandleByIndex(1), 900, 900)
    seconds_until(lambda: node.gpus[1].effective_clock_mhz() == 900)
    ends_s: dict[int, list[float]] = {}

    def run(index: int) -> None:
        emulator = simulated.WorkEmulator(node, index)
        ends_s[index] = [emulator.work("forward").end_s for _ in range(4)][1:]  # the first one may find nobody there

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends_s[0] == pytest.approx(ends_s[1], abs=0.002)
    alone = simulated.WorkEmulator(node, 2).work("forward")
    least_s = 1.1 * (alone.end_s - alone.start_s)
    assert all(end_s - before_s > least_s for before_s, end_s in pairwise(ends_s[0]))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"clock_register": {"reports": "nothing"}}, "reports"),
        ({"clock_register": {"lags": 1}}, "clock_register"),
        ({"clock_register": {"lag_s": -1}}, "lag_s"),
        ({"lock_call_s": "long"}, "lock_call_s"),
        ({"disobeyed_clocks_mhz": 1200}, "disobeyed_clocks_mhz"),
        ({"disobeyed_clocks_mhz": [0]}, "disobeyed_clocks_mhz"),
        ({"energy_counter_window_s": 0.2}, "at most"),
        ({"power_cap_reported_from_mhz": 1.5}, "power_cap_reported_from_mhz"),
        ({"driver_errors": [{"function": "nvmlDeviceGetPowerUsage"}]}, "error"),
        ({"driver_errors": [{"function": "power", "error": "TIMEOUT"}]}, "NVML function"),
        ({"driver_errors": [{"function": "nvmlDeviceGetPowerUsage", "error": "SUCCESS"}]}, "TIMEOUT"),
        ({"driver_errors": [{"function": "nvmlDeviceGetPowerUsage", "error": "TIMEOUT", "every": 0}]}, "every"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
    ],
)
def test_wrong_descriptions_are_refused(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    """Naming the field."""
    document = {**json.loads(A100.read_text(encoding="utf-8")), **wrong}
    document["profile"] = str(A100.parent / document["profile"])
    (tmp_path / "gpus.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        Description.load(tmp_path / "gpus.json")
