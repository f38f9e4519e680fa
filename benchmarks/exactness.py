"""Exact: the frontier's energy beside an independent linear program (scipy, HiGHS), at 20 times per case."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from benchmarks.common import BLOOM, GPT3, Case, print_table, require_published
from perseus_core.planning.problem import PipelineProblem, Problem
from perseus_core.planning.schedule import interleaved, zb_h1
from perseus_core.planning.solver import solve

NUM_TIMES = 20


def least_energy_j(problem: Problem, iteration_time_s: float) -> float:
    """Least energy of an iteration of this time, by linear programming.

    Variables: start, duration and effective energy of every instruction. Effective energy lies above every segment of
    its hull; nothing of the solver is used.
    """
    n, limit_s = problem.dag.num_instructions, iteration_time_s - problem.outside_time_s
    rows, columns, values, bounds = [], [], [], []

    def at_most(terms: list[tuple[int, float]], bound: float) -> None:
        for column, value in terms:
            rows.append(len(bounds))
            columns.append(column)
            values.append(value)
        bounds.append(bound)

    start, duration, cost = 0, n, 2 * n
    for before, after, latency in zip(
        problem.dag.predecessor, problem.dag.successor, problem.dag.latency_s, strict=True
    ):
        at_most([(start + before, 1), (duration + before, 1), (start + after, -1)], -latency)
    for i in range(n):
        at_most([(start + i, 1), (duration + i, 1)], limit_s)
        curve = problem.curves[problem.curve_of[i]]
        times_s, costs_j = np.asarray(curve.times_s)[curve.hull], curve.effective_energies_j[curve.hull]
        for k in range(len(times_s) - 1):
            slope = (costs_j[k + 1] - costs_j[k]) / (times_s[k + 1] - times_s[k])
            at_most([(duration + i, slope), (cost + i, -1)], slope * times_s[k] - costs_j[k])
        if len(times_s) == 1:
            at_most([(cost + i, -1)], -costs_j[0])
    matrix = coo_array((values, (rows, columns)), shape=(len(bounds), 3 * n)).tocsr()
    limits = [(0, None)] * n + list(zip(problem.fastest_s, problem.slowest_s, strict=True)) + [(None, None)] * n
    objective = np.concatenate([np.zeros(2 * n), np.ones(n)])
    answer = linprog(objective, matrix, bounds, bounds=limits, method="highs")
    assert answer.status == 0, answer.message
    return float(problem.iteration_energy_j(answer.fun, iteration_time_s))


def cases() -> list[tuple[str, PipelineProblem]]:
    """Both shared profiles, 1F1B, interleaved and ZB-H1."""

    def variants(case: Case) -> list[tuple[str, PipelineProblem]]:
        power_w, divided = case.blocking_power_w, case.profile.divided_into_chunks(2)
        split = case.profile.with_split_backward()
        return [
            (f"{case.title}, 1F1B, M = 12", case.problem(12)),
            (f"{case.title}, 1F1B, M = 24", case.problem(24)),
            (
                f"{case.title}, interleaved V = 2, M = 16",
                PipelineProblem.of(divided, interleaved(8, 16, 2), power_w),
            ),
            (f"{case.title}, ZB-H1, M = 12", PipelineProblem.of(split, zb_h1(8, 12), power_w)),
            (f"{case.title}, ZB-H1, M = 24", PipelineProblem.of(split, zb_h1(8, 24), power_w)),
        ]

    return variants(GPT3) + variants(BLOOM)


def main() -> None:
    require_published()
    rows = []
    for title, problem in cases():
        frontier = solve(problem)
        times_s = np.linspace(frontier.fastest_time_s, frontier.min_energy_time_s, NUM_TIMES)
        worst = max(abs(frontier.energy_j(t) / least_energy_j(problem, t) - 1) for t in times_s)
        rows.append((title, problem.dag.num_instructions, len(frontier.times_s), f"{worst:.1e}"))
    print_table(("case", "instructions", "vertices", f"largest relative difference at {NUM_TIMES} times"), rows)


if __name__ == "__main__":
    main()
