"""NVIDIA GPUs through NVML, by way of the `pynvml` module of the package `nvidia-ml-py`.

Every call goes through `ask`, which alone loads and initialises NVML and alone decides what its errors mean.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from perseus_core.gpu.device import ThrottleReason
from perseus_core.gpu.energy import PowerIntegrator
from perseus_core.gpu.errors import CallFailed, GpuError, GpuLost, NoDriver, NoPermission, NotSupported

T = TypeVar("T")

_PERMISSION_REMEDY = "run as root, give the process CAP_SYS_ADMIN, or start zeusd and set ZEUSD_SOCK_PATH"
_LOST_REMEDY = "see `dmesg` for Xid errors, then reset the GPU or restart the machine"

_init_lock = threading.Lock()
_initialised = False


@dataclass(frozen=True)
class GpuIdentity:
    """What tells one GPU from another.

    Attributes:
        index: NVML's index, in the order of PCI addresses.
        uuid: `GPU-...`.
        name: product name.
        pci_bus_id: `00000000:07:00.0`.
        is_split: whether it is in MIG mode, so that its slices and not itself do the work.
    """

    index: int
    uuid: str
    name: str
    pci_bus_id: str
    is_split: bool = False


def ask(doing: str, gpu: str, call: Callable[[Any], T]) -> T:
    """Makes NVML calls. The only place that makes any.

    Args:
        doing: what for, as in "reading the power": the start of the error message.
        gpu: which GPU, for the message; "this machine" where it concerns all.
        call: gets the `pynvml` module, and may raise its `NVMLError`.

    Raises:
        NoDriver: if NVML is not there.
        NoPermission: if this process may not do that.
        NotSupported: if the GPU or the driver cannot.
        GpuLost: if the GPU has gone.
        CallFailed: if it failed for a reason that may pass.
        GpuError: for any other NVML error.
    """
    nvml = _import_pynvml()
    try:
        _initialise_once(nvml)
        try:
            return call(nvml)
        except nvml.NVMLError_Uninitialized:
            # Somebody else in this process has called nvmlShutdown once too often.
            _forget_initialisation()
            _initialise_once(nvml)
            return call(nvml)
    except nvml.NVMLError as error:
        raise _our_error(nvml, error, f"{doing} on {gpu}") from error


def _import_pynvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        raise NoDriver(
            "the Python package nvidia-ml-py is missing; install it with `pip install nvidia-ml-py`"
        ) from None


def _initialise_once(nvml: Any) -> None:
    global _initialised
    if _initialised:
        return
    with _init_lock:
        if not _initialised:
            nvml.nvmlInit()
            _initialised = True


def _forget_initialisation() -> None:
    """To initialise again: in a forked child, which NVML does not survive and where nobody holds the lock."""
    global _init_lock, _initialised
    _init_lock = threading.Lock()
    _initialised = False


os.register_at_fork(after_in_child=_forget_initialisation)


# nvml.h, of a driver that is busy or being reset: timeout, interrupt request, operating system, in use, memory, no
# data, insufficient resources, not ready, invalid state, unknown.
_MAY_PASS = frozenset({10, 11, 17, 19, 20, 21, 23, 27, 29, 999})


def _our_error(nvml: Any, error: Any, what: str) -> GpuError:
    code = error.value
    if code == nvml.NVML_ERROR_NO_PERMISSION:
        return NoPermission(f"{what}: no permission; {_PERMISSION_REMEDY}")
    if code in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND):
        return NotSupported(f"{what}: not supported by this GPU or driver ({error}); a newer driver may help")
    if code in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
        return GpuLost(f"{what}: the GPU is lost or needs a reset; {_LOST_REMEDY}")
    if code in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
        return NoDriver(f"{what}: no NVIDIA driver is loaded ({error}); install it, or try `perseus simulate`")
    if code == nvml.NVML_ERROR_NOT_FOUND:
        return GpuError(f"{what}: no such GPU; `nvidia-smi -L` lists those of this machine")
    if code in _MAY_PASS:
        return CallFailed(f"{what}: NVML reports {error} (code {code}), which may pass; see `dmesg` if it does not")
    return GpuError(f"{what}: NVML reports {error} (code {code}); see `nvidia-smi` for the state of the GPU")


def list_gpus() -> list[GpuIdentity]:
    """Every GPU of this machine, in NVML's order, which is that of PCI addresses.

    Raises:
        NoDriver: if there is no NVIDIA driver.
        GpuError: if a GPU cannot be asked.
    """
    count = ask("counting the GPUs", "this machine", lambda nvml: nvml.nvmlDeviceGetCount())
    return [_identify(index) for index in range(count)]


def _identify(index: int) -> GpuIdentity:
    def identify(nvml: Any) -> GpuIdentity:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        bus_id = nvml.nvmlDeviceGetPciInfo(handle).busId
        try:
            current_mode, _ = nvml.nvmlDeviceGetMigMode(handle)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            current_mode = 0  # before Ampere
        return GpuIdentity(
            index,
            nvml.nvmlDeviceGetUUID(handle),
            nvml.nvmlDeviceGetName(handle),
            bus_id.decode() if isinstance(bus_id, bytes) else bus_id,
            is_split=bool(current_mode),
        )

    return ask("identifying it", f"GPU {index}", identify)


def driver_version() -> str:
    """The driver's version, as `575.57.08`.

    Raises:
        NoDriver: if there is none.
    """
    return str(ask("reading the driver version", "this machine", lambda nvml: nvml.nvmlSystemGetDriverVersion()))


def computing_processes(uuid: str) -> list[int]:
    """Processes that compute on a GPU, as the driver numbers them: in a container they may be others than seen there.

    Raises:
        GpuError: if it cannot be asked.
    """

    def read(nvml: Any) -> list[int]:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        return sorted(int(process.pid) for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle))

    return ask("listing the processes", uuid, read)


class NvmlDevice:
    """One GPU through NVML: a `perseus_core.gpu.device.Device`.

    Raises:
        NoDriver: if there is no NVIDIA driver.
        GpuError: if no GPU has that UUID.
    """

    def __init__(self, uuid: str) -> None:
        """Finds the GPU by its UUID, the only name that means the same to everybody."""
        self._uuid = uuid
        self._handle = self._ask("finding it", lambda nvml: nvml.nvmlDeviceGetHandleByUUID(uuid))
        self._integrator: PowerIntegrator | None = None
        self._integrator_lock = threading.Lock()

    def __repr__(self) -> str:
        """Name and UUID."""
        return f"{type(self).__name__}({self.name}, {self.uuid})"

    @property
    def uuid(self) -> str:
        """The UUID, `GPU-...`."""
        return self._uuid

    @cached_property
    def name(self) -> str:
        """The product name (nvmlDeviceGetName)."""
        return str(self._ask("reading the name", lambda nvml: nvml.nvmlDeviceGetName(self._handle)))

    @cached_property
    def identity(self) -> GpuIdentity:
        """Its NVML index, PCI address and whether it is split."""
        index = self._ask("reading the index", lambda nvml: nvml.nvmlDeviceGetIndex(self._handle))
        return _identify(index)

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        """Graphics clocks at the highest memory clock, highest first (nvmlDeviceGetSupportedGraphicsClocks)."""
        return self._supported_clocks_mhz

    @cached_property
    def _supported_clocks_mhz(self) -> tuple[int, ...]:
        def list_clocks(nvml: Any) -> list[int]:
            memory_clock = max(nvml.nvmlDeviceGetSupportedMemoryClocks(self._handle))
            clocks: list[int] = nvml.nvmlDeviceGetSupportedGraphicsClocks(self._handle, memory_clock)
            return clocks

        return tuple(sorted(set(self._ask("listing the supported clocks", list_clocks)), reverse=True))

    def sm_clock_mhz(self) -> int:
        """The SM clock now (nvmlDeviceGetClockInfo)."""
        return self._ask_int(
            "reading the clock", lambda nvml: nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)
        )

    def lock_clock(self, clock_mhz: int) -> None:
        """Asks for one fixed clock (nvmlDeviceSetGpuLockedClocks)."""
        self._ask(
            f"locking the clock at {clock_mhz} MHz",
            lambda nvml: nvml.nvmlDeviceSetGpuLockedClocks(self._handle, clock_mhz, clock_mhz),
        )

    def reset_clock(self) -> None:
        """Gives the clock back to the driver (nvmlDeviceResetGpuLockedClocks)."""
        self._ask("resetting the clock", lambda nvml: nvml.nvmlDeviceResetGpuLockedClocks(self._handle))

    def power_limit_w(self) -> float:
        """The power limit in force (nvmlDeviceGetEnforcedPowerLimit)."""
        milliwatts = self._ask_int(
            "reading the power limit", lambda nvml: nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle)
        )
        return milliwatts / 1000

    def set_power_limit(self, limit_w: float) -> None:
        """Sets the power limit (nvmlDeviceSetPowerManagementLimit). Nothing in this package calls it."""
        self._ask(
            f"setting the power limit to {limit_w:g} W",
            lambda nvml: nvml.nvmlDeviceSetPowerManagementLimit(self._handle, round(limit_w * 1000)),
        )

    def power_w(self) -> float:
        """The power now: the field POWER_INSTANT, or where that is not supported nvmlDeviceGetPowerUsage.

        The latter is an average over a second on many GPUs.
        """

        def read(nvml: Any) -> int:
            try:
                field = nvml.nvmlDeviceGetFieldValues(self._handle, [nvml.NVML_FI_DEV_POWER_INSTANT])[0]
                if field.nvmlReturn == nvml.NVML_SUCCESS:
                    return int(field.value.uiVal)
            except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
                pass
            return int(nvml.nvmlDeviceGetPowerUsage(self._handle))

        return self._ask("reading the power", read) / 1000

    @cached_property
    def counts_energy(self) -> bool:
        """Whether nvmlDeviceGetTotalEnergyConsumption is supported (Volta and newer)."""
        try:
            self._counted_energy_j()
        except NotSupported:
            return False
        return True

    def total_energy_j(self) -> float:
        """The GPU's energy counter, or where it has none the integral of its power since the first call."""
        if self.counts_energy:
            return self._counted_energy_j()
        with self._integrator_lock:
            if self._integrator is None:
                self._integrator = PowerIntegrator(self.power_w)
        return self._integrator.energy_j()

    def _counted_energy_j(self) -> float:
        millijoules = self._ask_int(
            "reading the energy counter", lambda nvml: nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        )
        return millijoules / 1000

    def throttle_reasons(self) -> ThrottleReason:
        """What holds the clock down now (nvmlDeviceGetCurrentClocksThrottleReasons)."""
        bits = self._ask_int(
            "reading the throttle reasons", lambda nvml: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        )
        return _throttle_reasons(bits)

    def _ask(self, doing: str, call: Callable[[Any], T]) -> T:
        return ask(doing, self._uuid, call)

    def _ask_int(self, doing: str, call: Callable[[Any], Any]) -> int:
        return int(self._ask(doing, call))


# nvml.h: nvmlClocksThrottleReason*
_REASON_BITS = {
    0x001: ThrottleReason.IDLE,
    0x002: ThrottleReason.APPLICATION_CLOCKS,
    0x004: ThrottleReason.POWER_CAP,
    0x008: ThrottleReason.THERMAL,  # hardware slowdown: heat or power brake, told apart by the bits below
    0x010: ThrottleReason.OTHER,  # sync boost
    0x020: ThrottleReason.THERMAL,
    0x040: ThrottleReason.THERMAL,
    0x080: ThrottleReason.POWER_BRAKE,
    0x100: ThrottleReason.OTHER,  # display clock
}
_HARDWARE_SLOWDOWN, _POWER_BRAKE = 0x008, 0x080


def _throttle_reasons(bits: int) -> ThrottleReason:
    if bits & _POWER_BRAKE:
        bits &= ~_HARDWARE_SLOWDOWN
    reasons = ThrottleReason.NONE
    for position in range(bits.bit_length()):
        bit = 1 << position
        if bits & bit:
            reasons |= _REASON_BITS.get(bit, ThrottleReason.OTHER)
    return reasons
