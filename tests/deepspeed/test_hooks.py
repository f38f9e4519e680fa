"""What the hooks on real engines report, in 4 processes."""

from __future__ import annotations

from typing import Any

import pytest

from perseus_core.planning.schedule import one_f_one_b
from tests.deepspeed.conftest import MakeNode, on
from tests.deepspeed.launcher import launch

STAGES = {
    "pp4": 4,
    "pp4 of 2 microbatches": 4,
    "pp2 x dp2, bf16, zero-1": 2,
    "pp2 x mp2": 2,
    "tied": 4,
    "checkpointing": 4,
    "pp1 x dp4": 1,
}


@pytest.fixture(scope="module")
def recorded(make_node: MakeNode, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """For every rank, what was recorded of each engine."""
    # Engines on the CPU are followed where there are simulated GPUs, which the recording sessions leave alone.
    environment = on(make_node(1.0))
    return launch("record_many_engines", 4, tmp_path_factory.mktemp("hooks"), environment=environment).results_of_all()


@pytest.mark.parametrize("name", STAGES)
def test_executed_order_is_the_extracted_one(recorded: list[dict[str, Any]], name: str) -> None:
    """On every rank the n-th forward (backward) is microbatch n and the order is that of 1F1B, whatever the engine."""
    for rank in recorded:
        for iteration in rank[name]["iterations"]:
            if not iteration["training"]:
                continue
            order = one_f_one_b(STAGES[name], iteration["microbatches"]).stages[rank[name]["stage"]]
            assert iteration["order"] == [[i.chunk, i.microbatch, i.kind.value, "ended"] for i in order]
            assert iteration["ended"]


def test_dualpipev_names_both_chunks(recorded: list[dict[str, Any]]) -> None:
    """DualPipeV's two model chunks are told apart, and every microbatch passes both in both directions."""
    for rank in recorded:
        (iteration,) = rank["dualpipev"]["iterations"]
        assert iteration["order"] == [[*step, "ended"] for step in rank["dualpipev"]["extracted"]]
        assert len(iteration["order"]) == 4 * iteration["microbatches"]


def test_evaluation_is_told_apart(recorded: list[dict[str, Any]]) -> None:
    """Evaluation before the first training batch is not followed; later it is announced as no training."""
    for rank in recorded:
        trainings = [(i["training"], i["microbatches"]) for i in rank["pp4"]["iterations"]]
        assert trainings == [(True, 6), (False, 3), (True, 12)]
        evaluation = rank["pp4"]["iterations"][1]["order"]
        assert evaluation == [[0, microbatch, "forward", "ended"] for microbatch in range(3)]


def test_batch_size_may_change(recorded: list[dict[str, Any]]) -> None:
    """After `set_train_batch_size` the batch is followed with its new number of microbatches."""
    for rank in recorded:
        assert [i["microbatches"] for i in rank["tied"]["iterations"]] == [4, 8]


def test_destroying_the_engine_closes_the_session(recorded: list[dict[str, Any]]) -> None:
    """`engine.destroy()` ends the session, and the next engine of the process is followed."""
    assert all(rank[name]["closed"] for rank in recorded for name in STAGES)


def test_failing_batch_is_ended(recorded: list[dict[str, Any]]) -> None:
    """When the data run out in the middle of a batch, the training sees its own error and the iteration is ended."""
    for rank in recorded:
        assert rank["exhausted"] == {"error": "StopIteration", "ended": True}
