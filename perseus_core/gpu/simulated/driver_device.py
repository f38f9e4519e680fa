"""NVML's functions on one device, for a simulated GPU. Each takes the arguments of the C function after the handle."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from perseus_core.gpu.simulated import model as physics
from perseus_core.gpu.simulated.driver_values import (
    referenced,
    write_fields,
    write_list,
    write_number,
    write_text,
)
from perseus_core.gpu.simulated.emulator import is_alive
from perseus_core.gpu.simulated.model import GpuState
from perseus_core.gpu.simulated.node import SimulatedGpu
from perseus_core.gpu.simulated.nvml_codes import Code

DEVICE_FUNCTIONS: dict[str, Callable[..., int]] = {}

# Names and numbers as in nvml.h.
_CLOCK_GRAPHICS, _CLOCK_SM, _CLOCK_MEM, _CLOCK_VIDEO = 0, 1, 2, 3
_REASON_IDLE, _REASON_POWER_CAP, _REASON_SW_THERMAL = 0x1, 0x4, 0x20
_FIELD_TOTAL_ENERGY, _FIELD_POWER_AVERAGE, _FIELD_POWER_INSTANT = 83, 185, 186
_VALUE_UNSIGNED_INT, _VALUE_UNSIGNED_LONG_LONG = 1, 3
_ARCHITECTURES = {(7, 0): 5, (7, 5): 6, (8, 0): 7, (8, 6): 7, (8, 9): 8, (9, 0): 9, (10, 0): 10}
_AMPERE = 7
_THERMAL_LIMIT_C, _SHUTDOWN_C, _AMBIENT_C = 88, 95, 32

_power_noise = random.Random()


def _named(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    def register(function: Callable[..., int]) -> Callable[..., int]:
        DEVICE_FUNCTIONS.update(dict.fromkeys(names, function))
        return function

    return register


# Who it is


@_named("nvmlDeviceGetName")
def _name(gpu: SimulatedGpu, buffer: Any, _length: Any) -> int:
    return write_text(buffer, gpu.identity.name)


@_named("nvmlDeviceGetUUID")
def _uuid(gpu: SimulatedGpu, buffer: Any, _length: Any) -> int:
    return write_text(buffer, gpu.identity.uuid)


@_named("nvmlDeviceGetSerial")
def _serial(gpu: SimulatedGpu, buffer: Any, _length: Any) -> int:
    return write_text(buffer, f"{1_320_000_000_000 + gpu.identity.index}")


@_named("nvmlDeviceGetIndex", "nvmlDeviceGetMinorNumber")
def _index(gpu: SimulatedGpu, index: Any) -> int:
    return write_number(index, gpu.identity.index)


@_named("nvmlDeviceGetPciInfo_v3", "nvmlDeviceGetPciInfo_v2")
def _pci_info(gpu: SimulatedGpu, info: Any) -> int:
    bus_id = gpu.identity.pci_bus_id
    domain, bus, device = (int(part, 16) for part in bus_id.split(".")[0].split(":"))
    return write_fields(
        referenced(info),
        busIdLegacy=bus_id[4:].encode(),
        busId=bus_id.encode(),
        domain=domain,
        bus=bus,
        device=device,
        pciDeviceId=0x20B210DE,
        pciSubSystemId=0x147F10DE,
    )


@_named("nvmlDeviceGetCudaComputeCapability")
def _compute_capability(gpu: SimulatedGpu, major: Any, minor: Any) -> int:
    write_number(major, gpu.settings.compute_capability[0])
    return write_number(minor, gpu.settings.compute_capability[1])


@_named("nvmlDeviceGetArchitecture")
def _architecture(gpu: SimulatedGpu, architecture: Any) -> int:
    return write_number(architecture, _ARCHITECTURES.get(gpu.settings.compute_capability, _AMPERE))


# Clocks


@_named("nvmlDeviceGetSupportedMemoryClocks")
def _supported_memory_clocks(gpu: SimulatedGpu, count: Any, clocks: Any) -> int:
    return write_list(count, clocks, [gpu.settings.memory_clock_mhz])


@_named("nvmlDeviceGetSupportedGraphicsClocks")
def _supported_graphics_clocks(gpu: SimulatedGpu, memory_clock: Any, count: Any, clocks: Any) -> int:
    if memory_clock.value != gpu.settings.memory_clock_mhz:
        return Code.NOT_FOUND
    return write_list(count, clocks, gpu.model.clocks_mhz)


@_named("nvmlDeviceGetClockInfo")
def _clock_info(gpu: SimulatedGpu, clock_type: Any, clock: Any) -> int:
    return _write_clock(gpu, clock_type, clock, gpu.reported_clock_mhz)


@_named("nvmlDeviceGetClock")
def _clock(gpu: SimulatedGpu, clock_type: Any, _clock_id: Any, clock: Any) -> int:
    return _write_clock(gpu, clock_type, clock, gpu.reported_clock_mhz)


@_named("nvmlDeviceGetMaxClockInfo")
def _max_clock_info(gpu: SimulatedGpu, clock_type: Any, clock: Any) -> int:
    return _write_clock(gpu, clock_type, clock, lambda: gpu.model.clocks_mhz[0])


def _write_clock(gpu: SimulatedGpu, clock_type: Any, clock: Any, sm_clock_mhz: Callable[[], int]) -> int:
    if clock_type.value in (_CLOCK_GRAPHICS, _CLOCK_SM):
        return write_number(clock, sm_clock_mhz())
    if clock_type.value == _CLOCK_MEM:
        return write_number(clock, gpu.settings.memory_clock_mhz)
    if clock_type.value == _CLOCK_VIDEO:
        return write_number(clock, sm_clock_mhz() * 0.9)
    return Code.INVALID_ARGUMENT


@_named("nvmlDeviceSetGpuLockedClocks")
def _set_locked_clocks(gpu: SimulatedGpu, lowest: Any, highest: Any) -> int:
    if lowest.value > highest.value or highest.value == 0:
        return Code.INVALID_ARGUMENT
    gpu.lock_clocks(lowest.value, highest.value)
    return Code.SUCCESS


@_named("nvmlDeviceResetGpuLockedClocks")
def _reset_locked_clocks(gpu: SimulatedGpu) -> int:
    gpu.reset_clocks()
    return Code.SUCCESS


@_named("nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetCurrentClocksEventReasons")
def _throttle_reasons(gpu: SimulatedGpu, reasons: Any) -> int:
    state = gpu.state()
    clocks = gpu.model.clocks_mhz
    heat_allows = physics.thermal_clock_index(gpu.model, state)
    value = 0
    if clocks[heat_allows] < clocks[physics.clock_index_at_most(gpu.model, state.set_clock_mhz)]:
        value |= _REASON_SW_THERMAL
    in_force = physics.effective_clock_index(gpu.model, state)
    capped_from_mhz = gpu.settings.shortcomings.power_cap_reported_from_mhz
    if in_force > heat_allows or (state.is_working and 0 < capped_from_mhz <= clocks[in_force]):
        value |= _REASON_POWER_CAP
    if not _living_pids(state):
        value |= _REASON_IDLE
    return write_number(reasons, value)


@_named("nvmlDeviceGetSupportedClocksThrottleReasons", "nvmlDeviceGetSupportedClocksEventReasons")
def _supported_throttle_reasons(_gpu: SimulatedGpu, reasons: Any) -> int:
    return write_number(reasons, _REASON_IDLE | _REASON_POWER_CAP | _REASON_SW_THERMAL)


@_named("nvmlDeviceGetPerformanceState")
def _performance_state(_gpu: SimulatedGpu, state: Any) -> int:
    return write_number(state, 0)


# Power and energy


@_named("nvmlDeviceGetPowerUsage")
def _power_usage(gpu: SimulatedGpu, power_mw: Any) -> int:
    return write_number(power_mw, _measured_power_w(gpu) * 1000)


@_named("nvmlDeviceGetTotalEnergyConsumption")
def _total_energy(gpu: SimulatedGpu, energy_mj: Any) -> int:
    return write_number(energy_mj, gpu.state().counter_j * 1000)


@_named("nvmlDeviceGetPowerManagementLimit", "nvmlDeviceGetEnforcedPowerLimit")
def _power_limit(gpu: SimulatedGpu, limit_mw: Any) -> int:
    return write_number(limit_mw, gpu.state().power_limit_w * 1000)


@_named("nvmlDeviceGetPowerManagementDefaultLimit")
def _default_power_limit(gpu: SimulatedGpu, limit_mw: Any) -> int:
    return write_number(limit_mw, gpu.settings.power_limits_w[1] * 1000)


@_named("nvmlDeviceGetPowerManagementLimitConstraints")
def _power_limit_constraints(gpu: SimulatedGpu, lowest_mw: Any, highest_mw: Any) -> int:
    write_number(lowest_mw, gpu.settings.power_limits_w[0] * 1000)
    return write_number(highest_mw, gpu.settings.power_limits_w[2] * 1000)


@_named("nvmlDeviceSetPowerManagementLimit")
def _set_power_limit(gpu: SimulatedGpu, limit_mw: Any) -> int:
    lowest_w, _, highest_w = gpu.settings.power_limits_w
    if not lowest_w <= limit_mw.value / 1000 <= highest_w:
        return Code.INVALID_ARGUMENT
    with gpu.changing() as state:
        state.power_limit_w = limit_mw.value / 1000
    return Code.SUCCESS


@_named("nvmlDeviceGetFieldValues")
def _field_values(gpu: SimulatedGpu, count: Any, values: Any) -> int:
    array = referenced(values)
    for index in range(count.value):
        entry = array[index]
        entry.timestamp = time.time_ns() // 1000
        entry.nvmlReturn = Code.SUCCESS
        if entry.fieldId == _FIELD_TOTAL_ENERGY:
            entry.valueType = _VALUE_UNSIGNED_LONG_LONG
            entry.value.ullVal = int(gpu.state().counter_j * 1000)
        elif entry.fieldId in (_FIELD_POWER_INSTANT, _FIELD_POWER_AVERAGE) and entry.scopeId == 0:
            entry.valueType = _VALUE_UNSIGNED_INT
            entry.value.uiVal = int(_measured_power_w(gpu) * 1000)
        else:
            entry.nvmlReturn = Code.NOT_SUPPORTED
    return Code.SUCCESS


def _measured_power_w(gpu: SimulatedGpu) -> float:
    sigma = gpu.settings.noise.power
    return gpu.true_power_w() * (max(0.0, _power_noise.gauss(1.0, sigma)) if sigma else 1.0)


# What a monitor shows


@_named("nvmlDeviceGetUtilizationRates")
def _utilization(gpu: SimulatedGpu, rates: Any) -> int:
    latest, before = gpu.state().counter_busy_s
    percent = round(100 * (latest - before) / gpu.model.counter_period_s)
    return write_fields(referenced(rates), gpu=percent, memory=percent // 2)


@_named("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2")
def _memory_info(gpu: SimulatedGpu, info: Any) -> int:
    total = gpu.settings.memory_bytes
    used = min(total, sum(process["usedGpuMemory"] for process in _processes(gpu)))
    return write_fields(referenced(info), total=total, reserved=0, used=used, free=total - used)


@_named("nvmlDeviceGetBAR1MemoryInfo")
def _bar1_memory_info(gpu: SimulatedGpu, info: Any) -> int:
    total = gpu.settings.memory_bytes
    return write_fields(referenced(info), bar1Total=total, bar1Used=0, bar1Free=total)


@_named("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2")
def _compute_processes(gpu: SimulatedGpu, count: Any, processes: Any) -> int:
    return write_list(count, processes, _processes(gpu))


@_named(
    "nvmlDeviceGetGraphicsRunningProcesses_v3",
    "nvmlDeviceGetGraphicsRunningProcesses_v2",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3",
    "nvmlDeviceGetMPSComputeRunningProcesses_v2",
)
def _no_processes(_gpu: SimulatedGpu, count: Any, processes: Any) -> int:
    return write_list(count, processes, [])


@_named("nvmlDeviceGetTemperature")
def _temperature(gpu: SimulatedGpu, _sensor: Any, temperature: Any) -> int:
    return write_number(temperature, _temperature_c(gpu))


@_named("nvmlDeviceGetTemperatureV")
def _temperature_structure(gpu: SimulatedGpu, temperature: Any) -> int:
    return write_fields(referenced(temperature), temperature=_temperature_c(gpu))


@_named("nvmlDeviceGetTemperatureThreshold")
def _temperature_threshold(_gpu: SimulatedGpu, threshold: Any, temperature: Any) -> int:
    return write_number(temperature, _SHUTDOWN_C if threshold.value == 0 else _THERMAL_LIMIT_C)


@_named("nvmlDeviceGetPersistenceMode")
def _persistence_mode(_gpu: SimulatedGpu, mode: Any) -> int:
    return write_number(mode, 1)


@_named("nvmlDeviceSetPersistenceMode")
def _set_persistence_mode(_gpu: SimulatedGpu, _mode: Any) -> int:
    return Code.SUCCESS


@_named("nvmlDeviceGetComputeMode", "nvmlDeviceGetDisplayMode", "nvmlDeviceGetDisplayActive")
def _disabled(_gpu: SimulatedGpu, mode: Any) -> int:
    return write_number(mode, 0)


@_named("nvmlDeviceGetMigMode")
def _mig_mode(_gpu: SimulatedGpu, current: Any, pending: Any) -> int:
    write_number(current, 0)
    return write_number(pending, 0)


@_named("nvmlDeviceIsMigDeviceHandle", "nvmlDeviceGetMaxMigDeviceCount")
def _no_mig(_gpu: SimulatedGpu, value: Any) -> int:
    return write_number(value, 0)


@_named("nvmlDeviceGetEncoderUtilization", "nvmlDeviceGetDecoderUtilization")
def _codec_utilization(_gpu: SimulatedGpu, percent: Any, period_us: Any) -> int:
    write_number(percent, 0)
    return write_number(period_us, 167_000)


@_named("nvmlDeviceGetTotalEccErrors")
def _ecc_errors(_gpu: SimulatedGpu, _error_type: Any, _counter_type: Any, count: Any) -> int:
    return write_number(count, 0)


@_named("nvmlDeviceGetPcieThroughput")
def _pcie_throughput(_gpu: SimulatedGpu, _counter: Any, throughput: Any) -> int:
    return write_number(throughput, 0)


@_named(
    "nvmlDeviceGetFanSpeed",
    "nvmlDeviceGetC2cModeInfoV",
    "nvmlDeviceGetDriverModel",  # a matter of Windows
    "nvmlDeviceGetDriverModel_v2",
    "nvmlDeviceGetProcessUtilization",
    "nvmlDeviceGetConfComputeMemSizeInfo",
    "nvmlDeviceGetRunningProcessDetailList",
    "nvmlDeviceSetMemoryLockedClocks",
    "nvmlDeviceResetMemoryLockedClocks",
)
def _not_supported(_gpu: SimulatedGpu, *_arguments: Any) -> int:
    return Code.NOT_SUPPORTED


def _temperature_c(gpu: SimulatedGpu) -> int:
    state = gpu.state()
    if state.thermal_limit_mhz:
        return _THERMAL_LIMIT_C
    return round(_AMBIENT_C + 45 * gpu.true_power_w() / gpu.settings.power_limits_w[1])


def _living_pids(state: GpuState) -> list[int]:
    return [pid for pid in state.pids if is_alive(pid)]


def _processes(gpu: SimulatedGpu) -> list[dict[str, int]]:
    """A training process fills a good half of the memory, however many share it."""
    pids = _living_pids(gpu.state())
    no_instance = 0xFFFFFFFF
    return [
        {
            "pid": pid,
            "usedGpuMemory": gpu.settings.memory_bytes * 6 // 10 // len(pids),
            "gpuInstanceId": no_instance,
            "computeInstanceId": no_instance,
        }
        for pid in pids
    ]
