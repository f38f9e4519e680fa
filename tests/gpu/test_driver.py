"""The simulated driver as any `pynvml` program sees it."""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import subprocess
import time
from collections.abc import Callable

import pynvml
import pytest

from perseus_core.gpu.simulated import SimulatedNode, WorkEmulator, faults
from perseus_core.gpu.simulated.driver import SimulatedLibrary
from perseus_core.gpu.simulated.driver_device import DEVICE_FUNCTIONS

from .conftest import BLOCKING_W, CLOCKS_MHZ


@pytest.fixture
def handle(node: SimulatedNode) -> object:
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByIndex(1)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def test_nothing_works_before_init_and_after_shutdown(node: SimulatedNode) -> None:
    """As the vendor library, it counts nvmlInit against nvmlShutdown."""
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        pynvml.nvmlDeviceGetCount()
    pynvml.nvmlInit()
    pynvml.nvmlInit()
    pynvml.nvmlShutdown()
    assert pynvml.nvmlDeviceGetCount() == 2
    pynvml.nvmlShutdown()
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        pynvml.nvmlDeviceGetCount()


def test_a_gpu_is_the_same_by_index_uuid_and_bus_id(handle: object) -> None:
    """Three ways to the same handle."""
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    bus_id = pynvml.nvmlDeviceGetPciInfo(handle).busId
    assert pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(uuid)) == 1
    assert pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)) == 1
    assert pynvml.nvmlDeviceGetName(handle) == "Test GPU"


def test_what_does_not_exist_has_the_vendors_error_codes(handle: object) -> None:
    """Index, UUID, handle, memory clock, clock type, and a function the library does not have."""
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetHandleByIndex(2)
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetHandleByUUID("GPU-0")
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetSupportedGraphicsClocks(handle, 1)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetName(pynvml.c_nvmlDevice_t())
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetClockInfo(handle, 17)
    with pytest.raises(pynvml.NVMLError_FunctionNotFound):
        pynvml.nvmlDeviceGetBoardId(handle)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceGetFanSpeed(handle)
    assert pynvml.nvmlErrorString(pynvml.NVML_ERROR_GPU_IS_LOST) == "GPU is lost"


def test_every_function_of_the_driver_is_one_that_pynvml_calls() -> None:
    """A misspelt name would never be found, and so never be missed."""
    called = set(re.findall(r'"(nvml[A-Z]\w+)"', inspect.getsource(pynvml)))
    versioned = {re.sub(r"_v\d$", "", name) for name in called}
    assert {re.sub(r"_v\d$", "", name) for name in DEVICE_FUNCTIONS} <= called | versioned


def test_a_buffer_that_is_too_small_is_not_overrun(node: SimulatedNode) -> None:
    """The C convention: insufficient size, and nothing written."""
    library = SimulatedLibrary(node)
    library.nvmlInitWithFlags(0)
    small = ctypes.create_string_buffer(4)
    assert library.nvmlSystemGetDriverVersion(small, ctypes.c_uint(4)) == pynvml.NVML_ERROR_INSUFFICIENT_SIZE
    assert small.raw == bytes(4)


def test_clocks_are_listed_locked_and_reset(handle: object) -> None:
    """A lock comes into force after the latency and lasts until the reset."""
    (memory_clock,) = pynvml.nvmlDeviceGetSupportedMemoryClocks(handle)
    assert tuple(pynvml.nvmlDeviceGetSupportedGraphicsClocks(handle, memory_clock)) == CLOCKS_MHZ

    def clock_mhz() -> int:
        return int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))

    assert clock_mhz() == 1000
    pynvml.nvmlDeviceSetGpuLockedClocks(handle, 790, 810)
    wait_until(lambda: clock_mhz() == 800)
    pynvml.nvmlDeviceResetGpuLockedClocks(handle)
    wait_until(lambda: clock_mhz() == 1000)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceSetGpuLockedClocks(handle, 900, 800)


def test_power_limits_are_kept_within_their_bounds(handle: object) -> None:
    """Setting and reading agree; beyond the constraints it is an invalid argument."""
    lowest_mw, highest_mw = pynvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)
    pynvml.nvmlDeviceSetPowerManagementLimit(handle, 250_000)
    assert pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) == 250_000
    assert pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) == 400_000
    for limit_mw in (lowest_mw - 1000, highest_mw + 1000):
        with pytest.raises(pynvml.NVMLError_InvalidArgument):
            pynvml.nvmlDeviceSetPowerManagementLimit(handle, limit_mw)


