"""The data block of an interactive page: everything is computed here, the page's script only draws."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning.baselines import Baseline, all_max
from perseus_core.planning.execution import execute
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.plan import Plan
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.rounding import Rounder
from perseus_core.planning.schedule import Kind, Schedule
from perseus_core.report.palette import RAMPS
from perseus_core.report.timeline import Timeline
from perseus_core.report.titles import schedule_title

# Starts are whole ticks of this share of the longest iteration: a tenth of a pixel on the widest screen.
_TICKS = 50_000

_KINDS = tuple(kind.value for kind in Kind)


@dataclass
class _Settings:
    """The distinct (clock, duration, energy) that instructions run at; instructions refer to them by number."""

    numbers: dict[tuple[int, float, float], int] = field(default_factory=dict)

    def of(self, timeline: Timeline) -> list[int]:
        """The setting of each instruction, new ones added."""
        columns = (timeline.clock_mhz.tolist(), timeline.duration_s.tolist(), timeline.energy_j.tolist())
        rows = zip(columns[0], map(_short, columns[1]), map(_short, columns[2]), strict=True)
        return [self.numbers.setdefault(row, len(self.numbers)) for row in rows]


def frontier_data(
    frontier: Frontier[PipelineProblem], baselines: Iterable[Baseline] = (), num_points: int = 60
) -> dict[str, Any]:
    """The frontier, plans of real clocks for points spread over it, one at the baseline's time; what others reach."""
    problem = frontier.problem
    maximum = all_max(problem)
    targets_s = _targets_s(frontier, maximum.iteration_time_s, num_points)
    rounder = Rounder(problem)
    timelines = [_plan_timeline(frontier, rounder, target_s) for target_s in targets_s]
    before = Timeline.of_execution(problem, maximum)
    data = _pipeline_data(problem.schedule, timelines, before)
    for point, target_s, timeline in zip(data["points"], targets_s, timelines, strict=True):
        point["marginal_power_w"] = _short(_marginal_power_w(frontier, target_s))
        point["saving"] = _short(1 - timeline.iteration_energy_j / maximum.energy_j)
        point["slowdown"] = _short(timeline.iteration_time_s / maximum.iteration_time_s - 1)
        point["gap"] = _short(max(0.0, timeline.iteration_energy_j / frontier.energy_j(target_s) - 1))
    # Shown first: the slowest point that is no slower than the baseline, the default policy's.
    in_time = np.flatnonzero(np.array(targets_s) <= maximum.iteration_time_s * (1 + 1e-9))
    return data | {
        "first": int(in_time[-1]) if in_time.size else 0,
        "frontier": {"times_s": _all_short(frontier.times_s), "energies_j": _all_short(frontier.energies_j)},
        "others": [
            {"name": b.name, "points": [[_short(p.iteration_time_s), _short(p.energy_j)] for p in b.points]}
            for b in baselines
        ],
    }


def plan_data(plan: Plan) -> dict[str, Any]:
    """One plan."""
    data = _pipeline_data(plan.schedule, [Timeline.of_plan(plan)], None)
    numbers = {"saving": plan.saving, "slowdown": plan.slowdown, "gap": max(0.0, plan.gap)}
    data["points"][0].update({name: _short(number) for name, number in numbers.items()})
    return data | {"first": 0, "frontier": None, "others": []}


def _pipeline_data(schedule: Schedule, timelines: list[Timeline], before: Timeline | None) -> dict[str, Any]:
    """What frontiers and plans have in common."""
    settings = _Settings()
    shown = [*timelines, before] if before is not None else timelines
    tick_s = max(timeline.iteration_time_s for timeline in shown) / _TICKS
    return {
        "title": schedule_title(schedule),
        "num_stages": schedule.num_stages,
        "num_chunks": schedule.num_chunks,
        "num_microbatches": schedule.num_microbatches,
        "kinds": _KINDS,
        "instructions": [[i.stage, i.chunk, i.microbatch, _KINDS.index(i.kind.value)] for i in schedule.instructions],
        "tick_s": tick_s,
        "points": [_point(timeline, settings, tick_s) for timeline in timelines],
        "before": None if before is None else _point(before, settings, tick_s),
        # Last, when all have been numbered: clock in MHz, duration in s, energy in J.
        "settings": [list(setting) for setting in settings.numbers],
        "ramps": {
            colour: {"label": ramp.label, "stops": ramp.stops, "critical_path": ramp.critical_path}
            for colour, ramp in RAMPS.items()
        },
    }


def _point(timeline: Timeline, settings: _Settings, tick_s: float) -> dict[str, Any]:
    return {
        "time_s": _short(timeline.iteration_time_s),
        "energy_j": _short(timeline.iteration_energy_j),
        "setting": settings.of(timeline),
        "start_ticks": np.rint(timeline.start_s / tick_s).astype(int).tolist(),
        "critical_path": timeline.critical_path.tolist(),
    }


def _targets_s(frontier: Frontier[PipelineProblem], baseline_time_s: float, num_points: int) -> list[float]:
    """Iteration times spread over the frontier, its ends and the baseline's among them."""
    spread_s = np.linspace(frontier.fastest_time_s, frontier.min_energy_time_s, max(2, num_points))
    if spread_s[0] * (1 + 1e-9) < baseline_time_s < spread_s[-1] and len(spread_s) > 2:
        nearest = int(np.argmin(np.abs(spread_s[1:-1] - baseline_time_s))) + 1
        spread_s[nearest] = baseline_time_s
    return sorted(set(spread_s.tolist()))


def _plan_timeline(frontier: Frontier[PipelineProblem], rounder: Rounder, target_s: float) -> Timeline:
    problem = frontier.problem
    choice = rounder.choose(frontier, target_s, effort=0)
    clocks_mhz = np.empty(len(choice), np.int64)
    for i, curve in enumerate(problem.curves):
        members = problem.curve_of == i
        clocks_mhz[members] = np.array(curve.clocks_mhz)[choice[members]]
    return Timeline.of_execution(problem, execute(problem, clocks_mhz))


def _marginal_power_w(frontier: Frontier[PipelineProblem], time_s: float) -> float:
    """Energy that one more second saves at this point; 0 at T*, where no time saves any more."""
    segment = int(np.searchsorted(frontier.times_s, time_s, side="right")) - 1
    return float(frontier.marginal_power_w[segment]) if segment < len(frontier.marginal_power_w) else 0.0


def _short(number: float) -> float:
    """Seven significant digits: more than any measurement has, less than half the text."""
    return float(f"{number:.7g}")


def _all_short(numbers: NDArray[np.float64]) -> list[float]:
    return [_short(number) for number in numbers.tolist()]
