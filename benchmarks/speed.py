"""Fast: the full frontier, beside `lowtime` in the same run; large pipelines; growth with size; start-up time.

`python -m benchmarks.speed [--long]`: --long also runs lowtime at M = 24 and 48 (some minutes). The growth is drawn to
docs/solve_time.png.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import GPT3, PUBLISHED, print_table, require_published, uneven_problem
from benchmarks.peers import lowtime_solver
from perseus_core.planning.rounding import Rounder
from perseus_core.planning.solver import solve, solve_at

GROWTH_FIGURE = Path(__file__).resolve().parent.parent / "docs" / "solve_time.png"

FIRST_SOLVE = """
import time; begin = time.perf_counter()
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import one_f_one_b
from perseus_core.planning.solver import solve
solve(PipelineProblem.of(Profile.load({path!r}), one_f_one_b(8, 12), 83.64))
print(time.perf_counter() - begin)
"""


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median of several calls."""
    return statistics.median(seconds(run) for _ in range(repeats))


def beside_lowtime(num_microbatches: int) -> tuple[str, ...]:
    """One row: ours before and after the peer, so that drift of the machine shows."""
    problem = GPT3.problem(num_microbatches)
    before_s = median_seconds(lambda: solve(problem))
    solver = lowtime_solver(problem)
    peer_s = seconds(lambda: sum(1 for _ in solver.run()))
    after_s = median_seconds(lambda: solve(problem))
    ours_s = (before_s + after_s) / 2
    return (str(num_microbatches), f"{peer_s:.2f} s", f"{1000 * ours_s:.1f} ms", f"{peer_s / ours_s:,.0f}")


def draw_growth(points: list[tuple[int, float]]) -> None:
    """How the time of the full frontier grows with the number of instructions, on logarithmic axes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    instructions, seconds_taken = zip(*sorted(points), strict=True)
    axes.loglog(instructions, seconds_taken, "o")
    axes.set(xlabel="instructions", ylabel="full frontier [s]", title="Stages uneven by 3 %, 1F1B")
    axes.grid(which="both", alpha=0.3)
    figure.savefig(GROWTH_FIGURE, dpi=120)


def huge_plan(num_stages: int, num_microbatches: int) -> None:
    """The plan of the fastest iteration, where the whole frontier would take too long: solved, rounded, slack spent."""
    begin = time.perf_counter()
    problem = uneven_problem(num_stages, num_microbatches)
    point = solve_at(problem, gap=1e-5)
    solved_s = time.perf_counter() - begin
    rounder = Rounder(problem)
    limit_s = point.iteration_time_s - problem.outside_time_s
    choice = rounder.reclaim(rounder.round_down(point.durations_s), limit_s)
    took_s, peak_mib = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{num_stages} stages x {num_microbatches} microbatches, {problem.dag.num_instructions:,} instructions, at the "
        f"fastest time: solved in {solved_s:.0f} s to within {point.gap:.1e} of the least energy (proved), with real "
        f"clocks {rounder.energy_j(choice) / point.bound_j - 1:.2%} above the bound in {took_s:.0f} s; "
        f"peak memory {peak_mib:.0f} MiB\n"
    )


def main() -> None:
    require_published()
    long = "--long" in sys.argv
    rows = [beside_lowtime(m) for m in ((12, 24, 48) if long else (12,))]
    rows.append(("96", "not run", f"{1000 * median_seconds(lambda: solve(GPT3.problem(96))):.1f} ms", ""))
    print_table(("microbatches, 8 stages", "lowtime 0.3.0", "perseus", "times faster"), rows)

    rows, growth = [], []
    for num_stages, num_microbatches in ((8, 128), (16, 64), (16, 128), (32, 64), (32, 128)):
        problem = uneven_problem(num_stages, num_microbatches)
        took_s = median_seconds(lambda problem=problem: solve(problem), 3)
        rows.append((num_stages, num_microbatches, problem.dag.num_instructions, f"{took_s:.2f} s"))
        growth.append((problem.dag.num_instructions, took_s))
    print_table(("stages, uneven by 3 %", "microbatches", "instructions", "full frontier"), rows)
    draw_growth(growth)

    huge_plan(64, 1024)

    path = str(Path(PUBLISHED) / "stage_profile" / f"{GPT3.profile_name}_bf16.csv")
    command = [sys.executable, "-c", FIRST_SOLVE.format(path=path)]
    starts = [float(subprocess.run(command, capture_output=True, check=True, text=True).stdout) for _ in range(5)]
    print(f"Import and first solve of M = 12 in a fresh process: {statistics.median(starts):.2f} s\n")


if __name__ == "__main__":
    main()
