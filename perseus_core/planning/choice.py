"""Clocks for a point of the frontier: those that save most, executed as GPUs execute them.

Where clocks change at once, they are a rounded point of the frontier (`rounding`). Else they are searched for among all
clocks that keep the limits (`native/switching_search.c`): from all clocks at maximum, where nothing changes, so what is
found there are plans of few changes, down to one clock for each phase of the iteration, or for each stage; and from the
slowest point of the frontier that is in time in spite of its changes, if there is one, else from the best of those.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning.baselines import all_max
from perseus_core.planning.execution import Execution, execute
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.rounding import DEFAULT_EFFORT, Rounder
from perseus_core.planning.switched_pipeline import ClocksMhz, SwitchedPipeline
from perseus_core.planning.switching import AT_ONCE, Switching

# Searches near a good plan, and far from any: moves, and by how many energies of an instruction a plan on the way may
# be worse than the last one, at first. A plan of 8 x 48 is made in 0.5 to 0.9 s.
_NEAR, _FAR = (60_000, 0.01), ((30_000, 0.1), (60_000, 0.4))
# However many instructions there are, so many are run by each search at most: about a second (16 x 256: 3.6 s in all).
_MOST_RUN = 250_000_000
_NUM_BISECTIONS = 8


def choose_clocks(
    problem: PipelineProblem,
    frontier: Frontier[PipelineProblem],
    iteration_time_s: float,
    *,
    switching: Switching = AT_ONCE,
    effort: int = DEFAULT_EFFORT,
) -> Execution:
    """Clocks of little energy with which the iteration takes no longer than this.

    Args:
        problem: the pipeline.
        frontier: its frontier.
        iteration_time_s: the limit. When changes take time, one faster than all clocks at maximum may be out of reach;
            then the fastest found is returned, and its time says so.
        switching: what changes of clock take. If nothing, every clock is a useful one of its instruction's tradeoff
            curve; else any measured one, where that spares a change.
        effort: trials of the search for each instruction where changes take nothing, see `Rounder.choose`; else only
            whether to search at all.

    Returns:
        What really happens when the plan runs, iteration after iteration.

    Raises:
        InputError: if the iteration cannot be that fast even if clocks changed at once.
    """
    rounder = Rounder(problem)
    if switching.is_free:
        return execute(problem, _clocks_mhz(problem, rounder.choose(frontier, iteration_time_s, effort=effort)))
    pipeline = SwitchedPipeline(problem, switching)
    # The same clocks executed by another sum of the same times may differ in the last bits.
    limit_s = iteration_time_s * (1 + 1e-12)
    rounded = _nearly_in_time(pipeline, rounder, frontier, limit_s)
    steady = pipeline.execute(all_max(problem).clocks_mhz)
    found = [rounded, steady]
    if not effort:
        return _best(pipeline, found, limit_s)
    most = _MOST_RUN // problem.dag.num_instructions

    def search(start: Execution, num_moves: int, warmth: float) -> None:
        found.append(pipeline.search(start.clocks_mhz, limit_s, num_moves=min(num_moves, most), warmth=warmth))

    for far in _FAR:
        search(steady, *far)
    search(rounded if rounded.iteration_time_s <= limit_s else _best(pipeline, found, limit_s), *_NEAR)
    return _best(pipeline, found, limit_s)


def _best(pipeline: SwitchedPipeline, found: Sequence[Execution], limit_s: float) -> Execution:
    """Of those that keep the limits the one of least energy; if none does, the fastest."""
    kept = [each for each in found if pipeline.keeps(each, limit_s)]
    if kept:
        return min(kept, key=lambda each: each.energy_j)
    allowed = [each for each in found if pipeline.keeps(each, each.iteration_time_s)]  # all clocks at maximum are
    return min(allowed, key=lambda each: each.iteration_time_s)


def _nearly_in_time(
    pipeline: SwitchedPipeline, rounder: Rounder, frontier: Frontier[PipelineProblem], limit_s: float
) -> Execution:
    """The slowest point of the frontier, by bisection, whose rounded plan keeps the limit in spite of its changes."""

    def rounded(planned_s: float) -> Execution:
        return pipeline.execute(_clocks_mhz(pipeline.problem, rounder.choose(frontier, planned_s, effort=0)))

    early_s, late_s = frontier.fastest_time_s, min(limit_s, frontier.min_energy_time_s)
    slowest = rounded(late_s)
    if slowest.iteration_time_s <= limit_s:
        return slowest
    best = rounded(early_s)
    for _ in range(_NUM_BISECTIONS):
        middle_s = (early_s + late_s) / 2
        middle = rounded(middle_s)
        if middle.iteration_time_s <= limit_s:
            early_s, best = middle_s, middle
        else:
            late_s = middle_s
    return best


def _clocks_mhz(problem: PipelineProblem, choice: NDArray[np.int32]) -> ClocksMhz:
    clocks_mhz = np.empty(len(choice), np.int64)
    for i, curve in enumerate(problem.curves):
        members = problem.curve_of == i
        clocks_mhz[members] = np.array(curve.clocks_mhz)[choice[members]]
    return clocks_mhz
