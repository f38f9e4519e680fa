from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perseus_core.gpu import simulated
from perseus_core.gpu.simulated.activation import uninstall

# Watts fall with the clock: 300 / 250 / 200 W forward, so energies follow from times. Stage 1 takes twice as long.
CLOCKS_MHZ = (1000, 800, 500)
FORWARD_S = {1000: 0.010, 800: 0.012, 500: 0.018}
POWER_W = {1000: 300.0, 800: 250.0, 500: 200.0}
BLOCKING_W = 50.0


def write_profile(path: Path) -> Path:
    lines = ["stage,instruction,frequency,time,energy"]
    for stage in (0, 1):
        for kind, stretch in (("forward", 1), ("backward", 2)):
            for clock in CLOCKS_MHZ:
                time_s = FORWARD_S[clock] * stretch * (1 + stage)
                lines.append(f"{stage},{kind},{clock},{time_s!r},{time_s * POWER_W[clock]!r}")
    path.write_text("\n".join(lines) + "\n")
    return path


DESCRIPTION: dict[str, Any] = {
    "name": "Test GPU",
    "num_gpus": 2,
    "supported_clocks_mhz": list(CLOCKS_MHZ),
    "profile": "profile.csv",
    "blocking_power_w": BLOCKING_W,
    "power_limit_w": 400,
    "clock_latency_s": 0.004,
}


@pytest.fixture
def describe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a description and its profile; keyword arguments replace fields, `...` removes one."""

    def write(**changes: Any) -> Path:
        write_profile(tmp_path / "profile.csv")
        document = {k: v for k, v in {**DESCRIPTION, **changes}.items() if v is not ...}
        path = tmp_path / "gpus.json"
        path.write_text(json.dumps(document))
        return path

    return write


@pytest.fixture
def make_node(describe: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., simulated.SimulatedNode]]:
    """Makes simulated GPUs, and lets `pynvml` of this process speak to them until the test ends."""

    def make(*, log: bool = False, **changes: Any) -> simulated.SimulatedNode:
        folder = tmp_path / "node"
        folder.mkdir()
        node = simulated.create_node(describe(**changes), folder, log=log)
        simulated.install(folder)
        return node

    yield make
    uninstall()


@pytest.fixture
def node(make_node: Callable[..., simulated.SimulatedNode]) -> simulated.SimulatedNode:
    return make_node(log=True)


@pytest.fixture
def start_python(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python code in another process that knows the folder of the test's simulated GPUs as `folder`."""
    processes = []
    root = str(Path(__file__).parents[2])

    def start(code: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", f"folder = {str(tmp_path / 'node')!r}\n{code}"],
            env={**os.environ, "PYTHONPATH": root, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()
