"""How Megatron's stages send to and receive from each other, so that the planner knows who waits for whom.

This follows `forward_backward_pipelining_without_interleaving` and `forward_backward_pipelining_with_interleaving` of
`megatron.core.pipeline_parallel.schedules`, transfer by transfer.
"""

from __future__ import annotations

from perseus_core.planning.schedule import Instruction, Kind, Schedule
from perseus_core.planning.transfers import StageProgram, Transfer


def programs_of(schedule: Schedule, *, overlaps_steady_state: bool) -> list[StageProgram]:
    """What every stage does in one iteration of 1F1B or interleaved 1F1B.

    Args:
        schedule: the order of instructions; interleaved, a forward and a backward may be one `forward_backward`.
        overlaps_steady_state: Megatron's `overlap_p2p_comm`, which only interleaved 1F1B heeds: between warm-up and
            cool-down a stage computes while it transfers.
    """
    stages = [_Stage(schedule, stage) for stage in range(schedule.num_stages)]
    if schedule.num_chunks == 1:
        return [_one_f_one_b(stage) for stage in stages]
    return [_interleaved(stage, overlaps=overlaps_steady_state) for stage in stages]


class _Stage:
    """One stage's passes in order, and the names of the transfers that bring what they need and take what they made.

    Attributes:
        forwards, backwards: the passes of each direction.
        num_warm_up: forwards before the steady state, in which a forward and a backward take turns.
        steady_state: its instructions, each with the passes it runs.
    """

    def __init__(self, schedule: Schedule, stage: int) -> None:
        order = list(schedule.passes(stage))
        passes = [a_pass for _, of_instruction in order for a_pass in of_instruction]
        self.forwards = [i for i in passes if i.kind is Kind.FORWARD]
        self.backwards = [i for i in passes if i.kind is Kind.BACKWARD]
        self.num_warm_up = min(_num_warm_up(schedule, stage), len(self.forwards))
        self.steady_state = order[self.num_warm_up : len(order) - self.num_warm_up]
        self.is_first, self.is_last = stage == 0, stage == schedule.num_stages - 1
        self._last_stage, self._last_chunk = schedule.num_stages - 1, schedule.num_chunks - 1
        self._number = {i: n for direction in (self.forwards, self.backwards) for n, i in enumerate(direction)}

    @property
    def num_steady(self) -> int:
        return len(self.forwards) - self.num_warm_up

    def brings(self, i: Instruction) -> Transfer | None:
        """The transfer that brings what a pass of this stage needs."""
        if i.kind is Kind.FORWARD:
            return None if self.is_first and i.chunk == 0 else i
        return None if self.is_last and i.chunk == self._last_chunk else i

    def takes(self, i: Instruction) -> Transfer | None:
        """The transfer that takes away what a pass of this stage has made."""
        if i.kind is Kind.FORWARD:
            if not self.is_last:
                return i._replace(stage=i.stage + 1)
            return None if i.chunk == self._last_chunk else i._replace(stage=0, chunk=i.chunk + 1)
        if not self.is_first:
            return i._replace(stage=i.stage - 1)
        return None if i.chunk == 0 else i._replace(stage=self._last_stage, chunk=i.chunk - 1)

    def received_after(self, a_pass: Instruction) -> Transfer | None:
        """What the stage begins to receive after a pass, for a later one of the same direction.

        Usually what its next pass needs. The stage at which a direction begins receives what the stage at the other end
        has made by then, whenever that is needed (`recv_tensor_from_previous_stage`).
        """
        is_forward = a_pass.kind is Kind.FORWARD
        passes, number = self.forwards if is_forward else self.backwards, self._number[a_pass]
        if not (self.is_first if is_forward else self.is_last):
            return self.brings(passes[number + 1]) if number + 1 < len(passes) else None
        if number < self._last_stage or number + 1 == len(passes):
            return None
        made = passes[number - self._last_stage]
        chunk = made.chunk + 1 if is_forward else made.chunk - 1
        return made._replace(chunk=chunk) if 0 <= chunk <= self._last_chunk else None


