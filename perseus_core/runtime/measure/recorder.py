"""Records what this rank executes, as events on the compute stream, and reads their times once they are reached."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from perseus_core.planning.schedule import Kind
from perseus_core.runtime.measure.energy import ChunkKind, Iteration, Span
from perseus_core.runtime.measure.events import Event

Step = tuple[int, int, Kind]
"""Chunk, microbatch and kind of one executed instruction."""


@dataclass(frozen=True)
class Expectation:
    """At what an iteration runs, and what it should take.

    Attributes:
        plan: number of the plan that is in force, 0 for none.
        held_mhz: the one clock that is held while profiling.
        durations_s: of each instruction in order; empty if nothing is expected.
        clocks_mhz: planned, of each instruction in order; empty without a plan.
    """

    plan: int = 0
    held_mhz: int | None = None
    durations_s: tuple[float, ...] = ()
    clocks_mhz: tuple[int, ...] = ()


@dataclass
class Record:
    """One iteration as it is being executed.

    Attributes:
        number: of the iteration.
        num_microbatches: 0 for an evaluation.
        begin: the stream reached the iteration.
        expectation: at what it runs.
        on_host_time: its events tell the host's time, and not only times between each other.
        steps: what was executed, in order.
        begins, ends: their events.
        end: the stream finished the iteration.
        in_order: nothing but what was expected was executed.
    """

    number: int
    num_microbatches: int
    begin: Event
    expectation: Expectation
    on_host_time: bool = True
    steps: list[Step] = field(default_factory=list)
    begins: list[Event] = field(default_factory=list)
    ends: list[Event] = field(default_factory=list)
    end: Event | None = None
    in_order: bool = True


@dataclass(frozen=True)
class MeasuredIteration:
    """One iteration with its times.

    Attributes:
        record: what was executed.
        iteration: when.
    """

    record: Record
    iteration: Iteration

    @property
    def span_s(self) -> float:
        """From begin to end."""
        return self.iteration.end_s - self.iteration.begin_s

    @property
    def seen_s(self) -> float:
        """Sum of the instructions' durations."""
        return sum(span.end_s - span.begin_s for span in self.iteration.spans)

    @property
    def expected_s(self) -> float:
        """What that sum should be; 0 if nothing was expected."""
        return sum(self.record.expectation.durations_s)


class Recorder:
    """The iterations whose events are not reached yet, in order."""

    def __init__(self) -> None:
        """Empty."""
        self._open: deque[Record] = deque()
        self._last_steps: list[Step] = []
        self._last_types: list[ChunkKind] = []

    def keep(self, record: Record) -> None:
        """An iteration has been given to the GPU."""
        self._open.append(record)

    def measured(self) -> Iterator[MeasuredIteration]:
        """The iterations that have been finished since the last call."""
        while self._open and (end := self._open[0].end) is not None and end.reached():
            record = self._open.popleft()
            spans = tuple(
                [
                    Span(executed, begin.time_s(), ended.time_s())
                    for executed, begin, ended in zip(
                        self._types_of(record.steps), record.begins, record.ends, strict=True
                    )
                ]
            )
            iteration = Iteration(record.number, record.begin.time_s(), end.time_s(), spans, record.on_host_time)
            # Events are given back to their pool as soon as possible.
            record.begins, record.ends = [], []
            yield MeasuredIteration(record, iteration)

    def _types_of(self, steps: list[Step]) -> list[ChunkKind]:
        """Of each executed instruction; those of the last iteration, which are usually the same, are not made again."""
        if steps != self._last_steps:
            self._last_steps = list(steps)
            self._last_types = [ChunkKind(chunk, kind) for chunk, _, kind in steps]
        return self._last_types
