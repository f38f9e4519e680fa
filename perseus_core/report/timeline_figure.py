"""The pipeline's timeline: stages as rows, instructions as boxes, coloured by clock or power."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning.execution import Execution
from perseus_core.planning.plan import Plan
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.schedule import Kind, Schedule
from perseus_core.report.drawing import colour_map, figure_style
from perseus_core.report.palette import FAINT_INK, INK, RAMPS, WAITING, Colour, Ramp
from perseus_core.report.timeline import Timeline
from perseus_core.report.titles import plan_heading, schedule_title, time_and_energy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

# A row of the timeline is 1 high; measured down from its middle.
_TOP, _BOTTOM = -0.43, 0.43
_BAR, _BAR_GAP = 0.10, 0.05
_STAGGER = 0.20
_CRITICAL_PATH, _NUMBER = -0.20, 0.10

# Inches.
_LEFT, _RIGHT, _HEADER, _HEADING, _FOOTER = 0.55, 1.0, 0.48, 0.34, 0.48
_OUTSIDE_HATCH = "////"
_LARGEST_FONT, _SMALLEST_FONT = 8.0, 4.6

_HAS_BAR_BELOW = (Kind.BACKWARD, Kind.BACKWARD_INPUT)
_HAS_BAR_ABOVE = (Kind.BACKWARD_WEIGHT,)


def draw_timeline(plan: Plan, *, colour: Colour = "clock", title: str | None = None, width_in: float = 14.0) -> Figure:
    """Draws what a plan does in one iteration.

    Args:
        plan: made or loaded.
        colour: what colours show, `clock` or `power`.
        title: by default the plan's schedule.
        width_in: width of the figure in inches; microbatch numbers are left out where boxes are too narrow for them.

    Raises:
        InputError: if matplotlib is not installed.
    """
    return _draw([_Panel(Timeline.of_plan(plan), f"Plan: {plan_heading(plan)}")], colour, title, width_in)


def draw_before_and_after(
    problem: PipelineProblem,
    baseline: Execution,
    plan: Plan,
    *,
    colour: Colour = "clock",
    title: str | None = None,
    width_in: float = 14.0,
) -> Figure:
    """Draws the baseline (usually all clocks at maximum) above the plan, on one time axis and one colour scale.

    Raises:
        InputError: if matplotlib is not installed.
    """
    before = Timeline.of_execution(problem, baseline)
    same_clock = len(np.unique(baseline.clocks_mhz)) == 1
    name = f"All clocks at {baseline.clocks_mhz[0]} MHz" if same_clock else "Baseline"
    panels = [
        _Panel(before, f"{name}: {time_and_energy(before.iteration_time_s, before.iteration_energy_j)}"),
        _Panel(Timeline.of_plan(plan), f"Plan: {plan_heading(plan)}"),
    ]
    return _draw(panels, colour, title, width_in)


@dataclass(frozen=True)
class _Panel:
    """One timeline of a figure and the line of text above it."""

    timeline: Timeline
    heading: str


def _draw(panels: list[_Panel], colour: Colour, title: str | None, width_in: float) -> Figure:
    with figure_style():
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure

        ramp, schedule = RAMPS[colour], panels[0].timeline.schedule
        values = np.concatenate([panel.timeline.coloured_by(colour) for panel in panels])
        # One clock for all is a scale of its own: it stands at the upper end.
        lowest = values.min() if values.min() < values.max() else 0.0
        mapping = ScalarMappable(Normalize(lowest, values.max()), colour_map(ramp))

        row_in = float(np.clip(4.4 / schedule.num_stages, 0.12, 0.40))
        panel_in = row_in * schedule.num_stages + 0.1
        height_in = _HEADER + len(panels) * (_HEADING + panel_in) + _FOOTER
        figure = Figure(figsize=(width_in, height_in))
        end_s = max(panel.timeline.iteration_time_s for panel in panels)

        axes: Axes | None = None
        top_in = height_in - _HEADER
        for panel in panels:
            top_in -= _HEADING + panel_in
            box = (
                _LEFT / width_in,
                top_in / height_in,
                (width_in - _LEFT - _RIGHT) / width_in,
                panel_in / height_in,
            )
            axes = figure.add_axes(box, sharex=axes, sharey=axes)
            axes.set_xlim(0, end_s)
            axes.set_ylim(schedule.num_stages - 0.45, -0.55)
            axes.set_title(panel.heading, loc="left", fontsize=9, pad=6)
            points_per_s = (width_in - _LEFT - _RIGHT) * 72 / end_s
            _draw_panel(axes, panel.timeline, mapping, colour, points_per_s)
            axes.tick_params(labelbottom=panel is panels[-1])
        assert axes is not None
        axes.set_xlabel("Time [s]")

        bar_height = (height_in - _HEADER - _HEADING - _FOOTER) / height_in
        bar = figure.add_axes(((width_in - _RIGHT + 0.16) / width_in, _FOOTER / height_in, 0.15 / width_in, bar_height))
        figure.colorbar(mapping, cax=bar, label=ramp.label).outline.set_visible(False)

        baseline_in = height_in - 0.30
        figure.text(
            _LEFT / width_in, baseline_in / height_in, title or schedule_title(schedule), fontsize=11.5, weight="bold"
        )
        _draw_legend(figure, panels, ramp, (width_in - _RIGHT, baseline_in))
        return figure


def _draw_panel(axes: Axes, timeline: Timeline, mapping: ScalarMappable, colour: Colour, points_per_s: float) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.patheffects import Normal, Stroke

    schedule, kinds = timeline.schedule, _kinds(timeline.schedule)
    stage = np.array([i.stage for i in schedule.instructions], np.float64)
    start, end = timeline.start_s, timeline.start_s + timeline.duration_s
    upper, lower = _box_edges(schedule)
    below, above = np.isin(kinds, _HAS_BAR_BELOW), np.isin(kinds, _HAS_BAR_ABOVE)

    for row, order in enumerate(schedule.stages):
        if order:
            axes.fill_between([0, timeline.iteration_time_s], row + _TOP, row + _BOTTOM, color=WAITING, linewidth=0)
    narrowest = points_per_s * float(timeline.duration_s.min())
    faces = mapping.to_rgba(timeline.coloured_by(colour))
    edge_points = float(np.clip(0.1 * narrowest, 0.15, 0.8))
    bar_and_gap = _BAR + _BAR_GAP
    boxes = PolyCollection(
        _rectangles(start, end, stage + upper + above * bar_and_gap, stage + lower - below * bar_and_gap),
        facecolors=faces,
        edgecolors="white",
        linewidths=edge_points,
        label="instructions",
    )
    axes.add_collection(boxes)
    for chosen, bar_upper in ((below, lower - _BAR), (above, upper)):
        edge = (stage + bar_upper)[chosen]
        bars = PolyCollection(
            _rectangles(start[chosen], end[chosen], edge, edge + _BAR),
            facecolors=INK,
            edgecolors="white",
            linewidths=edge_points,
            label="backward bars",
        )
        axes.add_collection(bars)

    _draw_outside(axes, timeline)
    path = timeline.critical_path
    (line,) = axes.plot(
        np.column_stack([start[path], end[path]]).ravel(),
        np.repeat(stage[path] + _CRITICAL_PATH, 2),
        color=RAMPS[colour].critical_path,
        linewidth=1.6,
        solid_joinstyle="round",
        label="critical path",
    )
    line.set_path_effects([Stroke(linewidth=3.2, foreground="white"), Normal()])
    _draw_numbers(axes, timeline, faces, points_per_s)

    axes.set_ylabel("Stage")
    axes.set_yticks(range(0, schedule.num_stages, 1 + (schedule.num_stages - 1) // 24))
    axes.tick_params(axis="y", length=0)
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)


def _draw_outside(axes: Axes, timeline: Timeline) -> None:
    """Time outside the pipeline (data loading, gradient all-reduce, optimizer), where there is any."""
    if not timeline.has_outside:
        return
    axes.axvspan(
        timeline.pipeline_time_s,
        timeline.iteration_time_s,
        facecolor="white",
        edgecolor=FAINT_INK,
        hatch=_OUTSIDE_HATCH,
        linewidth=0,
        alpha=0.5,
        label="outside the pipeline",
    )


def _draw_numbers(axes: Axes, timeline: Timeline, faces: NDArray[np.float64], points_per_s: float) -> None:
    """Writes microbatch numbers into the boxes of every kind whose boxes are wide enough."""
    schedule, kinds = timeline.schedule, _kinds(timeline.schedule)
    digits = len(str(schedule.num_microbatches - 1))
    upper, lower = _box_edges(schedule)
    middle = (upper + lower) / 2 + _NUMBER
    light = faces[:, :3] @ np.array([0.299, 0.587, 0.114]) > 0.55
    # A digit is 0.64 of the font size wide.
    size_of = {
        kind: 0.84 * points_per_s * float(timeline.duration_s[kinds == kind].min()) / (0.64 * digits)
        for kind in sorted(set(kinds.tolist()))
    }
    sizes = [size for size in size_of.values() if size >= _SMALLEST_FONT]
    font_size = min([_LARGEST_FONT, *sizes])
    for i, instruction in enumerate(schedule.instructions):
        if size_of[instruction.kind.value] >= _SMALLEST_FONT:
            axes.text(
                timeline.start_s[i] + timeline.duration_s[i] / 2,
                instruction.stage + middle[i],
                str(instruction.microbatch),
                ha="center",
                va="center",
                fontsize=font_size,
                color=INK if light[i] else "white",
            )


def _draw_legend(figure: Figure, panels: list[_Panel], ramp: Ramp, right_in: tuple[float, float]) -> None:
    """What marks mean, set from right to left so that it ends with the timelines."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    schedule = panels[0].timeline.schedule
    has_outside = any(panel.timeline.has_outside for panel in panels)
    width_in, height_in = figure.get_size_inches()
    x_in, y_in = right_in
    kinds = {i.kind for i in schedule.instructions}
    entries = [("forward", Kind.FORWARD), ("backward", Kind.BACKWARD)]
    entries += [("input gradient", Kind.BACKWARD_INPUT), ("weight gradient", Kind.BACKWARD_WEIGHT)]
    marks: list[tuple[str, Kind | None]] = [(name, kind) for name, kind in entries if kind in kinds]
    marks += [("waiting", None), ("critical path", None)]
    if has_outside:
        marks.append(("outside the pipeline", None))
    if schedule.num_chunks > 1:
        marks.append(("later chunks stand lower", None))

    box_in, tall_in, bar_in = 0.22, 0.15, 0.026

    def rectangle(y: float, height: float, face: str, hatch: str | None = None) -> None:
        corner, size = (x_in / width_in, (y_in + y) / height_in), (box_in / width_in, height / height_in)
        figure.add_artist(Rectangle(corner, *size, facecolor=face, edgecolor=FAINT_INK, linewidth=0, hatch=hatch))

    for name, kind in reversed(marks):
        text = figure.text(x_in / width_in, y_in / height_in, name, fontsize=8.5, ha="right", color=FAINT_INK)
        x_in -= text.get_window_extent().width / figure.dpi
        if name == "later chunks stand lower":
            x_in -= 0.25
            continue
        x_in -= box_in + 0.07
        if name == "critical path":
            ends = [x_in / width_in, (x_in + box_in) / width_in]
            middle = (y_in + tall_in / 3) / height_in
            figure.add_artist(Line2D(ends, [middle, middle], color=ramp.critical_path, linewidth=1.6))
        elif name == "waiting":
            rectangle(-0.03, tall_in, WAITING)
        elif name == "outside the pipeline":
            rectangle(-0.03, tall_in, "white", hatch=_OUTSIDE_HATCH)
        else:
            below, above = kind in _HAS_BAR_BELOW, kind in _HAS_BAR_ABOVE
            base = -0.03 + 0.04 * below
            rectangle(base, tall_in - 0.04 * (below or above), ramp.stops[3])
            if below:
                rectangle(-0.03, bar_in, INK)
            if above:
                rectangle(-0.03 + tall_in - bar_in, bar_in, INK)
        x_in -= 0.25


def _kinds(schedule: Schedule) -> NDArray[np.str_]:
    return np.array([i.kind.value for i in schedule.instructions])


def _box_edges(schedule: Schedule) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Upper and lower edge of each instruction's box in its row, bars included; later chunks stand lower."""
    if schedule.num_chunks == 1:
        return np.full(len(schedule.instructions), _TOP), np.full(len(schedule.instructions), _BOTTOM)
    chunk = np.array([i.chunk for i in schedule.instructions])
    shift = _STAGGER * chunk / (schedule.num_chunks - 1)
    return _TOP + shift, _BOTTOM - _STAGGER + shift


def _rectangles(
    left: NDArray[np.float64], right: NDArray[np.float64], upper: NDArray[np.float64], lower: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """The corners of each box, of shape (4, 2)."""
    corners = ((left, upper), (right, upper), (right, lower), (left, lower))
    return list(np.stack([np.stack(corner, -1) for corner in corners], 1))