def _num_warm_up(schedule: Schedule, stage: int) -> int:
    """As `get_pp_rank_microbatches` has it before it looks whether there are as many forwards."""
    stages_after = schedule.num_stages - stage - 1
    if schedule.num_chunks == 1:
        return stages_after
    forwards = (i for i in schedule.stages[stage] if i.kind is Kind.FORWARD)
    group = next(number for number, i in enumerate(forwards) if i.chunk > 0)
    is_fused = any(i.kind is Kind.FORWARD_BACKWARD for i in schedule.instructions)
    return 2 * stages_after + (schedule.num_chunks - 1) * group + is_fused


def _one_f_one_b(stage: _Stage) -> StageProgram:
    program = StageProgram()
    forwards, backwards, warm_up = stage.forwards, stage.backwards, stage.num_warm_up
    for forward in forwards[:warm_up]:
        program.exchange(stage.brings(forward))
        program.run(forward)
        program.exchange(stage.takes(forward))
    if stage.num_steady:
        program.exchange(stage.brings(forwards[warm_up]))
    for number, backward in enumerate(backwards[: stage.num_steady]):
        forward = forwards[warm_up + number]
        program.run(forward)
        program.exchange(stage.takes(forward), stage.brings(backward))
        program.run(backward)
        has_next = number + 1 < stage.num_steady
        program.exchange(stage.takes(backward), stage.brings(forwards[warm_up + number + 1]) if has_next else None)
    for backward in backwards[stage.num_steady :]:
        program.exchange(stage.brings(backward))
        program.run(backward)
        program.exchange(stage.takes(backward))
    return program


def _interleaved(stage: _Stage, *, overlaps: bool) -> StageProgram:
    program = StageProgram()
    forwards, backwards, warm_up = stage.forwards, stage.backwards, stage.num_warm_up
    first_gradient = stage.brings(backwards[0])
    program.exchange(stage.brings(forwards[0]))
    for number, forward in enumerate(forwards[:warm_up]):
        program.run(forward)
        joins_first_gradient = number + 1 == warm_up and stage.num_steady and not overlaps
        program.exchange(
            stage.takes(forward),
            stage.received_after(forward),
            first_gradient if joins_first_gradient else None,
        )
    if stage.num_steady == 0:
        program.exchange(first_gradient)
        receiving_gradients: list[Transfer] = []
    elif overlaps:
        receiving_gradients = _overlapped_steady_state(stage, program)
    else:
        _steady_state(stage, program)
        receiving_gradients = []
    for backward in backwards[stage.num_steady :]:
        if stage.brings(backward):
            program.wait(receiving_gradients[:1])
            del receiving_gradients[:1]
        program.run(backward)
        program.exchange(stage.takes(backward), stage.received_after(backward))
    return program


def _steady_state(stage: _Stage, program: StageProgram) -> None:
    """A forward and a backward, then all four transfers at once."""
    ran: list[Instruction] = []
    for instruction, passes in stage.steady_state:
        program.run(instruction)
        ran += passes
        if ran[-1].kind is Kind.BACKWARD:
            program.exchange(*map(stage.takes, ran), *map(stage.received_after, ran))
            ran.clear()


def _overlapped_steady_state(stage: _Stage, program: StageProgram) -> list[Transfer]:
    """Each pass begins its transfers and waits for the send before it; returns what is still being received."""
    receiving: dict[Kind, list[Transfer]] = {Kind.FORWARD: [], Kind.BACKWARD: []}
    sending: dict[Kind, list[Transfer]] = {Kind.FORWARD: [], Kind.BACKWARD: []}
    receiving[Kind.BACKWARD] += program.begin(stage.brings(stage.backwards[0]))
    for instruction, passes in stage.steady_state:
        for a_pass in passes:
            if stage.brings(a_pass):
                program.wait(receiving[a_pass.kind][:1])
                del receiving[a_pass.kind][:1]
        program.run(instruction)
        for a_pass in passes:
            sent = program.begin(stage.takes(a_pass))
            receiving[a_pass.kind] += program.begin(stage.received_after(a_pass))
            program.wait(sending[a_pass.kind])
            sending[a_pass.kind] = sent
    return receiving[Kind.BACKWARD]
