"""Writing figures and pages to files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from perseus_core.errors import InputError
from perseus_core.files import write_bytes, write_text
from perseus_core.report.drawing import figure_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 160
# Dates and versions would make equal figures differ.
_METADATA: dict[str, dict[str, str | None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def save_figure(figure: Figure | str, path: str | Path) -> None:
    """Writes a figure as .png, .svg or .pdf, or a page (text) as .html; as a whole or not at all.

    Raises:
        InputError: if the suffix is another, does not fit, or the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    shown = suffix or "a file without suffix"
    if isinstance(figure, str):
        if suffix != ".html":
            raise InputError(f"{path}: an interactive page cannot be written as {shown}; use .html")
        write_text(path, figure)
        return
    if suffix not in _METADATA:
        raise InputError(f"{path}: a figure cannot be written as {shown}; use {', '.join(_METADATA)}")
    content = io.BytesIO()
    with figure_style():
        figure.savefig(content, format=suffix[1:], dpi=_DOTS_PER_INCH, metadata=_METADATA[suffix])
    write_bytes(path, content.getvalue())
