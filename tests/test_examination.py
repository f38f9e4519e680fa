"""`perseus doctor`: one line per finding, each with its remedy, on machines well and ill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from perseus_core.gpu import simulated
from perseus_core.gpu.simulated.command import environment_for
from perseus_core.gpu.simulated.node import SimulatedNode
from tests.conftest import REPOSITORY

DESCRIPTION = REPOSITORY / "configs" / "gpus" / "a100.json"


def diagnose(environment: dict[str, str] | None = None) -> tuple[int, list[dict[str, str]]]:
    command = [sys.executable, "-m", "perseus_core.cli", "doctor", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert answer.stderr == ""
    return answer.returncode, json.loads(answer.stdout)["findings"]


@pytest.fixture
def node(tmp_path: Path) -> SimulatedNode:
    """A machine of simulated A100s."""
    (tmp_path / "node").mkdir()
    return simulated.create_node(DESCRIPTION, tmp_path / "node")


def environment(node_folder: Path, **more: str) -> dict[str, str]:
    return {**environment_for(node_folder, dict(os.environ)), **more}


def test_a_well_machine(node: SimulatedNode, tmp_path: Path) -> None:
    """Driver, GPUs, clocks, the counter's period and persistence are found; nothing is missing."""
    code, findings = diagnose(environment(tmp_path / "node"))
    facts = "\n".join(f"{f['subject']}: {f['fact']}" for f in findings)
    assert code == 0
    for words in (
        "driver: NVIDIA driver",
        "81 clocks, 210 to 1410 MHz",
        "energy counter moves every",
        "persistence mode on",
    ):
        assert words in facts
    assert all(f["verdict"] != "missing" for f in findings)


def test_no_driver() -> None:
    """Without a driver it says so, with the remedy, and exits with 1."""
    code, findings = diagnose()
    assert code == 1
    (missing,) = [f for f in findings if f["verdict"] == "missing"]
    assert "no NVIDIA driver" in missing["fact"]
    assert "perseus simulate" in missing["remedy"]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda node: simulated.faults.throttle(node.gpus[1], 1005), "held down now"),
        (
            lambda node: simulated.faults.remove_support(node.gpus[1], "nvmlDeviceGetTotalEnergyConsumption"),
            "no energy counter",
        ),
    ],
)
def test_an_ill_gpu(node: SimulatedNode, tmp_path: Path, harm: Callable[[SimulatedNode], None], words: str) -> None:
    """What ails one GPU stands in that GPU's lines only."""
    harm(node)
    _, findings = diagnose(environment(tmp_path / "node"))
    assert [f["subject"] for f in findings if words in f["fact"]] == ["GPU 1"]


def test_a_lost_gpu(node: SimulatedNode, tmp_path: Path) -> None:
    """NVML cannot even list the GPUs then; the finding names the one that is lost."""
    simulated.faults.lose(node.gpus[1])
    code, findings = diagnose(environment(tmp_path / "node"))
    assert code == 1
    (missing,) = [f for f in findings if f["verdict"] == "missing"]
    assert "GPU 1: the GPU is lost" in missing["fact"]


def test_an_ambiguous_choice_of_gpus(node: SimulatedNode, tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES that names no GPU is told before a job would fail on it."""
    code, findings = diagnose(environment(tmp_path / "node", CUDA_VISIBLE_DEVICES="99"))
    assert code == 1
    assert any(f["subject"] == "CUDA_VISIBLE_DEVICES" and "99" in f["fact"] for f in findings)
