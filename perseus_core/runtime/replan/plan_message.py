"""A plan as it leaves the planner: what each stage's ranks receive of it, and what is said of it to all."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseus_core.errors import InputError
from perseus_core.planning.plan import Plan
from perseus_core.runtime.clock.planned_clock import PlannedClock
from perseus_core.runtime.measure.recorder import Step
from perseus_core.runtime.ranks.plan_summary import PlanSummary
from perseus_core.runtime.replan.packed_steps import PACKED_STEP, pack_steps, unpack_steps

_CLOCK, _TIME = np.dtype("<u2"), np.dtype("<f4")
_INSTRUCTION_BYTES = PACKED_STEP.itemsize + _CLOCK.itemsize + 2 * _TIME.itemsize
# Numbers of a `PlanSummary`; bytes of a stage's plan.
_SUMMARY, _SIZE = struct.Struct("<15d"), struct.Struct("<I")
_DECIMALS = 6  # of waits, in seconds
# No stage executes so many instructions in an iteration.
_MAX_INSTRUCTIONS = 2**20


@dataclass(frozen=True)
class StagePlan:
    """What one stage does in one iteration.

    Attributes:
        steps: its instructions in order.
        clocks: the clock and the times planned for each.
    """

    steps: tuple[Step, ...]
    clocks: tuple[PlannedClock, ...]

    def encode(self) -> bytes:
        """As bytes: steps, clocks, durations and waits before them, column by column since their values repeat.

        Raises:
            InputError: if there are more chunks or microbatches than can be sent.
        """
        clocks_mhz = np.array([planned.clock_mhz for planned in self.clocks], _CLOCK)
        durations_s = np.array([planned.duration_s for planned in self.clocks], _TIME)
        starts_s = np.array([planned.start_s for planned in self.clocks])
        waits_s = np.diff(starts_s - _since_begin(durations_s), prepend=0.0).round(_DECIMALS).astype(_TIME)
        columns = (pack_steps(self.steps), clocks_mhz, durations_s, waits_s)
        return zlib.compress(b"".join(column.tobytes() for column in columns), 9)

    @classmethod
    def decode(cls, content: bytes) -> StagePlan:
        """From the bytes that `encode` made; waits in microseconds, durations in the precision of single floats.

        Raises:
            InputError: if it did not make them.
        """
        unpacker = zlib.decompressobj()
        try:
            columns = unpacker.decompress(content, _MAX_INSTRUCTIONS * _INSTRUCTION_BYTES)
        except zlib.error as error:
            raise _malformed(str(error)) from None
        num_steps, rest = divmod(len(columns), _INSTRUCTION_BYTES)
        if rest or not unpacker.eof or unpacker.unused_data:
            raise _malformed(f"its {len(columns)} bytes are not whole")
        steps = np.frombuffer(columns, PACKED_STEP, num_steps)
        clocks_mhz = np.frombuffer(columns, _CLOCK, num_steps, steps.nbytes)
        times_s = np.frombuffer(columns, _TIME, 2 * num_steps, steps.nbytes + clocks_mhz.nbytes).reshape(2, -1)
        if not (np.isfinite(times_s) & (times_s >= 0)).all():
            raise _malformed("it has a wait or duration that cannot be")
        durations_s, waits_s = times_s
        starts_s = _since_begin(durations_s) + np.cumsum(waits_s, dtype=np.float64)
        return cls(
            unpack_steps(steps),
            tuple(map(PlannedClock, clocks_mhz.tolist(), starts_s.tolist(), durations_s.tolist())),
        )


def _since_begin(durations_s: NDArray[np.float32]) -> NDArray[np.float64]:
    """When each instruction would begin if none waited."""
    return np.cumsum(durations_s, dtype=np.float64) - durations_s


@dataclass(frozen=True)
class PlanMessage:
    """All that the ranks need to run a plan and to judge it.

    Attributes:
        summary: its promises.
        stages: for each stage what it does.
    """

    summary: PlanSummary
    stages: tuple[StagePlan, ...]

    @classmethod
    def of(cls, plan: Plan, *, number: int, limit_time_s: float, solve_s: float) -> PlanMessage:
        """The message of a plan, with what `PlanSummary` says beside it."""
        stages = [
            StagePlan(
                tuple((p.instruction.chunk, p.instruction.microbatch, p.instruction.kind) for p in order),
                tuple(PlannedClock(p.clock_mhz, p.start_s, p.duration_s) for p in order),
            )
            for order in plan.stages
        ]
        # As it is sent, so that all ranks and a saved state have the same plan.
        as_sent = tuple(StagePlan.decode(stage.encode()) for stage in stages)
        summary = PlanSummary(
            number,
            plan.schedule.num_microbatches,
            limit_time_s,
            plan.iteration_time_s,
            plan.energy_j,
            plan.baseline_time_s,
            plan.baseline_energy_j,
            plan.gap,
            solve_s,
            plan.lost_to_switching,
            plan.switching.up_s,
            plan.switching.down_s,
            plan.switching.jitter_s,
            plan.changes_per_iteration,
            plan.switching.call_s,
        )
        return cls(summary, as_sent)

    def numbered(self, number: int) -> PlanMessage:
        """The same plan with another number."""
        return replace(self, summary=replace(self.summary, number=number))

    def encode(self) -> bytes:
        """As bytes: the summary's numbers, then each stage's plan with its size before it."""
        stages = [stage.encode() for stage in self.stages]
        return _SUMMARY.pack(*astuple(self.summary)) + b"".join(_SIZE.pack(len(stage)) + stage for stage in stages)

    @classmethod
    def decode(cls, content: bytes) -> PlanMessage:
        """From the bytes that `encode` made.

        Raises:
            InputError: if it did not make them.
        """
        try:
            numbers = _SUMMARY.unpack_from(content)
            stages = [StagePlan.decode(stage) for stage in _sized(content[_SUMMARY.size :])]
        except struct.error as error:
            raise _malformed(str(error)) from None
        if not stages or not np.isfinite(numbers).all():
            raise _malformed("it has no stage, or a number that is not finite")
        named: dict[str, Any] = dict(zip((f.name for f in fields(PlanSummary)), numbers, strict=True))
        for name in ("number", "num_microbatches", "changes_per_iteration"):
            named[name] = int(named[name])
        summary = PlanSummary(**named)
        return cls(summary, tuple(stages))


def _sized(content: bytes) -> Iterator[bytes]:
    """Parts that follow their sizes."""
    place = 0
    while place < len(content):
        begin = place + _SIZE.size
        place = begin + int(_SIZE.unpack_from(content, place)[0])
        yield content[begin:place]


def _malformed(why: str) -> InputError:
    return InputError(f"this is no plan ({why}); it was cut off, or comes from another version: use the same one")
