"""The exact frontier solver: scales a problem to integers, runs the compiled tracer, scales back.

The method is explained at the head of `native/frontier.c`. Times become multiples of 2**-50 of the longest iteration, slopes
multiples of a power of two so small that the largest flow fits 62 bits: far below any measurement, and the same for
joules, millijoules and megajoules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning import _native
from perseus_core.planning.dag import Dag
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import Problem

_TIME_BITS = 50
_FLOW_BITS = 60

AnyProblem = TypeVar("AnyProblem", bound=Problem)

# By how much of the energy the stored durations may miss the exact frontier between two places where they are stored.
DEFAULT_PLAN_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Certificate:
    """The proof of optimality at the fastest point traced: moments and flow that satisfy every condition.

    Attributes:
        tail, head: int32 of shape (A,), the arcs of the network: instructions first, then edges, then source and sink.
        moments_s: float64, when each node happens; instruction i starts at node 2i and ends at node 2i + 1.
        flow_w: float64 of shape (A,), marginal power through each arc; conserved at every node but source and sink.
        source, sink: nodes.
    """

    tail: NDArray[np.int32]
    head: NDArray[np.int32]
    moments_s: NDArray[np.float64]
    flow_w: NDArray[np.float64]
    source: int
    sink: int


def solve(
    problem: AnyProblem,
    *,
    until_s: float = 0.0,
    plan_tolerance: float = DEFAULT_PLAN_TOLERANCE,
    progress: Callable[[float], object] | None = None,
) -> Frontier[AnyProblem]:
    """Computes the whole frontier, exactly.

    Args:
        problem: what is to be planned.
        until_s: stop at this iteration time (or at the minimum-energy point, if that is faster); by default at the fastest.
        plan_tolerance: share of the energy by which durations between stored points may be dearer than the frontier; the
            frontier's own times and energies are exact.
        progress: called now and then with the share done, 0 to 1.

    """
    return trace(problem, until_s=until_s, plan_tolerance=plan_tolerance, progress=progress)[0]


def trace(
    problem: AnyProblem,
    *,
    until_s: float = 0.0,
    plan_tolerance: float = DEFAULT_PLAN_TOLERANCE,
    progress: Callable[[float], object] | None = None,
) -> tuple[Frontier[AnyProblem], Certificate]:
    """`solve`, with the proof of optimality at the last point."""
    network = _Network.of(problem)
    until = max(0.0, until_s - problem.outside_time_s)
    # The energy scale against which the tolerance is measured: least effective energy and waiting.
    energy_j = sum(abs(c.effective_energies_j[-1]) * (problem.curve_of == i).sum() for i, c in enumerate(problem.curves))
    energy_j += problem.blocking_power_w * network.slowest_time_s
    slowest, fastest = network.slowest_time_s, problem.dag.iteration_time_s(problem.fastest_s)
    report = None
    if progress is not None and slowest > fastest:
        report = lambda ticks: progress((slowest - ticks / network.ticks_per_s) / (slowest - fastest))  # noqa: E731
    lengths, values, kept, snapshots, moments, flow = (
        np.frombuffer(column, dtype)
        for column, dtype in zip(
            _native.trace_frontier(
                network.tail,
                network.head,
                network.curve,
                network.first_knot,
                network.length,
                network.steepness,
                network.start_moments,
                network.source,
                network.sink,
                round(until * network.ticks_per_s),
                round(problem.blocking_power_w * network.flow_per_w),
                plan_tolerance * energy_j * network.ticks_per_s * network.flow_per_w,
                problem.dag.num_instructions,
                report,
            ),
            (np.int64, np.int64, np.int32, np.int64, np.int64, np.int64),
            strict=True,
        )
    )
    # Vertices come slowest first; the frontier is kept fastest first.
    lengths, values, snapshots = lengths[::-1], values[::-1], snapshots.reshape(len(kept), -1)[::-1]
    pipeline_s = lengths / network.ticks_per_s
    slowest_cost_j = problem.effective_energy_j(snapshots[-1] / network.ticks_per_s)
    saved_j = np.append(np.cumsum((values[1:] / network.flow_per_w * np.diff(pipeline_s))[::-1])[::-1], 0.0)
    times_s = pipeline_s + problem.outside_time_s
    frontier = Frontier(
        problem,
        times_s,
        problem.iteration_energy_j(slowest_cost_j + saved_j, times_s),
        (len(lengths) - 1 - kept[::-1]).astype(np.int64),
        network.positions(snapshots),
    )
    certificate = Certificate(
        network.tail,
        network.head,
        moments / network.ticks_per_s,
        flow / network.flow_per_w,
        network.source,
        network.sink,
    )
    return frontier, certificate


@dataclass(frozen=True, eq=False)
class _Network:
    """The problem in the tracer's terms: every instruction from its start node 2i to its end node 2i + 1."""

    tail: NDArray[np.int32]
    head: NDArray[np.int32]
    curve: NDArray[np.int32]
    first_knot: NDArray[np.int32]
    length: NDArray[np.int64]
    steepness: NDArray[np.int64]
    start_moments: NDArray[np.int64]
    source: int
    sink: int
    ticks_per_s: float
    flow_per_w: float
    slowest_time_s: float
    hulls: list[NDArray[np.int64]]
    curve_of: NDArray[np.int32]

    @classmethod
    def of(cls, problem: Problem) -> _Network:
        dag, n = problem.dag, problem.dag.num_instructions
        instructions = np.arange(n)
        first = np.setdiff1d(instructions, dag.successor)
        last = np.setdiff1d(instructions, dag.predecessor)
        source, sink = 2 * n, 2 * n + 1
        tail = np.concatenate([2 * instructions, 2 * dag.predecessor + 1, np.full(len(first), source), 2 * last + 1])
        head = np.concatenate([2 * instructions + 1, 2 * dag.successor, 2 * first, np.full(len(last), sink)])

        slowest_time_s = dag.iteration_time_s(problem.slowest_s)
        ticks_per_s = 2.0 ** (_TIME_BITS - np.ceil(np.log2(slowest_time_s)))
        hulls = [(np.asarray(c.times_s)[c.hull], c.effective_energies_j[c.hull]) for c in problem.curves]
        latencies_s, latency_curve = np.unique(dag.latency_s, return_inverse=True)
        slopes = [-np.diff(costs) / np.diff(times) for times, costs in hulls]
        steepest = max((slope.max() for slope in slopes if slope.size), default=1.0)
        flow_per_w = 2.0 ** (_FLOW_BITS - np.ceil(np.log2(steepest * n)))
        knots, steepness = [], []
        for (times_s, _), slope in zip(hulls, slopes, strict=True):
            knot, steep = _distinct(np.round(times_s * ticks_per_s), np.round(slope * flow_per_w))
            knots.append(knot)
            steepness.append(steep)
        knots += [np.round([latency * ticks_per_s]).astype(np.int64) for latency in (*latencies_s, 0.0)]
        steepness += [np.zeros(1, np.int64)] * (len(latencies_s) + 1)

        num_curves = len(problem.curves)
        curve = np.concatenate(
            [
                problem.curve_of,
                num_curves + latency_curve,
                np.full(len(first) + len(last), num_curves + len(latencies_s)),
            ]
        )
        # Whole numbers below 2**53 are exact in floating point, so the DAG itself can add up ticks.
        durations = np.array([knot[-1] for knot in knots], np.float64)[problem.curve_of]
        ticking = Dag(n, dag.predecessor, dag.successor, np.round(dag.latency_s * ticks_per_s))
        start = ticking.start_times_s(durations)
        ends = start + durations
        start_moments = np.append(np.column_stack([start, ends]), [0, ends.max()]).astype(np.int64)
        return cls(
            tail.astype(np.int32),
            head.astype(np.int32),
            curve.astype(np.int32),
            np.cumsum([0, *map(len, knots)]).astype(np.int32),
            np.concatenate(knots),
            np.concatenate(steepness),
            start_moments,
            source,
            sink,
            float(ticks_per_s),
            float(flow_per_w),
            slowest_time_s,
            [np.round(times_s * ticks_per_s).astype(np.int64) for times_s, _ in hulls],
            problem.curve_of,
        )

    def positions(self, lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Where on its hull each instruction stands: knot number plus share of the way to the next slower knot."""
        positions = np.empty(lengths.shape, np.float32)
        for i, knots in enumerate(self.hulls):
            members = self.curve_of == i
            positions[:, members] = np.interp(lengths[:, members], knots, np.arange(len(knots)))
        return positions



def _distinct(knots: NDArray[np.float64], slopes: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Leaves out knots that are none once they are whole numbers: at the length of the next, or without a bend.

    What is left has strictly ascending lengths, and strictly descending slopes that end in the 0 beyond the last knot.
    """
    kept_knots, kept_slopes = [knots[0]], [np.inf]
    for knot, slope in zip(knots[1:], slopes, strict=True):
        if knot == kept_knots[-1]:
            continue
        while kept_slopes[-1] <= slope:
            kept_knots.pop()
            kept_slopes.pop()
        kept_knots.append(knot)
        kept_slopes.append(slope)
    while kept_slopes[-1] == 0:
        kept_knots.pop()
        kept_slopes.pop()
    return np.array(kept_knots, np.int64), np.array([*kept_slopes[1:], 0], np.int64)
