"""Real Megatron under a plan: whether the GPUs do what the plan says. What it measures, it measures in real time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from perseus_core.gpu import simulated
from perseus_core.gpu.simulated.execution_log import read_executed
from perseus_core.planning.schedule import one_f_one_b
from tests.megatron.gpus import environment, simulated_gpus
from tests.megatron.launcher import QUICK, Finished, launch
from tests.planned_clocks import NO_POWER_CAP, not_at_their_clocks


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Finished, simulated.SimulatedNode]]:
    """PP2 with instructions of 33 to 66 ms and a latency of 10, until some iterations have run under a plan."""
    folder = tmp_path_factory.mktemp("planned")
    with simulated_gpus(time_scale=0.5, clock_latency_s=0.01, energy_counter_period_s=0.05, **NO_POWER_CAP) as node:
        finished = launch(
            "train",
            2,
            folder,
            environment=environment(node),
            sizes={"stages": 2},
            microbatches=4,
            planned_iterations=12,
            settings=QUICK,
        )
        yield finished, node


def test_instructions_run_at_their_planned_clocks(
    planned: tuple[Finished, simulated.SimulatedNode],
) -> None:
    """Each in most iterations: see `not_at_their_clocks`."""
    finished, node = planned
    for rank in finished.results_of_all():
        order = one_f_one_b(2, 4).stages[rank["stage"]]
        ran = [executed for executed in read_executed(node.folder) if executed.gpu == rank["rank"]]
        iterations = [ran[i : i + len(order)] for i in range(0, len(ran), len(order))]
        under_plan = [i for i, plan in enumerate(rank["plans"]) if plan and plan == rank["plans"][-1]][2:]
        assert len(under_plan) >= 2
        assert not not_at_their_clocks([iterations[i] for i in under_plan], rank["planned_mhz"])
        ran_microbatches = [executed.label["microbatch"] for executed in iterations[under_plan[0]]]
        assert ran_microbatches == [i.microbatch for i in order]


def test_clocks_are_given_back(planned: tuple[Finished, simulated.SimulatedNode]) -> None:
    """After the job no GPU's clock is locked."""
    _, node = planned
    assert not any(gpu.state().locked_mhz for gpu in node.gpus)
