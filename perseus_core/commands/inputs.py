"""What several commands read: the problem to solve, and the policy that picks a point."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from perseus_core.errors import InputError
from perseus_core.planning import policy
from perseus_core.planning.fitting import fit_profile
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import Kind, Schedule, gpipe, interleaved, one_f_one_b, zb_h1
from perseus_core.planning.solver import solve
from perseus_core.planning.switching import Switching

SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb-h1")

# People read progress and remarks on standard error; standard output holds nothing but the answer. Where it is no
# terminal it is wide enough for every table.
remarks = Console(stderr=True)
answers = Console() if sys.stdout.isatty() else Console(width=160)


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the profile, the schedule and the constants of a problem."""
    parser.add_argument(
        "profile", metavar="PROFILE.csv", help="stage,instruction,frequency,time,energy in MHz, s, J of one GPU"
    )
    parser.add_argument(
        "--microbatches", "-m", type=int, required=True, metavar="M", help="microbatches of one iteration"
    )
    parser.add_argument(
        "--blocking-power",
        type=float,
        required=True,
        metavar="W",
        help="what a GPU draws while it waits for its neighbour",
    )
    parser.add_argument(
        "--schedule", choices=SCHEDULES, default="1f1b", help="order of instructions (default: %(default)s)"
    )
    parser.add_argument(
        "--chunks", type=int, default=2, metavar="V", help="model chunks per stage, interleaved (default: 2)"
    )
    parser.add_argument(
        "--group-size", type=int, metavar="G", help="Megatron's microbatch_group_size_per_vp_stage (default: stages)"
    )
    parser.add_argument(
        "--transfer-latency",
        type=float,
        default=0.0,
        metavar="S",
        help="latency of a transfer between stages (default: 0)",
    )
    parser.add_argument(
        "--outside-time",
        type=float,
        default=0.0,
        metavar="S",
        help="time of an iteration outside the pipeline (default: 0)",
    )
    parser.add_argument(
        "--trust-profile", action="store_true", help="take the table exactly as it is, without smoothing noise"
    )
    parser.add_argument(
        "--fill-top",
        action="store_true",
        help="estimate instructions that were not measured at the highest clock of their stage",
    )


def read_problem(args: argparse.Namespace) -> PipelineProblem:
    """The problem the arguments describe.

    Raises:
        InputError: for whatever cannot be.
    """
    profile = Profile.load(args.profile)
    if args.fill_top:
        for missing, clock_mhz in profile.missing_at_top():
            remark(f"{missing} was not measured at {clock_mhz} MHz: it is estimated there")
        profile = profile.with_filled_top()
    if args.schedule == "interleaved" and profile.num_chunks == 1:
        profile = profile.divided_into_chunks(args.chunks)
        remark(f"{args.profile} has no chunks: each is taken for 1/{args.chunks} of its stage")
    if args.schedule == "zb-h1" and Kind.BACKWARD in profile.kinds:
        profile = profile.with_split_backward()
        remark(f"{args.profile} has no split backward: input and weight part are taken for a half each")
    if not args.trust_profile:
        profile = fit_profile(profile)
    return PipelineProblem.of(
        profile,
        make_schedule(args, profile),
        args.blocking_power,
        transfer_latency_s=args.transfer_latency,
        outside_time_s=args.outside_time,
    )


def make_schedule(args: argparse.Namespace, profile: Profile) -> Schedule:
    """The schedule the arguments name, for the stages of a profile."""
    if args.schedule == "gpipe":
        return gpipe(profile.num_stages, args.microbatches)
    if args.schedule == "interleaved":
        return interleaved(profile.num_stages, args.microbatches, profile.num_chunks, args.group_size)
    if args.schedule == "zb-h1":
        return zb_h1(profile.num_stages, args.microbatches)
    return one_f_one_b(profile.num_stages, args.microbatches)


