"""Each fault, switched on while everything runs, and switched off again."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable

import pytest

from perseus_core.gpu.errors import GpuLost, NoPermission, NotSupported
from perseus_core.gpu.nvml import NvmlDevice
from perseus_core.gpu.simulated import SimulatedGpu, SimulatedNode, WorkEmulator, faults


@pytest.fixture
def gpu(node: SimulatedNode) -> SimulatedGpu:
    return node.gpus[0]


@pytest.fixture
def device(gpu: SimulatedGpu) -> NvmlDevice:
    return NvmlDevice(gpu.identity.uuid)


def test_denied_permission_stops_setting_but_not_reading(gpu: SimulatedGpu, device: NvmlDevice) -> None:
    """As for an unprivileged process."""
    faults.deny_permission(gpu)
    with pytest.raises(NoPermission):
        device.lock_clock(800)
    with pytest.raises(NoPermission):
        device.reset_clock()
    assert device.sm_clock_mhz() == 1000
    faults.clear(gpu)
    device.lock_clock(800)


def test_a_single_function_can_lack_support(gpu: SimulatedGpu, device: NvmlDevice) -> None:
    """Named without its version, and only on this GPU."""
    faults.remove_support(gpu, "nvmlDeviceSetGpuLockedClocks")
    with pytest.raises(NotSupported):
        device.lock_clock(800)
    device.reset_clock()


def test_a_lost_gpu_answers_nothing_but_its_work_goes_on(
    node: SimulatedNode, gpu: SimulatedGpu, device: NvmlDevice
) -> None:
    """The fault is the driver's: what trains on it does not notice."""
    faults.lose(gpu)
    for call in (device.sm_clock_mhz, device.power_w, device.reset_clock):
        with pytest.raises(GpuLost):
            call()
    assert WorkEmulator(node, 0).work("forward").clocks[0][0] == 1000


def test_a_hanging_call_lets_other_threads_and_gpus_live(
    node: SimulatedNode, gpu: SimulatedGpu, device: NvmlDevice
) -> None:
    """It holds no lock while it hangs, and ends when the fault is cleared."""
    faults.hang(gpu, "nvmlDeviceSetGpuLockedClocks", 3600)
    hanging = threading.Thread(target=device.lock_clock, args=(800,), daemon=True)
    hanging.start()
    assert device.sm_clock_mhz() == 1000
    NvmlDevice(node.gpus[1].identity.uuid).lock_clock(800)
    hanging.join(timeout=0.1)
    assert hanging.is_alive()
    faults.clear(gpu)
    hanging.join(timeout=60)
    assert not hanging.is_alive()


def test_heat_in_the_middle_of_work_slows_the_rest_of_it(
    make_node: Callable[..., SimulatedNode], start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    """Another process makes this GPU the straggler, and the work that runs meets the lower clock."""
    node = make_node(time_scale=40)
    other = start_python(
        """
from perseus_core.gpu import simulated
from perseus_core.gpu.simulated import faults
gpu = simulated.open_node(folder).gpus[0]
print("ready", flush=True)
while not gpu.state().is_working:
    pass
faults.throttle(gpu, 500)
"""
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    emulator = WorkEmulator(node, 0)
    executed = emulator.work("backward", stage=1)
    assert other.wait(timeout=60) == 0
    assert [clock for clock, _ in executed.clocks] == [1000, 500]
    assert node.gpus[0].effective_clock_mhz() == 500
