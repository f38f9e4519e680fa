"""Interactive pages: one HTML file each that needs nothing else, no network and no library."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from perseus_core.planning.baselines import Baseline
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.plan import Plan
from perseus_core.planning.problem import PipelineProblem
from perseus_core.report.page_data import frontier_data, plan_data


def frontier_page(
    frontier: Frontier[PipelineProblem],
    *,
    baselines: Sequence[Baseline] = (),
    title: str | None = None,
    num_points: int = 60,
) -> str:
    """The frontier to walk along: each point shows its numbers and its plan's timeline below all clocks at maximum.

    Args:
        frontier: the solved pipeline.
        baselines: what others reach, drawn beside the frontier.
        title: by default the schedule.
        num_points: how many points have a plan on the page.

    Returns:
        The whole page; write it with `save_figure`.
    """
    return _page(frontier_data(frontier, baselines, num_points), title)


def plan_page(plan: Plan, *, title: str | None = None) -> str:
    """One plan: its numbers, its timeline, its clocks.

    Returns:
        The whole page; write it with `save_figure`.
    """
    return _page(plan_data(plan), title)


def _page(data: dict[str, Any], title: str | None) -> str:
    """Puts page, style, script and data together."""
    data = data | {"title": title or data["title"]}
    # Nothing in the data can close the script element that holds it.
    block = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    folder = files("perseus_core.report") / "page"
    page = (folder / "page.html").read_text(encoding="utf-8")
    parts = {
        "{{title}}": html.escape(data["title"]),
        "{{style}}": (folder / "page.css").read_text(encoding="utf-8"),
        "{{script}}": (folder / "page.js").read_text(encoding="utf-8"),
        "{{data}}": block,
    }
    for mark, content in parts.items():
        page = page.replace(mark, content)
    return page
