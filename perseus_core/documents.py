"""JSON files with a format name and a version, read field by field: whatever is wrong is named in one sentence."""

from __future__ import annotations

import base64
import binascii
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from perseus_core.errors import InputError
from perseus_core.files import write_text

MAX_FILE_BYTES = 256 * 2**20

Choice = TypeVar("Choice", bound=Enum)


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object, read with their types checked.

    Attributes:
        where: the file, and the path to this object in it, as error messages name it.
        fields: the object.
    """

    where: str
    fields: Mapping[str, Any]

    def number(self, name: str, *, at_least: float = -math.inf) -> float:
        """A finite number."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(name, value, "must be a finite number")
        if value < at_least:
            raise self.error(name, value, f"must be {at_least:g} or more")
        return float(value)

    def integer(self, name: str, *, at_least: int = 0) -> int:
        """A whole number."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise self.error(name, value, f"must be a whole number, {at_least} or more")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self._get(name)
        if not isinstance(value, str):
            raise self.error(name, value, "must be text")
        return value

    def choice(self, name: str, choices: type[Choice]) -> Choice:
        """A value of an enumeration."""
        value = self._get(name)
        values = [each.value for each in choices]
        if value not in values:
            raise self.error(name, value, f"must be one of {', '.join(values)}")
        return choices(value)

    def items(self, name: str) -> list[Any]:
        """A list of anything."""
        value = self._get(name)
        if not isinstance(value, list):
            raise self.error(name, value, "must be a list")
        return value

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers."""
        values = self.items(name)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise self.error(name, value, "must hold finite numbers only")
        return [float(value) for value in values]

    def section(self, name: str) -> Fields:
        """An object within this one."""
        value = self._get(name)
        if not isinstance(value, dict):
            raise self.error(name, value, "must be an object")
        return Fields(f'{self.where}, "{name}"', value)

    def array(self, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
        """A packed array, see `pack`."""
        text, size = self.text(name), math.prod(shape) * np.dtype(dtype).itemsize
        try:
            unpacker = zlib.decompressobj()
            content = unpacker.decompress(base64.b64decode(text, validate=True), size + 1)
        except (binascii.Error, zlib.error):
            raise self.error(name, text, "is not a packed array") from None
        if len(content) != size:
            raise self.error(name, text, f"does not hold {' x '.join(map(str, shape))} values")
        return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).reshape(shape).astype(dtype)

    def error(self, name: str, value: object, remedy: str) -> InputError:
        """The error that a field's value deserves."""
        shown = json.dumps(value, default=str)
        return InputError(
            f'{self.where}: field "{name}" is {shown if len(shown) < 60 else shown[:57] + "..."}; it {remedy}'
        )

    def _get(self, name: str) -> Any:
        if name not in self.fields:
            raise InputError(f'{self.where}: field "{name}" is missing; write the file again with this version')
        return self.fields[name]


def pack(array: NDArray[Any]) -> str:
    """An array as compressed text, little-endian whatever the machine."""
    content = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return base64.b64encode(zlib.compress(content, 9)).decode()


def save_document(path: str | Path, format_name: str, version: int, fields: Mapping[str, Any]) -> None:
    """Writes a document as a whole or not at all."""
    document = {"format": format_name, "version": version, **fields}
    write_text(path, json.dumps(document, allow_nan=False, separators=(",", ":")) + "\n")


def load_document(path: str | Path, format_name: str, version: int) -> Fields:
    """Reads a document of this format and version.

    Raises:
        InputError: if it cannot be read, is no JSON object, or has another format or version.
    """
    fields = _read(Path(path), format_name)
    content = fields.fields
    if content.get("format") != format_name:
        raise fields.error("format", content.get("format"), f'must be "{format_name}"')
    if content.get("version") != version:
        raise fields.error(
            "version", content.get("version"), f"must be {version}, the one this release writes and reads"
        )
    return fields


def document_format(path: str | Path) -> str | None:
    """The format a document says it has, or None.

    Raises:
        InputError: if it cannot be read or is no JSON object.
    """
    name = _read(Path(path), "perseus document").fields.get("format")
    return name if isinstance(name, str) else None


def _read(path: Path, format_name: str) -> Fields:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            limit_mib = MAX_FILE_BYTES >> 20
            raise InputError(f"{path}: {size / 2**20:.0f} MiB is too large for a {format_name} (limit {limit_mib} MiB)")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of a {format_name} file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error}); give a {format_name} file") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; give a {format_name} file")
    return Fields(str(path), content)


def rows(fields: Fields, name: str, columns: Sequence[type]) -> list[list[Any]]:
    """A list of rows with a value of a given type in each column (float takes whole numbers too)."""
    checked = []
    for row in fields.items(name):
        fits = isinstance(row, list) and len(row) == len(columns)
        if not fits or not all(map(_is, row, columns)):
            wanted = ", ".join(column.__name__ for column in columns)
            raise fields.error(name, row, f"must hold rows of ({wanted}), numbers finite")
        checked.append([column(value) for value, column in zip(row, columns, strict=True)])
    return checked


def _is(value: object, column: type) -> bool:
    if isinstance(value, bool):
        return False
    if column is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, column)
