from __future__ import annotations

from typing import Any

import pytest

from tests.deepspeed.conftest import MakeNode, on
from tests.deepspeed.launcher import launch

UNDER_PLAN = 8
LAYOUTS = ["pp4", "pp2 x dp2", "pp2 x dp2, bf16, zero-1"]


@pytest.fixture(scope="module")
def compared(make_node: MakeNode, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """For every rank and layout the losses without and with the block."""
    folder = tmp_path_factory.mktemp("losses")
    environment = on(make_node(0.03, clock_latency_s=0.001, energy_counter_period_s=0.01))
    job = launch("losses_with_and_without", 4, folder, environment=environment, under_plan=UNDER_PLAN)
    return job.results_of_all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_bit_identical(compared: list[dict[str, Any]], layout: str) -> None:
    """Profiling, planning and running under a plan change no bit of any loss, on any rank."""
    for rank in compared:
        assert rank[layout]["with"] == rank[layout]["without"]
        assert len(set(rank[layout]["with"])) > 2 * UNDER_PLAN, "the model must learn something to compare"
        assert rank[layout]["plan"] >= 1, "a plan must have been applied"
