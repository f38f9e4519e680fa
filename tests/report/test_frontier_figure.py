"""The frontier's figure shows what it was given, where it belongs."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from perseus_core.planning.baselines import all_max, zeus_global, zeus_per_stage
from perseus_core.planning.schedule import one_f_one_b
from perseus_core.report.frontier_figure import draw_frontier
from tests.report.conftest import make_profile


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_line_is_the_frontier(frontier):
    """The line runs through every vertex, in joules of the axis' unit."""
    figure = draw_frontier(frontier)
    line = lines(figure)["Frontier"]
    assert "[J]" in figure.axes[0].get_ylabel()
    assert np.allclose(line.get_xdata(), frontier.times_s)
    assert np.allclose(line.get_ydata(), frontier.energies_j)


def test_points_are_where_they_belong(frontier, plan):
    """T*, all clocks at maximum and the plan are marked at their time and energy."""
    drawn = lines(draw_frontier(frontier, plan=plan))
    maximum = all_max(frontier.problem)
    (plan_label,) = (label for label in drawn if label.startswith("Plan"))
    expected = {
        "T*: least energy": (frontier.min_energy_time_s, frontier.energies_j[-1]),
        "All clocks at maximum": (maximum.iteration_time_s, maximum.energy_j),
        plan_label: (plan.iteration_time_s, plan.energy_j),
    }
    for label, (time_s, energy_j) in expected.items():
        assert drawn[label].get_xdata()[0] == pytest.approx(time_s)
        assert drawn[label].get_ydata()[0] == pytest.approx(energy_j)


def test_others_are_drawn_by_name(frontier):
    """Baselines and the published frontier have a line and a name each."""
    baselines = (zeus_global(frontier.problem), zeus_per_stage(frontier.problem))
    published = (frontier.times_s, frontier.energies_j * 1.01)
    drawn = lines(draw_frontier(frontier, baselines=baselines, published=published))
    for baseline in baselines:
        assert len(drawn[baseline.name].get_xdata()) == len(baseline.points)
    assert np.allclose(drawn["Published frontier, as printed"].get_ydata(), published[1])


def test_frontier_and_baseline_are_inside_the_axes(frontier):
    """However far baselines reach, the frontier is seen from end to end."""
    axes = draw_frontier(frontier, baselines=(zeus_global(frontier.problem),)).axes[0]
    maximum = all_max(frontier.problem)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < min(frontier.fastest_time_s, maximum.iteration_time_s)
    assert right > frontier.min_energy_time_s
    assert low < frontier.energies_j[-1]
    assert high > maximum.energy_j


def test_beyond_t_star_waiting_costs_blocking_power(frontier):
    """The dotted line rises by the blocking power of all stages."""
    line = lines(draw_frontier(frontier))["Beyond T*: wait at blocking power"]
    (t0, t1), (e0, e1) = line.get_xdata(), line.get_ydata()
    assert (e1 - e0) / (t1 - t0) == pytest.approx(frontier.problem.blocking_power_w)


def test_a_frontier_of_one_point(solved):
    """One clock leaves one point; the figure has room around it."""
    axes = draw_frontier(solved(one_f_one_b(1, 2), profile=make_profile(1, (1400,)))).axes[0]
    left, right = axes.get_xlim()
    assert left < right
