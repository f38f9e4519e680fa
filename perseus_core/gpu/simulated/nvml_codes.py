"""NVML's return codes and what the driver says of them (`nvmlReturn_t` and `nvmlErrorString` of nvml.h)."""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """One of NVML's return codes, named as in nvml.h without `NVML_` and `NVML_ERROR_`."""

    SUCCESS = 0
    UNINITIALIZED = 1
    INVALID_ARGUMENT = 2
    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    ALREADY_INITIALIZED = 5
    NOT_FOUND = 6
    INSUFFICIENT_SIZE = 7
    INSUFFICIENT_POWER = 8
    DRIVER_NOT_LOADED = 9
    TIMEOUT = 10
    IRQ_ISSUE = 11
    LIBRARY_NOT_FOUND = 12
    FUNCTION_NOT_FOUND = 13
    CORRUPTED_INFOROM = 14
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    OPERATING_SYSTEM = 17
    LIB_RM_VERSION_MISMATCH = 18
    IN_USE = 19
    MEMORY = 20
    NO_DATA = 21
    VGPU_ECC_NOT_SUPPORTED = 22
    INSUFFICIENT_RESOURCES = 23
    FREQ_NOT_SUPPORTED = 24
    ARGUMENT_VERSION_MISMATCH = 25
    DEPRECATED = 26
    NOT_READY = 27
    GPU_NOT_FOUND = 28
    INVALID_STATE = 29
    RESET_TYPE_NOT_SUPPORTED = 30
    UNKNOWN = 999


_TEXTS = {
    Code.SUCCESS: "Success",
    Code.UNINITIALIZED: "Uninitialized",
    Code.INVALID_ARGUMENT: "Invalid Argument",
    Code.NOT_SUPPORTED: "Not Supported",
    Code.NO_PERMISSION: "Insufficient Permissions",
    Code.ALREADY_INITIALIZED: "Already Initialized",
    Code.NOT_FOUND: "Not Found",
    Code.INSUFFICIENT_SIZE: "Insufficient Size",
    Code.INSUFFICIENT_POWER: "Insufficient External Power",
    Code.DRIVER_NOT_LOADED: "Driver Not Loaded",
    Code.TIMEOUT: "Timeout",
    Code.IRQ_ISSUE: "Interrupt Request Issue",
    Code.LIBRARY_NOT_FOUND: "NVML Shared Library Not Found",
    Code.FUNCTION_NOT_FOUND: "Function Not Found",
    Code.CORRUPTED_INFOROM: "Corrupted infoROM",
    Code.GPU_IS_LOST: "GPU is lost",
    Code.RESET_REQUIRED: "GPU requires reset",
    Code.OPERATING_SYSTEM: "GPU access blocked by the operating system",
    Code.LIB_RM_VERSION_MISMATCH: "Driver/library version mismatch",
    Code.IN_USE: "In use by another client",
    Code.MEMORY: "Insufficient Memory",
    Code.NO_DATA: "No data",
    Code.VGPU_ECC_NOT_SUPPORTED: "The requested vGPU operation is not available on target device",
    Code.INSUFFICIENT_RESOURCES: "Insufficient Resources",
    Code.FREQ_NOT_SUPPORTED: "Frequency Not Supported",
    Code.ARGUMENT_VERSION_MISMATCH: "Argument Version Mismatch",
    Code.DEPRECATED: "Deprecated",
    Code.NOT_READY: "Not Ready",
    Code.GPU_NOT_FOUND: "GPU Not Found",
    Code.INVALID_STATE: "Invalid State",
    Code.RESET_TYPE_NOT_SUPPORTED: "Reset Type Not Supported",
    Code.UNKNOWN: "Unknown Error",
}


def error_text(value: int) -> str:
    """What `nvmlErrorString` says of a number; of one that is no code, too."""
    return _TEXTS[Code(value)] if value in _TEXTS else _TEXTS[Code.UNKNOWN]
