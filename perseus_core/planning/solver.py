"""The exact solvers: the whole frontier, and one point of it for iterations too long to trace.

`solve` traces the frontier from the minimum-energy point to the fastest (`native/frontier.c` explains the method).
`solve_at` finds the least energy for one iteration time by cost scaling (`native/fixed_time.c`), with a proved bound;
its cost grows hardly faster than the number of instructions. Both work on whole numbers (`network.py`) and outside
Python's global lock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from perseus_core.errors import InputError
from perseus_core.planning import _native
from perseus_core.planning.frontier import AnyProblem, Frontier
from perseus_core.planning.network import Network, Scale
from perseus_core.planning.problem import Problem

# By how much of the energy the stored durations may miss the exact frontier between two places where they are stored.
DEFAULT_PLAN_TOLERANCE = 1e-5

# Share of the energy within which `solve_at` proves its answer: far below what rounding to real clocks costs.
DEFAULT_GAP = 1e-6

SomeProblem = TypeVar("SomeProblem", bound=Problem)


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


@dataclass(frozen=True, eq=False)
class Start:
    """Where `solve_at` begins: the nearer to optimal, the sooner it ends. Any start gives a right answer.

    Attributes:
        scale: the scale of the problem that it comes from, to be kept.
        lengths: int64 of shape (N,), ticks of every instruction.
        flow: int64 of shape (A,), flow of every arc.
        epsilon: ticks by which most instructions may differ from the best lengths; a few may more.
    """

    scale: Scale
    lengths: NDArray[np.int64]
    flow: NDArray[np.int64]
    epsilon: int

    @classmethod
    def cold(cls, problem: Problem, scale: Scale | None = None) -> Start:
        """Everything at its fastest, no flow."""
        network = Network.of(problem, scale)
        # Measured: what is begun with more is done anew later; with less, times above the shortest take longer.
        widest = int((network.slowest - network.fastest).max())
        return cls(network.scale, network.fastest, np.zeros(len(network.tail), np.int64), max(1, widest // 64))


@dataclass(frozen=True, eq=False)
class Point(Generic[AnyProblem]):
    """The answer for one iteration time.

    Attributes:
        problem: what was solved.
        iteration_time_s: the time asked for, time outside the pipeline included.
        durations_s: float64 of shape (N,), with which the iteration takes no longer than this.
        energy_j: energy of the iteration with these durations.
        bound_j: proved: no durations need less energy in this time.
        end: the answer as a start, for the same problem or one made from it.
    """

    problem: AnyProblem
    iteration_time_s: float
    durations_s: NDArray[np.float64]
    energy_j: float
    bound_j: float
    end: Start

    @property
    def gap(self) -> float:
        """Share of the energy that a better answer could save at most."""
        return (self.energy_j - self.bound_j) / self.energy_j


def solve(
    problem: SomeProblem,
    *,
    until_s: float = 0.0,
    plan_tolerance: float = DEFAULT_PLAN_TOLERANCE,
    progress: Callable[[float], object] | None = None,
) -> Frontier[SomeProblem]:
    """Computes the whole frontier, exactly.

    Args:
        problem: what is to be planned.
        until_s: stop at this iteration time (or at the minimum-energy point, if that is faster); by default at the
            fastest.
        plan_tolerance: share of the energy by which durations between stored points may be dearer than the frontier;
            the frontier's own times and energies are exact.
        progress: called now and then with the share done, 0 to 1; an exception in it stops the run.
    """
    return trace(problem, until_s=until_s, plan_tolerance=plan_tolerance, progress=progress)[0]


def trace(
    problem: SomeProblem,
    *,
    until_s: float = 0.0,
    plan_tolerance: float = DEFAULT_PLAN_TOLERANCE,
    progress: Callable[[float], object] | None = None,
) -> tuple[Frontier[SomeProblem], Certificate]:
    """`solve`, with the proof of optimality at the last point."""
    network = Network.of(problem)
    ticks_per_s, flow_per_w = network.scale
    slowest_moments = network.earliest_moments(network.slowest)
    slowest, fastest = slowest_moments[-1], network.earliest_moments(network.fastest)[-1]
    # The energy against which the tolerance is measured: least effective energy and waiting.
    energy_j = abs(problem.effective_energy_j(problem.slowest_s)) + problem.blocking_power_w * slowest / ticks_per_s
    report = None
    if progress is not None and slowest > fastest:
        report = lambda ticks: progress(float((slowest - ticks) / (slowest - fastest)))  # noqa: E731
    answer = _native.trace_frontier(
        network.tail,
        network.head,
        network.curve,
        network.first_knot,
        network.length,
        network.steepness,
        slowest_moments,
        network.source,
        network.sink,
        network.ticks(max(0.0, until_s - problem.outside_time_s)),
        # A slope that equals the blocking power counts as worth it, however its energies were rounded.
        round(problem.blocking_power_w * (1 - 1e-12) * flow_per_w),
        plan_tolerance * energy_j * ticks_per_s * flow_per_w,
        problem.dag.num_instructions,
        report,
    )
    kept = np.frombuffer(answer[2], np.int32)
    # Vertices come slowest first; the frontier is kept fastest first.
    lengths, values = (np.frombuffer(column, np.int64)[::-1] for column in answer[:2])
    snapshots = np.frombuffer(answer[3], np.int64).reshape(len(kept), -1)[::-1]
    moments, flow = (np.frombuffer(column, np.int64) for column in answer[4:])

    pipeline_s = lengths / ticks_per_s
    saved_j = np.append(np.cumsum((values[1:] / flow_per_w * np.diff(pipeline_s))[::-1])[::-1], 0.0)
    least_j = problem.effective_energy_j(snapshots[-1] / ticks_per_s)
    times_s = pipeline_s + problem.outside_time_s
    frontier = Frontier(
        problem,
        times_s,
        problem.iteration_energy_j(least_j + saved_j, times_s),
        (len(lengths) - 1 - kept[::-1]).astype(np.int64),
        network.positions(snapshots),
    )
    certificate = Certificate(
        network.tail, network.head, moments / ticks_per_s, flow / flow_per_w, network.source, network.sink
    )
    return frontier, certificate


def solve_at(
    problem: SomeProblem,
    iteration_time_s: float | None = None,
    *,
    gap: float = DEFAULT_GAP,
    start: Start | None = None,
    progress: Callable[[float], object] | None = None,
) -> Point[SomeProblem]:
    """Computes the least energy for one iteration time, to within a proved gap, without tracing the frontier.

    Args:
        problem: what is to be planned.
        iteration_time_s: the time to keep; by default the shortest that can be.
        gap: share of the energy within which the answer must be proved.
        start: where to begin, for example the steady state of a shorter iteration.
        progress: called now and then with the share done, 0 to 1; an exception in it stops the run.

    Raises:
        InputError: if the iteration cannot be that fast.
    """
    start = start or Start.cold(problem)
    network = Network.of(problem, start.scale)
    ticks_per_s, flow_per_w = network.scale
    shortest = network.earliest_moments(network.fastest)[-1]
    shortest_s = float(shortest / ticks_per_s) + problem.outside_time_s
    time_s = shortest_s if iteration_time_s is None else iteration_time_s
    if not time_s >= shortest_s * (1 - 1e-9):
        raise InputError(f"iteration time {time_s} s cannot be reached; the fastest is {shortest_s:.6g} s")
    most = max(shortest, network.ticks(time_s - problem.outside_time_s))

    # The solver wants arcs sorted by the topological place of their tail, then the arc that closes the circle.
    n = problem.dag.num_instructions
    place = np.empty(2 * n + 2, np.int64)
    place[2 * problem.dag.topological_order] = 2 * np.arange(n)
    place[2 * problem.dag.topological_order + 1] = 2 * np.arange(n) + 1
    place[[network.source, network.sink]] = -1, 2 * n
    order = np.argsort(place[network.tail], kind="stable")
    value = start.flow[network.head == network.sink].sum()
    energy_j = float(problem.iteration_energy_j(problem.effective_energy_j(problem.slowest_s), time_s))
    report = None
    if progress is not None:
        report = lambda epsilon: progress(1 - float(np.log(epsilon) / np.log(start.epsilon + 1)))  # noqa: E731
    answer = _native.solve_at_time(
        np.append(network.tail[order], np.int32(network.sink)),
        np.append(network.head[order], np.int32(network.source)),
        np.append(network.curve[order], np.int32(len(network.first_knot) - 1)),
        np.append(network.first_knot, network.first_knot[-1] + np.int32(1)),
        np.append(network.length, -most),
        np.append(network.steepness, 0),
        network.earliest_moments(start.lengths),
        np.append(start.flow[order], value),
        network.source,
        start.epsilon,
        gap * abs(energy_j) * ticks_per_s * flow_per_w,
        report,
    )
    moments, flow = np.frombuffer(answer[0], np.int64), np.empty(len(order), np.int64)
    flow[order] = np.frombuffer(answer[1], np.int64)[:-1]
    lengths = np.minimum(moments[1 : 2 * n : 2] - moments[: 2 * n : 2], network.slowest)
    durations_s = lengths / ticks_per_s
    energy_j = float(problem.iteration_energy_j(problem.effective_energy_j(durations_s), time_s))
    bound_j = energy_j - answer[2] / ticks_per_s / flow_per_w
    return Point(problem, time_s, durations_s, energy_j, bound_j, Start(network.scale, lengths, flow, epsilon=1))
