"""`perseus plot`: the picture of a frontier or a plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from perseus_core.commands.inputs import say_written
from perseus_core.documents import document_format
from perseus_core.errors import InputError
from perseus_core.planning import frontier_file
from perseus_core.planning import plan as plan_file
from perseus_core.planning.baselines import envpipe, zeus_global, zeus_per_stage
from perseus_core.planning.plan import Plan, make_plan
from perseus_core.report.frontier_figure import draw_frontier
from perseus_core.report.html_page import frontier_page, plan_page
from perseus_core.report.save import save_figure
from perseus_core.report.timeline_figure import draw_timeline

HELP = "draw a frontier (with the baselines) or a plan (the pipeline's timeline)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("file", metavar="FRONTIER.json|PLAN.json", help="what `perseus solve` or `perseus plan` wrote")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="ends in .png, .svg, .pdf or .html (interactive)"
    )
    parser.add_argument(
        "--colour", choices=("clock", "power"), default="clock", help="what a plan's colours show (default: clock)"
    )


def run(args: argparse.Namespace) -> int:
    """Draws what the file holds."""
    as_page = Path(args.output).suffix.lower() == ".html"
    kind = document_format(args.file)
    if kind == frontier_file.FORMAT:
        frontier = frontier_file.load_frontier(args.file)
        problem = frontier.problem
        baselines = (zeus_global(problem), zeus_per_stage(problem), envpipe(problem))
        figure = (
            frontier_page(frontier)
            if as_page
            else draw_frontier(frontier, plan=make_plan(frontier), baselines=baselines)
        )
    elif kind == plan_file.FORMAT:
        plan = Plan.load(args.file)
        figure = plan_page(plan) if as_page else draw_timeline(plan, colour=args.colour)
    else:
        raise InputError(
            f'{args.file}: field "format" is {kind!r}; give a {frontier_file.FORMAT} or a {plan_file.FORMAT}'
        )
    save_figure(figure, args.output)
    say_written(args.output)
    return 0
