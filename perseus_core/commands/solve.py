"""`perseus solve`: from a profile to the frontier."""

from __future__ import annotations

import argparse

from perseus_core.commands.inputs import (
    add_problem_arguments,
    answers,
    print_json,
    read_problem,
    say_written,
    solve_with_progress,
)
from perseus_core.planning.baselines import all_max
from perseus_core.planning.frontier_file import save_frontier
from perseus_core.planning.plan import make_plan
from perseus_core.report.tables import frontier_table

HELP = "compute the whole iteration time - energy frontier of a profile"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_problem_arguments(parser)
    parser.add_argument(
        "-o", "--output", metavar="FRONTIER.json", help="write the frontier, for `perseus plan` and `perseus plot`"
    )
    parser.add_argument("--json", action="store_true", help="print the answer for machines")


def run(args: argparse.Namespace) -> int:
    """Solves, prints the frontier's ends and the default plan, writes the file."""
    problem = read_problem(args)
    frontier, solve_s = solve_with_progress(problem)
    baseline = all_max(problem)
    plan = make_plan(frontier, baseline=baseline)
    if args.output:
        save_frontier(frontier, args.output)
    if args.json:
        print_json(
            {
                "num_instructions": problem.dag.num_instructions,
                "num_vertices": len(frontier.times_s),
                "fastest": {"iteration_time_s": frontier.fastest_time_s, "energy_j": float(frontier.energies_j[0])},
                "min_energy": {
                    "iteration_time_s": frontier.min_energy_time_s,
                    "energy_j": float(frontier.energies_j[-1]),
                },
                "baseline_time_s": baseline.iteration_time_s,
                "baseline_energy_j": baseline.energy_j,
                "iteration_time_s": plan.iteration_time_s,
                "energy_j": plan.energy_j,
                "saving": plan.saving,
                "slowdown": plan.slowdown,
                "bound_energy_j": plan.bound_energy_j,
                "gap": plan.gap,
                "solve_s": solve_s,
            }
        )
    else:
        answers.print(frontier_table(frontier, baseline, plan, solve_s))
        if args.output:
            say_written(args.output)
    return 0
