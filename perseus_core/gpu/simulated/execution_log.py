"""What really ran on simulated GPUs, and at which clock: an oracle for tests and demonstrations.

Each process appends to a file of its own, one JSON object a line, so no process waits for another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExecutedInstruction:
    """One instruction as it ran. Times are of the monotonic clock, the same for all processes of a machine.

    Attributes:
        gpu: index of the GPU.
        stage: of the instruction.
        chunk: of the instruction.
        kind: of the instruction, a value of `perseus_core.planning.schedule.Kind`.
        start_s: when it started.
        end_s: when it finished on the GPU.
        energy_j: exact energy.
        clocks: (clock in MHz, seconds at it), in order.
        label: what the caller gave to recognise it, for example iteration and microbatch.
        pid: process that ran it.
    """

    gpu: int
    stage: int
    chunk: int
    kind: str
    start_s: float
    end_s: float
    energy_j: float
    clocks: tuple[tuple[int, float], ...]
    label: Mapping[str, int]
    pid: int

    @property
    def time_s(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s

    def share_at(self, clock_mhz: int) -> float:
        """The share of its time that it ran at a clock."""
        return sum(seconds for clock, seconds in self.clocks if clock == clock_mhz) / self.time_s


@dataclass(frozen=True)
class ClockRequest:
    """One call that locked or reset the clock.

    Attributes:
        gpu: index of the GPU.
        time_s: when it was called; the clock changes one latency later.
        clock_mhz: the clock asked for, None for a reset.
        pid: process that called.
    """

    gpu: int
    time_s: float
    clock_mhz: int | None
    pid: int


class ExecutionLog:
    """Appends to this process's log file, where logging is on."""

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        """Writes into a folder that exists, or nowhere."""
        self._folder = folder
        self._enabled = enabled
        self._descriptor = -1
        self._pid = 0

    def executed(self, instruction: ExecutedInstruction) -> None:
        """Logs one finished instruction."""
        if self._enabled:
            self._append({"executed": vars(instruction)})

    def clock_request(self, gpu: int, time_s: float, clock_mhz: int | None) -> None:
        """Logs one call that locked (or, with None, reset) the clock."""
        if self._enabled:
            self._append({"clock_request": vars(ClockRequest(gpu, time_s, clock_mhz, os.getpid()))})

    def _append(self, entry: dict[str, object]) -> None:
        pid = os.getpid()
        if self._pid != pid:  # first use, or a forked child
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self._folder / f"{pid}.jsonl", flags, 0o666)
            self._pid = pid  # last: another thread that sees it writes at once
        os.write(self._descriptor, json.dumps(entry).encode() + b"\n")


def read_executed(node_folder: Path) -> list[ExecutedInstruction]:
    """All instructions that finished on a node's GPUs, by time of start."""
    entries = (
        ExecutedInstruction(
            **{**entry, "clocks": tuple((int(clock), float(seconds)) for clock, seconds in entry["clocks"])}
        )
        for entry in _entries(node_folder, "executed")
    )
    return sorted(entries, key=lambda e: e.start_s)


def read_clock_requests(node_folder: Path) -> list[ClockRequest]:
    """All calls that locked or reset a clock of a node's GPUs, by time."""
    return sorted((ClockRequest(**entry) for entry in _entries(node_folder, "clock_request")), key=lambda r: r.time_s)


def _entries(node_folder: Path, wanted: str) -> Iterator[dict[str, Any]]:
    for path in (node_folder / "log").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            for kind, entry in json.loads(line).items():
                if kind == wanted:
                    yield entry
