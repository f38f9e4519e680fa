"""Very long iterations: solved short, then unrolled.

Between warm-up and cool-down a pipeline repeats itself, and so does its best plan. `solve_long` solves an iteration of
six to eight microbatches for each stage, repeats the durations and the flow of its middle, and lets `solve_at` repair
what does not fit where the pieces meet. It pays from some 50,000 instructions on.

At one marginal power each further microbatch adds the same time and the same energy, once there are enough. Measured on
8 stages with 1F1B, at 58 powers over the whole frontier, to 1e-12: from 2 microbatches for each stage on for Bloom,
from 3 for GPT-3, from 4 when its stages differ by 3 %. Before that, only some powers do. `long_frontier` builds on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning.frontier import Frontier
from perseus_core.planning.network import Network, Scale
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.solver import DEFAULT_GAP, Point, Start, solve_at

NO_INSTRUCTION = -1

# How near the best an unrolled start is, where pieces do not meet, as a share of a cold one's. Measured: a start that
# asks for more is pulled apart first, one that asks for less repairs its seams slowly.
_UNROLLED_EPSILON = 2.0**-12

Nodes = NDArray[np.int64]


def solve_long(
    problem_of: Callable[[int], PipelineProblem],
    num_microbatches: int,
    iteration_time_s: float | None = None,
    *,
    gap: float = DEFAULT_GAP,
    progress: Callable[[float], object] | None = None,
) -> Point[PipelineProblem]:
    """Computes the least energy of a long iteration for one iteration time, by default the shortest.

    The answer is as good and as surely proved as that of `solve_at`, and the sooner found the steadier the pipeline.

    Args:
        problem_of: the problem for a number of microbatches; called for shorter and shorter iterations.
        num_microbatches: how many are wanted.
        iteration_time_s: the time to keep.
        gap: share of the energy within which the answer must be proved.
        progress: called now and then with the share done of the last and longest step, 0 to 1.

    Raises:
        InputError: if the iteration cannot be that fast.
    """
    problem = problem_of(num_microbatches)
    # Multiples of the stages, because interleaved schedules repeat themselves after so many microbatches.
    repeated = 2 * problem.schedule.num_stages
    num_copies = num_microbatches // repeated - 3
    if num_copies < 1:
        return solve_at(problem, iteration_time_s, gap=gap, progress=progress)
    short = problem_of(num_microbatches - num_copies * repeated)
    short_time_s = None
    if iteration_time_s is not None:
        (fastest_s, slowest_s), (short_fastest_s, short_slowest_s) = _time_range_s(problem), _time_range_s(short)
        share = (iteration_time_s - fastest_s) / max(slowest_s - fastest_s, np.finfo(float).tiny)
        short_time_s = short_fastest_s + max(0.0, share) * (short_slowest_s - short_fastest_s)
    steady = solve_at(short, short_time_s, gap=gap, start=Start.cold(short, Scale.of(problem)))
    start = unrolled(steady, problem, repeated)
    return solve_at(problem, iteration_time_s, gap=gap, start=start, progress=progress)


def long_frontier(
    shorter: Frontier[PipelineProblem], short: Frontier[PipelineProblem], num_microbatches: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times [s] and energies [J] of the frontier of a long iteration, ascending in time, from two short ones.

    Exact where both are in the steady state already (see above; six microbatches for each stage are on the safe side).
    It proves nothing by itself: the proof for any of its points is the bound of `solve_long`.

    Args:
        shorter, short: whole frontiers of one pipeline with two numbers of microbatches.
        num_microbatches: how many the long one has.
    """
    few, more = (frontier.problem.schedule.num_microbatches for frontier in (shorter, short))
    further = (num_microbatches - more) / (more - few)
    powers_w = np.sort(np.concatenate([shorter.marginal_power_w, short.marginal_power_w, [-np.inf]]))[::-1]
    # One power, found in both, differs in its last digits.
    distinct = powers_w[:-1] - powers_w[1:] > 1e-9 * powers_w[0]
    just_below_w = (powers_w[:-1][distinct] + powers_w[1:][distinct]) / 2
    few_at, more_at = (_vertices_at(frontier, just_below_w) for frontier in (shorter, short))
    times_s = (1 + further) * short.times_s[more_at] - further * shorter.times_s[few_at]
    energies_j = (1 + further) * short.energies_j[more_at] - further * shorter.energies_j[few_at]
    return times_s, energies_j


