"""The driver library of the simulated GPUs: NVML's C functions on an object that `pynvml` takes for the loaded library.

`pynvml` calls `nvmlLib.nvmlDeviceGetName(handle, buffer, c_uint(96))` and checks the integer that comes back; here
those are Python functions that take the same ctypes arguments, fill the same structures and return the same error
codes. A function that is not here is missing as a symbol is missing in an old library: `pynvml` raises
`NVMLError_FunctionNotFound`.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from perseus_core.gpu.simulated import faults
from perseus_core.gpu.simulated.driver_device import DEVICE_FUNCTIONS
from perseus_core.gpu.simulated.driver_values import referenced, write_text
from perseus_core.gpu.simulated.node import SimulatedGpu, SimulatedNode
from perseus_core.gpu.simulated.nvml_codes import Code, error_text

DRIVER_VERSION = "575.57.08"
_NVML_VERSION = "12.575.57.08"
_CUDA_VERSION = 12090
_HANG_SLICE_S = 0.02
_LOCK_CALLS = ("nvmlDeviceSetGpuLockedClocks", "nvmlDeviceResetGpuLockedClocks")


class SimulatedLibrary:
    """Stands for the loaded `libnvidia-ml.so.1` of one process."""

    def __init__(self, node: SimulatedNode) -> None:
        """Serves the GPUs of a node; like the real library, only after `nvmlInit`."""
        self.folder = node.folder
        self._node = node
        self._init_count = 0
        self._init_lock = threading.Lock()
        self._num_calls: Counter[tuple[int, str]] = Counter()
        # A handle is an address. Each GPU gets that of a small buffer, which therefore must stay alive.
        self._handle_targets = [ctypes.create_string_buffer(16) for _ in node.gpus]
        self._index_of_address = {ctypes.addressof(b): index for index, b in enumerate(self._handle_targets)}
        self._functions: dict[str, Callable[..., Any]] = {
            "nvmlInit_v2": self._init,
            "nvmlInitWithFlags": lambda _flags: self._init(),
            "nvmlShutdown": self._shutdown,
            "nvmlErrorString": _error_string,
            "nvmlSystemGetDriverVersion": self._needs_init(lambda text, _: write_text(text, DRIVER_VERSION)),
            "nvmlSystemGetNVMLVersion": self._needs_init(lambda text, _: write_text(text, _NVML_VERSION)),
            "nvmlSystemGetCudaDriverVersion": self._needs_init(_cuda_driver_version),
            "nvmlSystemGetCudaDriverVersion_v2": self._needs_init(_cuda_driver_version),
            "nvmlSystemGetProcessName": self._needs_init(_process_name),
            "nvmlDeviceGetCount_v2": self._needs_init(self._count),
            "nvmlDeviceGetHandleByIndex_v2": self._needs_init(self._handle_by_index),
            "nvmlDeviceGetHandleByUUID": self._needs_init(self._handle_by_uuid),
            "nvmlDeviceGetHandleByPciBusId_v2": self._needs_init(self._handle_by_pci_bus_id),
        }
        for name, function in DEVICE_FUNCTIONS.items():
            self._functions[name] = self._needs_init(self._on_device(name, function))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The C function of that name.

        Raises:
            AttributeError: if this library does not have it, as `ctypes.CDLL` raises for a missing symbol.
        """
        try:
            function = self.__dict__["_functions"][name]
        except KeyError:
            raise AttributeError(f"undefined symbol: {name}") from None
        assert callable(function)
        return _as_plain_function(function)

    def _init(self) -> int:
        with self._init_lock:
            self._init_count += 1
        return Code.SUCCESS

    def _shutdown(self) -> int:
        with self._init_lock:
            if self._init_count == 0:
                return Code.UNINITIALIZED
            self._init_count -= 1
        return Code.SUCCESS

    def _needs_init(self, function: Callable[..., int]) -> Callable[..., int]:
        def checked(*arguments: Any) -> int:
            return function(*arguments) if self._init_count else Code.UNINITIALIZED

        return checked

    def _on_device(self, name: str, function: Callable[..., int]) -> Callable[..., int]:
        """Finds the GPU of the handle, and lets its faults act before the function itself."""
        base_name = name.rsplit("_v", 1)[0]

        def called(handle: Any, *arguments: Any) -> int:
            index = self._index_of_address.get(ctypes.cast(handle, ctypes.c_void_p).value or 0)
            if index is None:
                return Code.INVALID_ARGUMENT
            gpu = self._node.gpus[index]
            broken = gpu.state().faults
            shortcomings = self._node.settings.shortcomings
            self._num_calls[index, base_name] += 1
            for errors in shortcomings.driver_errors:
                if errors.function == base_name and errors.fails(self._num_calls[index, base_name]):
                    return Code[errors.error]
            if base_name in broken.get(faults.HANG_S, {}):
                _hang(gpu, base_name)
            if broken.get(faults.LOST):
                return Code.GPU_IS_LOST
            if base_name in broken.get(faults.NOT_SUPPORTED, []):
                return Code.NOT_SUPPORTED
            if broken.get(faults.NO_PERMISSION) and base_name.startswith(("nvmlDeviceSet", "nvmlDeviceReset")):
                return Code.NO_PERMISSION
            if not shortcomings.lock_call_s:
                return function(gpu, *arguments)
            with self._node.only_call():
                code = function(gpu, *arguments)
                if base_name in _LOCK_CALLS:
                    time.sleep(shortcomings.lock_call_s)
                return code

        return called

    def _count(self, count: Any) -> int:
        referenced(count).value = len(self._node.gpus)
        return Code.SUCCESS

    def _give_handle(self, handle: Any, index: int) -> int:
        pointer = ctypes.c_void_p.from_buffer(referenced(handle))
        pointer.value = ctypes.addressof(self._handle_targets[index])
        return Code.SUCCESS

    def _handle_by_index(self, index: Any, handle: Any) -> int:
        if index.value >= len(self._node.gpus):
            return Code.INVALID_ARGUMENT
        return self._give_handle(handle, index.value)

    def _handle_by_uuid(self, uuid: Any, handle: Any) -> int:
        for gpu in self._node.gpus:
            if gpu.identity.uuid.encode() == uuid.value:
                return self._give_handle(handle, gpu.identity.index)
        return Code.NOT_FOUND

    def _handle_by_pci_bus_id(self, bus_id: Any, handle: Any) -> int:
        wanted = _pci_address(bus_id.value.decode())
        for gpu in self._node.gpus:
            if _pci_address(gpu.identity.pci_bus_id) == wanted:
                return self._give_handle(handle, gpu.identity.index)
        return Code.NOT_FOUND


def _as_plain_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """`pynvml` sets `restype` on what it gets, which a bound method does not allow."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    return call


def _hang(gpu: SimulatedGpu, function: str) -> None:
    """Sleeps as long as the fault says, or until it is cleared."""
    start_s = time.monotonic()
    while time.monotonic() - start_s < gpu.state().faults.get(faults.HANG_S, {}).get(function, 0.0):
        time.sleep(_HANG_SLICE_S)


def _error_string(code: int) -> bytes:
    return error_text(code).encode()


def _cuda_driver_version(version: Any) -> int:
    referenced(version).value = _CUDA_VERSION
    return Code.SUCCESS


def _process_name(pid: Any, name: Any, _length: Any) -> int:
    try:
        with open(f"/proc/{pid.value}/cmdline", "rb") as file:  # noqa: PTH123 (a pseudo file)
            return write_text(name, file.read().split(b"\0")[0].decode(errors="replace"))
    except OSError:
        return Code.NOT_FOUND


def _pci_address(bus_id: str) -> tuple[int, ...]:
    """(domain, bus, device) of `00000000:07:00.0` or `0000:07:00.0`."""
    try:
        return tuple(int(part, 16) for part in bus_id.split(".")[0].split(":"))
    except ValueError:
        return ()
