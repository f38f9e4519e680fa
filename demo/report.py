"""What the demonstration shows at the end: a table, a picture of the pipeline before and after, and `report.json`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from perseus_core.errors import InputError
from perseus_core.files import write_text
from perseus_core.planning.baselines import all_max
from perseus_core.planning.frontier_file import load_frontier
from perseus_core.planning.plan import make_plan
from perseus_core.report.frontier_figure import draw_frontier
from perseus_core.report.save import save_figure
from perseus_core.report.timeline_figure import draw_before_and_after
from perseus_core.runtime.settings import Settings

# Iterations of less than two interludes say little of what the job is without a plan.
_ENOUGH_WITHOUT = 4


@dataclass(frozen=True)
class Measured:
    """Medians over iterations; energies count one GPU for each stage (the mean of all pipelines).

    Attributes:
        iterations: how many.
        time_s: of one.
        energy_j: of one.
    """

    iterations: int
    time_s: float
    energy_j: float


def report(output: Path, settings: Settings, *, seconds: float) -> dict[str, Any]:
    """Prints the table, writes the pictures and `report.json`; returns what is in it.

    Args:
        output: folder of the laps and the frontier, and of what is written.
        settings: of the session.
        seconds: that everything took.

    Raises:
        InputError: if the job ended before a plan was measured.
    """
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((output / "laps").glob("rank*.json"))]
    before, after = without_and_under_the_plan(ranks)
    status, laps = ranks[0]["status"], ranks[0]["laps"]
    figures = _draw(output, settings)
    content = {
        "saving": 1 - after.energy_j / before.energy_j,
        "promised_saving": status["promised_saving"],
        "slowdown": after.time_s / before.time_s - 1,
        "promised_slowdown": status["promised_slowdown"],
        "gap": status["gap"],
        "baseline_time_s": before.time_s,
        "iteration_time_s": after.time_s,
        "baseline_energy_j": before.energy_j,
        "energy_j": after.energy_j,
        "solve_s": status["solve_s"],
        "profiling_iterations": status["profiling_iterations"],
        "iterations_before": before.iterations,
        "iterations_after": after.iterations,
        "given_up": laps[-1]["phase"] == "measure only",
        "loss_first": laps[0]["loss"],
        "loss_last": laps[-1]["loss"],
        "seconds": seconds,
    }
    write_text(output / "report.json", json.dumps(content, indent=2) + "\n")
    _print(content, output, figures)
    return content


def without_and_under_the_plan(ranks: list[dict[str, Any]]) -> tuple[Measured, Measured]:
    """What iterations took without a plan, in interludes if there were enough, and under the newest plan.

    A busy machine is not as fast now as it was when the job began. The first iteration after any change does not count:
    clocks may still change in it.

    Args:
        ranks: what `Laps` wrote for each.

    Raises:
        InputError: if the job ended before a plan was measured.
    """
    newest = max(lap["plan"] for lap in ranks[0]["laps"])
    under_plan = _measured(ranks, lambda lap: lap["follows_plan"] and lap["plan"] == newest)
    interludes = _measured(ranks, lambda lap: lap["plan"] == newest > 0 and not lap["follows_plan"])
    without = interludes
    if without is None or without.iterations < _ENOUGH_WITHOUT:
        without = _measured(ranks, lambda lap: lap["phase"] == "warm up")
    if under_plan is None or without is None:
        raise InputError("the job ended before there was anything to compare; give it more --most-iterations")
    return without, under_plan


def _measured(ranks: list[dict[str, Any]], chosen: Callable[[dict[str, Any]], bool]) -> Measured | None:
    """What the iterations took that are chosen on all ranks, as the one before each is; None if there are none."""
    num_pipelines = 1 + max(rank["pipeline"] for rank in ranks)
    laps = list(zip(*(rank["laps"] for rank in ranks), strict=True))
    are_chosen = [all(map(chosen, of_all)) for of_all in laps]
    kept = [of_all for of_all, before, now in zip(laps[1:], are_chosen, are_chosen[1:], strict=False) if before and now]
    if not kept:
        return None
    return Measured(
        len(kept),
        statistics.median(max(lap["time_s"] for lap in of_all) for of_all in kept),
        statistics.median(sum(lap["energy_j"] for lap in of_all) / num_pipelines for of_all in kept),
    )


def _draw(output: Path, settings: Settings) -> list[str]:
    """The pictures of the plan that the session's frontier holds."""
    frontier = load_frontier(output / "frontier.json")
    plan = make_plan(frontier, settings.pick, switching=settings.switching)
    baseline = all_max(frontier.problem)
    save_figure(draw_before_and_after(frontier.problem, baseline, plan), output / "before-and-after.png")
    save_figure(draw_frontier(frontier, plan=plan), output / "frontier.png")
    return ["before-and-after.png", "frontier.png"]


def _print(content: dict[str, Any], output: Path, figures: list[str]) -> None:
    table = Table(title="Measured on the simulated GPUs, one iteration, all stages together", title_justify="left")
    for column in ("", "before", "under the plan", "change", "promised"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        "energy",
        f"{content['baseline_energy_j']:.0f} J",
        f"{content['energy_j']:.0f} J",
        f"{-100 * content['saving']:+.1f} %",
        f"{-100 * content['promised_saving']:+.1f} %",
    )
    table.add_row(
        "time",
        f"{content['baseline_time_s']:.3f} s",
        f"{content['iteration_time_s']:.3f} s",
        f"{100 * content['slowdown']:+.1f} %",
        f"{100 * content['promised_slowdown']:+.1f} %",
    )
    table.add_row("loss", f"{content['loss_first']:.3f}", f"{content['loss_last']:.3f}", "", "")
    console = Console()
    console.print()
    console.print(table)
    if content["given_up"]:
        console.print("The plan was given up, because without it iterations are faster: the lines above say when.")
    console.print(
        f"The plan is within {100 * content['gap']:.2f} % of the best possible; solved in {content['solve_s']:.2g} s "
        f"after {content['profiling_iterations']} iterations of profiling; all in {content['seconds']:.0f} s."
    )
    console.print(f"Written to {output}: report.json, frontier.json, {', '.join(figures)}")
