"""Runs a function of `tests.megatron.scenarios` in the ranks of a real Megatron job, each a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.deepspeed.launcher import Finished
from tests.deepspeed.launcher import launch as launch_ranks


def launch(
    scenario: str, world_size: int, folder: Path, *, environment: dict[str, str] | None = None, **arguments: Any
) -> Finished:
    """As `tests.deepspeed.launcher.launch`."""
    # Megatron compiles small functions at import unless it is told not to: 13 s of CPU time.
    environment = {"TORCHDYNAMO_DISABLE": "1", **(environment or {})}
    return launch_ranks(
        scenario, world_size, folder, environment=environment, scenarios="tests.megatron.scenarios", **arguments
    )
