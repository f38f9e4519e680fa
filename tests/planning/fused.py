"""Schedules in which a forward and the backward behind it are one instruction, with what each instruction holds."""

from __future__ import annotations

from dataclasses import replace

from perseus_core.planning.schedule import Instruction, Kind, Schedule

Passes = dict[Instruction, tuple[Instruction, ...]]


def fused_with_expert_overlap(plain: Schedule) -> tuple[Schedule, Passes]:
    """As Megatron runs a schedule when it overlaps expert-parallel communication.

    Returns:
        the schedule, and the one or two passes that each of its instructions runs.
    """
    passes: Passes = {}
    stages = []
    for order in plain.stages:
        forwards = [i for i in order if i.kind is Kind.FORWARD]
        backwards = [i for i in order if i.kind is Kind.BACKWARD]
        num_alone = order.index(backwards[0])
        pairs = zip(forwards[num_alone:], backwards, strict=False)
        fused = {i._replace(kind=Kind.FORWARD_BACKWARD): (f, i) for f, i in pairs}
        alone = {i: (i,) for i in (*forwards[:num_alone], *backwards[len(fused) :])}
        stages.append((*forwards[:num_alone], *fused, *backwards[len(fused) :]))
        passes |= {**fused, **alone}
    return replace(plain, name=f"{plain.name}, fused", stages=tuple(stages)), passes
