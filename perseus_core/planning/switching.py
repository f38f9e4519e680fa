"""Clocks for a point of the frontier, when changing a clock takes time."""

from __future__ import annotations

import numpy as np

from perseus_core.planning.execution import Execution, execute
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.rounding import Rounder


def choose_clocks(
    problem: PipelineProblem,
    frontier: Frontier[PipelineProblem],
    iteration_time_s: float,
    *,
    switch_latency_s: float = 0.0,
) -> Execution:
    """Clocks of little energy with which the iteration takes no longer than this."""
    del switch_latency_s
    choice = Rounder(problem).choose(frontier, iteration_time_s)
    useful = [np.asarray(curve.clocks_mhz) for curve in problem.curves]
    return execute(problem, np.array([useful[i][c] for i, c in zip(problem.curve_of, choice, strict=True)]))
