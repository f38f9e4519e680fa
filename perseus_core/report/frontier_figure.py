"""The frontier: energy over iteration time, with what others reach on the same profile (paper, figure 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perseus_core.planning.baselines import Baseline, all_max
from perseus_core.planning.execution import Execution
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.plan import Plan
from perseus_core.planning.problem import PipelineProblem
from perseus_core.report.drawing import figure_style
from perseus_core.report.palette import BASELINES, CHOSEN, FAINT_INK, FRONTIER, INK
from perseus_core.report.titles import schedule_title
from perseus_core.report.units import Scale, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# How far the axes reach beyond T*, as a share of the frontier's time, and above its energies.
_BEYOND, _ABOVE = 0.18, 0.08


def draw_frontier(
    frontier: Frontier[PipelineProblem],
    *,
    plan: Plan | None = None,
    baselines: Sequence[Baseline] = (),
    published: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
    title: str | None = None,
    width_in: float = 8.6,
    height_in: float = 5.4,
) -> Figure:
    """Draws a frontier.

    Axes show the frontier and what is near it; a baseline's slowest points may lie outside.

    Args:
        frontier: the solved pipeline.
        plan: the chosen plan, marked.
        baselines: what others reach.
        published: times in s and energies in J of a published frontier of the same problem.
        title: by default the schedule.
        width_in, height_in: size of the figure in inches.

    Raises:
        InputError: if matplotlib is not installed.
    """
    maximum = all_max(frontier.problem)
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        axes = figure.add_subplot()
        time_limits_s, energy_limits_j = _limits(frontier, maximum, baselines, published)
        energy = Scale.of(energy_limits_j, "J")

        def curve(times_s: NDArray[np.float64], energies_j: NDArray[np.float64], **style: Any) -> None:
            axes.plot(times_s, energies_j / energy.factor, **style)

        for baseline, (colour, marker) in zip(baselines, BASELINES * len(baselines), strict=False):
            times_s = np.array([p.iteration_time_s for p in baseline.points])
            energies_j = np.array([p.energy_j for p in baseline.points])
            # A single point has no line to lead the eye to it.
            size = 4.5 if len(times_s) > 1 else 8
            curve(
                times_s,
                energies_j,
                color=colour,
                linewidth=0.7,
                marker=marker,
                markersize=size,
                markeredgecolor="white",
                markeredgewidth=0.5,
                label=baseline.name,
            )
        if published is not None:
            curve(*published, color=INK, linewidth=1.1, linestyle=(0, (4, 2)), label="Published frontier, as printed")
        curve(frontier.times_s, frontier.energies_j, color=FRONTIER, linewidth=2.2, label="Frontier", zorder=4)
        waiting_s = np.array([frontier.min_energy_time_s, time_limits_s[1]])
        waiting_j = np.array([frontier.energy_j(time_s) for time_s in waiting_s])
        waiting = "Beyond T*: wait at blocking power"
        curve(waiting_s, waiting_j, color=FRONTIER, linewidth=1.4, linestyle=":", label=waiting, zorder=3)

        def point(time_s: float, energy_j: float, label: str, marker: str, size: float, face: str) -> None:
            curve(
                np.array([time_s]),
                np.array([energy_j]),
                color=face,
                linestyle="none",
                marker=marker,
                markersize=size,
                markeredgecolor="white",
                markeredgewidth=0.9,
                label=label,
                zorder=6,
            )

        point(maximum.iteration_time_s, maximum.energy_j, "All clocks at maximum", "X", 9, INK)
        point(frontier.min_energy_time_s, float(frontier.energies_j[-1]), "T*: least energy", "o", 8, FRONTIER)
        if plan is not None:
            name = f"Plan: saving {percent(plan.saving)}, slowdown {percent(plan.slowdown)}"
            point(plan.iteration_time_s, plan.energy_j, name, "*", 14, CHOSEN)

        axes.set_xlim(*time_limits_s)
        axes.set_ylim(*(limit_j / energy.factor for limit_j in energy_limits_j))
        axes.set_xlabel("Iteration time [s]")
        axes.set_ylabel(f"Energy of an iteration, one GPU per stage [{energy.unit}]")
        axes.grid(True)
        _draw_relative_axes(axes, maximum, energy)
        axes.set_title(title or schedule_title(frontier.problem.schedule), loc="left", fontsize=11.5, weight="bold")
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
        return figure


def _limits(
    frontier: Frontier[PipelineProblem],
    maximum: Execution,
    baselines: Sequence[Baseline],
    published: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits in s and J: the frontier, the baseline, and all that others reach about as fast as the frontier."""
    first_s = min(frontier.fastest_time_s, maximum.iteration_time_s)
    last_s = max(frontier.min_energy_time_s, maximum.iteration_time_s)
    width_s = max(last_s - first_s, 0.02 * last_s)
    times_s = (first_s - 0.06 * width_s, last_s + _BEYOND * width_s)
    points = [(p.iteration_time_s, p.energy_j) for baseline in baselines for p in baseline.points]
    if published is not None:
        points += zip(*(column.tolist() for column in published), strict=True)
    energies_j = [energy_j for time_s, energy_j in points if times_s[0] <= time_s <= times_s[1]]
    energies_j += [maximum.energy_j, *frontier.energies_j[[0, -1]].tolist()]
    height_j = max(max(energies_j) - min(energies_j), 0.02 * max(energies_j))
    return times_s, (min(energies_j) - _ABOVE * height_j, max(energies_j) + _ABOVE * height_j)


def _draw_relative_axes(axes: Axes, maximum: Execution, energy: Scale) -> None:
    """Slowdown above and saving at the right, against all clocks at maximum."""
    time_s, energy_shown = maximum.iteration_time_s, maximum.energy_j / energy.factor

    def to_slowdown(times: ArrayLike) -> ArrayLike:
        return 100 * (np.asarray(times) / time_s - 1)

    def from_slowdown(percents: ArrayLike) -> ArrayLike:
        return time_s * (1 + np.asarray(percents) / 100)

    def to_saving(energies: ArrayLike) -> ArrayLike:
        return 100 * (1 - np.asarray(energies) / energy_shown)

    def from_saving(percents: ArrayLike) -> ArrayLike:
        return energy_shown * (1 - np.asarray(percents) / 100)

    slowdown = axes.secondary_xaxis("top", functions=(to_slowdown, from_slowdown))
    saving = axes.secondary_yaxis("right", functions=(to_saving, from_saving))
    slowdown.set_xlabel("Slowdown [%]", color=FAINT_INK)
    saving.set_ylabel("Saving [%]", color=FAINT_INK)
    for relative in (slowdown, saving):
        relative.tick_params(labelcolor=FAINT_INK)
        for spine in relative.spines.values():
            spine.set_visible(False)
