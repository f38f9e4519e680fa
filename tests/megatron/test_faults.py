"""What goes wrong, and what becomes of the training then: nothing. Two processes, real Megatron, simulated GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perseus_core.gpu import simulated
from perseus_core.gpu.simulated.faults import deny_permission
from tests.megatron.gpus import environment, simulated_gpus
from tests.megatron.launcher import QUICK, Finished, launch
from tests.runtime.simulated_machine import wait_until


def run_quick(
    folder: Path,
    *,
    before: Callable[[simulated.SimulatedNode], None] = lambda node: None,
    python_path: Path | None = None,
    **arguments: Any,
) -> Finished:
    """Two stages, soon over; afterwards no clock is locked.

    Args:
        folder: for what is printed.
        before: what is done to the simulated GPUs before the job.
        python_path: where the job finds its modules first.
        arguments: of `tests.megatron.scenarios.train`.
    """
    with simulated_gpus(time_scale=0.03) as node:
        before(node)
        variables = environment(node)
        if python_path is not None:
            variables["PYTHONPATH"] = os.pathsep.join([str(python_path), variables["PYTHONPATH"]])
        given = {"sizes": {"stages": 2}, "microbatches": 2, "settings": QUICK, **arguments}
        finished = launch("train", 2, folder, environment=variables, **given)
        wait_until(lambda: not any(gpu.state().locked_mhz for gpu in node.gpus))
    return finished


def test_error_of_ours_leaves_training_alone(tmp_path: Path) -> None:
    """One warning of each rank, clocks given back, and every iteration has the loss that it has without us."""
    finished = run_quick(tmp_path, fault="error_in_hook", iterations=12, also_without=True)
    for rank in finished.results_of_all():
        assert rank["faults_at"]
        assert rank["losses"] == rank["losses_without"]
        assert not rank["is_followed"]
    assert finished.output.count("broken on purpose; training goes on without perseus") == 2


def test_error_on_one_rank_leaves_training_alone(tmp_path: Path) -> None:
    """The other rank hears of it at once and leaves its clock alone; both end well, though one has left."""
    finished = run_quick(tmp_path, fault="error_on_one_rank", until_phase="stepped aside", also_without=True)
    for rank in finished.results_of_all():
        assert rank["losses"] == rank["losses_without"]
        aside_from = rank["phases"].index("stepped aside")
        assert aside_from >= rank["faults_at"][0]
        assert set(rank["phases"][aside_from:]) == {"stepped aside"}
    assert finished.output.count("broken on purpose; training goes on without perseus") == 1
    assert "not been heard of" not in finished.output, "it is told, and does not only miss the other one"


def test_killed_rank_leaves_no_clock_locked(tmp_path: Path) -> None:
    """The other rank's training ends by its own error, and both GPUs are given back."""
    finished = run_quick(tmp_path, fault="killed")
    assert "killed while its clock is locked" in finished.output
    assert finished.statuses[1] == -9
    assert finished.statuses[0] != 0


def test_second_training_is_left_alone(tmp_path: Path) -> None:
    """One training of a process is followed at a time, and the log says so."""
    finished = run_quick(tmp_path, fault="second_training")
    assert all(rank["is_followed"] for rank in finished.results_of_all())
    assert finished.output.count("this process follows another training already") == 1


def test_without_gpus_training_goes_on(tmp_path: Path) -> None:
    """A job on the CPU has one line that says why nothing is done."""
    finished = launch("train_without_gpus", 2, tmp_path)
    for rank in finished.results_of_all():
        assert rank == {"is_followed": False, "hooked": False}
    assert finished.output.count("not on an NVIDIA GPU") == 1


def test_missing_permission_leaves_measuring(tmp_path: Path) -> None:
    """Where clocks may not be set, the job is trained to its end and the log names the reason once."""

    def deny(node: simulated.SimulatedNode) -> None:
        for gpu in node.gpus:
            deny_permission(gpu)

    finished = run_quick(tmp_path, before=deny, until_phase="measure only")
    assert not any(plan for rank in finished.results_of_all() for plan in rank["plans"])
    assert finished.output.count("CAP_SYS_ADMIN") == 1


def test_missing_pynvml_leaves_training_alone(tmp_path: Path) -> None:
    """Where `pynvml` cannot be imported, training ends well and one line names what is missing."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "pynvml.py").write_text("raise ImportError('no pynvml here')")
    finished = run_quick(tmp_path, python_path=modules, until_phase="measure only", also_without=True)
    for rank in finished.results_of_all():
        assert rank["losses"] == rank["losses_without"]
        assert not any(rank["plans"])
    assert finished.output.count("the Python package nvidia-ml-py is missing") == 1
