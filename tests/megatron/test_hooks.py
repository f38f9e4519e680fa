"""What the hooks in Megatron's real schedules report, in 4 processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perseus_core.planning.schedule import Schedule, interleaved, one_f_one_b
from perseus_core.runtime.adapter import Hooks
from perseus_megatron.schedule_hooks import ITERATIONS, ScheduleHooks
from tests.megatron.launcher import launch, skip_unless_megatron_overlaps_experts
from tests.planning.fused import fused_with_expert_overlap

# Stages and chunks.
LAYOUTS = {
    "pp4": (4, 1),
    "pp4 vpp2": (4, 2),
    "pp2 dp2": (2, 1),
    "pp2 dp2 vpp2": (2, 2),
    "pp2 tp2": (2, 1),
    "pp2 cp2": (2, 1),
    "pp4 uneven": (4, 1),
    "pp1": (1, 1),
    "pp2 vpp2 ep2": (2, 2),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """For every rank, what was recorded of each layout."""
    return launch("record_layouts", 4, tmp_path_factory.mktemp("hooks")).results_of_all()


def schedule(layout: str, microbatches: int) -> Schedule:
    stages, chunks = LAYOUTS[layout]
    if chunks == 1:
        return one_f_one_b(stages, microbatches)
    plain = interleaved(stages, microbatches, chunks)
    return fused_with_expert_overlap(plain)[0] if "ep" in layout else plain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_executed_order_is_the_extracted_one(recorded: list[dict[str, Any]], layout: str) -> None:
    """Chunk, microbatch and kind of every instruction are reported in the schedule's order, whatever the number."""
    if "ep" in layout:
        skip_unless_megatron_overlaps_experts()
    for rank in recorded:
        trained = [iteration for iteration in rank[layout]["iterations"] if iteration["training"]]
        assert trained
        for iteration in trained:
            order = schedule(layout, iteration["microbatches"]).stages[rank[layout]["stage"]]
            assert iteration["order"] == [[i.chunk, i.microbatch, i.kind.value, "ended"] for i in order]
            assert iteration["ended"]


def test_evaluation_is_told_apart(recorded: list[dict[str, Any]]) -> None:
    """Evaluation before the first training iteration is not followed; later it is announced as no training."""
    for rank in recorded:
        assert [i["training"] for i in rank["pp4"]["iterations"]] == [True, True, True, False]
        evaluation = rank["pp4"]["iterations"][-1]["order"]
        assert evaluation == [[0, microbatch, "forward", "ended"] for microbatch in range(6)]


def test_number_of_microbatches_may_change(recorded: list[dict[str, Any]]) -> None:
    """A batch size that ramps up is followed with its new number of microbatches."""
    for rank in recorded:
        trained = [i["microbatches"] for i in rank["pp4 vpp2"]["iterations"] if i["training"]]
        assert trained == [4, 8]


def test_place_in_the_job(recorded: list[dict[str, Any]]) -> None:
    """Pipeline ranks are stages, data-parallel ranks pipelines; those of one stage that share work share both."""
    places = {
        layout: sorted((rank[layout]["stage"], rank[layout]["pipeline"]) for rank in recorded) for layout in recorded[0]
    }
    assert places["pp4"] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert places["pp2 dp2"] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    together = [layout for layout in recorded[0] if layout.endswith(("tp2", "cp2", "ep2"))]
    assert len(together) >= 2
    assert all(places[layout] == [(0, 0), (0, 0), (1, 0), (1, 0)] for layout in together)
    assert places["pp1"] == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_closing_closes_the_session(recorded: list[dict[str, Any]]) -> None:
    """`close` ends the session, and the next training of the process is followed."""
    assert all(layout["closed"] for rank in recorded for layout in rank.values())


def test_waiting_inside_a_fused_instruction_does_not_belong_to_it() -> None:
    """Between warm-up and cool-down Megatron waits for both neighbours inside, before it computes."""
    events: list[str] = []

    def note(event: str) -> Callable[..., None]:
        return lambda *_, **__: events.append(event)

    def step(*_: Any, pre_forward: Callable[..., None], pre_backward: Callable[..., None], **__: Any) -> str:
        pre_forward(0)
        pre_backward(1)
        events.append("compute")
        return "output"

    def run(*, model: Any, num_microbatches: int) -> str:
        neighbours = {"pre_forward": note("wait for activation"), "pre_backward": note("wait for gradient")}
        return combined.combined_forward_backward_step(0, 0, model, 0, 0, 0, model, current_microbatch=3, **neighbours)

    schedules: Any = SimpleNamespace(**dict.fromkeys((*ITERATIONS, "forward_step", "backward_step"), run))
    combined: Any = SimpleNamespace(combined_forward_backward_step=step)
    listener = SimpleNamespace(
        begin_iteration=note("iteration"),
        begin_instruction=note("begin"),
        end_instruction=note("end"),
        end_iteration=note("iteration"),
    )
    ScheduleHooks(listener).put(Hooks(), schedules, combined)
    assert getattr(schedules, ITERATIONS[0])(model=object(), num_microbatches=4) == "output"
    instruction = events[events.index("wait for activation") :][:5]
    assert instruction == ["wait for activation", "wait for gradient", "begin", "compute", "end"]


def test_iteration_that_is_run_again_is_an_iteration_of_its_own(tmp_path: Path) -> None:
    """Megatron's rerun machine computes an iteration twice in one step; both are whole, and the loss is the same."""
    order = one_f_one_b(2, 3)
    for rank, result in enumerate(launch("record_reruns", 2, tmp_path, microbatches=3).results_of_all()):
        expected = [[i.chunk, i.microbatch, i.kind.value, "ended"] for i in order.stages[rank]]
        assert [iteration["order"] for iteration in result["iterations"]] == [expected] * 2
        assert all(iteration["ended"] for iteration in result["iterations"])
        assert result["losses"] == result["losses_once"]
