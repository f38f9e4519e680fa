"""Checks of what a GPU description holds. Errors name the field, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from perseus_core.errors import InputError


def require_number(name: str, value: object, lowest: float, highest: float, *, integer: bool = False) -> None:
    """Refuses what is no number of this range."""
    is_number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    within = isinstance(value, (int, float)) and math.isfinite(value) and lowest <= value <= highest
    if not (is_number and within):
        kind = "whole number" if integer else "number"
        raise InputError(f'"{name}" is {value!r}; it must be a {kind} from {lowest:g} to {highest:g}')


def read_object(name: str, value: object, keys: set[str]) -> Mapping[str, Any]:
    """A JSON object with some of these keys, and no others."""
    if not isinstance(value, dict) or not set(value) <= keys:
        raise InputError(f'"{name}" is {value!r}; it must be an object with {", ".join(sorted(keys))}')
    return value


def read_list(name: str, value: object) -> tuple[Any, ...]:
    """A JSON list."""
    if not isinstance(value, list):
        raise InputError(f'"{name}" is {value!r}; it must be a list')
    return tuple(value)
