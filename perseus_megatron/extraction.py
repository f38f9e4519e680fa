"""The order of instructions of all stages, as Megatron's own functions say it, without communication."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.core.pipeline_parallel import schedules

from perseus_core.errors import InputError
from perseus_core.planning.schedule import Instruction, Kind, Schedule, interleaved, one_f_one_b
from perseus_core.planning.transfers import waits
from perseus_megatron.transfers import programs_of


def schedule_factory(config: Any, num_stages: int, num_chunks: int) -> Callable[[int], Schedule]:
    """From a number of microbatches to the schedule that Megatron will run.

    No pipelining is 1F1B on one stage.

    Args:
        config: Megatron's `ModelParallelConfig`.
        num_stages: pipeline size.
        num_chunks: model chunks of a rank.

    The function returned raises `InputError` for a number of microbatches that Megatron refuses, and where Megatron's
    order is not the one known.
    """
    # Megatron's default since it has had the setting, and its order before.
    group = getattr(config, "microbatch_group_size_per_vp_stage", None) or num_stages
    overlaps = getattr(config, "overlap_moe_expert_parallel_comm", False)

    @functools.lru_cache(maxsize=8)
    def schedule(num_microbatches: int) -> Schedule:
        if num_chunks == 1:
            order = one_f_one_b(num_stages, num_microbatches)
        else:
            order = interleaved(num_stages, num_microbatches, num_chunks, group)
            _check_table(order, group)
        if overlaps:
            order = _overlapped(order)
        if num_stages == 1 or getattr(config, "overlap_p2p_comm_warmup_flush", False):
            return order  # nothing is waited for but data
        programs = programs_of(order, overlaps_steady_state=getattr(config, "overlap_p2p_comm", False))
        return replace(order, waits=waits(programs))

    return schedule


def _check_table(schedule: Schedule, group: int) -> None:
    """Compares the order of forward passes with Megatron's table, which is the same for all stages."""
    table = schedules.get_schedule_table(schedule.num_microbatches, schedule.num_chunks, group)
    ours = [(i.microbatch, i.chunk) for i in schedule.stages[0] if i.kind is Kind.FORWARD]
    if ours != table:
        raise InputError("Megatron's get_schedule_table has another order than interleaved 1F1B")


def _overlapped(schedule: Schedule) -> Schedule:
    """With expert-parallel communication overlapped (`combined_1f1b`), a forward and the backward behind it are one.

    Such an instruction bears the name of its backward half: the k-th backward of a stage is where it always was, and
    the forward that runs with it follows from the order. Megatron warms up with one forward more, so the forward that
    would open the steady state is left alone.
    """
    stages = []
    for order in schedule.stages:
        forwards = [i for i in order if i.kind is Kind.FORWARD]
        backwards = [i for i in order if i.kind is Kind.BACKWARD]
        alone = next(place for place, i in enumerate(order) if i.kind is Kind.BACKWARD)
        num_fused = len(forwards) - alone
        fused = [i._replace(kind=Kind.FORWARD_BACKWARD) for i in backwards[:num_fused]]
        stages.append(tuple[Instruction, ...]([*forwards[:alone], *fused, *backwards[num_fused:]]))
    return Schedule(f"{schedule.name}, overlapped", schedule.num_chunks, schedule.num_microbatches, tuple(stages))
