"""What a stage of DualPipeV does beside its passes: it queues transfers, begins them together and waits for them all.

So it may wait for a neighbour that has not come to a transfer yet, though it needs nothing of it. In DeepSpeed's 1F1B
every send meets a receive that its neighbour comes to at the same step: there the waiting for data is all there is, but
for a tenth of a percent of an iteration at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from perseus_core.planning.schedule import Instruction, Kind, Schedule, Waits
from perseus_core.planning.transfers import StageProgram, Transfer, waits
from perseus_ds.instructions import KIND_OF, RECEIVED_FOR, SENT_FOR, TRANSFER_WHAT_IS_QUEUED, chunk_of


def dualpipev_waits(schedule: Schedule, steps_of_stages: Iterable[Iterable[Iterable[Any]]]) -> Waits:
    """Which instructions wait for each other because of how DualPipeV transfers.

    Args:
        schedule: the order of its passes.
        steps_of_stages: for each stage the steps of DeepSpeed's schedule.
    """
    places = list(pairwise(schedule.path))
    receiver = {Kind.FORWARD: dict(places), Kind.BACKWARD: {after: before for before, after in places}}
    return waits([_program(stage, steps, receiver) for stage, steps in enumerate(steps_of_stages)])


def _program(
    stage: int, steps: Iterable[Iterable[Any]], receiver: dict[Kind, dict[tuple[int, int], tuple[int, int]]]
) -> StageProgram:
    """One stage's passes and transfers; the n-th of a name and a chunk belongs to microbatch n."""
    program = StageProgram()
    seen: Counter[tuple[str, int]] = Counter()
    queued: list[Transfer] = []
    for command in (command for commands in steps for command in commands):
        name = type(command).__name__
        if name == TRANSFER_WHAT_IS_QUEUED:
            program.exchange(*queued)
            queued = []
            continue
        chunk = chunk_of(command)
        microbatch = seen[name, chunk]
        seen[name, chunk] += 1
        if name in KIND_OF:
            program.run(Instruction(stage, chunk, microbatch, KIND_OF[name]))
        elif name in RECEIVED_FOR:
            queued.append(Instruction(stage, chunk, microbatch, RECEIVED_FOR[name]))
        elif name in SENT_FOR:
            kind = SENT_FOR[name]
            queued.append(Instruction(*receiver[kind][stage, chunk], microbatch, kind))
    return program
