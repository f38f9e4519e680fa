"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from perseus_core.errors import InputError


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file as a whole or not at all: to a temporary file beside it, then renamed.

    Raises:
        InputError: if the folder does not exist or cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path}: cannot be written ({error.strerror}); give a path in a folder that exists") from None


def write_text(path: str | Path, content: str) -> None:
    """Writes a UTF-8 text file as a whole or not at all; raises as `write_bytes`."""
    write_bytes(path, content.encode())
