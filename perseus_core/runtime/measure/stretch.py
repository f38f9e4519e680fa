"""How far the execution of a plan deviates from it."""

from __future__ import annotations

from dataclasses import dataclass

from perseus_core.planning.schedule import InstructionType


@dataclass(frozen=True)
class Stretch:
    """How much longer than planned one instruction type really took at one planned clock.

    Attributes:
        type: stage, chunk and kind.
        clock_mhz: the clock that was planned.
        factor: median duration over the planned one.
        executions: how many.
        held_down: whether power or heat held the GPU's clock down meanwhile.
    """

    type: InstructionType
    clock_mhz: int
    factor: float
    executions: int
    held_down: bool = False
