"""Real Megatron on simulated GPUs, in four processes: profiled, planned, and the same numbers as without us."""

from __future__ import annotations

from typing import Any

import pytest

from tests.megatron.gpus import environment, simulated_gpus
from tests.megatron.launcher import QUICK, launch, skip_unless_megatron_overlaps_experts


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
            iterations=24,
            planned_iterations=4,
            settings={**QUICK, "profile_clocks": 2},
            evaluate_every=7,
            also_without=True,
        ).results_of_all()


def test_job_is_profiled_and_planned(trained: list[dict[str, Any]]) -> None:
    """A plan is applied on all ranks."""
    assert all(max(rank["plans"]) > 0 for rank in trained)


def test_losses_are_bit_identical(trained: list[dict[str, Any]]) -> None:
    """Every one of 24 iterations and more has exactly the loss that it has without us."""
    for rank in trained:
        assert len(rank["losses"]) >= 24
        assert rank["losses"] == rank["losses_without"]
    assert any(loss for rank in trained for loss in rank["losses"])


def test_figures_reach_whichever_rank_keeps_the_metrics(trained: list[dict[str, Any]]) -> None:
    """They are asked for on the last rank only, where Megatron has its writers."""
    *others, last = trained
    assert not any(rank["figures"] for rank in others)
    assert {name for name, _ in last["figures"]} == {"iteration_time_s", "energy_j", "saving"}
    assert all(value > 0 for name, value in last["figures"] if name != "saving")
