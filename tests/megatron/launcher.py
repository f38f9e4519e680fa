"""Runs a function of `tests.megatron.scenarios` in the ranks of a real Megatron job, each a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perseus_megatron.schedule_hooks import combined_1f1b
from tests.deepspeed.launcher import Finished
from tests.deepspeed.launcher import launch as launch_ranks

# Wide tolerances: on a busy machine processes run late, and these tests are about what happens, not how well.
QUICK: dict[str, Any] = {
    "enabled": True,
    "warmup_iterations": 1,
    "baseline_iterations": 2,
    "profile_clocks": 3,
    "profile_iterations": 1,
    "watch_iterations": 2,
    "tolerance": 0.5,
    "slow_gpu": 0.95,
    "profile_cache": "off",
}


def skip_unless_megatron_overlaps_experts() -> None:
    """Skips the test that calls it where Megatron is older."""
    if combined_1f1b() is None:
        pytest.skip("this megatron-core does not overlap expert-parallel communication; 0.14 and newer do")


def launch(
    scenario: str, world_size: int, folder: Path, *, environment: dict[str, str] | None = None, **arguments: Any
) -> Finished:
    """As `tests.deepspeed.launcher.launch`."""
    return launch_ranks(
        scenario, world_size, folder, environment=environment, scenarios="tests.megatron.scenarios", **arguments
    )
