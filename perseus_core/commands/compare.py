"""`perseus compare`: the plan beside what other methods make of the same profile."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from perseus_core.commands.inputs import (
    add_problem_arguments,
    answers,
    print_json,
    read_problem,
    remark,
    say_written,
    solve_with_progress,
)
from perseus_core.errors import InputError
from perseus_core.planning.baselines import Baseline, all_max, envpipe, zeus_global, zeus_per_stage
from perseus_core.planning.execution import Execution
from perseus_core.planning.plan import make_plan
from perseus_core.report.frontier_figure import draw_frontier
from perseus_core.report.html_page import frontier_page
from perseus_core.report.save import save_figure
from perseus_core.report.tables import ComparisonRow, comparison_table
from perseus_core.report.timeline_figure import draw_before_and_after

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = "compare with Zeus, EnvPipe and the published frontier; draw the figures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_problem_arguments(parser)
    parser.add_argument(
        "--published", metavar="FRONTIER.csv", help="a published frontier of the same profile: columns time,energy"
    )
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="write frontier.png, timeline.png and frontier.html there"
    )
    parser.add_argument("--json", action="store_true", help="print the answer for machines")


def run(args: argparse.Namespace) -> int:
    """Solves, measures everybody by the same table, prints and draws."""
    problem = read_problem(args)
    frontier, solve_s = solve_with_progress(problem)
    baseline = all_max(problem)
    plan = make_plan(frontier, baseline=baseline)
    others = [zeus_global(problem), zeus_per_stage(problem), envpipe(problem)]
    for other in [other for other in others if not other.points]:
        remark(f"{other.name}: there is no clock that all stages have")
        others.remove(other)
    published = read_published(args.published) if args.published else None

    rows = [_row("All clocks at maximum", baseline, baseline)]
    rows += [_baseline_row(other, baseline) for other in others]
    if published is not None:
        rows.append(_published_row(published, baseline))
    rows.append(
        ComparisonRow(
            "Perseus, this plan",
            plan.iteration_time_s,
            plan.energy_j,
            plan.slowdown,
            plan.saving,
            f"within {plan.gap:.2%} of the proved bound, solved in {solve_s:.3g} s",
        )
    )
    if args.json:
        print_json({"solve_s": solve_s, "gap": plan.gap, "rows": [vars(row) for row in rows]})
    else:
        answers.print(comparison_table(rows))
    if args.output:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        figures: dict[str, Figure | str] = {
            "frontier.png": draw_frontier(frontier, plan=plan, baselines=others, published=published),
            "timeline.png": draw_before_and_after(problem, baseline, plan),
            "frontier.html": frontier_page(frontier, baselines=others),
        }
        for name, figure in figures.items():
            save_figure(figure, folder / name)
            if not args.json:
                say_written(folder / name)
    return 0


def read_published(path: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A published frontier: times and energies, fastest first.

    Raises:
        InputError: if the file cannot be read as one.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            points = sorted((float(row["time"]), float(row["energy"])) for row in csv.DictReader(file))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a CSV with the columns time,energy"
        ) from None
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: is no published frontier; give a CSV with the columns time,energy and numbers in them"
        ) from None
    if not points or not np.isfinite(points).all():
        raise InputError(
            f"{path}: holds no points, or some that are not finite; give a CSV with the columns time,energy"
        )
    times_s, energies_j = np.array(points).T
    return times_s, energies_j


def _row(name: str, execution: Execution, baseline: Execution, note: str = "") -> ComparisonRow:
    return ComparisonRow(
        name,
        execution.iteration_time_s,
        execution.energy_j,
        execution.iteration_time_s / baseline.iteration_time_s - 1,
        1 - execution.energy_j / baseline.energy_j,
        note,
    )


def _baseline_row(other: Baseline, baseline: Execution) -> ComparisonRow:
    point = other.within(baseline.iteration_time_s)
    if point is not None:
        return _row(other.name, point, baseline)
    return _row(other.name, other.points[0], baseline, "has no point without slowdown; this is its fastest")


def _published_row(published: tuple[NDArray[np.float64], NDArray[np.float64]], baseline: Execution) -> ComparisonRow:
    time_s, energy_j = float(published[0][0]), float(published[1][0])
    slowdown, saving = time_s / baseline.iteration_time_s - 1, 1 - energy_j / baseline.energy_j
    return ComparisonRow(
        "Perseus, published", time_s, energy_j, slowdown, saving, "as printed: it takes a little longer"
    )
