"""Tables with a power-capped plateau: how far plans lie from the bound, and a small one from the best of all."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from benchmarks.common import print_table
from perseus_core.gpu.model import A40, H100, GpuModel
from perseus_core.gpu.workload import Transformer, Workload
from perseus_core.planning.plan import make_plan
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import one_f_one_b
from perseus_core.planning.solver import solve

MODEL = Transformer("gpt3-13b", 40, 5120, 51200)
LOWEST_SHARE = 0.4  # of the highest clock: what a job's sweep goes down to
MILP_LIMIT_S = 60.0


def table(gpu: GpuModel, cap: float, num_stages: int, step: int) -> tuple[Profile, float]:
    """A profile of a GPU that holds no more than a share of its highest clock, and its blocking power [W].

    Args:
        gpu: with another power limit.
        cap: the share, for a backward of the first stage.
        num_stages: of the pipeline.
        step: every so many of its clocks are listed.
    """
    workload = Workload(MODEL, num_stages)
    held_mhz = cap * gpu.max_clock_mhz
    work = workload.backward(0)
    capped = replace(gpu, power_limit_w=float(replace(gpu, power_limit_w=1e6).power_w(work, held_mhz)))
    clocks = tuple(c for c in capped.clocks_mhz[::step] if c >= LOWEST_SHARE * capped.max_clock_mhz)
    return workload.profile(capped, clocks), float(capped.blocking_power_w(held_mhz))


def best_of_all_j(problem: PipelineProblem, limit_s: float) -> tuple[float, float]:
    """Least energy of real clocks within a time by mixed-integer programming, and the energy that is proved [J]."""
    dag, n = problem.dag, problem.dag.num_instructions
    points = [[(m.time_s, m.energy_j) for m in problem.measurements[curve]] for curve in problem.curve_of]
    first = n + np.concatenate([[0], np.cumsum([len(p) for p in points])])  # after the starts
    num_columns = int(first[-1])
    rows: list[tuple[dict[int, float], float, float]] = []

    def duration(i: int) -> dict[int, float]:
        return {int(first[i]) + k: time_s for k, (time_s, _) in enumerate(points[i])}

    for before, after, latency_s in zip(dag.predecessor, dag.successor, dag.latency_s, strict=True):
        rows.append(
            ({int(after): 1.0, int(before): -1.0} | {k: -t for k, t in duration(before).items()}, latency_s, np.inf)
        )
    for i in range(n):
        rows.append((dict.fromkeys(duration(i), 1.0), 1.0, 1.0))
        rows.append(({i: 1.0} | duration(i), -np.inf, limit_s - problem.outside_time_s))
    at = [(row, column, value) for row, (terms, _, _) in enumerate(rows) for column, value in terms.items()]
    row, column, value = zip(*at, strict=True)
    matrix = coo_array((value, (row, column)), shape=(len(rows), num_columns)).tocsr()
    waiting_w = np.array(problem.stage_blocking_power_w)[problem.stage_of]
    cost = np.concatenate([np.zeros(n), *([e - w * t for t, e in p] for p, w in zip(points, waiting_w, strict=True))])
    found = milp(
        cost,
        constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
        bounds=Bounds(0, np.concatenate([np.full(n, limit_s), np.ones(num_columns - n)])),
        integrality=np.concatenate([np.zeros(n), np.ones(num_columns - n)]),
        options={"time_limit": MILP_LIMIT_S, "mip_rel_gap": 1e-5},
    )
    best, proved = (float(problem.iteration_energy_j(x, limit_s)) for x in (found.fun, found.mip_dual_bound))
    return best, proved


def main() -> None:
    rows = []
    for gpu in (A40, H100):
        for cap in (0.6, 0.75, 0.85, 0.95):
            for step in (1, 2, 6):
                profile, blocking_w = table(gpu, cap, 8, step)
                row: list[object] = [gpu.name, f"{cap:g}", gpu.clock_step_mhz * step]
                for num_microbatches in (12, 24, 48, 96):
                    problem = PipelineProblem.of(profile, one_f_one_b(8, num_microbatches), blocking_w)
                    frontier, begin_s = solve(problem), time.process_time()
                    plan = make_plan(frontier)
                    took_s = time.process_time() - begin_s
                    row.append(f"{plan.saving:.2%}, gap {plan.gap:.3%}, {1e3 * took_s:.0f} ms")
                rows.append(row)
    print_table(("GPU", "cap", "step [MHz]", *(f"M = {m}" for m in (12, 24, 48, 96))), rows)

    rows = []
    for gpu in (A40, H100):
        for cap in (0.75, 0.95):
            profile, blocking_w = table(gpu, cap, 4, 6)
            problem = PipelineProblem.of(profile, one_f_one_b(4, 6), blocking_w)
            frontier = solve(problem)
            plan = make_plan(frontier)
            best_j, proved_j = best_of_all_j(problem, plan.iteration_time_s)
            rows.append(
                (
                    gpu.name,
                    f"{cap:g}",
                    f"{plan.gap:.3%}",
                    f"{plan.energy_j / best_j - 1:+.3%}",
                    f"{plan.energy_j / proved_j - 1:+.3%}",
                )
            )
    print_table(("GPU, 4 x 6", "cap", "gap to our bound", "above the best found", "above what is proved"), rows)


if __name__ == "__main__":
    main()
