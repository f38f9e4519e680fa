"""Files are written whole, equal for equal figures, and in the formats we know."""

from __future__ import annotations

import sys

import pytest

from perseus_core.errors import InputError
from perseus_core.report.frontier_figure import draw_frontier
from perseus_core.report.html_page import plan_page
from perseus_core.report.save import save_figure
from perseus_core.report.timeline_figure import draw_timeline

SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_same_figure_gives_the_same_file(tmp_path, frontier, plan, suffix):
    """No dates, no random names: files can be compared."""
    pytest.importorskip("matplotlib")
    for name in ("first", "second"):
        save_figure(draw_timeline(plan), tmp_path / f"timeline-{name}{suffix}")
        save_figure(draw_frontier(frontier, plan=plan), tmp_path / f"frontier-{name}{suffix}")
    for figure in ("timeline", "frontier"):
        first, second = ((tmp_path / f"{figure}-{name}{suffix}").read_bytes() for name in ("first", "second"))
        assert first == second
        assert first.startswith(SIGNATURES[suffix])


def test_users_own_style_does_not_matter(tmp_path, plan):
    """A matplotlibrc of somebody else changes nothing, and is not changed."""
    matplotlib = pytest.importorskip("matplotlib")
    save_figure(draw_timeline(plan), tmp_path / "plain.svg")
    with matplotlib.rc_context({"font.size": 31.0, "axes.facecolor": "red"}):
        save_figure(draw_timeline(plan), tmp_path / "styled.svg")
        assert matplotlib.rcParams["font.size"] == 31.0
    assert (tmp_path / "plain.svg").read_bytes() == (tmp_path / "styled.svg").read_bytes()


def test_page_is_written_as_html(tmp_path, plan):
    """The file holds the page, in UTF-8."""
    page = plan_page(plan)
    save_figure(page, tmp_path / "plan.HTML")
    assert (tmp_path / "plan.HTML").read_text(encoding="utf-8") == page


@pytest.mark.parametrize("name", ["plan.png", "plan"])
def test_page_in_another_format_is_refused(tmp_path, plan, name):
    """One sentence with the file and the remedy; nothing is written."""
    with pytest.raises(InputError, match=r"plan.*use \.html"):
        save_figure(plan_page(plan), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["plan.jpg", "plan"])
def test_unknown_suffix_is_refused(tmp_path, plan, name):
    """One sentence with the file and the formats there are; nothing is written."""
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match=r"plan.*use \.png, \.svg, \.pdf"):
        save_figure(draw_timeline(plan), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_names_the_remedy(monkeypatch, frontier, plan):
    """Who has not installed it is told what to install; pages work without it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (lambda: draw_timeline(plan), lambda: draw_frontier(frontier)):
        with pytest.raises(InputError, match=r'pip install "perseus-train\[report\]"'):
            draw()
    assert plan_page(plan).startswith("<!doctype html>")
