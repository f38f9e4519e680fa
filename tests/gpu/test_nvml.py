"""Our device over the real `pynvml`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest

import perseus_core.gpu
from perseus_core.gpu import nvml
from perseus_core.gpu.device import Device, ThrottleReason
from perseus_core.gpu.energy import PowerIntegrator
from perseus_core.gpu.errors import CallFailed, GpuError, GpuLost, NoDriver, NoPermission, NotSupported
from perseus_core.gpu.nvml import NvmlDevice, list_gpus
from perseus_core.gpu.simulated import SimulatedNode, WorkEmulator, faults
from perseus_core.gpu.simulated.activation import uninstall

from .conftest import BLOCKING_W, CLOCKS_MHZ


@pytest.fixture
def device(node: SimulatedNode) -> Device:
    return NvmlDevice(node.gpus[0].identity.uuid)


def test_identity_and_clocks_are_those_of_the_gpu(device: Device, node: SimulatedNode) -> None:
    """UUID, name, and the supported clocks, highest first."""
    assert device.uuid == node.gpus[0].identity.uuid
    assert device.name == "Test GPU"
    assert device.supported_clocks_mhz() == CLOCKS_MHZ


def test_a_lock_is_seen_in_the_read_back_and_so_is_an_override(device: Device, node: SimulatedNode) -> None:
    """Heat overrides the lock; the read-back tells the truth."""
    device.lock_clock(800)
    deadline_s = time.monotonic() + 10
    while device.sm_clock_mhz() != 800:
        assert time.monotonic() < deadline_s
    assert node.gpus[0].state().locked_mhz == [800, 800]
    faults.throttle(node.gpus[0], 500)
    assert device.sm_clock_mhz() == 500
    assert device.throttle_reasons() & ThrottleReason.THERMAL
    assert device.throttle_reasons().slows_training
    faults.clear(node.gpus[0])
    device.reset_clock()
    while device.sm_clock_mhz() != 1000:
        assert time.monotonic() < deadline_s
    assert node.gpus[0].state().locked_mhz == []


def test_power_and_its_limit_are_in_watts(device: Device) -> None:
    """A waiting GPU draws blocking power."""
    assert device.power_w() == pytest.approx(BLOCKING_W)
    assert device.power_limit_w() == pytest.approx(400)
    device.set_power_limit(250)
    assert device.power_limit_w() == pytest.approx(250)


def test_power_falls_back_where_the_field_is_not_supported(device: Device, node: SimulatedNode) -> None:
    """Older drivers do not know the field of instant power."""
    faults.remove_support(node.gpus[0], "nvmlDeviceGetFieldValues")
    assert device.power_w() == pytest.approx(BLOCKING_W)


def test_energy_is_the_counter_in_joules(device: Device, node: SimulatedNode) -> None:
    """It follows the true energy by at most a period."""
    WorkEmulator(node, 0).work("backward", stage=1)
    assert device.counts_energy
    before_j = node.gpus[0].true_energy_j()
    counted_j = device.total_energy_j()
    assert before_j - 300 * 0.1 <= counted_j + 0.001 <= node.gpus[0].true_energy_j() + 0.001


def test_energy_is_integrated_where_there_is_no_counter(device: Device, node: SimulatedNode) -> None:
    """Power samples, integrated from the first call on, come close to the truth."""
    faults.remove_support(node.gpus[0], "nvmlDeviceGetTotalEnergyConsumption")
    assert not device.counts_energy
    truth_j = [node.gpus[0].true_energy_j()]
    first_j = device.total_energy_j()
    truth_j.append(node.gpus[0].true_energy_j())
    time.sleep(0.2)
    truth_j.append(node.gpus[0].true_energy_j())
    gained_j = device.total_energy_j() - first_j
    truth_j.append(node.gpus[0].true_energy_j())
    assert (truth_j[2] - truth_j[1]) * 0.999 <= gained_j <= (truth_j[3] - truth_j[0]) * 1.001


def test_the_integrator_is_exact_for_constant_power_and_reports_its_end() -> None:
    """Power times time; and when the power cannot be read any more, whoever asks is told why."""
    integrator = PowerIntegrator(lambda: 100.0, period_s=0.001)
    start_s = time.monotonic()
    first_j = integrator.energy_j()
    time.sleep(0.05)
    gained_j = integrator.energy_j() - first_j
    assert 100 * 0.05 <= gained_j <= 100 * (time.monotonic() - start_s)
    integrator.stop_with(GpuLost("gone"))
    with pytest.raises(GpuLost, match="gone"):
        integrator.energy_j()


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (pynvml.NVML_ERROR_NO_PERMISSION, NoPermission, "CAP_SYS_ADMIN"),
        (pynvml.NVML_ERROR_NOT_SUPPORTED, NotSupported, "not supported"),
        (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, NotSupported, "newer driver"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, GpuLost, "dmesg"),
        (pynvml.NVML_ERROR_RESET_REQUIRED, GpuLost, "reset"),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, NoDriver, "perseus simulate"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, NoDriver, "driver"),
        (pynvml.NVML_ERROR_NOT_FOUND, GpuError, "no such GPU"),
        (pynvml.NVML_ERROR_UNKNOWN, CallFailed, "code 999"),
        (pynvml.NVML_ERROR_TIMEOUT, CallFailed, "may pass"),
        (pynvml.NVML_ERROR_CORRUPTED_INFOROM, GpuError, "code 14"),
    ],
)
def test_nvml_errors_become_our_few(node: SimulatedNode, code: int, kind: type[GpuError], words: str) -> None:
    """The message says what was being done, on which GPU, and what helps."""

    def fail(_nvml: Any) -> None:
        raise pynvml.NVMLError(code)

    with pytest.raises(GpuError) as caught:
        nvml.ask("locking the clock", "GPU-7", fail)
    assert type(caught.value) is kind
    assert str(caught.value).startswith("locking the clock on GPU-7: ")
    assert words in str(caught.value)


def test_only_ask_touches_pynvml() -> None:
    """No module of the product imports pynvml, and nvml.py reaches it in one function only."""
    folder = Path(perseus_core.gpu.__file__).parent
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = [
            name.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names
        ]
        assert "pynvml" not in imported, path
    tree = ast.parse((folder / "nvml.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    users = [f.name for f in functions if "_import_pynvml" in {n.id for n in ast.walk(f) if isinstance(n, ast.Name)}]
    assert users == ["ask"]


def test_threads_initialise_nvml_once(node: SimulatedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ask first at the same time."""
    calls = []
    real_init = pynvml.nvmlInit

    def counting_init() -> None:
        calls.append(1)
        time.sleep(0.05)
        real_init()

    monkeypatch.setattr(pynvml, "nvmlInit", counting_init)
    monkeypatch.setattr(nvml, "_initialised", False)
    threads = [threading.Thread(target=list_gpus) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_somebody_elses_shutdown_is_survived(device: Device) -> None:
    """A monitor in the same process that shuts NVML down once too often does not break us."""
    assert device.sm_clock_mhz() == 1000
    pynvml.nvmlShutdown()
    assert device.sm_clock_mhz() == 1000


def test_a_forked_child_initialises_for_itself(device: Device) -> None:
    """NVML does not survive a fork; data loaders fork."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if not nvml._initialised and device.sm_clock_mhz() == 1000 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_unknown_uuid_is_an_error(node: SimulatedNode) -> None:
    """With the UUID in the message."""
    with pytest.raises(GpuError, match="GPU-absent: no such GPU"):
        NvmlDevice("GPU-absent")


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nvidia-ml-py` is optional."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoDriver, match="pip install nvidia-ml-py"):
        list_gpus()


def test_hardware_slowdown_is_told_apart(node: SimulatedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power brake sets the general hardware bit too, and is not heat."""
    device = NvmlDevice(node.gpus[0].identity.uuid)
    answers = {0x0: ThrottleReason.NONE, 0x88: ThrottleReason.POWER_BRAKE, 0x48: ThrottleReason.THERMAL}
    answers |= {0x800: ThrottleReason.OTHER, 0x5: ThrottleReason.IDLE | ThrottleReason.POWER_CAP}
    for bits, expected in answers.items():
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda _handle, bits=bits: bits)
        assert device.throttle_reasons() == expected


def test_importing_the_package_loads_neither_pynvml_nor_the_simulator(
    start_python: Callable[..., subprocess.Popen[str]],
) -> None:
    """Machines without GPUs and without nvidia-ml-py can plan."""
    process = start_python(
        """
import sys
import perseus_core.gpu.discovery
assert "pynvml" not in sys.modules
assert "perseus_core.gpu.simulated" not in sys.modules
"""
    )
    assert process.wait(timeout=30) == 0


def test_the_variable_alone_brings_the_simulated_gpus(
    node: SimulatedNode, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    """A process that only imports the product, before or after pynvml, sees the shared GPUs."""
    uninstall()
    for first in ("pynvml", "perseus_core.gpu"):
        process = start_python(
            f"import {first}\nfrom perseus_core.gpu.discovery import visible_devices\nprint(visible_devices()[1].uuid)",
            PERSEUS_SIMULATED_GPUS=str(node.folder),
        )
        assert process.communicate(timeout=30)[0].strip() == node.gpus[1].identity.uuid
