"""Runs any command on simulated GPUs: what `perseus simulate` does."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from perseus_core.errors import InputError
from perseus_core.gpu.simulated.activation import ENVIRONMENT_VARIABLE, create_node

_HOOK_FOLDER = Path(__file__).parent / "hook"
_SHARED_MEMORY = Path("/dev/shm")


def run_command(description_path: str | Path, command: list[str], *, log: bool = False) -> int:
    """Creates the GPUs of a description, runs a command in whose processes `pynvml` sees them, and removes them again.

    Every Python process that the command starts takes part, without its doing, unless Python is told to ignore
    PYTHONPATH (`-I`, `-E`) or the site (`-S`). The command decides what SIGINT (which a terminal sends to it too) and
    SIGTERM mean.

    Args:
        description_path: the GPU description.
        command: program and arguments.
        log: whether the GPUs log what runs on them, for commands that read the log.

    Returns:
        the command's exit status; 128 + n if signal n ended it, as a shell says it.

    Raises:
        InputError: if the description is wrong, or the command cannot be started.
    """
    if not command:
        raise InputError("no command is given; write it after --, for example: perseus simulate --gpus FILE -- nvitop")
    parent = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="perseus-gpus-", dir=parent) as folder:
        create_node(description_path, folder, log=log)
        try:
            process = subprocess.Popen(command, env=environment_for(folder, os.environ))
        except OSError as error:
            raise InputError(f"command {command[0]!r} cannot be started ({error.strerror})") from None
        with _passing_signals_on(process):
            status = process.wait()
    return status if status >= 0 else 128 - status


def environment_for(node_folder: str | Path, environment: Mapping[str, str]) -> dict[str, str]:
    """An environment whose Python processes see the simulated GPUs of a node."""
    python_path = [str(_HOOK_FOLDER), *filter(None, [environment.get("PYTHONPATH")])]
    return {
        **environment,
        ENVIRONMENT_VARIABLE: str(Path(node_folder).resolve()),
        "PYTHONPATH": os.pathsep.join(python_path),
    }


@contextmanager
def _passing_signals_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """While the command runs, signals that would end us are the command's business."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    def leave_to_command(_number: int, _frame: FrameType | None) -> None:
        pass

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, leave_to_command),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
