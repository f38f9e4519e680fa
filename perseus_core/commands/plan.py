"""`perseus plan`: one clock for every instruction, for the point of a frontier that a policy picks."""

from __future__ import annotations

import argparse

from perseus_core.commands.inputs import (
    add_policy_arguments,
    answers,
    print_json,
    read_policy,
    read_switching,
    say_written,
)
from perseus_core.planning.frontier_file import load_frontier
from perseus_core.planning.plan import make_plan
from perseus_core.report.tables import plan_table

HELP = "pick a point of a frontier and hand out one clock per instruction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("frontier", metavar="FRONTIER.json", help="what `perseus solve -o` wrote")
    add_policy_arguments(parser)
    parser.add_argument("-o", "--output", metavar="PLAN.json", help="write the plan")
    parser.add_argument("--json", action="store_true", help="print the answer for machines")


def run(args: argparse.Namespace) -> int:
    """Makes the plan, prints it, writes the file."""
    frontier = load_frontier(args.frontier)
    problem = frontier.problem
    plan = make_plan(frontier, read_policy(args, problem), switching=read_switching(args))
    if args.output:
        plan.save(args.output)
    if args.json:
        answer = {
            "iteration_time_s": plan.iteration_time_s,
            "energy_j": plan.energy_j,
            "baseline_time_s": plan.baseline_time_s,
            "baseline_energy_j": plan.baseline_energy_j,
            "saving": plan.saving,
            "slowdown": plan.slowdown,
            "bound_energy_j": plan.bound_energy_j,
            "gap": plan.gap,
            "executed_time_s": plan.iteration_time_s,
            "executed_energy_j": plan.energy_j,
            "changes_per_iteration": plan.changes_per_iteration,
            "granularity": plan.granularity.value,
            "lost_to_switching": plan.lost_to_switching,
            "clocks_mhz": plan.clocks_mhz,
        }
        if args.straggler is not None:
            # Until the straggler is done, everybody else waits.
            until_s = plan.baseline_time_s * args.straggler
            energy_j = plan.energy_j + problem.blocking_power_w * max(0.0, until_s - plan.iteration_time_s)
            baseline_j = plan.baseline_energy_j + problem.blocking_power_w * (until_s - plan.baseline_time_s)
            answer["straggler_time_s"] = until_s
            answer["energy_until_straggler_j"] = energy_j
            answer["baseline_energy_until_straggler_j"] = baseline_j
            answer["saving_until_straggler"] = 1 - energy_j / baseline_j
        print_json(answer)
    else:
        answers.print(plan_table(plan))
        if args.output:
            say_written(args.output)
    return 0
