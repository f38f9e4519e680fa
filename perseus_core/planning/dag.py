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
    def of(cls, schedule: Schedule, transfer_latency_s: float = 0.0, gap_s: float = 0.0) -> ComputationDag:
        """Builds the DAG: the order within each stage, and the transfers of activations and gradients between them.

        Args:
            schedule: the order of instructions.
            transfer_latency_s: from the end of an instruction to the start of one of another stage that waits for it.
            gap_s: from the end of an instruction to the start of the next of its stage.

        Raises:
            InputError: if the schedule's order makes its instructions wait for each other in a circle.
        """
        place = {instruction: i for i, instruction in enumerate(schedule.instructions)}
        within = [
            (place[before], place[after], gap_s) for order in schedule.stages for before, after in pairwise(order)
        ]
        # What the order of a stage implies needs no edge of its own; what contradicts it must have one, to be found.
        across = [
            (place[before], place[after], transfer_latency_s if before.stage != after.stage else gap_s)
            for before, after in dict.fromkeys((*data_dependencies(schedule), *schedule.waits))
            if not (before.stage == after.stage and place[before] < place[after])
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


# What lies between two instructions beside waiting takes no longer than this share of an instruction; more is something
# else, which must not be taken for latency.
_MOST_LATENCY = 0.2
_BISECTIONS = 20


def fitted_latency_s(dag: Dag, durations_s: ArrayLike, iteration_time_s: float) -> float:
    """The latency of all edges with which instructions of these durations take a measured time.

    Zero where they take as long or longer without, and never more than a fifth of a mean instruction.
    """

    def time_s(latency_s: float) -> float:
        latencies = np.full(dag.predecessor.shape, latency_s)
        return Dag(dag.num_instructions, dag.predecessor, dag.successor, latencies).iteration_time_s(durations_s)

    low, high = 0.0, _MOST_LATENCY * float(np.mean(np.asarray(durations_s)))
    if time_s(low) >= iteration_time_s:
        return low
    if time_s(high) <= iteration_time_s:
        return high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if time_s(middle) <= iteration_time_s else (low, middle)
    return low


def data_dependencies(schedule: Schedule) -> Iterator[tuple[Instruction, Instruction]]:
    """Which instruction needs which: activations go down the chunks of the model, gradients come back up."""
    runs = {
        a_pass: instruction
        for stage in range(schedule.num_stages)
        for instruction, passes in schedule.passes(stage)
        for a_pass in passes
    }
    next_place = dict(pairwise(schedule.path))
    previous_place = {after: before for before, after in next_place.items()}

    def needed_by(a_pass: Instruction) -> Iterator[Instruction]:
        place = (a_pass.stage, a_pass.chunk)
        if a_pass.kind is Kind.BACKWARD_WEIGHT:
            yield a_pass._replace(kind=Kind.BACKWARD_INPUT)
        elif a_pass.kind is Kind.FORWARD:
            if place in previous_place:
                stage, chunk = previous_place[place]
                yield a_pass._replace(stage=stage, chunk=chunk)
        else:
            yield a_pass._replace(kind=Kind.FORWARD)
            if place in next_place:
                stage, chunk = next_place[place]
                # That stage may divide the backward where this one does not, or the other way round.
                for kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
                    yield Instruction(stage, chunk, a_pass.microbatch, kind)

    for a_pass, after in runs.items():
        for needed in needed_by(a_pass):
            before = runs.get(needed)
            if before is not None and before != after:
                yield before, after
