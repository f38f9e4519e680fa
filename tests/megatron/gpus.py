"""Simulated GPUs for the tests' jobs."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perseus_core.gpu import simulated
from perseus_core.gpu.simulated.command import environment_for
from perseus_core.planning.profile import Profile
from tests.conftest import OWN_PROFILE, REPOSITORY


@contextmanager
def simulated_gpus(*, chunks: int = 1, time_scale: float = 0.1, **changes: Any) -> Iterator[simulated.SimulatedNode]:
    """Four A100s, quicker than real ones by `time_scale` in everything."""
    parent = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="perseus-test-megatron-", dir=parent))
    profile = Profile.load(OWN_PROFILE)
    profile.divided_into_chunks(chunks).save(folder / "profile.csv")
    description = dataclasses.replace(
        simulated.Description.load(REPOSITORY / "configs" / "gpus" / "a100.json"),
        **{
            "profile": folder / "profile.csv",
            "time_scale": time_scale,
            "clock_latency_s": 0.015 * time_scale,
            "energy_counter_period_s": 0.1 * time_scale,
            **changes,
        },
    )
    (folder / "node").mkdir()
    try:
        yield simulated.create_node(description, folder / "node", log=True)
    finally:
        shutil.rmtree(folder)


def environment(node: simulated.SimulatedNode) -> dict[str, str]:
    """For the ranks of a job."""
    return environment_for(node.folder, {"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
