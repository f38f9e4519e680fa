"""The order of instructions of all stages, from DeepSpeed's own schedule classes, without communication."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from perseus_core.errors import InputError
from perseus_core.planning.schedule import Instruction, Kind, Placement, Schedule, one_f_one_b
from perseus_ds.instructions import KIND_OF, chunk_of
from perseus_ds.transfers import dualpipev_waits


def schedule_factory(train_schedule: Any) -> Callable[[int], Schedule]:
    """From a number of microbatches to the schedule that the engine will run.

    Args:
        train_schedule: what the engine executes in a training batch, on any stage.

    The function returned raises `InputError` for a number of microbatches that DeepSpeed refuses.
    """
    schedule_class, num_stages = type(train_schedule), train_schedule.num_stages

    @functools.lru_cache(maxsize=8)
    def schedule(num_microbatches: int) -> Schedule:
        return _schedule(schedule_class, num_stages, num_microbatches)

    return schedule


def _schedule(schedule_class: Callable[..., Any], num_stages: int, num_microbatches: int) -> Schedule:
    try:
        of_stages = [schedule_class(num_microbatches, num_stages, stage) for stage in range(num_stages)]
    except ValueError as error:
        raise InputError(f"DeepSpeed has no such schedule: {error}") from None
    stages = tuple(stage_order(stage, of_stage.steps()) for stage, of_stage in enumerate(of_stages))
    canonical = one_f_one_b(num_stages, num_microbatches)
    if stages == canonical.stages:
        return canonical
    num_chunks = 1 + max(i.chunk for order in stages for i in order)
    if schedule_class.__name__ == "DualPipeVSchedule":
        schedule = Schedule("dualpipev", num_chunks, num_microbatches, stages, placement=Placement.V)
        return replace(schedule, waits=dualpipev_waits(schedule, [of_stage.steps() for of_stage in of_stages]))
    return Schedule(schedule_class.__name__, num_chunks, num_microbatches, stages)


def stage_order(stage: int, steps: Iterable[Iterable[Any]]) -> tuple[Instruction, ...]:
    """One stage's forwards and backwards in the order of a DeepSpeed schedule's steps.

    DeepSpeed's instructions name a buffer, not a microbatch: the n-th forward (backward) of a chunk is microbatch n.
    DualPipeV's instructions also name a `phase`: the model chunk.

    Raises:
        InputError: if there is no forward or backward at all.
    """
    next_microbatch: dict[tuple[Kind, int], int] = {}
    order = []
    for commands in steps:
        for command in commands:
            kind = KIND_OF.get(type(command).__name__)
            if kind is None:
                continue
            chunk = chunk_of(command)
            microbatch = next_microbatch.get((kind, chunk), 0)
            next_microbatch[kind, chunk] = microbatch + 1
            order.append(Instruction(stage, chunk, microbatch, kind))
    if not order:
        raise InputError(f"DeepSpeed's schedule of stage {stage} has neither forward nor backward passes")
    return tuple(order)
