"""What goes wrong, and what becomes of the training then: nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from perseus_core.gpu.simulated import faults
from tests.deepspeed.conftest import MakeNode, on
from tests.deepspeed.launcher import Finished, launch
from tests.runtime.simulated_machine import wait_until

BLOCK = {"enabled": True, "profile_cache": "off", "warmup_iterations": 1, "baseline_iterations": 2}
WITHOUT = "training goes on without perseus"


@pytest.fixture(scope="module")
def job(make_node: MakeNode, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A job of two ranks to which one thing after another happens."""
    node = make_node(0.03, clock_latency_s=0.001, energy_counter_period_s=0.01)
    return launch("faults", 2, tmp_path_factory.mktemp("faults"), environment=on(node))


@pytest.fixture(scope="module")
def seen(job: Finished) -> list[dict[str, Any]]:
    return job.results_of_all()


def test_typo_is_refused_before_training(seen: list[dict[str, Any]]) -> None:
    """`deepspeed.initialize` raises on every rank, and names the nearest key."""
    for rank in seen:
        assert 'config "perseus.max_slowdwon" is not known; did you mean "max_slowdown"?' in rank["typo"]


def test_exception_in_our_hook_ends_following_only(seen: list[dict[str, Any]], job: Finished) -> None:
    """Losses are the same, the hooks are off the engine, and one line of each rank says so."""
    assert all(rank["broken hook"] == {"same losses": True, "hooks are off": True} for rank in seen)
    assert job.output.count(f"RuntimeError: broken on purpose; {WITHOUT}") == 2


def test_second_engine_is_left_alone(seen: list[dict[str, Any]], job: Finished) -> None:
    """The first engine stays followed, the second trains as without the package."""
    assert all(rank["second engine"] == {"same losses": True, "followed": [True, False]} for rank in seen)
    assert job.output.count("this process has another pipeline engine with a perseus block") == 1


def test_deepspeed_that_differs_is_left_alone(seen: list[dict[str, Any]], job: Finished) -> None:
    """The self-check names what differs, once, and training is untouched."""
    assert all(rank["differs"] for rank in seen)
    assert job.output.count("PipelineEngine._exec_schedule(pipe_schedule) reads self._INSTRUCTION_MAP") == 1


def test_engine_without_pipeline_is_left_alone(seen: list[dict[str, Any]], job: Finished) -> None:
    """An enabled block in the config of an engine without a pipeline is answered with one line, another with none."""
    for rank in seen:
        assert isinstance(rank["no pipeline"], float)
        assert isinstance(rank["no pipeline, not enabled"], float)
    assert job.output.count("but this engine has no pipeline") == 1


def test_missing_pynvml(make_node: MakeNode, tmp_path: Path) -> None:
    """Where `pynvml` cannot be imported, training ends well and one line names what is missing."""
    (tmp_path / "pynvml.py").write_text("raise ImportError('no pynvml here')")
    environment = on(make_node(0.03))
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    job = launch("job_without_plan", 2, tmp_path / "job", environment=environment, perseus=BLOCK)
    assert all(rank["phases"][-1] == "measure only" for rank in job.results_of_all())
    assert job.output.count("the Python package nvidia-ml-py is missing") == 1


def test_no_permission(make_node: MakeNode, tmp_path: Path) -> None:
    """Where clocks may not be locked, training ends well, measuring only, and one line names the remedy."""
    node = make_node(0.03, clock_latency_s=0.001, energy_counter_period_s=0.01)
    for gpu in node.gpus:
        faults.deny_permission(gpu)
    job = launch("job_without_plan", 2, tmp_path, environment=on(node), perseus=BLOCK)
    assert all(rank["phases"][-1] == "measure only" for rank in job.results_of_all())
    assert job.output.count("CAP_SYS_ADMIN") == 1


def test_killed_rank_gives_its_clock_back(make_node: MakeNode, tmp_path: Path) -> None:
    """When a rank is killed while a clock is held, the job fails as it would without us, and all clocks are reset."""
    node = make_node(0.1, clock_latency_s=0.001, energy_counter_period_s=0.01)
    job = launch("killed_job", 2, tmp_path, environment=on(node), perseus=BLOCK)
    assert "killed while its clock is locked" in job.output
    assert job.statuses[1] == -9
    assert job.statuses[0] != 0
    wait_until(lambda: not any(gpu.state().locked_mhz for gpu in node.gpus))
