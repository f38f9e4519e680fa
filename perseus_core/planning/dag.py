"""The computation DAG: instructions, their order within each stage, and the data dependencies between stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import networkx as nx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from perseus_core.errors import InputError
from perseus_core.planning import _native
from perseus_core.planning.schedule import Instruction, Kind, Schedule


@dataclass(frozen=True, eq=False)
class Dag:
    """Any directed acyclic graph of instructions 0 .. N-1, as flat arrays.

    Attributes:
        num_instructions: N.
        predecessor: int32 of shape (E,), the instruction each edge comes from.
        successor: int32 of shape (E,), the instruction it goes to.
        latency_s: float64 of shape (E,), least time from the end of the one to the start of the other.

    Raises:
        InputError: if an edge leads nowhere, a latency is negative or not finite, or the graph has a cycle.
    """

    num_instructions: int
    predecessor: NDArray[np.int32]
    successor: NDArray[np.int32]
    latency_s: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name, dtype in (("predecessor", np.int32), ("successor", np.int32), ("latency_s", np.float64)):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype))
        if self.num_instructions < 1:
            raise InputError(f"DAG has {self.num_instructions} instructions; it needs one at least")
        if not self.predecessor.shape == self.successor.shape == self.latency_s.shape:
            raise InputError("DAG edges differ in the number of predecessors, successors and latencies")
        for name, ends in (("predecessor", self.predecessor), ("successor", self.successor)):
            if ends.size and not (ends.min() >= 0 and ends.max() < self.num_instructions):
                raise InputError(f"DAG edge has a {name} outside 0 .. {self.num_instructions - 1}")
        if not (np.isfinite(self.latency_s).all() and (self.latency_s >= 0).all()):
            raise InputError("DAG edge has a latency that is negative or not finite; latencies are seconds, 0 or more")
        if len(self.topological_order) < self.num_instructions:
            raise InputError("DAG has a cycle: the schedule would wait for itself for ever")

    @cached_property
    def topological_order(self) -> NDArray[np.int32]:
        """Instructions ordered so that every edge leads forward; shorter than N if there is a cycle."""
        order = _native.topological_order(self.num_instructions, self.predecessor, self.successor)
        return np.frombuffer(order, np.int32)

    @cached_property
    def _links(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]]:
        """Edges sorted by the topological place of their predecessor: one sweep over them settles all starts."""
        place = np.empty(self.num_instructions, np.int64)
        place[self.topological_order] = np.arange(self.num_instructions)
        by_place = np.argsort(place[self.predecessor], kind="stable")
        return self.predecessor[by_place], self.successor[by_place], self.latency_s[by_place]

    def start_times_s(self, durations_s: ArrayLike) -> NDArray[np.float64]:
        """Earliest start of every instruction, for durations of shape (N,)."""
        return np.frombuffer(_native.earliest_starts(*self._links, self._durations(durations_s)))

    def latest_start_times_s(self, durations_s: ArrayLike, iteration_time_s: float) -> NDArray[np.float64]:
        """Latest start of every instruction with which the iteration still ends in time."""
        durations = self._durations(durations_s)
        predecessor, successor, latency = (np.ascontiguousarray(link[::-1]) for link in self._links)
        # Backwards in time: an earliest start in the mirrored graph is the time from an end to the iteration's end.
        tail = np.frombuffer(_native.earliest_starts(successor, predecessor, latency, durations))
        return iteration_time_s - tail - durations

    def iteration_time_s(self, durations_s: ArrayLike) -> float:
        """Length of the critical path."""
        return float((self.start_times_s(durations_s) + np.asarray(durations_s)).max())

    def critical(self, durations_s: ArrayLike, tolerance_s: float | None = None) -> NDArray[np.bool_]:
        """Which instructions lie on a critical path: their latest start is their earliest."""
        start = self.start_times_s(durations_s)
        time = float((start + np.asarray(durations_s)).max())
        slack = self.latest_start_times_s(durations_s, time) - start
        return slack <= (1e-9 * time if tolerance_s is None else tolerance_s)

    def _durations(self, durations_s: ArrayLike) -> NDArray[np.float64]:
        durations = np.ascontiguousarray(durations_s, np.float64)
        if durations.shape != (self.num_instructions,):
            raise InputError(
                f"durations have shape {durations.shape}; the DAG has {self.num_instructions} instructions"
            )
        return durations


@dataclass(frozen=True, eq=False)
class ComputationDag(Dag):
    """The DAG of one schedule; instruction i of the arrays is `instructions[i]`, stage after stage."""

    schedule: Schedule

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """The instructions, in the order of the arrays."""
        return self.schedule.instructions

    @classmethod
    def of(cls, schedule: Schedule, transfer_latency_s: float = 0.0) -> ComputationDag:
        """Builds the DAG: the order within each stage, and the transfers of activations and gradients between them.

        Raises:
            InputError: if the schedule's order makes its instructions wait for each other in a circle.
        """
        place = {instruction: i for i, instruction in enumerate(schedule.instructions)}
        within = [(place[before], place[after], 0.0) for order in schedule.stages for before, after in pairwise(order)]
        # What the order of a stage implies needs no edge of its own; what contradicts it must have one, to be found.
        across = [
            (place[before], place[after], transfer_latency_s if before.stage != after.stage else 0.0)
            for before, after in data_dependencies(schedule)
            if before in place and not (before.stage == after.stage and place[before] < place[after])
        ]
        predecessor, successor, latency = zip(*(within + across), strict=True) if within + across else ((), (), ())
        return cls(len(place), np.array(predecessor), np.array(successor), np.array(latency), schedule)

    def to_networkx(self, durations_s: ArrayLike | None = None) -> nx.DiGraph:
        """The DAG to look at.

        Nodes are `Instruction`s, with `duration_s` and `start_s` if durations are given; edges have `latency_s`.
        """
        graph = nx.DiGraph()
        graph.add_nodes_from(self.instructions)
        if durations_s is not None:
            columns = (self.instructions, np.asarray(durations_s), self.start_times_s(durations_s))
            for instruction, duration, start in zip(*columns, strict=True):
                graph.nodes[instruction].update(duration_s=float(duration), start_s=float(start))
        for before, after, latency in zip(self.predecessor, self.successor, self.latency_s, strict=True):
            graph.add_edge(self.instructions[before], self.instructions[after], latency_s=float(latency))
        return graph


def data_dependencies(schedule: Schedule) -> Iterator[tuple[Instruction, Instruction]]:
    """Which instruction needs which: activations go down the chunks of the model, gradients come back up."""
    first_chunk, last_chunk = 0, schedule.num_chunks - 1
    last_stage = schedule.num_stages - 1
    for after in schedule.instructions:
        stage, chunk, _, kind = after
        if kind is Kind.BACKWARD_WEIGHT:
            yield after._replace(kind=Kind.BACKWARD_INPUT), after
        elif kind is Kind.FORWARD:
            if stage > 0:
                yield after._replace(stage=stage - 1), after
            elif chunk > first_chunk:
                yield after._replace(stage=last_stage, chunk=chunk - 1), after
        else:
            yield after._replace(kind=Kind.FORWARD), after
            if stage < last_stage:
                yield after._replace(stage=stage + 1), after
            elif chunk < last_chunk:
                yield after._replace(stage=0, chunk=chunk + 1), after
