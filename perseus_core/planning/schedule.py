"""Pipeline schedules as data: for each stage, the order of its instructions in one iteration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import NamedTuple

from perseus_core.errors import InputError


class Kind(str, Enum):
    """What an instruction computes. The values are the names used in every file."""

    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_INPUT = "backward_input"
    BACKWARD_WEIGHT = "backward_weight"
    FORWARD_BACKWARD = "forward_backward"

    def __str__(self) -> str:
        return self.value


class Placement(str, Enum):
    """How the chunks of a model lie over the stages. The values are the names used in every file."""

    LOOP = "loop"
    """Every chunk leads from the first stage to the last, as in interleaved 1F1B."""
    V = "v"
    """Every second chunk leads back from the last stage to the first, as in DualPipeV; it turns round on its stage."""

    def __str__(self) -> str:
        return self.value


class InstructionType(NamedTuple):
    """What repeats for every microbatch: one profile and one tradeoff curve belong to each."""

    stage: int
    chunk: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind} of stage {self.stage}" + (f", chunk {self.chunk}" if self.chunk else "")


class Instruction(NamedTuple):
    """One piece of work on one stage: one microbatch through one model chunk, in one direction."""

    stage: int
    chunk: int
    microbatch: int
    kind: Kind

    @property
    def type(self) -> InstructionType:
        """The instruction without its microbatch."""
        return InstructionType(self.stage, self.chunk, self.kind)


Waits = tuple[tuple[Instruction, Instruction], ...]
"""Pairs (before, after) of instructions of different stages: `after` begins when `before` has ended."""


@dataclass(frozen=True)
class Schedule:
    """The order of instructions on every stage in one iteration.

    Attributes:
        name: how it is called, for example `1f1b`.
        num_chunks: model chunks per stage, 1 unless interleaved or in a V.
        num_microbatches: microbatches of one iteration.
        stages: for each stage its instructions in order.
        waits: pairs (before, after): `after` begins when `before` has ended, though it needs nothing of it, because the
            framework's transfers hold it up (`transfers.waits`).
        placement: how the chunks lie over the stages.

    Raises:
        InputError: if a stage holds an instruction of another stage, one out of range, or one twice, or a wait names an
            instruction that no stage holds.
    """

    name: str
    num_chunks: int
    num_microbatches: int
    stages: tuple[tuple[Instruction, ...], ...]
    waits: Waits = ()
    placement: Placement = Placement.LOOP

    def __post_init__(self) -> None:
        if not self.stages or not any(self.stages):
            raise InputError(
                f"schedule {self.name!r} has no instruction; a schedule needs at least one stage with work"
            )
        for stage, order in enumerate(self.stages):
            if len(set(order)) != len(order):
                twice = next(i for i in order if order.count(i) > 1)
                raise InputError(f"schedule {self.name!r} holds {twice} twice; each instruction runs once an iteration")
            for i in order:
                in_range = (
                    i.stage == stage and 0 <= i.chunk < self.num_chunks and 0 <= i.microbatch < self.num_microbatches
                )
                if not in_range:
                    raise InputError(
                        f"schedule {self.name!r} holds {i} on stage {stage}; expected stage {stage}, chunk below "
                        f"{self.num_chunks} and microbatch below {self.num_microbatches}"
                    )
        held = set(self.instructions) if self.waits else set()
        for i in (i for pair in self.waits for i in pair):
            if i not in held:
                raise InputError(f"schedule {self.name!r} waits for or with {i}, which no stage holds")

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return len(self.stages)

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """All instructions, stage after stage, each stage in its order."""
        return tuple(i for order in self.stages for i in order)

    def passes(self, stage: int) -> Iterator[tuple[Instruction, tuple[Instruction, ...]]]:
        """Each instruction of a stage in order, with the passes it runs: itself, or the two of a `forward_backward`.

        A `forward_backward` bears the name of its backward. A stage runs its forwards in the order of its backwards,
        with the chunks counted from the other end, and those that run alone first: so the order says which forward a
        `forward_backward` holds.
        """
        order = self.stages[stage]
        num_alone = sum(i.kind is Kind.FORWARD for i in order)
        forwards = (
            i._replace(chunk=self.num_chunks - 1 - i.chunk, kind=Kind.FORWARD)
            for i in order
            if i.kind in (Kind.BACKWARD, Kind.FORWARD_BACKWARD)
        )
        fused_forwards = islice(forwards, num_alone, None)
        for i in order:
            if i.kind is Kind.FORWARD_BACKWARD:
                yield i, (*islice(fused_forwards, 1), i._replace(kind=Kind.BACKWARD))
            else:
                yield i, (i,)

    @property
    def path(self) -> tuple[tuple[int, int], ...]:
        """Where a microbatch's forward passes run, as (stage, chunk) in order; its backward passes come back."""
        down = range(self.num_stages)
        up = down[::-1] if self.placement is Placement.V else down
        return tuple((stage, chunk) for chunk in range(self.num_chunks) for stage in (up if chunk % 2 else down))


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards in the same order of microbatches (Huang et al., NeurIPS 2019)."""
    _require_positive(num_stages=num_stages, num_microbatches=num_microbatches)
    return Schedule(
        "gpipe",
        1,
        num_microbatches,
        tuple(
            tuple(
                Instruction(stage, 0, microbatch, kind)
                for kind in (Kind.FORWARD, Kind.BACKWARD)
                for microbatch in range(num_microbatches)
            )
            for stage in range(num_stages)
        ),
    )


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """1F1B without interleaving, as DeepSpeed and Megatron run it (Narayanan et al., SOSP 2019).

    Stage s runs min(S - s - 1, M) forwards to warm up, then one forward and one backward in turn, then what is left.
    """
    _require_positive(num_stages=num_stages, num_microbatches=num_microbatches)

    def order(stage: int) -> tuple[Instruction, ...]:
        warm_up = min(num_stages - stage - 1, num_microbatches)
        return _warm_up_then_alternate(
            warm_up,
            [Instruction(stage, 0, m, Kind.FORWARD) for m in range(num_microbatches)],
            [Instruction(stage, 0, m, Kind.BACKWARD) for m in range(num_microbatches)],
        )

    return Schedule("1f1b", 1, num_microbatches, tuple(order(stage) for stage in range(num_stages)))


def interleaved(
    num_stages: int, num_microbatches: int, num_chunks: int, microbatch_group_size: int | None = None
) -> Schedule:
    """Interleaved 1F1B in Megatron's order (Narayanan et al., SC 2021; `schedules.get_schedule_table`).

    Microbatches go through the chunks in groups of `microbatch_group_size` (Megatron's
    `microbatch_group_size_per_vp_stage`, by default the number of stages).

    Raises:
        InputError: for what Megatron refuses: one stage, fewer than two chunks, a group smaller than the number of
            stages or larger than the number of microbatches, or a last group that is smaller than the number of stages.
    """
    group = num_stages if microbatch_group_size is None else microbatch_group_size
    _require_positive(
        num_stages=num_stages, num_microbatches=num_microbatches, num_chunks=num_chunks, microbatch_group_size=group
    )
    if num_chunks < 2:
        raise InputError("interleaved 1F1B with 1 chunk is plain 1F1B; ask for schedule 1f1b or for 2 or more chunks")
    if num_stages < 2:
        raise InputError("interleaved 1F1B on 1 stage is not a pipeline; use 2 or more stages")
    if group < num_stages:
        raise InputError(f"microbatch_group_size {group} is below the {num_stages} stages; use {num_stages} or more")
    if group > num_microbatches:
        raise InputError(
            f"microbatch_group_size {group} is above the {num_microbatches} microbatches; "
            f"use {group} or more microbatches"
            + (f", or a group of {num_stages} to {num_microbatches}" if num_microbatches >= num_stages else "")
        )
    if 0 < num_microbatches % group < num_stages:
        raise InputError(
            f"{num_microbatches} microbatches in groups of {group} leave a last group of {num_microbatches % group}, "
            f"fewer than the {num_stages} stages; use a multiple of {group}, or leave {num_stages} or more"
        )
    # The order in which (chunk, microbatch) pass: a group goes through chunk 0, then the same through chunk 1, ...
    table = [
        (chunk, microbatch)
        for first in range(0, num_microbatches, group)
        for chunk in range(num_chunks)
        for microbatch in range(first, min(first + group, num_microbatches))
    ]

    def order(stage: int) -> tuple[Instruction, ...]:
        warm_up = (num_stages - stage - 1) * 2 + (num_chunks - 1) * group
        return _warm_up_then_alternate(
            min(warm_up, len(table)),
            [Instruction(stage, chunk, microbatch, Kind.FORWARD) for chunk, microbatch in table],
            [Instruction(stage, num_chunks - 1 - chunk, microbatch, Kind.BACKWARD) for chunk, microbatch in table],
        )

    return Schedule("interleaved", num_chunks, num_microbatches, tuple(order(stage) for stage in range(num_stages)))


def zb_h1(num_stages: int, num_microbatches: int) -> Schedule:
    """Zero-bubble schedule ZB-H1, made by hand as in the paper (Qi et al., ICLR 2024, arXiv 2401.10241, section 2.3).

    The backward is split: `backward_input` sends the gradient on, `backward_weight` needs nothing from other stages
    and fills bubbles. Forwards and input parts keep the order of 1F1B. Stage s delays its weight parts by s
    microbatches: the weight part of microbatch m runs right after the input part of microbatch m + s, and the last s
    weight parts follow the last input part.

    So a stage holds the activations of at most S - s microbatches that wait for their input part, as in 1F1B, and of at
    most s more that wait for their weight part only: never more than the S of stage 0. With equal stages, M >= S, and a
    weight part that takes no longer than the forward or the input part, an iteration takes (S - 1) (tF + tB - tW) more
    than a stage's work, where 1F1B takes (S - 1) (tF + tB + tW) more.
    """

    def order(of_1f1b: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        instructions: list[Instruction] = []
        for i in of_1f1b:
            if i.kind is Kind.FORWARD:
                instructions.append(i)
                continue
            instructions.append(i._replace(kind=Kind.BACKWARD_INPUT))
            if i.microbatch >= i.stage:
                instructions.append(i._replace(microbatch=i.microbatch - i.stage, kind=Kind.BACKWARD_WEIGHT))
        stage = of_1f1b[-1].stage
        instructions += [
            Instruction(stage, 0, microbatch, Kind.BACKWARD_WEIGHT)
            for microbatch in range(max(0, num_microbatches - stage), num_microbatches)
        ]
        return tuple(instructions)

    plain = one_f_one_b(num_stages, num_microbatches)
    return Schedule("zb-h1", 1, num_microbatches, tuple(order(of_1f1b) for of_1f1b in plain.stages))


def _warm_up_then_alternate(
    warm_up: int, forwards: Sequence[Instruction], backwards: Sequence[Instruction]
) -> tuple[Instruction, ...]:
    """`warm_up` forwards, then a forward and a backward in turn, then the remaining backwards."""
    order = list(forwards[:warm_up])
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        order += [forward, backward]
    return tuple(order + list(backwards[len(forwards) - warm_up :]))


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} is {number}; it must be 1 or more")