def _vertices_at(frontier: Frontier[PipelineProblem], powers_w: NDArray[np.float64]) -> NDArray[np.int64]:
    """The fastest vertex, then for each power the vertex before which all segments are steeper."""
    ascending_w = np.minimum.accumulate(frontier.marginal_power_w)[::-1]
    return np.append(0, len(ascending_w) - np.searchsorted(ascending_w, powers_w, side="right"))


def _time_range_s(problem: PipelineProblem) -> tuple[float, float]:
    fastest_s, slowest_s = map(problem.dag.iteration_time_s, (problem.fastest_s, problem.slowest_s))
    return fastest_s + problem.outside_time_s, slowest_s + problem.outside_time_s


def unrolled(short: Point[PipelineProblem], problem: PipelineProblem, repeated: int) -> Start:
    """Lengths and flow for a longer iteration: those of the short one, its middle `repeated` microbatches repeated."""
    here, there = _Places.of(problem), _Places.of(short.problem)
    extra = here.num_microbatches - there.num_microbatches
    begin = (there.num_microbatches - repeated) // 2
    # How many microbatches earlier the like of each instruction is in the short iteration.
    back = np.clip((here.microbatch - begin) // repeated * repeated, 0, extra)
    lengths = short.end.lengths[there.find(here.type, here.microbatch - back)]

    # An arc is like the one that leads to the like of its head; only those into the sink go by their tail.
    long_net, short_net = Network.of(problem, short.end.scale), Network.of(short.problem, short.end.scale)
    tail, head = (
        np.where(node < long_net.source, node // 2, NO_INSTRUCTION) for node in (long_net.tail, long_net.head)
    )
    arc_back = back[np.where(head == NO_INSTRUCTION, tail, head)]
    ends = []
    for node, instruction in ((long_net.tail, tail), (long_net.head, head)):
        like = there.find(here.type[instruction], here.microbatch[instruction] - arc_back)
        inside = np.where(like == NO_INSTRUCTION, NO_INSTRUCTION, 2 * like + node % 2)
        ends.append(np.where(instruction == NO_INSTRUCTION, node - long_net.source + short_net.source, inside))
    flow = _flow_between(short_net, short.end.flow, *ends)
    return Start(short.end.scale, lengths, flow, max(1, round(_UNROLLED_EPSILON * Start.cold(problem).epsilon)))


def _flow_between(network: Network, flow: NDArray[np.int64], tail: Nodes, head: Nodes) -> NDArray[np.int64]:
    """Flow between pairs of nodes; 0 where there is no arc, and for all but the first of a pair given twice."""
    num_nodes = network.sink + 1
    arcs, arc_of = np.unique(network.tail.astype(np.int64) * num_nodes + network.head, return_inverse=True)
    total = np.zeros(len(arcs) + 1, np.int64)
    np.add.at(total, arc_of, flow)
    wanted, first = np.unique(tail * num_nodes + head, return_index=True)
    found = np.minimum(np.searchsorted(arcs, wanted), len(arcs) - 1)
    between = np.zeros(len(tail), np.int64)
    between[first] = np.where(arcs[found] == wanted, total[found], 0)
    return between


@dataclass(frozen=True, eq=False)
class _Places:
    """Instructions by type and microbatch."""

    type: NDArray[np.int64]
    microbatch: NDArray[np.int64]
    num_microbatches: int

    @classmethod
    def of(cls, problem: PipelineProblem) -> _Places:
        microbatch = np.array([i.microbatch for i in problem.schedule.instructions])
        return cls(problem.curve_of.astype(np.int64), microbatch, problem.schedule.num_microbatches)

    def find(self, types: NDArray[np.int64], microbatches: NDArray[np.int64]) -> NDArray[np.int64]:
        """The instructions of these types and microbatches; NO_INSTRUCTION where there is none."""
        key = self.type * self.num_microbatches + self.microbatch
        order = np.argsort(key)
        wanted = types * self.num_microbatches + microbatches
        found = order[np.minimum(np.searchsorted(key[order], wanted), len(order) - 1)]
        there = (key[found] == wanted) & (microbatches >= 0) & (microbatches < self.num_microbatches)
        return np.where(there, found, NO_INSTRUCTION)
