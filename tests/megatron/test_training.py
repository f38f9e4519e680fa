"""Whole jobs: the real Megatron in 4 processes, simulated GPUs behind the real `pynvml`, real sessions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perseus_core.gpu import simulated
from perseus_core.gpu.simulated.execution_log import read_executed
from perseus_core.gpu.simulated.faults import deny_permission
from perseus_core.planning.schedule import one_f_one_b
from tests.megatron.gpus import environment, simulated_gpus
from tests.megatron.launcher import QUICK, Finished, launch, skip_unless_megatron_overlaps_experts
from tests.planned_clocks import NO_POWER_CAP, late
from tests.runtime.simulated_machine import wait_until


@pytest.fixture(params=["pp4", "pp4 vpp2", "pp2 dp2", "pp2 vpp2 ep2"], scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same training without and with a session, to the plan and beyond; evaluated in between."""
    if "ep" in request.param:
        skip_unless_megatron_overlaps_experts()
    sizes = {
        "pp4": {"stages": 4},
        "pp4 vpp2": {"stages": 4, "chunks": 2},
        "pp2 dp2": {"stages": 2},
        "pp2 vpp2 ep2": {"stages": 2, "chunks": 2, "expert_parallel": 2},
    }[request.param]
    with simulated_gpus(chunks=sizes.get("chunks", 1), time_scale=0.05) as node:
        return launch(
            "train",
            4,
            tmp_path_factory.mktemp("trained"),
            environment=environment(node),
            sizes=sizes,
            microbatches=4,
            iterations=120,
            least_iterations=50,
            planned_iterations=6,
            settings=QUICK,
            evaluate_every=7,
            also_without=True,
        ).results_of_all()


def test_job_is_profiled_and_planned(trained: list[dict[str, Any]]) -> None:
    """A plan is applied on all ranks."""
    assert all(max(rank["plans"]) > 0 for rank in trained)


def test_losses_are_bit_identical(trained: list[dict[str, Any]]) -> None:
    """Every one of 50 iterations and more has exactly the loss that it has without us."""
    for rank in trained:
        assert len(rank["losses"]) >= 50
        assert rank["losses"] == rank["losses_without"]
    assert any(loss for rank in trained for loss in rank["losses"])


def test_figures_reach_whichever_rank_keeps_the_metrics(trained: list[dict[str, Any]]) -> None:
    """They are asked for on the last rank only, where Megatron has its writers."""
    *others, last = trained
    assert not any(rank["figures"] for rank in others)
    assert {name for name, _ in last["figures"]} == {"iteration_time_s", "energy_j", "saving"}
    assert all(value > 0 for name, value in last["figures"] if name != "saving")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Finished, simulated.SimulatedNode, Path]]:
    """PP2 with instructions of 50 to 100 ms and the real latency, long enough for some iterations under a plan."""
    folder = tmp_path_factory.mktemp("planned")
    settings = {**QUICK, "frontier_file": str(folder / "frontier.json"), "state_file": str(folder / "session.json")}
    with simulated_gpus(time_scale=0.75, clock_latency_s=0.015, energy_counter_period_s=0.05, **NO_POWER_CAP) as node:
        finished = launch(
            "train",
            2,
            folder,
            environment=environment(node),
            sizes={"stages": 2},
            microbatches=4,
            iterations=80,
            planned_iterations=8,
            settings=settings,
        )
        yield finished, node, folder


def test_instructions_run_at_their_planned_clocks(
    planned: tuple[Finished, simulated.SimulatedNode, Path],
) -> None:
    """Each for 80 % of its time at least, for 95 % where its neighbours have the same clock."""
    finished, node, _ = planned
    found, total = [], 0
    for rank in finished.results_of_all():
        order = one_f_one_b(2, 4).stages[rank["stage"]]
        ran = [executed for executed in read_executed(node.folder) if executed.gpu == rank["rank"]]
        iterations = [ran[i : i + len(order)] for i in range(0, len(ran), len(order))]
        under_plan = [i for i, plan in enumerate(rank["plans"]) if plan and plan == rank["plans"][-1]][2:]
        assert len(under_plan) >= 2
        found += [each for number in under_plan for each in late(iterations[number], rank["planned_mhz"])]
        total += len(order) * len(under_plan)
        ran_microbatches = [executed.label["microbatch"] for executed in iterations[under_plan[0]]]
        assert ran_microbatches == [i.microbatch for i in order]
    assert len(found) <= 0.02 * total, found


