"""Better plans: default policy against the published Table 6, and under stragglers against the published frontier."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.common import BLOOM, GPT3, Case, print_table, require_published
from perseus_core.planning.baselines import all_max, envpipe
from perseus_core.planning.plan import make_plan
from perseus_core.planning.policy import straggler
from perseus_core.planning.solver import solve

SLOWDOWNS = (1.05, 1.1, 1.2, 1.3, 1.5)


def default_policy(case: Case) -> None:
    """Saving without slowdown, real clocks, on the table as it is."""
    rows = []
    for num_microbatches, published in case.table6.items():
        problem = case.problem(num_microbatches)
        frontier, baseline = solve(problem), all_max(problem)
        begin = time.perf_counter()
        plan = make_plan(frontier, baseline=baseline)
        took_s = time.perf_counter() - begin
        assert plan.iteration_time_s <= baseline.iteration_time_s
        (other,) = envpipe(problem).points
        rows.append(
            (
                num_microbatches,
                f"{1 - other.energy_j / baseline.energy_j:.2%}",
                f"{published:.2f} %",
                f"{plan.saving:.2%}",
                f"{1 - plan.bound_energy_j / baseline.energy_j:.2%}",
                f"{plan.gap:.3%}",
                f"{plan.slowdown:.4%}",
                f"{1000 * took_s:.0f} ms",
            )
        )
    headings = (f"{case.title}: M", "EnvPipe", "published", "saving", "bound", "gap", "slowdown", "plan made in")
    print_table(headings, rows)


def stragglers(case: Case) -> None:
    """Energy until the straggler is done, everybody else waiting at blocking power."""
    rows = []
    for num_microbatches in case.table6:
        published = case.published_frontier(num_microbatches)
        if published is None:
            continue
        problem = case.problem(num_microbatches)
        frontier, baseline = solve(problem), all_max(problem)
        for slowdown in SLOWDOWNS:
            until_s = baseline.iteration_time_s * slowdown
            plan = make_plan(frontier, straggler(slowdown), baseline=baseline)
            ours_j = plan.energy_j + problem.blocking_power_w * (until_s - plan.iteration_time_s)
            place = int(np.searchsorted(published[:, 0], until_s, side="right")) - 1
            time_s, energy_j = published[place]
            theirs_j = energy_j + problem.blocking_power_w * (until_s - time_s)
            rows.append(
                (
                    num_microbatches,
                    slowdown,
                    f"{theirs_j:.0f} J",
                    f"{ours_j:.0f} J",
                    f"{frontier.energy_j(until_s):.0f} J",
                    f"{1 - ours_j / theirs_j:+.2%}",
                )
            )
    headings = (f"{case.title}: M", "T' / T", "published, as printed", "plan", "bound", "less energy than published")
    print_table(headings, rows)


def main() -> None:
    require_published()
    for case in (GPT3, BLOOM):
        default_policy(case)
    for case in (GPT3, BLOOM):
        stragglers(case)


if __name__ == "__main__":
    main()
