"""Waiting that comes from how a framework transfers data, beside waiting for the data.

A transfer ends, for sender and receiver, when both have come to it and the data are there (NCCL beyond the size of its
buffers, and gloo). So a stage that waits for the end of its send waits for the receiver to come to its receive, and one
that waits for two transfers at once waits for both neighbours. A plan that does not know of this takes for slack what
is none.

An adapter writes down what each stage does in its framework, and `waits` finds which instructions wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from perseus_core.errors import InputError
from perseus_core.planning.schedule import Instruction, Waits

Transfer = Instruction
"""A transfer is named by the instruction that needs what it carries."""


class _Does(Enum):
    RUN = "run"
    BEGIN = "begin"
    WAIT = "wait"


@dataclass
class StageProgram:
    """What one stage does in one iteration, in order. A transfer that is None does not take place."""

    _steps: list[tuple[_Does, Instruction]] = field(default_factory=list)

    def run(self, instruction: Instruction) -> None:
        """The stage executes an instruction."""
        self._steps.append((_Does.RUN, instruction))

    def begin(self, *transfers: Transfer | None) -> list[Transfer]:
        """It begins to send or receive, and goes on; returns those that take place."""
        begun = [transfer for transfer in transfers if transfer is not None]
        self._steps += [(_Does.BEGIN, transfer) for transfer in begun]
        return begun

    def wait(self, transfers: Sequence[Transfer]) -> None:
        """It goes on when transfers that it has begun have ended."""
        self._steps += [(_Does.WAIT, transfer) for transfer in transfers]

    def exchange(self, *transfers: Transfer | None) -> None:
        """It begins transfers and waits for them."""
        self.wait(self.begin(*transfers))


@dataclass(frozen=True)
class _Ready:
    """When a stage comes to a step: its last instruction has ended, and so have some transfers."""

    ran: Instruction | None
    ended: tuple[Transfer, ...]


def waits(programs: Sequence[StageProgram]) -> Waits:
    """Which instructions wait for instructions of other stages, for data or for a transfer; none that others imply.

    Args:
        programs: of all stages.

    Raises:
        InputError: if a transfer has not two sides, or transfers wait for each other for ever.
    """
    orders = [[i for does, i in program._steps if does is _Does.RUN] for program in programs]
    place = {i: (stage, number) for stage, order in enumerate(orders) for number, i in enumerate(order)}
    begins: dict[Transfer, list[_Ready]] = {}
    runs: dict[Instruction, _Ready] = {}
    for program in programs:
        ran: Instruction | None = None
        ended: list[Transfer] = []
        for does, i in program._steps:
            ready = _Ready(ran, tuple(ended))
            if does is _Does.BEGIN:
                begins.setdefault(i, []).append(ready)
            elif does is _Does.WAIT:
                ended.append(i)
            else:
                runs[i] = ready
                ran, ended = i, []

    # For each stage, the number of its last instruction that has ended for certain when a transfer has.
    known: dict[Transfer, dict[int, int] | None] = {}

    def ended_with(transfer: Transfer) -> dict[int, int]:
        if transfer not in known:
            known[transfer] = None
            if len(begins.get(transfer, [])) != 2:
                raise InputError(f"the transfer to {transfer} has not one sender and one receiver")
            known[transfer] = _latest([ended_at(side) for side in begins[transfer]])
        found = known[transfer]
        if found is None:
            raise InputError(f"the transfer to {transfer} waits for itself; its stages would wait for ever")
        return found

    def ended_at(ready: _Ready) -> dict[int, int]:
        own = [] if ready.ran is None else [dict([place[ready.ran]])]
        return _latest([*own, *map(ended_with, ready.ended)])

    found: list[tuple[Instruction, Instruction]] = []
    for stage, order in enumerate(orders):
        implied: dict[int, int] = {}
        for after in order:
            ended_before = ended_at(runs[after])
            found += [
                (orders[other][number], after)
                for other, number in sorted(ended_before.items())
                if other != stage and number > implied.get(other, -1)
            ]
            implied = _latest([implied, ended_before])
    return tuple(found)


def _latest(all_ended: Sequence[dict[int, int]]) -> dict[int, int]:
    latest: dict[int, int] = {}
    for ended in all_ended:
        for stage, number in ended.items():
            latest[stage] = max(number, latest.get(stage, number))
    return latest