def solve_with_progress(problem: PipelineProblem) -> tuple[Frontier[PipelineProblem], float]:
    """Solves, with a progress bar once it takes over a second. Returns the frontier and the seconds it took."""
    begin = time.perf_counter()
    with _late_progress_bar(f"Solving {problem.dag.num_instructions:,} instructions") as advance:
        frontier = solve(problem, progress=advance)
    return frontier, time.perf_counter() - begin


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the policies, of which one may be asked for."""
    group = parser.add_argument_group("policy", "which point of the frontier (default: no slowdown, least energy)")
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--max-slowdown", type=float, metavar="X", help="least energy in at most X more time; 0.05 means 5 %%"
    )
    one.add_argument("--fastest", action="store_true", help="the shortest iteration there is")
    one.add_argument(
        "--straggler", type=float, metavar="X", help="another pipeline takes X times as long: the point at min(T', T*)"
    )
    one.add_argument("--time", type=float, metavar="S", help="least energy in at most S seconds")
    one.add_argument("--eta", type=float, metavar="X", help="least X * energy + (1 - X) * P_max * time (Zeus); 0 to 1")
    one.add_argument(
        "--power-cap", type=float, metavar="W", help="fastest within this average power of the pipeline's GPUs"
    )
    group.add_argument(
        "--carbon-intensity",
        nargs=2,
        type=float,
        metavar=("NOW", "REFERENCE"),
        help="with --eta: weigh energy by the grid's g/kWh over a reference (Chase)",
    )
    group.add_argument(
        "--switch-latency",
        type=float,
        default=0.0,
        metavar="S",
        help="how long a change of clock takes (default: 0; real: 0.015)",
    )
    group.add_argument(
        "--max-changes-per-s",
        type=float,
        metavar="N",
        help="how often a GPU may change its clock (default: any number)",
    )


def read_policy(args: argparse.Namespace, problem: PipelineProblem) -> policy.Policy:
    """The policy the arguments ask for.

    Raises:
        InputError: for values out of range.
    """
    if args.carbon_intensity is not None and args.eta is None:
        raise InputError("--carbon-intensity weighs the cost of --eta; give --eta as well")
    if args.max_slowdown is not None:
        return policy.max_slowdown(args.max_slowdown)
    if args.fastest:
        return policy.fastest
    if args.straggler is not None:
        return policy.straggler(args.straggler)
    if args.time is not None:
        return policy.iteration_time(args.time)
    if args.eta is not None and args.carbon_intensity is not None:
        return policy.carbon_cost(args.eta, problem.max_power_w, *args.carbon_intensity)
    if args.eta is not None:
        return policy.zeus_cost(args.eta, problem.max_power_w)
    if args.power_cap is not None:
        return policy.power_cap(args.power_cap)
    return policy.no_slowdown


def read_switching(args: argparse.Namespace) -> Switching:
    """What changes of clock take, as the arguments say.

    Raises:
        InputError: for values out of range.
    """
    if not 0 <= args.switch_latency < math.inf:
        raise InputError(f"--switch-latency {args.switch_latency} must be 0 or more; 0.015 means 15 ms")
    if args.max_changes_per_s is not None and not 0 <= args.max_changes_per_s < math.inf:
        raise InputError(f"--max-changes-per-s {args.max_changes_per_s} must be 0 or more; 10 is harmless")
    return Switching(args.switch_latency, args.switch_latency, max_changes_per_s=args.max_changes_per_s)


def remark(text: str) -> None:
    """Tells a person something that is not part of the answer."""
    remarks.print(f"[dim]note: {text}[/dim]", highlight=False, soft_wrap=True)


def say_written(path: object) -> None:
    """Tells where the answer went."""
    answers.print(f"written: {path}", highlight=False, soft_wrap=True)


def print_json(answer: dict[str, Any]) -> None:
    """The answer for machines."""
    json.dump(answer, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


@contextmanager
def _late_progress_bar(description: str, after_s: float = 1.0) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=remarks, transient=True)
    task = bar.add_task(description, total=1.0)
    begin = time.perf_counter()

    def advance(share: float) -> None:
        if remarks.is_terminal and time.perf_counter() - begin > after_s:
            bar.start()
        bar.update(task, completed=share)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
