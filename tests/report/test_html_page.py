"""Interactive pages need nothing but themselves and hold what they show."""

from __future__ import annotations

import json
import re

import pytest

from perseus_core.planning.baselines import zeus_global
from perseus_core.planning.plan import make_plan
from perseus_core.planning.schedule import one_f_one_b
from perseus_core.report.html_page import frontier_page, plan_page
from tests.report.conftest import make_profile


def block(page):
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(content)


@pytest.fixture
def page(frontier):
    return frontier_page(frontier, baselines=(zeus_global(frontier.problem),), num_points=12)


def test_nothing_is_loaded(page, plan):
    """No address, no source, no import: the pages work without a network."""
    for each in (page, plan_page(plan)):
        assert not re.search(r"https?:|\bsrc\s*=|\bhref\s*=|@import|url\((?!#)|fetch\(|XMLHttpRequest", each)


def test_points_run_from_the_fastest_to_least_energy(page, frontier):
    """As many points as asked for, in order, each no slower than its place on the frontier."""
    points = block(page)["points"]
    assert len(points) == 12
    assert points[0]["time_s"] == pytest.approx(frontier.fastest_time_s)
    assert points[-1]["energy_j"] == pytest.approx(frontier.energies_j[-1] * (1 + points[-1]["gap"]))
    assert [p["time_s"] for p in points] == sorted(p["time_s"] for p in points)
    for point in points:
        assert point["energy_j"] >= frontier.energy_j(point["time_s"] * (1 + 1e-6)) * (1 - 1e-6)


def test_first_point_keeps_the_baselines_time(page):
    """The page opens where nothing is slowed down."""
    data = block(page)
    assert data["points"][data["first"]]["slowdown"] <= 1e-6
    assert data["points"][data["first"]]["saving"] > 0


def test_timelines_end_with_the_iteration(page):
    """Starts and durations of a point add up to its time."""
    data = block(page)
    for point in [*data["points"], data["before"]]:
        ends = [
            start * data["tick_s"] + data["settings"][setting][1]
            for start, setting in zip(point["start_ticks"], point["setting"], strict=True)
        ]
        assert len(ends) == len(data["instructions"])
        assert max(ends) == pytest.approx(point["time_s"], rel=1e-4)


def test_plan_page_holds_the_plans_clocks(plan):
    """One point, no frontier, and the clocks in schedule order."""
    data = block(plan_page(plan))
    clocks = [data["settings"][setting][0] for setting in data["points"][0]["setting"]]
    assert clocks == [clock for of_stage in plan.clocks_mhz for clock in of_stage]
    assert data["frontier"] is None


def test_title_cannot_break_out(frontier):
    """A title is text, wherever it stands."""
    page = frontier_page(frontier, title="</script><b>", num_points=2)
    assert "</script><b>" not in page
    assert block(page)["title"] == "</script><b>"


def test_one_stage_and_one_clock(solved):
    """A frontier of one point is a page of one point."""
    frontier = solved(one_f_one_b(1, 2), profile=make_profile(1, (1400,)))
    assert len(block(frontier_page(frontier))["points"]) == 1
    assert len(block(plan_page(make_plan(frontier)))["points"]) == 1


def test_eight_stages_times_24_stay_small(solved):
    """A page of usual size is quick to open and to send."""
    assert len(frontier_page(solved(one_f_one_b(8, 24)))) < 3_000_000
