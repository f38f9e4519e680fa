"""What goes wrong in the middle of a test's training, while clocks are locked.

Each function runs on every rank, before an iteration.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch


def error_in_hook(followed: Any) -> None:
    """An error of ours, where it hurts most."""

    def fail(*_: Any) -> None:
        raise RuntimeError("broken on purpose")

    followed.session.begin_instruction = fail


def killed(followed: Any) -> None:
    """The last rank is killed."""
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        print("killed while its clock is locked", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def second_training(followed: Any) -> None:
    """The same process asks for another training to be followed."""
    import perseus_megatron

    parameters = torch.nn.Linear(1, 1)
    parameters.config = None  # type: ignore[assignment]
    assert not perseus_megatron.enable({"enabled": True}, parameters).is_followed


def error_on_one_rank(followed: Any) -> None:
    """The same on the last rank only: the others hear of it in its heartbeat."""
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        error_in_hook(followed)
