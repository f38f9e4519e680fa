"""How the simulated driver reads and writes the ctypes arguments that `pynvml` passes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from perseus_core.gpu.simulated.nvml_codes import Code


def referenced(argument: Any) -> Any:
    """What a `byref(...)` or a pointer points to; an array stands for itself, as in C."""
    if hasattr(argument, "_obj"):
        return argument._obj
    if isinstance(argument, ctypes._Pointer):
        return argument.contents
    return argument


def write_number(argument: Any, value: float) -> int:
    """Writes a number to where a pointer argument points."""
    referenced(argument).value = int(value)
    return Code.SUCCESS


def write_text(buffer: Any, text: str) -> int:
    """Writes a C string into a buffer, if it fits."""
    content = text.encode()
    if len(content) >= len(buffer):
        return Code.INSUFFICIENT_SIZE
    buffer.value = content
    return Code.SUCCESS


def write_list(count: Any, array: Any, values: Sequence[Any]) -> int:
    """The NVML way to return a list: without room for it, tell the size; with room, fill it and tell how much."""
    number = referenced(count)
    room, number.value = number.value, len(values)
    if not values:
        return Code.SUCCESS
    if array is None or room < len(values):
        return Code.INSUFFICIENT_SIZE
    for index, value in enumerate(values):
        if isinstance(value, dict):
            write_fields(array[index], **value)
        else:
            array[index] = value
    return Code.SUCCESS


def write_fields(structure: Any, **values: Any) -> int:
    """Fills those members of a structure that this version of it has."""
    members = {name for name, *_ in structure._fields_}
    for name, value in values.items():
        if name in members:
            setattr(structure, name, value)
    return Code.SUCCESS