def test_power_is_read_the_old_way_and_as_a_field(handle: object) -> None:
    """A waiting GPU draws blocking power; an unknown field says so without failing the call."""
    assert pynvml.nvmlDeviceGetPowerUsage(handle) == BLOCKING_W * 1000
    fields = pynvml.nvmlDeviceGetFieldValues(
        handle,
        [pynvml.NVML_FI_DEV_POWER_INSTANT, pynvml.NVML_FI_DEV_MEMORY_TEMP, pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION],
    )
    assert fields[0].value.uiVal == BLOCKING_W * 1000
    assert fields[1].nvmlReturn == pynvml.NVML_ERROR_NOT_SUPPORTED
    assert fields[2].value.ullVal <= pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)


def test_the_energy_counter_stands_still_between_its_periods(
    make_node: Callable[..., SimulatedNode],
) -> None:
    """With a period longer than the test, it shows one value while the true energy grows."""
    node = make_node(energy_counter_period_s=10.0)
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    gpu = node.gpus[0]
    while 10.0 - time.monotonic() % 10.0 < 3:  # not across a boundary
        time.sleep(0.1)
    counted, true_j = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), gpu.true_energy_j()
    WorkEmulator(node, 0).work("forward")
    assert pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) == counted
    assert gpu.true_energy_j() > true_j


def test_the_counter_never_lags_more_than_a_period(handle: object, node: SimulatedNode) -> None:
    """It is at most one period of the highest power behind the truth, and never ahead."""
    emulator = WorkEmulator(node, 1)
    for _ in range(8):
        emulator.work("forward")
        before_j = node.gpus[1].true_energy_j()
        counted_j = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        after_j = node.gpus[1].true_energy_j()
        assert before_j - 300 * 0.1 <= counted_j + 0.001 <= after_j + 0.001


def test_a_process_that_works_is_listed_until_it_ends(
    handle: object, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    """With its memory, as monitors show it; a killed one disappears."""
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(handle) == []
    assert pynvml.nvmlDeviceGetMemoryInfo(handle).used == 0
    worker = start_python(
        """
import time
from perseus_core.gpu import simulated
simulated.WorkEmulator(simulated.open_node(folder), 1).work("forward")
print("worked", flush=True)
time.sleep(60)
"""
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "worked\n"
    (process,) = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    assert process.pid == worker.pid
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    assert memory.used == process.usedGpuMemory > 0
    assert memory.used + memory.free == memory.total
    worker.kill()
    worker.wait()
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(handle) == []


def test_what_monitors_ask_is_answered(handle: object) -> None:
    """The calls nvitop and Zeus make, with plausible answers."""
    assert pynvml.nvmlSystemGetDriverVersion()
    assert pynvml.nvmlSystemGetCudaDriverVersion() > 12000
    assert pynvml.nvmlSystemGetNVMLVersion()
    assert pynvml.nvmlSystemGetProcessName(os.getpid())
    assert pynvml.nvmlDeviceGetCudaComputeCapability(handle) == (8, 0)
    assert pynvml.nvmlDeviceGetArchitecture(handle) == pynvml.NVML_DEVICE_ARCH_AMPERE
    assert pynvml.nvmlDeviceGetUtilizationRates(handle).gpu == 0
    assert 20 < pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU) < 90
    assert 20 < pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU) < 90
    assert pynvml.nvmlDeviceGetMigMode(handle) == [0, 0]
    assert pynvml.nvmlDeviceGetPersistenceMode(handle) == 1
    assert pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM) == 1000


def test_utilization_is_the_share_of_the_last_period(handle: object, node: SimulatedNode) -> None:
    """A GPU that hardly waits is busy for much of it."""
    emulator = WorkEmulator(node, 1)

    def is_busy_after_work() -> bool:
        for _ in range(8):  # 160 ms and more: a whole period of work
            emulator.work("forward")
        return bool(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu > 20)

    wait_until(is_busy_after_work)


def test_throttle_reasons_tell_heat_from_power(handle: object, node: SimulatedNode) -> None:
    """Heat shows at once; the power cap only while work needs more."""

    def reasons() -> int:
        return int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))

    assert reasons() == pynvml.nvmlClocksThrottleReasonGpuIdle
    faults.throttle(node.gpus[1], 600)
    assert reasons() & pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
    assert pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) == 500
    faults.clear(node.gpus[1])
    assert not reasons() & pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
