"""What a rank sends to rank 0 when measurements are collected."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from perseus_core.errors import InputError
from perseus_core.planning.schedule import InstructionType, Kind
from perseus_core.runtime.job import Job
from perseus_core.runtime.measure.recorder import Step
from perseus_core.runtime.measure.stage_measurements import StageMeasurements
from perseus_core.runtime.measure.stretch import Stretch


@dataclass(frozen=True)
class RankReport:
    """One rank's share of what is collected.

    Attributes:
        measurements: of its sweep; without clocks if it made none.
        stretches: how much longer than planned instructions took under the plan that runs.
        traced: what it executed, if that is not what its schedule says.
        pipeline_time_s: from its first instruction's begin to its last one's end in an iteration of the baseline.
    """

    measurements: StageMeasurements
    stretches: tuple[Stretch, ...] = ()
    traced: tuple[Step, ...] = ()
    pipeline_time_s: float = 0.0

    def encode(self) -> bytes:
        """As bytes."""
        fields = {
            "stage": self.measurements.stage,
            "measurements": self.measurements.to_numbers(),
            "stretches": [
                [s.type.chunk, s.type.kind.value, s.clock_mhz, s.factor, s.executions, s.held_down]
                for s in self.stretches
            ],
            "traced": [[chunk, microbatch, kind.value] for chunk, microbatch, kind in self.traced],
            "pipeline_time_s": self.pipeline_time_s,
        }
        return zlib.compress(json.dumps(fields).encode())

    @classmethod
    def decode(cls, content: bytes) -> RankReport:
        """From the bytes that `encode` made."""
        fields = json.loads(zlib.decompress(content))
        stage = fields["stage"]
        return cls(
            StageMeasurements.from_numbers(stage, fields["measurements"]),
            tuple(
                Stretch(InstructionType(stage, chunk, Kind(kind)), clock, factor, executions, held_down)
                for chunk, kind, clock, factor, executions, held_down in fields["stretches"]
            ),
            tuple((chunk, microbatch, Kind(kind)) for chunk, microbatch, kind in fields["traced"]),
            fields["pipeline_time_s"],
        )


def said_orders(job: Job, num_microbatches: int) -> list[tuple[Step, ...]]:
    """What the framework says that each stage executes; nothing where it has no schedule for so many microbatches."""
    try:
        stages = job.schedule(num_microbatches).stages
    except InputError:
        return []
    return [tuple((i.chunk, i.microbatch, i.kind) for i in order) for order in stages]


def traced_orders(parts: Sequence[RankReport], said: Sequence[tuple[Step, ...]]) -> list[tuple[Step, ...]] | None:
    """What each stage executed, or None where all did as the framework says.

    Args:
        parts: of all ranks.
        said: what `said_orders` gives.
    """
    traced = {part.measurements.stage: part.traced for part in parts if part.traced}
    if not traced:
        return None
    num_stages = 1 + max(part.measurements.stage for part in parts)
    return [traced[stage] if stage in traced else said[stage] for stage in range(num_stages)]
