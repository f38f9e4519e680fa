"""A problem in the solvers' terms: a network of moments, in whole numbers.

Instruction i runs from node 2i to node 2i + 1; a source comes before and a sink after all.

Times become ticks, a power of two of which is about 2**50 in the longest iteration, rounded up so that real durations
keep what is promised. Marginal powers become units of flow, a power of two so small that the steepest slopes of all
instructions together stay below 2**60. So no sum overflows 64 bits, whatever the unit of energy. Times are resolved to
1e-15 of the iteration, slopes to 1e-18 of that sum of steepest slopes: in an iteration of 100,000 instructions whose
slopes span a range of 1e9, the flattest still keep 4 digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning.curves import TradeoffCurve
from perseus_core.planning.dag import Dag
from perseus_core.planning.problem import Problem

_TIME_BITS = 50
_FLOW_BITS = 60


class Scale(NamedTuple):
    """How seconds and watts become whole numbers; both are powers of two."""

    ticks_per_s: float
    flow_per_w: float

    @classmethod
    def of(cls, problem: Problem) -> Scale:
        """The finest scale with which nothing overflows."""
        slowest_time_s = problem.dag.iteration_time_s(problem.slowest_s)
        steepest_w = np.array([max(_slopes_w(curve), default=0.0) for curve in problem.curves])
        uses = np.maximum(1, np.bincount(problem.curve_of, minlength=len(problem.curves)))
        total_w = float(steepest_w @ uses) or 1.0
        return cls(
            float(2.0 ** (_TIME_BITS - np.ceil(np.log2(slowest_time_s)))),
            float(2.0 ** (_FLOW_BITS - np.ceil(np.log2(max(total_w, problem.blocking_power_w))))),
        )


@dataclass(frozen=True, eq=False)
class Network:
    """Arcs between moments: first the instructions, then the edges of the DAG, then those of source and sink.

    Attributes:
        problem: what it was made from.
        scale: ticks and units of flow.
        tail, head: int32 of shape (A,), nodes.
        curve: int32 of shape (A,), the curve of each arc; its knots are first_knot[curve] .. first_knot[curve + 1] - 1.
        first_knot: int32 of shape (curves + 1,).
        length: int64, ticks at each knot, ascending within a curve.
        steepness: int64, flow at which an arc leaves the knot for the next slower one; strictly descending within a
            curve, 0 at its last knot.
    """

    problem: Problem
    scale: Scale
    tail: NDArray[np.int32]
    head: NDArray[np.int32]
    curve: NDArray[np.int32]
    first_knot: NDArray[np.int32]
    length: NDArray[np.int64]
    steepness: NDArray[np.int64]

    @classmethod
    def of(cls, problem: Problem, scale: Scale | None = None) -> Network:
        """The network of a problem, on its own scale or on that of a larger one."""
        scale = scale or Scale.of(problem)
        dag, n = problem.dag, problem.dag.num_instructions
        instructions = np.arange(n)
        first = np.setdiff1d(instructions, dag.successor)
        last = np.setdiff1d(instructions, dag.predecessor)
        source, sink = 2 * n, 2 * n + 1
        tail = np.concatenate([2 * instructions, 2 * dag.predecessor + 1, np.full(len(first), source), 2 * last + 1])
        head = np.concatenate([2 * instructions + 1, 2 * dag.successor, 2 * first, np.full(len(last), sink)])

        latencies_s, latency_of = np.unique(np.append(dag.latency_s, 0.0), return_inverse=True)
        edge_curve = len(problem.curves) + latency_of
        unweighted = np.full(len(first) + len(last), edge_curve[-1])
        knots = [_integer_knots(curve, scale) for curve in problem.curves]
        knots += [(_ticks(latency_s, scale).reshape(1), np.zeros(1, np.int64)) for latency_s in latencies_s]
        return cls(
            problem,
            scale,
            tail.astype(np.int32),
            head.astype(np.int32),
            np.concatenate([problem.curve_of, edge_curve[:-1], unweighted]).astype(np.int32),
            np.cumsum([0, *(len(length) for length, _ in knots)]).astype(np.int32),
            np.concatenate([length for length, _ in knots]),
            np.concatenate([steepness for _, steepness in knots]),
        )

    @property
    def source(self) -> int:
        """The node before all others."""
        return 2 * self.problem.dag.num_instructions

    @property
    def sink(self) -> int:
        """The node after all others."""
        return self.source + 1

    @cached_property
    def fastest(self) -> NDArray[np.int64]:
        """Shortest length of every instruction."""
        return self.length[self.first_knot[self.problem.curve_of]]

    @cached_property
    def slowest(self) -> NDArray[np.int64]:
        """Length of every instruction at its slowest knot."""
        return self.length[self.first_knot[self.problem.curve_of + 1] - 1]

    def earliest_moments(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """When each node happens at the earliest, for the lengths of all instructions."""
        dag = self.problem.dag
        # Whole numbers below 2**53 are exact in floating point, so the DAG itself can add up ticks.
        latency = _ticks(dag.latency_s, self.scale).astype(np.float64)
        ticking = Dag(dag.num_instructions, dag.predecessor, dag.successor, latency)
        start = ticking.start_times_s(lengths)
        end = start + lengths
        return np.append(np.column_stack([start, end]), [0, end.max()]).astype(np.int64)

    def ticks(self, time_s: float) -> int:
        """A time in ticks."""
        return int(_ticks(time_s, self.scale))

    def positions(self, lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Where on its hull each instruction stands: knot number plus share of the way to the next slower knot."""
        positions = np.empty(lengths.shape, np.float32)
        for i, curve in enumerate(self.problem.curves):
            members = self.problem.curve_of == i
            knots = _ticks(np.asarray(curve.times_s)[curve.hull], self.scale)
            positions[:, members] = np.interp(lengths[:, members], knots, np.arange(len(knots)))
        return positions


def _ticks(time_s: float | NDArray[np.float64], scale: Scale) -> NDArray[np.int64]:
    return np.ceil(np.asarray(time_s) * scale.ticks_per_s).astype(np.int64)


def _slopes_w(curve: TradeoffCurve) -> NDArray[np.float64]:
    """Effective energy saved per second between neighbouring knots of the hull, descending."""
    times_s, costs_j = np.asarray(curve.times_s)[curve.hull], curve.effective_energies_j[curve.hull]
    slopes: NDArray[np.float64] = np.minimum.accumulate(-np.diff(costs_j) / np.diff(times_s))
    return slopes


def _integer_knots(curve: TradeoffCurve, scale: Scale) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Length and steepness at each knot of the hull; a knot where rounding leaves no kink is left out."""
    length = _ticks(np.asarray(curve.times_s)[curve.hull], scale)
    steepness = np.append(np.round(_slopes_w(curve) * scale.flow_per_w), 0).astype(np.int64)
    kinks = np.append(True, steepness[1:] < steepness[:-1])
    return length[kinks], steepness[kinks]