def test_clocks_are_given_back(planned: tuple[Finished, simulated.SimulatedNode, Path]) -> None:
    """After the job no GPU's clock is locked."""
    _, node, _ = planned
    assert not any(gpu.state().locked_mhz for gpu in node.gpus)


def run_quick(
    folder: Path,
    *,
    iterations: int = 12,
    before: Callable[[simulated.SimulatedNode], None] = lambda node: None,
    python_path: Path | None = None,
    **arguments: Any,
) -> Finished:
    """Two stages, soon over; afterwards no clock is locked.

    Args:
        folder: for what is printed.
        iterations: how many at most.
        before: what is done to the simulated GPUs before the job.
        python_path: where the job finds its modules first.
        arguments: of `tests.megatron.scenarios.train`.
    """
    with simulated_gpus(time_scale=0.03) as node:
        before(node)
        variables = environment(node)
        if python_path is not None:
            variables["PYTHONPATH"] = os.pathsep.join([str(python_path), variables["PYTHONPATH"]])
        sizes = {"stages": 2}
        given = {"sizes": sizes, "microbatches": 2, "iterations": iterations, "settings": QUICK, **arguments}
        finished = launch("train", 2, folder, environment=variables, **given)
        wait_until(lambda: not any(gpu.state().locked_mhz for gpu in node.gpus), limit_s=6.0)
    return finished


def test_error_of_ours_leaves_training_alone(tmp_path: Path) -> None:
    """One warning of each rank, clocks given back, and every iteration has the loss that it has without us."""
    finished = run_quick(tmp_path, fault="error_in_hook", at=6, also_without=True)
    for rank in finished.results_of_all():
        assert rank["losses"] == rank["losses_without"]
        assert not rank["is_followed"]
    assert finished.output.count("broken on purpose; training goes on without perseus") == 2


def test_error_on_one_rank_leaves_training_alone(tmp_path: Path) -> None:
    """The other rank hears of it at once and leaves its clock alone; both end well, though one has left."""
    at = 6
    finished = run_quick(tmp_path, fault="error_on_one_rank", at=at, iterations=16, also_without=True)
    for rank in finished.results_of_all():
        assert rank["losses"] == rank["losses_without"]
        assert not any(rank["plans"])
        assert set(rank["phases"][at + 4 :]) == {"stepped aside"}
    assert finished.output.count("broken on purpose; training goes on without perseus") == 1


def test_killed_rank_leaves_no_clock_locked(tmp_path: Path) -> None:
    """The other rank's training ends by its own error, and both GPUs are given back."""
    finished = run_quick(tmp_path, fault="killed", at=8)
    assert finished.statuses[1] == -9
    assert finished.statuses[0] != 0


def test_second_training_is_left_alone(tmp_path: Path) -> None:
    """One training of a process is followed at a time, and the log says so."""
    finished = run_quick(tmp_path, fault="second_training", at=3)
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

    finished = run_quick(tmp_path, before=deny, iterations=24)
    assert all(rank["plans"] == [0] * 24 for rank in finished.results_of_all())
    assert finished.output.count("CAP_SYS_ADMIN") == 1


def test_missing_pynvml_leaves_training_alone(tmp_path: Path) -> None:
    """Where `pynvml` cannot be imported, training ends well and one line names what is missing."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "pynvml.py").write_text("raise ImportError('no pynvml here')")
    finished = run_quick(tmp_path, python_path=modules, also_without=True)
    for rank in finished.results_of_all():
        assert rank["losses"] == rank["losses_without"]
        assert not any(rank["plans"])
    assert finished.output.count("the Python package nvidia-ml-py is missing") == 1
