"""The extracted order, beside what Megatron's own schedule code runs on one stage at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.pipeline_parallel import schedules

from perseus_core.errors import InputError
from perseus_core.planning.plan import make_plan
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import Kind, interleaved
from perseus_core.planning.solver import solve
from perseus_core.runtime.adapter import Hooks
from perseus_megatron.extraction import schedule_factory
from perseus_megatron.schedule_hooks import ScheduleHooks, combined_1f1b
from tests.megatron.launcher import skip_unless_megatron_overlaps_experts
from tests.planning.framework_orders import megatron_order
from tests.planning.fused import fused_with_expert_overlap


def config(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(microbatch_group_size_per_vp_stage=None, **fields)


@pytest.mark.parametrize(
    ("stages", "chunks", "microbatches", "group"),
    [(1, 1, 3, None), (4, 1, 2, None), (4, 1, 9, None), (4, 2, 8, None), (2, 3, 5, 3), (4, 2, 14, 5)],
)
def test_extracted_order_is_megatrons(stages: int, chunks: int, microbatches: int, group: int | None) -> None:
    """For all stages, without a rank of its own for each."""
    setting = SimpleNamespace(microbatch_group_size_per_vp_stage=group)
    schedule = schedule_factory(setting, stages, chunks)(microbatches)
    if stages > 1:
        assert schedule.stages == tuple(
            megatron_order(stages, microbatches, stage, chunks, group or stages) for stage in range(stages)
        )
    assert len(schedule.instructions) == 2 * stages * chunks * microbatches


def test_refused_number_of_microbatches() -> None:
    """What Megatron would refuse is refused with a sentence, not with Megatron's error in the middle of training."""
    with pytest.raises(InputError, match="last group"):
        schedule_factory(config(), 4, 2)(6)


def test_another_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Megatron whose interleaving differs is not planned for."""
    monkeypatch.setattr(schedules, "get_schedule_table", lambda *sizes: [])
    with pytest.raises(InputError, match="get_schedule_table"):
        schedule_factory(config(), 2, 2)(4)


def test_overlapped_experts_are_fused_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's own loop for overlapped expert communication runs the extracted order, as the hooks tell it."""
    skip_unless_megatron_overlaps_experts()
    combined: Any = combined_1f1b()
    heard: list[tuple[int, int, Kind]] = []
    listener = SimpleNamespace(
        begin_iteration=lambda *_, **__: None,
        begin_instruction=lambda *instruction: heard.append(instruction),
        end_instruction=lambda: None,
        end_iteration=lambda: None,
    )
    monkeypatch.setattr(combined, "combined_forward_backward_step", lambda *_, **__: ("output", 0, None))
    monkeypatch.setattr(combined, "set_streams", lambda: None, raising=False)
    hooks, schedule_hooks = Hooks(), ScheduleHooks(listener)
    schedule_hooks.put(hooks, schedules, combined)
    model = object()
    schedule_hooks._chunk_of = {id(model): 0}
    try:
        combined.combined_1f1b_schedule_for_no_pipelining(
            None, None, model, 4, None, None, [], None, False, None, False, _NoSync, 0, lambda *_: False
        )
    finally:
        hooks.take_off()
    schedule = schedule_factory(config(overlap_moe_expert_parallel_comm=True), 1, 1)(4)
    assert heard == [(i.chunk, i.microbatch, i.kind) for i in schedule.stages[0]]
    assert [kind for _, _, kind in heard].count(Kind.FORWARD_BACKWARD) == 3


def test_fused_instructions_replace_pairs() -> None:
    """Interleaved and overlapped, a stage warms up as before, fuses the steady state, and every pass is there once."""
    plain = schedule_factory(config(), 2, 2)(6).stages
    overlapped = schedule_factory(config(overlap_moe_expert_parallel_comm=True), 2, 2)(6).stages
    for before, after in zip(plain, overlapped, strict=True):
        kinds = [i.kind for i in after]
        fused = kinds.count(Kind.FORWARD_BACKWARD)
        assert fused > 0
        assert kinds.count(Kind.FORWARD) + fused == kinds.count(Kind.BACKWARD) + fused == len(before) // 2
        backwards = [(i.chunk, i.microbatch) for i in after if i.kind is not Kind.FORWARD]
        assert backwards == [(i.chunk, i.microbatch) for i in before if i.kind is Kind.BACKWARD]


def test_fused_instructions_are_planned(own_profile: Profile) -> None:
    """The order extracted for overlapped experts is the planner's, and a plan for it saves energy at the same speed."""
    schedule = schedule_factory(config(overlap_moe_expert_parallel_comm=True), 4, 2)(8)
    assert schedule.stages == fused_with_expert_overlap(interleaved(4, 8, 2))[0].stages
    runs = {i.type for i in schedule.instructions}
    fused = own_profile.divided_into_chunks(2).with_fused_passes()
    profile = Profile(tuple(m for m in fused.measurements if m.type in runs))
    plan = make_plan(solve(PipelineProblem.of(profile, schedule, 83.5)))
    assert plan.slowdown <= 0
    assert plan.saving > 0.05


class _NoSync:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
